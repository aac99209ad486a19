"""`memwall eval`: the six figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

KEYS = {
    "perplexity",
    "kl_nats",
    "top1_agreement",
    "tokens",
    "bits_per_weight",
    "kv_bits_per_value",
    "kv_bytes",
}


def test_figures(memwall: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A city lies on a river, and the river comes down from the hills. " * 20)
    plain = json.loads(memwall("eval", "demo", text, "--limit", "64", "--json").stdout)
    assert plain.keys() == KEYS
    assert plain["kl_nats"] < 1e-4
    assert plain["kv_bits_per_value"] is None
    packed = json.loads(memwall("eval", "demo", text, "--limit", "64", "--weights", "int4", "--json").stdout)
    assert packed["kl_nats"] > plain["kl_nats"]
    assert packed["bits_per_weight"] == 4.25
    cached = json.loads(
        memwall("eval", "demo", text, "--limit", "200", "--weights", "int4", "--kv", "kivi(2bit)", "--json").stdout
    )
    assert cached["kv_bits_per_value"] < 16
    assert cached["kl_nats"] > 0
    table = memwall("eval", "demo", text, "--limit", "64")
    assert all(key in table.stdout for key in KEYS)


def test_a_compressed_model_is_taken_as_it_is(memwall: Any, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("A city lies on a river, and the river comes down from the hills. " * 20)
    assert memwall("compress", "demo", out, "--method", "rtn", "--bits", "int4", "--quiet").exit_code == 0
    alone = json.loads(memwall("eval", out, text, "--limit", "64", "--json").stdout)
    assert alone["kl_nats"] is None
    assert alone["bits_per_weight"] < 4.3
    beside = json.loads(memwall("eval", out, text, "--limit", "64", "--reference", "demo", "--json").stdout)
    assert beside["perplexity"] == alone["perplexity"]
    assert beside["kl_nats"] > 0
    refused = memwall("eval", out, text, "--weights", "float32")
    assert refused.exit_code == 2
    assert "--weights saved" in refused.stderr


def test_a_stream_past_the_models_positions(memwall: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A city lies on a river, and the river comes down from the hills. " * 90)
    options = ("eval", "demo", text, "--stream", "--json")
    found = json.loads(memwall(*options, "--kv", "lambda(sinks=4,window=64)").stdout)
    assert found["tokens"] > 512
    for policy, says in (("lambda(sinks=4,window=64)", None), ("kivi", "lambda"), (None, "--kv POLICY")):
        done = memwall(*options, *(("--kv", policy) if policy else ()))
        assert done.exit_code == (0 if says is None else 2)
        assert says is None or says in done.stderr
