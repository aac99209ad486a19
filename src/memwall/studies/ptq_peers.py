"""transformers with bitsandbytes as an outside peer of the format study: the same checkpoint and held-out windows.

The child runs this file by itself with an interpreter of the caller's choice, so that the libraries need not be
installed beside memwall; it imports nothing of memwall.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

FORMS = ("bf16", "int8", "nf4", "nf4-dq", "fp4", "fp4-dq")
PROMPT_TOKENS = 256
NAME = "bitsandbytes"


def ask(
    python: str, directory: Path, form: str, windows: list[list[int]], *, steps: int, repeats: int, threads: int
) -> dict[str, Any]:
    """Held-out losses, bytes and times of a format, or `skipped` with the reason why there are none."""
    request = {"directory": str(directory), "form": form, "windows": windows, "steps": steps, "repeats": repeats,
               "threads": threads}  # fmt: skip
    try:
        done = subprocess.run(
            [python, __file__], input=json.dumps(request), capture_output=True, text=True, check=False
        )
    except OSError as error:
        return {"library": NAME, "skipped": f"{python} cannot be started: {error.strerror}"}
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        said = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        return {"library": NAME, "skipped": f"its process failed: {said[0]}"}
    return found


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """In the child."""
    try:
        import bitsandbytes  # type: ignore[import-not-found]
        import torch
        import transformers
    except ImportError as error:
        return {"library": NAME, "skipped": f"not installed: pip install bitsandbytes transformers torch ({error})"}
    library = f"{NAME} {bitsandbytes.__version__}"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(request["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        request["directory"], dtype=torch.bfloat16, quantization_config=_quantization(request["form"])
    ).eval()
    losses = []
    with torch.inference_mode():
        for window in request["windows"]:
            ids = torch.tensor([window])
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            losses.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:])))
        costs = _costs(model, request)
    return {"library": library, "losses": losses, "costs": costs}


def _quantization(form: str) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if form == "bf16":
        return None
    if form == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)
    kind, _, twice = form.partition("-")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=twice == "dq",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip


def _costs(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    import torch

    tokens = [token for window in request["windows"] for token in window]
    prompt, rest = tokens[:PROMPT_TOKENS], tokens[PROMPT_TOKENS : PROMPT_TOKENS + request["steps"]]
    prefills, steps = [], []
    for _ in range(request["repeats"] + 1):
        began = time.perf_counter()
        found = model(input_ids=torch.tensor([prompt]), use_cache=True)
        prefills.append(time.perf_counter() - began)
        began = time.perf_counter()
        for token in rest:
            found = model(input_ids=torch.tensor([[token]]), past_key_values=found.past_key_values, use_cache=True)
        steps.append((time.perf_counter() - began) / len(rest))
    return {
        "weight_bytes": int(model.get_memory_footprint()),
        "prefill_tokens_per_s": len(prompt) / statistics.median(prefills[1:]),
        "decode_tokens_per_s": 1 / statistics.median(steps[1:]),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(json.loads(sys.stdin.read()))) + "\n")
