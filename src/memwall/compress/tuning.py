"""The seam of fine-tuning on a frozen packed base: what a method decides, and the table of methods.

A method says which adapters are trained, on which base, against which objective, and with which settings; one trainer
(`torch_tuning`) does the work for all. Its settings are a dataclass' fields. Nothing here needs torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Self

from memwall.compress.base import parsed_settings
from memwall.errors import InputError
from memwall.kernels.lora import TARGETS
from memwall.models.config import ModelConfig
from memwall.models.lora import MOST_RANK, target_shapes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from memwall.compress.teacher import Teacher
    from memwall.models.torch_decoder import TorchDecoder
    from memwall.models.torch_lora import Adapted, LoraLinear, Place
    from memwall.models.weights import Weights

METHODS: dict[str, str] = {
    "qlora": "memwall.compress.qlora:QLora",
    "ir-qlora": "memwall.compress.ir_qlora:IrQLora",
    "int2-1": "memwall.compress.int2_1:MemoryFrugal",
    "lora": "memwall.compress.lora:Lora",
    "lora-plus": "memwall.compress.lora:LoraPlus",
    "rslora": "memwall.compress.lora:RsLora",
    "dora": "memwall.compress.dora:Dora",
    "pissa": "memwall.compress.pissa:Pissa",
    "freeze": "memwall.compress.full:Freeze",
    "full": "memwall.compress.full:Full",
}
OPTIMIZERS = ("adamw", "paged")


class Objective(ABC):
    """What is minimised. A batch is worked in pieces, so each piece gives its share of the whole batch's loss."""

    @abstractmethod
    def loss(self, logits: Tensor, targets: Tensor, window: int, first: int, share: Share) -> Tensor:
        """logits [n, V], targets [n]: positions first to first + n of a window of the text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The batch that a piece belongs to."""

    tokens: int
    sequences: int


class CrossEntropy(Objective):
    """Mean loss per predicted token, in nats."""

    def loss(self, logits: Tensor, targets: Tensor, window: int, first: int, share: Share) -> Tensor:
        from torch.nn import functional

        return functional.cross_entropy(logits, targets, reduction="sum") / share.tokens


