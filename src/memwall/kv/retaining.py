"""Trains Locret's retaining heads on a frozen model, layer by layer: only W1 and W2 ever change.

The model's layers run in turn over all training rows, through the file's map, so that memory holds the rows' hidden
states and one layer's queries, keys and values. A row is a prompt and its answer: facts hidden in real text, all of
them asked for at the end, or real text that goes on. The label of a prompt token is the largest scaled logit, before
the softmax, that any query of the answer gives its key; the loss is SmoothL1 and a small penalty on jumps between
neighbours. Since nothing but the heads learns, those of one layer never see those of another, and each layer is trained
by itself: the published loss is a mean over layers, its penalty a sum, so that one layer's penalty weighs as often more
as there are layers.

Source: Locret, arXiv 2410.01805, section 3.2 and the official code's training script. Scaled down from there: rows of
512 tokens instead of up to 10,240, a few hundred steps instead of 3,000 and a larger rate, a fifth of them warm-up, so
that a small model takes a minute or two on a CPU. torch is imported inside; it only ever sees the heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memwall import kernels
from memwall.compress.calibration import BUNDLED_TEXT, LayerStream, PromptCache
from memwall.errors import InputError
from memwall.memory import Arena, Ledger
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import ModelConfig
from memwall.models.rope import rope_tables
from memwall.models.tokenizer import Tokenizer

NAMES = [
    "Alice",
    "Bruno",
    "Clara",
    "David",
    "Elena",
    "Felix",
    "Grace",
    "Hugo",
    "Irene",
    "Jonas",
    "Karen",
    "Louis",
    "Maria",
    "Nora",
    "Oscar",
    "Paula",
    "Robert",
    "Sarah",
    "Thomas",
    "Victor",
    "red",
    "blue",
    "green",
    "yellow",
    "violet",
    "orange",
    "silver",
    "golden",
    "indigo",
    "falcon",
    "badger",
    "otter",
    "heron",
    "lynx",
    "salmon",
    "raven",
    "tiger",
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "theta",
    "kappa",
    "lambda",
    "sigma",
    "omega",
]
FACTS = 4
MANY_WEIGHTS = 1 << 20
"""Of W1, from which on training takes all threads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """rows of row_tokens each, read `epochs` times, one a step. width: of the heads; None: half their input, to
    1024. smoothness: weight of the penalty, summed over layers.
    """

    width: int | None = None
    rows: int = 96
    row_tokens: int = 512
    epochs: int = 4
    learning_rate: float = 2e-3  # paper: 5e-4, over ten times as many steps
    warmup_share: float = 0.2
    smoothness: float = 0.0025  # paper: section 3.2
    continued_share: float = 0.25
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Rows:
    """Training rows: tokens [rows, T]; asks [rows, T], true where a query makes a token of the answer; and how many
    tokens of each row are its prompt.
    """

    tokens: np.ndarray
    asks: np.ndarray
    prompts: np.ndarray


def make_rows(tokenizer: Tokenizer, text: str, settings: TrainSettings, row_tokens: int) -> Rows:
    """Rows of prompt and answer out of a text."""
    ids = np.array(tokenizer.encode(text, add_bos=False), np.int64)
    if len(ids) < row_tokens:
        raise InputError(f"the text to fit on has {len(ids):,} tokens; at least {row_tokens:,} are needed")
    rng = np.random.default_rng(settings.seed)
    tokens = np.zeros((settings.rows, row_tokens), np.int64)
    asks = np.zeros((settings.rows, row_tokens), bool)
    prompts = np.zeros(settings.rows, np.int64)
    for row in range(settings.rows):
        if rng.random() < settings.continued_share:
            begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
            start = rng.integers(len(ids) - row_tokens + 1)
            tokens[row] = [*begin, *ids[start : start + row_tokens - len(begin)]]
            prompts[row] = row_tokens * 7 // 8
            asks[row, prompts[row] - 1 : -1] = True
        else:
            prompts[row] = _recall_row(tokenizer, ids, rng, tokens[row], asks[row])
    return Rows(tokens, asks, prompts)


def _recall_row(
    tokenizer: Tokenizer, ids: np.ndarray, rng: np.random.Generator, tokens: np.ndarray, asks: np.ndarray
) -> int:
    """Fills one row; gives the length of its prompt, which ends with the first question."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_bos=False)

    names = rng.choice(NAMES, FACTS, replace=False)
    numbers = rng.integers(1000, 100_000, FACTS)
    facts = [encode(f"\nThe secret number of {name} is {number}.\n") for name, number in zip(names, numbers)]
    end: list[int] = []
    spans = []
    for which in rng.permutation(FACTS):
        end += encode(f"\nWhat is the secret number of {names[which]}? The secret number of {names[which]} is")
        answer = encode(f" {numbers[which]}.")
        spans.append((len(end), len(end) + len(answer)))
        end += answer
    opening = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    free = len(tokens) - len(opening) - len(end) - sum(map(len, facts))
    if free < FACTS:
        raise InputError(f"rows of {len(tokens)} tokens are too short to fit on; the model's context must hold more")
    start = int(rng.integers(len(ids) - free + 1))
    parts = np.split(ids[start : start + free], np.sort(rng.integers(0, free + 1, FACTS)))
    row = [*opening, *parts[0]]
    for fact, part in zip(facts, parts[1:]):
        row += [*fact, *part]
    first = len(row)
    tokens[:] = row + end
    for begin, stop in spans:
        asks[first + begin - 1 : first + stop - 1] = True
    return first + spans[0][0]


class Lessons(PromptCache):
    """One layer's inputs and labels of all rows: what the heads of that layer learn from."""

    def __init__(self, config: ModelConfig, rows: Rows) -> None:
        super().__init__(config)
        num_rows, length = rows.tokens.shape
        width = config.query_size + 2 * config.kv_size
        self.rows, self.row = rows, 0
        self.inputs = np.zeros((num_rows, length, width), np.float16)
        self.labels = np.zeros((num_rows, length, config.num_kv_heads), np.float32)
        self._q = np.empty((length, config.num_heads, config.head_dim), np.float32)

    def restart(self) -> None:
        """From the first row again, of another layer."""
        self.row = 0

    def attend(self, layer: int, q: np.ndarray, positions: np.ndarray, out: np.ndarray) -> np.ndarray:
        self._q[positions] = q
        return super().attend(layer, q, positions, out)

    def settle(self, layer: int) -> None:
        config, prompt = self._config, int(self.rows.prompts[self.row])
        asking = self._q[self.rows.asks[self.row]]
        self.labels[self.row, :prompt] = largest_logits(asking, self._k[:prompt], config.head_dim**-0.5)
        self.inputs[self.row] = head_inputs(config, self._q, self._k, self._v)
        self.row += 1


