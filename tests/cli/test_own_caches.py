"""Compressing caches behind the verbs that serve: a batch, and what does not go with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memwall.cli.serve import complete_paged_kv
from tests.cli.test_batch import OPTIONS, batch, texts, write
from tests.compress.test_quamba2 import make_model
from tests.models.ssm_models import MAMBA2

Memwall = Callable[..., Any]


def test_a_batch_with_caches_that_keep_all_has_the_same_answers(memwall: Memwall, tmp_path: Path) -> None:
    source, found = write(tmp_path / "in.jsonl", batch(12)), []
    for kv in ("float16", "snapkv(1)"):
        target = tmp_path / f"{kv[:4]}.jsonl"
        done = memwall("batch", "demo", source, target, *OPTIONS, "--kv", kv, "--scheduler", "fcfs", "--json")
        assert done.exit_code == 0, done.stderr
        found.append(texts(target))
        owners = {row["owner"] for row in json.loads(done.stdout)["ledger"]}
        assert ("kv/pages" in owners) == (kv == "float16")
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--kv", "kivi(2bit)", "--scheduler", "fastswitch"), ("fastswitch", "fcfs")),
        (("--kv", "kivi(2bit)", "--scheduler", "distserve"), ("distserve", "fcfs")),
        (("--kv", "kivi(2bit)", "--lora-dir", "."), ("adapters", "--lora-dir")),
        (("--kv", "instinfer"), ("storage process",)),
        (("--kv", "snapkv(0.5)+vattention"), ("slots",)),
        (("--kv", "snapkv(2)"), ("at most 1",)),
        (("--kv", "kivi(9bit)"), ("bits",)),
        (("--kv", "kivy"), ("unknown KV policy", "kivi")),
        (("--kv", "locret"), ("memwall fit",)),
    ],
)
def test_what_does_not_go_with_them_is_refused(
    memwall: Memwall, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    done = memwall("serve", "demo", "--port", "0", "--weights", "int8", *arguments)
    assert done.exit_code == 2, (done.stderr, done.exception)
    assert all(word in done.stderr for word in words), done.stderr


def test_a_batch_for_a_model_without_attention(memwall: Memwall, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "demo", MAMBA2)  # as the lines of the batch name it
    source, target = write(tmp_path / "in.jsonl", batch(6)), tmp_path / "out.jsonl"
    refused = memwall("batch", folder, source, target, "--weights", "float32")
    assert refused.exit_code == 2
    assert "--scheduler fcfs" in refused.stderr
    done = memwall("batch", folder, source, target, "--weights", "float32", "--scheduler", "fcfs")
    assert done.exit_code == 0, done.stderr
    assert len(texts(target)) == 6


def test_completion_offers_them() -> None:
    assert complete_paged_kv("sna") == ["snapkv"]
    assert "float16" in complete_paged_kv("f")
