"""A small text encoder from nothing, for studies of retrieval: hashed words in, a vector of length 1 out.

Words and pairs of neighbours are hashed into a table of vectors, weighted (at first by how rare they are) and summed;
the sum, and what two layers make of it, go to one linear head for each dimension that is asked for. It is trained so
that a query is nearer to its own passage than to the others of its batch (cross entropy of cosines over a temperature,
both ways), in minutes on two cores. No figure of such a model says how good embeddings are; what rounding and reducing
them costs, it says as well as a large one.

Units and shapes: texts in, float32 [n, d] of length 1 out. Needs torch.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

Progress = Callable[[int, int, str], None]
_WORD = re.compile(r"[a-z]+|[0-9]|[^\sa-z0-9]")
CHECKED_EVERY = 20
"""Steps between looks at held-out pairs, a batch of them where there are ten batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSettings:
    """dimensions: of the heads. buckets, width: of the table; hidden: of the layers. words: of a text that are read."""

    dimensions: tuple[int, ...] = (384, 768)
    buckets: int = 1 << 15
    width: int = 512
    hidden: int = 1024
    steps: int = 300
    batch: int = 256
    words: int = 128
    rate: float = 1e-3
    table_rate: float = 2e-2
    temperature: float = 0.05
    seed: int = 0


class Encoder(nn.Module):
    """Sum of a text's vectors -> layers -> heads."""

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        self.settings = settings
        self.table = nn.EmbeddingBag(settings.buckets, settings.width, mode="sum", sparse=True)
        self.importance = nn.Embedding(settings.buckets, 1, sparse=True)
        self.layers = nn.Sequential(
            nn.Linear(settings.width, settings.hidden), nn.GELU(),
            nn.Linear(settings.hidden, settings.hidden), nn.GELU(),
        )  # fmt: skip
        self.norm = nn.LayerNorm(settings.width)
        size = settings.width + settings.hidden
        self.heads = nn.ModuleList(nn.Linear(size, dimensions, bias=False) for dimensions in settings.dimensions)
        nn.init.zeros_(self.importance.weight)

    def forward(self, ids: Tensor, starts: Tensor) -> list[Tensor]:
        """ids: of all texts one after another; starts: where each begins. Vectors [n, d] of length 1, by head."""
        weights = self.importance(ids).squeeze(1).exp()
        held = self.norm(self.table(ids, starts, per_sample_weights=weights))
        held = torch.cat([held, self.layers(held)], dim=1)
        return [functional.normalize(head(held), dim=1) for head in self.heads]


def features(text: str, settings: EncoderSettings) -> np.ndarray:
    """Buckets of a text's words and pairs, int64."""
    words = _WORD.findall(text.lower())[: settings.words] or [""]
    both = words + [f"{a} {b}" for a, b in itertools.pairwise(words)]
    return np.array([zlib.crc32(word.encode()) % settings.buckets for word in both], np.int64)


def _batch(texts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    starts = np.cumsum([0, *(len(one) for one in texts[:-1])])
    return torch.from_numpy(np.concatenate(texts)), torch.from_numpy(starts)


def train(
    pairs: Sequence[tuple[str, str]], settings: EncoderSettings, kept: Path, progress: Progress | None = None
) -> None:
    """Learns from (query, passage) pairs and writes a safetensors file: the weights of the step that did best on pairs
    that were held out, as the others are soon known by heart.
    """
    torch.manual_seed(settings.seed)
    draw = np.random.default_rng(settings.seed)
    both = [(features(query, settings), features(passage, settings)) for query, passage in pairs]
    order = draw.permutation(len(both))
    cut = settings.batch if len(both) >= 10 * settings.batch else 0
    held, learned = ([both[at] for at in part] for part in (order[:cut], order[cut:]))
    encoder = Encoder(settings)
    seen = np.bincount(np.concatenate([np.unique(passage) for _, passage in learned]), minlength=settings.buckets)
    rarity = np.log((1 + len(learned)) / (1 + seen)) + 0.1
    encoder.importance.weight.data = torch.log(torch.from_numpy(rarity.astype(np.float32)))[:, None]
    tables = [encoder.table.weight, encoder.importance.weight]
    rest = [one for part in (encoder.layers, encoder.norm, encoder.heads) for one in part.parameters()]
    optimizers = [torch.optim.SparseAdam(tables, lr=settings.table_rate), torch.optim.AdamW(rest, lr=settings.rate)]
    least, best = float("inf"), {}
    for step in range(settings.steps):
        for optimizer, rate in zip(optimizers, (settings.table_rate, settings.rate), strict=True):
            optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 50) * (1 - step / settings.steps)
            optimizer.zero_grad()
        chosen = draw.choice(len(learned), settings.batch, replace=len(learned) < settings.batch)
        loss = _loss(encoder, [learned[at] for at in chosen])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        if held and ((step + 1) % CHECKED_EVERY == 0 or step + 1 == settings.steps):
            with torch.no_grad():
                found = float(_loss(encoder, held))
            if found < least:
                least, best = found, {name: value.clone() for name, value in encoder.state_dict().items()}
        if progress is not None:
            progress(step + 1, settings.steps, f"encoder, loss {float(loss.detach()):.2f}, held out {least:.2f}")
    save_file({name: value.contiguous() for name, value in (best or encoder.state_dict()).items()}, kept)


def _loss(encoder: Encoder, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Tensor:
    """Cross entropy of each query's own passage among all, and of each passage's query, in nats; a mean over heads."""
    targets, whole = torch.arange(len(pairs)), torch.zeros(())
    queries, passages = (encoder(*_batch([pair[side] for pair in pairs])) for side in (0, 1))
    for asked, told in zip(queries, passages, strict=True):
        near = asked @ told.T / encoder.settings.temperature
        whole = whole + functional.cross_entropy(near, targets) + functional.cross_entropy(near.T, targets)
    return whole / (2 * len(queries))


def embed(texts: Sequence[str], settings: EncoderSettings, kept: Path) -> list[np.ndarray]:
    """Vectors of texts by the weights of a file: one array [n, d] for each head."""
    encoder = Encoder(settings)
    encoder.load_state_dict(load_file(kept))
    parts = []
    with torch.inference_mode():
        for start in range(0, len(texts), 2048):
            batch = _batch([features(text, settings) for text in texts[start : start + 2048]])
            parts.append([one.numpy() for one in encoder(*batch)])
    return [np.concatenate(one) for one in zip(*parts, strict=True)]
