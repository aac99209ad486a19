"""Grow the demo model into one with heads of 128 channels, and train it: `evidence/models/wide-heads`.

What papers on keys and values say of channels (outliers, pruning, low rank) they say of heads of 64 to 128 channels;
the demo model's have 32. A head of 32 is a head of 128 whose other channels are zero: rotary frequency j of 16 is
frequency 4 j of 64 at the same theta. So the demo model is laid out in wide heads first, as it is but for a little
noise, and then trained on, until the channels that came free carry their part.

Text: docstrings and sources of installed Python packages. Whatever shares 60 characters in a row with the held-out or
the calibration text that ship with memwall is left out. Half of the sequences hide facts and ask for them, or repeat
a stretch of their text.

    python scripts/grow_wide_heads.py OUT --tokens 3000000 --stays 0.25

Needs torch.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file
from torch import nn

from memwall.models import DEMO_DIRECTORY
from memwall.models.tokenizer import Tokenizer
from memwall.studies.dialogues import dialogue
from memwall.studies.recall_task import hide_facts

PACKAGES = ("numpy", "scipy", "torch", "transformers", "sympy", "networkx", "matplotlib", "hypothesis", "pydantic")
SHIPPED = ("plan/heldout.txt", "compress/calibration.txt")
SHINGLE = 60
OLD, WIDE, HEADS, KV_HEADS, WIDTH, LAYERS = 32, 128, 8, 4, 256, 8
ANSWER_WEIGHT = 4.0
"""Loss of an answer's tokens against that of others."""


