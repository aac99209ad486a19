"""Tables: the interpolation by hand, readers, and what bad files say."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.simulate.base import Operation
from memwall.simulate.tables import GemmTable, Tables, along, grow, read_tables, rounded_tokens
from tests.simulate.test_cluster import DEVICE

PROFILES = Path(os.environ.get("MEMWALL_PROFILES", ""))
"""Folder of published profiles, where they are at hand."""
GEMM = "gpu,dtype,m,k,n,time(us),energy(uJ)\n"


def gemm(m: float, k: float, n: float, dtype: str = "float16", repeat: float = 1.0) -> Operation:
    return Operation(name="x", kind="gemm", dtype=dtype, shape=(m, k, n), repeat=repeat)


def read(folder: Path, **files: str) -> Tables:
    for name, text in files.items():
        (folder / f"{name}.csv").write_text(text)
    return read_tables(folder, DEVICE)


def test_tokens_are_rounded_up_to_tiles() -> None:
    assert [rounded_tokens(n, 64) for n in (1, 64, 65, 128, 129)] == [64, 64, 128, 128, 256]
    assert rounded_tokens(3, 1) == 3


def test_products_between_profiled_shapes() -> None:
    def flat(seconds: float) -> tuple[list[float], list[float]]:
        return [64.0, 128.0], [seconds, 2 * seconds]

    table = GemmTable({(100, 100): flat(1.0), (300, 100): flat(3.0), (100, 500): flat(5.0), (400, 500): flat(9.0)})
    assert table.seconds(100, 100, 1) == 1.0
    assert table.seconds(100, 100, 100) == 2.0
    assert table.seconds(200, 100, 64) == pytest.approx(2.0)  # m between
    assert table.seconds(100, 300, 64) == pytest.approx(3.0)  # k between
    # both: from (100, 100) to (400, 500), r = sqrt(1/3 * 1/2)
    assert table.seconds(200, 300, 64) == pytest.approx(1.0 + (1 / 6) ** 0.5 * 8.0)
    assert table.seconds(50, 50, 64) is None
    assert table.seconds(500, 600, 64) is None


@given(st.lists(st.tuples(st.integers(1, 100), st.floats(0.1, 10)), min_size=1, max_size=8, unique_by=lambda p: p[0]))
def test_curves_pass_through_their_points(points: list[tuple[int, float]]) -> None:
    points.sort()
    curve = ([float(x) for x, _ in points], [y for _, y in points])
    for x, y in points:
        assert along(curve, x) == y
        assert grow(curve, x) == y
    last, most = curve[0][-1], curve[1][-1]
    assert grow(curve, 3 * last) == pytest.approx(3 * most)
    assert along(curve, 2 * last) == pytest.approx(2 * most)


def test_reading_all_kinds(tmp_path: Path) -> None:
    tables = read(
        tmp_path,
        gemm=GEMM + "a,half,8,8,64,10,3\na,half,8,8,128,20,\n",
        attention="gpu,dtype,head_size,heads,kv_heads,batch,queries,seq_len,time(us)\n"
        "a,half,64,8,2,1,1,160,10\na,half,64,8,2,3,1,160,30\na,half,64,8,2,1,64,64,50\n",
        all_reduce="gpu,num_nodes,num_gpus_per_node,dtype,size(kb),time(us)\na,1,2,half,0,5\na,1,2,half,10,15\n",
        **{"pass": "gpu,name,rows,time(us)\na,step,4,7\n"},
    )
    found = tables.cost(gemm(8, 8, 1, repeat=2))
    assert found is not None
    assert (found.seconds, found.joules) == (pytest.approx(20e-6), pytest.approx(6e-6))
    shape = (64.0, 8.0, 2.0)

    def attention(batch: float, queries: float, keys: float, dtype: str = "float16") -> float:
        one = tables.cost(Operation(name="a", kind="attention", dtype=dtype, shape=(*shape, batch, queries, keys)))
        assert one is not None
        return one.seconds * 1e6

    assert attention(2, 1, 150) == pytest.approx(20)  # keys are rounded up to 160
    assert attention(6, 1, 160) == pytest.approx(60)
    assert attention(2, 64, 64) == pytest.approx(100)
    assert attention(1, 1, 160, "float8") == pytest.approx(10 / 1.5)

    def reduce(kib: float, group: tuple[int, int] = (1, 2)) -> float | None:
        one = tables.cost(Operation(name="r", kind="all_reduce", dtype="float16", shape=group, link_bytes=kib * 1024))
        return None if one is None else one.seconds * 1e6

    assert reduce(5) == pytest.approx(10)
    assert reduce(40) == pytest.approx(60)
    assert reduce(1, (1, 1)) == 0
    assert reduce(1, (1, 4)) is None
    step = tables.cost(Operation(name="step", kind="pass", dtype="float32", shape=(2.0,)))
    assert step is not None
    assert step.seconds == pytest.approx(7e-6)
    assert tables.cost(Operation(name="other", kind="pass", dtype="float32", shape=(2.0,))) is None
    assert tables.cost(gemm(8, 8, 1, "float32")) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gpu,dtype,m,k,time(us)\na,half,1,1,1\n", "no column 'n'"),
        (GEMM + "a,half,x,1,1,1,\n", "row 2: m is 'x'"),
        (GEMM + "a,half,1,1,1,-4,\n", "time.us. is '-4'"),
        (GEMM + "a,half,1,1,1,nan,\n", "time.us. is 'nan'"),
        (GEMM + "a,half,1,1\n", "is ''"),
    ],
)
def test_bad_tables_name_the_place(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        read(tmp_path, gemm=text)


def test_a_folder_without_tables(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no table here"):
        read_tables(tmp_path, DEVICE)


@given(st.text(max_size=200))
def test_no_text_breaks_the_reader(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "gemm.csv").write_text(text, encoding="utf-8", errors="replace", newline="")
        with contextlib.suppress(InputError):
            read_tables(Path(folder), DEVICE)


@pytest.mark.skipif(not (PROFILES / "comm").is_dir(), reason="needs MEMWALL_PROFILES, a folder of published profiles")
@pytest.mark.parametrize("gpu", ["H100-SXM-80GB", "H200-SXM-141GB", "V100-PCIE-16GB"])
def test_published_collectives_are_read(gpu: str) -> None:
    tables = read_tables(PROFILES / "comm" / gpu, DEVICE)
    assert {kind for kind, *_ in tables.collectives} == {
        "all_reduce", "all_gather", "reduce_scatter", "alltoall", "sendrecv"
    }  # fmt: skip
    small, large = (
        tables.cost(Operation(name="r", kind="all_reduce", dtype="float16", shape=(1, 2), link_bytes=b))
        for b in (1024, 2**28)
    )
    assert small is not None
    assert large is not None
    assert 0 < small.seconds < large.seconds
