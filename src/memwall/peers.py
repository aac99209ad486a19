"""Other libraries' products beside ours: a process in an interpreter that has them, asked for one step at a time.

The environment variable MEMWALL_PEER_PYTHON names that interpreter. Steps are taken in turn with ours, one at a time,
so that both see the same machine; what a library cannot do is reported in its own words.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

VARIABLE = "MEMWALL_PEER_PYTHON"
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_PROC_BIND", "OMP_NUM_THREADS", "OMP_DYNAMIC")
PROGRAM = """
import json, sys, time, warnings
warnings.filterwarnings("ignore")
job = json.loads(sys.stdin.readline())
import torch
torch.set_num_threads(job["threads"])
torch.set_grad_enabled(False)
def stepped(layers):
    inputs = {}
    def step(tokens):
        for layer, (_, cols) in layers:
            key = tokens, cols
            if key not in inputs:
                inputs[key] = torch.randn(tokens, cols, dtype=torch.bfloat16)
            layer(inputs[key])
    return step
def linear(rows, cols):
    return torch.nn.Linear(cols, rows, bias=False, dtype=torch.bfloat16)
def torchao(form, shapes):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    layers = []
    for rows, cols in shapes:
        layer = torch.nn.Sequential(linear(rows, cols))
        int4 = PrototypeInt4WeightOnlyConfig(group_size=128, set_inductor_config=False)
        quantize_(layer, int4 if form == "int4" else Int8WeightOnlyConfig(set_inductor_config=False))
        layers.append((layer, (rows, cols)))
    return stepped(layers)
def bitsandbytes(form, shapes):
    import bitsandbytes as bnb
    layers = []
    for rows, cols in shapes:
        layer = bnb.nn.Linear4bit(cols, rows, bias=False, compute_dtype=torch.bfloat16, quant_type=form)
        layer.load_state_dict({"weight": linear(rows, cols).weight.float()})
        layers.append((layer.to("cpu"), (rows, cols)))
    return stepped(layers)
def llama_cpp(form, model, work, drawn=False):
    sys.path.insert(0, job["benchmarks"])
    import random_models as models
    from pathlib import Path
    from llama_cpp import Llama
    shape = models.Shape(**model)
    path = Path(work) / f"model-{form}.gguf"
    if drawn:
        from drawn_models import draw_gguf
        draw_gguf(shape, path, form)
    else:
        models.make_gguf(shape, models.make_directory(shape, Path(work) / "model"), path, form)
    threads = job["threads"]
    model = Llama(str(path), n_ctx=512, n_batch=256, n_threads=threads, n_threads_batch=threads, verbose=False)
    def step(tokens):
        model.reset()
        model.eval(list(range(3, 3 + tokens)))
    return step
steps = {}
for name, step in job["steps"].items():
    try:
        steps[name] = globals()[step.pop("library")](**step)
        steps[name](1)
        answer = {}
    except Exception as error:
        answer = {"error": repr(error)[:200]}
    print("answer", json.dumps({"name": name, **answer}), flush=True)
for line in sys.stdin:
    name, tokens = json.loads(line)
    began = time.perf_counter()
    steps[name](tokens)
    print("answer", time.perf_counter() - began, flush=True)
"""


class Peers:
    """The process with the peers.

    python: the interpreter. steps: by name, {"library": "torchao" | "bitsandbytes", "form", "shapes": [[rows, cols]]}
    or {"library": "llama_cpp", "form": a GGUF type, "model": a Shape of benchmarks/random_models.py as a dict, "work":
    a folder}. benchmarks: the folder with random_models.py, which llama_cpp needs.
    errors: by name, what went wrong where a step could not be made, else None. Raises RuntimeError if the process ends.
    """

    def __init__(
        self, python: str, steps: Mapping[str, Mapping[str, Any]], *, threads: int, benchmarks: Path | None = None
    ) -> None:
        self._process = subprocess.Popen(
            [python, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env=peer_environment(),
        )  # fmt: skip
        try:
            held = {name: dict(step) for name, step in steps.items()}
            self._ask({"threads": threads, "benchmarks": str(benchmarks), "steps": held})
            answers = [json.loads(self._answer()) for _ in steps]
        except BaseException:
            self.close()
            raise
        self.errors: dict[str, str | None] = {each["name"]: each.get("error") for each in answers}

    def seconds(self, name: str, tokens: int) -> float:
        """Of one step with so many tokens."""
        self._ask((name, tokens))
        return float(self._answer())

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _ask(self, question: Mapping[str, Any] | Sequence[Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError("the process with the peers ended") from None

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("answer "):
                return line.removeprefix("answer ")
        raise RuntimeError("the process with the peers ended")


def peer_environment() -> dict[str, str]:
    """This process' environment without what would make another library's threads wait otherwise than it is used to:
    OMP_WAIT_POLICY=passive alone makes llama.cpp two to three times slower.
    """
    return {name: value for name, value in os.environ.items() if name not in WAITING}


def peer_python() -> str | None:
    """The interpreter that has the peers, if one is named."""
    return os.environ.get(VARIABLE) or None
