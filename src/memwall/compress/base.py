"""The seam of weight compression: what is known of a layer's inputs, and methods that make its matrix a `Packed`.

Matrices are [rows, cols] = [outputs, inputs]; a layer computes y = x W^T. The error that matters is not that of the
weights but that of the outputs over the inputs the layer sees: sum over tokens of |x (W - W')^T|^2 = trace((W - W') H
(W - W')^T) with H = X^T X. So H is all that a method has to know about the data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from memwall.compress.sweep import Factor
from memwall.errors import InputError
from memwall.formats import Packed, codec

if TYPE_CHECKING:
    from memwall.compress.calibration import LayerStream
    from memwall.compress.transforms import Transform
    from memwall.memory import Arena
    from memwall.models.checkpoint import Checkpoint
    from memwall.models.config import ModelConfig


Trained = Callable[[int, int], None]
"""progress(done, total) of training."""
PRODUCT_COLUMNS = 1024
"""Columns of H that are brought up to date together: the product that is added is never as large as H."""


@dataclass(slots=True)
class Statistics:
    """What calibration learned about the inputs of a linear layer.

    hessian: X^T X summed over the tokens seen, [cols, cols] float32, symmetric.
    num_tokens: how many rows X had. magnitude, peak: sum and largest of |X| per column [cols] float32.
    """

    hessian: np.ndarray
    num_tokens: int = 0
    magnitude: np.ndarray | None = None
    peak: np.ndarray | None = None
    _factor: tuple[tuple[float, bool], Factor] | None = None
    _making: Lock = field(default_factory=Lock, repr=False, compare=False)

    @staticmethod
    def identity(num_columns: int) -> Statistics:
        """All inputs alike and independent: under it every method's compensation is nothing."""
        return Statistics(np.eye(num_columns, dtype=np.float32), 1)

    def add(self, x: np.ndarray) -> None:
        """Take in inputs x [tokens, cols] float32."""
        self.gather(x)
        self.mirror()

    def mirror(self) -> None:
        """The half of H above the diagonal, once `gather` is done."""
        size = len(self.hessian)
        for start in range(0, size, PRODUCT_COLUMNS):
            stop = min(start + PRODUCT_COLUMNS, size)
            corner = self.hessian[start:stop, start:stop]
            corner[...] = np.tril(corner) + np.tril(corner, -1).T
            self.hessian[start:stop, stop:] = self.hessian[stop:, start:stop].T

    def gather(self, x: np.ndarray) -> None:
        """As `add`, but H is only brought up to date below its diagonal, which takes half of the work."""
        size = len(self.hessian)
        for start in range(0, size, PRODUCT_COLUMNS):
            stop = min(start + PRODUCT_COLUMNS, size)
            self.hessian[start:, start:stop] += x[:, start:].T @ x[:, start:stop]
        self.num_tokens += len(x)
        sizes = np.abs(x)
        magnitude, peak = sizes.sum(axis=0), sizes.max(axis=0, initial=0)
        self.magnitude = magnitude if self.magnitude is None else self.magnitude + magnitude
        self.peak = peak if self.peak is None else np.maximum(self.peak, peak)
        self._factor = None

    def factor(self, damping: float, activation_order: bool) -> Factor:
        """H's factor for the sweep; made once for all matrices that read these inputs."""
        key = (damping, activation_order)
        with self._making:  # matrices that are compressed at once wait for the first of them
            if self._factor is None or self._factor[0] != key:
                self._factor = (key, Factor.of(self.hessian, damping, activation_order))
            return self._factor[1]

    def error(self, difference: np.ndarray) -> float:
        """Squared error of the outputs when the weights change by `difference` [rows, cols]."""
        return float(np.einsum("ij,ij->", difference @ self.hessian, difference, dtype=np.float64))


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodConfig:
    """What a method is asked for.

    spec: codec of the result.
    damping: share of H's mean diagonal that is added to its diagonal (0.01 in the GPTQ paper).
    activation_order: work the columns with the largest inputs first (their groups' scales are then fixed beforehand).
    tensor: name of the matrix, for methods that treat some otherwise.
    """

    spec: str
    damping: float = 0.01
    activation_order: bool = False
    tensor: str = ""

    def __post_init__(self) -> None:
        codec(self.spec)
        if not 0 < self.damping <= 1e6:
            raise InputError(f"damping is {self.damping:g}; it must be positive, such as 0.01")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A float model that is about to be compressed, and the text it is looked at with.

    tokens: [sequences, tokens]. progress(done, total): of what the method does with it, in steps.
    """

    checkpoint: Checkpoint
    tokens: np.ndarray
    arena: Arena
    progress: Callable[[int, int], None]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor of the model."""
        return next(tensor.shape for tensor in self.checkpoint.config.tensors() if tensor.name == name)


