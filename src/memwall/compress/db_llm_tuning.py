"""Deviation-aware distillation: the scales of dual binary matrices learn the float model's predictions. Needs torch.

Source: "DB-LLM: Accurate Dual-Binarization for Efficient LLMs" (Hong Chen, 2024, arXiv 2402.11960), section 3.3.

Idea: the float model writes text of its own, begun with random tokens, and the compressed one learns to predict it as
the float one does. A token's loss is H^gamma times the cross entropy of both predictions, H the entropy of the float
model's: where that is unsure, a two-bit model is wrong most, so such tokens count more.

Units and shapes: packed matrices [rows, cols] in, the same with other scales out; nothing else of them changes.
Differs from the paper: only scales are trained, as their logarithms (no scale changes its sign), with Adam and a rate
that falls to zero; gamma and schedule are not published.
Cost: both models in float32 in memory, and dense weights of one layer at a time on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memwall.errors import InputError, MissingDependency
from memwall.formats import Packed, codec
from memwall.formats.db_llm import DualBinaryCodec

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int], None]
"""progress(done, total) in steps."""

LENGTH, BATCH = 128, 8
"""Tokens of a text, and texts of a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """tokens: of the texts that the float model writes; passes over them; rate: of the scales' logarithms at first."""

    tokens: int
    passes: int
    rate: float
    gamma: float


def tune(source: Path, made: Mapping[str, Packed], recipe: Recipe, progress: Progress) -> dict[str, Packed]:
    """The dual binary matrices of `made` with trained scales. source: the float model's folder.

    made: all of the compressed model. InputError where transformers does not know the model.
    """
    try:
        import torch
        import transformers
    except ImportError:
        raise MissingDependency("torch with transformers", "torch") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    try:
        teacher = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        student = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{source}: transformers cannot load it to train against: {error}") from None
    for parameter in (*teacher.parameters(), *student.parameters()):
        parameter.requires_grad_(False)
    duals = _put_in(student, made)
    if not duals:
        raise InputError("training moves the scales of dual2 matrices, and the model has none: give --bits 2")
    texts = _written(teacher, recipe.tokens)
    _train(teacher, student, duals, texts, recipe, progress)
    return {name: _with_scales(made[name], dual) for name, dual in duals.items()}


def _put_in(student: Any, made: Mapping[str, Packed]) -> dict[str, Any]:
    """Every matrix of the compressed model in the student's place; gives the dual ones."""
    import torch

    duals = {}
    held = dict(student.named_parameters())
    for name, packed in made.items():
        form = codec(packed.spec)
        if isinstance(form, DualBinaryCodec):
            parent, _, last = name.removesuffix(".weight").rpartition(".")
            owner = student.get_submodule(parent)
            duals[name] = _dual(form, packed, getattr(owner, last).bias)
            setattr(owner, last, duals[name])
        elif name in held:
            held[name].data.copy_(torch.from_numpy(np.array(form.decode(packed), np.float32)))
    return duals


def _dual(form: DualBinaryCodec, packed: Packed, bias: Any) -> Any:
    """A linear layer whose weight is made of bits and trained scales when it is asked for."""
    import torch

    class Dual(torch.nn.Module):
        codes: torch.Tensor
        start: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            codes, scales = form.unpack(packed)
            self.register_buffer("codes", torch.from_numpy(np.ascontiguousarray(codes)))
            self.register_buffer("start", torch.from_numpy(np.stack(scales).astype(np.float32)))
            self.logarithm = torch.nn.Parameter(torch.zeros_like(self.start))
            self.bias = bias

        def scales(self) -> torch.Tensor:
            return self.start * self.logarithm.exp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            # spread by a view, whose gradient is a sum; by indices it would be a scatter, a hundred times as long
            spread = self.scales()[..., None].expand(-1, -1, -1, form.group).flatten(2)
            first, second = spread[..., : self.codes.shape[1]]
            weight = first * (self.codes & 1) + second * (self.codes >> 1)
            return torch.nn.functional.linear(x, weight, self.bias)

    return Dual()


def _written(teacher: Any, tokens: int) -> torch.Tensor:
    """Texts [n, LENGTH] of the float model, each begun with a random token, a batch at a time."""
    import torch

    count = max(1, -(-tokens // (LENGTH * BATCH))) * BATCH
    length = min(LENGTH, teacher.config.max_position_embeddings)
    made = []
    for _ in range(count // BATCH):
        begun = torch.randint(teacher.config.vocab_size, (BATCH, 1))
        drawn = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
        whole = {"min_new_tokens": length - 1, "max_new_tokens": length - 1, "pad_token_id": 0}
        made.append(teacher.generate(begun, attention_mask=torch.ones_like(begun), **drawn, **whole))
    return torch.cat(made)


def loss_of(teacher_logits: torch.Tensor, student_logits: torch.Tensor, gamma: float) -> torch.Tensor:
    """Mean over tokens of H^gamma times the cross entropy; the weights average to one."""
    chances = teacher_logits.softmax(-1)
    entropy = -(chances * teacher_logits.log_softmax(-1)).sum(-1)
    weights = entropy.clamp_min(1e-6) ** gamma
    crossed = -(chances * student_logits.log_softmax(-1)).sum(-1)
    return (weights / weights.mean() * crossed).mean()


def _train(
    teacher: Any, student: Any, duals: Mapping[str, Any], texts: torch.Tensor, recipe: Recipe, progress: Progress
) -> None:
    import torch

    steps = recipe.passes * (len(texts) // BATCH)
    optimizer = torch.optim.Adam([dual.logarithm for dual in duals.values()], lr=recipe.rate)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(steps, 1))
    for step in range(steps):
        if step % (len(texts) // BATCH) == 0:
            texts = texts[torch.randperm(len(texts))]
        at = step % (len(texts) // BATCH) * BATCH
        batch = texts[at : at + BATCH]
        with torch.no_grad():
            wanted = teacher(batch).logits
        loss = loss_of(wanted, student(batch).logits, recipe.gamma)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
        progress(step + 1, steps)


def _with_scales(packed: Packed, dual: Any) -> Packed:
    form = codec(packed.spec)
    assert isinstance(form, DualBinaryCodec)
    first, second = dual.scales().detach().numpy()
    scales = tuple(form.store.rounded(np.ascontiguousarray(each), form.spec) for each in (first, second))
    return replace(packed, buffers={**packed.buffers, **form.scale_tiles(scales)})
