"""Training with rounded numbers, and what of a model is sensitive to rounding: XR-NPE's methods in torch.

Any torch model: `rounded` puts a format on each linear layer and convolution, `train` goes through the phases of the
authors' recipe (floats, rounded weights, rounded weights and activations), `diagonal_fisher` and `hessian_trace` say
which layers suffer. Decoders of memwall have the same by checkpoint (`loaded`, `trained_decoder`), with weights rounded
exactly as they will be stored.

Rounding passes gradients straight through (straight-through estimator), and none outside the format's range. Weights
have a scale per output channel, max|w| / largest level in use; activations one per layer, from a running mean of max|x|
(decay 0.99). `PositSgd` keeps weights, gradients and momentum themselves as posits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from memwall.compress.base import Subject
from memwall.errors import InputError
from memwall.formats import codec
from memwall.formats.leveled import LevelCodec
from memwall.formats.levels import LevelSet, posit
from memwall.formats.xr_npe import LaneFormat
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import TensorSpec
from memwall.models.torch_decoder import TorchDecoder

EMA_DECAY = 0.99
SAMPLE_TOKENS = 128
"""Of one sequence whose gradient is squared: a mean over tokens first, so shorter ones say more and take longer."""
MOST_SAMPLES = 48
TRACE_PROBES = 2
TRAINED_SEQUENCES = 8
TORCH_BYTES = 260_000_000
"""What torch itself holds once imported."""

Loss = Callable[[Tensor, Tensor], Tensor]


# -- rounding --------------------------------------------------------------------------------------------------------


class _Levels:
    """A level set as tensors, scaled so that its largest level in use is `largest`.

    A number's upper 16 bits say which levels it can round to, mostly one or two of them, and a few halvings find which:
    several times quicker than a search over all thresholds, and the same to the bit.
    """

    def __init__(self, found: LevelSet) -> None:
        self.levels = torch.from_numpy(found.levels.copy())
        self.thresholds = torch.from_numpy(found.thresholds.copy())
        self.largest = found.largest
        tops = np.arange(1 << 16, dtype=np.uint32) << 16
        ends = np.sort(np.stack([tops, tops | 0xFFFF]).view(np.float32), axis=0)  # least and largest number of each
        first, last = np.searchsorted(found.thresholds, ends, side="right")
        most = int((last - first)[np.isfinite(ends).all(axis=0)].max())
        self._halvings = [1 << bit for bit in reversed(range(most.bit_length()))]
        self._padded = nn.functional.pad(self.thresholds, (0, 1 << most.bit_length()), value=math.inf)
        self._first = torch.from_numpy(first.astype(np.int32))

    def nearest(self, x: Tensor) -> Tensor:
        """Each finite number's level."""
        flat = x.float().reshape(-1)
        index = self._first.index_select(0, (flat.view(torch.int32) >> 16) & 0xFFFF)
        for size in self._halvings:
            above = self._padded.index_select(0, index + (size - 1)) <= flat
            index = torch.add(index, above, alpha=size)
        return self.levels.index_select(0, index).view(x.shape)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, scale: Tensor, levels: _Levels) -> Tensor:
        inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
        scaled = x * inverse
        context.save_for_backward(scaled.abs() <= levels.largest * (1 + 1e-6))
        return levels.nearest(scaled) * scale

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = context.saved_tensors
        return gradient * inside, None, None


def engine_levels(found: LaneFormat, peak: Literal["dense", "largest"] = "dense") -> LevelSet:
    """A format's numbers for use with scales: posits up to 2^(2^es), where they are densest, or all of them."""
    if not found.is_posit or peak == "largest":
        return found.levels
    return found.levels.within(2.0 ** (2**found.exponent_bits))


class RoundedWeight(nn.Module):
    """Parametrization of a weight [out, ...]: one scale per output channel."""

    def __init__(self, levels: LevelSet) -> None:
        super().__init__()
        self.levels = _Levels(levels)

    def forward(self, weight: Tensor) -> Tensor:
        scale = weight.detach().flatten(1).abs().amax(1) / self.levels.largest
        shape = (-1, *(1,) * (weight.dim() - 1))
        result: Tensor = _StraightThrough.apply(weight, scale.view(shape), self.levels)
        return result


