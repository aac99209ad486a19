"""How much each matrix suffers from few bits, measured: the loss that `allocate` weighs against bytes.

A form's *error* is the share of the matrix' squared outputs over the calibration text that it loses, trace(D H D^T) /
trace(W H W^T) with D the change of the weights. What an error does to the model differs between matrices a
hundredfold, but for one matrix it is proportional to the error (both are quadratic in the change). So one probe per
matrix gives the price of its errors: the Kullback-Leibler divergence of the model's predictions with that matrix alone
rounded, over its error. A form's loss is its error times the price, in nats per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from memwall import kernels
from memwall.compress.allocate import Candidate
from memwall.compress.base import MethodConfig, Statistics, WeightMethod
from memwall.compress.calibration import LayerStream
from memwall.formats import Packed, codec
from memwall.models.config import ModelConfig

# rows of a matrix that stand for all: the share lost hardly differs between rows, and a row's codes depend on it alone
SAMPLE_ROWS = 256
PROBE_TOKENS = 256
LOGIT_ROWS = 32
# a divergence below this drowns in float32 rounding
LEAST_NATS = 1e-8


def sample_rows(weight: np.ndarray) -> np.ndarray:
    """At most `SAMPLE_ROWS` rows [n, cols] float32, evenly spread."""
    return weight[_sampled(len(weight))].astype(np.float32)


def candidates(
    weight: np.ndarray, statistics: Statistics | None, specs: Sequence[str], probed: str, nats: float
) -> list[Candidate]:
    """Every form that a matrix may take, with its bytes and its loss.

    The loss of the form `probed` is `nats`, that of others in proportion to their errors. No statistics: H = I.
    """
    rows = sample_rows(weight)
    errors = {spec: _rounding_error(rows, statistics, spec) for spec in {*specs, probed}}
    price = nats / errors[probed] if errors[probed] > 0 else 0.0
    return [Candidate(spec=s, nbytes=codec(s).nbytes(weight.shape), loss=price * errors[s]) for s in specs]


def gain(weight: np.ndarray, statistics: Statistics | None, method: WeightMethod, config: MethodConfig) -> float:
    """What a method leaves of the error of rounding to nearest; nearly the same at every width, so one is measured."""
    rows = sample_rows(weight)
    error = _rounding_error(rows, statistics, config.spec)
    packed = method.compress(rows, statistics, config)
    return output_error(codec(config.spec).decode(packed) - rows, statistics) / error if error > 0 else 1.0


def _rounding_error(rows: np.ndarray, statistics: Statistics | None, spec: str) -> float:
    return output_error(codec(spec).decode(kernels.encode(spec, rows)) - rows, statistics)


def relative_error(weight: np.ndarray, packed: Packed, statistics: Statistics | None) -> float:
    """Share of the outputs' squared size that the packed form loses, over a sample of rows."""
    rows = sample_rows(weight)
    whole = output_error(rows, statistics)
    if not whole > 0:
        return 0.0
    if not codec(packed.spec).rows_apart:
        return output_error(codec(packed.spec).decode(packed)[_sampled(len(weight))] - rows, statistics) / whole
    decoded = np.empty_like(rows)  # these rows alone: the whole matrix in floats would be the most this run holds
    kernels.gather_rows(kernels.matrix(packed), _sampled(len(weight)), decoded)
    return output_error(decoded - rows, statistics) / whole


def output_error(difference: np.ndarray, statistics: Statistics | None) -> float:
    """Squared error of the outputs for a change of the weights; no statistics: H = I."""
    if statistics is None:
        return float(np.einsum("ij,ij->", difference, difference, dtype=np.float64))
    return statistics.error(difference)


class Probe:
    """The float model over a stretch of the calibration text, to compare it with models of one changed matrix."""

    def __init__(self, stream: LayerStream, embedding: Packed, head: Packed) -> None:
        self._stream = stream
        self._head = head
        self._num_layers = stream.config.num_layers
        self.tokens = stream.tokens[0, :PROBE_TOKENS]
        self._final = self.embedded(embedding)[None]
        self._finish(self._final, 0)

    @staticmethod
    def work_bytes(config: ModelConfig, num_forms: int) -> int:
        """Bytes held beside the embedding and the head while `num_forms` matrices of a layer are probed."""
        return 4 * ((num_forms + 3) * PROBE_TOKENS * config.hidden_size + 4 * LOGIT_ROWS * config.vocab_size)

    def embedded(self, embedding: Packed) -> np.ndarray:
        """Hidden states [tokens, hidden] at the first layer."""
        hidden = np.empty((len(self.tokens), self._stream.config.hidden_size), np.float32)
        kernels.gather_rows(kernels.matrix(embedding), self.tokens, hidden)
        return hidden

    def layer_nats(self, layer: int, hidden: np.ndarray, forms: Mapping[str, Packed]) -> dict[str, float]:
        """Divergence with each of `forms` alone in place; hidden [tokens, hidden] comes into the layer."""
        changed = np.repeat(hidden[None, : len(self.tokens)], len(forms), axis=0)
        for states, (name, packed) in zip(changed, forms.items(), strict=True):
            self._stream.run_layer(layer, states[None], {name: packed})
        self._finish(changed, layer + 1)
        return dict(zip(forms, self._divergence(changed, self._head), strict=True))

    def embedding_nats(self, embedding: Packed, *, tied: bool) -> float:
        """Divergence with this embedding in place, as the head too where they are tied."""
        changed = self.embedded(embedding)[None]
        self._finish(changed, 0)
        return self._divergence(changed, embedding if tied else self._head)[0]

    def head_nats(self, head: Packed) -> float:
        """Divergence with this head in place."""
        return self._divergence(self._final, head)[0]

    def _finish(self, hidden: np.ndarray, first_layer: int) -> None:
        for layer in range(first_layer, self._num_layers):
            self._stream.run_layer(layer, hidden)
        self._stream.norm(hidden)

    def _divergence(self, changed: np.ndarray, head: Packed) -> list[float]:
        """Mean over tokens of KL(float model, changed model) for each of the final hidden states."""
        reference, other = kernels.matrix(self._head), kernels.matrix(head)
        sums = np.zeros(len(changed))
        for start in range(0, len(self.tokens), LOGIT_ROWS):
            rows = slice(start, start + LOGIT_ROWS)
            expected = _log_softmax(_product(reference, self._final[0, rows]))
            chances = np.exp(expected)
            for index, states in enumerate(changed):
                found = _log_softmax(_product(other, states[rows]))
                sums[index] += float(np.sum(chances * (expected - found), dtype=np.float64))
        return [max(nats, LEAST_NATS) for nats in (sums / len(self.tokens)).tolist()]


def _product(matrix: kernels.Matrix, x: np.ndarray) -> np.ndarray:
    out = np.empty((len(x), matrix.rows), np.float32)
    kernels.linear(x, [matrix], [out], exact=True)
    return out


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits


def _sampled(num_rows: int) -> np.ndarray:
    count = min(num_rows, SAMPLE_ROWS)
    return np.linspace(0, max(num_rows - 1, 0), count).astype(np.int64)
