"""Compiles Triton kernels for a GPU that is not there, in a process whose Triton does not interpret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import importlib, json, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
asked = json.loads(sys.argv[1])
module = importlib.import_module(asked["module"])
for constants in asked["constants"]:
    for name in asked["kernels"]:
        kernel = getattr(module, name)
        own = {key: value for key, value in constants.items() if key in kernel.arg_names}
        types = {key: "constexpr" if key in own else asked["types"].get(key, "i32") for key in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=types, constexprs=own)
        code = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=asked["options"]).asm
        print(json.dumps([len(code["cubin"]), *(code["ptx"].count(word) for word in asked["count"])]))
"""


def compiled(
    folder: Path, module: str, kernels: list[str], types: dict[str, str], constants: list[dict[str, Any]],
    count: list[str], options: dict[str, int] | None = None,
) -> list[list[int]]:  # fmt: skip
    """For compute capability 8.0: for each set of constants and each kernel, bytes of machine code and how often each
    word of `count` is in its assembly. Skips the test where Triton came without an assembler.
    """
    asked = {
        "module": module, "kernels": kernels, "types": types, "constants": constants, "count": count,
        "options": options or {},
    }  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    script = folder / "compile.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(asked)], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode and "ptxas" in done.stderr:
        pytest.skip("this build of Triton has no assembler for GPUs")
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
