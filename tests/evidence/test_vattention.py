"""The parts of vAttention's evidence that its verdicts hang on: the baselines' books, the scheduler, the reader."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from memwall import kv
from memwall.cli.evidence import load_experiment
from memwall.errors import InputError
from memwall.systems import find_system
from tests.memory.cuda_driver import Driver, TensorPages

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memfd is Linux's")


@pytest.fixture(scope="module")
def vattention() -> ModuleType:
    return load_experiment(find_system("vattention"))


def test_replay_by_hand(vattention: ModuleType) -> None:
    """Room for 8 tokens in blocks of 2; three requests of 3 tokens that become 5."""
    memory = vattention.Blocks(8 * vattention.Memory.token_bytes, 2)
    served = vattention.replay([(3, 2)] * 3, memory)
    # 1: two of 3 tokens begin in 4 blocks and grow to 4; 2: both want a third block, the newest is set aside, the
    # other one ends with 5; 3: the one of 4 and the one of 3 begin, the same again; 4: the last one waits no longer
    assert (served.set_aside, served.steps) == (2, 4)
    assert served.concurrent == (2 + 2 + 2 + 1) / 4
    assert served.waste_bytes == vattention.Memory.token_bytes * (1 + 0 + 0.5 + 1) / 4
    with pytest.raises(InputError, match="9 tokens does not fit"):
        vattention.replay([(9, 1)], vattention.Blocks(8 * vattention.Memory.token_bytes, 2))


def test_the_store_serves_as_its_books_would(vattention: ModuleType) -> None:
    trace = vattention.read_traces(None, 12)["synthetic"]
    trace = [(prompt // 8, 5 + answer // 20) for prompt, answer in trace]
    page, budget = 65536, 160 * 65536
    virtual = vattention.Virtual(budget, page, 6000)
    books = vattention.Blocks(budget, page // 2048)  # a page is 32 tokens in each array
    mine, theirs = vattention.replay(trace, virtual), vattention.replay(trace, books)
    assert (mine.steps, mine.concurrent, mine.waste_bytes) == (theirs.steps, theirs.concurrent, theirs.waste_bytes)
    virtual.store.release()


def test_all_ways_to_attend_agree(vattention: ModuleType) -> None:
    contest = vattention.Contest(kv.CacheShape(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32), [300, 17])
    contest.fill()
    _, outs = contest.run(1)
    assert len(outs) == 7
    for out in outs.values():
        np.testing.assert_array_equal(out, outs["ordinary arrays"])
    for store in contest.stores:
        store.release()


def test_a_small_stress_passes_and_sees_a_wrong_number(vattention: ModuleType) -> None:
    claim = vattention.stress_claim(2500, lambda what: None)
    assert claim.passed, claim.measured


def test_the_engine_s_part_runs_whole(vattention: ModuleType) -> None:
    """Its claims count; nothing of them depends on the clock."""
    claims = list(vattention.engine_claims(40, lambda what: None))
    assert len(claims) == 3
    assert all(claim.passed for claim in claims), claims


def test_traces_are_read_and_checked(vattention: ModuleType, tmp_path: Path) -> None:
    good = tmp_path / "trace.csv"
    good.write_text("num_prefill_tokens,num_decode_tokens\n7564.0,192\n12,0\n5,5\n")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert vattention.read_traces(tmp_path, 2) == {"trace": [(7564, 192), (12, 1)]}
    with pytest.raises(InputError, match="num_prefill_tokens"):
        vattention.read_traces(tmp_path / "other.csv", 2)


def stand_in(vattention: ModuleType, num_pages: int) -> object:
    """A GPU as the experiment sees it, with the stand-in's driver and tensors on the processor."""
    driver = Driver(num_pages, 65536)
    return vattention.Gpu(
        name="stand-in", device="cpu", page_bytes=65536, pages=lambda: TensorPages(65536, driver=driver),
        free_bytes=lambda: len(driver.free) * 65536, total_bytes=num_pages * 65536, wait=lambda: None,
    )  # fmt: skip


def test_the_gpu_s_part_runs_whole(vattention: ModuleType) -> None:
    """All but the clock is judged as on a GPU: bytes, equal bits, where pages are mapped, sequences kept apart."""
    pytest.importorskip("torch")
    sizes = vattention.GpuSizes(blocks=8, slots=4, layers=1, width=256, crossings=3, stress_steps=1500)
    claims = list(vattention.gpu_claims(stand_in(vattention, 1000), sizes, lambda what: None))
    assert [claim.claim for claim in claims] == [claim for claim, _ in vattention.GPU_CLAIMS.values()]
    assert all("stand-in" in claim.measured for claim in claims)
    by_bytes, equal, steps, stress = claims
    assert all(claim.passed for claim in (by_bytes, equal, stress)), claims
    assert "0 blocks mapped in a step; synchronous" in steps.measured
    assert "3 blocks mapped in a step; the driver takes" in steps.measured


def test_without_a_gpu_nothing_is_claimed(vattention: ModuleType) -> None:
    claims = list(vattention.gpu_claims("GPU", vattention.GpuSizes(), lambda what: None))
    assert len(claims) == 4
    assert {(claim.passed, claim.measured) for claim in claims} == {(None, "not run: needs GPU")}
