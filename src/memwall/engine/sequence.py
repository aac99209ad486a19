"""What is asked of the engine, what it keeps of each request while it runs, and what it tells about it."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from memwall.engine.base import Growth, RequestView
from memwall.engine.kv_pages import digest_page
from memwall.engine.sampling import Sampling
from memwall.errors import InputError

if TYPE_CHECKING:
    from memwall.engine.guide import Guide
    from memwall.engine.stream import Task

Pooling = Literal["last", "mean"]
Status = Literal["waiting", "running", "held", "swapped", "arriving", "finished"]
FinishReason = Literal["stop", "length", "cancelled", "aborted", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One text to go on with. sampling.stop is left to who decodes the text; the engine knows tokens only.

    priority: lower goes first. logprobs: how many likeliest alternatives to tell with each token, 0 for the token's own
    alone, None for nothing. adapter: a key of the engine's adapters. salt: whose cached beginnings it may share.
    session: the conversation it is a turn of, whose pages are worth keeping when it ends. user: whom its tokens count
    for where service is shared fairly. until: a time of the engine's clock after which it is cancelled. members: of a
    prefix, how many requests will go on from it; such a one makes no token. prefix and base: the id of the prefix that
    it goes on from, and after how many tokens (see `shared`). expected_tokens: of prompt and answer together, where
    somebody can tell; 0 for nobody. pooling: the text is embedded, not gone on with; for `mean` its salt must be its
    own, as states of beginnings that are found are not there. guide: the form that the answer keeps to.
    """

    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    priority: int = 0
    logprobs: int | None = None
    session: str | None = None
    user: str | None = None
    adapter: str | None = None
    salt: bytes = b""
    until: float | None = None
    members: int = 0
    prefix: int | None = None
    base: int = 0
    expected_tokens: int = 0
    pooling: Pooling | None = None
    guide: Guide | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InputError("the prompt is empty; give at least one token")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Natural logarithms of probabilities, at temperature 1: the token's own, and those of the likeliest."""

    own: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A token that was made for a request, or its end (token None); both at once where a token is the last. vector:
    with the end of a text that was embedded, [H] float32.
    """

    id: int
    token: int | None = None
    logprobs: TokenLogprobs | None = None
    finish: FinishReason | None = None
    cached_tokens: int = 0
    vector: np.ndarray | None = None


@dataclass(slots=True, eq=False)
class HostCopy:
    """Pages of one request, or of a conversation that rests, in the swap area (see `switching`).

    places: of its pages in token order; clean: how many of the first hold what the request's pages hold. needed: there
    is no other copy. digests: of the clean pages while it rests; rank: whose it was then. writing: the last copy out.
    """

    key: int
    owner: Sequence | None
    places: list[int] = field(default_factory=list)
    clean: int = 0
    needed: bool = False
    digests: list[bytes] = field(default_factory=list)
    rank: tuple[int, int] = (0, 0)
    used: int = 0
    writing: Task | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """A request in the engine. tokens: prompt and what was made; the first `computed` have keys and values.

    level: see `RequestView`. copy: what the swap area holds of it. parent: the prefix whose pages come before
    its own; left: of a prefix, members that are not over. growth: see `RequestView`, as of its last one.
    """

    id: int
    request: Request
    arrival: float
    eos: tuple[int, ...]
    status: Status = "waiting"
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    cached: int = 0
    pages: list[int] = field(default_factory=list)
    copy: HostCopy | None = None
    level: int = 0
    digests: list[bytes] = field(default_factory=list)
    registered: int = 0
    preemptions: int = 0
    holds_adapter: bool = False
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    finished: float | None = None
    finish: FinishReason | None = None
    view: RequestView | None = None
    version: int = -1
    parent: Sequence | None = None
    left: int = 0
    growth: Growth | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.left = self.request.members

    @property
    def base(self) -> int:
        """Tokens of its beginning that lie in its prefix's pages."""
        return 0 if self.parent is None else self.request.base

    @property
    def ready(self) -> bool:
        """Whether what it goes on from is there."""
        return self.parent is None or self.parent.status == "held"

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def num_made(self) -> int:
        """Tokens made so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def made(self) -> Tokens[int]:
        """The tokens made so far."""
        return self.tokens[self.num_prompt :]

    @property
    def most_tokens(self) -> int:
        """Tokens it can come to hold."""
        return self.num_prompt + self.request.sampling.max_new_tokens

    def digests_of(self, tokens: int, page_tokens: int) -> list[bytes]:
        """Digests of the full pages among the first `tokens`; not to be changed, nor kept for later."""
        count = tokens // page_tokens
        while len(self.digests) < count:
            at = len(self.digests) * page_tokens
            before = self.digests[-1] if self.digests else b""
            self.digests.append(digest_page(before, self.tokens[at : at + page_tokens], self.request.salt))
        # mostly all of them are wanted, and there may be thousands: no copy then
        return self.digests if len(self.digests) == count else self.digests[:count]

    def end(self, token: int, context_tokens: int) -> FinishReason | None:
        """Why this token is the last; None where it is not. The end-of-text token itself is not kept."""
        if token in self.eos and not self.request.sampling.ignore_eos:
            return "stop"
        if self.num_made >= self.request.sampling.max_new_tokens or len(self.tokens) >= context_tokens:
            return "length"
        return None
