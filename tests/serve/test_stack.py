"""A server on a stack of blocks: `POST /v1/budget` drops and reads blocks while requests run."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from tests.compress.tiny_model import make_model, make_stack
from tests.serve.conftest import Starter

ASK = {"prompt": "The river", "max_tokens": 60, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("stack")
    model = make_model(place / "source", hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    return make_stack(model, place / "out", blocks=10)


def test_blocks_follow_the_budget(starter: Starter, folder: Path) -> None:
    server = starter("--memory", "160MB", "--context", "128", "--max-sequences", "4", model=str(folder))

    def told() -> dict[str, Any]:
        found: dict[str, Any] = server.get("/v1/budget").json()
        return found

    most = told()["blocks"]["most"]
    assert told()["blocks"]["held"] == most
    whole = server.post("/v1/completions", ASK).json()["choices"][0]["text"]
    least = told()["least_bytes"]
    codes: list[int] = []
    threads = [
        threading.Thread(target=lambda: codes.append(server.post("/v1/completions", ASK).status_code)) for _ in range(6)
    ]
    for one in threads:
        one.start()
    held = []
    for more in (900_000, 1_700_000, 300_000):  # beside the least, which moves with the process
        budget = told()["least_bytes"] + more
        assert server.post("/v1/budget", {"memory": budget}).status_code == 200
        now = told()
        held.append(now["blocks"]["held"])
        assert now["resident_bytes"] <= budget
    for one in threads:
        one.join()
    assert codes == [200] * 6
    assert held[2] < held[1] <= most
    assert server.post("/v1/budget", {"memory": "160MB"}).status_code == 200
    assert server.post("/v1/completions", ASK).json()["choices"][0]["text"] == whole
    assert told()["blocks"]["held"] == most
    assert server.post("/v1/budget", {"memory": least // 2}).status_code == 400
