"""GPU attention over prefixes that sequences share, in Triton: `attend_shared` as one launch over a list of tasks.

Source: BatchLLM (Zheng 2024, arXiv 2412.03594), prefix-shared attention with horizontal fusion.
Idea: a task is a tile of query rows and a run of keys, of a shared prefix or of what one sequence has of its own. The
host lists all tasks of all groups, the costliest first; one launch computes them with a running softmax and leaves
(maximum, sum, output) of each row; a second joins a row's pieces. A prefix is read once per tile of its rows.

Shapes: as `kernels.attention.attend_shared`: q, out [T, H, D]; k, v [pages * page_tokens, Hkv, D] float16 or float32;
pieces int64 [n, 5]. Cost: each key is read once per tile; partial results of every row and run are written once.
Holds when: D is a power of two from 16 on, H / Hkv at most `FEW_ROWS`, every piece's rows see at least one of its keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from memwall.kernels.triton_softmax import fold_tile

FEW_ROWS, MANY_ROWS = (
    16,
    64,
)  # query tokens times the heads that share a key-value head: a tile of tensor cores' products
KEYS = 64
RUN = 512  # keys of a task: enough tasks for a GPU behind one long prefix, few partial results
FIELDS = 8


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q, k, v, tables, tasks, outs, stats, num_kv_heads, scale, window,
    FIELDS: tl.constexpr, PAGE: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    task, kv_head = tasks + tl.program_id(0) * FIELDS, tl.program_id(1)
    first_row, num_rows, table = tl.load(task), tl.load(task + 1), tl.load(task + 2)
    begin, end, query_key, base = tl.load(task + 3), tl.load(task + 4), tl.load(task + 5), tl.load(task + 6)
    row, channel, slot = tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, KEYS)
    token = row // SHARED
    live = token < num_rows
    position = query_key + token
    head = kv_head * SHARED + row % SHARED
    place = ((first_row + token) * num_kv_heads * SHARED + head)[:, None] * DIM + channel[None, :]
    query = tl.load(q + place, mask=live[:, None], other=0.0)
    peak = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    held = tl.zeros([ROWS, DIM], tl.float32)
    for start in range(begin, end, KEYS):
        key = start + slot
        there = key < end
        page = tl.load(tables + table + key // PAGE, mask=there, other=0).to(tl.int64)
        at = ((page * PAGE + key % PAGE) * num_kv_heads + kv_head)[:, None] * DIM + channel[None, :]
        keys = tl.load(k + at, mask=there[:, None], other=0.0)
        seen = (key[None, :] <= position[:, None]) & (key[None, :] > position[:, None] - window) & there[None, :]
        values = tl.load(v + at, mask=there[:, None], other=0.0)
        peak, total, held = fold_tile(query, keys, values, seen, scale, peak, total, held)
    kept = (base + token) * num_kv_heads * SHARED + head
    tl.store(outs + kept[:, None] * DIM + channel[None, :], held, mask=live[:, None])
    tl.store(stats + kept * 2, peak, mask=live)
    tl.store(stats + kept * 2 + 1, total, mask=live)


@triton.jit
def _join(outs, stats, starts, pieces, out, num_heads, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row and head: pieces[starts[row] .. starts[row + 1]] are the partial results that belong to it."""
    row, head, channel = tl.program_id(0), tl.program_id(1), tl.arange(0, DIM)
    begin, end = tl.load(starts + row), tl.load(starts + row + 1)
    peak = -1e30
    for i in range(begin, end):
        peak = tl.maximum(peak, tl.load(stats + (tl.load(pieces + i) * num_heads + head) * 2))
    total = 0.0
    held = tl.zeros([DIM], tl.float32)
    for i in range(begin, end):
        at = tl.load(pieces + i) * num_heads + head
        weight = tl.exp(tl.load(stats + at * 2) - peak)
        total += weight * tl.load(stats + at * 2 + 1)
        held += weight * tl.load(outs + at * DIM + channel)
    tl.store(out + (row * num_heads + head) * DIM + channel, held / tl.where(total > 0, total, 1.0))


