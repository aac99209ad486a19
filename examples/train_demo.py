r"""Train a demo model: a small Llama on text that every machine has, able to recall facts from its context.

    python examples/train_demo.py OUT             about 14.6M parameters, context 2,048; wants a GPU
    python examples/train_demo.py OUT --smoke     seconds: shows that every step works, learns next to nothing

For two CPU cores, the size of the bundled model:

    python examples/train_demo.py OUT --hours 2 --width 256 --heads 8 --kv-heads 4 --feed-forward 704 --context 1024 \
        --batch 8

Text: the installed Python's standard library (sources, and docstrings as prose), /usr/share/doc, and any --text PATH.
Mixed in are rows with facts hidden among real text and asked for at the end, and rows that repeat a span. Each step's
batch depends on the seed and the step alone, so an interrupted run goes on where its last checkpoint was. Prints
held-out perplexity and recall accuracy, and writes a Hugging Face directory. Needs `pip install "memwall[torch]"`.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import json
import math
import os
import random
import sysconfig
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>"]
BOS, EOS, PAD = 0, 1, 2
# words, at most two digits together (so that numbers are copied piece by piece), punctuation, line ends, spaces
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# fmt: off
NAMES = [
    "Alice", "Bruno", "Clara", "David", "Elena", "Felix", "Grace", "Hugo", "Irene", "Jonas", "Karen", "Louis", "Maria",
    "Nora", "Oscar", "Paula", "Robert", "Sarah", "Thomas", "Victor", "red", "blue", "green", "yellow", "violet",
    "orange", "silver", "golden", "scarlet", "indigo", "falcon", "badger", "otter", "heron", "lynx", "salmon", "beetle",
    "raven", "tiger", "walrus", "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "theta", "kappa", "lambda",
    "sigma", "omega",
]
# fmt: on
DOCUMENT_SUFFIXES = {".txt", ".md", ".rst", ".gz", ""}
MOST_BYTES_PER_FILE = 400_000
SHORTEST_RECALL = 128
"""Tokens below which four facts and a question do not fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that decides the result. Sizes are counts; `hours` bounds the wall-clock time, 0 for no bound."""

    out: Path
    text: tuple[Path, ...]
    vocabulary: int = 4096
    width: int = 384
    layers: int = 8
    heads: int = 6
    kv_heads: int = 3
    feed_forward: int = 1024
    context: int = 2048
    batch: int = 32
    steps: int = 20_000
    hours: float = 0.0
    learning_rate: float = 1.5e-3
    warmup: int = 200
    task_share: float = 0.25
    seed: int = 0
    files: int = 0
    checkpoint_every: int = 500
    tries: int = 24


# -------------------- text


def candidate_files(settings: Settings) -> Iterator[Path]:
    standard_library = Path(sysconfig.get_paths()["stdlib"])
    yield from sorted(path for path in standard_library.rglob("*.py") if "site-packages" not in path.parts)
    for root in (Path("/usr/share/doc"), *settings.text):
        if root.is_file():
            yield root
        elif root.is_dir():
            yield from sorted(path for path in root.rglob("*") if path.suffix in DOCUMENT_SUFFIXES and path.is_file())


def read_text(path: Path) -> str | None:
    """The file's text, or None when it is too long, no UTF-8, or hardly any text at all."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode()
    except (OSError, UnicodeDecodeError, EOFError):
        return None
    return text if 500 < len(data) < MOST_BYTES_PER_FILE and "\0" not in text else None


