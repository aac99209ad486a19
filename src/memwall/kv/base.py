"""The KV-cache seam: one sequence's cache, what it must answer, and the shape it is built for.

The decoder goes layer by layer. In each layer it appends the keys (after rotation) and values of all new tokens once,
attends in one or more blocks of query rows, and settles: only then may the cache compress, so that new tokens always
attend exactly. A cache that drops tokens goes on counting them: `length` is what it was given, not what it kept.

Caches nest: one that chooses tokens or channels (`role`) holds an inner one, which it hands what it keeps as if these
were all the tokens there are, so that inner positions are places in the inner cache.

Units: `length` and capacities in tokens; T new tokens, H query heads, Hkv key-value heads, D numbers a head, d the
model's hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from memwall.errors import DoesNotFit, InputError
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import ModelConfig
from memwall.models.rope import RotaryTable

if TYPE_CHECKING:
    from memwall.kv.decoding import Decoding
    from memwall.kv.policy import Policy
    from memwall.memory import Arena
    from memwall.models.weights import Weights

Role = Literal["tokens", "channels", "store"]

Facts = Mapping[str, int]
"""Whole numbers that say how the arrays of `KVCache.dump` are to be read."""

Reader = Callable[[str, np.ndarray], None]
"""reader(name, out) fills `out` with the first len(out) rows of a dumped array."""
ROLES: tuple[Role, ...] = ("tokens", "channels", "store")
"""What a policy decides, outermost first: which tokens stay, which channels stay, how rows are stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateShape:
    """What a model without attention keeps (`ssm_state`), beside its heads and their sizes.

    static_layers: of each layer, whether it works on integers of 8 bits; static_states: whether their states are such.
    """

    state_size: int
    conv_taps: int
    conv_size: int
    static_layers: tuple[bool, ...]
    static_states: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """What a cache must know of a model.

    windows: each layer's sliding window in tokens, None where it sees everything.
    scale: what q . k is multiplied with, one over the root of `head_dim` unless given.
    hidden_size: width d of the layers' inputs, for caches that keep these; None where it is not known.
    state: of models that keep a state in place of keys and values.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...] | None = None
    scale: float | None = None
    hidden_size: int | None = None
    state: StateShape | None = None

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise InputError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} key-value heads evenly")
        if self.windows is not None and len(self.windows) != self.num_layers:
            raise InputError(f"{len(self.windows)} sliding windows for {self.num_layers} layers")

    @property
    def row_values(self) -> int:
        """Numbers in one token's keys of one layer (its values are as many)."""
        return self.num_kv_heads * self.head_dim

    @property
    def logit_scale(self) -> float:
        """What q . k is multiplied with."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def window(self, layer: int) -> int | None:
        """The layer's sliding window in tokens, or None."""
        return self.windows[layer] if self.windows is not None else None


@dataclass(frozen=True, eq=False)
class CacheModel:
    """The loaded model behind a cache: its configuration, the weights as they are held, the folder they came from."""

    config: ModelConfig
    weights: Weights
    directory: Path

    @cached_property
    def rotary(self) -> RotaryTable:
        """Rotation tables of the model's keys and queries."""
        return RotaryTable(self.config.rope, self.config.head_dim)

    @cached_property
    def fingerprint(self) -> str:
        """Names the model: what was fitted to it, or cached from it, is of no use to another."""
        with Checkpoint(self.directory, self.config) as checkpoint:
            return checkpoint.fingerprint()


