"""The GPU's pages against a driver of our own that keeps its rules: what is mapped, granted and released, and when."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from memwall import kv
from memwall.errors import BudgetExceeded, InputError, MissingDependency
from memwall.kv.vattention import VirtualKV, VirtualSettings
from memwall.memory import Arena, Ledger
from memwall.memory.virtual import AddressRange, HostPages
from memwall.memory.virtual_cuda import CudaPages

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the stand-in maps this machine's memory")
PAGE = 2 << 20


class Status(int):
    name = "CUDA_ERROR_OUT_OF_MEMORY"


class Driver:
    """The driver's calls over pages of this machine's memory; `trace` has their names. A wrong call fails a test."""

    CUmemAllocationProp = CUmemAccessDesc = lambda self: SimpleNamespace(location=SimpleNamespace())
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)

    def __init__(self, num_pages: int) -> None:
        self.memory = HostPages(PAGE, num_pages)
        self.free = list(range(num_pages))
        self.ranges: list[AddressRange] = []
        self.mapped: dict[int, int] = {}
        self.granted: set[int] = set()
        self.trace: list[str] = []
        self.released = 0

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cu"):
            self.trace.append(name)
        return object.__getattribute__(self, name)

    def cuInit(self, flags: int) -> tuple:
        return (Status(0),)

    cuCtxSetCurrent = cuInit

    def cuCtxSynchronize(self) -> tuple:
        return (Status(0),)

    def cuDeviceGet(self, number: int) -> tuple:
        return Status(0), number

    cuDevicePrimaryCtxRetain = cuDeviceGet

    def cuMemGetAllocationGranularity(self, properties: Any, option: int) -> tuple:
        assert (properties.type, properties.location.type, properties.location.id) == (1, 1, 0)
        return Status(0), PAGE

    def cuMemAddressReserve(self, size: int, alignment: int, address: int, flags: int) -> tuple:
        assert size % PAGE == 0
        self.ranges.append(self.memory.reserve(size))
        return Status(0), self.ranges[-1].address

    def cuMemAddressFree(self, address: int, size: int) -> tuple:
        return (Status(0),)

    def cuMemCreate(self, size: int, properties: Any, flags: int) -> tuple:
        assert size == PAGE
        if not self.free:
            return Status(2), None
        page = self.free.pop()
        self.memory.touch(page, 1)
        return Status(0), page

    def cuMemRelease(self, handle: int) -> tuple:
        assert handle not in self.mapped.values()
        self.memory.discard(handle, 1)
        self.free.append(handle)
        self.released += 1
        return (Status(0),)

    def place(self, address: int) -> tuple[AddressRange, int]:
        target = next(each for each in self.ranges if 0 <= address - each.address < each.nbytes)
        return target, address - target.address

    def cuMemMap(self, address: int, size: int, offset: int, handle: int, flags: int) -> tuple:
        assert (size, offset, flags) == (PAGE, 0, 0)
        assert address not in self.mapped
        self.memory.map(*self.place(address), handle, 1)
        self.mapped[address] = handle
        return (Status(0),)

    def cuMemSetAccess(self, address: int, size: int, descriptors: Sequence[Any], count: int) -> tuple:
        assert (descriptors[0].flags, descriptors[0].location.type, count) == (3, 1, 1)
        for each in range(address, address + size, PAGE):
            assert each in self.mapped
            self.granted.add(each)
        return (Status(0),)

    def cuMemUnmap(self, address: int, size: int) -> tuple:
        assert size == PAGE
        del self.mapped[address]
        self.granted.discard(address)
        self.memory.unmap(*self.place(address), 1)
        return (Status(0),)


class Pages(CudaPages):
    """Arrays of NumPy in the place of tensors."""

    def view(self, target: AddressRange, *arguments: Any) -> np.ndarray:
        memory = self._driver.memory
        return memory.view(self._driver.place(target.address)[0], *arguments)

    def copy(self, array: np.ndarray) -> np.ndarray:
        return array.copy()


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
    assert driver.trace.count("cuMemSetAccess") == 2 * 4
    store.keys[1][first, :9000] = 5
    store.step_async({first: 9001, second: 8190})
    store.wait()
    assert store.background_blocks == 1
    third = store.alloc(1)
    assert store.share(first, third, 9000) == 8192
    store.step({third: 8193})
    assert (store.keys[1][third, :8192] == 5).all()
    driver.trace.clear()
    store.free(third)
    store.reclaim(10)
    # what is queued may still read: wait before the first page goes
    assert driver.trace.index("cuCtxSynchronize") < driver.trace.index("cuMemUnmap")
    assert driver.released == 0
    assert ledger.total("gpu") == ledger.total() == 20 * PAGE
    store.release()
    assert (driver.mapped, driver.released, ledger.total()) == ({}, 20, 0)


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