def docstrings(source: str) -> str:
    """The prose inside a Python file."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return "\n\n".join(text for node in ast.walk(tree) if isinstance(node, kinds) and (text := ast.get_docstring(node)))


def gather(settings: Settings) -> tuple[list[str], list[str]]:
    """(training documents, held-out documents); a document is held out by its digest, so that the split never moves."""
    train: list[str] = []
    held_out: list[str] = []
    seen: set[bytes] = set()
    for number, path in enumerate(candidate_files(settings)):
        if settings.files and number >= settings.files:
            break
        text = read_text(path)
        if text is None:
            continue
        for document in (text, docstrings(text) if path.suffix == ".py" else ""):
            digest = hashlib.sha256(document.encode()).digest()
            if len(document) > 500 and digest not in seen:
                seen.add(digest)
                (held_out if digest[0] < 8 else train).append(document)
    return train, held_out or train[-1:]


def train_tokenizer(documents: list[str], vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode_all(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """All documents in one stream of tokens, each between its marks."""
    encodings = tokenizer.encode_batch(documents)
    return np.concatenate([np.array([BOS, *encoding.ids, EOS], dtype=np.int32) for encoding in encodings])


# -------------------- tasks


class Rows:
    """Makes training rows: windows of real text, and the two tasks written into it."""

    def __init__(self, tokenizer: Tokenizer, stream: np.ndarray, settings: Settings) -> None:
        self.tokenizer = tokenizer
        self.stream = stream
        self.settings = settings

    def batch(self, step: int) -> np.ndarray:
        """[batch, context + 1] tokens; the same for the same seed and step."""
        chance = random.Random(f"{self.settings.seed}/{step}")
        length = self.settings.context + 1
        return np.stack([self._row(chance, length) for _ in range(self.settings.batch)])

    def _row(self, chance: random.Random, length: int) -> np.ndarray:
        draw = chance.random()
        if draw < 0.7 * self.settings.task_share:
            return self._fill(chance, self.facts(chance, chance.randint(length // 8, length), questions=4)[1], length)
        if draw < self.settings.task_share:
            return self._fill(chance, self._copies(chance, length), length)
        return self._window(chance, length)

    def _window(self, chance: random.Random, length: int) -> np.ndarray:
        start = chance.randrange(max(len(self.stream) - length, 1))
        return np.resize(self.stream[start : start + length], length)

    def _fill(self, chance: random.Random, tokens: list[int], length: int) -> np.ndarray:
        rest = self._window(chance, max(length - len(tokens), 1))
        return np.concatenate([np.array(tokens, dtype=np.int32), rest])[:length]

    def facts(self, chance: random.Random, length: int, *, questions: int) -> tuple[str, list[int]]:
        """(the last answer, tokens): facts at random places of real text, then questions with their answers.

        A single question is left unanswered: that is the prompt of the recall test.
        """
        names = chance.sample(NAMES, 4)
        numbers = [chance.randint(1000, 99_999) for _ in names]
        stated = [self._ids(f"\nThe secret number of {name} is {number}.\n") for name, number in zip(names, numbers)]
        asked = [chance.randrange(len(names)) for _ in range(questions)]
        ask = "\nWhat is the secret number of {0}? The secret number of {0} is"
        tail: list[int] = []
        for which in asked:
            answer = f" {numbers[which]}." if questions > 1 else ""
            tail += self._ids(ask.format(names[which]) + answer)
        free = max(length - 1 - len(tail) - sum(map(len, stated)), len(stated) + 1)
        real = self._window(chance, free).tolist()
        cuts = sorted(chance.sample(range(free), len(stated)))
        tokens = [BOS, *real[: cuts[0]]]
        for fact, begin, end in zip(stated, cuts, [*cuts[1:], free]):
            tokens += [*fact, *real[begin:end]]
        return str(numbers[asked[-1]]), tokens + tail

    def _copies(self, chance: random.Random, length: int) -> list[int]:
        span = chance.randint(8, max(length // 4, 9))
        source = self._window(chance, span).tolist()
        between = self._window(chance, chance.randint(1, max(length // 4, 2))).tolist()
        return [BOS, *self._ids("\nCopy:\n"), *source, *between, *self._ids("\nCopy:\n"), *source]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids


# -------------------- training


def build(settings: Settings) -> LlamaForCausalLM:
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.width,
        intermediate_size=settings.feed_forward,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.width // settings.heads,
        max_position_embeddings=settings.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def make_optimizer(model: LlamaForCausalLM, settings: Settings, device: torch.device) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=device.type == "cuda")


def learning_rate(step: int, settings: Settings, done_share: float) -> float:
    """Linear warm-up, then a cosine down to a tenth. done_share is of steps, or of time when hours are given."""
    warm = min((step + 1) / max(settings.warmup, 1), 1.0)
    return settings.learning_rate * warm * (0.55 + 0.45 * math.cos(math.pi * min(done_share, 1.0)))


def half_precision(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


def save_checkpoint(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, step: int, spent: float) -> None:
    """Parameters and both moments in one safetensors file: nothing is pickled. Renamed into place when whole."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for number, parameter in enumerate(model.parameters()):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{number}.{key}"] = value
    unfinished = path.with_suffix(".tmp")
    save_file(
        {name: value.cpu().contiguous() for name, value in tensors.items()},
        unfinished,
        metadata={"step": str(step), "seconds": str(spent)},
    )
    os.replace(unfinished, path)


def load_checkpoint(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW) -> tuple[int, float]:
    """Put a checkpoint back; (steps done, seconds spent)."""
    from safetensors import safe_open

    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    for number, parameter in enumerate(model.parameters()):
        prefix = f"optimizer.{number}."
        state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        # the count of steps stays where the optimizer expects it, the moments go with their parameter
        fused = bool(optimizer.defaults["fused"])
        optimizer.state[parameter] = {
            key: value.to(parameter.device) if key != "step" or fused else value for key, value in state.items()
        }
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return int(metadata["step"]), float(metadata["seconds"])


