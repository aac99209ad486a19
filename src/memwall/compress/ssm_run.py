"""One state space layer at a time over calibration text, and what is seen of it on the way.

The hidden states of all sequences are kept; the layer runs in the CPU engine's own decoder, made for it alone, so what
is measured is what will run, whether its tensors are floats or packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from memwall.compress.base import Statistics
from memwall.formats import Packed, codec
from memwall.memory import Arena
from memwall.models.config import ModelConfig
from memwall.models.ssm_config import Quantized, SsmConfig
from memwall.models.ssm_decoder import SsmDecoder
from memwall.models.weights import Weights

LAYER = "model.layers.0."
Tensors = Mapping[str, np.ndarray | Packed]


@dataclass(slots=True)
class Seen:
    """What a layer of floats showed over all sequences.

    parts: largest |x| of each part of in_proj's output, and of `dt` where that comes later. channels: of each channel
    behind the convolution [channels]. states: of each state [E, N]. means: per channel, the largest over sequences of
    the mean of |x| (what channels are sorted by). clipped: the mean over sequences of the given quantile of |x|.
    inputs: of the two products, the largest |x| and their statistics.
    """

    channels: np.ndarray
    states: np.ndarray
    means: np.ndarray
    parts: dict[str, float] = field(default_factory=dict)
    clipped: list[float] = field(default_factory=list)
    peaks: dict[str, float] = field(default_factory=dict)
    statistics: dict[str, Statistics] = field(default_factory=dict)
    selected: dict[str, float] = field(default_factory=dict)


class LayerRun:
    """One layer, its tensors by their names behind `model.layers.N.`; quantized: how they are stored, None for floats
    as in the source.
    """

    def __init__(
        self, config: ModelConfig, tensors: Tensors, quantized: Quantized | None, arena: Arena, num_tokens: int
    ) -> None:
        assert config.ssm is not None
        self.ssm: SsmConfig = replace(config.ssm, quantized=quantized)
        self.config = replace(config, num_layers=1, sliding_windows=(None,), ssm=self.ssm)
        specs = {LAYER + name: made.spec if isinstance(made, Packed) else "float32" for name, made in tensors.items()}
        weights = Weights(matrices={}, vectors={}, specs=specs)
        shapes = {tensor.name: tensor for tensor in self.config.tensors()}
        for name, made in tensors.items():
            role = shapes[LAYER + name].role
            packed = made if isinstance(made, Packed) else codec("float32").encode(made)
            if len(packed.shape) == 2 and role != "other":
                weights.keep(LAYER + name, packed)
            else:
                weights.vectors[LAYER + name] = codec(packed.spec).decode(packed)
        self._decoder = SsmDecoder(self.config, weights, arena, segment_tokens=num_tokens)
        static = self.ssm.is_static(0)
        state_type = np.int8 if static and quantized is not None and quantized.state == "int8" else np.float32
        self._state = np.zeros((self.ssm.num_heads, self.ssm.head_dim, self.ssm.state_size), state_type)
        self._inputs = np.zeros((self.ssm.conv_taps - 1, self.ssm.conv_size), np.int8 if static else np.float32)

    def run(self, hidden: np.ndarray) -> None:
        """Hidden states [sequences, T, d] through the layer, in place."""
        for states in hidden:
            self._state.fill(0)
            self._inputs.fill(0)
            self._decoder.run_layer(0, states, self._state, self._inputs)

    def look(self, hidden: np.ndarray, *, quantile: float | None = None, products: bool = True) -> Seen:
        """The same, of a layer of floats; gives what was seen. products: also what its products read."""
        inner = self.ssm.inner_size
        states = self._decoder.peaks[0] = np.zeros((inner, self.ssm.state_size), np.float32)
        channels, means = np.zeros(self.ssm.conv_size, np.float32), np.zeros(inner, np.float32)
        seen = Seen(channels=channels, states=states, means=means)
        gathered: list[np.ndarray] = []

        def observe(name: str, x: np.ndarray) -> None:
            name = name.removeprefix(LAYER)
            if name == "mixer.conv":
                gathered.append(np.abs(x))
            elif name in ("mixer.proj", "mixer.selected", "mixer.dt"):
                _note_parts(seen.parts, name, x, self.ssm)
            elif products and name in ("mixer.in_proj.weight", "mixer.out_proj.weight"):
                seen.peaks[name] = max(seen.peaks.get(name, 0.0), float(np.abs(x).max()))
                if name not in seen.statistics:
                    seen.statistics[name] = Statistics(np.zeros((x.shape[1],) * 2, np.float32))
                seen.statistics[name].add(x)

        self._decoder.observer = observe
        for sequence in hidden:
            gathered.clear()
            self.run(sequence[None])
            sizes = np.concatenate(gathered)
            own = sizes[:, :inner]
            np.maximum(channels, sizes.max(axis=0), out=channels)
            np.maximum(means, own.mean(axis=0), out=means)
            if quantile is not None:
                seen.clipped.append(float(np.quantile(own, quantile)))
        self._decoder.observer = None
        self._decoder.peaks.clear()
        return seen

    def release(self) -> None:
        """Gives the memory back."""
        self._decoder.release()


def _note_parts(parts: dict[str, float], name: str, x: np.ndarray, ssm: SsmConfig) -> None:
    if name == "mixer.proj":
        cuts = dict(ssm.proj_parts)
    elif name == "mixer.selected":
        cuts = {"low": ssm.dt_rank, "b": ssm.state_size, "c": ssm.state_size}
    else:
        cuts = {"dt": x.shape[1]}
    end = 0
    for part, size in cuts.items():
        end += size
        peak = float(np.abs(x[:, end - size : end]).max())
        parts[part] = max(parts.get(part, 0.0), peak)
