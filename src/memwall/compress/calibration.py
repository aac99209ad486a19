"""Calibration: a text runs through the model layer by layer; one collector gathers H = X^T X of all linear inputs.

The hidden states of all calibration tokens are kept ([sequences, tokens, hidden] float32), and only one layer's
weights are looked at at a time, through the file's map; so the cost in memory is the hidden states, one layer, and
the H of its inputs. Layers that read the same input (q, k and v; gate and up) share one H.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from memwall import kernels
from memwall.compress.base import PRODUCT_COLUMNS, Statistics
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.kernels import attention
from memwall.memory import Arena
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import EMBEDDING, ModelConfig
from memwall.models.decoder import Decoder, Observer
from memwall.models.tokenizer import Tokenizer
from memwall.models.weights import Weights

BUNDLED_TEXT = Path(__file__).with_name("calibration.txt")
MIN_TOKENS = 128
# rows gathered before they are multiplied: the product then costs far more than adding it to H
STAGED_ROWS = 512
OWNER = "calibration"

# the member of each group of linears with the same input that statistics are kept under
_SHARED = {"q_proj": "k_proj", "v_proj": "k_proj", "gate_proj": "up_proj", "w3": "w1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSettings:
    """How much text is read: at most `max_tokens`, in sequences of `sequence_tokens`."""

    max_tokens: int = 16_384
    sequence_tokens: int = 512

    def __post_init__(self) -> None:
        if not 0 < self.sequence_tokens <= self.max_tokens:
            raise InputError(
                f"calibration over {self.max_tokens} tokens in sequences of {self.sequence_tokens}: a sequence must "
                "have at least one token and at most all of them"
            )


def shared_input(name: str) -> str:
    """Name under which the statistics of a linear's inputs are kept: its own, or a neighbour's that reads the same."""
    head, _, last = name.removesuffix(".weight").rpartition(".")
    return f"{head}.{_SHARED.get(last, last)}.weight" if head else name


def read_text(path: Path, what: str = "calibration text") -> str:
    """A calibration text; refuses what is missing, empty or not text, in the name of `what`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{what} {path}: cannot be read: {error.strerror or error}") from None
    if not data.strip():
        hint = "; give some pages of the kind of text the model will read" if what.endswith("text") else ""
        raise InputError(f"{what} {path} is empty{hint}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{what} {path} is not text: byte {error.start} is not UTF-8") from None
    if "\0" in text:
        raise InputError(f"{what} {path} is binary: it holds NUL characters")
    return text


