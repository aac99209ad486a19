"""Cache policies as a user writes them: joined ones work in every verb, and what cannot be is refused with status 2."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

JOINED = "snapkv(budget=0.25)+think(0.4)+kivi(2bit,group=16,residual=16)"
TEXT = "A city lies on a river, and the river comes down from the hills. " * 30


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_eval_prunes_the_first_half_and_counts_all_bytes(memwall: Any, text: Path) -> None:
    figures = {
        kv: json.loads(memwall("eval", "demo", text, "--limit", "200", "--kv", kv, "--json").stdout)
        for kv in ("float16", "snapkv(0.25)", JOINED)
    }
    plain, pruned, joined = figures.values()
    assert {found["tokens"] for found in figures.values()} == {101}  # of 201 with the begin token
    assert plain["kv_bits_per_value"] == pytest.approx(16, rel=0.05)  # whole pages
    assert plain["kv_bytes"] > pruned["kv_bytes"] > joined["kv_bytes"]
    assert plain["kl_nats"] < pruned["kl_nats"] < joined["kl_nats"]
    # 100 prompt tokens of which 32 + 17 stay, and 100 later ones
    assert pruned["kv_bits_per_value"] == pytest.approx(16 * 149 / 200, rel=0.1)
    longer = json.loads(
        memwall(
            "eval", "demo", text, "--limit", "200", "--kv", "snapkv(0.25)", "--prompt-tokens", "180", "--json"
        ).stdout
    )
    assert longer["tokens"] == 21
    assert longer["kv_bytes"] < pruned["kv_bytes"]


def test_eval_refuses_prompts_that_leave_nothing(memwall: Any, text: Path) -> None:
    for more, says in (
        (("--kv", "float16", "--prompt-tokens", "500", "--limit", "100"), "500"),
        (("--prompt-tokens", "50"), "--kv"),
    ):
        result = memwall("eval", "demo", text, *more)
        assert result.exit_code == 2
        assert says in result.stderr


def test_run_and_plan_show_the_product_of_the_savings(memwall: Any) -> None:
    arguments = ("run", "demo", TEXT, "--max-new-tokens", "2", "--ignore-eos", "--kv", JOINED)
    cache = json.loads(memwall(*arguments, "--json").stdout)["cache"]
    assert len(cache["factors"]) == 3
    assert math.prod(cache["factors"].values()) == pytest.approx(cache["bytes"] / cache["float16_bytes"], rel=0.02)
    assert cache["share"] == cache["bytes"] / cache["float16_bytes"] < 0.3
    shown = memwall(*arguments).stderr
    assert f"= {cache['share']:.3f}" in shown
    assert all(f" {factor:.3f}" in shown for factor in cache["factors"].values())
    planned = ("plan", "demo", "--weights", "int4", "--kv", JOINED, "--no-measure", "--context", "900")
    document = json.loads(memwall(*planned, "--prompt-tokens", "880", "--json").stdout)
    product = math.prod(document["kv_savings"].values())
    table = memwall(*planned, "--prompt-tokens", "880").stdout
    assert f"= {product:.3f}" in table
    assert product < 0.2
    # the plan's bits hold the prompt's staging besides
    assert document["kv_bits_per_value"] > 16 * product
    assert "in float16's bytes" not in memwall(*planned[:5], "float16", "--no-measure", "--context", "64").stdout


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("snapkv(0)", "above 0 and at most 1"),
        ("snapkv(budget=1.5)", "above 0 and at most 1"),
        ("locret(0)", "above 0 and at most 1"),
        ("epicache(budget=0)", "above 0 and at most 1"),
        ("think(1)", "below 1"),
        ("cskv(0)", "above 0"),
        ("snapkv+locret", "both choose the tokens"),
        ("kivi+vattention", "both store the rows"),
        ("think+xquant", "use xquant alone"),
        ("epicache+kivi", "does not work on top of kivi"),
        ("think+vattention", "not in vattention"),
        ("snapkv(budget=0.2,0.3)", "give one"),
        ("snapkv(0.25", "must look like"),
    ],
)
def test_what_cannot_be_is_refused_alike_everywhere(memwall: Any, text: Path, policy: str, says: str) -> None:
    for verb in (("run", "demo", "hello"), ("plan", "demo", "--no-measure"), ("eval", "demo", text)):
        result = memwall(*verb, "--kv", policy)
        assert result.exit_code == 2, (verb, result.stderr)
        assert says in result.stderr
        assert "Traceback" not in result.stderr


def test_a_plan_says_what_must_be_fitted_first(memwall: Any) -> None:
    shown = memwall("plan", "demo", "--weights", "int4", "--kv", "locret", "--no-measure", "--context", "512")
    assert shown.exit_code == 0
    assert "memwall fit" in " ".join(shown.stdout.split())


def test_a_first_use_that_computes_matrices_keeps_its_budget(
    spawn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # nothing was kept from earlier runs
    asked = ("run", "demo", "The city", "--kv", "xquant(4bit)", "--max-new-tokens", "8", "--ignore-eos", "--json")
    smallest = re.search(r"ram=(\d+) bytes", spawn(*asked, "--memory", "5MB").stderr)
    assert smallest
    enough = int(smallest[1]) + (1 << 20)  # the program itself may take a little more than the last time
    result = spawn(*asked, "--memory", str(enough))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["peak_resident_bytes"] <= enough


def test_a_run_on_storage_says_what_crossed_the_link(memwall: Any) -> None:
    arguments = ("run", "demo", TEXT, "--max-new-tokens", "4", "--ignore-eos", "--kv", "instinfer(1,link_mb=500)")
    found = json.loads(memwall(*arguments, "--json").stdout)
    (drive,) = found["storage"]["drives"]
    assert found["storage"]["emulated"]
    assert drive["link"]["down_bytes"] > 0 < drive["pages_written"]
    tiers = {row["owner"]: row["tier"] for row in found["ledger"]}
    assert (tiers["kv/flash"], tiers["kv/storage process"]) == ("disk", "storage")
    plain = memwall(*arguments[:-1], "float16", "--json")
    assert json.loads(plain.stdout)["storage"] is None
    assert json.loads(plain.stdout)["text"] == found["text"]
    shown = memwall(*arguments).stderr
    assert "up the link (emulated)" in shown
    assert "on all tiers" in shown


def test_a_file_over_the_disk_budget_is_refused(memwall: Any) -> None:
    refused = memwall("run", "demo", TEXT, "--kv", "instinfer(1)", "--budget", "ram=500MB,disk=100kB")
    assert refused.exit_code == 1
    assert "disk" in refused.stderr
