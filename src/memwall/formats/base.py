"""The codec seam: how numbers become bytes.

A `Codec` turns an array into a `Packed` and back. A `Packed` owns plain NumPy buffers and nothing else, so its size
is what its buffers weigh, and it can be written to a safetensors file and rebuilt from those bytes alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from memwall.errors import InputError

# A buffer of this name is stored under the tensor's own name: float tensors look as in any other safetensors file.
PLAIN_BUFFER = "values"


def tensor_name(name: str, buffer: str) -> str:
    """Name, in a file, of one buffer of the tensor `name`."""
    return name if buffer == PLAIN_BUFFER else f"{name}::{buffer}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Numbers in a low-bit form.

    spec: the codec's spec string, enough to rebuild the codec (`formats.codec(spec)`).
    shape: the logical shape of the numbers.
    buffers: name -> C-contiguous array; every byte of the form is in here.
    """

    spec: str
    shape: tuple[int, ...]
    buffers: Mapping[str, np.ndarray]

    @property
    def size(self) -> int:
        """Count of logical numbers."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes really held, padding and scales included."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    @property
    def bits_per_value(self) -> float:
        """Bits really spent per logical number (scales and padding counted)."""
        return 8 * self.nbytes / max(self.size, 1)

    def to_tensors(self, name: str) -> dict[str, np.ndarray]:
        """The buffers under the names they have in a file: `name` for floats, `name::codes`, `name::scales`... else."""
        return {tensor_name(name, buffer): array for buffer, array in self.buffers.items()}


def array_namespace(x: Any) -> Any:
    """The array API of `x`'s library.

    NumPy is one itself: the CPU path skips the import of the compatibility layer, 10 MB that a small budget feels.
    """
    if isinstance(x, np.ndarray | np.generic):
        return np
    import array_api_compat

    return array_api_compat.array_namespace(x)


def real_numbers(spec: str, x: Any) -> Any:
    """`x` if it holds real numbers, a list as an array; what has an imaginary part or is no number is refused."""
    if isinstance(x, list | tuple | float | int):
        x = np.asarray(x)
    kind = x.dtype.kind if isinstance(x, np.ndarray | np.generic) else "f"
    if kind in "cOSUMm" or "complex" in str(x.dtype):  # kind V has bfloat16 and the like
        raise InputError(f"{spec} holds real numbers, got an array of {x.dtype}: convert it to float32")
    return x


def real_float32(spec: str, x: Any) -> np.ndarray:
    """Any array of real numbers as a NumPy float32 one in C order, torch tensors of the CPU included."""
    x = real_numbers(spec, x)
    if not isinstance(x, np.ndarray):
        xp = array_namespace(x)
        x = np.asarray(xp.astype(x, xp.float32))
    return np.ascontiguousarray(x, dtype=np.float32)


class Codec(ABC):
    """Encodes arrays to `Packed` and back. Instances are frozen dataclasses: settings and technique are one object."""

    examples: ClassVar[tuple[str, ...]] = ()
    """Spec strings that the contract test runs: an easy setting and the hard ones."""

    method: ClassVar[str | None] = None
    """The compression method that alone makes this form of a model; None where loading can encode on the way."""

    rows_apart: ClassVar[bool] = True
    """Whether one row can be decoded without the others."""

    @classmethod
    @abstractmethod
    def parse(cls, spec: str) -> Codec:
        """Codec of a spec string; InputError where it names no setting of this family."""

    @property
    @abstractmethod
    def spec(self) -> str:
        """Canonical string such as `int4-g64`; `formats.codec(spec)` gives an equal codec."""

    @property
    def label(self) -> str:
        """Its name in the ledger: the spec, less what differs from matrix to matrix."""
        return self.spec

    @property
    def timed(self) -> str:
        """The spec whose products are timed in place of this one's: less what every matrix has another of."""
        return self.spec

    @abstractmethod
    def encode(self, x: Any) -> Packed:
        """Array of any float dtype -> Packed."""

    @abstractmethod
    def decode(self, packed: Packed) -> Any:
        """Packed -> float32 array of `packed.shape`."""

    @abstractmethod
    def buffers(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and dtype of each buffer that `encode` will make for an array of `shape`, known without the array."""

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Exact bytes of the packed form of an array of `shape`."""
        return sum(math.prod(s) * d.itemsize for s, d in self.buffers(shape).values())

    def from_tensors(self, name: str, shape: tuple[int, ...], tensors: Mapping[str, np.ndarray]) -> Packed:
        """Packed form from the arrays of a file (no copy); one that is missing or misshapen is refused by name."""
        buffers = {}
        for buffer, (expected_shape, dtype) in self.buffers(shape).items():
            key = tensor_name(name, buffer)
            if key not in tensors:
                raise InputError(f"tensor {key!r} is missing; {self.spec} of shape {list(shape)} needs it")
            array = tensors[key]
            if tuple(array.shape) != expected_shape or array.dtype != dtype:
                raise InputError(
                    f"tensor {key!r} is {array.dtype}{list(array.shape)}, but {self.spec} of shape {list(shape)} "
                    f"needs {dtype}{list(expected_shape)}"
                )
            buffers[buffer] = array
        return Packed(spec=self.spec, shape=tuple(shape), buffers=buffers)
