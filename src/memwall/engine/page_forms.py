"""What pages of the pool hold of keys and values: rows of floats or int8 codes, or blocks of 4-bit codes.

Both answer the same: how long a page is, where a step's rows go, and attention over page tables. Layouts of a page:

- rows: [layer][keys, values][page_tokens][Hkv][D], in int8 with two bytes of scale behind each head;
- int4: [layer] of `kernels.pages`, all that belongs to the page's tokens, finished or not. A prompt's tokens of one
  step see each other as they came and are coded afterwards; so what is coded when depends on how a prompt was cut.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from memwall.errors import InputError
from memwall.kernels.attention import attend_paged, attend_paged_sequences, attend_shared
from memwall.kv import CacheShape
from memwall.kv.float_store import put_rows, row_bytes, row_form
from memwall.memory import PagePool

INT4 = "int4"
PAGED = ("float32", "float16", "int8", INT4)
"""What pages may hold, by the names of `memwall.kv`."""

Fresh = tuple[np.ndarray, np.ndarray]


def page_tokens_of(kv: str) -> int:
    """Tokens of a page unless it is said otherwise, and the fewest there can be."""
    return 32 if kv == INT4 else 16


def page_bytes(shape: CacheShape, page_tokens: int, kv: str = "float16") -> int:
    """Bytes of one page: `page_tokens` tokens of all layers, stored as `kv` says."""
    if kv == INT4:
        from memwall.kv.int4_store import int4_form

        return shape.num_layers * int4_form(shape, page_tokens).layer_bytes
    return 2 * shape.num_layers * page_tokens * row_bytes(kv, shape)


def check_page_tokens(kv: str, page_tokens: int) -> None:
    """InputError for pages that cannot be."""
    least = page_tokens_of(kv)
    if page_tokens < least or page_tokens & (page_tokens - 1):
        raise InputError(
            f"page_tokens is {page_tokens}; it must be {least}, {2 * least}, {4 * least} or another power of two"
            + (f" for {kv}" if least > 16 else "")
        )


class Held(Protocol):
    """Keys and values in the pages of a pool."""

    step: int
    """What page numbers are multiplied with in tables."""
    defers: bool
    """Whether the rows of a prompt are attended to as they came (`fresh`), and stored after that."""

    def look(self, pool: PagePool) -> None:
        """The pages that are resident now."""

    def store(self, layer: int, k: np.ndarray, v: np.ndarray, places: np.ndarray) -> None:
        """Rows of k and v [n, Hkv, D] float32 go to `places` [n]: entry of a table * page_tokens + place in it."""

    def cut(self, layer: int, page: int, tokens: int) -> None:
        """The page holds so many tokens, whatever a step that failed has left behind them."""

    def attend_singles(
        self, layer: int, q: np.ndarray, tables: np.ndarray, lengths: np.ndarray, out: np.ndarray
    ) -> None:
        """One query of each of several sequences, see `attention.attend_paged_sequences`."""

    def attend_rows(
        self, layer: int, q: np.ndarray, table: np.ndarray, span: tuple[int, int], out: np.ndarray, fresh: Fresh | None
    ) -> None:
        """Rows of one sequence. span: its length, and the position of the first query. fresh: its newest keys and
        values where they are not in pages yet.
        """

    def attend_groups(
        self, layer: int, q: np.ndarray, pieces: tuple[np.ndarray, np.ndarray, np.ndarray], out: np.ndarray
    ) -> None:
        """Rows that go on from prefixes; pieces: tables, own and prefixes of `attention.attend_shared`."""


def held_as(kv: str, shape: CacheShape, page_tokens: int) -> Held:
    """Pages that hold what `kv` says."""
    return CodedPages(shape, page_tokens) if kv == INT4 else RowPages(kv, shape, page_tokens)


class RowPages:
    """Rows of floats, or of int8 codes."""

    defers = False

    def __init__(self, kv: str, shape: CacheShape, page_tokens: int) -> None:
        self.shape, self.page_tokens = shape, page_tokens
        self.step = 2 * shape.num_layers  # from a page of the pool to the next page of the same layer
        self._dtype, self._width = row_form(kv, shape.head_dim)
        self._views: list[Fresh] = []

    def look(self, pool: PagePool) -> None:
        """See `Held`: rows of each layer's keys and values."""
        rows = pool.array((self.shape.num_kv_heads, self._width), self._dtype)
        planes = 2 * self.shape.num_layers
        held = len(rows) - (planes - 1) * self.page_tokens
        starts = [plane * self.page_tokens for plane in range(planes)]
        self._views = [
            (rows[starts[2 * layer] :][:held], rows[starts[2 * layer + 1] :][:held])
            for layer in range(self.shape.num_layers)
        ]

    def store(self, layer: int, k: np.ndarray, v: np.ndarray, places: np.ndarray) -> None:
        """See `Held`."""
        keys, values = self._views[layer]
        put_rows(keys, k, places)
        put_rows(values, v, places)

    def cut(self, layer: int, page: int, tokens: int) -> None:
        """See `Held`: rows are written over."""

    def attend_singles(
        self, layer: int, q: np.ndarray, tables: np.ndarray, lengths: np.ndarray, out: np.ndarray
    ) -> None:
        """See `Held`."""
        attend_paged_sequences(
            q, *self._views[layer], tables, lengths, page_tokens=self.page_tokens, scale=self.shape.logit_scale,
            window=self.shape.window(layer), out=out,
        )  # fmt: skip

    def attend_rows(
        self, layer: int, q: np.ndarray, table: np.ndarray, span: tuple[int, int], out: np.ndarray, fresh: Fresh | None
    ) -> None:
        """See `Held`."""
        attend_paged(
            q, *self._views[layer], table, page_tokens=self.page_tokens, length=span[0], first_position=span[1],
            scale=self.shape.logit_scale, window=self.shape.window(layer), out=out,
        )  # fmt: skip

    def attend_groups(
        self, layer: int, q: np.ndarray, pieces: tuple[np.ndarray, np.ndarray, np.ndarray], out: np.ndarray
    ) -> None:
        """See `Held`."""
        attend_shared(
            q, *self._views[layer], *pieces, page_tokens=self.page_tokens, scale=self.shape.logit_scale,
            window=self.shape.window(layer), out=out,
        )  # fmt: skip


