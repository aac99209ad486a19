"""Says what long contexts cost at a device's peak: users that fit, prefill, an answer, a user switch, and what binds.

Source: Challenges in Deploying Long-Context Transformers: A Theoretical Peak Performance Analysis (Fu 2024, arXiv
2405.08944); no official code. The published example is `PUBLISHED_MODEL` on `PUBLISHED_PEAK`.
Idea: all that a longer context costs comes from the size of its keys and values, through four limits: the memory's
size (users), arithmetic (prefill), the memory's rate (decode), the host link's rate (switching users). Each metric is
one formula of a few numbers, so its limit is the number that it hangs on most: d ln metric / d ln number.
Units and shapes: n tokens of context, U users, r rounds, g tokens an answer, b sequences a step; bytes, seconds, FLOP
(a multiply and an add are two). W weight bytes, N weights each token is multiplied with, k bytes of keys and values a
token, M memory, P FLOP/s, B memory's rate, H the link's rate.
    users     C = floor((M - W - activations) / KV(n)), KV(n) = n k
    prefill   max(n (2 N + 4 L d n / 2) / P, W / B); n / 2 is the mean of what a causal token looks back on
    answer    g max((W + b KV(n)) / B, b (2 N + 4 L d n) / P): weights are read once a step, whatever the batch
    switch    (KV out + KV in) / H
    sessions  C / (prefill + r (answer + switch)) a second; where all users fit, users / (prefill + r answer + reading)
Differs from the paper: an answer's step takes the batch that is held (min(U, C)) where sessions are counted; a short
prompt never takes less than reading the weights; sliding windows hold and read no more than the window; of experts,
a step reads those that its batch meets in the mean. `sessions_in_turn` bounds sessions where users wait for others, as
on one device they do: the paper's formula lets every place in memory read its document at the device's full rate.
Cost: constant; derivatives are central differences of the formulas without the floor.
Holds when: kernels reach the peak, or the shares given (`Peak.shares`), and an answer is short beside its context.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from memwall.errors import InputError
from memwall.simulate.context_model import ContextModel, Peak

Symbol = Literal["n", "k", "W", "memory", "arithmetic", "bandwidth", "link"]
HARDWARE: tuple[Symbol, ...] = ("memory", "arithmetic", "bandwidth", "link")
SYMBOLS: tuple[Symbol, ...] = ("n", "k", "W", *HARDWARE)
MEANINGS: Mapping[str, str] = {
    "memory": "memory size", "arithmetic": "FLOP/s", "bandwidth": "memory bandwidth", "link": "link bandwidth",
    "n": "context", "k": "KV bytes per token", "W": "weight bytes",
}  # fmt: skip
Metric = Literal["users", "prefill", "answer", "switch", "sessions"]
METRICS: tuple[Metric, ...] = ("users", "prefill", "answer", "switch", "sessions")
STEP = 1e-5
"""Relative step of the central differences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What compression multiplies (`context_methods`): keys and values as held, as read by a step, as switched;
    prefill's arithmetic, of it attention's; weights. step_flop: further FLOP of a user's step.
    """

    held: float = 1.0
    read: float = 1.0
    switched: float = 1.0
    prefill: float = 1.0
    attention: float = 1.0
    weights: float = 1.0
    step_flop: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Sessions: a document of `context` tokens, then `rounds` questions with answers of `answer` tokens, each read for
    `reading_seconds`, as is the document. activation_bytes: kept free beside weights, keys and values.
    """

    context: float
    users: float = 1
    rounds: int = 5
    answer: int = 250
    reading_seconds: float = 0.0
    activation_bytes: float = 0.0

    def __post_init__(self) -> None:
        for what in ("context", "users", "rounds", "answer"):
            if not (0 < getattr(self, what) < math.inf):
                raise InputError(f"{what} is {getattr(self, what)}; it must be above zero and finite")
        for what in ("reading_seconds", "activation_bytes"):
            if not (0 <= getattr(self, what) < math.inf):
                raise InputError(f"{what} is {getattr(self, what)}; it must not be negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """A model on a device under a workload. whole: users come in whole numbers; else as the formulas' continuous form,
    which has derivatives.
    """

    model: ContextModel
    peak: Peak
    workload: Workload
    effect: Effect = field(default_factory=Effect)
    whole: bool = True

    @property
    def weight_bytes(self) -> float:
        """W, compressed."""
        return self.model.weight_bytes * self.effect.weights

    @property
    def plain_kv_bytes(self) -> float:
        """KV(n) of a user without compression."""
        return self.model.kv_bytes(self.workload.context)

    @property
    def kv_bytes(self) -> float:
        """KV(n) of a user as it is held."""
        return self.plain_kv_bytes * self.effect.held

    @property
    def switched_bytes(self) -> float:
        """KV(n) of a user as it crosses the link, one way."""
        return self.plain_kv_bytes * self.effect.switched

    @property
    def users(self) -> float:
        """C, users whose keys and values are in memory at once; 0 where one's are too many."""
        free = self.peak.memory - self.weight_bytes - self.workload.activation_bytes
        count = max(free, 0.0) / self.kv_bytes
        return math.floor(count) if self.whole else count

    @property
    def least_devices(self) -> int:
        """Devices of this kind that one user needs."""
        needed = self.weight_bytes + self.workload.activation_bytes + self.kv_bytes
        return math.ceil(needed / self.peak.memory_bytes)

    @property
    def batch(self) -> float:
        """Sequences of a step where all users in memory want an answer."""
        return min(self.workload.users, self.users)

    @property
    def prefill_flop(self) -> float:
        """Of one document."""
        model = self.model
        layers, width = model.prefill_attention or (model.layers, model.attention_width)
        attention = 4 * width * model.pairs(self.workload.context) * layers / model.layers * self.effect.attention
        products = 2 * (self.workload.context * model.parameters + model.head_parameters)
        return (products + attention) * self.effect.prefill

    @property
    def prefill(self) -> float:
        """Seconds of one document."""
        read = self.model.step_read_bytes(self.workload.context) * self.effect.weights
        exchange = self.peak.exchange_seconds(self.model, self.workload.context)
        return max(self.prefill_flop / self.peak.arithmetic, read / self.peak.bandwidth) + exchange

    def step_parts(self, batch: float) -> tuple[float, float]:
        """Seconds of a decode step's arithmetic and of its reads."""
        model, context = self.model, self.workload.context
        kv = self.plain_kv_bytes * self.effect.read
        seen = model.kv_bytes(context) / model.layer_token_bytes  # tokens looked at, over all layers
        flop = 2 * (model.parameters + model.head_parameters) + 4 * model.attention_width * seen + self.effect.step_flop
        read = model.step_read_bytes(batch) * self.effect.weights + batch * kv
        return batch * flop / self.peak.arithmetic, read / self.peak.bandwidth

    def answer_seconds(self, batch: float) -> float:
        """Seconds of an answer while `batch` sequences are answered together."""
        return self.workload.answer * (max(self.step_parts(batch)) + self.peak.exchange_seconds(self.model, batch))

    @property
    def answer(self) -> float:
        """Seconds of an answer to one user alone."""
        return self.answer_seconds(1)

    @property
    def switch(self) -> float:
        """Seconds until one user's keys and values are out and another's in."""
        return 2 * self.switched_bytes / self.peak.link

    @property
    def session_seconds(self) -> float:
        """What a session takes of one place in memory, reading left out; no switch where all users fit."""
        switch = 0.0 if self.workload.users <= self.users else self.switch
        return self.prefill + self.workload.rounds * (self.answer_seconds(self.batch) + switch)

    @property
    def sessions(self) -> float:
        """Sessions per second: what the places in memory carry, and never more than the users ask for."""
        if not self.users:
            return 0.0
        reading = (self.workload.rounds + 1) * self.workload.reading_seconds
        return min(self.users / self.session_seconds, self.workload.users / (self.session_seconds + reading))

    @property
    def sessions_in_turn(self) -> float:
        """Most sessions per second where users share the device: it reads one document at a time, answers in batches
        between them, and its link carries one user at a time beside that.
        """
        batch = self.batch
        if not batch:
            return 0.0
        busy = self.prefill + self.workload.rounds * self.answer_seconds(batch) / batch
        link = 0.0 if self.workload.users <= self.users else self.workload.rounds * self.switch
        return min(1 / max(busy, link), self.sessions)

    @property
    def critical_batch(self) -> float:
        """B*: tokens of a step from which on the weights' arithmetic takes longer than reading them."""
        model = self.model
        read = model.step_read_bytes(math.inf) * self.effect.weights
        products = 2 * (model.parameters + model.head_parameters)
        return self.peak.arithmetic * read / (products * self.peak.bandwidth)

    @property
    def turning_batch(self) -> float:
        """Batch from which on decode is bound by arithmetic at this context; infinite where keys and values, which
        every user brings, take longer to read than their user's arithmetic.
        """
        one, two = self.step_parts(1.0), self.step_parts(2.0)
        gained = (two[0] - one[0]) - (two[1] - one[1])
        return max((one[1] - one[0]) / gained + 1, 1.0) if gained > 0 else math.inf

    @property
    def balance_context(self) -> float:
        """n*, the context whose keys and values are as many bytes as the weights: decode is mostly theirs beyond."""
        return self.weight_bytes / (self.model.token_bytes * self.effect.held)

    def scaled(self, symbol: Symbol, factor: float) -> Analysis:
        """The same, not in whole users, with one number multiplied."""
        model, peak, work = self.model, self.peak, self.workload
        if symbol == "n":
            work = replace(work, context=work.context * factor)
        elif symbol == "k":
            model = replace(model, kv_number_bytes=model.kv_number_bytes * factor)
        elif symbol == "W":
            return replace(self, whole=False, effect=replace(self.effect, weights=self.effect.weights * factor))
        else:
            name = {
                "memory": "memory_bytes", "arithmetic": "flop_per_s", "bandwidth": "bytes_per_s",
                "link": "link_bytes_per_s",
            }[symbol]  # fmt: skip
            peak = replace(peak, **{name: getattr(peak, name) * factor})
        return replace(self, whole=False, model=model, peak=peak, workload=work)

    def value(self, metric: Metric) -> float:
        """A metric by name: `users` (C), `prefill`, `answer` of one user, `switch` in seconds, `sessions` a second."""
        return float(getattr(self, metric))

    def elasticity(self, metric: Metric, symbol: Symbol) -> float:
        """d ln metric / d ln symbol: by how many per cent it changes when the number grows by one; 0 where it is 0."""
        below, above = self.scaled(symbol, 1 - STEP).value(metric), self.scaled(symbol, 1 + STEP).value(metric)
        middle = replace(self, whole=False).value(metric)
        return (above - below) / (2 * STEP * middle) if middle else 0.0

    def derivative(self, metric: Metric, symbol: Symbol) -> float:
        """d metric / d symbol, per token, byte or byte per second."""
        at = {
            "n": self.workload.context, "k": self.model.token_bytes, "W": self.weight_bytes,
            "memory": self.peak.memory_bytes, "arithmetic": self.peak.flop_per_s,
            "bandwidth": self.peak.bytes_per_s, "link": self.peak.link_bytes_per_s,
        }[symbol]  # fmt: skip
        return self.elasticity(metric, symbol) * replace(self, whole=False).value(metric) / at

    def bottleneck(self, metric: Metric) -> Symbol | None:
        """The hardware number that a metric hangs on most; None where none of them can help (nothing fits)."""
        pull = {symbol: abs(self.elasticity(metric, symbol)) for symbol in HARDWARE}
        best = max(HARDWARE, key=lambda symbol: pull[symbol])
        return best if pull[best] > 1e-6 else None
