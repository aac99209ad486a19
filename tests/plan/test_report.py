"""The plan's table and page: complete, self-contained, escaped, written whole or not at all."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from memwall.errors import InputError, MissingDependency
from memwall.plan.base import Choice, Option, Plan, PlanRow, Quality
from memwall.plan.report import chosen_option, render_html, table, write_html

CHOICE = Choice(weights="mixed-3.70", kv="kivi(2bit)", context=512)
QUALITY = Quality(kl_nats=0.031, perplexity=20.5, top1_agreement=0.93, measured_on="bundled held-out text", tokens=512)
PLAN = Plan(
    model="toy <b>",
    fingerprint="abc",
    machine="desk",
    budget={"ram": 100_000_000},
    choice=CHOICE,
    rows=(
        PlanRow(owner="weights/int4-g64", tier="ram", nbytes=60_000_000),
        PlanRow(owner="runtime", tier="ram", nbytes=39_000_000),
    ),
    peak_bytes={"ram": 99_000_000},
    bits_per_weight=3.7,
    kv_bits_per_value=2.9,
    decode_tokens_per_s=41.0,
    decode_tokens_per_s_at_start=50.0,
    prefill_tokens_per_s=300.0,
    quality=QUALITY,
    explanation="One sentence. Another sentence.",
    runners_up=(
        Option(
            choice=replace(CHOICE, weights="int3"),
            peak_bytes={"ram": 95_000_000},
            bits_per_weight=3.5,
            kv_bits_per_value=2.9,
            quality=replace(QUALITY, kl_nats=0.06),
            note="fewer bits",
        ),
    ),
)


class Tags(HTMLParser):
    """Collects tags and every attribute that could reach outside the page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.outside += [
            value for name, value in attrs if name in ("src", "href") and value and not value.startswith("#")
        ]


@pytest.mark.parametrize(
    "plan", [PLAN, replace(PLAN, quality=None, runners_up=(), budget={}, decode_tokens_per_s=None)]
)
def test_page_is_self_contained(plan: Plan) -> None:
    page = render_html(plan)
    tags = Tags()
    tags.feed(page)
    assert {"svg", "table", "pre"} <= tags.seen
    assert not tags.outside
    assert "toy &lt;b&gt;" in page
    assert "<b>" not in page
    assert "script" not in tags.seen


def test_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = write_html(PLAN, tmp_path / "plan.html")
    assert target.read_text(encoding="utf-8") == render_html(PLAN)
    with pytest.raises(InputError, match="not a directory"):
        write_html(PLAN, tmp_path / "absent" / "plan.html")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependency, match=r"memwall\[plot\]"):
        write_html(PLAN, tmp_path / "other.html")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.html"]


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_a_narrow_terminal_has_fewer_columns_and_whole_cells(width: int) -> None:
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table(PLAN, width))
    text = console.export_text()
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert max(map(len, text.splitlines())) <= width
    for option in (chosen_option(PLAN), *PLAN.runners_up):
        assert any(option.choice.weights in line and option.choice.kv in line for line in text.splitlines())
    assert ("left out" in text) == (width < 160)


def test_table_names_everything() -> None:
    from rich.console import Console

    console = Console(width=220, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(PLAN, 220))
    text = console.export_text()
    for part in (
        "weights/int4-g64",
        "runtime",
        "predicted peak",
        "99 %",
        "mixed-3.70",
        "int3",
        "0.0310",
        "fewer bits",
        "Another sentence",
        "41.0",
    ):
        assert part in text