class WeightMethod(ABC):
    """A way to compress one matrix. Instances hold no state between matrices; settings are a dataclass' fields."""

    name: ClassVar[str]
    needs_statistics: ClassVar[bool]
    """Whether calibration has to run before the method can."""
    damping: ClassVar[float] = 0.01
    """See `MethodConfig`; unless another is asked for."""
    default_bits: ClassVar[str] = "4.25"
    """What is made unless bits are asked for."""
    transforms: ClassVar[bool] = False
    """Whether the model is first changed into an equal one by `transform`."""
    stacks: ClassVar[bool] = False
    """Whether matrices become blocks that are put in one order over the whole model (`stack_job`)."""

    ladder: ClassVar[tuple[str, ...]] = ()
    """Forms that are mixed to a mean number of bits, least first; () for those of `models.precision.LADDER`."""
    keeps_ends: ClassVar[bool] = False
    """Whether embedding and head stay floats."""
    makes: ClassVar[str] = ""
    """The method whose own formats it stores, where it is not itself."""
    ends: ClassVar[str] = ""
    """The form of embedding and head where one form is meant for all, if not the usual one of that form."""
    adaptive: ClassVar[str | None] = None
    """A choice of `models.precision` whose bytes the method spends as it finds best."""

    @classmethod
    def configured(cls, options: Mapping[str, str]) -> Self:
        """The method with settings as they are written, such as {"outlier_threshold": "0.1"}; others keep theirs."""
        known: dict[str, Any] = {each.name: each.default for each in fields(cls)} if is_dataclass(cls) else {}
        return cls(**parsed_settings(cls.name, known, options))

    def settings(self) -> dict[str, Any]:
        """Its settings, for the journal and the manifest of what it made."""
        return asdict(self) if is_dataclass(self) else {}

    def for_model(self, config: ModelConfig) -> WeightMethod:
        """The method with the settings that hang on the model filled in; asked before anything else."""
        return self

    def form(self, bits: float | str) -> str | None:
        """The one format that is meant by a number of bits or a spec; None where formats are mixed to a mean.

        InputError for bits that the method does not make.
        """
        return codec(bits).spec if isinstance(bits, str) else None

    def check(self, spec: str) -> None:
        """InputError where the method does not make this format; asked before any text is read."""
        codec(spec)

    def transform(self, stream: LayerStream, form_of: Callable[[str], str]) -> Transform:
        """Maps to put into the float model before its matrices are compressed (see `transforms`).

        stream: the model over the calibration text, at no layer yet; it may be moved to the end. form_of: matrix -> the
        spec it is meant to take, as far as is known.
        """
        raise NotImplementedError

    def reads_text(self, bits: float | str) -> bool:
        """Whether any text has to be read for bits as `form` gives them."""
        return self.calibrates or not isinstance(bits, str)

    def choose(self, subject: Subject, forms: Mapping[str, Sequence[str]], budget_bytes: int) -> dict[str, str] | None:
        """The form of every matrix, out of `forms`, in at most `budget_bytes`; None for the job's own measurement."""
        return None

    def prepare(self, subject: Subject, specs: Mapping[str, str]) -> Checkpoint:
        """The model whose matrices are compressed, the forms being known: the same, or one trained for them."""
        return subject.checkpoint

    @property
    def calibrates(self) -> bool:
        """Whether `compress` wants statistics with these settings."""
        return self.needs_statistics

    @property
    def trains(self) -> bool:
        """Whether what was made of the whole model is trained by `train` at the end."""
        return False

    def train(
        self, checkpoint: Checkpoint, tokens: np.ndarray, made: Mapping[str, Packed], progress: Trained
    ) -> dict[str, Packed]:
        """Tensors of the same forms with other numbers; those that stay may be left out.

        checkpoint: the float model. tokens [sequences, tokens]: the calibration text. made: all of the compressed one.
        """
        raise NotImplementedError

    @abstractmethod
    def compress(self, weight: np.ndarray, statistics: Statistics | None, config: MethodConfig) -> Packed:
        """weight [rows, cols] of any float type -> Packed in the form `config.spec`."""

    def finish_layer(self, stream: LayerStream, layer: int, made: dict[str, Packed]) -> dict[str, Packed]:
        """All tensors of a layer once they are compressed, as they shall be stored; here as they are.

        stream: the hidden states that come into the layer; they stay where they are.
        """
        return made

    @property
    def keeps_budgets(self) -> bool:
        """Whether all it holds is counted by `work_bytes`, so that the process can be kept under a budget."""
        return not self.trains  # nobody counts what torch holds

    @abstractmethod
    def work_bytes(self, num_rows: int, num_columns: int) -> int:
        """Most bytes that `compress` holds beside the weight, the statistics and the result."""


def parsed_settings(method: str, known: Mapping[str, Any], options: Mapping[str, str]) -> dict[str, Any]:
    """Settings from their texts, of the types of the defaults in `known`; InputError for one that `method` lacks."""
    for name in options:
        if name not in known:
            has = f"has {', '.join(known)}" if known else "has none"
            raise InputError(f"method {method} has no setting {name!r}; it {has}")
    return {name: _as_type_of(name, known[name], text) for name, text in options.items()}


def _as_type_of(name: str, default: Any, text: str) -> Any:
    """A setting from its text, of the type of its default value."""
    if isinstance(default, bool):
        if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
            raise InputError(f"{name}={text}: expected true or false")
        return text.lower() in ("true", "yes", "1")
    if isinstance(default, str):
        return text
    try:
        return type(default)(text)
    except ValueError:
        raise InputError(f"{name}={text}: expected a number, such as {default}") from None
