"""`--kv vattention` of the verbs that serve: batches answered from slots, and what does not go with them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memwall.cli.serve import complete_paged_kv
from tests.cli.test_batch import OPTIONS, batch, texts, write

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memfd is Linux's")
Memwall = Callable[..., Any]


def test_a_batch_from_slots_has_the_same_answers(memwall: Memwall, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", batch(24))
    found = {}
    for kv in ("float16", "vattention(page_kib=4)"):
        target = tmp_path / f"{kv[:4]}.jsonl"
        done = memwall("batch", "demo", source, target, *OPTIONS, "--kv", kv, "--scheduler", "fcfs", "--json")
        assert done.exit_code == 0, done.stderr
        found[kv] = texts(target)
        owners = {row["owner"] for row in json.loads(done.stdout)["ledger"]}
        assert ("kv/pages" in owners, "kv/mapped" in owners) == (kv == "float16", kv != "float16")
    assert len(set(map(str, found.values()))) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--kv", "vattention", "--scheduler", "nanoflow"), ("nanoflow", "fcfs")),
        (("--kv", "vattention", "--scheduler", "semi-pd"), ("semi-pd", "fcfs")),
        (("--kv", "vattention", "--scheduler", "fastswitch"), ("fastswitch", "fcfs")),
        (("--kv", "vattention", "--scheduler", "distserve", "--ray", "local"), ("distserve", "fcfs")),
        (("--kv", "vattention", "--lora-dir", "."), ("adapters", "--lora-dir")),
        (("--kv", "vattention(page_kib=6)"), ("page_kib=6", "power of two")),
        (("--kv", "vattention(slots=6)"), ("slots", "megacache")),
        (("--kv", "vattention+think(0.4)"), ("think", "slots")),
        (("--kv", "vattention("), ("must look like",)),
        (("--kv", "vattention", "--max-sequences", "1024", "--step-tokens", "1024", "--context", "100k"), ("1,024",)),
    ],
)
def test_what_does_not_go_with_slots_is_refused(
    memwall: Memwall, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    done = memwall("serve", "demo", "--port", "0", "--weights", "int8", *arguments)
    assert done.exit_code == 2, (done.stderr, done.exception)
    assert all(word in done.stderr for word in words), done.stderr


def test_a_batch_that_is_planned_needs_tables(memwall: Memwall, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", batch(2)), tmp_path / "out.jsonl"
    done = memwall("batch", "demo", source, target, *OPTIONS, "--kv", "vattention")
    assert done.exit_code == 2
    assert "--scheduler fcfs" in done.stderr
    assert not target.exists()


def test_a_budget_too_small_says_what_would_work(spawn: Any) -> None:
    done = spawn("serve", "demo", "--port", "0", "--kv", "vattention", "--weights", "int8", "--memory", "30MB")
    assert done.returncode == 1
    assert "Try --memory" in done.stderr or "smallest" in done.stderr, done.stderr


def test_completion_offers_it() -> None:
    assert complete_paged_kv("va") == ["vattention"]
    assert "float16" in complete_paged_kv("")
