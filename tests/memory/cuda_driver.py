"""A driver of our own in the place of the GPU's: pages of this machine's memory, and the rules that calls must keep."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from memwall.memory.virtual import AddressRange, HostPages
from memwall.memory.virtual_cuda import CudaPages

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

    def __init__(self, num_pages: int, page_bytes: int = PAGE) -> None:
        self.page_bytes = page_bytes
        self.memory = HostPages(page_bytes, num_pages)
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
        return Status(0), self.page_bytes

    def cuMemAddressReserve(self, size: int, alignment: int, address: int, flags: int) -> tuple:
        assert size % self.page_bytes == 0
        self.ranges.append(self.memory.reserve(size))
        return Status(0), self.ranges[-1].address

    def cuMemAddressFree(self, address: int, size: int) -> tuple:
        return (Status(0),)

    def cuMemCreate(self, size: int, properties: Any, flags: int) -> tuple:
        assert size == self.page_bytes
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
        assert (size, offset, flags) == (self.page_bytes, 0, 0)
        assert address not in self.mapped
        self.memory.map(*self.place(address), handle, 1)
        self.mapped[address] = handle
        return (Status(0),)

    def cuMemSetAccess(self, address: int, size: int, descriptors: Sequence[Any], count: int) -> tuple:
        assert (descriptors[0].flags, descriptors[0].location.type, count) == (3, 1, 1)
        for each in range(address, address + size, self.page_bytes):
            assert each in self.mapped
            self.granted.add(each)
        return (Status(0),)

    def cuMemUnmap(self, address: int, size: int) -> tuple:
        assert size == self.page_bytes
        del self.mapped[address]
        self.granted.discard(address)
        self.memory.unmap(*self.place(address), 1)
        return (Status(0),)


class Pages(CudaPages):
    """Arrays of NumPy in the place of tensors. An address that the driver does not know is refused, as torch does."""

    def _tensor(self, window: Any) -> np.ndarray:
        address = window.__cuda_array_interface__["data"][0]
        assert any(0 <= address - page < self.page_bytes for page in self._driver.granted)
        return np.asarray(SimpleNamespace(__array_interface__=window.__cuda_array_interface__, range=window.range))

    def copy(self, array: np.ndarray) -> np.ndarray:
        self._driver.trace.append("copy")
        return array.copy()


class TensorPages(Pages):
    """Tensors, on the processor."""

    def _tensor(self, window: Any) -> Any:
        import torch

        return torch.from_numpy(super()._tensor(window))

    def copy(self, array: Any) -> Any:
        self._driver.trace.append("copy")
        return array.clone()
