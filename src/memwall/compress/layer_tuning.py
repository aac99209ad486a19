"""Fine-tuning of codebooks by whole layers: what a layer gives out is brought near to what the float layer gives out.

Indices stay as they are; centroids, the scales of columns and the layer's norm weights learn, by gradients through the
look-up, on the hidden states that the compressed layers before hand on. Needs torch, which nothing else of the room
does: it is imported when a layer is tuned.

Source: layer-wise fine-tuning of "VPTQ" (Yifei Liu, 2024, arXiv 2409.17066), section 4.3 and appendix B (learning rate
1e-4, mean squared error, 100 steps over 128 samples).
Cost: the layer twice in float32, and gradients and two moments of its codebooks; a step is a pass forward and back of a
batch of sequences.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.vector_parts import BOOK_TAIL, checked_halves
from memwall.formats.vptq import VptqCodec, unpack

if TYPE_CHECKING:
    from memwall.compress.calibration import LayerStream

BATCH_SEQUENCES = 4
LOOK_STEPS = 10
"""Steps after which it is seen whether they gained anything."""
_BOOKS = ("centroids", "residuals", "outlier_centroids", "scale_and_offset")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """steps of Adam at `rate`, which falls to nothing over the second half; the best state of all is kept."""

    steps: int = 100
    rate: float = 1e-4
    seed: int = 0


def require_torch(
    setting: str, instead: str = "or leave it out; refine, which fits codebooks matrix by matrix, needs none"
) -> None:
    """InputError where torch is missing. instead: what does without."""
    if importlib.util.find_spec("torch") is None:
        raise InputError(f"{setting} needs torch: pip install 'memwall[torch]', {instead}")


def tuned(stream: LayerStream, layer: int, made: Mapping[str, Packed], schedule: Schedule) -> dict[str, Packed]:
    """`made` (all tensors of a layer, in the forms they were given) after fine-tuning; as it was where nothing is won.

    stream: the hidden states that come into the layer, which stay where they are. Only tensors in the form `vptq` and
    norms change.
    """
    require_torch("tune")
    import torch
    from torch.nn import functional

    hidden = torch.from_numpy(np.array(stream.hidden, np.float32))
    layers = _TwoLayers(stream, layer, made)
    with torch.no_grad():
        wanted = torch.cat([layers.float_output(part) for part in hidden.split(BATCH_SEQUENCES)])

    def loss() -> float:
        with torch.no_grad():
            pairs = zip(hidden.split(BATCH_SEQUENCES), wanted.split(BATCH_SEQUENCES), strict=True)
            losses = [functional.mse_loss(layers.output(part), want) * len(part) for part, want in pairs]
        return float(sum(losses)) / len(hidden)

    before = best = loss()
    kept = layers.state()
    optimizer = torch.optim.Adam(layers.learning, lr=schedule.rate)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 - 2 * step / schedule.steps))
    random = np.random.default_rng(schedule.seed)
    for step in range(schedule.steps):
        taken = torch.from_numpy(random.permutation(len(hidden))[:BATCH_SEQUENCES])
        optimizer.zero_grad()
        functional.mse_loss(layers.output(hidden[taken]), wanted[taken]).backward()
        optimizer.step()
        falling.step()
        if (step + 1) % LOOK_STEPS == 0 or step + 1 == schedule.steps:
            now = loss()
            if now < best:
                best, kept = now, layers.state()
    return layers.packed(kept) if best < before else dict(made)


class _TwoLayers:
    """A layer in floats, and the same with its compressed tensors, of which the codebooks and norms learn."""

    def __init__(self, stream: LayerStream, layer: int, made: Mapping[str, Packed]) -> None:
        import torch
        from torch import nn

        from memwall.models.rope import inverse_frequencies
        from memwall.models.torch_decoder import Layer

        config, self._prefix = stream.config, f"model.layers.{layer}."
        self._made = made
        self._float = Layer(config, layer).requires_grad_(False)
        values = {name: torch.from_numpy(np.array(stream.checkpoint.alone(name), np.float32)) for name in made}
        self._float.load_state_dict({name.removeprefix(self._prefix): each for name, each in values.items()})
        self._rotation = torch.from_numpy(inverse_frequencies(config.rope, config.head_dim).copy())
        self._factor = config.rope.attention_factor
        self._matrices: dict[str, LookedUp] = {}
        self._norms: dict[str, Any] = {}
        self._fixed: dict[str, Any] = {}
        for name, packed in made.items():
            if isinstance(codec(packed.spec), VptqCodec):
                self._matrices[name] = LookedUp(packed)
                continue
            floats = torch.from_numpy(np.array(codec(packed.spec).decode(packed), np.float32))
            if len(packed.shape) == 1 and "norm" in name:
                self._norms[name] = nn.Parameter(floats)
            else:
                self._fixed[name] = floats
        self.learning = [each for matrix in self._matrices.values() for each in matrix.parameters()]
        self.learning += list(self._norms.values())

    def _context(self, part: Any) -> Any:
        import torch

        from memwall.models.torch_decoder import Context

        positions = torch.arange(part.shape[1])
        return Context(self._rotation, self._factor, positions, None, is_start=True)

    def float_output(self, part: Any) -> Any:
        """What the float layer makes of hidden states [sequences, tokens, hidden]."""
        return self._float(part, self._context(part))

    def output(self, part: Any) -> Any:
        """What the compressed layer makes of them."""
        import torch

        looked_up = {name: matrix() for name, matrix in self._matrices.items()}
        held = {name.removeprefix(self._prefix): each for name, each in (looked_up | self._norms | self._fixed).items()}
        return torch.func.functional_call(self._float, held, (part, self._context(part)))

    def state(self) -> list[Any]:
        return [parameter.detach().clone() for parameter in self.learning]

    def packed(self, state: list[Any]) -> dict[str, Packed]:
        """All tensors of the layer, what learned as it is in `state`."""
        for parameter, values in zip(self.learning, state, strict=True):
            parameter.data.copy_(values)
        found = dict(self._made)
        found.update({name: matrix.packed() for name, matrix in self._matrices.items()})
        for name, norm in self._norms.items():
            found[name] = codec("float32").encode(norm.detach().numpy().copy())
        return found


class LookedUp:
    """The weights of a packed matrix as a differentiable function of its codebooks."""

    def __init__(self, packed: Packed) -> None:
        import torch
        from torch import nn

        self._packed = packed
        form = VptqCodec.parse(packed.spec)
        self._learning = {
            name: nn.Parameter(torch.from_numpy(packed.buffers[name].astype(np.float32)))
            for name in _BOOKS
            if name in packed.buffers
        }
        self._order = None
        if form.ordered:
            self._order = torch.from_numpy(np.argsort(packed.buffers["order"]).astype(np.int64))
        self._fetched: list[tuple[int, list[tuple[str, Any]]]] = []
        for prefix, part, coded in zip(("outlier_", ""), form.parts(packed.shape[1]), unpack(packed), strict=True):
            if part is None or coded is None:
                continue
            book = part.book_of(packed.shape[0])
            stages = [("centroids", coded.codes & np.uint32((1 << part.main_bits) - 1), part.main_bits)]
            if coded.residual is not None:
                stages.append(("residuals", coded.codes >> np.uint32(part.main_bits), part.residual_bits))
            places = [
                (prefix + name, torch.from_numpy((book << bits) + labels.astype(np.int64)))
                for name, labels, bits in stages
            ]
            self._fetched.append((part.vector, places))

    def parameters(self) -> list[Any]:
        return list(self._learning.values())

    def __call__(self) -> Any:
        """Weights [rows, cols], columns in their own order."""
        import torch

        pieces = []
        for vector, places in self._fetched:
            found = sum(self._learning[name][:-BOOK_TAIL].reshape(-1, vector)[labels] for name, labels in places)
            pieces.append(found.transpose(1, 2).flatten(0, 1)[: self._packed.shape[0]])  # type: ignore[union-attr]
        weights = torch.cat(pieces, dim=1)
        if "scale_and_offset" in self._learning:
            scale, offset = self._learning["scale_and_offset"]
            weights = weights * scale + offset
        return weights if self._order is None else weights[:, self._order]

    def packed(self) -> Packed:
        """The form with its codebooks as they are now."""
        now = {name: checked_halves(each.detach().numpy(), "a tuned centroid") for name, each in self._learning.items()}
        return Packed(spec=self._packed.spec, shape=self._packed.shape, buffers={**self._packed.buffers, **now})
