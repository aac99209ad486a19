"""Arrivals and lengths: the shape that was asked for, and the traces' own formats."""

from __future__ import annotations

import statistics
from itertools import pairwise
from pathlib import Path

import pytest

from memwall.engine.arrivals import Load, clipped, drawn_lengths, gamma_gaps, read_trace, scaled, timed
from memwall.errors import InputError


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gaps_have_the_rate_and_the_variation(cv: float) -> None:
    times = gamma_gaps(20.0, cv, 20000, 7)
    gaps = [b - a for a, b in pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(1 / 20, rel=0.08)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, rel=0.08)
    assert times == gamma_gaps(20.0, cv, 20000, 7) != gamma_gaps(20.0, cv, 20000, 8)


def test_lengths_lie_around_what_was_asked() -> None:
    loads = drawn_lengths(100, 10, 500, 3)
    assert {50 <= load.prompt_tokens <= 150 and 5 <= load.output_tokens <= 15 for load in loads} == {True}
    assert statistics.mean(load.prompt_tokens for load in loads) == pytest.approx(100, rel=0.05)


TRACES = {
    "azure.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
    "2023-11-16 18:15:50.9951690,396,109\n",
    "burst.csv": "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,GPT-4,10,0,10,API log\n"
    "7,GPT-4,374,44,418,API log\n11.314579,GPT-4,396,109,505,API log\n",
    "mooncake.jsonl": '{"timestamp": 1000, "input_length": 374, "output_length": 44, "hash_ids": [0]}\n'
    '{"timestamp": 5314.579, "input_length": 396, "output_length": 109, "hash_ids": [0]}\n',
    "apex.csv": "StartTimeOffset,ContextTokens,GeneratedTokens,RequestID\n2000000000,374,44,a\n6314579000,396,109,b\n",
    "lengths.csv": "num_prefill_tokens,num_decode_tokens,pd_ratio\n374.0,44.0,8\n396,109,4\n",
}


@pytest.mark.parametrize("name", TRACES)
def test_traces_are_read_in_their_own_formats(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(TRACES[name])
    loads = read_trace(path, 10)
    assert [(load.prompt_tokens, load.output_tokens) for load in loads] == [(374, 44), (396, 109)]
    times = [load.at for load in loads]
    assert times == ([None, None] if name == "lengths.csv" else [0.0, pytest.approx(4.314579)])
    assert len(read_trace(path, 1)) == 1


def test_pauses_of_a_conversation_come_from_what_its_answers_took(tmp_path: Path) -> None:
    path = tmp_path / "burst.csv"
    path.write_text(
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,7,3,a,10,4,14,x\n6,,1,a,10,4,14,x\n12,7,,a,10,4,14,x\n20,7,2,a,10,4,14,x\n21,7,1,a,10,4,14,x\n"
    )
    loads = read_trace(path, 10)
    assert [load.think_seconds for load in loads] == [0, 0, 4, 0, 0]
    assert scaled(loads, 2)[2].think_seconds == 2


def test_times_are_scaled_and_lengths_cut() -> None:
    loads = [Load(at=2.0, prompt_tokens=900, output_tokens=300), Load(at=None, prompt_tokens=5, output_tokens=2)]
    assert [load.at for load in scaled(loads, 4)] == [0.5, None]
    assert [load.at for load in timed(loads, [1.0, 3.0])] == [1.0, 3.0]
    cut = clipped(loads, 256)
    assert (cut[0].prompt_tokens, cut[0].output_tokens) == (127, 128)
    assert (cut[1].prompt_tokens, cut[1].output_tokens) == (5, 2)


@pytest.mark.parametrize(
    "text", ["a,b\n1,2\n", "ContextTokens,GeneratedTokens\nmany,4\n", "ContextTokens,GeneratedTokens\n"]
)
def test_what_is_no_trace_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=r"x\.csv"):
        read_trace(path, 10)
