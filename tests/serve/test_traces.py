"""Traces as columns: both forms of BurstGPT's files, Azure's and Mooncake's; operations that say what they did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.serve.burstgpt import burst_index
from memwall.serve.traces import NONE, Trace, make_trace, merge, read_columns, turns, write_columns

FIRST = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,1087,0,1087,API log\n118,GPT-4,417,276,693,Conversation log\n"
)
LATER = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,7,3.5,ChatGPT,10,18,28,Conversation log\n6,,,GPT-4,20,5,25,API log\n9,7,1,ChatGPT,40,2,42,Conversation log\n"
    "9,8,1,ChatGPT,4,2,6,Conversation log\n"
)


def written(folder: Path, text: str, name: str = "trace.csv") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_both_forms_of_the_files(tmp_path: Path) -> None:
    trace = read_columns(written(tmp_path, FIRST))
    assert trace.at.tolist() == [5, 45, 118]
    assert (trace.models, trace.kinds) == (("ChatGPT", "GPT-4"), ("Conversation log", "API log"))
    assert trace.failed.tolist() == [False, True, False]
    assert (trace.session == NONE).all()
    trace = read_columns(written(tmp_path, LATER))
    assert trace.session.tolist()[0] == trace.session.tolist()[2] != trace.session.tolist()[3]
    assert trace.session[1] == NONE
    assert trace.turn.tolist() == [0, 0, 1, 0]
    assert np.isnan(trace.elapsed[1])
    assert {name: rows.tolist() for name, rows in trace.sessions().items()} == {0: [0, 2], 1: [3]}


def test_other_published_forms(tmp_path: Path) -> None:
    azure = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.99,396,109\n"
    )
    trace = read_columns(written(tmp_path, azure))
    assert trace.gaps() == pytest.approx([4.30941])
    mooncake = '{"timestamp": 1000, "input_length": 9, "output_length": 4, "hash_ids": [0]}\n'
    trace = read_columns(written(tmp_path, mooncake, "m.jsonl"))
    assert (trace.at.tolist(), trace.prompt.tolist(), trace.output.tolist()) == ([1.0], [9], [4])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column of lengths"),
        ("Timestamp,Model\n1,a\n", "no column of lengths"),
        ("ContextTokens,GeneratedTokens\n1,2\n", "no column of times"),
        (FIRST.split("\n")[0] + "\n", "no requests"),
        (FIRST.replace("490", "491"), "row 1: .*total"),
        (FIRST.replace("1087,0", "-7,0"), "row 2"),
        (FIRST.replace("\n45", "\n4"), "row 2 comes before"),
        (FIRST.replace("417", "many"), "row 3 is no request"),
        (FIRST.replace("\n118", "\nsoon"), "row 3: a time"),
        (FIRST + "7\n", "row 4 is no request"),
    ],
)
def test_what_is_no_trace(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_columns(written(tmp_path, text))
    with pytest.raises(InputError, match="row 1 is no request"):
        read_columns(written(tmp_path, "nonsense\n", "x.jsonl"))


def made(*at: float, **columns: Any) -> Trace:
    n = len(at)
    return make_trace(np.array(at), np.arange(1, n + 1), np.full(n, 3), "made", **columns)


def test_operations_keep_the_rest_and_say_what_they_did() -> None:
    trace = made(10.0, 20.0, 90000.0)
    assert trace.days(0, 1).at.tolist() == [10, 20]
    assert trace.between(0, 15).at.tolist() == [10, 20]
    assert trace.shift(5).at.tolist() == [15, 25, 90005]
    assert trace.scale_rate(10).gaps() == pytest.approx([1.0, 8998.0])
    assert trace.clip_lengths(2, 1).prompt.tolist() == [1, 2, 2]
    assert trace.clip_lengths(2, 1).output.tolist() == [1, 1, 1]
    assert trace.thin(1.0, 3).at.tolist() == trace.at.tolist()
    chain = trace.days(0, 1).scale_rate(2).thin(0.5, 7).shift(1)
    assert chain.provenance == ("made", "days(0, 1)", "scale_rate(2)", "thin(0.5, seed=7)", "shift(1)")
    assert trace.at.tolist() == [10.0, 20.0, 90000.0]  # the one it was made from is as it was


def test_selecting_names_what_there_is(tmp_path: Path) -> None:
    trace = read_columns(written(tmp_path, FIRST))
    assert trace.select(model="ChatGPT", kind="API log").prompt.tolist() == [1087]
    assert trace.answered().prompt.tolist() == [472, 417]
    with pytest.raises(InputError, match="there are ChatGPT, GPT-4"):
        trace.select(model="GPT-5")


@pytest.mark.parametrize("call", ["scale_rate(0)", "thin(0, 1)", "thin(2, 1)", "clip_lengths(0, 1)"])
def test_what_cannot_be_done(call: str) -> None:
    name, _, rest = call.partition("(")
    with pytest.raises(InputError):
        getattr(made(1.0, 2.0), name)(*(float(part) for part in rest.rstrip(")").split(",")))


def test_merging_keeps_sessions_apart_and_times_in_order() -> None:
    one = made(1.0, 5.0, session=np.array([0, 0]), turn=np.array([0, 1]))
    other = made(2.0, 3.0, session=np.array([0, NONE]), models=("b",))
    both = merge([one, other])
    assert both.at.tolist() == [1, 2, 3, 5]
    assert both.session.tolist() == [0, 1, NONE, 0]
    assert [both.models[code] for code in both.model] == ["", "b", "b", ""]
    assert both.provenance == ("merge(made + made)",)


def test_what_a_client_sends_leaves_failures_out(tmp_path: Path) -> None:
    loads = read_columns(written(tmp_path, FIRST)).loads()
    assert [(load.at, load.prompt_tokens, load.output_tokens) for load in loads] == [(0, 472, 18), (113, 417, 276)]


@given(st.lists(st.integers(-1, 4), max_size=30))
@settings(deadline=None)
def test_turns_count_up_in_every_session(sessions: list[int]) -> None:
    places = turns(np.array(sessions, np.int64))
    for name in set(sessions):
        wanted = [0] * sessions.count(name) if name == NONE else list(range(sessions.count(name)))
        assert [int(p) for p, s in zip(places, sessions) if s == name] == wanted


@given(st.lists(st.tuples(st.floats(0, 9), st.integers(0, 99), st.integers(0, 99), st.integers(-1, 2)), min_size=1))
@settings(deadline=None, max_examples=40)
def test_written_files_are_read_again(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    rows.sort()
    at, prompt, output, session = (np.array(column) for column in zip(*rows))
    at = np.round(at, 6)
    trace = make_trace(at, prompt, output, "x", session=session, models=("a,b",))
    path = tmp_path_factory.mktemp("trace") / "t.csv"
    write_columns(trace, path)
    again = read_columns(path)
    assert again.at == pytest.approx(at)
    assert (again.prompt.tolist(), again.output.tolist()) == (prompt.tolist(), output.tolist())
    assert again.models == ("a,b",)
    assert ((again.session == NONE) == (session == NONE)).all()


def test_idle_stretches_are_trimmed_and_the_rest_keeps_its_gaps() -> None:
    trace = made(5, 6, 106, 106.5)
    trimmed = trace.trim_gaps(10)
    assert trimmed.at.tolist() == [5, 6, 16, 16.5]
    assert trimmed.provenance[-1] == "trim_gaps(10)"
    assert not len(trace.keep(np.zeros(4, bool), "none").trim_gaps(1))
    with pytest.raises(InputError, match="most_seconds"):
        trace.trim_gaps(0)


def test_moments_of_recording_are_no_bursts() -> None:
    rng = np.random.default_rng(2)
    true = np.cumsum(rng.exponential(0.3, 4000))
    jitter = rng.choice([-0.001, 0.0, 0.001], 4000)
    recorded = 3 * (true // 3) + jitter[(true // 3).astype(int)]  # of the moment, not of the request
    trace = make_trace(recorded, np.arange(4000), np.ones(4000), "recorded")
    assert trace.tick_seconds == pytest.approx(3, abs=0.01)
    spread = trace.spread(1)
    assert burst_index(trace.at).cv > 2.5
    assert 0.9 < burst_index(spread.at).cv < 1.1
    assert spread.tick_seconds == 0
    assert np.all(spread.gaps() >= 0)
    assert np.all((spread.at >= trace.at) & (spread.at < trace.at + 3.01))
    assert spread.prompt.tolist() == trace.prompt.tolist()
    assert spread.provenance[-1] == f"spread({trace.tick_seconds:g} s, seed=1)"


def test_times_of_their_own_have_no_tick() -> None:
    rng = np.random.default_rng(3)
    own = np.cumsum(rng.exponential(0.3, 500))
    some = np.sort(np.concatenate([own, own[:40]]))  # a few at one moment do not make a clock
    whole = np.sort(rng.integers(0, 10_000, 500)).astype(float)  # whole seconds, as in BurstGPT's first file
    for at, tick in ((own, 0), (some, 0), (whole, 1), (np.zeros(20), 0)):
        assert make_trace(at, np.ones(len(at)), np.ones(len(at)), "x").tick_seconds == tick
