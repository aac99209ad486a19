"""A feed-forward whose matrices lie in a file of their own, neuron by neuron, beside a model's other weights.

Source: LLM in a flash (Keivan Alizadeh, 2023, arXiv 2312.11514), section 3.2. Neuron i of a ReLU feed-forward is row i
of what makes it (`up`, and `gate` where there is one) and column i of what it adds (`down`). Here they stand in one
row, [gate |] up | down, so that one read brings all of it, and rows begin at multiples of a sector, which direct reads
want.

The configuration of such a model says under `streamed_neurons` how the rows lie, how large the predictors of active
neurons are, and how many rows have to be held so that those of the last k tokens stay: what was counted on text.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import ml_dtypes
import numpy as np

from memwall.formats.checked_json import Fields

KEY = "streamed_neurons"
FILE_NAME = "neurons.bin"
SECTOR_BYTES = 512
FORMS = ("float32", "float16", "bfloat16")
MOST_WINDOW = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class NeuronLayout:
    """form: of numbers. parts: vectors of `width` numbers in a row, 2 or 3. ranks: of each layer's predictor.
    thresholds: a neuron whose score is above its layer's is loaded. held: held[k - 1][layer] rows hold what the last k
    tokens want.
    """

    form: str
    num_layers: int
    num_neurons: int
    width: int
    parts: int
    ranks: tuple[int, ...]
    thresholds: tuple[float, ...]
    held: tuple[tuple[int, ...], ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(ml_dtypes.bfloat16 if self.form == "bfloat16" else self.form)

    @property
    def row_bytes(self) -> int:
        """Of one neuron in the file and in memory, whole sectors."""
        return -(-self.parts * self.width * self.dtype.itemsize // SECTOR_BYTES) * SECTOR_BYTES

    @property
    def layer_bytes(self) -> int:
        return self.num_neurons * self.row_bytes

    @property
    def file_bytes(self) -> int:
        return self.num_layers * self.layer_bytes

    def rows(self, window: int) -> tuple[int, ...]:
        """Rows of each layer for a window of so many tokens, at most as many as there are."""
        return tuple(min(rows, self.num_neurons) for rows in self.held[min(window, len(self.held)) - 1])

    def to_json(self) -> dict[str, Any]:
        """What the configuration holds; sizes that it has elsewhere are left out."""
        whole = asdict(self)
        return {name: whole[name] for name in ("form", "ranks", "thresholds", "held")}

    @staticmethod
    def read(fields: Fields, *, num_layers: int, num_neurons: int, width: int, parts: int) -> NeuronLayout:
        """The checked layout; InputError names what is wrong."""
        fields.only("form", "ranks", "thresholds", "held")

        def of_layers(name: str, values: object, low: float, high: float, kinds: tuple[type, ...]) -> tuple[Any, ...]:
            good = isinstance(values, list) and len(values) == num_layers
            if not good or any(type(value) not in kinds or not low <= value <= high for value in values):  # type: ignore[attr-defined]
                raise fields.error(name, values, f"a list of {num_layers} numbers from {low:g} to {high:g}")
            return tuple(values)  # type: ignore[arg-type]

        windows = fields.items("held", MOST_WINDOW)
        if not windows:
            raise fields.error("held", windows, "a list with rows for one window at least")
        return NeuronLayout(
            form=fields.text("form", None, FORMS),
            num_layers=num_layers,
            num_neurons=num_neurons,
            width=width,
            parts=parts,
            ranks=of_layers("ranks", fields.values.get("ranks"), 1, 2**16, (int,)),
            thresholds=of_layers("thresholds", fields.values.get("thresholds"), -1e6, 1e6, (int, float)),
            held=tuple(of_layers("held", rows, 1, num_neurons, (int,)) for rows in windows),
        )
