"""`memwall simulate`: plans for a cluster from a config.json alone, tables of this machine, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Memwall = Callable[..., Any]
SMALL = ("--requests", "12", "--prompt-tokens", "200", "--output-tokens", "10", "--jobs", "1")


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    told = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 32000, "num_attention_heads": 32,
        "num_key_value_heads": 8, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "num_local_experts": 8,
        "num_experts_per_tok": 2, "dtype": "bfloat16",
    }  # fmt: skip
    folder = tmp_path / "mixtral"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(told))
    return folder


def test_plans_for_a_cluster(memwall: Memwall, mixtral: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = memwall("simulate", "serving", mixtral, "--devices", "4", *SMALL, "--json", "--html", page, "--all")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    everything = [told["best"], *told["runners_up"]]
    means = [one["completion"]["mean"] for one in everything]
    assert means == sorted(means)
    names = {one["plan"]["name"] for one in everything}
    assert {"TP4", "attention DP4 experts EP4", "PP4"} <= names
    assert told["case"]["devices"] == 4
    assert "<svg" in page.read_text()
    one = memwall("simulate", "serving", mixtral, "--devices", "4", *SMALL, "--plan", "TP4")
    assert one.exit_code == 0
    assert len(one.stdout.splitlines()) == 3


def test_energy_and_formats(memwall: Memwall, mixtral: Path) -> None:
    options = ("--weights", "int4", "--kv", "float8", "--goal", "energy", "--clocks", "1,0.5", "--rate", "5")
    done = memwall("simulate", "serving", mixtral, "--devices", "2", *SMALL, *options, "--json")
    assert done.exit_code == 0, done.stderr
    best = json.loads(done.stdout)["best"]
    assert best["joules_per_token"] > 0
    assert best["clock"] in (1.0, 0.5)


def test_formats_are_tried_beside_plans(memwall: Memwall, mixtral: Path) -> None:
    options = (
        "--weights",
        "float32,float16,int4",
        "--devices",
        "2",
        "--goal",
        "slo",
        "--slo-first",
        "5",
        "--slo-token",
        "1",
    )
    done = memwall("simulate", "serving", mixtral, *SMALL, *options, "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    everything = [told["best"], *told["runners_up"]]
    # 187 GB at 32 bits do not fit two devices
    assert {one["weights"] for one in everything} == {"float16", "int4"}
    assert everything[0]["both_met"] == max(one["both_met"] for one in everything)


def test_tables_of_this_machine(memwall: Memwall, tmp_path: Path) -> None:
    out = tmp_path / "tables"
    done = memwall(
        "simulate", "profile", "demo", out, "--context", "128", "--max-requests", "2", "--step-tokens", "32", "--json"
    )
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert {Path(name).name for name in told["files"]} == {"gemm.csv", "attention.csv", "pass.csv"}
    formats = ("--weights", told["weights"], "--kv", told["kv"], "--activations", told["activations"])
    load = ("--requests", "4", "--prompt-tokens", "50", "--output-tokens", "8", "--step-tokens", "32")
    done = memwall(
        "simulate", "serving", "demo", "--machine", "cloud-2core", "--devices", "1", "--profiles", out, *formats, *load,
        "--max-batch", "2", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["best"]["time_sources"]["measured"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("options", "status", "says"),
    [
        (("--devices", "1"), 1, "does not fit 1 devices"),
        (("--nodes", "2"), 2, "--network"),
        (("--goal", "cost"), 2, "it is one of latency, time, energy, slo"),
        (("--scheduler", "lifo"), 2, "fcfs, batchllm"),
        (("--clocks", "fast"), 2, "shares of the full clock"),
        (("--clocks", "0"), 2, "above 0"),
        (("--weights", "zork"), 2, "unknown number format"),
        (("--machine", "h1000"), 2, "unknown machine"),
        (("--machine", "a100-40gb", "--goal", "energy"), 2, "states no power"),
        (("--plan", "TP3"), 2, "plans for 8 devices are"),
        (("--slo-first", "0"), 2, "above zero"),
        (("--link", "5"), 2, "rate"),
        (("--html", "/no/such/page.html"), 2, "not a directory"),
    ],
)
def test_bad_input(memwall: Memwall, mixtral: Path, options: tuple[str, ...], status: int, says: str) -> None:
    done = memwall("simulate", "serving", mixtral, *SMALL, *options)
    assert done.exit_code == status, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_an_fpga_card(memwall: Memwall) -> None:
    done = memwall("simulate", "accllm", "--json", "--contexts", "2048,32768", "--output-tokens", "64")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model"] == "llama-2-7b"
    assert [one["design"] for one in found["designs"]] == ["FlightLLM", "AccLLM"]
    assert found["contexts"][1]["FlightLLM"] is None
    table = memwall("simulate", "accllm", "demo", "--lanes", "2", "--window", "64")
    assert table.exit_code == 0, table.stderr
    assert "flush after" in table.stdout
    assert "published" not in table.stderr


@pytest.mark.parametrize(
    ("options", "status", "says"),
    [
        (("--lanes", "9"), 2, "runs into"),
        (("--spacing", "9"), 2, "--lanes"),
        (("--contexts", "2k"), 2, "numbers of tokens"),
        (("--machine", "laptop-ryzen-7840u"), 2, "hbm"),
        (("--prompt-tokens", "200000"), 1, "shorten the context"),
    ],
)
def test_bad_input_for_the_card(memwall: Memwall, options: tuple[str, ...], status: int, says: str) -> None:
    done = memwall("simulate", "accllm", *options)
    assert done.exit_code == status, done.stderr
    assert says in done.stderr


def test_nanoflow_bounds_an_iteration(memwall: Memwall) -> None:
    done = memwall("simulate", "nanoflow", "demo", "--devices", "1", "--reached", "1000", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["limit"] in ("compute", "memory")
    assert told["ratio"] == pytest.approx(told["memory_seconds"] / told["compute_seconds"])
    assert told["share_of_optimal"] == pytest.approx(1000 / told["optimal_tokens_per_s"])
    assert [row["name"] for row in told["operations"]] == ["kqv", "o", "up_gate", "down", "decode", "prefill"]


def test_nanoflow_searches_and_draws(memwall: Memwall, tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="the search needs SciPy")
    plot = tmp_path / "pipeline.svg"
    options = ("--devices", "1", "--batch-tokens", "512", "--search", "--seconds", "3", "--plot", plot)
    done = memwall("simulate", "nanoflow", "demo", *options)
    assert done.exit_code == 0, done.stderr
    assert "times as fast" in done.stdout
    assert "<svg" in plot.read_text()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--plot", "x.svg"), "add --search"),
        (("--plot", "x.png", "--search"), "ends in .svg"),
        (("--plot", "/no/such/x.svg", "--search"), "not a directory"),
        (("--reached", "0"), "above 0"),
        (("--profiled", "fast"), "312TFLOP/s"),
        (("--prompt-tokens", "0"), "above 0"),
        (("--machine", "cloud-2core"), "--link"),
    ],
)
def test_nanoflow_refuses_bad_input(memwall: Memwall, options: tuple[str, ...], says: str) -> None:
    done = memwall("simulate", "nanoflow", "demo", *options)
    assert done.exit_code == 2, done.stderr
    assert says in done.stderr
