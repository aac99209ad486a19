"""Sequences from files, where bits come from, and what a replay counts."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from memwall.errors import InputError
from memwall.memory import bit_predictors as predict
from memwall.memory.cache_policy import least_faults, next_accesses
from memwall.memory.replay import predicted, read_accesses, replay, together
from memwall.memory.succinct_paging import NAMES, discard_bits, make_policy, wrong_bits


def drawn(count: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.choice((0, 1, 2, 3)) if draw.random() < 0.6 else draw.randrange(4, 200) for _ in range(count)]


def test_files_of_both_kinds(tmp_path: Path) -> None:
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("x\ny\n\nx\n")
    lines.write_text("".join(json.dumps({"hash_ids": ids}) + "\n" for ids in ([1, 2], [], [1, 2, 3])))
    assert read_accesses(plain) == ["x", "y", "x"]
    assert read_accesses(lines) == [1, 2, 1, 2, 3]
    assert read_accesses(lines, 3) == [1, 2, 1]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "holds no access"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read"),
        ("a.jsonl", b'{"ids": [1]}\n', "line 1"),
        ("a.jsonl", b'{"hash_ids": [1]}\n[1]\n', "line 2"),
        ("a.jsonl", b'{"hash_ids": [[1]]}\n', "numbers or words"),
        ("a.jsonl", b'{"hash_ids": "12"}\n', "numbers or words"),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says):
        read_accesses(tmp_path / name)
    with pytest.raises(InputError, match="cannot be read"):
        read_accesses(tmp_path)


def test_flips_are_as_many_as_asked() -> None:
    truth = [0, 1] * 2000
    told = np.array(predict.flipped(truth, 1, zeros=0.1, ones=0.3))
    assert told[::2].mean() == pytest.approx(0.1, abs=0.03)
    assert told[1::2].mean() == pytest.approx(0.7, abs=0.04)
    assert predict.flipped(truth, 1, zeros=0, ones=0) == truth
    with pytest.raises(InputError, match="between 0 and 1"):
        predict.flipped(truth, 1, zeros=2, ones=0)


def test_arrivals_without_noise_are_true() -> None:
    keys = drawn(300)
    assert predict.noisy_arrivals(keys, 0.0, 1) == next_accesses(keys)
    told = predicted(keys, 5, "noisy", sigma=0.0)
    assert told.hints["discard"] == discard_bits(keys, 5)
    assert told.wrong == {"discard": (0, 0), "phase": (0, 0)}


def test_guesses_know_the_past_alone() -> None:
    keys = drawn(400)
    for guess in (predict.popu, predict.pleco):
        whole, half = guess(keys), guess(keys[:200])
        assert whole[:200] == half
        assert all(arrival > at for at, arrival in enumerate(whole))
    table, half = predict.features(keys), predict.features(keys[:200])
    np.testing.assert_array_equal(table[:200], half)
    assert predict.first_times(list("aba")) == [1, 1, 0]
    assert predicted(list("abab"), 2, "seen").train == 0
    assert predict.popu(list("aab")) == [1, 2, 5]  # every time, every time, one in three


def test_features_by_hand() -> None:
    table = predict.features(list("abaa"))
    assert np.isnan(table[0, : predict.NUM_GAPS]).all()
    np.testing.assert_allclose(table[3, :2], np.log1p([1, 2]), rtol=1e-6)
    assert np.isnan(table[3, 2])
    assert table[3, predict.NUM_GAPS] == pytest.approx(np.log1p(3))
    half = 0.5 ** (1 / predict.HALF_LIVES[0])
    assert table[3, predict.NUM_GAPS + 1] == pytest.approx(np.log((1 * half**2 + 1) * half + 1), rel=1e-6)


@pytest.mark.parametrize("source", ["popu", "pleco", "learned"])
def test_what_is_learned_tells_keys_that_come_once_from_those_that_come_again(source: str) -> None:
    if source == "learned":
        pytest.importorskip("sklearn")
    keys = drawn(3000)
    told = predicted(keys, 6, source)
    assert told.train == 1500
    zeros, ones = told.wrong["discard"]
    worthless = wrong_bits("discard", keys, 6, [0] * len(keys))
    assert zeros + ones < 0.6 * sum(worthless)
    found = {one.policy: one for one in replay(keys, 6, ["lru", "flush", "lfd", "lmarker"], told)}
    assert ("lmarker" in found) == (source != "learned")
    assert found["flush"].faults < found["lru"].faults
    assert found["lfd"].counted == 1500
    assert found["lfd"].times_least == 1


def test_a_replay_counts_what_came_after_the_beginning() -> None:
    keys = drawn(800)
    told = predicted(keys, 6, "oracle")
    found = {one.policy: one for one in replay(keys, 6, ["lfd", "flush", "mark0"], told, seeds=2)}
    assert found["flush"].faults == found["mark0"].faults == found["lfd"].faults == least_faults(keys, 6)
    assert found["flush"].hit_rate == pytest.approx(1 - least_faults(keys, 6) / 800)
    both = together([found["flush"], found["flush"]])
    assert (both.faults, both.least, both.counted) == (2 * found["flush"].faults, 2 * found["flush"].least, 1600)


def test_bad_sources() -> None:
    with pytest.raises(InputError, match="there are oracle"):
        predicted([1, 2], 1, "crystal")
    with pytest.raises(InputError, match="share of 1"):
        predicted([1, 2], 1, "popu", train=1.0)
    with pytest.raises(InputError, match="fewer than the 6 slots"):
        predicted([1, 2, 3], 6, "popu")


def test_policies_without_lots_run_once_and_blind_trust_is_not_lfd() -> None:
    keys = drawn(600)
    told = predicted(keys, 6, "noisy", sigma=2.0)
    found = {one.policy: one for one in replay(keys, 6, ["lfd", "blind-oracle", "marker", "lru"], told, seeds=7)}
    assert found["lfd"].faults == least_faults(keys, 6) < found["blind-oracle"].faults
    assert {name for name in NAMES if make_policy(name, 3).draws} == {
        "random", "marker", "mark0", "mark-predict", "robust-mark0", "robust-mark0-lru", "predictive-marker", "lmarker",
    }  # fmt: skip
