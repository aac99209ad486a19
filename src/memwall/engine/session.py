"""Load a model inside a budget and generate from it.

`load` builds the session: what `loading` brings in, and a cache.
`Session.generate` streams text and stops, before any byte over the budget is touched, when the cache can't grow.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from memwall import kv
from memwall.engine import elastic
from memwall.engine.loading import Settings, cache_shape, load_decoder
from memwall.engine.sampling import Sampler, Sampling, StopWatcher, bend
from memwall.errors import BudgetExceeded, DoesNotFit, InputError
from memwall.kv import chunk_prefill
from memwall.kv.saved import EXACT, Origin, SavedCache, check_saving, save
from memwall.memory import Arena, Budget, Ledger, resident_bytes
from memwall.models.config import ModelConfig
from memwall.models.decoder import Decoder
from memwall.models.tokenizer import Tokenizer
from memwall.models.weights import Progress

if TYPE_CHECKING:
    from memwall.kv.chunk_prefill import Outcome
    from memwall.kv.chunk_prompt import ChunkPrompt
    from memwall.kv.chunk_store import ChunkStore
    from memwall.kv.remote import RemoteCache

log = logging.getLogger("memwall.engine")
SAMPLING = "sampling"
"""Ledger owner of what drawing a token works in; greedy runs have none."""

# What must stay free of the arena's headroom at any moment; when the heap has grown into it, the cache gets less.
LEAST_HEADROOM_BYTES = 3 << 18


@dataclass(slots=True)
class Timings:
    """Wall-clock seconds of the phases of one generation."""

    load_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0


@dataclass(slots=True)
class Generation:
    """What one call of `generate` made; complete once its iterator has ended.

    prompt_tokens: those fed; loaded_tokens: those before them that came from a saved cache.
    stop_reason: "eos", "stop", "length" (max_new_tokens), "context" (the cache holds all the tokens it was built for)
    or "budget" (the next token's keys and values would have crossed the memory budget; `message` says so).
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    loaded_tokens: int = 0
    stop_reason: str = ""
    message: str = ""
    timings: Timings = field(default_factory=Timings)


class Session:
    """A loaded model with its cache; successive `generate` calls continue the same conversation until `reset`."""

    def __init__(
        self,
        *,
        settings: Settings,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        decoder: Decoder,
        cache: kv.KVCache,
        arena: Arena,
        ledger: Ledger,
        load_seconds: float,
        model: kv.CacheModel | None = None,
    ) -> None:
        self.settings = settings
        self.config = config
        self.tokenizer = tokenizer
        self.decoder = decoder
        self.cache = cache
        self.arena = arena
        self.ledger = ledger
        self.load_seconds = load_seconds
        self.model = model
        self.budget_bytes: int | None = None
        self.asked_bytes: int | None = None
        """The budget last asked for; the session is on its way there."""
        self.last = Generation()
        self.held: list[int] = []
        """Ids of the tokens that the cache has taken in."""
        self._unfed: list[int] = []
        self._sampling_scratch: np.ndarray | None = None

    def release(self) -> None:
        """Give all memory back; the session is of no more use."""
        self.cache.release()
        self.decoder.release()
        self.decoder.weights.release()
        if self._sampling_scratch is not None:
            self.arena.free(self._sampling_scratch)
            self._sampling_scratch = None

    def set_budget(self, nbytes: int) -> None:
        """A new budget for the whole process, at once; call it between two tokens. A model that is a stack of blocks
        drops or reads some, without being loaded again. DoesNotFit, with nothing changed, where it is too small.
        """
        elastic.set_budget(self, nbytes)
        self.asked_bytes = nbytes

    def ask_budget(self, nbytes: int) -> None:
        """The same before the next token, from any thread or signal handler; at least what can be kept to."""
        self.asked_bytes = nbytes

    def reset(self) -> None:
        """Forget the conversation."""
        self.rewind(0)

    def rewind(self, num_tokens: int) -> int:
        """Forget all but the first `num_tokens` of what was fed and made; returns how many the cache really kept.

        The last token made is not in the cache until the next one is asked for, so one less than asked may be kept.
        """
        kept = self.cache.rewindable(min(num_tokens, self.cache.length))
        self.cache.truncate(kept)
        del self.held[kept:]
        self._unfed = []
        return kept

    def save_cache(self, path: Path, codec: str = EXACT) -> int:
        """Write what the cache holds to a file, which is whole or not there; gives its bytes.

        codec: `exact` keeps the cache's own stored form to the bit; else a codec of `kv.saved`.
        """
        return save(path, self.cache, self.held, self.origin(), codec, self.model)

    def check_saving(self, codec: str = EXACT) -> None:
        """InputError when `save_cache` with this codec would refuse, so that a run need not come to its end for it."""
        check_saving(self.cache, codec, self.model)

    def load_cache(self, saved: SavedCache | RemoteCache, prompt: list[int]) -> int:
        """Go on from a saved cache: takes the longest beginning that it shares with the prompt; gives its tokens.

        The rest of the prompt, one token at least, is for `generate` to prefill. The cache must be empty. InputError
        for a file of another model, other weights or another policy, or one that was altered.
        """
        origin = self.origin()
        saved.check_model(origin.model)
        saved.check_weights(origin)
        saved.check_policy(self.cache.policy)
        saved.verify()
        shared = min(saved.shared_tokens(prompt), self.cache.capacity_tokens)
        if shared > 0:
            assert self.model is not None
            saved.fill(self.cache, shared, self.model, self.decoder)
        self.held = list(prompt[: self.cache.length])
        return self.cache.length

    def origin(self) -> Origin:
        """Whose keys and values these are: model and weights."""
        if self.model is None:
            raise ValueError("this session was made without its model's folder; load() gives one that knows it")
        weights = self.decoder.weights.specs
        return Origin(model=self.model.fingerprint, weights=self.settings.weights, specs=weights)

    def prefill(self, tokens: list[int]) -> np.ndarray:
        """Feed prompt tokens in segments; returns the last token's logits [V] (the decoder's buffer)."""
        if not tokens:
            raise InputError("the prompt is empty; give at least one token")
        needed = self.cache.length + len(tokens)
        if needed > self.settings.context_tokens:
            raise InputError(
                f"the prompt has {len(tokens)} tokens and {self.cache.length} are held already, but the context is "
                f"{self.settings.context_tokens}; shorten it or pass --context {needed}"
            )
        logits = np.empty(0, np.float32)
        begin = 0
        for count in self.cache.begin_prompt(len(tokens), self.settings.segment_tokens):
            self._take_up_budget()
            logits = self.decoder.forward(np.asarray(tokens[begin : begin + count]), self.cache)
            self.held += tokens[begin : begin + count]
            begin += count
        return logits

    def prefill_chunks(self, store: ChunkStore, prompt: ChunkPrompt, *, alpha: float) -> Outcome:
        """Feed a prompt made of chunks (`kv.chunk_prefill`) to the empty cache, in place of `prefill`."""
        needed = len(prompt.tokens)
        if needed > self.settings.context_tokens:
            raise InputError(
                f"opening, chunks and question have {needed} tokens, but the context is "
                f"{self.settings.context_tokens}; take fewer chunks or pass --context {needed}"
            )
        outcome = chunk_prefill.prefill(self.decoder, self.cache, store, prompt, alpha=alpha)
        self.held = prompt.tokens
        return outcome

    def generate(
        self, prompt: list[int], sampling: Sampling, feed: Callable[[list[int]], np.ndarray] | None = None
    ) -> Iterator[str]:
        """Yield text as it is made; `last` holds the whole result, also while running and when it stops early.

        feed: what takes the prompt in and gives the last token's logits (`prefill` unless given).
        """
        result = self.last = Generation(prompt_tokens=len(prompt))
        result.timings.load_seconds = self.load_seconds
        began = time.perf_counter()
        try:
            self.prepare(sampling)
            logits = (feed or self.prefill)(self._unfed + list(prompt))
        except BudgetExceeded as refused:
            self._stop_at_budget(result, refused)
            return
        result.timings.prefill_seconds = time.perf_counter() - began
        result.timings.prefill_tokens_per_s = len(prompt) / result.timings.prefill_seconds
        yield from self._decode(logits, sampling, result)

    def prepare(self, sampling: Sampling) -> None:
        """Take the memory that drawing tokens needs, once; `generate` does so by itself. BudgetExceeded if there is
        none left.
        """
        if sampling.temperature > 0 and self._sampling_scratch is None:
            shape = Sampler.scratch_shape(self.config.vocab_size)
            self._sampling_scratch = self.arena.allocate(SAMPLING, shape, np.float32)

    def _decode(self, logits: np.ndarray, sampling: Sampling, result: Generation) -> Iterator[str]:
        sampler, watcher = Sampler(sampling, self._sampling_scratch), StopWatcher(sampling.stop)
        stream = self.tokenizer.stream() if self.tokenizer is not None else None
        began = time.perf_counter()
        while not result.stop_reason:
            bend(logits, result.tokens, sampling)
            token = sampler.pick(logits)
            if token in self.config.eos_token_ids and not sampling.ignore_eos:
                result.stop_reason = "eos"
                break
            result.tokens.append(token)
            self._unfed = [token]
            shown, met = watcher.push(stream.push(token) if stream is not None else "")
            result.text += shown
            if shown:
                yield shown
            if met:
                result.stop_reason = "stop"
            elif len(result.tokens) == sampling.max_new_tokens:
                result.stop_reason = "length"
            elif self.cache.length == self.settings.context_tokens:
                result.stop_reason = "context"
                result.message = f"stopped at the context of {self.settings.context_tokens} tokens"
            else:
                try:
                    self._take_up_budget()
                    self._hold_budget()
                    logits = self.decoder.forward(np.asarray([token]), self.cache)
                    self.held.append(token)
                    self._unfed = []
                except BudgetExceeded as refused:
                    self._stop_at_budget(result, refused)
        result.timings.decode_seconds = time.perf_counter() - began
        # the first token comes out of prefill; decoding made the others
        result.timings.decode_tokens_per_s = max(len(result.tokens) - 1, 0) / max(result.timings.decode_seconds, 1e-9)
        rest = (
            watcher.push(stream.flush())[0] + watcher.flush()
            if stream is not None and result.stop_reason != "stop"
            else ""
        )
        result.text += rest
        if rest:
            yield rest

    def _take_up_budget(self) -> None:
        """A budget that was asked for meanwhile becomes the session's."""
        asked = self.asked_bytes
        if asked is not None and asked != self.budget_bytes:
            try:
                elastic.set_budget(self, asked)
            except DoesNotFit:
                least = elastic.least_budget_bytes(self)
                log.warning("a budget of %d bytes is too small; the session keeps to %d", asked, least)
                elastic.set_budget(self, least)
            if self.asked_bytes == asked:
                self.asked_bytes = self.budget_bytes

    def _hold_budget(self) -> None:
        """Lower the cap by what the process has come to hold outside the arena: the whole stays in budget."""
        if self.budget_bytes is None:
            return
        outside = resident_bytes() - self.arena.used_bytes
        cap = self.budget_bytes - outside - LEAST_HEADROOM_BYTES
        stack = self.decoder.weights.stack
        if cap < self.arena.used_bytes and stack is not None:  # its last blocks make room
            stack.resize(min(stack.longest(stack.nbytes - (self.arena.used_bytes - cap)), stack.num_blocks))
        if cap < self.arena.cap_bytes:
            self.arena.set_cap(max(cap, self.arena.used_bytes))

    def _stop_at_budget(self, result: Generation, refused: BudgetExceeded) -> None:
        result.stop_reason = "budget"
        result.message = (
            f"stopped at the memory budget after {self.cache.length} tokens of context: {refused}. "
            "The text so far is kept; for a longer one raise --memory or use a smaller cache, such as --kv 'kivi(2bit)'"
        )


def load(
    model: Path,
    settings: Settings,
    *,
    budget: Budget | None = None,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
    beside: Session | None = None,
) -> Session:
    """Build a session for a model directory.

    budget: its `ram` is the resident set of the whole process, this interpreter included; None means no cap but the
    machine's. beside: a session of this process whose arena, and so its budget, is shared. Raises InputError for bad
    input and BudgetExceeded when the settings don't fit.
    """
    began = time.perf_counter()
    shared = beside.arena if beside is not None else None
    loaded = load_decoder(model, settings, budget=budget, progress=progress, beside=shared)
    config, weights, decoder, arena = loaded.config, loaded.weights, loaded.decoder, loaded.arena
    behind = kv.CacheModel(config=config, weights=weights, directory=model)
    cache = kv.build(settings.kv, cache_shape(config), arena, settings.context_tokens, behind)
    session = Session(
        settings=settings,
        config=config,
        tokenizer=tokenizer,
        decoder=decoder,
        cache=cache,
        arena=arena,
        ledger=loaded.ledger,
        load_seconds=time.perf_counter() - began,
        model=behind,
    )
    session.budget_bytes = budget.ram if budget is not None else None
    return session
