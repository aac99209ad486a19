"""Instances that prefill, decode, or do both, on a virtual clock (discrete events).

An instance is a pipeline of `stages`, each a tensor-parallel group: a batch takes the same share of its time on every
stage, and batches follow each other in order. A prefill instance keeps finished keys and values in its own memory until
the decode side pulls them; it takes no prompt that would not fit beside them. A decode instance keeps one batch per
stage, pulls a prompt when it has room for its blocks and few others wait, and when running sequences outgrow it sets
the last one aside, which comes back first. The colocated instance does both, prompts first; a sequence that makes way
there computes its keys and values again.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from memwall.errors import DoesNotFit
from memwall.simulate.phase_latency import PhaseLatency

BLOCK_TOKENS = 16
PREFILL_SEQUENCES, PREFILL_TOKENS = 128, 8192
WAITING_SHARE = 0.05
"""Of a decode instance's blocks: prompts already pulled and not yet running may hold this much."""
CONTROL_SECONDS, CONTROL_SECONDS_PER_TOKEN = 2e-3, 1e-7
"""What the controller adds before a batch's first stage."""
STAGE_SECONDS = 1e-3
"""What a further stage adds to every stage's share of a prefill batch."""

Call = Callable[[], None]


@dataclass(slots=True, eq=False)
class Job:
    """One request. Times in seconds of the virtual clock; None until they come. made: tokens of the answer so far."""

    at: float
    prompt_tokens: int
    output_tokens: int
    first: float | None = None
    last: float | None = None
    made: int = 0
    set_aside: int = 0

    @property
    def context(self) -> int:
        return self.prompt_tokens + self.made

    @property
    def first_token_seconds(self) -> float:
        """Time to the first token; infinite where it never came."""
        return float("inf") if self.first is None else self.first - self.at

    @property
    def per_token_seconds(self) -> float:
        """Mean time of every further token; the move of keys and values is part of the second one's."""
        if self.first is None or self.last is None:
            return float("inf")
        return (self.last - self.first) / max(self.output_tokens - 1, 1)


