"""One model in one weight format, as the study of formats sees it: it continues prompts and says how likely texts are.

Linear layers are in the format; embedding and head stay bfloat16 and vectors float32, for every format. Products are in
float arithmetic over the decoded weights, so that formats differ by their weights alone (`int8` rounds activations too:
that is what it is). The random number of a step is given by prompt, seed and step (`engine.counter`), so that formats
part ways only where they disagree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from memwall import kv
from memwall.engine.counter import CounterDraws
from memwall.engine.loading import cache_shape
from memwall.engine.sampling import Sampler, Sampling
from memwall.errors import InputError
from memwall.hardware import available_memory_bytes
from memwall.memory import Arena, Ledger
from memwall.models import Checkpoint, ModelConfig
from memwall.models.decoder import Decoder
from memwall.models.precision import LAYER_ADAPTIVE, resolve
from memwall.models.ssm_decoder import SsmDecoder
from memwall.models.tokenizer import Tokenizer
from memwall.models.weights import load_weights
from memwall.studies import llm_int8

BASE = "bf16"
FORMATS = {
    BASE: "bfloat16", "int8": llm_int8.NAME, "nf4": "nf4", "nf4-dq": "nf4-dq", "fp4": "fp4", "fp4-dq": "fp4-dq",
}  # fmt: skip
"""The study's name of a format -> what linear layers are stored as; any format of `--weights` may be named besides."""
FOUR_BIT = ("nf4", "nf4-dq", "fp4", "fp4-dq")
PROMPTS = (
    "The history of the city begins",
    "In the morning the old man",
    "The first thing she saw was",
    "Water is made of",
    "The king and his two sons",
    "A long time ago, in a village",
    "The machine was built to",
    "He opened the letter and read",
    "The war ended in",
    "Among the animals of the forest",
)
MOST_SEGMENT = 512


def specs_of(config: ModelConfig, form: str) -> dict[str, str]:
    """Codec of every tensor, embedding and head in bfloat16. InputError for a format that is not known."""
    if form == "int8":
        return {
            t.name: llm_int8.spec_of(t.shape[1]) if t.role in ("linear", "expert") else _beside(t.role)
            for t in config.tensors()
        }
    choice = FORMATS.get(form, form)
    if choice in ("saved", "auto") or choice.startswith(("mixed", LAYER_ADAPTIVE)):
        raise InputError(f"format {form!r}: the study takes one format for all linear layers, such as nf4 or int4-g64")
    found = resolve(config, choice)
    return {t.name: found[t.name] if t.role in ("linear", "expert") else _beside(t.role) for t in config.tensors()}


def _beside(role: str) -> str:
    return "bfloat16" if role in ("embedding", "head") else "float32"