class RoundedInput(nn.Module):
    """Rounds what comes into a layer, one scale for all of it; learns the scale while it trains. `active`: whether."""

    peak: Tensor

    def __init__(self, levels: LevelSet) -> None:
        super().__init__()
        self.levels = _Levels(levels)
        self.active = False
        self.register_buffer("peak", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return x
        if self.training or not self.peak > 0:
            seen = x.detach().abs().max()
            self.peak = seen if not self.peak > 0 else EMA_DECAY * self.peak + (1 - EMA_DECAY) * seen
        result: Tensor = _StraightThrough.apply(x, self.peak / self.levels.largest, self.levels)
        return result


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that have weights to round: linear ones and convolutions, in order."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def rounded(
    model: nn.Module, formats: Mapping[str, LaneFormat], peak: Literal["dense", "largest"] = "dense"
) -> nn.Module:
    """Put a format on layers, by name; others stay floats. Weights are rounded from now on, inputs by `activate`."""
    layers = layers_of(model)
    for name, found in formats.items():
        if name not in layers:
            raise InputError(f"{name}: the model has no such layer; layers are {', '.join(layers)}")
        levels = engine_levels(found, peak)
        layer = layers[name]
        parametrize.register_parametrization(layer, "weight", RoundedWeight(levels))
        layer.rounded_input = RoundedInput(levels)
        layer.register_forward_pre_hook(lambda module, inputs: (module.rounded_input(inputs[0]), *inputs[1:]))
    return model


def activate(model: nn.Module, active: bool = True) -> None:
    """Whether activations are rounded too."""
    for module in model.modules():
        if isinstance(module, RoundedInput):
            module.active = active


def weight_bits(model: nn.Module, formats: Mapping[str, LaneFormat | None], float_bits: int = 16) -> int:
    """Bits of all layers' weights: those of their formats and a 16-bit scale per output channel."""
    total = 0
    for name, layer in layers_of(model).items():
        weight, found = layer.weight, formats.get(name)
        assert isinstance(weight, Tensor)
        total += weight.numel() * (found.bits if found else float_bits) + (16 * len(weight) if found else 0)
    return total


# -- sensitivity -----------------------------------------------------------------------------------------------------


