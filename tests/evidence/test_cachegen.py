"""The parts of CacheGen's evidence that its verdicts hang on: equal quality, the virtual clock, coded sizes."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from memwall.cli.evidence import load_experiment
from memwall.errors import InputError
from memwall.kv.link import Trace
from memwall.systems import find_system


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return load_experiment(find_system("cachegen"))


def entry(study: ModuleType, bits: float, divergence: float) -> object:
    return study.Entry(bits, study.Score(0.0, divergence))


def test_equal_quality_is_the_coarsest_level_within_a_percent(study: ModuleType) -> None:
    levels = {v: entry(study, bits, kl) for v, bits, kl in ((1, 1.6, 0.04), (2, 2.5, 0.013), (3, 3.4, 0.004))}
    assert [study.equal(entry(study, 4, kl), levels) for kl in (0.0, 0.004, 0.02, 0.031)] == [3, 2, 2, 1]
    assert study.equal(entry(study, 4, 0.0), {1: levels[1]}) is None


def serving(**changes: float) -> SimpleNamespace:
    """Two chunks of 100 tokens; recomputing takes 2 s in all, decoding nothing worth naming."""
    chunks = {level: [bytes(size)] * 2 for level, size in ((1, 50_000), (2, 100_000), (3, 200_000))}
    values = {"chunks": chunks, "recompute_seconds": 2.0, "decode_seconds": 1e-9, "num_tokens": 200,
              "bytes": {3: 400_000}, "sizes": SimpleNamespace(chunk_tokens=100, stream_chunks=2)}  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def test_the_virtual_clock(study: ModuleType) -> None:
    steady = Trace((200_000.0,))
    assert study.simulated(serving(), steady, 9.0, 3) == (pytest.approx(2.0), "33")
    assert study.simulated(serving(), steady, 9.0, 0)[0] == pytest.approx(400 / 200_000 + 2.0)
    # no estimate yet: the default level; then 1.5 s are left and level 3 takes 1 s
    assert study.simulated(serving(recompute_seconds=6.0), steady, 2.0, None)[1] == "23"
    # ten times slower: nothing fits; half the context by text takes 1 s, level 1 2.5 s
    assert study.simulated(serving(), Trace((20_000.0,)), 1.5, None)[1] == "2T"
    assert study.simulated(serving(recompute_seconds=9.0), Trace((20_000.0,)), 1.5, None)[1] == "21"
    # where text fits it is taken, and the processor works while nothing is sent
    assert study.simulated(serving(), steady, 3.0, None)[1] == "TT"
    fallen = Trace((200_000.0, 10_000.0), step_seconds=1.0)
    assert study.simulated(serving(), fallen, 9.0, 3)[0] == pytest.approx(1 + 1 + 190_000 / 200_000)


def test_coded_bits_count_everything_and_fall_with_wider_bins(study: ModuleType) -> None:
    rows = study.smooth_rows(600, 8, 0.9)
    fine, coarse = (study.coded_bits(rows, np.full(8, step, np.float32), anchored=False) for step in (0.2, 0.8))
    assert fine[0] > coarse[0] > 1
    assert fine[1] < coarse[1]
    assert fine[1] == pytest.approx(0.2 / 12**0.5, rel=0.1)


def test_data_is_found_or_refused(study: ModuleType, tmp_path: Path) -> None:
    assert len(study.traces_of(None, 4)[0]) == 4
    (tmp_path / "cachegen-bandwidth.jsonl").write_text(json.dumps({"bw": [1, 2]}) + "\n")
    assert study.traces_of(tmp_path, 4) == ([[1, 2]], "cachegen-bandwidth.jsonl")
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(InputError, match="needs"):
        study.run(True, tmp_path / "short.txt")
