"""GPU attention over shared prefixes, by Triton's interpreter where there is no GPU, against attention in a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
HAS_GPU = torch.cuda.is_available()
pytest.importorskip("triton")

from memwall.kernels import triton_shared  # noqa: E402
from memwall.kernels.triton_shared import (  # noqa: E402
    FEW_ROWS,
    FIELDS,
    KEYS,
    MANY_ROWS,
    RUN,
    attend_shared,
    work_list,
)
from tests.kernels.gpu_compile import compiled  # noqa: E402
from tests.kernels.test_attention_shared import GROUPS, PAGE, Case  # noqa: E402

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")


def attended(one: Case, dtype: Any = torch.float32) -> np.ndarray:
    shared = one.q.shape[1] // one.pool.k.shape[1]
    work = work_list(one.own, one.prefixes, len(one.q), shared=shared, device=DEVICE)
    q, k, v, tables = (torch.from_numpy(x).to(DEVICE) for x in (one.q, one.pool.k, one.pool.v, one.tables))
    found = attend_shared(
        q, k.to(dtype), v.to(dtype), tables, work, page_tokens=PAGE, scale=0.3, window=one.window
    )  # fmt: skip
    return np.asarray(found.cpu().numpy())


@pytest.mark.parametrize(
    ("groups", "heads", "kv_heads"), [(GROUPS[0], 6, 2), (GROUPS[1], 4, 2), (GROUPS[2], 2, 2), (GROUPS[3], 6, 1)]
)
def test_matches_attention_over_both(groups: Any, heads: int, kv_heads: int) -> None:
    one = Case(1, groups, heads=heads, kv_heads=kv_heads, dim=32)
    np.testing.assert_allclose(attended(one), one.wanted, atol=2e-4)
    if len(one.q) < 20:
        np.testing.assert_allclose(attended(one, torch.float16), one.wanted, atol=2e-2)


@pytest.mark.parametrize("window", [20, 150])
def test_a_window_may_leave_a_prefix_behind(window: int) -> None:
    one = Case(2, GROUPS[4], heads=4, dim=16, window=window)
    np.testing.assert_allclose(attended(one), one.wanted, atol=2e-4)


def test_long_prefixes_are_runs_and_the_costliest_tasks_come_first() -> None:
    one = Case(3, [(RUN * 2 + 40, [(5, 1)] * 3), (30, [(700, 1)])], heads=4, dim=16)
    work = work_list(one.own, one.prefixes, 4, shared=2, device=DEVICE)
    tasks = work.tasks.cpu().numpy()
    cost = tasks[:, 4] - tasks[:, 3]
    assert (np.diff(cost) <= 0).all()
    prefix = tasks[tasks[:, 1] == 3]
    assert sorted(prefix[:, 3]) == [0, RUN, 2 * RUN]  # read once for all three rows
    assert work.num_partials == tasks[:, 1].sum()
    np.testing.assert_allclose(attended(one), one.wanted, atol=2e-4)


def test_what_does_not_fit_is_refused() -> None:
    one = Case(4, GROUPS[0], heads=4, dim=16)
    with pytest.raises(ValueError, match="leave some out"):
        work_list(one.own[1:], one.prefixes[:0], len(one.q), shared=2, device=DEVICE)
    work = work_list(one.own, one.prefixes, len(one.q), shared=2, device=DEVICE)
    rows = torch.zeros(len(one.q), 4, 24)
    with pytest.raises(ValueError, match="power of two"):
        attend_shared(rows, rows, rows, torch.zeros(1, dtype=torch.int32), work, page_tokens=PAGE, scale=1.0)
    with pytest.raises(ValueError, match="a list for"):
        attend_shared(
            torch.zeros(3, 4, 16), torch.zeros(16, 2, 16), torch.zeros(16, 2, 16), torch.zeros(1, dtype=torch.int32),
            work, page_tokens=PAGE, scale=1.0,
        )  # fmt: skip


def test_compiles_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    """To machine code of compute capability 8.0, whose tensor cores do the products."""
    types = {
        "q": "*fp16", "k": "*fp16", "v": "*fp16", "tables": "*i32", "tasks": "*i64", "outs": "*fp32",
        "stats": "*fp32", "starts": "*i64", "pieces": "*i64", "out": "*fp32", "scale": "fp32", "window": "i64",
    }  # fmt: skip
    constants = {"FIELDS": FIELDS, "PAGE": 16, "SHARED": 4, "KEYS": KEYS, "DIM": 128}
    found = compiled(
        tmp_path, triton_shared.__name__, ["_attend", "_join"], types,
        [{**constants, "ROWS": tile} for tile in (FEW_ROWS, MANY_ROWS)], ["mma.sync"],
    )  # fmt: skip
    assert len(found) == 4
    assert all(size > 0 for size, _ in found)
    assert all(products > 0 for _, products in found[::2])
