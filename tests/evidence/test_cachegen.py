"""The parts of CacheGen's evidence that its verdicts hang on: equal quality, the virtual clock, coded sizes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from memwall.cli.evidence import load_experiment
from memwall.errors import InputError
from memwall.kv.cachegen_costs import Backlog, Costs, Pace, Task
from memwall.kv.link import ChunkLink, Index, Trace
from memwall.kv.streaming import Request
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


def simulated(
    study: ModuleType, trace: Trace, slo: float, fixed: int | None, seconds: float = 2.0
) -> tuple[float, str]:
    """Two chunks of 100 tokens; recomputing takes 2 s in all, as is known, decoding nothing worth naming."""
    sizes = {1: (50_000, 50_000), 2: (100_000, 100_000), 3: (200_000, 200_000)}
    index = Index(model="", weights="", weights_sha256="", codec="", chunk_tokens=(100, 100), texts=(), sizes=sizes)
    costs = Costs(text=Pace(0.2, 200 / seconds), decoding=Pace(0.2, 1e9))
    receiver = SimpleNamespace(costs=copy.deepcopy(costs))
    request = Request(link=ChunkLink(("", 0)), index=index, receiver=receiver, slo_seconds=slo, num_chunks=2)  # type: ignore[arg-type]
    return study.simulated(request, costs, trace, fixed)


def test_the_virtual_clock(study: ModuleType) -> None:
    steady = Trace((200_000.0,))
    assert simulated(study, steady, 9.0, 3) == (pytest.approx(2.0), "33")
    assert simulated(study, steady, 9.0, 0)[0] == pytest.approx(400 / 200_000 + 2.0)
    # no estimate yet: the default level; then 3.1 s are left and level 3 takes 1 s, 3 s if the link falls to a third
    assert simulated(study, steady, 3.6, None, 9.0)[1] == "23"
    assert simulated(study, steady, 3.4, None, 9.0)[1] == "22"
    # ten times slower: nothing fits; half the context by text takes 1 s, level 1 2.5 s
    assert simulated(study, Trace((20_000.0,)), 1.5, None)[1] == "2T"
    assert simulated(study, Trace((20_000.0,)), 1.5, None, 9.0)[1] == "21"
    # where text fits it is taken, and the processor works while nothing is sent
    assert simulated(study, steady, 3.0, None)[1] == "TT"
    # but not where it fits only if nothing takes longer than it did
    assert simulated(study, steady, 2.3, None)[1][0] == "2"
    fallen = Trace((200_000.0, 10_000.0), step_seconds=1.0)
    assert simulated(study, fallen, 9.0, 3)[0] == pytest.approx(1 + 1 + 190_000 / 200_000)


def test_a_processor_on_the_virtual_clock_tells_what_it_has_done(study: ModuleType) -> None:
    """The controller learns how long a chunk took when it has ended, not before."""
    known, truth = (Costs(text=Pace(0.0, per_s), decoding=Pace(0.0, 1e9)) for per_s in (100.0, 50.0))
    backlog = Backlog()
    processor = study.VirtualProcessor(backlog, truth)
    processor.give(Task(costs=known, text=True, first=0, num_tokens=100), 1.0)
    processor.advance(2.5)
    assert backlog.seconds(2.5, careful=False) == 0  # it should have ended at 2
    assert known.text.margin == 1
    processor.advance(3.0)
    assert known.text.per_s == 50
    assert known.text.margin == 2


def test_misses_are_counted_by_way_and_speed(study: ModuleType) -> None:
    missed = study.Missed()
    for speed, late in ((0.5, 2.0), (2.0, 0.5)):
        missed.add(0.5, speed, dict.fromkeys(study.WAYS, (late, "1T")) | {"controller": (0.1, "33")}, 1.0)
    assert missed.late == {"controller": 0, "level 1": 1, "level 2": 1, "level 3": 1, "text": 1}
    assert missed.speeds["text"] == [1, 0, 0]
    assert (missed.fewest_others, missed.form["controller"], missed.form["text"]) == (1, 6.0, 5.0)


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
