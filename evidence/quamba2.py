"""Quamba2's claims, on a small Mamba-2 that is trained here, and on random models where only bytes and time count.

The model (two SSD groups, heads of 64 channels, 64 numbers of state per channel) learns the documentation strings of
the Python standard library for some minutes; it is kept, so that a second run need not train. A few channels of x and
one group's B start out large, as outliers of large models are: behind a SiLU nothing can be planted afterwards without
changing the function, so they are there from the start and the model learns with them.

Text to measure on: `--data` a UTF-8 file; the held-out text that ships with the planner otherwise, which is kept out of
training.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from memwall import kernels
from memwall.claims import Claim, Progress, main, not_run
from memwall.compress import ssm_transforms
from memwall.compress.calibration import BUNDLED_TEXT, read_text
from memwall.compress.model import CompressReport, compress_model
from memwall.compress.ssm_run import LayerRun
from memwall.engine import Settings, load
from memwall.engine.quality import Evaluator, Figures
from memwall.engine.session import Session
from memwall.formats.safetensors_file import SafetensorsFile, SafetensorsWriter
from memwall.hardware.system import cache_directory
from memwall.memory import Arena, Ledger
from memwall.models import DEMO_DIRECTORY, Checkpoint, ModelConfig
from memwall.models.config import EMBEDDING, HEAD
from memwall.models.ssm_config import Quantized, known_as, with_quantized
from memwall.models.tokenizer import Tokenizer
from memwall.plan.choose import held_out_text

TOLERANCE = 1.001
"""Perplexities within a thousandth count as equal: that much is rounding."""
CLOSE = 1.03
"""How near W4A8 must come to W4A16."""
OUTLIERS = (8, 12.0)
"""Channels of x in each layer that start out large, and how many times."""
LARGE_GROUP = 6.0
"""How many times the first group's B starts out larger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """steps of training, of `batch` sequences; measured tokens; calibration sequences; long sequences of 4k tokens;
    speed: hidden size and layers of random models.
    """

    layers: int
    hidden: int
    steps: int
    batch: int
    sequence: int
    tokens: int
    samples: int
    long: int
    speed: tuple[tuple[int, int], ...]
    rounds: int
    first: tuple[int, int, int, int, int] | None = (4, 128, 150, 16, 64)
    """Of Mamba-1: layers, hidden, steps, batch, sequence; its scan is token by token in torch, so it learns less."""


FULL = Sizes(
    layers=4, hidden=256, steps=260, batch=8, sequence=256, tokens=8192, samples=32, long=4,
    speed=((256, 6), (1024, 16), (2048, 38)), rounds=9,
)  # fmt: skip
QUICK = Sizes(
    layers=2, hidden=128, steps=60, batch=8, sequence=128, tokens=2048, samples=8, long=1,
    speed=((256, 4), (512, 8)), rounds=3, first=None,
)  # fmt: skip


# ---- a trained model -----------------------------------------------------------------------------------------------


def library_text(but: str) -> str:
    """Documentation strings of the standard library's modules, none of which is in `but`."""
    found: list[str] = []
    for path in sorted(Path(os.__file__).parent.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) > 120 and text[:100] not in but:
                    found.append(text)
    return "\n\n".join(found)


def model_config(sizes: Sizes, groups: int = 2, **changes: Any) -> dict[str, Any]:
    """As Hugging Face writes it."""
    return {
        "architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "vocab_size": 4096,
        "hidden_size": sizes.hidden, "num_hidden_layers": sizes.layers, "num_heads": 2 * sizes.hidden // 64,
        "head_dim": 64, "state_size": 64, "n_groups": groups, "chunk_size": 64, "tie_word_embeddings": True,
        "time_step_limit": [0.0, {"__float__": "Infinity"}], "layer_norm_epsilon": 1e-5, "dtype": "float32", **changes,
    }  # fmt: skip


def first_config(sizes: Sizes) -> dict[str, Any]:
    """Of Mamba-1."""
    return {
        "architectures": ["MambaForCausalLM"], "model_type": "mamba", "vocab_size": 4096, "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers, "state_size": 16, "tie_word_embeddings": True, "dtype": "float32",
    }  # fmt: skip