@dataclass(frozen=True, kw_only=True)
class TuneMethod(ABC):
    """One way to fine-tune, with its settings.

    rank, alpha, dropout: of adapters; targets: `all` or names joined by commas. context: tokens of a window, the first
    marker included. batch: windows per step, worked micro_batch at a time. epochs: passes over the text, unless steps
    (0: by epochs) says how many steps. max_grad_norm: gradients of more length are shortened (0: never). optimizer:
    `adamw` keeps its two moments in memory, `paged` in a file where memory is short. held_out: share of the windows,
    the last ones, that is not trained on but measured every save_every steps, when progress is saved too; keep_best:
    the result is the adapter of least held-out loss, not the last one. patience: the run ends early once so many such
    measurements in a row brought no new least loss (0: it never does). decay: learning rates fall evenly, to nothing
    after the last step.
    """

    name: ClassVar[str]
    base: ClassVar[str] = ""
    """Format of the base where a float model is given and none is asked for; empty: the numbers it is kept in."""
    takes_teacher: ClassVar[bool] = False
    makes_adapter: ClassVar[bool] = True
    """Else the result is a model."""
    owner: ClassVar[str] = "adapters"
    """Of gradients and the best state in the ledger."""
    has_no: ClassVar[tuple[str, ...]] = ()
    """Fields below that mean nothing here."""
    told: ClassVar[dict[str, Any]] = {}
    """Fields of PEFT's configuration that say how the adapter is meant."""
    most_rank: ClassVar[int] = MOST_RANK
    stacked: ClassVar[int] = 1
    """Rank of what is written over the rank that is trained."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    targets: str = "all"
    context: int = 512
    batch: int = 16
    micro_batch: int = 1
    epochs: int = 1
    steps: int = 0
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    beta2: float = 0.999
    max_grad_norm: float = 0.0
    optimizer: str = "adamw"
    held_out: float = 0.05
    save_every: int = 50
    keep_best: bool = False
    patience: int = 0
    decay: bool = False
    seed: int = 0

    @classmethod
    def configured(cls, options: Mapping[str, str]) -> Self:
        """The method with settings as they are written, such as {"rank": "16"}; others keep theirs."""
        known = {each.name: each.default for each in fields(cls) if each.name not in cls.has_no}
        return cls(**parsed_settings(cls.name, known, options))

    @classmethod
    def taught(cls) -> type[TuneMethod]:
        """The form of this method that learns from a teacher. InputError where there is none."""
        if cls.takes_teacher:
            return cls
        raise InputError(f"method {cls.name} has no teacher; leave out --teacher, or take --method int2-1")

    def __post_init__(self) -> None:
        for name, least, most in (
            ("rank", 1, self.most_rank), ("context", 2, 1 << 24), ("batch", 1, 1 << 20), ("micro_batch", 1, self.batch),
            ("epochs", 1, 1 << 20), ("steps", 0, 1 << 40), ("save_every", 1, 1 << 40), ("seed", 0, 1 << 62),
            ("patience", 0, 1 << 40),
            ("dropout", 0, 0.99), ("held_out", 0, 0.9), ("alpha", -1e6, 1e6), ("weight_decay", 0, 1),
            ("learning_rate", 1e-12, 10), ("beta2", 0.5, 1 - 1e-9), ("max_grad_norm", 0, 1e8),
        ):  # fmt: skip
            value = getattr(self, name)
            if not least <= value <= most:
                raise InputError(f"setting {name}={value:g}: must be {least:g} to {most:g}")
        if self.optimizer not in OPTIMIZERS:
            raise InputError(f"setting optimizer={self.optimizer}: it is one of {', '.join(OPTIMIZERS)}")
        if self.patience and not self.held_out:
            raise InputError(
                f"setting patience={self.patience} with held_out=0: nothing is measured that could stop getting "
                "better; give a held_out such as 0.05, or leave patience out"
            )
        self.chosen(TARGETS)

    def settings(self) -> dict[str, Any]:
        """Its settings as plain data."""
        return {name: value for name, value in asdict(self).items() if name not in self.has_no}

    @property
    def scale(self) -> float:
        """What an adapter's output is multiplied by."""
        return self.alpha / self.rank

    def chosen(self, known: tuple[str, ...]) -> tuple[str, ...]:
        """The targets among `known`, in its order."""
        if self.targets == "all":
            return known
        asked = [name.strip() for name in self.targets.split(",")]
        unknown = [name for name in asked if name not in known]
        if unknown:
            raise InputError(f"setting targets: {unknown[0]!r} is no target; they are all, or {', '.join(known)}")
        return tuple(name for name in known if name in asked)

    def shapes(self, config: ModelConfig) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of every target of one layer."""
        found = target_shapes(config)
        return {name: found[name] for name in self.chosen(tuple(found))}

    def linear(self, base: nn.Module, shape: tuple[int, int], place: Place) -> LoraLinear:
        """What stands in the place of a frozen product of (inputs, outputs)."""
        from memwall.models.torch_lora import LoraLinear

        return LoraLinear(base, shape, self.rank, self.scale, self.dropout, place)

    def extra_shapes(self, shape: tuple[int, int]) -> list[tuple[int, ...]]:
        """Shapes of what is trained for a product of (inputs, outputs) beside A and B."""
        return []

    def held_shapes(self, shape: tuple[int, int]) -> list[tuple[int, ...]]:
        """Shapes of what is kept for it and not trained."""
        return []

    def kept_values(self, shape: tuple[int, int]) -> int:
        """Numbers that are kept for the way back, a token and product, beside a plain adapter's."""
        return 0

    def rate(self, parameter: str) -> float:
        """What the learning rate is multiplied by for the trained tensor of that name."""
        return 1.0

    def trained_shapes(self, config: ModelConfig) -> list[tuple[int, ...]]:
        """Shapes of all that is trained."""
        one: list[tuple[int, ...]] = []
        for inputs, outputs in self.shapes(config).values():
            one += [(self.rank, inputs), (outputs, self.rank), *self.extra_shapes((inputs, outputs))]
        return one * config.num_layers

    def first_layer(self, config: ModelConfig) -> int:
        """Layers before this one need no gradient."""
        return 0

    def forms(self, config: ModelConfig, choice: str, specs: Mapping[str, str]) -> Mapping[str, str]:
        """Formats of all tensors, where `specs` are those of the base that was asked for. InputError for a base that
        cannot be trained on.
        """
        return specs

    def fit(self, decoder: TorchDecoder, weights: Weights, place: Place) -> Adapted:
        """The decoder over `weights` with what is trained in it. place: where trained numbers are to lie."""
        from memwall.models.torch_lora import adapt

        shapes = self.shapes(decoder.config)
        return adapt(decoder, shapes, lambda base, shape: self.linear(base, shape, place), seed=self.seed)

    def objective(self, teacher: Teacher | None) -> Objective:
        """What is minimised."""
        return CrossEntropy()


def tune_method(name: str, options: Mapping[str, str] | None = None, *, teacher: bool = False) -> TuneMethod:
    """The method of the table called `name`; with `teacher` the form of it that learns from another model."""
    if name not in METHODS:
        raise InputError(f"unknown way of fine-tuning {name!r}; known are {', '.join(METHODS)}")
    module, _, class_name = METHODS[name].partition(":")
    method: type[TuneMethod] = getattr(import_module(module), class_name)
    return (method.taught() if teacher else method).configured(options or {})