def fisher_of(losses: Iterable[Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean squared gradient of each loss, by name."""
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    count = 0
    for loss in losses:
        gradients = torch.autograd.grad(loss, list(weights.values()))
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total.addcmul_(gradient, gradient)
        count += 1
    return {name: total / max(count, 1) for name, total in sums.items()}


def hessian_trace(loss: Tensor, weights: Mapping[str, Tensor], *, probes: int, seed: int = 0) -> dict[str, float]:
    """Trace of the loss's Hessian in each weight alone, by products with random signs (Hutchinson's estimator)."""
    generator = torch.Generator().manual_seed(seed)
    held = list(weights.values())
    gradients = torch.autograd.grad(loss, held, create_graph=True)
    traces = dict.fromkeys(weights, 0.0)
    for _ in range(probes):
        for name, weight, gradient in zip(weights, held, gradients, strict=True):
            signs = torch.randint(0, 2, weight.shape, generator=generator, dtype=weight.dtype) * 2 - 1
            (product,) = torch.autograd.grad(gradient, weight, signs, retain_graph=True)
            traces[name] += float((product * signs).sum()) / probes
    return traces


def layer_sensitivity(
    weights: Mapping[str, Tensor],
    fisher: Mapping[str, Tensor],
    formats: Sequence[LaneFormat],
    peak: Literal["dense", "largest"] = "dense",
) -> dict[str, dict[str, float]]:
    """For each weight and format half the sum of F (w - Q(w))^2."""
    return {
        name: {
            found.name: 0.5
            * float((fisher[name] * (weight - RoundedWeight(engine_levels(found, peak))(weight)) ** 2).sum())
            for found in formats
        }
        for name, weight in ((name, weight.detach()) for name, weight in weights.items())
    }


def input_sensitivity(
    model: nn.Module, losses: Iterable[Tensor], names: Sequence[str], formats: Sequence[LaneFormat]
) -> dict[str, dict[str, float]]:
    """For each layer and format half the mean of the sum of g^2 (x - Q(x))^2 over its inputs x, g their gradients.

    A unit's operands share a format: what rounding its inputs costs a layer belongs to its choice. losses are worked
    out one by one while the layers' inputs are looked at.
    """
    found = {name: {each.name: 0.0 for each in formats} for name in names}
    seen: dict[str, Tensor] = {}
    count = 0

    def look(name: str) -> Callable[[nn.Module, Any], tuple[Any, ...]]:
        def hook(module: nn.Module, inputs: Any) -> tuple[Any, ...]:
            x = inputs[0] if inputs[0].requires_grad else inputs[0].detach().requires_grad_(True)
            seen[name] = x
            return (x, *inputs[1:])

        return hook

    layers = layers_of(model)
    handles = [layers[name].register_forward_pre_hook(look(name)) for name in names]
    try:
        for loss in losses:
            gradients = torch.autograd.grad(loss, [seen[name] for name in names])
            for name, gradient in zip(names, gradients, strict=True):
                x = seen[name].detach()
                for each in formats:
                    levels = _Levels(engine_levels(each))
                    scale = x.abs().max().clamp_min(1e-30) / levels.largest
                    error = levels.nearest(x / scale) * scale - x
                    found[name][each.name] += 0.5 * float((gradient**2 * error**2).sum())
            count += 1
    finally:
        for handle in handles:
            handle.remove()
    return {name: {key: value / max(count, 1) for key, value in row.items()} for name, row in found.items()}


# -- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of training. weights: whether they are rounded; activations: whether they are too."""

    epochs: int
    rate: float
    weights: bool
    activations: bool


#: the released recipe for ResNet-18 on CIFAR-10: floats, rounded weights, all rounded
PHASES = (
    Phase(epochs=120, rate=0.2, weights=False, activations=False),
    Phase(epochs=20, rate=0.02, weights=True, activations=False),
    Phase(epochs=80, rate=0.01, weights=True, activations=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """SGD with Nesterov momentum under a cosine with warm-up, as released; clip: of the gradient's norm, 0 for none.
    adaptive: AdamW in its place, which language models need."""

    adaptive: bool = False
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_epochs: float = 5
    clip: float = 0.0

    def optimizer(self, parameters: Sequence[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        """A new one for a phase."""
        if self.adaptive:
            return torch.optim.AdamW(parameters, lr=rate, weight_decay=self.weight_decay)
        return torch.optim.SGD(
            parameters, lr=rate, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=True
        )


def train(
    model: nn.Module,
    batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    loss: Loss,
    phase: Phase,
    recipe: Recipe | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """One phase; batches(epoch) gives (inputs, targets). Returns the last epoch's mean loss. A model that `rounded`
    made has rounded weights always: give it to the phases that want them."""
    recipe = recipe or Recipe()
    activate(model, phase.activations)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = recipe.optimizer(parameters, phase.rate)
    mean = math.nan
    for epoch in range(phase.epochs):
        held = list(batches(epoch))
        losses = []
        for number, (inputs, targets) in enumerate(held):
            done = epoch + number / len(held)
            for group in optimizer.param_groups:
                group["lr"] = phase.rate * _cosine(done, phase.epochs, min(recipe.warmup_epochs, phase.epochs / 4))
            optimizer.zero_grad()
            value = loss(model(inputs), targets)
            value.backward()
            if recipe.clip:
                nn.utils.clip_grad_norm_(parameters, recipe.clip)
            optimizer.step()
            losses.append(float(value.detach()))
        mean = sum(losses) / max(len(losses), 1)
        if progress is not None:
            progress(epoch + 1, phase.epochs)
    model.eval()
    return mean


def _cosine(done: float, whole: float, warmup: float) -> float:
    if done < warmup:
        return (done + 1e-3) / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(whole - warmup, 1e-9)))


class PositSgd(torch.optim.Optimizer):
    """SGD that holds weights and uses gradients as posits of `bits` and `es`, momentum as Posit(16,1): the released
    low-precision optimizer. Numbers are rounded as they are, without scales."""

    def __init__(
        self, parameters: Iterable[Tensor], *, rate: float, momentum: float = 0.9, bits: int = 16, es: int = 1
    ) -> None:
        super().__init__(parameters, {"rate": rate, "momentum": momentum})
        self._numbers, self._wide = _Levels(posit(bits, es)), _Levels(posit(16, 1))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step on the gradients that are there."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = self._numbers.nearest(parameter.grad)
                held = self.state[parameter].get("momentum")
                moved = gradient if held is None else group["momentum"] * held + gradient
                self.state[parameter]["momentum"] = moved = self._wide.nearest(moved)
                parameter.copy_(self._numbers.nearest(parameter - group["rate"] * moved))


# -- decoders --------------------------------------------------------------------------------------------------------


@contextmanager
def loaded(subject: Subject) -> Iterator[TorchDecoder]:
    """The model in torch, on the books while it is: weights, gradients, and a sum per weight, as float32."""
    size = sum(tensor.size for tensor in subject.checkpoint.config.tensors())
    charge = subject.arena.charge("calibration/torch", TORCH_BYTES + 4 * 4 * size)
    try:
        yield TorchDecoder.from_checkpoint(subject.checkpoint, dtype=torch.float32)
    finally:
        charge.release()


def _weights(model: TorchDecoder, names: Sequence[str]) -> dict[str, Tensor]:
    """Weights by name, ready for gradients."""
    found: dict[str, Tensor] = {name: model.get_parameter(name) for name in names}
    for weight in found.values():
        weight.requires_grad_(True)
    return found


def samples_of(tokens: np.ndarray, most: int = MOST_SAMPLES) -> Tensor:
    """At most so many short sequences, evenly spread over the text."""
    length = min(SAMPLE_TOKENS, tokens.shape[1])
    pieces = tokens[:, : tokens.shape[1] // length * length].reshape(-1, length)
    chosen = np.linspace(0, len(pieces) - 1, min(len(pieces), most)).astype(np.int64)
    return torch.from_numpy(pieces[chosen])


def _text_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[..., :-1])
    return nn.functional.cross_entropy(logits.flatten(0, -2), tokens[..., 1:].flatten())


def diagonal_fisher(model: TorchDecoder, subject: Subject, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Mean squared gradient of the text's loss in each weight [rows, cols], times the tokens of a sample: per token."""
    samples = samples_of(subject.tokens)

    def losses() -> Iterator[Tensor]:
        for number, sample in enumerate(samples):
            yield _text_loss(model, sample)
            subject.progress(number + 1, len(samples))

    found = fisher_of(losses(), _weights(model, names))
    return {name: (each * samples.shape[1]).numpy() for name, each in found.items()}


def notebook_scores(model: TorchDecoder, subject: Subject, names: Sequence[str]) -> dict[str, float]:
    """The released rule's order: mean squared gradient and the Hessian's trace, each over its largest, added."""
    fisher = {name: float(each.mean()) for name, each in diagonal_fisher(model, subject, names).items()}
    sample = samples_of(subject.tokens)[0]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the only one with second derivatives
        traces = hessian_trace(_text_loss(model, sample), _weights(model, names), probes=TRACE_PROBES)
    return {name: sum(each[name] / max(map(abs, each.values())) for each in (fisher, traces)) for name in names}


class RoundedGroups(nn.Module):
    """Parametrization of a decoder's weight: rounded as the format stores it, in groups of columns."""

    def __init__(self, spec: str) -> None:
        super().__init__()
        form = codec(spec)
        if not isinstance(form, LevelCodec) or form.scale != "f16":
            raise InputError(f"{spec}: training rounds to level formats with float16 scales, such as e2m1, posit8")
        self.group, self.levels = form.group, _Levels(form.levels)

    def forward(self, weight: Tensor) -> Tensor:
        rows, columns = weight.shape
        padded = nn.functional.pad(weight, (0, -columns % self.group)).view(rows, -1, self.group)
        scale = (padded.detach().abs().amax(-1, keepdim=True) / self.levels.largest).half().float()
        back: Tensor = _StraightThrough.apply(padded, scale, self.levels)
        return back.reshape(rows, -1)[:, :columns]


def trained_decoder(
    subject: Subject, specs: Mapping[str, str], *, steps: int, rate: float, seed: int = 0
) -> Checkpoint:
    """The model trained with its matrices rounded to `specs`, to predict what the float model predicts.

    Loss: divergence from the float model over the calibration text (the paper trains on its task; a text this short
    would be learned by heart). AdamW, cosine. All tensors are trained, those that stay floats too. Deterministic for a
    seed.
    """
    with loaded(subject) as teacher, loaded(subject) as student:
        names = [name for name in specs if isinstance(codec(specs[name]), LevelCodec) and specs[name] != "float32"]
        tensors = [tensor.name for tensor in subject.checkpoint.config.tensors()]
        student.requires_grad_(True)
        for name in names:
            owner, _, field = name.rpartition(".")
            parametrize.register_parametrization(student.get_submodule(owner), field, RoundedGroups(specs[name]))
        distil(student, teacher, samples_of(subject.tokens, subject.tokens.size), steps, rate, seed, subject.progress)
        trained = {name: unrounded(student, name).detach().numpy().copy() for name in tensors}
    return Trained(subject.checkpoint, trained)


def unrounded(model: nn.Module, name: str) -> Tensor:
    """The weight behind its rounding."""
    owner, _, field = name.rpartition(".")
    if parametrize.is_parametrized(model.get_submodule(owner), field):
        return model.get_parameter(f"{owner}.parametrizations.{field}.original")
    return model.get_parameter(name)


def distil(
    student: nn.Module, teacher: nn.Module, samples: Tensor, steps: int, rate: float, seed: int,
    progress: Callable[[int, int], None],
) -> None:  # fmt: skip
    """Trains all that wants gradients of `student` to predict what `teacher` predicts, in so many steps."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for step in range(steps):
        chosen = torch.randperm(len(samples), generator=generator)[:TRAINED_SEQUENCES]
        with torch.no_grad():
            wanted = teacher(samples[chosen]).log_softmax(-1)
        for group in optimizer.param_groups:
            group["lr"] = rate * _cosine(step, steps, max(steps / 20, 1))
        optimizer.zero_grad()
        found = student(samples[chosen]).log_softmax(-1)
        nn.functional.kl_div(
            found.flatten(0, -2), wanted.flatten(0, -2), log_target=True, reduction="batchmean"
        ).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        progress(step + 1, steps)


class Trained(Checkpoint):
    """A checkpoint with some tensors in place of its own, float32."""

    def __init__(self, checkpoint: Checkpoint, tensors: Mapping[str, np.ndarray]) -> None:
        self.__dict__.update(checkpoint.__dict__)
        self._tensors = dict(tensors)
        self._shapes: dict[str, TensorSpec] = {tensor.name: tensor for tensor in checkpoint.config.tensors()}

    def tensor(self, name: str) -> np.ndarray:
        return self._tensors[name] if name in self._tensors else super().tensor(name)

    def alone(self, name: str) -> np.ndarray:
        return self._tensors[name] if name in self._tensors else super().alone(name)

    def source_dtype(self, name: str) -> str:
        return "float32" if name in self._tensors else super().source_dtype(name)

    def stored_bytes(self, name: str) -> int:
        return self._tensors[name].nbytes if name in self._tensors else super().stored_bytes(name)

    def close(self) -> None:
        """The checkpoint it looks at is closed by its owner."""