def plant(model: Any) -> None:
    """Some channels of x, and B of the first group, start out large; the gated norm takes the channels back."""
    import torch

    ssm = model.config.ssm
    count, factor = OUTLIERS
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            chosen = np.random.default_rng(index).choice(ssm.inner_size, count, replace=False)
            layer.mixer.conv1d.weight[chosen] *= factor
            if ssm.is_first:
                layer.mixer.out_proj.weight[:, chosen] /= factor
                continue
            layer.mixer.norm.weight[chosen] /= factor
            first = slice(ssm.inner_size, ssm.inner_size + ssm.state_size)
            layer.mixer.conv1d.weight[first] *= LARGE_GROUP


def train(folder: Path, sizes: Sizes, text: str, progress: Progress | None) -> None:
    """Writes a trained model's tensors to `folder`, whose configuration and tokenizer are there."""
    import torch
    from torch.nn import functional

    from memwall.models.torch_ssm import TorchSsm

    config = ModelConfig.from_directory(folder)
    ids = torch.tensor(Tokenizer.from_directory(folder, config.vocab_size).encode(text, add_bos=False))
    model = TorchSsm(config).start(seed=0)
    plant(model)
    plain = [p for n, p in model.named_parameters() if p.dim() != 2 or n.endswith("A_log")]
    decayed = [p for n, p in model.named_parameters() if p.dim() == 2 and not n.endswith("A_log")]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    random = torch.Generator().manual_seed(0)
    for step in range(sizes.steps):
        share = min(1, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / sizes.steps))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * max(share, 0.02)
        starts = torch.randint(len(ids) - sizes.sequence - 1, (sizes.batch,), generator=random)
        rows = torch.stack([ids[start : start + sizes.sequence + 1] for start in starts.tolist()])
        logits = model(rows[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if progress is not None and step % 10 == 0:
            progress(step, sizes.steps, f"training: {float(loss.detach()):.2f} nats")
    names = [tensor.name for tensor in config.tensors()]
    write_tensors(folder, {name: model.state_dict()[name].numpy() for name in names})


def stored(name: str) -> str:
    """A tensor's name in Hugging Face's files."""
    ends = {EMBEDDING: "backbone.embeddings.weight", "model.norm.weight": "backbone.norm_f.weight"}
    found = ends.get(name, name.replace("model.layers.", "backbone.layers."))
    assert known_as(found) == name
    return found


def write_tensors(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    entries = [(stored(name), array.dtype, array.shape) for name, array in tensors.items()]
    with SafetensorsWriter(folder / "model.safetensors", entries, {"format": "pt"}) as writer:
        for name, array in tensors.items():
            writer.write(stored(name), array)


def prepared_folder(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_DIRECTORY / name, folder / name)
    return folder


def trained_model(folder: Path, sizes: Sizes, held_out: str, progress: Progress | None, *, first: bool = False) -> Path:
    """A folder with the trained model: trained now, or read from where an earlier run has put it. first: Mamba-1."""
    if first:
        assert sizes.first is not None
        layers, hidden, steps, batch, sequence = sizes.first
        sizes = replace(sizes, layers=layers, hidden=hidden, steps=steps, batch=batch, sequence=sequence)
    prepared_folder(folder, first_config(sizes) if first else model_config(sizes))
    text = library_text(held_out)
    trained = (sizes.layers, sizes.hidden, sizes.steps, sizes.batch, sizes.sequence)
    recipe = [text, repr(trained), repr(OUTLIERS), repr(LARGE_GROUP), *(["mamba"] if first else [])]
    digest = hashlib.sha256("\0".join(recipe).encode()).hexdigest()[:16]
    kept = cache_directory() / "evidence" / f"quamba2-{digest}.safetensors"
    if kept.is_file():
        with SafetensorsFile(kept):
            shutil.copy(kept, folder / "model.safetensors")
        return folder
    train(folder, sizes, text, progress)
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}.partial")
    shutil.copy(folder / "model.safetensors", partial)
    os.replace(partial, kept)
    return folder


# ---- nothing changes -----------------------------------------------------------------------------------------------


def random_folder(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """A model of random weights with the time steps and decays that trained ones have."""
    prepared_folder(folder, config)
    parsed = ModelConfig.from_directory(folder)
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for tensor in parsed.tensors():
        name, shape = tensor.name, tensor.shape
        if name.endswith("A_log"):
            values = np.log(rng.uniform(1, 16, shape))
        elif name.endswith(("dt_bias", "dt_proj.bias")):
            values = np.log(np.expm1(np.exp(rng.uniform(math.log(1e-3), math.log(1e-1), shape))))
        elif len(shape) == 1:
            values = np.zeros(shape) if name.endswith("bias") else rng.uniform(0.5, 1.5, shape)
        else:
            values = rng.standard_normal(shape, np.float32) / math.sqrt(math.prod(shape[1:]))
        tensors[name] = values.astype(np.float32)
    write_tensors(folder, tensors)
    return folder


def logits_of(session: Session, tokens: np.ndarray) -> np.ndarray:
    session.reset()
    return session.decoder.forward(tokens, session.cache, all_logits=True).copy()


def open_model(folder: Path, weights: str, *, exact: bool = True, rows: int = 64, segment: int = 512) -> Session:
    sizes = {"context_tokens": 8192, "segment_tokens": segment, "logit_rows": rows}
    return load(folder, Settings(weights=weights, kv="state", exact=exact, **sizes))


def equal_model(source: Path, target: Path, kind: str, seed: int = 0) -> None:
    """The same function in other weights. kind: `fused` (norm fusion, order of Quamba2, all Hadamard matrices, as a
    compressed model of floats), or `inside` and `across`: channels and heads permuted at random in their group, or
    over its border.
    """
    from memwall.compress.quamba2 import Quamba2

    rng = np.random.default_rng(seed)
    with Checkpoint(source) as checkpoint:
        config = checkpoint.config
        assert config.ssm is not None
        tensors = {name: checkpoint.tensor(name).astype(np.float32) for name in checkpoint.names()}
        head = checkpoint.tensor(HEAD).astype(np.float32)
    ssm, width, per = config.ssm, config.ssm.head_dim, config.ssm.num_heads // config.ssm.num_groups
    tokens = rng.integers(0, config.vocab_size, (2, 64))
    hidden = tensors[EMBEDDING][tokens]
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        own = {name: tensors[prefix + name] for name, _, _ in ssm.rows(layer)}
        if kind == "fused":
            run = LayerRun(config, own, None, Arena(1 << 40, Ledger()), tokens.shape[1])
            order = Quamba2().order(ssm, run.look(hidden, products=False))
            channels, heads = order.channels, order.heads
            own = ssm_transforms.rotate_residual(ssm_transforms.fuse_norm(own))
        else:
            pieces = [rng.permutation(per) + group * per for group in range(ssm.num_groups)]
            heads = np.concatenate(pieces)
            if kind == "across":
                heads[[0, per]] = heads[[per, 0]]
            channels = (heads[:, None] * width + np.stack([rng.permutation(width) for _ in heads])).reshape(-1)
        own = ssm_transforms.reorder(own, ssm, channels, heads)
        if kind == "fused":
            own = ssm_transforms.turn_output(own)
        tensors.update({prefix + name: tensor for name, tensor in own.items()})
    source_config = dict(config.source)
    if kind == "fused":
        forms = {"layers": ("float",) * config.num_layers, "head": "float", "state": "float32"}
        plain = Quantized(**forms, head_ranges=4, channel_ranges=4)
        source_config = with_quantized(source_config, plain)
        tensors[HEAD] = ssm_transforms.turned_rows(head * tensors["model.norm.weight"])
        tensors["model.norm.weight"] = np.ones_like(tensors["model.norm.weight"])
        tensors[EMBEDDING] = ssm_transforms.turned_rows(tensors[EMBEDDING])
    prepared_folder(target, source_config)
    write_tensors(target, tensors)


def difference(source: Path, target: Path) -> float:
    """Largest change of a logit, as a share of the largest logit."""
    sessions = [open_model(folder, "float32") for folder in (source, target)]
    tokens = np.random.default_rng(7).integers(0, sessions[0].config.vocab_size, 64)
    first, second = (logits_of(session, tokens) for session in sessions)
    for session in sessions:
        session.release()
    return float(np.abs(first - second).max() / np.abs(first).max())


def invariance(work: Path, trained: Path, sizes: Sizes) -> list[Claim]:
    subjects = {"trained, two groups": trained}
    small = {"num_hidden_layers": 2, "vocab_size": 4096}
    one = model_config(sizes, 1, **small)
    twelve = model_config(sizes, 2, **{**small, "hidden_size": 192, "num_heads": 12, "head_dim": 32})
    twenty = model_config(sizes, 2, **{**small, "hidden_size": 320, "num_heads": 10, "n_groups": 2})
    for name, config in (("one group", one), ("192 channels", twelve), ("320 channels", twenty)):
        subjects[name] = random_folder(work / f"random {name}", config)
    found = {}
    for name, folder in subjects.items():
        equal_model(folder, work / f"fused {name}", "fused")
        found[name] = difference(folder, work / f"fused {name}")
    told = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
    claims = [
        Claim(
            claim="reordering, norm fusion and Hadamard fusion leave the float model unchanged",
            measured=f"largest change of a logit over the largest logit: {told}",
            required="at most 1e-4",
            passed=max(found.values()) <= 1e-4,
        )
    ]
    moved = {}
    for kind in ("inside", "across"):
        equal_model(trained, work / kind, kind)
        moved[kind] = difference(trained, work / kind)
    claims.append(
        Claim(
            claim="any order inside SSD groups leaves it unchanged, one that crosses their border does not",
            measured=f"inside {moved['inside']:.1e}, across {moved['across']:.1e}",
            required="inside at most 1e-4, across above 1e-2",
            passed=moved["inside"] <= 1e-4 and moved["across"] > 1e-2,
        )
    )
    return claims


# ---- quality -------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, tuple[str, dict[str, str]]] = {
    "w8a8": ("w8a8", {}),
    "w8a8 percentile": ("w8a8", {"x_scales": "percentile"}),
    "w8a8 largest": ("w8a8", {"x_scales": "tensor"}),
    "w8a8 one B and C": ("w8a8", {"bc_scales": "tensor"}),
    "w4a16": ("w4a16", {}),
    "w4a16 rtn": ("w4a16", {"rounding": "rtn"}),
    "w4a8": ("w4a8", {}),
    "w4ax": ("w4ax", {}),
    "w8a8 float state": ("w8a8", {"state": "float32"}),
}


def made(source: Path, out: Path, name: str, samples: int) -> CompressReport:
    bits, options = VARIANTS[name]
    return compress_model(source, out, bits=bits, method="quamba2", options={"samples": str(samples), **options})


def ladder(work: Path, trained: Path, sizes: Sizes, text: str, progress: Progress | None) -> list[Claim]:
    figures: dict[str, Figures] = {}
    plain = Evaluator(trained, text, limit_tokens=sizes.tokens)
    figures["float"] = plain.score("float32")
    for place, name in enumerate(VARIANTS):
        if progress is not None:
            progress(place, len(VARIANTS), f"compressing and measuring {name}")
        made(trained, work / name, name, sizes.samples)
        scorer = Evaluator(work / name, text, reference=trained, limit_tokens=sizes.tokens)
        figures[name] = scorer.score("saved")
    ppl = {name: each.perplexity for name, each in figures.items()}
    kl = {name: each.kl_nats for name, each in figures.items()}

    def told(*names: str) -> str:
        return ", ".join(f"{name} {ppl[name]:.3f} ({kl[name]:.4f} nats)" for name in names)

    def rises(*names: str) -> bool:
        return all(ppl[a] <= TOLERANCE * ppl[b] for a, b in itertools.pairwise(names))

    steps = ("float", "w8a8", "w8a8 percentile", "w8a8 largest")
    return [
        Claim(
            claim="perplexity orders float <= sorted and clustered <= percentile <= largest value, in 8 bits",
            measured=told(*steps),
            required="each at most the next, within 0.1 %",
            passed=rises(*steps),
        ),
        Claim(
            claim="a scale of B and C per SSD group is at least as good as one per tensor",
            measured=told("w8a8", "w8a8 one B and C"),
            required="at most, within 0.1 %",
            passed=rises("w8a8", "w8a8 one B and C"),
        ),
        Claim(
            claim="in 4 bits GPTQ is better than rounding to nearest",
            measured=told("w4a16", "w4a16 rtn"),
            required="lower perplexity",
            passed=ppl["w4a16"] < ppl["w4a16 rtn"],
        ),
        Claim(
            claim="W4A8 is close to W4A16, and a mix of both lies between",
            measured=told("w4a16", "w4ax", "w4a8"),
            required="w4a8 at most 3 % above w4a16; the mix between them within 0.1 %",
            passed=ppl["w4a8"] <= CLOSE * ppl["w4a16"]
            and min(ppl["w4a16"], ppl["w4a8"]) <= TOLERANCE * ppl["w4ax"]
            and ppl["w4ax"] <= TOLERANCE * max(ppl["w4a16"], ppl["w4a8"]),
        ),
    ]


def first_ladder(work: Path, sizes: Sizes, text: str, progress: Progress | None) -> Claim:
    """Mamba-1, which has no heads to sort: clipped x in 8 bits, GPTQ in 4."""
    claim = "Mamba-1: 8 bits with clipped x are near floats, and in 4 bits GPTQ is better than rounding to nearest"
    required = "w8a8 at most 3 % above the float model; w4a16 below w4a16 rtn"
    if sizes.first is None:
        return not_run(claim, required, needs="the whole run, which trains such a model")
    trained = trained_model(work / "first", sizes, text, progress, first=True)
    ppl = {"float": Evaluator(trained, text, limit_tokens=sizes.tokens).score("float32").perplexity}
    for name in ("w8a8", "w4a16", "w4a16 rtn"):
        made(trained, work / f"first {name}", name, sizes.samples)
        scorer = Evaluator(work / f"first {name}", text, reference=trained, limit_tokens=sizes.tokens)
        ppl[name] = scorer.score("saved").perplexity
    return Claim(
        claim=claim,
        measured=", ".join(f"{name} {value:.3f}" for name, value in ppl.items()),
        required=required,
        passed=ppl["w8a8"] <= CLOSE * ppl["float"] and ppl["w4a16"] < ppl["w4a16 rtn"],
    )


def ranks(x: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(x)).astype(np.float64)


def persistence(trained: Path) -> Claim:
    """Of every layer: rank correlation of the channels' maxima over two halves of the calibration text."""
    text = read_text(BUNDLED_TEXT)
    with Checkpoint(trained) as checkpoint:
        config = checkpoint.config
        assert config.ssm is not None
        ids = Tokenizer.from_directory(trained, config.vocab_size).encode(text, add_bos=False)
        count = len(ids) // 512 // 2 * 2
        tokens = np.array(ids[: count * 512]).reshape(count, 512)
        hidden = checkpoint.tensor(EMBEDDING).astype(np.float32)[tokens]
        correlations = []
        for layer in range(config.num_layers):
            prefix = f"model.layers.{layer}."
            own = {name: checkpoint.tensor(prefix + name).astype(np.float32) for name, _, _ in config.ssm.rows(layer)}
            run = LayerRun(config, own, None, Arena(1 << 40, Ledger()), 512)
            halves = []
            for half in (slice(0, count // 2), slice(count // 2, None)):
                seen = run.look(hidden[half].copy(), products=False)
                halves.append(ranks(seen.channels[: config.ssm.inner_size]))
            correlations.append(float(np.corrcoef(*halves)[0, 1]))
            run.run(hidden)
    return Claim(
        claim="the same channels are large whatever the text (activation persistence)",
        measured="rank correlation of channel maxima between halves, by layer: "
        + ", ".join(f"{value:.3f}" for value in correlations),
        required="above 0.9 in every layer",
        passed=min(correlations) > 0.9,
    )


def losses(session: Session, tokens: np.ndarray) -> np.ndarray:
    """Nats of every token after the first [n - 1]."""
    session.reset()
    found = []
    for start in range(0, len(tokens) - 1, 256):
        piece = tokens[start : start + 257]
        hidden = session.decoder.hidden(piece[:-1], session.cache)
        for at in range(0, len(hidden), 64):
            rows = session.decoder.logits(hidden[at : at + 64]).astype(np.float64)
            rows -= rows.max(axis=1, keepdims=True)
            logs = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
            targets = piece[1:][at : at + 64]
            found.append(-logs[np.arange(len(targets)), targets])
    return np.concatenate(found)


def drift(work: Path, trained: Path, sizes: Sizes, text: str) -> list[Claim]:
    """What an 8-bit state costs in the first 512 tokens of long texts, and in their last 512."""
    config = ModelConfig.from_directory(trained)
    ids = Tokenizer.from_directory(trained, config.vocab_size).encode(text, add_bos=False)
    long = np.array(ids[: len(ids) // 4097 * 4097]).reshape(-1, 4097)[: sizes.long]
    sessions = {name: open_model(work / name, "saved", exact=False) for name in ("w8a8", "w8a8 float state")}
    nats = {name: np.stack([losses(session, row) for row in long]) for name, session in sessions.items()}
    gap = nats["w8a8"] - nats["w8a8 float state"]
    ends = {"first 512": gap[:, :512], "last 512": gap[:, -512:]}
    mean = {name: float(part.mean()) for name, part in ends.items()}
    noise = 2 * math.sqrt(sum(float(part.var()) / part.size for part in ends.values()))
    held = sessions["w8a8"].cache
    types = {str(array.dtype) for array in (*held.states, *held.inputs)}  # type: ignore[attr-defined]
    conv = sessions["w8a8"].decoder._buffers["conv8"].dtype
    for session in sessions.values():
        session.release()
    told = ", ".join(f"{name} {value:+.5f} nats" for name, value in mean.items())
    return [
        Claim(
            claim="the 8-bit state does not drift: it costs as much at 4k tokens as at 512",
            measured=f"loss against a float32 state over {len(long)} texts of 4,096 tokens: {told}; noise {noise:.5f}",
            required="the last 512 cost no more than the first, within noise (two standard errors)",
            passed=mean["last 512"] <= mean["first 512"] + noise,
        ),
        Claim(
            claim="a running w8a8 model holds integers of 8 bits from in_proj to out_proj",
            measured=f"state and inputs of the convolution: {', '.join(sorted(types))}; its outputs: {conv}",
            required="int8 alone",
            passed=types == {"int8"} and conv == np.int8,
        ),
    ]


# ---- bytes and time ------------------------------------------------------------------------------------------------


def resident(folder: Path, weights: str, tokens: int) -> dict[str, Any]:
    """The ledger and the peak of a process of its own that runs a model."""
    words = " ".join(["word"] * tokens)
    call = [sys.executable, "-m", "memwall", "run", str(folder), words, "--json", "--weights", weights]
    call += ["--kv", "state", "--context", "8192", "--max-new-tokens", "4", "--ignore-eos"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-400:])
    report = json.loads(done.stdout)
    rows = {row["owner"]: row["bytes"] for row in report["ledger"] if row["tier"] == "ram"}
    return {"rows": rows, "peak": report["peak_resident_bytes"]}


def total(rows: dict[str, int], prefix: str) -> int:
    return sum(nbytes for owner, nbytes in rows.items() if owner.startswith(prefix))


def memory(folder: Path, packed: dict[str, Path]) -> list[Claim]:
    plain, four = resident(folder, "float16", 8), resident(packed["w4a8"], "saved", 8)
    share = total(four["rows"], "weights") / total(plain["rows"], "weights")
    saved = (plain["peak"] - four["peak"]) / (total(plain["rows"], "weights") - total(four["rows"], "weights"))
    state = total(four["rows"], "state") / total(plain["rows"], "state")
    long = resident(packed["w4a8"], "saved", 4096)
    return [
        Claim(
            claim="in 4 bits, embedding and head included, a model takes a quarter of its 16-bit bytes",
            measured=f"weights on the ledger {share:.3f} times those of float16; of what that saves the process's "
            f"peak falls by {saved:.0%}",
            required="at most 0.28 times, and the peak falls by at least 90 % of what the ledger says",
            passed=share <= 0.28 and saved >= 0.9,
        ),
        Claim(
            claim="the state in 8 bits takes a quarter of float32's bytes",
            measured=f"{state:.3f} times",
            required="at most 0.26 times",
            passed=state <= 0.26,
        ),
        Claim(
            claim="memory does not grow with the text, as a Transformer's cache does",
            measured=f"state after 8 tokens {total(four['rows'], 'state'):,} bytes, after 4,096 "
            f"{total(long['rows'], 'state'):,}",
            required="the same bytes",
            passed=total(four["rows"], "state") == total(long["rows"], "state"),
        ),
    ]


def step_seconds(sessions: dict[str, Session], rounds: int, steps: int = 6) -> dict[str, float]:
    """Seconds a token, the best of several rounds in which all take turns."""
    best = dict.fromkeys(sessions, math.inf)
    token = np.array([5])
    for _ in range(rounds):
        for name, session in sessions.items():
            session.decoder.forward(token, session.cache)
            began = time.perf_counter()
            for _ in range(steps):
                session.decoder.forward(token, session.cache)
            best[name] = min(best[name], (time.perf_counter() - began) / steps)
    return best


def speed(folders: list[tuple[Path, dict[str, Path]]], rounds: int) -> Claim:
    told, gains = [], []
    for folder, packed in folders:
        sessions = {name: open_model(folder, name, exact=False, rows=1) for name in ("float32", "bfloat16")}
        sessions |= {name: open_model(path, "saved", exact=False, rows=1) for name, path in packed.items()}
        seconds = step_seconds(sessions, rounds)
        count = sessions["float32"].config.num_parameters
        for session in sessions.values():
            session.release()
        plain = min(seconds["bfloat16"], seconds["float32"])
        gains.append({name: plain / seconds[name] for name in packed})
        each = ", ".join(f"{name} {1e3 * value:.2f}" for name, value in seconds.items())
        told.append(f"{count / 1e6:.0f}M: {each} ms a token")
    return Claim(
        claim="decoding in 4 bits on a CPU is faster than in bfloat16 and float32, the more so the larger the model",
        measured="; ".join(told)
        + "; over the faster of the floats: "
        + ", ".join(" / ".join(f"{gain[name]:.2f}" for gain in gains) + f" ({name})" for name in gains[0]),
        required="w4a16 faster than both at the largest size, and its gain rises with size",
        passed=gains[-1]["w4a16"] > 1 and gains[-1]["w4a16"] > gains[0]["w4a16"],
    )


def beside_transformers(folder: Path, packed: dict[str, Path]) -> Claim:
    """Our steps and those of transformers' own Mamba-2, in turn: on a CPU its reference form in plain torch."""
    name, required = "decoding in 4 bits is faster than transformers' Mamba-2 in float32", "less time a token"
    try:
        import torch
        from transformers import Mamba2ForCausalLM
    except ImportError:
        return not_run(name, required, "torch and transformers")
    model = Mamba2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    session = open_model(packed["w4a16"], "saved", exact=False, rows=1)
    prompt, counts = torch.full((1, 8), 5), (1, 5)
    best, ours = dict.fromkeys(counts, math.inf), math.inf
    model.generate(prompt, max_new_tokens=1, do_sample=False)  # the first call sets things up
    for _ in range(3):
        ours = min(ours, step_seconds({"ours": session}, 1)["ours"])
        for count in counts:
            began = time.perf_counter()
            model.generate(prompt, min_new_tokens=count, max_new_tokens=count, do_sample=False)
            best[count] = min(best[count], time.perf_counter() - began)
    theirs = (best[5] - best[1]) / 4  # what four more tokens take
    count = session.config.num_parameters
    session.release()
    return Claim(
        claim=name,
        measured=f"{count / 1e6:.0f}M: {1e3 * ours:.2f} ms a token, transformers' reference form {1e3 * theirs:.2f}",
        required=required,
        passed=ours < theirs,
    )


def large_models(work: Path, sizes: Sizes) -> list[tuple[Path, dict[str, Path]]]:
    """Random models of growing size, in floats and compressed (rounded to nearest, since only bytes and time count)."""
    found = []
    for hidden, layers in sizes.speed:
        shape = replace(sizes, hidden=hidden, layers=layers)
        config = model_config(shape, 2, dtype="bfloat16", tie_word_embeddings=False)
        folder = random_folder(work / f"random {hidden}", config)
        packed = {}
        for bits in ("w4a16", "w4a8"):
            packed[bits] = work / f"random {hidden} {bits}"
            options = {"samples": "1", "rounding": "rtn"}
            compress_model(folder, packed[bits], bits=bits, method="quamba2", options=options)
        found.append((folder, packed))
    return found


@contextmanager
def folder_of_its_own() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="memwall-quamba2-") as name:
        yield Path(name)


def run(quick: bool, data: Path | None, progress: Progress | None = None) -> list[Claim]:
    """See the module's text."""
    sizes = QUICK if quick else FULL
    text = held_out_text() if data is None else read_text(data, "held-out text")
    kernels.num_threads()
    with folder_of_its_own() as work:
        trained = trained_model(work / "trained", sizes, text, progress)
        claims = invariance(work, trained, sizes)
        claims += ladder(work, trained, sizes, text, progress)
        claims.append(first_ladder(work, sizes, text, progress))
        claims.append(persistence(trained))
        claims += drift(work, trained, sizes, text)
        large = large_models(work, sizes)
        claims += memory(*large[-1])
        claims.append(speed(large, sizes.rounds))
        claims.append(beside_transformers(*large[1]))
    gpu = "on a GPU first token and decoding are faster than mamba-ssm in float16"
    claims.append(not_run(gpu, "time to first token and per token, at batch 1 and 64"))
    return claims


if __name__ == "__main__":
    raise SystemExit(main("quamba2", sys.modules[__name__]))
