"""Adapters as models over real sockets: named, mixed, loaded and unloaded by request, and kept inside their folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import NotFoundError
from typer.testing import CliRunner

from memwall.cli import app
from memwall.models import DEMO_DIRECTORY, ModelConfig
from tests.models.loras import make_lora
from tests.serve.conftest import Running, Starter

CONFIG = ModelConfig.from_directory(DEMO_DIRECTORY)
PROMPT = "The history of the city begins with a small harbour"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("loras")
    for number, name in enumerate(("red", "green", "blue")):
        make_lora(where / "served" / name, CONFIG, rank=8 << number, seed=number)
    make_lora(where / "served" / "bad", CONFIG, use_qalora=True)
    make_lora(where / "outside", CONFIG, seed=7)
    make_lora(where / "named", CONFIG, rank=4, seed=9, strength=2.0)
    return where


@pytest.fixture(scope="module")
def server(starter: Starter, folder: Path) -> Running:
    return starter(
        "--memory", "170MB", "--weights", "int8", "--context", "256", "--lora-dir", str(folder / "served"),
        "--lora", f"mine={folder / 'named'}", "--lora-batch", "8", "--first-token-limit", "300",
    )  # fmt: skip


def complete(server: Running, model: str, **changes: object) -> str:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 16, "temperature": 0, **changes}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["model"] == model
    return str(found["choices"][0]["text"])


def test_adapters_are_models(server: Running) -> None:
    assert server.told["adapters"] == ["mine", "blue", "green", "red"]
    with server.client() as client:
        found = {model.id: model for model in client.models.list().data}
        assert set(found) == {"demo", "mine", "red", "green", "blue"}
        assert found["red"].model_dump()["parent"] == "demo"
        assert client.models.retrieve("red").id == "red"
        chat = client.chat.completions.create(model="red", messages=[{"role": "user", "content": "hi"}], max_tokens=3)
        assert chat.model == "red"
        with pytest.raises(NotFoundError, match="this server has 'demo' and 4 adapters"):
            client.completions.create(model="bad", prompt="a")


def test_mixed_requests_give_what_each_gives_alone(server: Running) -> None:
    names = ["demo", "red", "green", "blue", "mine"]
    alone = {name: complete(server, name, cache_salt="alone") for name in names}
    assert len(set(alone.values())) == 5
    with ThreadPoolExecutor(10) as pool:
        together = list(pool.map(lambda name: complete(server, name, cache_salt="mixed"), names * 4))
    assert together == [alone[name] for name in names * 4]


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
@pytest.mark.parametrize("scheduler", ["semi-pd", "nexus"])
def test_two_workers_give_what_one_gives(server: Running, starter: Starter, folder: Path, scheduler: str) -> None:
    served = folder / "served"
    two = starter(
        "--memory", "240MB", "--weights", "int8", "--context", "256", "--scheduler", scheduler,
        "--lora", f"mine={folder / 'named'}", "--lora", f"red={served / 'red'}", "--lora", f"blue={served / 'blue'}",
    )  # fmt: skip
    assert sorted(two.told["adapters"]) == ["blue", "mine", "red"]
    assert len(two.memory()["phases"]["processes"]) >= 3
    names = ["demo", "red", "blue", "mine"]
    alone = {name: complete(server, name, cache_salt="two") for name in names}
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda name: complete(two, name, cache_salt="two"), names * 3))
    assert together == [alone[name] for name in names * 3]
    assert two.memory()["resident_bytes"] <= two.memory()["budget_bytes"]
    with two.client() as client, pytest.raises(NotFoundError, match="3 adapters"):
        client.completions.create(model="green", prompt="a")


def test_what_a_name_cached_is_of_no_use_to_another(server: Running) -> None:
    prompt = PROMPT * 4

    def cached(model: str) -> int:
        answer = server.post("/v1/completions", {"model": model, "prompt": prompt, "max_tokens": 1}).json()
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert [cached(name) for name in ("red", "green", "demo")] == [0, 0, 0]
    assert min(cached(name) for name in ("red", "green", "demo")) >= 16


def test_loading_and_unloading(server: Running, folder: Path) -> None:
    make_lora(folder / "served" / "late", CONFIG, rank=16, seed=3)
    body = {"lora_name": "new", "lora_path": "late"}
    answer = server.post("/v1/load_lora_adapter", body)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'new' added successfully.")
    first = complete(server, "new")
    again = server.post("/v1/load_lora_adapter", body)
    assert again.status_code == 400
    assert "loaded already" in again.json()["error"]["message"]
    shutil.rmtree(folder / "served" / "late")
    make_lora(folder / "served" / "late", CONFIG, rank=16, seed=4)
    absolute = {**body, "lora_path": str(folder / "served" / "late"), "load_inplace": True}
    assert server.post("/v1/load_lora_adapter", absolute).status_code == 200
    assert complete(server, "new") != first
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "new"}).status_code == 200
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "new"}).status_code == 404
    assert server.post("/v1/completions", {"model": "new", "prompt": "a"}).status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"lora_name": "x", "lora_path": "../outside"}, 403, "outside the server's --lora-dir"),
        ({"lora_name": "x", "lora_path": "/etc"}, 403, "outside the server's --lora-dir"),
        ({"lora_name": "x", "lora_path": "link"}, 403, "outside the server's --lora-dir"),
        ({"lora_name": "x", "lora_path": "."}, 403, "outside the server's --lora-dir"),
        ({"lora_name": "x", "lora_path": "a\0b"}, 400, "lora_path is missing"),
        ({"lora_name": "x", "lora_path": "nothing"}, 400, "there is no such folder"),
        ({"lora_name": "x", "lora_path": "bad"}, 400, "use_qalora is set"),
        ({"lora_name": "x"}, 400, "lora_path is missing"),
        ({"lora_path": "red"}, 400, "lora_name is missing"),
        ({"lora_name": "demo", "lora_path": "red"}, 400, "base model's own name"),
        ({"lora_name": "a\nb", "lora_path": "red"}, 400, "printable characters"),
        ({"lora_name": "x", "lora_path": "red", "path": 1}, 400, "unknown parameter"),
    ],
)
def test_refused_bodies(server: Running, folder: Path, body: dict[str, object], status: int, words: str) -> None:
    link = folder / "served" / "link"
    if not link.is_symlink():
        link.symlink_to(folder / "outside")
    answer = server.post("/v1/load_lora_adapter", body)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]


def test_memory_and_metrics_tell_of_adapters(server: Running) -> None:
    complete(server, "red")
    found = server.memory()
    assert found["adapters"]["known"] >= 4
    assert found["adapters"]["pages"] == found["pool"]["tenants"]["adapters"] > 0
    rows = {row["owner"]: row["bytes"] for row in found["ledger"]}
    assert rows["adapters/pages"] == found["adapters"]["pages"] * found["pool"]["page_bytes"]
    assert any(mark == -4 for mark, _ in found["pool"]["cells"])
    assert found["resident_peak_bytes"] <= found["budget_bytes"]
    text = server.get("/metrics").text
    assert "memwall:lora_adapter_loads_total" in text
    assert 'memwall:pool_pages{tenant="adapters"}' in text


def test_the_key_guards_the_routes_and_nothing_is_loaded_without_a_folder(starter: Starter, folder: Path) -> None:
    held = starter(
        "--weights", "int4", "--context", "128", "--api-key", "secret", "--lora", f"mine={folder / 'named'}",
        key="secret",
    )  # fmt: skip
    body = {"lora_name": "x", "lora_path": "red"}
    for route in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        assert held.post(route, body).status_code == 401
    answer = held.post("/v1/load_lora_adapter", body, headers={"Authorization": "Bearer secret"})
    assert answer.status_code == 403
    assert "--lora-dir" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lora", "x"], "give NAME=DIR"),
        (["--lora", "demo={folder}/named"], "base model's own name"),
        (["--lora", "x={folder}/nothing"], "no such folder"),
        (["--lora", "x={folder}/served/bad"], "use_qalora is set"),
        (["--lora", "x={folder}/named", "--lora", "x={folder}/named"], "given twice"),
        (["--lora-dir", "{folder}/nothing"], "no such folder"),
        (["--lora-batch", "4"], "need adapters"),
    ],
)
def test_bad_options_end_with_2(folder: Path, options: list[str], words: str) -> None:
    given = [option.format(folder=folder) for option in options]
    done = CliRunner().invoke(app, ["serve", "demo", "--port", "0", *given])
    assert done.exit_code == 2, done.output
    assert words in " ".join(done.output.split())


def test_an_adapter_that_does_not_fit_ends_with_1(folder: Path) -> None:
    make_lora(folder / "wide", CONFIG, rank=512, targets=("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    given = ["--memory", "110MB", "--weights", "int4", "--context", "512", "--lora", f"wide={folder / 'wide'}"]
    command = [sys.executable, "-m", "memwall", "serve", "demo", "--port", "0", *given]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 1, done.stderr
    assert "'wide' takes" in done.stderr