def token_sequences(
    text: str, tokenizer: Tokenizer, config: ModelConfig, settings: CalibrationSettings, source: str
) -> np.ndarray:
    """Token ids [sequences, tokens]; each sequence begins as the model expects a text to begin."""
    ids = tokenizer.encode(text, add_bos=False)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    length = min(settings.sequence_tokens, config.max_position, len(ids) + len(begin)) - len(begin)
    if len(ids) < MIN_TOKENS:
        raise InputError(f"calibration text {source} has {len(ids)} tokens; at least {MIN_TOKENS} are needed")
    num_sequences = max(min(len(ids), settings.max_tokens) // length, 1)
    sequences = np.array(ids[: num_sequences * length], np.int64).reshape(num_sequences, length)
    start = np.broadcast_to(np.array(begin, np.int64), (num_sequences, len(begin)))
    return np.concatenate([start, sequences], axis=1)


class PromptCache:
    """Keys and values of the one sequence and layer being worked on; a `DecoderCache` that forgets at once."""

    length = 0

    takes_inputs: ClassVar[bool] = False
    records: ClassVar[bool] = False

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._k = self._v = np.empty(0, np.float32)

    @property
    def next_position(self) -> int:
        return self.length

    def take_inputs(self, layer: int, x: np.ndarray, positions: np.ndarray) -> None:
        """Not asked for."""

    def append(self, layer: int, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
        self._k, self._v = k, v

    def attend(self, layer: int, q: np.ndarray, positions: np.ndarray, out: np.ndarray) -> np.ndarray:
        attention.attend_float(
            q,
            self._k,
            self._v,
            scale=self._config.head_dim**-0.5,
            first_position=int(positions[0]),
            window=self._config.sliding_windows[layer],
            out=out,
        )
        return out

    def settle(self, layer: int) -> None:
        """Nothing to compress: the next layer's keys replace these."""

    def truncate(self, length: int) -> None:
        """Nothing is held between calls."""


class Collector:
    """Observer of a decoder that accumulates statistics for the names it was made for, ignoring all others."""

    def __init__(self, columns: dict[str, int], arena: Arena) -> None:
        self._arena = arena
        self.statistics: dict[str, Statistics] = {}
        self._staged: dict[str, tuple[np.ndarray, int]] = {}
        self._work = arena.charge(OWNER, self.work_bytes(max(columns.values(), default=0)))
        try:
            for name, count in columns.items():
                self.statistics[name] = Statistics(arena.allocate(OWNER, (count, count), np.float32))
                self._staged[name] = (arena.allocate(OWNER, (STAGED_ROWS, count), np.float32), 0)
        except BaseException:
            self.release()
            raise

    @staticmethod
    def nbytes(num_columns: int) -> int:
        """Bytes held per input width."""
        return 4 * num_columns * (num_columns + STAGED_ROWS)

    @staticmethod
    def work_bytes(num_columns: int) -> int:
        """Bytes held once while the widest input's rows are multiplied."""
        return 4 * num_columns * min(num_columns, PRODUCT_COLUMNS)

    def __call__(self, name: str, x: np.ndarray) -> None:
        if name not in self._staged:
            return
        staged, count = self._staged[name]
        while len(x):
            taken = min(len(x), STAGED_ROWS - count)
            staged[count : count + taken] = x[:taken]
            x, count = x[taken:], count + taken
            if count == STAGED_ROWS:
                self.statistics[name].gather(staged)
                count = 0
        self._staged[name] = (staged, count)

    def finish(self) -> dict[str, Statistics]:
        """The statistics, with all rows taken in."""
        for name, (staged, count) in self._staged.items():
            if count:
                self.statistics[name].gather(staged[:count])
            self.statistics[name].mirror()
            self._staged[name] = (staged, 0)
        self._work.resize(0)
        return self.statistics

    def release(self) -> None:
        """Gives the memory back; the statistics are of no more use."""
        for staged, _ in self._staged.values():
            self._arena.free(staged)
        for statistics in self.statistics.values():
            self._arena.free(statistics.hessian)
        self._work.release()
        self._staged, self.statistics = {}, {}


class Sampler:
    """Observer that keeps some rows of each input, evenly over the text, and the largest magnitude of each column.

    columns: name of an input -> its width. rows: at most so many of the `tokens` that will be seen.
    """

    def __init__(self, columns: Mapping[str, int], rows: int, tokens: int, arena: Arena) -> None:
        self._step = -(-tokens // max(rows, 1))
        self._arena = arena
        self._seen = dict.fromkeys(columns, 0)
        self._rows = {
            name: arena.allocate(OWNER, (min(rows, tokens), width), np.float32) for name, width in columns.items()
        }
        self.peaks = {name: np.zeros(width, np.float32) for name, width in columns.items()}

    def __call__(self, name: str, x: np.ndarray) -> None:
        if name not in self._rows:
            return
        seen, kept = self._seen[name], self._rows[name]
        np.maximum(self.peaks[name], np.abs(x).max(axis=0, initial=0), out=self.peaks[name])
        rows = x[-seen % self._step :: self._step]
        first = -(-seen // self._step)
        kept[first : first + len(rows)] = rows
        self._seen[name] = seen + len(x)

    def sample(self, name: str) -> np.ndarray:
        """The rows kept of one input [at most `rows`, width]; none where nothing read it (an expert without tokens)."""
        return self._rows[name][: -(-self._seen[name] // self._step)]

    def release(self) -> None:
        """Gives the memory back."""
        for kept in self._rows.values():
            self._arena.free(kept)
        self._rows = {}


class LayerStream:
    """A model's layers in turn over all calibration tokens. Weights are those of the checkpoint until `replace`d."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        tokens: np.ndarray,
        arena: Arena,
        specs: Mapping[str, str] | None = None,
    ) -> None:
        """specs: the forms that weights will be replaced by, as products with them need scratch too."""
        self.config = config
        self.checkpoint = checkpoint
        self.tokens = tokens
        self.arena = arena
        tensors = config.tensors()
        self._weights = Weights(matrices={}, vectors={}, specs=specs or {})
        self.use(checkpoint)
        self._layer_names = [
            [t.name for t in tensors if t.layer == layer and len(t.shape) == 2] for layer in range(config.num_layers)
        ]
        num_sequences, length = tokens.shape
        self._decoder = Decoder(config, self._weights, arena, segment_tokens=length, exact=True)
        self.hidden = arena.allocate(OWNER, (num_sequences, length, config.hidden_size), np.float32)
        self._work = arena.allocate(OWNER, (length, config.hidden_size), np.float32)

    def release(self) -> None:
        """Gives the memory back; the stream is of no more use."""
        self._decoder.release()
        self.arena.free(self.hidden)
        self.arena.free(self._work)

    def use(self, checkpoint: Checkpoint) -> None:
        """Go on with the weights of another checkpoint of the same shape."""
        self.checkpoint = checkpoint
        for tensor in self.config.tensors():
            if len(tensor.shape) == 1:
                values = checkpoint.alone(tensor.name).astype(np.float32)
                # in place: the decoder has looked its norms up
                np.copyto(self._weights.vectors.setdefault(tensor.name, values), values)

    def take_vectors(self, packed: Mapping[str, Packed]) -> None:
        """Norms and biases among `packed` in place of the checkpoint's."""
        for name, form in packed.items():
            if name in self._weights.vectors:
                np.copyto(self._weights.vectors[name], codec(form.spec).decode(form))

    def embed(self, packed: Packed | None = None) -> None:
        """Begin: the hidden states are the embeddings of the tokens."""
        matrix = kernels.matrix(packed if packed is not None else float_packed(self.checkpoint, EMBEDDING))
        for ids, hidden in zip(self.tokens, self.hidden, strict=True):
            kernels.gather_rows(matrix, ids, hidden)

    def collect(self, layer: int, names: Sequence[str], *, advance: bool = False) -> Collector:
        """Statistics of the inputs of `names` in one layer; the hidden states stay where they are, or `advance`."""
        specs = {t.name: t for t in self.config.tensors() if t.layer == layer}
        collector = Collector({shared_input(name): specs[name].shape[1] for name in names}, self.arena)
        try:
            self._seen_by(collector, layer, advance=advance)
        except BaseException:
            collector.release()
            raise
        return collector

    def sample(self, layer: int, names: Sequence[str], rows: int, *, advance: bool = False) -> Sampler:
        """At most `rows` rows of the inputs of `names` in one layer; the hidden states stay, or `advance`."""
        widths = {t.name: t.shape[1] for t in self.config.tensors() if t.name in names}
        columns = {shared_input(name): widths[name] for name in names}
        sampler = Sampler(columns, rows, self.tokens.size, self.arena)
        try:
            self._seen_by(sampler, layer, advance=advance)
        except BaseException:
            sampler.release()
            raise
        return sampler

    def _seen_by(self, observer: Observer, layer: int, *, advance: bool) -> None:
        with self._weights_of(layer, {}):
            self._decoder.observer = observer
            for hidden in self.hidden:
                states = hidden if advance else self._work
                if not advance:
                    np.copyto(states, hidden)
                self._decoder.run_layer(layer, states, PromptCache(self.config))

    def observe(self, layer: int, observer: Observer) -> None:
        """Move the hidden states through one layer while `observer` sees the inputs of its linears, block by block."""
        with self._weights_of(layer, {}):
            self._decoder.observer = observer
            for states in self.hidden:
                self._decoder.run_layer(layer, states, PromptCache(self.config))

    def advance(self, layer: int, packed: Mapping[str, Packed] | None = None) -> None:
        """Move the hidden states through one layer, `packed` forms in place of the checkpoint's weights."""
        self.run_layer(layer, self.hidden, packed)

    def run_layer(
        self,
        layer: int,
        hidden: np.ndarray,
        packed: Mapping[str, Packed] | None = None,
        cache: PromptCache | None = None,
    ) -> None:
        """Any hidden states [sequences, at most `length` tokens, hidden] through one layer, in place.

        cache: sees the keys, values and queries of each sequence in turn; it settles after each.
        """
        with self._weights_of(layer, packed or {}):
            for states in hidden:
                self._decoder.run_layer(layer, states, cache or PromptCache(self.config))

    def norm(self, hidden: np.ndarray) -> None:
        """The norm after the last layer, in place."""
        for states in hidden:
            self._decoder.last_norm.into(states, states)

    def collect_final(self, name: str) -> Collector:
        """Statistics of the head's inputs; call it after the last layer. The hidden states are normed afterwards."""
        collector = Collector({name: self.config.hidden_size}, self.arena)
        self.norm(self.hidden)
        for hidden in self.hidden:
            collector(name, hidden)
        return collector

    @contextmanager
    def _weights_of(self, layer: int, packed: Mapping[str, Packed]) -> Iterator[None]:
        """One layer's matrices in place; afterwards their pages leave the resident set, with the maps."""
        names = self._layer_names[layer]
        mapped = sum(packed[name].nbytes if name in packed else self.checkpoint.stored_bytes(name) for name in names)
        charge = self.arena.charge("weights/source", mapped)
        for name in names:
            form = packed[name] if name in packed else float_packed(self.checkpoint, name)
            self._weights.matrices[name] = kernels.matrix(form)
        try:
            yield
        finally:
            self._decoder.observer = None
            for name in names:
                del self._weights.matrices[name]
            charge.release()


def float_packed(checkpoint: Checkpoint, name: str) -> Packed:
    """A float tensor of the checkpoint as a map holds it (float64, which no kernel reads, as float32)."""
    tensor = checkpoint.alone(name)
    spec = tensor.dtype.name
    if spec == "float64":
        return codec("float32").encode(tensor)
    return Packed(spec=spec, shape=tensor.shape, buffers={"values": tensor})