class FormatModel:
    """The model in one format. Logits are [V] float32 and hold until the next call."""

    def __init__(
        self,
        directory: Path,
        form: str,
        *,
        context_tokens: int = 0,
        exact: bool = True,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """context_tokens: 0 for all that the model has. exact: see the module's text; False multiplies as `memwall
        run` does, with activations rounded to integers, which is faster.
        """
        self.form = form
        self.config = config = ModelConfig.from_directory(directory)
        self.context_tokens = min(context_tokens or config.max_position, config.max_position)
        self.ledger = Ledger()
        # refuse what the machine does not have, rather than be killed for taking it
        self.arena = arena = Arena(available_memory_bytes(), self.ledger)
        segment = min(self.context_tokens, MOST_SEGMENT)
        specs = specs_of(config, form)
        decoder: Decoder | SsmDecoder
        if form == "int8":
            decoder = llm_int8.load(directory, config, arena, segment_tokens=segment)
        else:
            with Checkpoint(directory, config) as checkpoint:
                weights = load_weights(config, checkpoint, specs, arena)
            kind = Decoder if config.ssm is None else SsmDecoder
            decoder = kind(config, weights, arena, segment_tokens=segment, exact=exact)
        self.decoder = cast(Decoder, decoder)  # Mamba's has what is called here, and takes the cache built below
        self.tokenizer = tokenizer or Tokenizer.from_directory(directory)
        held = "float32" if config.ssm is None else "state"
        self.cache = kv.build(held, cache_shape(config), arena, self.context_tokens)
        self._work = arena.allocate("comparing", Sampler.scratch_shape(config.vocab_size), np.float32)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, as the ledger has them."""
        return sum(row.nbytes for row in self.ledger.rows() if row.owner.startswith("weights/"))

    @property
    def bits_per_weight(self) -> float:
        """True bits per number of the linear layers, scales included, of real buffers."""
        held = self.decoder.weights.matrices
        linears = [t for t in self.config.tensors() if t.role in ("linear", "expert")]
        if isinstance(self.decoder, llm_int8.Int8Decoder | llm_int8.Int8SsmDecoder):
            nbytes = sum(matrix.nbytes for matrix in self.decoder.products.linears.values())
        else:
            nbytes = sum(held[t.name].nbytes for t in linears)
        return 8 * nbytes / sum(t.size for t in linears)

    def encode(self, prompt: str) -> list[int]:
        """Tokens of a prompt, opened as the model wants it."""
        opening = [] if self.config.bos_token_id is None else [self.config.bos_token_id]
        return [*opening, *self.tokenizer.encode(prompt, add_bos=False)]

    def feed(self, tokens: Sequence[int]) -> np.ndarray:
        """Takes a prompt into the empty cache; hidden state [1, H] of its last token."""
        self.cache.truncate(0)
        hidden, begin = np.empty((0, 0), np.float32), 0
        for size in self.cache.begin_prompt(len(tokens), self.decoder.segment_tokens):
            hidden = self.decoder.hidden(np.asarray(tokens[begin : begin + size]), self.cache)[-1:]
            begin += size
        return hidden

    def sample(
        self, prompt: Sequence[int], draws: CounterDraws, *, temperature: float, top_k: int, num_tokens: int
    ) -> list[int]:
        """A continuation of up to `num_tokens`; it ends before the model's end token."""
        sampler = Sampler(Sampling(temperature=temperature, top_k=top_k, max_new_tokens=num_tokens), self._work)
        logits, made = self.decoder.logits(self.feed(prompt))[0], []
        for step in range(num_tokens):
            token = sampler.pick(logits, draws.at(step))
            if token in self.config.eos_token_ids:
                break
            made.append(token)
            if step + 1 < num_tokens:
                logits = self.decoder.forward(np.asarray([token]), self.cache)
        return made

    def rows(self, prompt: Sequence[int], made: Sequence[int]) -> Iterator[np.ndarray]:
        """Logits [V] before each token of `made`, all fed as one prompt."""
        self.cache.truncate(0)
        tokens = [*prompt, *made][:-1]
        first, begin = len(prompt) - 1, 0
        for size in self.cache.begin_prompt(len(tokens), self.decoder.segment_tokens):
            hidden = self.decoder.hidden(np.asarray(tokens[begin : begin + size]), self.cache)
            for row in range(max(first - begin, 0), size):
                yield self.decoder.logits(hidden[row : row + 1])[0]
            begin += size

    def losses(self, prompt: Sequence[int], made: Sequence[int]) -> list[float]:
        """-log p of each token of a continuation, in nats."""
        return [-float(self.log_softmax(row)[token]) for row, token in zip(self.rows(prompt, made), made)]

    def log_softmax(self, logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """Log-probabilities [V], in a buffer of this model's own."""
        out, spare = self._work[0], self._work[1]
        np.subtract(logits, logits.max(), out=out)
        out /= np.float32(temperature)
        np.exp(out, out=spare)
        out -= np.log(spare.sum(dtype=np.float64)).astype(np.float32)
        return out

    def release(self) -> None:
        """Gives memory back."""
        self.arena.free(self._work)
        self.cache.release()
        self.decoder.release()
        self.decoder.weights.release()


def forced(base: FormatModel, tested: FormatModel, prompt: Sequence[int], made: Sequence[int], temperature: float
           ) -> tuple[float, float]:  # fmt: skip
    """(mean KL(base || tested) in nats at this temperature, share of the same likeliest token) along a fixed text."""
    total, agreed = 0.0, 0
    for truth, mine in zip(base.rows(prompt, made), tested.rows(prompt, made), strict=True):
        agreed += int(truth.argmax() == mine.argmax())
        ours, theirs = tested.log_softmax(mine, temperature), base.log_softmax(truth, temperature)
        total += float(np.dot(np.exp(theirs), theirs - ours))
    return max(total / len(made), 0.0), agreed / len(made)
