"""EpiCache: a long conversation is kept as several small caches, one an episode, and a question gets the one it is
about.

Source: EpiCache: Episodic KV Cache Management for Long Conversational Question Answering; Kim et al., 2025, arXiv
2509.17396; official code github.com/apple/ml-epicache.
Idea: evicting block by block bounds the peak, but needs a stand-in for the questions that will come. The history is
clustered into episodes (`kv.episodes`); the central passages of each make a patched prompt. The history is read once an
episode: after each block the patched prompt is run on what is cached, every cached unit is scored by the most attention
that any of the prompt's queries gives it, and the best of the layer stay, whatever their heads. Layers whose keys
change much when attention is cut into blocks get more units.
Units and shapes: M units per head on average, blocks of c tokens; episodes [sum of head lengths, D] per layer.
Differs from the paper: the floor of the layers' budgets (M / 4) is paid for by the other layers, so that M is what is
held. Windows are embedded by hashed words unless another encoder is given, and the mean of the model's own embeddings
is weighted by rarity and centred (`kv.episodes`). A patched prompt is at most as long as a block; its instruction is
left out where a model has no chat template and so follows none. Where no conversation was given there are no episodes;
then the last queries of each block stand in, as in the paper's block-wise SnapKV baseline, with the newest units safe.
Cost: resident 2 * layers * M * Hkv * D * itemsize bytes for the active episode and again for each one held, at most
2 c tokens of a block and a prompt besides; reading the history costs E prefills and as many runs of the prompts.
Switching moves one episode.
Holds when: layers see everything (no sliding window), and the history fits the model's positions, which are true ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from memwall.errors import DoesNotFit, InputError
from memwall.kv import fitted
from memwall.kv.attention_scores import LAST_QUERIES, MostAttention
from memwall.kv.base import CacheModel, CacheShape
from memwall.kv.blocks import (
    BlockCache,
    BudgetAllocator,
    HeadAdaptive,
    Step,
    Uniform,
    pieces,
    sensitive_budgets,
)
from memwall.kv.episodes import Encoder, Episodes, HashedWords, MeanEmbedding, Turn, Utterance, find_episodes
from memwall.kv.float_store import float_dtype
from memwall.kv.policy import AMOUNT, Policy, kept_share
from memwall.kv.ragged import LayerUnits, block_bytes
from memwall.memory.arena import ALIGNMENT_BYTES, SMALL_BYTES
from memwall.memory.pages import round_up
from memwall.models.config import EMBEDDING

if TYPE_CHECKING:
    from memwall.memory import Arena
    from memwall.models.decoder import Decoder
    from memwall.models.tokenizer import Tokenizer

EPISODES = "kv/episodes"
FLOATS = ("float32", "float16", "bfloat16")
ENCODERS = ("words", "model")
_WHY = "its heads keep different numbers of rows, which only float32, float16 and bfloat16 hold"


@dataclass(frozen=True, slots=True, kw_only=True)
class EpiSettings:
    """Kept units M per head on average; tokens of a block c; number of episodes, 0 without a conversation; utterances
    of a window; central windows of a patched prompt; uniform: as many units in every head; alpha: exponent of the
    layers' weights, 0 for equal budgets. encoder: of windows and questions, `words` or `model`.
    """

    tokens: int
    chunk: int = 2048
    episodes: int = 0
    window: int = 4
    central: int = 8
    uniform: int = 0
    alpha: float = 0.0
    encoder: str = "words"
    dtype: str = "float16"

    @classmethod
    def from_policy(cls, policy: Policy, shape: CacheShape, capacity_tokens: int) -> EpiSettings:
        """Settings of a policy string, checked."""
        store = policy.inner.name if policy.inner is not None else "float16"
        if store not in FLOATS:
            raise InputError(f"policy {policy}: epicache does not work on top of {store}: {_WHY}")
        if any(shape.windows or ()):
            raise InputError(f"policy {policy}: epicache needs layers that see everything; this model has windows")
        defaults = {AMOUNT: 0.0, "tokens": 0, "chunk": 2048, "episodes": 0, "window": 4, "central": 8, "uniform": 0}
        encoder = policy.settings.get("encoder", "words")
        if encoder not in ENCODERS:
            raise InputError(f"policy {policy}: encoder {encoder!r} must be one of {', '.join(ENCODERS)}")
        given = Policy(policy.name, policy.settings).numbers({**defaults, "alpha": 0.0}, words=("encoder",))
        share = kept_share(policy)
        if min(given["chunk"], given["window"], given["central"]) < 1:
            raise InputError(f"policy {policy}: chunk, window and central must be at least 1")
        tokens = int(given["tokens"]) if share is None else max(int(share * capacity_tokens), 1)
        whole = {name: int(value) for name, value in given.items() if name not in (AMOUNT, "tokens", "alpha")}
        return cls(tokens=tokens, **whole, alpha=float(given["alpha"]), encoder=encoder, dtype=store)

    @property
    def prompt_tokens(self) -> int:
        """Most tokens of a patched prompt."""
        return self.chunk

    def episode_bytes(self, shape: CacheShape, num_tokens: int) -> int:
        """Bytes of one episode of a history of so many tokens."""
        rows = shape.num_layers * shape.num_kv_heads * min(self.tokens, num_tokens)
        nbytes = 2 * rows * shape.head_dim * float_dtype(self.dtype).itemsize
        return round_up(nbytes, ALIGNMENT_BYTES) if nbytes < SMALL_BYTES else round_up(nbytes)


class EpiCache(BlockCache):
    """See the module's text."""

    role = "tokens"
    needs_model = True
    fits = True
    refuses: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("kivi", "kv4", "bfp", "think", "cskv", "xquant", "cachegen"), _WHY
    )

    def __init__(
        self,
        policy: Policy,
        shape: CacheShape,
        arena: Arena,
        capacity_tokens: int,
        model: CacheModel | None = None,
    ) -> None:
        self.settings = s = EpiSettings.from_policy(policy, shape, capacity_tokens)
        assert model is not None
        self._policy, self._model = policy, model
        budgets = np.full(shape.num_layers, s.tokens)
        if s.alpha:
            similarity = fitted.load(model, policy, self.fit_key(policy))["similarity"]
            budgets = sensitive_budgets(similarity, s.tokens, s.alpha)
        allocator: BudgetAllocator = Uniform(budgets) if s.uniform else HeadAdaptive(budgets)
        self.attention = MostAttention(shape)
        super().__init__(
            shape,
            arena,
            capacity_tokens,
            scorer=self.attention,
            allocator=allocator,
            chunk=s.chunk,
            stable=min(LAST_QUERIES, s.tokens // 2),
            local=min(LAST_QUERIES, s.chunk // 2),
            dtype=float_dtype(s.dtype),
        )
        self.episodes: Episodes | None = None
        self.active: int | None = None
        self.moved_bytes = 0
        """Bytes moved to make episodes active."""
        self._held: list[tuple[np.ndarray, list[list[int]], int]] = []
        self._probe_tokens = 0

    @staticmethod
    def predict(
        policy: Policy, shape: CacheShape, num_tokens: int, prefill_tokens: int, capacity_tokens: int
    ) -> dict[str, int]:
        """The peak: a block and a patched prompt beside the kept units, and the episodes held."""
        s = EpiSettings.from_policy(policy, shape, capacity_tokens)
        kept = min(s.tokens, num_tokens) if num_tokens >= s.chunk or s.episodes else 0
        tail = min(s.chunk + (s.prompt_tokens if s.episodes else 0), num_tokens)
        longest = min(kept if s.uniform else kept * shape.num_kv_heads, num_tokens) + tail
        rows = block_bytes(
            shape, float_dtype(s.dtype), kept, tail, staged=prefill_tokens > 0, has_scores=False, scored=longest
        )
        return {**rows, EPISODES: s.episodes * s.episode_bytes(shape, num_tokens)}

    @staticmethod
    def read_bytes(policy: Policy, shape: CacheShape, num_tokens: int) -> int:
        """Bytes that one decode step reads with `num_tokens` taken in, just after a fold."""
        s = EpiSettings.from_policy(policy, shape, num_tokens)
        row_bytes = 2 * shape.row_values * float_dtype(s.dtype).itemsize
        return shape.num_layers * min(s.tokens, num_tokens) * row_bytes

    @classmethod
    def fit_key(cls, policy: Policy) -> str:
        """The layers' similarities depend on nothing that is set."""
        return "epicache layer similarity 1"

    @classmethod
    def must_fit(cls, policy: Policy) -> bool:
        """Only for budgets by layer."""
        return float(policy.settings.get("alpha", 0)) > 0

    @classmethod
    def fit(
        cls,
        policy: Policy,
        directory: Path,
        text: str | None,
        threads: int | None,
        progress: Callable[[str, int, int], None] | None,
    ) -> dict[str, np.ndarray]:
        """similarity [L], for budgets with `alpha`; see `kv.sensitivity`."""
        from memwall.kv.sensitivity import layer_similarity

        return {"similarity": layer_similarity(directory, text, progress)}

    @property
    def policy(self) -> str:
        return str(self._policy)

    @property
    def nbytes(self) -> int:
        held = (array.nbytes for array, _, _ in self._held)
        return super().nbytes + sum(round_up(n, ALIGNMENT_BYTES) if n < SMALL_BYTES else round_up(n) for n in held)

    @property
    def kept_episodes(self) -> list[int]:
        """Bytes of each episode held."""
        return [array.nbytes for array, _, _ in self._held]

    def remember(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        utterances: Sequence[Utterance],
        *,
        encoder: Encoder | None = None,
        opening: Sequence[int] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Reads a conversation once for each episode, and holds what each keeps of it. opening: tokens before it."""
        s = self.settings
        if encoder is None and s.encoder == "model":
            matrix = self._model.weights.matrices[EMBEDDING]
            encoder = MeanEmbedding(matrix, self._model.config.hidden_size, tokenizer)
        encoder = encoder or HashedWords()
        episodes = find_episodes(utterances, encoder, max(s.episodes, 1), window=s.window, central=s.central)
        text = "".join(utterance.line for utterance in utterances)
        tokens = [*opening, *tokenizer.encode(text, add_bos=False)]
        turn = Turn.of(self._model.directory)
        prompts = episodes.prompts(tokenizer, min(s.prompt_tokens, decoder.segment_tokens), turn)
        if len(tokens) + max(map(len, prompts)) > self.capacity_tokens:
            raise DoesNotFit(
                f"the history has {len(tokens):,} tokens, and its patched prompts up to "
                f"{max(map(len, prompts)):,}; the context holds {self.capacity_tokens:,}: ask for a longer one "
                "(--context)"
            )
        self.forget()
        for number, prompt in enumerate(prompts):
            if progress is not None:
                progress(number, len(prompts))
            self.read(decoder, tokens, prompt)
            self._hold()
        self.episodes, self.active = episodes, len(prompts) - 1
        if progress is not None:
            progress(len(prompts), len(prompts))

    def read(
        self,
        decoder: Decoder,
        tokens: Sequence[int],
        prompt: Sequence[int] | Callable[[np.ndarray], Sequence[int]],
    ) -> None:
        """Block prefill of a history from the start: after each block the prompt scores what is cached, and goes.

        prompt: the same after each block, or made of the block.
        """
        self.truncate(0)
        for begin in range(0, len(tokens), self.chunk):
            block = np.asarray(tokens[begin : begin + self.chunk], np.int64)
            sizes = pieces(len(block), decoder.segment_tokens)
            asking = np.asarray(prompt(block) if callable(prompt) else prompt, np.int64)
            last = Step(len(asking), folds=True, stabilizes=False)
            self._plan = deque([*(Step(size, folds=False) for size in sizes), last])
            done = 0
            for size in sizes:
                decoder.hidden(block[done : done + size], self)
                done += size
            self._probe_tokens, self.attention.probing = len(asking), True
            try:
                decoder.hidden(asking, self)
            finally:
                self._probe_tokens, self.attention.probing = 0, False

    def match(self, question: str) -> int:
        """The episode that a question is about; it sees nothing but the question."""
        assert self.episodes is not None
        return self.episodes.match(question)

    def recall(self, episode: int) -> int:
        """Makes an episode the active one, as it was when the history ended; gives the bytes moved for that."""
        if episode == self.active and self._layers[0].folded:
            self.truncate(self._layers[0].folded)
            return 0
        array, lengths, num_tokens = self._held[episode]
        self.truncate(0)
        begin = 0
        for state, heads in zip(self._layers, lengths):
            num_rows = sum(heads)
            state.past.reserve(num_rows)
            for rows in state.past.rows(num_rows):
                rows[:] = array[begin : begin + num_rows]
                begin += num_rows
            state.past.set_lengths(heads)
            state.folded, state.has_dropped = num_tokens, True
        self.active = episode
        self.moved_bytes += array.nbytes
        return array.nbytes

    def forget(self) -> None:
        """Drops all episodes."""
        for array, _, _ in self._held:
            self.arena.free(array)
        self._held, self.episodes, self.active = [], None, None

    def begin_prompt(self, num_tokens: int, longest: int) -> list[int]:
        if self.active is None:
            return super().begin_prompt(num_tokens, longest)
        # a question and its answer stay whole beside the episode
        self._plan = deque(Step(size, folds=False) for size in pieces(num_tokens, longest))
        return [step.num_tokens for step in self._plan]

    def settle(self, layer: int) -> None:
        if self._step.folds:
            self._fold(layer, self._layers[layer].num_tail - self._probe_tokens)
        self.attention.drop()
        if layer == self.shape.num_layers - 1:
            self._staging.shrink(0)

    def truncate(self, length: int) -> None:
        super().truncate(length)
        self.attention.drop()
        if not length:
            self.active = None

    def fork(self) -> EpiCache:
        """Another branch of what is active; the episodes held stay with this one."""
        other = EpiCache(self._policy, self.shape, self.arena, self.capacity_tokens, self._model)
        self.copy_to(other)
        other.active = self.active
        return other

    def release(self) -> None:
        self.forget()
        super().release()

    def _unplanned(self, num_tokens: int) -> Step:
        return Step(num_tokens, folds=False) if self.active is not None else super()._unplanned(num_tokens)

    def _hold(self) -> None:
        """Puts what is cached aside, as one array: layer by layer its keys, then its values."""
        states: list[LayerUnits] = self._layers
        num_rows = 2 * sum(state.past.num_rows for state in states)
        array = self.arena.allocate(EPISODES, (num_rows, self.shape.head_dim), self.dtype)
        np.concatenate([rows for state in states for rows in state.past.rows(state.past.num_rows)], out=array)
        self._held.append((array, self.kept_lengths, states[0].folded))