@dataclass(frozen=True)
class WorkList:
    """What one launch computes: the same for all layers of a step, so it is made and sent once.

    tile: rows of a task, counted over the heads that share keys. tasks: int64 [n, FIELDS] of (first row, rows, place of
    the table, first key, key after the last, position of the first row among the piece's keys, first partial result),
    the costliest first. starts [T + 1], pieces: which partial results belong to a row.
    """

    tile: int
    tasks: torch.Tensor
    starts: torch.Tensor
    pieces: torch.Tensor
    num_partials: int


def work_list(own: np.ndarray, prefixes: np.ndarray, num_rows: int, *, shared: int, device: torch.device) -> WorkList:
    """own, prefixes: as `kernels.attention.attend_shared` takes them; shared: query heads of a key-value head."""
    every = np.concatenate([own, prefixes])
    tile_rows = FEW_ROWS if every[:, 1].max(initial=0) * shared <= FEW_ROWS else MANY_ROWS
    found, rows_of, partials = [], [], 0
    for first, count, table, length, query_key in every.tolist():
        for tile in range(0, count, tile_rows // shared):
            rows = min(tile_rows // shared, count - tile)
            seen = min(length, query_key + tile + rows)  # the last row's keys end there
            for begin in range(0, seen, RUN):
                end = min(begin + RUN, seen)
                found.append((first + tile, rows, table, begin, end, query_key + tile, partials, 0))
                rows_of.append(np.arange(first + tile, first + tile + rows))
                partials += rows
    tasks = np.array(found, np.int64).reshape(-1, FIELDS)
    row = np.concatenate([np.empty(0, np.int64), *rows_of])
    starts = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=num_rows))])
    if len(starts) != num_rows + 1 or (np.diff(starts) == 0).any():
        raise ValueError(f"{num_rows} rows, but the pieces name others or leave some out")
    costliest = np.argsort(tasks[:, 3] - tasks[:, 4], kind="stable")
    on = [torch.from_numpy(each).to(device) for each in (tasks[costliest], starts, np.argsort(row, kind="stable"))]
    return WorkList(tile_rows, on[0], on[1], on[2], partials)


def attend_shared(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: torch.Tensor,
    work: WorkList,
    *,
    page_tokens: int,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of q [T, H, D] over the pages of k, v [pages * page_tokens, Hkv, D] -> [T, H, D] float32.

    tables: int32 page tables behind one another, into which the work list's tasks point. ValueError: shapes that do not
    fit.
    """
    num_rows, num_heads, dim = q.shape
    num_kv_heads = k.shape[1]
    if dim & (dim - 1) or dim < 16 or num_heads % num_kv_heads or num_heads // num_kv_heads > FEW_ROWS:
        raise ValueError(
            f"{num_heads} heads of {dim} over {num_kv_heads}: D a power of two from 16 on, H / Hkv <= {FEW_ROWS}"
        )
    if v.shape != k.shape or len(work.starts) != num_rows + 1:
        raise ValueError(f"a list for {len(work.starts) - 1} rows, queries {q.shape}, keys {k.shape}, values {v.shape}")
    outs = torch.empty(work.num_partials, num_heads, dim, dtype=torch.float32, device=q.device)
    stats = torch.empty(work.num_partials, num_heads, 2, dtype=torch.float32, device=q.device)
    out = torch.empty(num_rows, num_heads, dim, dtype=torch.float32, device=q.device)
    _attend[(len(work.tasks), num_kv_heads)](
        q.to(k.dtype).contiguous(), k.contiguous(), v.contiguous(), tables, work.tasks, outs, stats, num_kv_heads,
        scale, (1 << 40) if window is None else window, FIELDS=FIELDS, PAGE=page_tokens,
        SHARED=num_heads // num_kv_heads, ROWS=work.tile, KEYS=KEYS, DIM=dim,
    )  # fmt: skip
    _join[(num_rows, num_heads)](outs, stats, work.starts, work.pieces, out, num_heads, DIM=dim)
    return out
