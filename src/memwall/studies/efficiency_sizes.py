"""What the efficiency study compares, and how much of it: axes, techniques, sizes of models and of runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from memwall.errors import InputError
from memwall.hardware.meter import check_interval

ATTENTION, POSITIONS, EXPERTS, PRECISION, PEFT = "attention", "positions", "experts", "precision", "peft"
AXES: dict[str, tuple[str, ...]] = {
    ATTENTION: ("mha", "mqa", "gqa", "mla", "nsa", "mamba", "rwkv"),
    POSITIONS: ("rotary", "sinusoidal", "learned", "relative", "none"),
    EXPERTS: ("dense", "moe"),
    PRECISION: ("float32", "bfloat16", "int8", "int4"),
    PEFT: ("lora", "lora-plus", "rslora", "dora", "pissa", "freeze", "full"),
}
"""Axis -> its techniques."""
BASELINES = {ATTENTION: "mha", POSITIONS: "rotary", EXPERTS: "dense", PRECISION: "bfloat16", PEFT: "full"}
"""What a technique's losses are held against."""
TRAINED = (ATTENTION, POSITIONS, EXPERTS)
"""Axes whose models are trained from nothing here."""
ARITHMETIC = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of models: width, layers, heads, inner numbers of the feed. Of training: steps of batch x tokens, after `warm_up`
    others that are not measured. Of decoding: `decoded` tokens with `context` before them; a stored model for
    at least `stored_s` seconds. windows: of held-out text. arithmetic: of products while models are trained, one of
    ARITHMETIC; weights and moments, judging and decoding are float32 with any. tuned_bytes: of the text that models
    are fine-tuned on, a tenth of which is judged before and after.
    """

    width: int = 128
    num_layers: int = 6
    heads: int = 4
    feed: int = 352
    experts: int = 8
    top: int = 2
    batch: int = 8
    tokens: int = 256
    steps: int = 100
    warm_up: int = 3
    learning_rate: float = 3e-3
    arithmetic: str = "float32"
    context: int = 16384
    decoded: int = 96
    stored_s: float = 1.5
    windows: int = 32
    seeds: int = 3
    tuned_steps: int = 12
    tuned_batch: int = 4
    tuned_seeds: int = 1
    tuned_bytes: int = 48_000
    training_dt_s: float = 0.25
    inference_dt_s: float = 0.05

    def __post_init__(self) -> None:
        if self.width % (4 * self.heads) or self.heads % 2:
            raise InputError(f"width {self.width}, {self.heads} heads: an even number, in each a multiple of 4 numbers")
        for name in ("num_layers", "batch", "steps", "decoded", "windows", "seeds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.arithmetic not in ARITHMETIC:
            raise InputError(f"arithmetic {self.arithmetic!r}: must be one of {', '.join(ARITHMETIC)}")
        for dt in (self.training_dt_s, self.inference_dt_s):
            check_interval(dt)
        if self.tokens <= self.decoded + self.warm_up:
            raise InputError(f"{self.tokens} tokens a text: must be more than the {self.decoded} decoded")

    @property
    def tuned(self) -> Sizes:
        """As fine-tuning takes them."""
        return replace(self, steps=self.tuned_steps, batch=self.tuned_batch, seeds=self.tuned_seeds, warm_up=1)

    def to_dict(self) -> dict[str, Any]:
        """As records hold it."""
        return asdict(self)


FULL = Sizes()
QUICK = Sizes(
    num_layers=2, batch=4, tokens=128, steps=24, context=4096, decoded=32, stored_s=0.5, windows=8, seeds=1,
    tuned_steps=3, tuned_batch=2, tuned_bytes=12_000, training_dt_s=0.05, inference_dt_s=0.02,
)  # fmt: skip
TINY = Sizes(
    width=32, num_layers=1, heads=4, feed=128, experts=4, batch=2, tokens=48, steps=3, warm_up=1, context=64, decoded=4,
    stored_s=0.02, windows=2, seeds=1, tuned_steps=1, tuned_batch=1, tuned_bytes=8_000, training_dt_s=0.005,
    inference_dt_s=0.005,
)  # fmt: skip
"""For tests."""


def select(axes: list[str] | None, techniques: list[str] | None) -> dict[str, tuple[str, ...]]:
    """The axes and techniques asked for; InputError for one that is not there."""
    for axis in axes or ():
        if axis not in AXES:
            raise InputError(f"--axes: unknown axis {axis!r}; the study has {', '.join(AXES)}")
    chosen = {axis: names for axis, names in AXES.items() if axes is None or axis in axes}
    if techniques is None:
        return chosen
    known = [name for names in chosen.values() for name in names]
    for name in techniques:
        if name not in known:
            raise InputError(f"--techniques: {name!r} is none of {', '.join(known)}")
    picked = {axis: tuple(name for name in names if name in techniques) for axis, names in chosen.items()}
    return {axis: names for axis, names in picked.items() if names}
