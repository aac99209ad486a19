"""The job that makes a larger model to fine-tune: a trained one with twice its layers; run by `efficiency_worker`.

*Source*: "LLaMA Pro: Progressive LLaMA with Block Expansion" (Chengyue Wu, 2024), arXiv 2401.02415.
*Idea*: behind each layer comes a copy of it whose two last products are zero, so that it adds nothing and the larger
model begins where the smaller one stands. Then it learns on.
*Units and shapes*: a Hugging Face folder in, one out, in float16; text as UTF-8; losses in nats per token.
*Differs from the paper*: which trains the copies alone; here all weights learn.
*Cost*: training holds the weights four times in float32.
*Holds when*: the model is of the Llama form, each layer two sums on a residual.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from memwall.errors import InputError
from memwall.models import Checkpoint, ModelConfig
from memwall.models.tokenizer import Tokenizer
from memwall.models.torch_decoder import TorchDecoder
from memwall.studies.efficiency_worker import Report

ZERO = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
WINDOWS = 24
"""Of held-out text that are judged before and after."""


def expand(directory: Path, out: Path) -> ModelConfig:
    """Writes the model of twice the layers to `out`; it computes what the old one does."""
    config = ModelConfig.from_directory(directory)
    if config.num_experts or config.family != "llama":
        raise InputError(f"{directory}: a {config.family} model; layers are doubled of dense Llama models")
    out.mkdir(parents=True, exist_ok=True)
    with Checkpoint(directory, config) as checkpoint:
        held = {tensor.name: torch.from_numpy(checkpoint.tensor(tensor.name).copy()) for tensor in config.tensors()}
    made = {}
    for name, tensor in held.items():
        head, inside, rest = name.partition(".layers.")
        if not inside:
            made[name] = tensor
            continue
        number, _, field = rest.partition(".")
        made[f"{head}.layers.{2 * int(number)}.{field}"] = tensor
        made[f"{head}.layers.{2 * int(number) + 1}.{field}"] = tensor.clone() if field not in ZERO else 0 * tensor
    save_file(made, out / "model.safetensors", {"format": "pt"})
    told = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps(told | {"num_hidden_layers": 2 * config.num_layers}), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (directory / name).exists():
            shutil.copy(directory / name, out / name)
    return ModelConfig.from_directory(out)


def grow(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """The larger model in `out`, and its losses. request: directory, out, text and held_out (paths), steps, batch,
    tokens, learning_rate, arithmetic (of products: `efficiency_sizes.ARITHMETIC`), threads.
    """
    torch.set_num_threads(request["threads"])
    torch.manual_seed(0)
    out = Path(request["out"])
    config = expand(Path(request["directory"]), out)
    decoder, tokenizer = TorchDecoder.from_directory(out), Tokenizer.from_directory(out)
    ids, held = (
        torch.tensor(tokenizer.encode(Path(request[name]).read_text(encoding="utf-8"), add_bos=False))
        for name in ("text", "held_out")
    )
    before = _judged(decoder, held, request["tokens"])
    decoder.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=request["learning_rate"], betas=(0.9, 0.95), weight_decay=0)
    random, steps, tokens = torch.Generator().manual_seed(0), request["steps"], request["tokens"]
    for step in range(steps):
        share = min(1, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = request["learning_rate"] * max(share, 0.02)
        starts = torch.randint(len(ids) - tokens, (request["batch"],), generator=random)
        rows = torch.stack([ids[start : start + tokens + 1] for start in starts.tolist()])
        with torch.autocast("cpu", torch.bfloat16, enabled=request["arithmetic"] == "bfloat16"):
            loss = _loss(decoder, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            report(step, steps, f"training a larger model: {loss.item():.2f} nats")
    names = {tensor.name for tensor in config.tensors()}
    made = {name: each.detach().half() for name, each in decoder.state_dict().items() if name in names}
    save_file(made, out / "model.safetensors", {"format": "pt"})
    after = _judged(TorchDecoder.from_directory(out), held, tokens)
    return {"before": before, "after": after, "parameters": sum(tensor.size for tensor in config.tensors())}


def _loss(decoder: TorchDecoder, rows: Tensor) -> Tensor:
    logits = decoder(rows[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def _judged(decoder: TorchDecoder, ids: Tensor, tokens: int) -> float:
    """Mean loss of the first windows of a text."""
    count = min(WINDOWS, (len(ids) - 1) // tokens)
    if count < 1:
        raise InputError(f"held-out text of {len(ids):,} tokens: at least {tokens + 1:,}")
    with torch.no_grad():
        return sum(float(_loss(decoder.eval(), ids[None, at * tokens : at * tokens + tokens + 1]))
                   for at in range(count)) / count  # fmt: skip
