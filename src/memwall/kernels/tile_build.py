"""Emitted C++ to a running function: the system's compiler, a build cache, and a call on NumPy arrays.

Compiled files lie under the user's cache folder by the digest of compiler, flags and source, written whole or not at
all; the code is for this very machine, so its instruction sets are allowed by name.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from memwall import kernels
from memwall.errors import InputError, MemwallError
from memwall.hardware.system import cache_directory
from memwall.kernels.tile_cpp import emit
from memwall.kernels.tile_interpreter import as_bytes
from memwall.kernels.tile_program import TileProgram

COMPILERS = ("c++", "g++", "clang++")
_X86 = ("-mfma", "-mf16c", "-mavx2")
_AVX512 = (
    "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512vbmi", "-mprefer-vector-width=512",
)  # fmt: skip
FLAGS: dict[str, tuple[str, ...]] = {"amx": (*_X86, *_AVX512), "avx512": (*_X86, *_AVX512), "avx2": _X86}
LANES = {"amx": 16, "avx512": 16, "avx2": 8}
COMPILE_SECONDS = 300


class NoCompiler(MemwallError):
    """There is no C++ compiler; the message says what to install."""


def find_compiler() -> str:
    """Path of the C++ compiler: $CXX, or the first of `COMPILERS`."""
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return found
    tried = f"CXX={wanted}" if wanted else ", ".join(COMPILERS)
    raise NoCompiler(
        f"tile programs for the CPU need a C++17 compiler, and there is none ({tried}): install one (apt install g++, "
        "dnf install gcc-c++, xcode-select --install) or set CXX"
    )


class Compiled:
    """A program as a function of this process. isa: instruction set it was compiled for."""

    def __init__(self, program: TileProgram, isa: str, path: Path, source: str) -> None:
        self.program, self.isa, self.path, self.source = program, isa, path, source
        self._library = ctypes.CDLL(str(path))
        self._run = self._library.tile_run
        self._run.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int]
        self._run.restype = None

    def __call__(self, arrays: Mapping[str, np.ndarray], *, threads: int | None = None) -> None:
        """Run on the caller's arrays (as `tile_interpreter.run`), on as many cores as the kernels use."""
        data = as_bytes(self.program, arrays)
        pointers = (ctypes.c_void_p * len(data))(*(each.ctypes.data for each in data.values()))
        self._run(pointers, threads or kernels.num_threads())


def build(program: TileProgram, *, isa: str | None = None, fast: bool = True) -> Compiled:
    """Compile, or take from the cache. isa: amx (whose vectors are those of avx512), avx512,
    avx2 or portable; None for the one the kernels use.
    fast: optimise fully; programs that are run once, to be checked, are compiled sooner without.
    """
    isa = isa or str(kernels.isa())
    source = emit(program, LANES.get(isa, 4))
    flags = ("-std=c++17", "-O3" if fast else "-O0", "-fPIC", "-shared", "-pthread", "-w", *FLAGS.get(isa, ()))
    return Compiled(program, isa, compile_source(source, flags), source)


def compile_source(source: str, flags: Sequence[str]) -> Path:
    """The shared library of this source; InputError with the compiler's first complaint where it fails."""
    compiler = find_compiler()
    told = "\0".join([_version(compiler), *flags, source])
    folder = cache_directory() / "tiles"
    path = folder / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.so"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        written, made = Path(scratch) / "program.cpp", Path(scratch) / "program.so"
        written.write_text(source, encoding="utf-8")
        try:
            done = subprocess.run(
                [compiler, *flags, str(written), "-o", str(made)],
                capture_output=True, text=True, check=False, timeout=COMPILE_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise InputError(f"{compiler} took more than {COMPILE_SECONDS} s: take smaller tiles") from None
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-300:])
            raise InputError(f"{compiler} refuses the emitted source: {first.replace(str(written), 'program.cpp')}")
        os.replace(made, path)
    return path


@lru_cache(maxsize=8)
def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return compiler + (done.stdout.splitlines() or [""])[0]