class KVCache(ABC):
    """The keys and values of one sequence, in the form that the policy gives them."""

    role: ClassVar[Role] = "store"
    refuses: ClassVar[Mapping[str, str]] = {}
    """Names of policies that this one can't work on top of, with the reason."""
    needs_model: ClassVar[bool] = False
    """Whether it looks into the model (rotation, weights, fitted factors)."""
    fits: ClassVar[bool] = False
    """Whether it must be fitted to the model once (`fit`, `kv.fitted`)."""
    takes_inputs: ClassVar[bool] = False
    """Whether the decoder must hand it the layers' inputs (`take_inputs`)."""
    records: ClassVar[bool] = False
    """Whether it has `record` (`models.base.RecordedCache`): one that wraps another has not, it must see each token."""
    codes_prompt: ClassVar[bool] = False
    """Whether settling changes what a prompt's later tokens would see, so that it must come in one segment to attend
    exactly.
    """
    streams_prompt: ClassVar[bool] = False
    """Whether it takes prompts of any length in segments, so that later ones see of the past what it keeps, as it keeps
    it.
    """
    sheds_prompt: ClassVar[bool] = False
    """Whether it drops tokens while a prompt is still read, so that later ones look at fewer."""
    goes_on: ClassVar[bool] = False
    """Of what is no store: whether another prompt after an answer takes no more than one prompt of all of it would."""
    packs_positions: ClassVar[bool] = False
    """Whether it numbers the tokens that it keeps anew (`next_position`): a sequence may then outgrow the positions
    that the model knows.
    """

    saves: ClassVar[bool] = False
    """Whether it can be written down and read back (`dump`, `layout`, `restore`)."""
    tiers: ClassVar[Mapping[str, str]] = {}
    """Ledger owners, of those that `predict` names, whose bytes are on another tier than the cache's, and which."""
    plain_rows: ClassVar[bool] = False
    """Whether rows alone make it: appending and settling without attention does, and `rows` gives them back."""

    def __init__(self, shape: CacheShape, arena: Arena, capacity_tokens: int) -> None:
        if capacity_tokens < 1:
            raise InputError(f"a cache for {capacity_tokens} tokens: must be at least 1")
        self.shape = shape
        self.arena = arena
        self.capacity_tokens = capacity_tokens

    @staticmethod
    def predict(
        policy: Policy, shape: CacheShape, num_tokens: int, prefill_tokens: int, capacity_tokens: int
    ) -> dict[str, int]:
        """Exact bytes per ledger owner with `num_tokens` taken in, `prefill_tokens` of them at once.

        Every policy of the table has it; a cache made for one experiment needs none.
        """
        raise NotImplementedError

    @staticmethod
    def read_bytes(policy: Policy, shape: CacheShape, num_tokens: int) -> int:
        """Bytes that one decode step reads with `num_tokens` taken in; as `predict`."""
        raise NotImplementedError

    @staticmethod
    def step_macs(policy: Policy, shape: CacheShape, num_tokens: int) -> int:
        """Multiply-adds of one decode step beyond attention itself: where keys are rebuilt, these decide its time."""
        return 0

    @staticmethod
    def seen_tokens(policy: Policy, shape: CacheShape, num_tokens: int) -> int:
        """Tokens that one decode step attends to with `num_tokens` taken in, where that is what takes its time."""
        return num_tokens

    @staticmethod
    def building_bytes(policy: Policy, shape: CacheShape) -> int:
        """The most that making an empty cache holds for a moment beyond it, as where matrices come from weights."""
        return 0

    @staticmethod
    def processes(policy: Policy, shape: CacheShape) -> int:
        """Processes that it starts beside this one, each with an interpreter of its own."""
        return 0

    @classmethod
    def must_have_model(cls, policy: Policy) -> bool:
        """Whether these settings look into the model; some policies do so for a few of their settings only."""
        return cls.needs_model

    @classmethod
    def timed(cls, policy: Policy) -> Policy | None:
        """The policy whose steps take as long, for clocks that have no model; None where there is none."""
        return None if cls.must_have_model(policy) else policy

    @classmethod
    def fit_key(cls, policy: Policy) -> str:
        """Canonical form of the settings that `fit` depends on; where `fits` is set."""
        raise NotImplementedError

    @classmethod
    def must_fit(cls, policy: Policy) -> bool:
        """Whether these settings need what `fit` learns; some policies need it for a few of their settings only."""
        return cls.fits

    @classmethod
    def fit(
        cls,
        policy: Policy,
        directory: Path,
        text: str | None,
        threads: int | None,
        progress: Callable[[str, int, int], None] | None,
    ) -> dict[str, np.ndarray]:
        """Learns what the policy needs of the model in `directory` from `text` (None: the bundled one).

        progress(stage, done, in all). Where `fits` is set; may use torch, which running never does.
        """
        raise NotImplementedError

    @classmethod
    def decode_together(cls, caches: Sequence[KVCache]) -> Decoding:
        """How several caches of this policy and shape take in a token each; one after the other unless it knows better.

        What comes out must not depend on which caches come together, to the bit.
        """
        from memwall.kv.decoding import OneByOne

        return OneByOne(caches)

    @property
    @abstractmethod
    def policy(self) -> str:
        """Canonical policy string; `kv.build` with it gives an equal cache."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens that every layer has taken in; the next one's place in the sequence."""

    @property
    def next_position(self) -> int:
        """The rotary position of the next token: its place in the sequence, unless the cache packs what it keeps."""
        return self.length

    def begin_prompt(self, num_tokens: int, longest: int) -> list[int]:
        """A prompt of so many tokens comes: the sizes of the segments to feed it in, each at most `longest`."""
        return [min(longest, num_tokens - begin) for begin in range(0, num_tokens, longest)]

    def take_inputs(self, layer: int, x: np.ndarray, positions: np.ndarray) -> None:
        """The layer's normed inputs x [n, d] of the new tokens at `positions` [n], before `append`, block by block.

        Only called where `takes_inputs` is set.
        """
        raise NotImplementedError

    def observe(self, layer: int, q: np.ndarray) -> None:  # noqa: B027 - most caches do not look
        """The prompt's last queries [w, H, D] (rotated), from an outer cache that attended to the prompt itself.

        Called before `settle`; a cache that does not look at queries ignores them.
        """

    @abstractmethod
    def append(self, layer: int, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
        """Takes k, v [T, Hkv, D] float32 of the tokens at `positions` [T], which follow what the layer holds.

        BudgetExceeded, with the cache as it was, when the arena has no room.
        """

    @abstractmethod
    def attend(
        self, layer: int, q: np.ndarray, positions: np.ndarray, out: np.ndarray, stats: np.ndarray | None = None
    ) -> np.ndarray:
        """Attention of q [T, H, D] float32 at consecutive `positions` over the layer's tokens, into out [T, H, D].

        stats [T, H, 2] receives the largest logit and the sum of exponentials, for merging with other parts
        (`kernels.attention.merge_partials`).
        """

    @abstractmethod
    def settle(self, layer: int) -> None:
        """Called once after a layer's attention: compresses what may be compressed now."""

    def rewindable(self, length: int) -> int:
        """The longest `truncate` that is possible and forgets all from `length` on; less where tokens were dropped."""
        return length

    @abstractmethod
    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens and gives whole pages back."""

    @abstractmethod
    def fork(self) -> KVCache:
        """A cache of its own with the same tokens, as another branch of a search needs. Between forward passes only."""

    @abstractmethod
    def release(self) -> None:
        """Gives all memory back; the cache is of no more use."""

    def dump(self) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        """Arrays and facts from which `restore` makes an equal cache, in the form it holds them.

        Arrays are views: they go stale with the next change. Between forward passes only; where `saves` is set.
        """
        raise NotImplementedError

    def layout(self, facts: Facts) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of each array that `dump` gives with such facts; InputError for facts that cannot be.

        Where `saves` is set; changes nothing.
        """
        raise NotImplementedError

    def restore(self, facts: Facts, keep: int, reader: Reader) -> None:
        """Makes this empty cache what was dumped, cut to its first `keep` tokens (at least as far as `rewindable`
        goes; `length` says how many it became).

        facts: those that `layout` has accepted. BudgetExceeded, with the cache empty, when the arena has no room.
        """
        raise NotImplementedError

    def rows(self, layer: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values [n, Hkv, D] float32 of tokens [begin, end) as they are held. Where `plain_rows` is set."""
        raise NotImplementedError

    def report(self) -> dict[str, object]:
        """What happened outside this process, as plain data: bytes over links, pages read. Empty where nothing did."""
        return {}

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held now, as the ledger counts them."""

    @property
    def bits_per_value(self) -> float:
        """Bits held per number of the cached keys and values, everything counted."""
        numbers = 2 * self.shape.num_layers * self.shape.row_values * self.length
        return 8 * self.nbytes / numbers if numbers else 0.0

    def _check_append(self, held: int, num_new: int, positions: np.ndarray) -> None:
        if len(positions) != num_new or (num_new and (positions[0] != held or positions[-1] != held + num_new - 1)):
            raise ValueError(f"the next position is {held}, not {positions[:1]} for {num_new} new tokens")
        self._check_room(held, num_new)

    def _check_room(self, held: int, num_new: int) -> None:
        if held + num_new > self.capacity_tokens:
            raise DoesNotFit(
                f"the context holds {self.capacity_tokens:,} tokens, {held:,} are used, {num_new:,} more do not fit; "
                f"ask for a longer one (--context {held + num_new})"
            )

    def _check_restore(self, keep: int, saved: int) -> None:
        if self.length or not 0 <= keep <= min(saved, self.capacity_tokens):
            raise ValueError(f"cannot restore {keep} of {saved} tokens to a cache of {self.capacity_tokens}")

    def _check_truncate(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate {self.length} tokens to {length}")