def blocks_of(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


class Events:
    """What happens when; calls for the same time keep the order in which they were made."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Call]] = []
        self._count = 0

    def at(self, time: float, call: Call) -> None:
        self._count += 1
        heapq.heappush(self._heap, (time, self._count, call))

    def run(self) -> None:
        while self._heap:
            self.now, _, call = heapq.heappop(self._heap)
            call()


class Blocks:
    """An instance's memory; never more is taken than there is."""

    def __init__(self, most: int) -> None:
        self.most, self.used, self.peak = most, 0, 0

    def take(self, count: int) -> bool:
        """True where there was room."""
        if self.used + count > self.most:
            return False
        self.used += count
        self.peak = max(self.peak, self.used)
        return True

    def give(self, job: Job) -> None:
        """A job that is not under way holds blocks for its context."""
        self.used -= blocks_of(job.context)


class Batch:
    """Sequences that make a token each step. A step costs the same however many there are: what a job has made, and
    who needs a new block or ends next, follows from the count of steps.
    """

    def __init__(self) -> None:
        self.context = 0
        self._step = 0
        self._joined: dict[Job, tuple[int, int]] = {}
        self._ends: list[tuple[int, int, Job]] = []
        self._crossing = [0] * BLOCK_TOKENS
        self._count = 0

    def __len__(self) -> int:
        return len(self._joined)

    @property
    def growing(self) -> int:
        """Blocks that the next step needs beside those held."""
        return self._crossing[self._step % BLOCK_TOKENS]

    def add(self, job: Job) -> None:
        slot = (self._step - job.context) % BLOCK_TOKENS
        self._joined[job] = (self._step, slot)
        self._crossing[slot] += 1
        self.context += job.context
        self._count += 1
        heapq.heappush(self._ends, (self._step + job.output_tokens - job.made, self._count, job))

    def pop_last(self) -> Job:
        """The job that joined last leaves."""
        job = next(reversed(self._joined))
        self._remove(job)
        return job

    def advance(self) -> list[Job]:
        """One step; gives the jobs that it ends, which leave."""
        self._step += 1
        self.context += len(self._joined)
        ended = []
        while self._ends and self._ends[0][0] <= self._step:
            _, _, job = heapq.heappop(self._ends)
            # one that left in between and came back has another entry
            if job in self._joined and self._made(job) >= job.output_tokens:
                self._remove(job)
                ended.append(job)
        return ended

    def _made(self, job: Job) -> int:
        return job.made + self._step - self._joined[job][0]

    def _remove(self, job: Job) -> None:
        job.made = self._made(job)
        self._crossing[self._joined.pop(job)[1]] -= 1
        self.context -= job.context


class Instance:
    """What all kinds share: a pipeline, memory, and calls when it may go on."""

    def __init__(self, events: Events, latency: PhaseLatency, *, stages: int = 1, kv_tokens: int | None = None) -> None:
        """latency: of one stage's group, as if it held the whole model; kv_tokens: None for the group's own."""
        self.events, self.latency = events, latency
        self.blocks = Blocks((latency.kv_tokens if kv_tokens is None else kv_tokens) // BLOCK_TOKENS)
        self.in_work = 0
        self._free = [0.0] * stages

    @property
    def stages(self) -> int:
        return len(self._free)

    @property
    def is_free(self) -> bool:
        """Whether the first stage could take a batch now."""
        return self._free[0] <= self.events.now

    @property
    def load(self) -> int:
        """Requests that wait or are worked: what dispatching goes by."""
        raise NotImplementedError

    def step(self) -> None:
        """Launches what can be launched."""
        raise NotImplementedError

    def launch(self, seconds: float, done: Call) -> None:
        """A batch of `seconds` over all stages; `done` is called at its end, `step` when the first stage is free."""
        time, share = self.events.now, seconds / self.stages
        for stage, until in enumerate(self._free):
            time = self._free[stage] = max(time, until) + share
        self.events.at(time, done)
        self.events.at(self._free[0], self.step)

    def check_fits(self, job: Job) -> None:
        """A request that could never run is refused when it comes."""
        if blocks_of(job.prompt_tokens + job.output_tokens) > self.blocks.most:
            whole, room = job.prompt_tokens + job.output_tokens, self.blocks.most * BLOCK_TOKENS
            raise DoesNotFit(f"a request of {whole:,} tokens, but the instance has room for {room:,}")

    def take_prompts(self, waiting: deque[Job], most_tokens: int) -> list[Job]:
        """First come first served: prompts as far as a batch, its tokens and free blocks allow; a long one alone."""
        batch: list[Job] = []
        tokens = 0
        while waiting and len(batch) < PREFILL_SEQUENCES:
            job = waiting[0]
            if batch and tokens + job.context > most_tokens:
                break
            if not self.blocks.take(blocks_of(job.context + 1)):
                break
            batch.append(waiting.popleft())
            tokens += job.context
        return batch

    def prefill_seconds(self, batch: Sequence[Job]) -> float:
        """A batch through all stages."""
        lengths = [job.context for job in batch]
        control = CONTROL_SECONDS + CONTROL_SECONDS_PER_TOKEN * sum(lengths)
        return self.latency.prefill_seconds(lengths) + control + STAGE_SECONDS * (self.stages - 1) * self.stages


class PrefillInstance(Instance):
    """finished(job, release): a prompt is done, `release` frees its blocks here. saturating_tokens: prompts of so many
    tokens together already fill the device.
    """

    def __init__(
        self, *given: Any, finished: Callable[[Job, Call], None], saturating_tokens: int = PREFILL_TOKENS, **more: Any
    ) -> None:
        super().__init__(*given, **more)
        self.waiting: deque[Job] = deque()
        self._finished, self._most_tokens = finished, saturating_tokens

    @property
    def load(self) -> int:
        return len(self.waiting) + self.in_work

    def submit(self, job: Job) -> None:
        self.check_fits(job)
        self.waiting.append(job)
        self.step()

    def step(self) -> None:
        if self.is_free and (batch := self.take_prompts(self.waiting, self._most_tokens)):
            self.in_work += len(batch)
            self.launch(self.prefill_seconds(batch), partial(self._done, batch))

    def _done(self, batch: list[Job]) -> None:
        self.in_work -= len(batch)
        for job in batch:
            job.first, job.made = self.events.now, 1
            self._finished(job, partial(self._release, job))

    def _release(self, job: Job) -> None:
        self.blocks.give(job)
        self.step()


class Running(Instance):
    """Decoding of one batch per stage. ready: sequences with blocks that wait for a batch which is not under way. end:
    called for every job that is done.
    """

    def __init__(self, *given: Any, end: Callable[[Job], None] = lambda job: None, **more: Any) -> None:
        super().__init__(*given, **more)
        self.batches = [Batch() for _ in range(self.stages)]
        self.ready: deque[Job] = deque()
        self._under_way = [False] * self.stages
        self._end = end

    @property
    def load(self) -> int:
        return sum(map(len, self.batches)) + len(self.ready) + self.in_work

    def finish(self, job: Job) -> None:
        job.last = self.events.now
        self.blocks.give(job)
        self._end(job)

    def make_way(self, job: Job) -> None:
        """A running job had to give up its blocks."""
        raise NotImplementedError

    def joined(self, job: Job) -> None:
        """A job that was ready is in a batch now."""

    def launch_decode(self) -> bool:
        """The next step of a batch that is not under way; False where there is none."""
        for place, batch in enumerate(self.batches):
            if not self._under_way[place] and self._launch(place, batch):
                return True
        return False

    def _launch(self, place: int, batch: Batch) -> bool:
        """Batches are kept even; the last jobs make way where blocks run out."""
        share = -(-(sum(map(len, self.batches)) + len(self.ready)) // self.stages)
        while self.ready and len(batch) < share:
            job = self.ready.popleft()
            self.joined(job)
            batch.add(job)
        while batch and not self.blocks.take(batch.growing):
            job = batch.pop_last()
            job.set_aside += 1
            self.blocks.give(job)
            self.make_way(job)
        if batch:
            self._under_way[place] = True
            seconds = self.latency.decode_seconds(batch.context, len(batch))
            self.launch(seconds, partial(self._stepped, place))
        return bool(batch)

    def _stepped(self, place: int) -> None:
        self._under_way[place] = False
        for job in self.batches[place].advance():
            self.finish(job)
        self.step()


class DecodeInstance(Running):
    """move_seconds(prompt tokens): what pulling a prompt's keys and values takes."""

    def __init__(self, *given: Any, move_seconds: Callable[[int], float], **more: Any) -> None:
        super().__init__(*given, **more)
        self.offered: deque[tuple[Job, Call]] = deque()
        self.aside: deque[Job] = deque()
        self._waiting_blocks = 0
        self._move_seconds = move_seconds

    @property
    def load(self) -> int:
        return super().load + len(self.offered) + len(self.aside)

    def offer(self, job: Job, release: Call) -> None:
        """A prompt is done elsewhere; `release` is called once its keys and values are here."""
        self.check_fits(job)
        self.offered.append((job, release))
        self.step()

    def step(self) -> None:
        self._return_aside()
        self._pull()
        while self.is_free and self.launch_decode():
            pass

    def make_way(self, job: Job) -> None:
        self.aside.append(job)

    def joined(self, job: Job) -> None:
        self._waiting_blocks -= blocks_of(job.context)

    def _return_aside(self) -> None:
        """With room for the next token too: else it would make way at once."""
        while self.aside and self.blocks.used + blocks_of(self.aside[0].context + 1) <= self.blocks.most:
            job = self.aside.popleft()
            self._hold(job)
            self.ready.appendleft(job)

    def _pull(self) -> None:
        """Accepts prompts while few wait, there is room, and none that was set aside waits for it."""
        while self.offered and not self.aside and self._waiting_blocks < max(WAITING_SHARE * self.blocks.most, 1):
            job, release = self.offered[0]
            if not self._hold(job):
                return
            self.offered.popleft()
            self.in_work += 1
            self.events.at(self.events.now + self._move_seconds(job.prompt_tokens), partial(self._here, job, release))

    def _hold(self, job: Job) -> bool:
        held = self.blocks.take(blocks_of(job.context))
        self._waiting_blocks += blocks_of(job.context) if held else 0
        return held

    def _here(self, job: Job, release: Call) -> None:
        self.in_work -= 1
        release()
        if job.made >= job.output_tokens:
            self.joined(job)
            self.finish(job)
        else:
            self.ready.append(job)
        self.step()


class ColocatedInstance(Running):
    """Both phases on the same devices: a batch of prompts goes before decode steps whenever there is one."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.waiting: deque[Job] = deque()

    @property
    def load(self) -> int:
        return super().load + len(self.waiting)

    def submit(self, job: Job) -> None:
        self.check_fits(job)
        self.waiting.append(job)
        self.step()

    def step(self) -> None:
        while self.is_free:
            if prompts := self.take_prompts(self.waiting, PREFILL_TOKENS):
                self.in_work += len(prompts)
                self.launch(self.prefill_seconds(prompts), partial(self._prefilled, prompts))
            elif not self.launch_decode():
                return

    def make_way(self, job: Job) -> None:
        self.waiting.appendleft(job)

    def _prefilled(self, batch: list[Job]) -> None:
        self.in_work -= len(batch)
        for job in batch:
            job.made += 1
            job.first = self.events.now if job.first is None else job.first
            if job.made >= job.output_tokens:
                self.finish(job)
            else:
                self.ready.append(job)
        self.step()
