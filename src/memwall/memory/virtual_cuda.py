"""Pages of a GPU's memory behind addresses that never move: the driver's virtual-memory calls as a `PageSource`.

Package `cuda-bindings` (`cuda.bindings.driver`) makes the calls; arrays are torch tensors over the addresses. A page is
a handle of `cuMemCreate`; it is made once, when it is touched, and goes back to the driver only when it is discarded,
because making one takes the driver longer than mapping it. Everything queued on the GPU is waited for before a page is
unmapped: a kernel that reads an unmapped address ends the whole context. torch asks the driver once, when it makes a
tensor, which GPU an address belongs to, and the driver knows only addresses with a page behind them; so a page stands
at a tensor's beginning meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from memwall.errors import InputError, MissingDependency
from memwall.memory.virtual import AddressRange, PageSource


class _TensorWindow:
    """What torch makes a tensor of; the tensor keeps it, and it keeps the range."""

    def __init__(self, target: AddressRange, interface: dict[str, object]) -> None:
        self.range = target
        self.__cuda_array_interface__ = interface


class CudaPages(PageSource):
    """See the module's text. driver: what makes the calls, `cuda.bindings.driver` unless given."""

    maps_count = False

    def __init__(self, page_bytes: int, *, device: int = 0, driver: Any = None) -> None:
        if driver is None:
            try:
                driver = import_module("cuda.bindings.driver")
            except ImportError as missing:
                raise MissingDependency("cuda-bindings", "cuda") from missing
        self.page_bytes = page_bytes
        self.device = device
        self._driver = driver
        self._call("cuInit", 0)
        # torch works in the device's primary context, and its tensors must see these addresses
        self._context = self._call("cuDevicePrimaryCtxRetain", self._call("cuDeviceGet", device))
        self._enter()
        self._properties = driver.CUmemAllocationProp()
        self._properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._properties.location.id = device
        self._access = driver.CUmemAccessDesc()
        self._access.location = self._properties.location
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        least = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        unit = int(self._call("cuMemGetAllocationGranularity", self._properties, least))
        if page_bytes <= 0 or page_bytes % unit:
            raise InputError(
                f"pages of {page_bytes} bytes: this GPU maps whole units of {unit} bytes; try {unit >> 10} KiB"
            )
        self._handles: dict[int, Any] = {}
        self._mapped: set[int] = set()

    def reserve(self, nbytes: int) -> AddressRange:
        self._enter()
        nbytes = -(-nbytes // self.page_bytes) * self.page_bytes
        address = int(self._call("cuMemAddressReserve", nbytes, self.page_bytes, 0, 0))
        return AddressRange(address, nbytes, self._driver.cuMemAddressFree, address, nbytes)

    def touch(self, first: int, count: int) -> None:
        self._enter()
        made: list[int] = []
        try:
            for page in range(first, first + count):
                self._handles[page] = self._call("cuMemCreate", self.page_bytes, self._properties, 0)
                made.append(page)
        except MemoryError:
            for page in made:
                self._call("cuMemRelease", self._handles.pop(page))
            raise

    def discard(self, first: int, count: int) -> None:
        self._enter()
        for page in range(first, first + count):
            self._call("cuMemRelease", self._handles.pop(page))

    def map(self, target: AddressRange, offset_bytes: int, first: int, count: int) -> None:
        self._enter()
        address = target.address + offset_bytes
        done = 0
        try:
            for page in range(first, first + count):
                self._call("cuMemMap", address + done, self.page_bytes, 0, self._handles[page], 0)
                done += self.page_bytes
            self._call("cuMemSetAccess", address, done, [self._access], 1)  # the costliest call: one for the whole run
        except MemoryError:
            for offset in range(0, done, self.page_bytes):
                self._call("cuMemUnmap", address + offset, self.page_bytes)
            raise
        self._mapped.update(range(address, address + done, self.page_bytes))

    def unmap(self, target: AddressRange, offset_bytes: int, count: int) -> None:
        self._enter()
        begin = target.address + offset_bytes
        for address in range(begin, begin + count * self.page_bytes, self.page_bytes):
            self._call("cuMemUnmap", address, self.page_bytes)  # one by one: a call must cover whole mappings
            self._mapped.discard(address)

    def view(
        self, target: AddressRange, shape: Sequence[int], strides: Sequence[int], dtype: DTypeLike, offset_bytes: int
    ) -> Any:
        interface = {
            "version": 3, "shape": tuple(shape), "strides": tuple(strides), "typestr": np.dtype(dtype).str,
            "data": (target.address + offset_bytes, False),
        }  # fmt: skip
        with self._page_at(target.address + offset_bytes // self.page_bytes * self.page_bytes):
            return self._tensor(_TensorWindow(target, interface))

    def _tensor(self, window: _TensorWindow) -> Any:
        import torch

        return torch.as_tensor(window, device=f"cuda:{self.device}")

    @contextmanager
    def _page_at(self, address: int) -> Iterator[None]:
        """While it lasts there is a page at an address, one of its own where none is mapped."""
        if address in self._mapped:
            yield
            return
        self._enter()
        page = self._call("cuMemCreate", self.page_bytes, self._properties, 0)
        try:
            self._call("cuMemMap", address, self.page_bytes, 0, page, 0)
            try:
                self._call("cuMemSetAccess", address, self.page_bytes, [self._access], 1)
                yield
            finally:
                self._call("cuMemUnmap", address, self.page_bytes)
        finally:
            self._call("cuMemRelease", page)

    def copy(self, array: Any) -> Any:
        return array.clone()

    def fence(self) -> None:
        self._enter()
        self._call("cuCtxSynchronize")

    def close(self) -> None:
        if self._handles:
            self.fence()
        for page in list(self._handles):
            self._call("cuMemRelease", self._handles.pop(page))

    def _enter(self) -> None:
        """The context belongs to a thread, and pages are mapped from several."""
        self._call("cuCtxSetCurrent", self._context)

    def _call(self, name: str, *arguments: Any) -> Any:
        """A call of the driver: its one result, or MemoryError with the driver's own word for what went wrong."""
        status, *results = getattr(self._driver, name)(*arguments)
        if int(status) != 0:
            raise MemoryError(f"{name} failed: {getattr(status, 'name', status)}")
        return results[0] if results else None
