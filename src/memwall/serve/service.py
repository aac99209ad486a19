"""Between the event loop of the sockets and the engine's thread.

A step's events come over in one call and are put into queues of the jobs they belong to; the engine never waits for a
reader. A job that is closed early cancels its requests, which frees their pages.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from memwall.engine.sequence import Event
from memwall.engine.serving import Serving
from memwall.engine.thread import Answer, EngineThread
from memwall.errors import InputError
from memwall.serve.choices import Choice, Piece
from memwall.serve.fields import ApiError
from memwall.serve.metrics import Latencies
from memwall.serve.parse import Asked
from memwall.serve.settings import ServerSettings

RECENT = 512


@dataclass(slots=True)
class Job:
    """The requests of one body. Choices of a prompt after its first wait for that one's first token: the prompt is
    then computed once and shared.
    """

    asked: Asked
    choices: list[Choice]
    arrived: float
    until: float
    queue: asyncio.Queue[tuple[int, Event]] = field(default_factory=asyncio.Queue)
    numbers: dict[int, int] = field(default_factory=dict)
    held_back: set[int] = field(default_factory=set)
    first: float | None = None
    last: float | None = None


class Service:
    """Takes jobs, hands pieces back. Lives on one event loop."""

    def __init__(self, serving: Serving, settings: ServerSettings) -> None:
        self.serving = serving
        self.settings = settings
        self.latencies = Latencies()
        self.recent: deque[tuple[float, float, float]] = deque(maxlen=RECENT)
        """(time to first token, seconds per token, seconds in all) of the last answers."""
        self.started = time.time()
        self.ending = False
        self.jobs: dict[int, Job] = {}
        self.cancelled_by_clients = 0
        self.thread = EngineThread(serving, self._deliver)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Call it on the event loop."""
        self._loop = asyncio.get_running_loop()
        self.thread.start()

    async def stop(self, drain_seconds: float) -> bool:
        """Takes nothing new; what runs may end within `drain_seconds`, the rest ends as it is."""
        self.ending = True
        return await asyncio.to_thread(self.thread.stop, drain_seconds=drain_seconds)

    def hand_back(self, after_seconds: float) -> None:
        """Ends what still runs then: answers go out as far as they came. May be called from any thread."""

        def end_all() -> None:
            for number in list(self.jobs):
                self.thread.cancel(number)

        if self._loop is not None:
            self._loop.call_soon_threadsafe(lambda: self._loop and self._loop.call_later(after_seconds, end_all))

    async def call(self, function: Callable[[], Answer]) -> Answer:
        """A function's answer, called between two steps of the engine."""
        future: Future[Answer] = self.thread.call(function)
        return await asyncio.wrap_future(future)

    def adapter_models(self, base: dict[str, Any]) -> list[dict[str, Any]]:
        """Entries of `/v1/models`, beside the base's."""
        names = self.serving.adapters.names if self.serving.adapters is not None else []
        return [{**base, "id": name, "parent": base["id"]} for name in names]

    async def run(self, asked: Asked) -> AsyncGenerator[tuple[int, Choice, Piece], None]:
        """(index, choice, new piece) until all choices have ended. Closing it early cancels them."""
        job = self._open(asked)
        try:
            left = len(job.choices)
            while left:
                index, event = await job.queue.get()
                choice = job.choices[index]
                piece = choice.push(event)
                if event.token is not None:
                    self._release_held(job, index)
                if piece is None:
                    continue
                if piece.finish is not None:
                    left -= 1
                    self._close_one(job, index)
                if choice.aborted:
                    raise ApiError("there is too much to do for a timely answer; try again later", status=503)
                if choice.failed:
                    raise ApiError("the engine failed at this request; see the server's log", status=500)
                yield index, choice, piece
            self._done(job)
        finally:
            for number in list(job.numbers):
                self.cancelled_by_clients += 1
                self.thread.cancel(number)
                self._forget(number)
            job.numbers.clear()

    def _open(self, asked: Asked) -> Job:
        if self.ending:
            raise ApiError("the server is ending; ask another one", status=503)
        if not self.thread.alive:
            raise ApiError("the engine has ended; restart the server", status=503)
        room = self.settings.queue + self.serving.engine.limits.max_sequences
        if len(self.jobs) + len(asked.requests) > room:
            raise ApiError(f"{len(self.jobs)} requests are here already, of {room}; try again later", status=429)
        now = self.serving.engine.clock()
        choices = [Choice(self.serving.tokenizer, asked.stop, asked.calls) for _ in asked.requests]  # type: ignore[arg-type]
        job = Job(asked=asked, choices=choices, arrived=now, until=now + self.settings.seconds_per_request)
        try:
            for index in range(len(asked.requests)):
                if index % asked.choices:
                    job.held_back.add(index)
                else:
                    self._submit(job, index)
        except InputError as error:
            raise ApiError(str(error), code="context_length_exceeded") from None
        return job

    def _submit(self, job: Job, index: int) -> None:
        number = self.thread.submit(replace(job.asked.requests[index], until=job.until))
        job.numbers[number] = index
        self.jobs[number] = job

    def _release_held(self, job: Job, index: int) -> None:
        """The prompt of this choice is computed: its others may come."""
        if index % job.asked.choices == 0 and job.held_back:
            for other in range(index + 1, index + job.asked.choices):
                if other in job.held_back:
                    job.held_back.discard(other)
                    self._submit(job, other)

    def _close_one(self, job: Job, index: int) -> None:
        self._release_held(job, index)  # it may have ended without a token
        for number in [number for number, at in job.numbers.items() if at == index]:
            self.thread.cancel(number)  # a stop text ended it; the engine does not know
            del job.numbers[number]
            self._forget(number)

    def _forget(self, number: int) -> None:
        self.jobs.pop(number, None)

    def _deliver(self, events: list[Event]) -> None:
        """On the engine's thread."""
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: list[Event]) -> None:
        now = self.serving.engine.clock()
        for event in events:
            job = self.jobs.get(event.id)
            if job is None:
                continue
            if event.token is not None:
                self._note_token(job, now)
            job.queue.put_nowait((job.numbers[event.id], event))

    def _note_token(self, job: Job, now: float) -> None:
        if job.first is None:
            job.first = now
            self.latencies.first_token.observe(now - job.arrived)
        elif job.last is not None:
            self.latencies.between_tokens.observe(now - job.last)
        job.last = now

    def _done(self, job: Job) -> None:
        now = self.serving.engine.clock()
        self.latencies.request.observe(now - job.arrived)
        first = job.first if job.first is not None else now
        made = max(sum(choice.tokens for choice in job.choices) - 1, 1)
        self.recent.append((first - job.arrived, (now - first) / made, now - job.arrived))
