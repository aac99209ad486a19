"""How good a stored form of a model is: KL divergence to the float model, perplexity and top-1 agreement over a text.

The float model (weights in the dtype of the source, float arithmetic, float32 cache) and the form under test see the
same tokens. Without a cache policy both take whole windows as prompts, so that only the weights differ; with one, the
form under test takes the first half of a window as its prompt and the rest one token at a time through its cache, as in
generation: so a cache that drops or codes prompt tokens has a prompt to do it to, and every cache is scored on the same
tokens. Logits are compared a few rows at a time and never kept.

Sums are over scored positions: position i is scored by what it says of token i + 1. KL(float || tested) is in nats,
the mean per position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memwall.engine.loading import RUNTIME_HEADROOM_BYTES, Settings, cache_shape, warm_up
from memwall.engine.lone_lora import lone_bytes, wear
from memwall.engine.session import Session, load
from memwall.errors import BudgetExceeded, DoesNotFit, InputError
from memwall.hardware.units import format_bytes
from memwall.kv import packs_positions, predict, tiers
from memwall.memory import Budget, resident_bytes
from memwall.memory.pages import round_up
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import ModelConfig
from memwall.models.decoder import activation_bytes, scratch_bytes
from memwall.models.lora import LoraWeights
from memwall.models.precision import bits_of, resolve, source_spec, weight_bytes
from memwall.models.ssm_decoder import buffer_shapes, ssm_scratch_bytes
from memwall.models.ssm_tables import table_bytes
from memwall.models.tokenizer import Tokenizer

LARGEST_TEXT_BYTES = 256 * 1024 * 1024
WINDOW_TOKENS = 1024
#: share of a window that is fed as a prompt before decoding through a cache; its own tokens are not scored
PROMPT_SHARE = 0.5
#: logits compared at once: this many numbers, so that a large vocabulary costs no more than a small one
COMPARED_VALUES = 1 << 20
COMPARING = "comparing"
"""Ledger owner of the rows that are compared."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """The result of one evaluation. kl_nats and top1_agreement are None when the float model is not at hand.

    bits_per_weight is over the matrices; kv_bits_per_value over the cache at its fullest: all bytes it then holds over
    the keys and values of all tokens it has taken in, dropped ones too; kv_bytes: these bytes. None when no policy was
    asked.
    """

    perplexity: float
    kl_nats: float | None
    top1_agreement: float | None
    tokens: int
    bits_per_weight: float
    kv_bits_per_value: float | None
    reference_perplexity: float | None = None
    kv_bytes: int | None = None


class Divergence:
    """Running sums over scored positions."""

    def __init__(self, work: np.ndarray | None = None) -> None:
        """work: float32 [3, V] to compare in; made on the heap when it is needed and not given."""
        self.tokens = 0
        self._work = work
        self._loss = self._reference_loss = self._kl = 0.0
        self._agreed = self._compared = 0

    def add(self, logits: np.ndarray, targets: np.ndarray, reference: np.ndarray | None) -> None:
        """logits and reference [n, V] float32, targets [n]: the tokens that really came next."""
        if self._work is None:
            self._work = np.empty((3, logits.shape[1]), np.float32)
        tested, truth, spare = self._work
        self.tokens += len(targets)
        for row, target in enumerate(targets):
            _log_softmax_of_row(logits[row], tested, spare)
            self._loss -= float(tested[target])
            if reference is None:
                continue
            _log_softmax_of_row(reference[row], truth, spare)
            self._reference_loss -= float(truth[target])
            self._agreed += int(logits[row].argmax() == reference[row].argmax())
            self._compared += 1
            np.subtract(truth, tested, out=tested)
            np.exp(truth, out=truth)
            np.multiply(truth, tested, out=spare)
            self._kl += float(spare.sum(dtype=np.float64))

    def figures(
        self, *, bits_per_weight: float, kv_bits_per_value: float | None, kv_bytes: int | None = None
    ) -> Figures:
        """The means so far. InputError where the model's outputs were no numbers."""
        if math.isnan(self._loss) or math.isnan(self._kl):
            raise InputError("the model's outputs are not numbers (NaN or infinite): its weights are damaged")
        compared = self._compared > 0
        return Figures(
            perplexity=_perplexity(self._loss / self.tokens),
            # rounding may leave a sum of nothing a hair below zero; KL has no negative values
            kl_nats=max(self._kl / self._compared, 0.0) if compared else None,
            top1_agreement=self._agreed / self._compared if compared else None,
            tokens=self.tokens,
            bits_per_weight=bits_per_weight,
            kv_bits_per_value=kv_bits_per_value,
            kv_bytes=kv_bytes,
            reference_perplexity=_perplexity(self._reference_loss / self._compared) if compared else None,
        )


