"""`memwall kernel`: cost, sources, check, and what is refused."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memwall.kernels import tilus_check
from memwall.kernels.tile_build import NoCompiler
from memwall.kernels.tilus_check import Check


def test_cost(memwall: Callable[..., Any]) -> None:
    result = memwall("kernel", "u3", "--shape", "1024x512", "--json")
    found = json.loads(result.stdout)["cost"]
    assert found["read_bytes"]["packed"] == 1024 * 512 * 3 // 8
    assert found["conflicts"] == 0
    assert "ldmatrix" in memwall("kernel", "f6e3m2").stdout


def test_sources(memwall: Callable[..., Any], tmp_path: Path) -> None:
    assert "view(" in memwall("kernel", "i5", "--emit", "listing").stdout
    python = memwall("kernel", "i5", "--program", "direct", "--emit", "triton").stdout
    assert "tl.dot" in python
    ast.parse(python)
    assert "mma_f16(" in memwall("kernel", "i5", "--emit", "cuda").stdout
    target = tmp_path / "product.cpp"
    assert memwall("kernel", "i5", "--program", "matvec", "--emit", "cpp", "--out", target).exit_code == 0
    assert 'extern "C" void tile_run' in target.read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("i9",), "unknown tile type"),
        (("f16",), "1 to 8 bits"),
        (("i4", "--shape", "4096"), "inputs x outputs"),
        (("i4", "--shape", "1000x4096"), "does not divide"),
        (("i4", "--shape", "9999999x128"), "131,072"),
        (("i4", "--program", "gemm"), "matmul, direct, matvec"),
        (("i4", "--emit", "fortran"), "listing, cpp, cuda, triton"),
        (("i4", "--emit", "triton"), "manages shared memory itself"),
        (("i4", "--out", "x"), "--out is for --emit"),
        (("i4", "--emit", "listing", "--out", "/nowhere/x"), "folder that exists"),
        (("i4", "--program", "matvec", "--tokens", "99"), "1 to 16 tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_input(memwall: Callable[..., Any], arguments: tuple[str, ...], says: str) -> None:
    result = memwall("kernel", *arguments)
    assert result.exit_code == 2
    assert says in " ".join(result.stderr.split())


def test_a_difference_ends_with_status_1(memwall: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for same, status in ((True, 0), (False, 1)):
        monkeypatch.setattr(tilus_check, "check", lambda *a, s=same, **k: [Check(what="x", same=s, error=0.5)])
        result = memwall("kernel", "i4", "--check")
        assert result.exit_code == status
        assert ("same" if same else "different") in result.stdout


def test_without_a_compiler(memwall: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise NoCompiler("install one")

    monkeypatch.setattr(tilus_check, "find_compiler", missing)
    result = memwall("kernel", "i4", "--check")
    assert result.exit_code == 2
    assert "install one" in result.stderr


def test_measured_beside_memwalls_own(memwall: Callable[..., Any]) -> None:
    pytest.importorskip("memwall.kernels.tile_build").find_compiler()
    result = memwall("kernel", "i4", "--program", "matvec", "--shape", "256x128", "--measure", "--json")
    names = [row["kernel"] for row in json.loads(result.stdout)["measure"]["rows"]]
    assert names == ["tile program i4", "tile program i4, x rounded", "memwall int4", "memwall int4, exact"]
