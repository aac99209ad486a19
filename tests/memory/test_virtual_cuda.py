"""The GPU's pages against a driver of our own that keeps its rules: what is mapped, granted and released, and when."""

from __future__ import annotations

import sys

import pytest

from memwall import kv
from memwall.errors import BudgetExceeded, InputError, MissingDependency
from memwall.kv.vattention import VirtualKV, VirtualSettings
from memwall.memory import Arena, Ledger
from memwall.memory.virtual_cuda import CudaPages
from tests.memory.cuda_driver import PAGE, Driver, Pages

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the stand-in maps this machine's memory")


def make(num_pages: int = 40) -> tuple[VirtualKV, Driver, Ledger]:
    driver, ledger = Driver(num_pages), Ledger()
    shape = kv.CacheShape(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64)  # 256 bytes a row: 8,192 rows a page
    store = VirtualKV(
        shape, Arena(1 << 40, ledger, tier="gpu"), num_slots=4, max_tokens=30_000, num_blocks=10,
        settings=VirtualSettings(page_bytes=PAGE), source=Pages(PAGE, driver=driver), fill=False,
    )  # fmt: skip
    return store, driver, ledger


def test_a_store_on_the_gpu_keeps_the_driver_s_rules() -> None:
    store, driver, ledger = make()
    first, second = store.alloc(100), store.alloc(100)
    store.step({first: 9000, second: 1})
    assert len(driver.mapped) == 3 * 4
    assert driver.granted == set(driver.mapped)
    # a run of pages is granted in one call
    assert driver.trace.count("cuMemSetAccess") == 2 * 4 + 4  # and one when each array was made
    store.keys[1][first, :9000] = 5
    store.step_async({first: 9001, second: 8190})
    store.wait()
    assert store.background_blocks == 1
    third = store.alloc(1)
    assert store.share(first, third, 9000) == 8192
    store.step({third: 8193})
    assert (store.keys[1][third, :8192] == 5).all()
    driver.trace.clear()
    store.step({third: 8194})
    assert "copy" not in driver.trace
    store.truncate(third, 8000)
    driver.trace.clear()
    store.step({third: 8001})  # into a block that the first sequence reads too
    assert (store.keys[1][third, :8000] == 5).all()
    # a copy is queued as all else is: no page goes before it is done
    calls = [name for name in driver.trace if name in ("copy", "cuCtxSynchronize", "cuMemUnmap")]
    assert calls == ["cuCtxSynchronize"] + 4 * ["copy", "cuCtxSynchronize", "cuMemUnmap"]
    store.truncate(third, 8000)
    store.step({third: 8193})
    driver.trace.clear()
    store.free(third)
    store.reclaim(10)
    # what is queued may still read: wait before the first page goes
    assert driver.trace.index("cuCtxSynchronize") < driver.trace.index("cuMemUnmap")
    assert driver.released == 4  # those that stood behind the arrays when these were made
    assert ledger.total("gpu") == ledger.total() == 24 * PAGE
    store.release()
    assert (driver.mapped, driver.released, ledger.total()) == ({}, 4 + 24, 0)


def test_what_the_driver_refuses_changes_nothing() -> None:
    store, driver, ledger = make(num_pages=10)
    slot = store.alloc(1)
    store.step({slot: 16_000})
    with pytest.raises(MemoryError, match="cuMemCreate failed: CUDA_ERROR_OUT_OF_MEMORY"):
        store.step({slot: 30_000})
    assert (store.lengths[slot], len(driver.mapped), len(driver.free)) == (16_000, 8, 2)
    assert ledger.total() == 8 * PAGE
    store.pool.arena.set_cap(8 * PAGE)
    with pytest.raises(BudgetExceeded, match="gpu"):
        store.step({slot: 20_000})


def test_pages_must_be_whole_units_of_the_gpu() -> None:
    with pytest.raises(InputError, match="2097152"):
        CudaPages(65536, driver=Driver(1))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(MissingDependency, match=r"memwall\[cuda\]"):
        CudaPages(PAGE)