def largest_logits(asking: np.ndarray, keys: np.ndarray, scale: float) -> np.ndarray:
    """The label: of each key k [P, Hkv, D] the largest scaled logit over queries [A, H, D] and their group's heads."""
    groups = asking.reshape(len(asking), keys.shape[1], -1, keys.shape[2])
    labels = [
        scale * (groups[:, j].reshape(-1, keys.shape[2]) @ keys[:, j].T).max(axis=0) for j in range(keys.shape[1])
    ]
    return np.stack(labels, axis=1)


def head_inputs(config: ModelConfig, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """[q; k; v] before rotation [T, (H + 2 Hkv) D] of rotated q, k at positions 0 .. T - 1."""
    cos, sin = rope_tables(config.rope, config.head_dim, np.arange(len(q)))
    square = np.float32(config.rope.attention_factor**2)
    both = np.concatenate([q, k], axis=1)
    kernels.rope(both, cos / square, -sin / square)
    return np.concatenate([both.reshape(len(q), -1), v.reshape(len(q), -1)], axis=1)


def train(
    directory: Path,
    settings: TrainSettings,
    text: str | None,
    threads: int | None,
    progress: Callable[[str, int, int], None] | None,
) -> dict[str, np.ndarray]:
    """Both matrices of every layer in half precision, as `RetainingHeads` reads them."""
    config = ModelConfig.from_directory(directory)
    tokenizer = Tokenizer.from_directory(directory)
    rows = make_rows(
        tokenizer,
        BUNDLED_TEXT.read_text(encoding="utf-8") if text is None else text,
        settings,
        min(settings.row_tokens, config.max_position),
    )
    width = settings.width or max(min(1024, (config.query_size + 2 * config.kv_size) // 2), 1)
    arrays = {}
    with Checkpoint(directory, config) as checkpoint:
        stream = LayerStream(config, checkpoint, rows.tokens, Arena(1 << 62, Ledger()))
        stream.embed()
        lessons = Lessons(config, rows)
        for layer in range(config.num_layers):
            if progress is not None:
                progress("retaining heads, layer", layer, config.num_layers)
            lessons.restart()
            stream.run_layer(layer, stream.hidden, cache=lessons)
            heads = train_heads(
                lessons.inputs, lessons.labels, rows.prompts, width, settings, threads, num_layers=config.num_layers
            )
            arrays[f"{layer}.w1"], arrays[f"{layer}.w2"] = heads
    if progress is not None:
        progress("retaining heads, layer", config.num_layers, config.num_layers)
    return arrays


def train_heads(
    inputs: np.ndarray,
    labels: np.ndarray,
    prompts: np.ndarray,
    width: int,
    settings: TrainSettings,
    threads: int | None = None,
    *,
    num_layers: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """W1 [width, in] and W2 [Hkv, width] of one layer, float16, from inputs [rows, T, in] and labels [rows, T, Hkv].

    num_layers: of the whole model.
    """
    import torch
    from torch.nn.functional import silu, smooth_l1_loss

    before = torch.get_num_threads()
    # small steps gain nothing from more threads, and on a busy machine lose most of their time waiting for each other
    torch.set_num_threads(threads or (kernels.num_threads() if width * inputs.shape[2] >= MANY_WEIGHTS else 1))
    chance = torch.Generator().manual_seed(settings.seed)
    first, second = (
        (torch.randn(shape, generator=chance) * shape[1] ** -0.5).requires_grad_()
        for shape in ((width, inputs.shape[2]), (labels.shape[2], width))
    )
    optimizer = torch.optim.AdamW([first, second], lr=settings.learning_rate, betas=(0.9, 0.95))
    steps = settings.epochs * len(inputs)
    warm = max(int(settings.warmup_share * steps), 1)
    order = np.random.default_rng(settings.seed)
    rows = [int(row) for _ in range(settings.epochs) for row in order.permutation(len(inputs))]
    penalty = settings.smoothness * num_layers
    for step, row in enumerate(rows):
        share = (step + 1) / warm if step < warm else (steps - step) / max(steps - warm, 1)
        optimizer.param_groups[0]["lr"] = settings.learning_rate * share
        count = int(prompts[row])
        x = torch.from_numpy(inputs[row, :count]).float()
        scores = silu(x @ first.T) @ second.T
        loss = smooth_l1_loss(scores, torch.from_numpy(labels[row, :count]))
        loss = loss + penalty * (scores[1:] - scores[:-1]).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_value_([first, second], 0.5)
        optimizer.step()
    torch.set_num_threads(before)
    return first.detach().half().numpy(), second.detach().half().numpy()