def documents(seed: int) -> list[str]:
    """Docstrings, and now and then a whole source file, of the installed packages among PACKAGES, in random order."""
    shipped = "".join((DEMO_DIRECTORY.parent.parent / name).read_text() for name in SHIPPED)
    known = {shipped[i : i + SHINGLE] for i in range(len(shipped) - SHINGLE)}
    seen: set[int] = set()
    found: list[str] = []

    def keep(text: str) -> None:
        if hash(text) not in seen and not any(text[i : i + SHINGLE] in known for i in range(0, len(text), 7)):
            seen.add(hash(text))
            found.append(text)

    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        for number, path in enumerate(sorted(Path(spec.origin).parent.rglob("*.py"))):
            try:
                source = path.read_text()
                tree = ast.parse(source)
            except (SyntaxError, UnicodeDecodeError, ValueError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    words = ast.get_docstring(node)
                    if words and len(words) > 300:
                        keep(words)
            if number % 8 == 0 and len(source) < 40_000:
                keep(source)
    order = np.random.default_rng(seed).permutation(len(found))
    return [found[i] for i in order]


def corpus(tokenizer: Tokenizer, cache: Path) -> np.ndarray:
    """All documents, one after another with the end token between; int16 [tokens], kept beside the model."""
    if not cache.exists():
        pieces = [np.array([*tokenizer.encode(words, add_bos=False), 1], np.int16) for words in documents(0)]
        np.save(cache, np.concatenate(pieces))
    return np.load(cache)


Sample = tuple[list[int], list[float]]


class Samples:
    """Sequences of T tokens with the weight of each token's loss."""

    def __init__(self, tokenizer: Tokenizer, text: np.ndarray, seed: int) -> None:
        self.tokenizer, self.text = tokenizer, text.astype(np.int64)
        self.rng = np.random.default_rng(seed)

    def encode(self, words: str) -> list[int]:
        return self.tokenizer.encode(words, add_bos=False)

    def plain(self, tokens: int) -> Sample:
        start = int(self.rng.integers(len(self.text) - tokens))
        return [0, *self.text[start : start + tokens - 1].tolist()], [1.0] * tokens

    def facts(self, tokens: int) -> Sample:
        """Facts in running text; all are asked for at the end, in random order."""
        number = int(self.rng.integers(2, 9))
        hidden = hide_facts(
            self.tokenizer, self.text, self.rng, num_tokens=tokens - 34 * number, num_facts=number, opening=0
        )
        ids = list(hidden.prompt)
        weights = [1.0] * len(ids)
        for which in self.rng.permutation(number):
            asked, answer = hidden.questions[which]
            said = self.encode(f" {answer}")
            ids += [*asked, *said]
            weights += [*[1.0] * len(asked), *[ANSWER_WEIGHT] * len(said)]
        rest = max(0, tokens - len(ids))
        start = int(self.rng.integers(len(self.text) - rest - 1))
        ids += self.text[start : start + rest].tolist()
        return ids[:tokens], [*weights, *[1.0] * rest][:tokens]

    def table(self, tokens: int) -> Sample:
        """Words of the vocabulary and numbers, many in a row; then some of them again: recall of anything."""
        pairs = int(self.rng.integers(6, 24))
        names = self.rng.choice(4000, pairs, replace=False) + 64
        lines = [f" is {n}.\n" for n in self.rng.integers(1000, 100_000, pairs)]
        rows = [[int(name), *self.encode(line)] for name, line in zip(names, lines)]
        ids, weights = [0], [1.0]
        gap = max(1, (tokens - 2 * sum(map(len, rows))) // pairs)
        for row in rows:
            start = int(self.rng.integers(len(self.text) - gap))
            ids += [*row, *self.text[start : start + gap].tolist()]
        weights += [1.0] * (len(ids) - 1)
        for which in self.rng.permutation(pairs):
            ids += rows[which]
            weights += [1.0, *[ANSWER_WEIGHT] * (len(rows[which]) - 1)]
        return self.fill(ids, weights, tokens)

    def copied(self, tokens: int) -> Sample:
        """A stretch of text that comes twice, with other text between."""
        span = int(self.rng.integers(24, 97))
        ids, weights = self.plain(tokens - span)
        begin = int(self.rng.integers(1, len(ids) // 2))
        at = int(self.rng.integers(begin + span, len(ids)))
        again = ids[begin : begin + span]
        return [*ids[:at], *again, *ids[at:]], [*weights[:at], *[1.0] * 4, *[2.0] * (span - 4), *weights[at:]]

    def talk(self, tokens: int) -> Sample:
        """A made-up conversation, its facts asked for afterwards."""
        made = dialogue(int(self.rng.integers(10_000, 1 << 30)))
        ids = [0, *self.encode("".join(f"{line.text}\n" for line in made.lines))]
        weights = [1.0] * len(ids)
        for asked, answer, _ in made.facts:
            question, said = self.encode(f"\n{asked}"), self.encode(f" {answer}")
            ids += [*question, *said]
            weights += [*[1.0] * len(question), *[ANSWER_WEIGHT] * len(said)]
        return self.fill(ids, weights, tokens)

    def fill(self, ids: list[int], weights: list[float], tokens: int) -> Sample:
        rest, _ = self.plain(max(2, tokens - len(ids) + 1))
        return [*ids, *rest[1:]][:tokens], [*weights, *[1.0] * len(rest)][:tokens]

    def draw(self, tokens: int) -> Sample:
        kinds = (self.plain, self.facts, self.table, self.copied, self.talk)
        return kinds[self.rng.choice(5, p=(0.44, 0.24, 0.12, 0.12, 0.08))](tokens)

    def batch(self, size: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = [self.draw(tokens) for _ in range(size)]
        return torch.tensor([d[0] for d in drawn]), torch.tensor([d[1] for d in drawn])


class Wide(nn.Module):
    """The Llama form, for training only; names of parameters are those of checkpoints."""

    def __init__(self, ff: int = 704, vocab: int = 4096) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, WIDTH)
        sizes = {
            "self_attn.q_proj": (WIDTH, HEADS * WIDE),
            "self_attn.k_proj": (WIDTH, KV_HEADS * WIDE),
            "self_attn.v_proj": (WIDTH, KV_HEADS * WIDE),
            "self_attn.o_proj": (HEADS * WIDE, WIDTH),
            "mlp.gate_proj": (WIDTH, ff),
            "mlp.up_proj": (WIDTH, ff),
            "mlp.down_proj": (ff, WIDTH),
        }
        self.weights = nn.ParameterDict()
        for layer in range(LAYERS):
            for name, (inputs, outputs) in sizes.items():
                self.weights[f"model/layers/{layer}/{name}/weight".replace(".", "/")] = torch.empty(outputs, inputs)
            for name in ("input_layernorm", "post_attention_layernorm"):
                self.weights[f"model/layers/{layer}/{name}/weight"] = torch.empty(WIDTH)
        self.weights["model/norm/weight"] = torch.empty(WIDTH)
        frequencies = 10_000.0 ** (-torch.arange(0, WIDE, 2).float() / WIDE)
        self.register_buffer("frequencies", frequencies)

    def get(self, layer: int, name: str) -> torch.Tensor:
        return self.weights[f"model/layers/{layer}/{name.replace('.', '/')}/weight"]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [batch, tokens, WIDTH] before the head."""
        batch, tokens = ids.shape
        angles = torch.arange(tokens).float()[:, None] * self.frequencies
        cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)

        def heads(x: torch.Tensor, count: int) -> torch.Tensor:
            return x.view(batch, tokens, count, WIDE).transpose(1, 2)

        def turned(x: torch.Tensor) -> torch.Tensor:
            a, b = x.float().chunk(2, -1)
            return (x * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)

        y = self.embed(ids)
        for layer in range(LAYERS):
            x = F.rms_norm(y, (WIDTH,), self.get(layer, "input_layernorm"), 1e-5)
            q = turned(heads(F.linear(x, self.get(layer, "self_attn.q_proj")), HEADS))
            k = turned(heads(F.linear(x, self.get(layer, "self_attn.k_proj")), KV_HEADS))
            v = heads(F.linear(x, self.get(layer, "self_attn.v_proj")), KV_HEADS)
            k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            y = y + F.linear(mixed.transpose(1, 2).reshape(batch, tokens, -1), self.get(layer, "self_attn.o_proj"))
            x = F.rms_norm(y, (WIDTH,), self.get(layer, "post_attention_layernorm"), 1e-5)
            gate = F.silu(F.linear(x, self.get(layer, "mlp.gate_proj"))) * F.linear(x, self.get(layer, "mlp.up_proj"))
            y = y + F.linear(gate, self.get(layer, "mlp.down_proj"))
        return F.rms_norm(y, (WIDTH,), self.weights["model/norm/weight"], 1e-5)


def grown(seed: int, stays: float) -> Wide:
    """The demo model in wide heads. stays: share of a frequency's logit where it was; its neighbours get the rest."""
    rng = np.random.default_rng(seed)
    demo = {name: value.astype(np.float32) for name, value in load_file(DEMO_DIRECTORY / "model.safetensors").items()}
    model, step, half = Wide(), WIDE // OLD, WIDE // 2
    shares = np.array([stays, *[(1 - stays) / (step - 1)] * (step - 1)], np.float32)
    shares *= math.sqrt(WIDE / OLD)  # what the larger divisor of the logits takes away

    def keys(weight: np.ndarray) -> np.ndarray:
        old = weight.reshape(-1, 2, OLD // 2, WIDTH)  # head, half of a pair, frequency
        new = rng.normal(0, 0.01, (len(old), 2, half, WIDTH)).astype(np.float32)
        for place, share in enumerate(shares):
            new[:, :, place::step] += old * math.sqrt(share)
        return new.reshape(-1, WIDTH)

    def spread(weight: np.ndarray, noise: float) -> np.ndarray:
        old = weight.reshape(-1, OLD, weight.shape[-1])
        new = rng.normal(0, noise, (len(old), WIDE, weight.shape[-1])).astype(np.float32) if noise else None
        new = np.zeros((len(old), WIDE, weight.shape[-1]), np.float32) if new is None else new
        new[:, ::step] = old
        return new.reshape(-1, weight.shape[-1])

    for name, value in demo.items():
        if name == "model.embed_tokens.weight":
            new, target = value, model.embed.weight
        else:
            target = model.weights[name.removesuffix(".weight").replace(".", "/") + "/weight"]
            if "q_proj" in name or "k_proj" in name:
                new = keys(value)
            elif "v_proj" in name:
                new = spread(value, 0.03)
            elif "o_proj" in name:
                new = np.ascontiguousarray(spread(np.ascontiguousarray(value.T), 0.0).T)
            else:
                new = value
        with torch.no_grad():
            target.copy_(torch.from_numpy(new))
    return model


def save(model: Wide, out: Path) -> None:
    """A Hugging Face folder in float16."""
    out.mkdir(parents=True, exist_ok=True)
    arrays = {name.replace("/", "."): value.detach().numpy() for name, value in model.weights.items()}
    arrays["model.embed_tokens.weight"] = model.embed.weight.detach().numpy()
    config = json.loads((DEMO_DIRECTORY / "config.json").read_text())
    config.update(head_dim=WIDE, max_position_embeddings=2048)
    save_file({n: a.astype(np.float16) for n, a in arrays.items()}, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_DIRECTORY / name, out / name)


def batches(samples: Samples, tokens: int) -> Iterator[tuple[float, torch.Tensor, torch.Tensor]]:
    """How much of the training has gone, and a batch; the last two fifths are half of sequences of 2,048 tokens."""
    steps = -(-tokens // 4096)
    for step in range(steps):
        long = step > 0.6 * steps and step % 2 == 0
        yield (step / steps, *samples.batch(*((2, 2048) if long else (4, 1024))))


def train(out: Path, tokens: int, peak: float, threads: int, stays: float) -> None:
    """AdamW in bfloat16 arithmetic, float32 weights; a checkpoint every five minutes, a mean of late steps last."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_directory(DEMO_DIRECTORY)
    text = corpus(tokenizer, out.parent / f"{out.name}-text.npy")
    print(f"{len(text):,} tokens of text", flush=True)
    samples = Samples(tokenizer, text, 1)
    model = grown(0, stays)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))
    mean = {name: p.detach().clone() for name, p in model.named_parameters()}
    begin = saved = time.monotonic()
    seen, running = 0, math.nan
    for step, (gone, ids, weights) in enumerate(batches(samples, tokens)):
        rate = peak * min(1.0, (step + 1) / 60) * (0.04 + 0.96 * 0.5 * (1 + math.cos(math.pi * gone)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            logits = F.linear(model(ids), model.embed.weight)
        each = F.cross_entropy(logits.float()[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weight = weights[:, 1:].flatten()
        loss = (each * weight).sum() / weight.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for name, p in model.named_parameters():
            mean[name].lerp_(p.detach(), 0.01)
        seen += ids.numel()
        running = loss.item() if math.isnan(running) else 0.97 * running + 0.03 * loss.item()
        if step % 20 == 0:
            answers = each[weight == ANSWER_WEIGHT]
            print(f"{gone:5.1%} step {step} tokens {seen:,} loss {running:.3f} answers {answers.mean().item():.3f} "
                  f"rate {rate:.1e} {seen / (time.monotonic() - begin):.0f}/s", flush=True)  # fmt: skip
        if time.monotonic() - saved > 300:
            saved = time.monotonic()
            save(model, out)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(mean[name])
    save(model, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=3_000_000, help="to learn from (two cores: about 1,400 a second)")
    parser.add_argument("--peak", type=float, default=1e-3, help="largest learning rate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--stays", type=float, default=0.7,
        help="of a rotary frequency's logit, what stays there; training does not even it out (0.25 would be even)",
    )  # fmt: skip
    given = parser.parse_args()
    train(given.out, given.tokens, given.peak, given.threads, given.stays)


if __name__ == "__main__":
    main()
