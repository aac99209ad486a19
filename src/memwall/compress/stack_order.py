"""One order of the blocks of all matrices, by what each is worth, measured (BitStack, arXiv 2410.23918, section 3.3).

Every matrix always has its first block. Level by level: with all matrices at b blocks, each in turn is given one more,
and the model's loss over some calibration text is measured; the level's blocks come in the order of falling worth, and
levels one after the other, so that any first part of the order leaves each matrix with a first part of its own blocks.

The model runs on the blocks as they are stored. Layers before the one that is changed are run once for all its
matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from memwall import kernels
from memwall.compress.calibration import LayerStream
from memwall.formats import Packed
from memwall.formats.bitstack import first_blocks

LOGIT_ROWS = 64
OWNER = "compress"

LayerForms = Callable[[int], Mapping[str, Packed]]
"""layer -> the matrices' whole stacks by name."""


class StackOrder:
    """Losses of a model with one matrix a block ahead of the others. stream: over the text, its hidden states are used
    up; head, embedding: matrices as they are kept.
    """

    def __init__(self, stream: LayerStream, forms: LayerForms, embedding: Packed, head: Packed) -> None:
        self._stream = stream
        self._forms = forms
        self._embedding = embedding
        self._head = kernels.matrix(head)
        self._held: dict[int, dict[str, Packed]] = {}

    def level(self, blocks: int) -> dict[str, float]:
        """Mean loss in nats with each matrix alone at one block more than `blocks`, all others at `blocks`."""
        stream, losses = self._stream, {}
        stream.embed(self._embedding)
        changed = stream.arena.allocate(OWNER, stream.hidden.shape, np.float32)
        try:
            for layer in range(stream.config.num_layers):
                held = self._at(layer, blocks)
                for name, packed in self._forms(layer).items():
                    np.copyto(changed, stream.hidden)
                    stream.run_layer(layer, changed, {**held, name: first_blocks(packed, blocks + 1)})
                    losses[name] = self._finish(changed, layer + 1, blocks)
                stream.run_layer(layer, stream.hidden, held)
        finally:
            stream.arena.free(changed)
            self._held.clear()
        return losses

    def _at(self, layer: int, blocks: int) -> dict[str, Packed]:
        """A layer's matrices at so many blocks, on maps that stay open for the level."""
        if layer not in self._held:
            whole = self._forms(layer)
            self._held[layer] = {name: first_blocks(packed, blocks) for name, packed in whole.items()}
        return self._held[layer]

    def _finish(self, hidden: np.ndarray, first_layer: int, blocks: int) -> float:
        for layer in range(first_layer, self._stream.config.num_layers):
            self._stream.run_layer(layer, hidden, self._at(layer, blocks))
        self._stream.norm(hidden)
        loss, count = 0.0, 0
        for states, tokens in zip(hidden, self._stream.tokens, strict=True):
            for rows, targets in _rows(states[:-1], tokens[1:]):
                logits = np.empty((len(rows), self._head.rows), np.float32)
                kernels.linear(rows, [self._head], [logits])
                logits -= logits.max(axis=1, keepdims=True)
                true = logits[np.arange(len(targets)), targets]
                loss += float((np.log(np.exp(logits).sum(axis=1)) - true).sum(dtype=np.float64))
                count += len(targets)
        return loss / count


def _rows(states: np.ndarray, targets: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(states), LOGIT_ROWS):
        yield np.ascontiguousarray(states[start : start + LOGIT_ROWS]), targets[start : start + LOGIT_ROWS]


def without_nan(levels: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Losses that came out as NaN, of models with too few blocks to run, take the next level's and its largest."""
    fixed: list[dict[str, float]] = []
    for level in reversed(levels):
        above = fixed[-1] if fixed else {}
        finite = [loss for loss in (above or level).values() if np.isfinite(loss)]
        most = max(finite, default=0.0)
        fixed.append({n: loss if np.isfinite(loss) else above.get(n, most) + most for n, loss in level.items()})
    return fixed[::-1]


def in_order(levels: Sequence[Mapping[str, float]]) -> list[str]:
    """Names in the order in which their next blocks come: levels in turn, in a level the least loss first."""
    ordered: list[str] = []
    for level in without_nan(levels):
        ordered += sorted(level, key=lambda name: level[name])
    return ordered


def fitting(order: Sequence[str], sizes: Mapping[str, int], room_bytes: int) -> list[str]:
    """The longest first part of an order whose blocks fit, and of what follows all that still does.

    A matrix that had to leave a block out takes no later one: each has a first part of its own blocks.
    """
    taken: list[str] = []
    full: set[str] = set()
    for name in order:
        if name not in full and sizes[name] <= room_bytes:
            taken.append(name)
            room_bytes -= sizes[name]
        else:
            full.add(name)
    return taken
