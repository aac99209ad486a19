"""Floats as they are: float32, float16 and bfloat16.

Encoding rounds to the nearest even; a value that is not finite, or that overflows the narrower form, is refused by
name instead of becoming an infinity. NumPy arrays use ml_dtypes for bfloat16; torch tensors keep their own types.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from memwall.errors import InputError
from memwall.formats.base import PLAIN_BUFFER, Codec, Packed, array_namespace, real_numbers

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatCodec(Codec):
    """Plain floats; the buffer's name in a file is the tensor's own."""

    examples: ClassVar[tuple[str, ...]] = tuple(DTYPES)

    name: str

    @classmethod
    def parse(cls, spec: str) -> FloatCodec:
        if spec not in DTYPES:
            raise InputError(f"unknown float format {spec!r}; known are {', '.join(DTYPES)}")
        return cls(name=spec)

    @property
    def spec(self) -> str:
        return self.name

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy type of the values."""
        return DTYPES[self.name]

    def buffers(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        return {PLAIN_BUFFER: (tuple(shape), self.dtype)}

    def encode(self, x: Any) -> Packed:
        x = real_numbers(self.spec, x)
        xp = array_namespace(x)
        is_numpy = isinstance(x, np.ndarray)
        with np.errstate(over="ignore"):
            values = np.asarray(x, dtype=self.dtype, order="C") if is_numpy else xp.astype(x, getattr(xp, self.name))
        if not bool(xp.all(xp.isfinite(values))):
            reason = "NaN or infinite values" if not bool(xp.all(xp.isfinite(x))) else "values that overflow it"
            raise InputError(f"{self.spec} cannot hold {reason}")
        return Packed(spec=self.spec, shape=tuple(x.shape), buffers={PLAIN_BUFFER: values})

    def decode(self, packed: Packed) -> Any:
        values = packed.buffers[PLAIN_BUFFER]
        xp = array_namespace(values)
        return xp.astype(values, xp.float32, copy=False)