class Evaluator:
    """One model and one text, ready to score any number of stored forms; the float model is loaded once."""

    def __init__(
        self,
        model: Path,
        text: str | Path,
        *,
        reference: Path | None = None,
        limit_tokens: int | None = None,
        window_tokens: int | None = None,
        prompt_tokens: int | None = None,
        threads: int | None = None,
        budget: Budget | None = None,
        lora: Path | None = None,
        stream: bool = False,
    ) -> None:
        """text: itself, or the file that holds it; limit_tokens: how much of it is used, None for all. prompt_tokens:
        of each window, where a cache is decoded through; None is PROMPT_SHARE.

        reference: folder of the float model, needed only where `model` holds compressed weights. budget: cap for this
        process. lora: an adapter that the forms under test wear, in PEFT's form; the float model does not. stream: the
        text is one window, however long, for caches that outgrow the model's positions; the float model, which does
        not, is left out where the text does.
        """
        self.model = model
        self.config = ModelConfig.from_directory(model)
        with Checkpoint(model, self.config) as checkpoint:
            packed = checkpoint.manifest is not None
            self._saved = resolve(self.config, "saved", checkpoint) if packed else None
        if limit_tokens is not None and limit_tokens < 2:
            raise InputError(f"limit is {limit_tokens} tokens; it must be at least 2")
        tokens = _encode(model, self.config, text)[:limit_tokens]
        longest = len(tokens) + 1 if stream else min(window_tokens or WINDOW_TOKENS, self.config.max_position)
        self.window_tokens = max(min(longest, len(tokens) + 1), 2)
        self.windows = _windows(self.config, tokens, self.window_tokens)
        if prompt_tokens is not None and not 1 <= prompt_tokens < self.window_tokens:
            raise InputError(
                f"a prompt of {prompt_tokens} tokens: windows have {self.window_tokens}, so it must be 1 to "
                f"{self.window_tokens - 1}"
            )
        self._prompt_tokens = prompt_tokens
        self._threads, self._budget = threads, budget
        self._lora = None if lora is None else LoraWeights.read(lora, self.config)
        self._source = reference or (model if self._saved is None else None)
        if self.window_tokens > self.config.max_position:
            self._source = None
        self._reference: Session | None = None
        warm_up({})  # or code that comes in at its first call, megabytes at a time, would be missing below
        self._runtime_bytes = resident_bytes(exact=True)

    def score(self, weights: str, kv: str | None = None, *, progress: Progress | None = None) -> Figures:
        """Evaluate one choice of weights, decoded through a cache of policy `kv` when one is given.

        DoesNotFit, with the budget that would do, when the float model and this one do not fit together.
        """
        specs = self._specs(weights)
        try:
            return self._score(weights, kv, specs, progress)
        except BudgetExceeded as refused:
            needed_bytes = self._needed_bytes(specs, kv or "float32")
            raise DoesNotFit(
                f"{refused}. The float model and {weights} beside it need some {format_bytes(needed_bytes)} in windows "
                f"of {self.window_tokens} tokens: try --memory {needed_bytes}"
            ) from refused

    def _score(self, weights: str, kv: str | None, specs: Mapping[str, str], progress: Progress | None) -> Figures:
        if self.window_tokens > self.config.max_position and not (kv and packs_positions(kv)):
            raise InputError(
                f"a stream of {self.window_tokens:,} tokens, and the model knows {self.config.max_position:,} "
                "positions: name a cache that numbers what it keeps, such as --kv 'lambda(sinks=4,window=512)'"
            )
        if self._reference is None and self._source is not None:
            self._reference = self._load(self._source, source_spec(self.config), "float32", exact=True)
        tested = self._load(self.model, weights, kv or "float32", exact=False)
        if self._lora is not None:
            wear(tested, self._lora)
        cache_bits: float | None = None
        cache_bytes: int | None = None
        try:
            with tested.arena.scratch(COMPARING, (3, self.config.vocab_size), np.float32) as work:
                sums = Divergence(work)
                for index, window in enumerate(self.windows):
                    first = 0 if kv is None else self.prompt_of(len(window)) - 1
                    self._score_window(tested, np.asarray(window), first, sums, decoded=kv is not None)
                    if kv is not None and (cache_bytes is None or tested.cache.nbytes > cache_bytes):
                        cache_bytes, cache_bits = tested.cache.nbytes, tested.cache.bits_per_value
                    tested.reset()
                    if progress is not None:
                        progress(index + 1, len(self.windows))
        finally:
            tested.release()
        return sums.figures(
            bits_per_weight=bits_of(self.config, specs), kv_bits_per_value=cache_bits, kv_bytes=cache_bytes
        )

    def prompt_of(self, window_tokens: int) -> int:
        """Tokens of a window that come as its prompt, so that at least one is left to decode."""
        wanted = self._prompt_tokens or int(PROMPT_SHARE * min(window_tokens, self.config.max_position))
        return max(min(wanted, window_tokens - 1), 1)

    def _score_window(
        self, tested: Session, window: np.ndarray, first: int, sums: Divergence, *, decoded: bool
    ) -> None:
        truth = self._reference
        truth_hidden = truth.decoder.hidden(window[:-1], truth.cache) if truth is not None else None
        if truth is not None:
            truth.reset()  # the hidden states are all that is needed of it
        hidden, begin = np.empty((0, 0), np.float32), 0
        if decoded:
            for size in tested.cache.begin_prompt(first + 1, tested.settings.segment_tokens):
                hidden = tested.decoder.hidden(window[begin : begin + size], tested.cache)[-1:]
                begin += size
        else:
            hidden = tested.decoder.hidden(window[:-1], tested.cache)
        step = self._compared_rows
        for begin in range(first, len(window) - 1, step):
            end = min(begin + step, len(window) - 1)
            reference = (
                truth.decoder.logits(truth_hidden[begin:end])
                if truth is not None and truth_hidden is not None
                else None
            )
            targets = window[begin + 1 : end + 1]
            if not decoded:
                sums.add(tested.decoder.logits(hidden[begin:end]), targets, reference)
                continue
            for position in range(begin, end):
                if position > first:
                    hidden = tested.decoder.hidden(window[position : position + 1], tested.cache)
                row = position - begin
                sums.add(
                    tested.decoder.logits(hidden),
                    targets[row : row + 1],
                    None if reference is None else reference[row : row + 1],
                )

    def _specs(self, weights: str) -> Mapping[str, str]:
        with Checkpoint(self.model, self.config) as checkpoint:
            return resolve(self.config, weights, checkpoint)

    def _needed_bytes(self, specs: Mapping[str, str], kv: str) -> int:
        """The peak of the process: both models, one of the caches (they take turns) and what is compared."""
        window, shape = self.window_tokens, cache_shape(self.config)
        segment = min(window, self.config.max_position)
        forms = [(specs, kv, False)]
        if self._source is not None:
            forms.append((resolve(self.config, source_spec(self.config)), "float32", True))
        held = sum(
            sum(round_up(size) for size in weight_bytes(self.config, form).values())
            + self._decoder_bytes(form, segment, exact=exact)
            for form, _, exact in forms
        )
        prompts = (window, self.prompt_of(window))
        cache = max(
            sum(n for owner, n in predict(policy, shape, held, prompt, window).items() if owner not in tiers(policy))
            for _, policy, _ in forms
            for held, prompt in ((window, prompts[1]), (prompts[0], prompts[0]))
        )
        if self._lora is not None:
            held += sum(round_up(size) for size in lone_bytes(self._lora, self.config).values())
        return self._runtime_bytes + held + cache + 12 * self.config.vocab_size + 2 * RUNTIME_HEADROOM_BYTES

    def _decoder_bytes(self, specs: Mapping[str, str], segment: int, *, exact: bool) -> int:
        rows = self._compared_rows
        if self.config.ssm is None:
            return activation_bytes(self.config, segment, rows) + scratch_bytes(
                self.config, specs, segment, exact=exact
            )
        buffers = buffer_shapes(self.config, segment, rows).values()
        held = sum(height * width * dtype.itemsize for (height, width), dtype in buffers)
        return held + ssm_scratch_bytes(self.config, specs, segment, exact=exact) + table_bytes(self.config)

    @property
    def _compared_rows(self) -> int:
        return max(1, min(64, COMPARED_VALUES // self.config.vocab_size))

    def _load(self, model: Path, weights: str, kv: str, *, exact: bool) -> Session:
        settings = Settings(
            weights=weights,
            kv=kv,
            context_tokens=self.window_tokens,
            segment_tokens=min(self.window_tokens, self.config.max_position),
            logit_rows=self._compared_rows,
            threads=self._threads,
            exact=exact,
        )
        return load(model, settings, budget=self._budget, beside=self._reference)


def evaluate(
    model: Path,
    text: str | Path,
    *,
    weights: str,
    kv: str | None = None,
    limit_tokens: int | None = None,
    reference: Path | None = None,
    prompt_tokens: int | None = None,
    threads: int | None = None,
    budget: Budget | None = None,
    lora: Path | None = None,
    stream: bool = False,
    progress: Progress | None = None,
) -> Figures:
    """Quality of one stored form over a text (or text file); see the module's words. InputError for a text that
    cannot be used.
    """
    evaluator = Evaluator(
        model,
        text,
        reference=reference,
        limit_tokens=limit_tokens,
        prompt_tokens=prompt_tokens,
        threads=threads,
        budget=budget,
        lora=lora,
        stream=stream,
    )
    return evaluator.score(weights, kv, progress=progress)


def _log_softmax_of_row(logits: np.ndarray, out: np.ndarray, spare: np.ndarray) -> None:
    np.subtract(logits, logits.max(), out=out)
    np.exp(out, out=spare)
    out -= np.log(spare.sum())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Row-wise log-probabilities of logits [n, V]; a new float32 array."""
    shifted: np.ndarray = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _perplexity(mean_loss: float) -> float:
    return math.exp(min(mean_loss, 700.0))  # past this a float overflows; such a model is broken either way


def read_text(path: Path) -> str:
    """A text file, checked: InputError when it is absent, too large, binary or not UTF-8."""
    try:
        size = path.stat().st_size
        if size > LARGEST_TEXT_BYTES:
            raise InputError(f"{path}: {size:,} bytes; the most read is {LARGEST_TEXT_BYTES:,}")
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start} is not valid); give a plain text file") from error
    if "\0" in text:
        raise InputError(f"{path}: holds zero bytes, so it is not a text; give a plain text file")
    return text


def _encode(model: Path, config: ModelConfig, text: str | Path) -> list[int]:
    """Tokens of the text itself: begin tokens are set at the head of each window instead."""
    name = str(text) if isinstance(text, Path) else "the text"
    content = read_text(text) if isinstance(text, Path) else text
    if not content.strip():
        raise InputError(f"{name}: is empty; give at least a few sentences")
    tokens = Tokenizer.from_directory(model).encode(content)
    return [token for token in tokens if token != config.bos_token_id]


def _windows(config: ModelConfig, tokens: Sequence[int], window_tokens: int) -> list[list[int]]:
    """Cut tokens into windows, each opened by the model's begin token; a last piece too short to score is left out."""
    opening = [config.bos_token_id] if config.bos_token_id is not None else []
    step = window_tokens - len(opening)
    if step < 1 or len(tokens) + len(opening) < 2:
        raise InputError(f"the text has {len(tokens)} tokens; at least 2 are needed")
    pieces = [opening + list(tokens[begin : begin + step]) for begin in range(0, len(tokens), step)]
    return [piece for piece in pieces if len(piece) >= 2]
