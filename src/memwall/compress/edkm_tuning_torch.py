"""Training of a model whose weights are a palette: soft clustering in every step, hard indices at the end. Needs torch.

Source: "eDKM" (Minsik Cho, 2023, arXiv 2309.00964), section 2; the layer is that of DKM (arXiv 2108.12659).

Idea: the student's matrices are `edkm_torch.clustered` of float32 weights that the optimizer moves, so assignments and
palettes follow the loss. The loss is the divergence of its predictions from the float model's over the calibration
text (distillation): a text this short would be learned by heart if its next tokens were the goal. Each palette starts
from that of the step before. What is judged, on sequences kept aside, is the model as it will be stored, with every
weight the nearest entry of its palette; the best state of all is kept, and the start where none is better.

Units and shapes: packed matrices [rows, cols] (`formats.vptq`, vectors of one) in, the same forms with other indices
and palettes out; norms as they were stored.
Differs from the paper: distillation in place of the labels of a task; tau is a share of each matrix' variance, and
falls to a tenth over the run, which closes the gap between soft and hard weights; embedding and head are fixed.
Cost: the model in float32 three times (float, trained, soft), two moments and a gradient a weight, and the activations
of a batch; beside them 2 bytes a weight for the clustering's way back, and the float model's last hidden states of all
text, tokens * hidden * 4 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from memwall.compress.base import Trained
from memwall.compress.edkm_blocks_torch import clustered_pieces
from memwall.compress.edkm_torch import Softness, clustered, nearest, split_duplicates
from memwall.formats import Packed, codec
from memwall.formats.vector_parts import Coded, checked_halves
from memwall.formats.vptq import VptqCodec, pack, unpack
from memwall.models.checkpoint import Checkpoint
from memwall.models.torch_decoder import TorchDecoder

KEPT_ASIDE, MOST_ASIDE = 8, 64
"""Every so many sequences one chooses among the states that the others lead to, up to so many sequences."""
WINDOW, LOOKS = 128, 8
"""Tokens of a sequence that is trained on; looks at the sequences kept aside over a run."""
HARDER = 0.1
"""What is left of tau at the end."""
_SPLIT_SHARE = 1e-3
"""Of the palette's range: centroids nearer than that are one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """steps of AdamW at `rate`, which falls to nothing along a cosine; batch: sequences of a step. tau: at first, as a
    share of a matrix' variance; rounds, epsilon (a share of its deviation): of the clustering. from_stored: weights
    begin as they are stored, and not as the float model has them.
    """

    steps: int
    rate: float = 1e-3
    batch: int = 8
    tau: float = 0.05
    rounds: int = 3
    epsilon: float = 1e-4
    seed: int = 0
    from_stored: bool = False


@dataclass(slots=True)
class Report:
    """Divergence in nats a token, on the sequences kept aside: `looks` of (step, soft, hard)."""

    looks: list[tuple[int, float, float]] = field(default_factory=list)
    best_step: int = 0


class Palettes(nn.Module):
    """A matrix as soft weights over one palette per group of columns, and per block of rows where it has blocks; its
    weights lie in the order of the places.
    """

    def __init__(self, packed: Packed, weight: np.ndarray, recipe: Recipe) -> None:
        super().__init__()
        self._packed, self._recipe = packed, recipe
        self.form, rows = VptqCodec.parse(packed.spec), packed.shape[0]
        part = self.form.parts(packed.shape[1])[1]
        self.members = [part.members(group) for group in range(part.groups)]
        self.blocks = [part.in_block(block, rows) for block in range(part.blocks(rows))]
        places = packed.buffers["order"].astype(np.int64) if self.form.ordered else np.arange(packed.shape[1])
        self._back = torch.from_numpy(np.argsort(places)) if self.form.ordered else None
        self.weight = nn.Parameter(torch.from_numpy(np.asarray(weight, np.float32)[:, places].copy()))
        palettes = torch.from_numpy(unpack(packed)[1].main[:, :, 0].astype(np.float32))
        self.palettes = palettes.sort(dim=1).values
        """[blocks * groups, k], block by block."""
        held = self.weight.detach()
        self.variances = torch.stack(
            [held[block, each].var(correction=0) for block in self.blocks for each in self.members]
        ).clamp(min=1e-30)
        self.hardness = 1.0

    def soft(self) -> Tensor:
        """Soft weights [rows, cols]; the palettes go on from here."""
        pieces = []
        for group, members in enumerate(self.members):
            books = slice(group, None, len(self.members))
            pieces.append(self._clustered(self.weight[:, members], self._apart(books), books))
        return self._in_order(torch.cat(pieces, dim=1))

    def _apart(self, books: slice) -> Tensor:
        """The palettes in order, without duplicates."""
        found = self.palettes[books].sort(dim=1).values
        gaps = _SPLIT_SHARE * (found[:, -1] - found[:, 0])
        for book in torch.nonzero((found.diff(dim=1) <= gaps[:, None]).any(1)).flatten().tolist():
            found[book] = split_duplicates(found[book], float(gaps[book]))
        return found

    def _clustered(self, weights: Tensor, start: Tensor, books: slice) -> Tensor:
        """A group of columns; its palettes (`books`) are brought up to date."""
        recipe, variances = self._recipe, self.variances[books]
        tau, epsilon = recipe.tau * self.hardness * variances, recipe.epsilon * variances.sqrt()
        if len(start) == 1:
            softness = Softness(tau=float(tau), rounds=recipe.rounds, epsilon=float(epsilon))
            piece, found = clustered(weights, start[0], softness, half=torch.bfloat16)
            self.palettes[books] = found.sort().values
            return piece
        # blocks of one size together; the last one may have fewer rows
        rows, made = self.blocks[0].stop, []
        whole = len(weights) // rows
        for part in (slice(0, whole), slice(whole, len(start))):
            if part.start == part.stop or not weights.shape[1]:
                continue
            piece = weights[part.start * rows : part.stop * rows]
            soft, found = clustered_pieces(
                piece.reshape(part.stop - part.start, -1), start[part], tau[part], epsilon[part], rounds=recipe.rounds,
                half=torch.bfloat16,
            )  # fmt: skip
            start[part] = found.sort(dim=1).values
            made.append(soft.view(piece.shape))
        self.palettes[books] = start
        return torch.cat(made) if made else weights

    def _in_order(self, values: Tensor) -> Tensor:
        """Columns as the layer has them."""
        return values if self._back is None else values[:, self._back]

    def _codes(self) -> list[Tensor]:
        """Of each group of columns, [rows, columns]."""
        found, stored = [], self.stored()
        for group, members in enumerate(self.members):
            halves = self.weight[:, members].bfloat16()
            pairs = zip(self.blocks, stored[group :: len(self.members)], strict=True)
            found.append(torch.cat([nearest(halves[block], palette) for block, palette in pairs]))
        return found

    def stored(self) -> Tensor:
        """The palettes as they are stored: rounded to float16 [blocks * groups, k]."""
        return self.palettes.half().float()

    def hard(self) -> Tensor:
        """What is stored, decoded [rows, cols]."""
        stored, pieces = self.stored(), []
        for group, codes in enumerate(self._codes()):
            pairs = zip(self.blocks, stored[group :: len(self.members)], strict=True)
            pieces.append(torch.cat([palette[codes[block]] for block, palette in pairs]))
        return self._in_order(torch.cat(pieces, dim=1))

    def packed(self) -> Packed:
        """The stored form."""
        main = checked_halves(self.palettes.numpy()[:, :, None], "a palette entry")
        codes = torch.cat(self._codes(), dim=1).numpy().astype(np.uint32)
        coded = Coded(codes=codes, main=main, residual=None)
        return pack(self.form, self._packed.shape, coded, order=self._packed.buffers.get("order"))


def tuned_palettes(
    checkpoint: Checkpoint, tokens: np.ndarray, made: Mapping[str, Packed], recipe: Recipe,
    progress: Trained | None = None, report: Report | None = None,
) -> dict[str, Packed]:  # fmt: skip
    """Those of `made` (all tensors as they are stored) that training changed; none where nothing was won.

    checkpoint: the float model. tokens [sequences, tokens]: the calibration text.
    """
    report = Report() if report is None else report
    student = _Student(checkpoint, made, recipe)
    length = min(WINDOW, tokens.shape[1])
    pieces = torch.from_numpy(tokens[:, : tokens.shape[1] // length * length].reshape(-1, length).astype(np.int64))
    aside = torch.arange(len(pieces)) % KEPT_ASIDE == KEPT_ASIDE - 1
    aside &= aside.cumsum(0) <= MOST_ASIDE
    read, judged = (pieces[~aside], pieces[aside]) if len(pieces) >= KEPT_ASIDE else (pieces, pieces)
    optimizer = torch.optim.AdamW(student.learning, lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.0)
    wanted, judged_wanted = student.teach(read), student.teach(judged)
    best = start = student.look(judged, judged_wanted, report, 0)
    kept = student.state()
    generator = torch.Generator().manual_seed(recipe.seed)
    order: list[int] = []
    for step in range(recipe.steps):
        if len(order) < recipe.batch:
            order += torch.randperm(len(read), generator=generator).tolist()
        chosen, order = order[: recipe.batch], order[recipe.batch :]
        done = step / recipe.steps
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * done))
        student.harden(HARDER**done)
        optimizer.zero_grad()
        student.loss(read[chosen], wanted[chosen], hard=False).backward()
        nn.utils.clip_grad_norm_(student.learning, 1.0)
        optimizer.step()
        if (step + 1) % max(1, recipe.steps // LOOKS) == 0 or step + 1 == recipe.steps:
            now = student.look(judged, judged_wanted, report, step + 1)
            if now < best:
                best, kept, report.best_step = now, student.state(), step + 1
        if progress is not None:
            progress(step + 1, recipe.steps)
    return student.packed(kept) if best < start else {}


class _Student:
    """The compressed model in training beside the float one."""

    def __init__(self, checkpoint: Checkpoint, made: Mapping[str, Packed], recipe: Recipe) -> None:
        self._made = made
        self._teacher = TorchDecoder.from_checkpoint(checkpoint)
        self.matrices: dict[str, Palettes] = {}
        self._norms: dict[str, nn.Parameter] = {}
        self._fixed: dict[str, Tensor] = {}
        for name, packed in made.items():
            if isinstance(codec(packed.spec), VptqCodec):
                start = codec(packed.spec).decode(packed) if recipe.from_stored else checkpoint.alone(name)
                self.matrices[name] = Palettes(packed, start, recipe)
                continue
            floats = torch.from_numpy(np.array(codec(packed.spec).decode(packed), np.float32))
            if len(packed.shape) == 1 and "norm" in name:
                self._norms[name] = nn.Parameter(floats)
            else:
                self._fixed[name] = floats
        self.learning = [*(each.weight for each in self.matrices.values()), *self._norms.values()]

    def harden(self, hardness: float) -> None:
        for matrix in self.matrices.values():
            matrix.hardness = hardness

    @torch.no_grad()
    def teach(self, sequences: Tensor) -> Tensor:
        """The float model's last hidden states [sequences, tokens, hidden]: it reads each text once, not every step."""
        return torch.cat([self._teacher.hidden(part) for part in sequences.split(8)])

    def loss(self, sequences: Tensor, hidden: Tensor, *, hard: bool) -> Tensor:
        """Divergence from the float model [nats a token], whose states over the sequences are `hidden`."""
        with torch.no_grad():
            wanted = self._teacher.logits(hidden).log_softmax(-1)
        weights = {name: each.hard() if hard else each.soft() for name, each in self.matrices.items()}
        logits: Any = torch.func.functional_call(self._teacher, weights | self._norms | self._fixed, (sequences,))
        return functional.kl_div(
            logits.log_softmax(-1).flatten(0, 1), wanted.flatten(0, 1), log_target=True, reduction="batchmean"
        )

    @torch.no_grad()
    def look(self, judged: Tensor, hidden: Tensor, report: Report, step: int) -> float:
        """The loss of the stored form; the palettes stay where they are."""
        held = [each.palettes.clone() for each in self.matrices.values()]
        losses = []
        for hard in (False, True):
            pairs = zip(judged.split(8), hidden.split(8), strict=True)
            parts = [float(self.loss(part, known, hard=hard)) * len(part) for part, known in pairs]
            losses.append(sum(parts) / len(judged))
            for matrix, palettes in zip(self.matrices.values(), held, strict=True):
                matrix.palettes = palettes.clone()
        report.looks.append((step, losses[0], losses[1]))
        return losses[1]

    def state(self) -> tuple[list[Tensor], list[Tensor]]:
        return (
            [each.detach().clone() for each in self.learning],
            [each.palettes.clone() for each in self.matrices.values()],
        )

    def packed(self, state: tuple[list[Tensor], list[Tensor]]) -> dict[str, Packed]:
        """The tensors that learned, in the state given, in the forms they were stored in."""
        for parameter, values in zip(self.learning, state[0], strict=True):
            parameter.data.copy_(values)
        for matrix, palettes in zip(self.matrices.values(), state[1], strict=True):
            matrix.palettes = palettes
        found = {name: matrix.packed() for name, matrix in self.matrices.items()}
        for name, norm in self._norms.items():
            found[name] = codec(self._made[name].spec).encode(norm.detach().numpy().copy())
        return found
