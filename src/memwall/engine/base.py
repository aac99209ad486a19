"""The scheduler seam: what a scheduler may know, what it decides, and nothing that does anything.

A scheduler is a pure function of a `State` and the time. The engine carries its `Step` out with real memory and a real
clock, the simulator with counted memory and a virtual one; so a decision can be replayed, compared and tested.

Units: tokens, pages of `Limits.page_tokens` tokens, seconds. A request's *known* tokens are its prompt and what was
made so far; the *computed* ones of these have keys and values. A request whose computed tokens are all but one of the
known decodes; one with more to compute is in its prefill.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from memwall.errors import InputError

PreemptBy = Literal["recompute", "swap"]
Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")


class Growth(Protocol):
    """What a request takes where that does not go by pages of so many tokens (see `own_caches`)."""

    def pages(self, tokens: int) -> int:
        """Pages that it needs to come to hold so many tokens; beyond the prompt never fewer for more of them."""

    def chunk(self, computed: int) -> int:
        """Tokens after the computed ones that must come in one step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestView:
    """A request as schedulers see it.

    priority: lower goes first; equal ones by level, which may change while it runs (see `priorities`), by arrival, then
    id. pages: held (swapped out: to be taken back). freeable: pages that setting it aside would free. clean: pages of
    which the swap area has a copy already. restorable: tokens of the beginning of a waiting one that are there.
    hit: tokens of its beginning whose pages are kept from other requests; hit_idle: how many of those pages count as
    free until it takes them.
    prefix: the request whose keys and values it goes on from, and base: after how many of its tokens; its own pages
    begin there. shares: of a prefix, how many requests that go on from it are not over; `most_tokens` then counts the
    largest of them with it. expected_tokens: what it will likely come to hold; 0 where nobody knows. growth: None where
    pages are of so many tokens.
    """

    id: int
    arrival: float
    priority: int = 0
    level: int = 0
    prompt: int
    known: int
    computed: int = 0
    most_tokens: int
    pages: int = 0
    freeable: int = 0
    clean: int = 0
    restorable: int = 0
    hit: int = 0
    hit_idle: int = 0
    session: str | None = None
    adapter: str | None = None
    prefix: int | None = None
    base: int = 0
    shares: int = 0
    expected_tokens: int = 0
    growth: Growth | None = None

    def pages_at(self, tokens: int, limits: Limits) -> int:
        """Pages behind its first `tokens`."""
        return limits.pages(tokens) if self.growth is None else self.growth.pages(tokens)

    def next_tokens(self, most: int) -> int:
        """Tokens that the next step may compute of it, where it has room for so many."""
        if self.growth is None:
            return min(self.remaining, most)
        chunk = self.growth.chunk(self.computed)
        return chunk if chunk <= most else 0

    def own(self, tokens: int) -> int:
        """How many of its first `tokens` lie in its own pages."""
        return tokens - self.base

    @property
    def expected(self) -> int:
        """Tokens it will come to hold; one that has outgrown what was expected is half-way through its answer."""
        likely = self.expected_tokens or self.most_tokens
        if likely <= self.known:
            likely = self.known + max(self.known - self.prompt, 1)
        return max(min(likely, self.most_tokens), self.known)

    @property
    def rank(self) -> tuple[int, int, float, int]:
        """Who goes first, in the order of service."""
        return (self.priority, self.level, self.arrival, self.id)

    @property
    def remaining(self) -> int:
        """Known tokens that have no keys and values yet."""
        return self.known - self.computed

    @property
    def decodes(self) -> bool:
        """Whether it makes a token with every token it computes."""
        return self.computed > 0 and self.remaining == 1 and self.known > self.prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a step may do at most. token_budget: tokens computed in one step, all requests together."""

    token_budget: int = 256
    max_sequences: int = 16
    page_tokens: int = 16

    def pages(self, tokens: int) -> int:
        """Pages behind so many tokens of one request."""
        return -(-tokens // self.page_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What it takes to bring a request back: seconds to compute a token of it again, or to move a page one way; and how
    long steps have lately been.
    """

    seconds_per_token: float = 1e-3
    seconds_per_page: float = 1e-4
    seconds_per_step: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterView:
    """An adapter that some request wants. pages: what it takes; while nobody runs with it they count as free.

    resident: whether it is in its pages, or on its way there.
    """

    name: str
    pages: int
    resident: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Running averages over rounds of admission: requests that came between two of them, and that one let in."""

    arrived: float = 1.0
    admitted: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Percent of the machine's compute that prefill and decode may take. Above 100 together they compete: then each
    gets in proportion while both run, and up to its own share while the other rests.
    """

    prefill: int
    decode: int

    def __post_init__(self) -> None:
        if not (1 <= self.prefill <= 100 and 1 <= self.decode <= 100):
            raise InputError(f"shares of {self.prefill} and {self.decode} percent; each must be 1 to 100")

    def of(self, phase: Phase) -> int:
        """The share of one phase."""
        return self.prefill if phase == "prefill" else self.decode

    def effective(self, phase: Phase) -> float:
        """Percent that a phase has while the other runs too."""
        return self.of(phase) * min(1.0, 100 / (self.prefill + self.decode))


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What was observed over some iterations under one pair of shares.

    first: seconds to the first token of requests that got it; token: mean seconds between tokens, a request each.
    arrived: requests that came; prompts: that were computed, in prefill_seconds of the prefill worker's time.
    """

    shares: Shares
    seconds: float
    arrived: int = 0
    prompts: int = 0
    prefill_seconds: float = 0.0
    first: tuple[float, ...] = ()
    token: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Lanes:
    """Two workers, one for each phase, that run beside each other over the same pages.

    idle: those that can begin now. flying: work under way, which must be left alone. preparing: shares of workers that
    are being made. windows: the last ones, the newest at the end; fresh: it closed since the last decision.
    """

    idle: tuple[Phase, ...] = PHASES
    flying: tuple[Work, ...] = ()
    shares: Shares
    preparing: Shares | None = None
    windows: tuple[Window, ...] = ()
    fresh: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Everything a decision may depend on. free_pages: free now, kept prefixes that nobody uses included; negative
    while the budget has shrunk below what is held. waiting: those that could start now. held: prefixes that are
    computed and stay for requests that go on from them; setting one aside sends it back to the queue. arriving: those
    whose pages are on their way in, who can only be waited for. lanes: None where one worker does all.
    """

    running: tuple[RequestView, ...] = ()
    waiting: tuple[RequestView, ...] = ()
    swapped: tuple[RequestView, ...] = ()
    held: tuple[RequestView, ...] = ()
    arriving: tuple[RequestView, ...] = ()
    free_pages: int
    total_pages: int
    swap_free_pages: int = 0
    limits: Limits = field(default_factory=Limits)
    costs: Costs = field(default_factory=Costs)
    adapters: tuple[AdapterView, ...] = ()
    pace: Pace = field(default_factory=Pace)
    lanes: Lanes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Compute the next `tokens` known tokens of a request."""

    id: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Preempt:
    """Set a running request aside: forget its keys and values, or write them to the swap area.

    wait: no step before they are written; else its pages are free as soon as they are, or waited for where wanted.
    """

    id: int
    by: PreemptBy
    wait: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step, carried out in this order: abort, set aside, bring back, admit, compute.

    abort: waiting requests that end here. prefetch: adapters to read ahead, in order of need. resume: swapped out or
    arriving ones, or waiting ones with a beginning that is restorable; the step waits for their pages. fetch: such ones
    (not arriving) whose pages come in beside this step and the next ones. shares: what the workers of both phases shall
    have from now on; None leaves them.
    """

    abort: tuple[int, ...] = ()
    prefetch: tuple[str, ...] = ()
    preempt: tuple[Preempt, ...] = ()
    resume: tuple[int, ...] = ()
    fetch: tuple[int, ...] = ()
    admit: tuple[int, ...] = ()
    work: tuple[Work, ...] = ()
    shares: Shares | None = None

    @property
    def tokens(self) -> int:
        """Tokens computed."""
        return sum(one.tokens for one in self.work)


class Scheduler(Protocol):
    """Decides what one step does."""

    def plan_step(self, state: State, now: float) -> Step:
        """Pure: the same state and time give the same step, and nothing is remembered between two calls."""
        ...