def train(settings: Settings, rows: Rows, device: torch.device) -> LlamaForCausalLM:
    model = build(settings).to(device).train()
    optimizer = make_optimizer(model, settings, device)
    checkpoint = settings.out / "checkpoint.safetensors"
    step, spent = load_checkpoint(checkpoint, model, optimizer) if checkpoint.exists() else (0, 0.0)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}, starting at step {step}")
    began = time.monotonic() - spent
    while step < settings.steps:
        spent = time.monotonic() - began
        done_share = max(step / settings.steps, spent / (3600 * settings.hours) if settings.hours else 0.0)
        if done_share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings, done_share)
        batch = torch.from_numpy(rows.batch(step)).long().to(device)
        with half_precision(device):
            logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0 or step == 1:
            print(f"step {step:6d}  loss {loss.item():.3f}  {spent / 60:.1f} min", flush=True)
        if step % settings.checkpoint_every == 0:
            save_checkpoint(checkpoint, model, optimizer, step, time.monotonic() - began)
    save_checkpoint(checkpoint, model, optimizer, step, time.monotonic() - began)
    return model.eval()


# -------------------- figures


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, stream: np.ndarray, settings: Settings, device: torch.device) -> float:
    """Per token over held-out text, in windows of the whole context."""
    losses = []
    for start in range(0, max(min(len(stream) - 2, 100 * settings.context), 1), settings.context):
        window = torch.from_numpy(stream[start : start + settings.context + 1]).long().to(device)[None]
        logits = model(window[:, :-1]).logits.float()
        losses.append(torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="none"))
    return math.exp(torch.cat(losses).mean().item())


@torch.no_grad()
def recall(model: LlamaForCausalLM, rows: Rows, length: int, settings: Settings, device: torch.device) -> float:
    """Share of questions answered right, greedily, with the facts in `length` tokens of context."""
    right = 0
    for number in range(settings.tries):
        answer, tokens = rows.facts(random.Random(f"recall/{length}/{number}"), length, questions=1)
        prompt = torch.tensor([tokens], device=device)
        made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
        right += rows.tokenizer.decode(made[0, prompt.shape[1] :].tolist()).strip().startswith(f"{answer}.")
    return right / settings.tries


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    model.to(torch.float16).save_pretrained(out)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[BOS], eos_token=SPECIAL[EOS], pad_token=SPECIAL[PAD]
    )
    wrapped.save_pretrained(out)


def parse_arguments() -> Settings:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory to write; a checkpoint in it is resumed")
    parser.add_argument("--text", type=Path, action="append", default=[], help="more text: a file or folder")
    parser.add_argument("--smoke", action="store_true", help="seconds on a CPU, to see that every step works")
    for name in Settings.__dataclass_fields__.values():
        if name.name not in ("out", "text"):
            kind = float if isinstance(name.default, float) else int
            parser.add_argument(f"--{name.name.replace('_', '-')}", type=kind, default=None)
    given = vars(parser.parse_args())
    small = {
        "vocabulary": 512, "width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "feed_forward": 128, "context": 256,
        "batch": 4, "steps": 30, "warmup": 5, "files": 30, "checkpoint_every": 10, "tries": 2,
    }  # fmt: skip
    chosen = small if given.pop("smoke") else {}
    chosen |= {name: value for name, value in given.items() if value is not None}
    return Settings(**{**chosen, "text": tuple(given["text"])})


def main() -> None:
    settings = parse_arguments()
    settings.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_documents, held_out_documents = gather(settings)
    tokenizer_file = settings.out / "tokenizer.json"
    if tokenizer_file.exists():
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    else:
        tokenizer = train_tokenizer(train_documents, settings.vocabulary)
        tokenizer.save(str(tokenizer_file))
    stream, held_out = encode_all(tokenizer, train_documents), encode_all(tokenizer, held_out_documents)
    print(f"{len(train_documents)} documents, {len(stream):,} tokens; held out {len(held_out):,}")
    model = train(settings, Rows(tokenizer, stream, settings), device)
    test_rows = Rows(tokenizer, held_out, settings)
    figures: dict[str, Any] = {"held_out_perplexity": perplexity(model, held_out, settings, device), "recall": {}}
    for length in sorted({settings.context // share for share in (16, 8, 4, 2)} | {settings.context * 7 // 8}):
        if length >= SHORTEST_RECALL:
            figures["recall"][str(length)] = recall(model, test_rows, length, settings, device)
    save(model, tokenizer, settings.out)
    (settings.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
