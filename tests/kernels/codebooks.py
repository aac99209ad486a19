"""Matrices of codebooks with arbitrary content, for tests of products and files."""

from __future__ import annotations

import numpy as np

from memwall.formats import Packed, codec
from memwall.formats.vector_parts import BOOK_TAIL, INDEX_TAIL, Coded
from memwall.formats.vptq import VptqCodec, pack


def random_codebooks(spec: str, shape: tuple[int, int], seed: int = 0) -> Packed:
    """Random indices, centroids, order and scales in the layout of `spec`."""
    form = codec(spec)
    assert isinstance(form, VptqCodec)
    random = np.random.default_rng(seed)
    held: list[Coded | None] = []
    for part in form.parts(shape[1]):
        if part is None:
            held.append(None)
            continue

        def book(bits: int, groups: int = part.books(shape[0]), vector: int = part.vector) -> np.ndarray:
            return random.standard_normal((groups, 1 << bits, vector)).astype(np.float16)

        held.append(
            Coded(
                codes=random.integers(0, 1 << part.bits, (part.vector_rows(shape[0]), part.columns), np.uint32),
                main=book(part.main_bits),
                residual=book(part.residual_bits) if part.residual_bits else None,
            )
        )
    assert held[1] is not None
    return pack(
        form,
        shape,
        held[1],
        outliers=held[0],
        order=random.permutation(shape[1]) if form.ordered else None,
        norm=random.standard_normal((2, shape[1])).astype(np.float16) if form.norm else None,
    )


def with_tails(packed: Packed, value: float) -> Packed:
    """The same with other numbers where only vectors that read past the end may look."""
    buffers = {name: buffer.copy() for name, buffer in packed.buffers.items()}
    for name, buffer in buffers.items():
        if name.endswith("indices"):
            buffer[-INDEX_TAIL:] = 0xFFFFFFFF
        elif name.endswith(("centroids", "residuals")):
            buffer[-BOOK_TAIL:] = value
    return Packed(spec=packed.spec, shape=packed.shape, buffers=buffers)
