"""Compiling: the cache, the error without a compiler, and the compiler's complaint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from memwall.errors import InputError
from memwall.kernels import tile_build
from memwall.kernels.tile_build import NoCompiler, compile_source, find_compiler

SOURCE = 'extern "C" int one() { return 1; }'
FLAGS = ("-shared", "-fPIC")


@pytest.fixture
def compiler() -> str:
    try:
        return find_compiler()
    except NoCompiler as error:
        pytest.skip(str(error))


def test_builds_are_kept(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = compile_source(SOURCE, FLAGS)
    stamp = first.stat().st_mtime_ns
    monkeypatch.setattr(tile_build.subprocess, "run", None)  # a second build would call it
    assert compile_source(SOURCE, FLAGS) == first
    assert first.stat().st_mtime_ns == stamp
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_what_the_compiler_refuses(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"program\.cpp:1"):
        compile_source("int wrong(", FLAGS)
    assert list((tmp_path / "memwall" / "tiles").iterdir()) == []


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(NoCompiler, match=r"apt install g\+\+") as caught:
        find_compiler()
    assert caught.value.exit_status == 2
    monkeypatch.setenv("CXX", "nonesuch++")
    with pytest.raises(NoCompiler, match=r"CXX=nonesuch\+\+"):
        find_compiler()