class CodedPages:
    """Blocks of 4-bit codes."""

    step = 1
    defers = True

    def __init__(self, shape: CacheShape, page_tokens: int) -> None:
        from memwall.kernels import pages  # whoever serves floats needs none of it
        from memwall.kv.int4_store import int4_form

        self.shape, self._kernels = shape, pages
        self._form = int4_form(shape, page_tokens)
        self._pool = np.empty((0, 0), np.uint8)

    def look(self, pool: PagePool) -> None:
        """See `Held`."""
        self._pool = pool.array((pool.page_bytes,), np.dtype(np.uint8))

    def store(self, layer: int, k: np.ndarray, v: np.ndarray, places: np.ndarray) -> None:
        """See `Held`."""
        k, v = np.ascontiguousarray(k, np.float32), np.ascontiguousarray(v, np.float32)
        self._kernels.store_pages(self._form, self._pool, self._offset(layer), k, v, places)

    def cut(self, layer: int, page: int, tokens: int) -> None:
        """See `Held`: keys of a block that is not full must be rows again before they are attended to."""
        self._kernels.cut_page(self._form, self._pool, self._offset(layer), page, tokens)

    def attend_singles(
        self, layer: int, q: np.ndarray, tables: np.ndarray, lengths: np.ndarray, out: np.ndarray
    ) -> None:
        """See `Held`."""
        self._kernels.attend_pages_sequences(
            self._form, self._pool, self._offset(layer), q, tables, lengths, scale=self.shape.logit_scale,
            window=self.shape.window(layer), out=out,
        )  # fmt: skip

    def attend_rows(
        self, layer: int, q: np.ndarray, table: np.ndarray, span: tuple[int, int], out: np.ndarray, fresh: Fresh | None
    ) -> None:
        """See `Held`."""
        self._kernels.attend_pages(
            self._form, self._pool, self._offset(layer), q, table, length=span[0], first_position=span[1],
            scale=self.shape.logit_scale, window=self.shape.window(layer), out=out, fresh=fresh,
        )  # fmt: skip

    def attend_groups(
        self, layer: int, q: np.ndarray, pieces: tuple[np.ndarray, np.ndarray, np.ndarray], out: np.ndarray
    ) -> None:
        """See `Held`."""
        self._kernels.attend_pages_shared(
            self._form, self._pool, self._offset(layer), q, *pieces, scale=self.shape.logit_scale,
            window=self.shape.window(layer), out=out,
        )  # fmt: skip

    def _offset(self, layer: int) -> int:
        return layer * self._form.layer_bytes
