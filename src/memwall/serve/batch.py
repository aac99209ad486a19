"""An offline batch: requests of a file through the engine, answers to a file, sharing planned for all of them at once.

All prompts are tokenised first, and only their ids are kept (on the ledger as `batch/prompts`); a request is read and
parsed again when it enters the engine.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from memwall import _native
from memwall.engine.batchllm import BatchPlan, Room, plan_alone, plan_batch
from memwall.engine.offline import OfflineRun
from memwall.engine.prefix_tree import Prompts
from memwall.engine.sequence import Event, Request
from memwall.engine.serving import Serving
from memwall.errors import BudgetExceeded, DoesNotFit, InputError
from memwall.hardware.units import format_bytes
from memwall.serve.answers import Form
from memwall.serve.batch_file import CHAT, BatchInput, BatchOutput, Found, Line
from memwall.serve.choices import Choice
from memwall.serve.fields import ApiError
from memwall.serve.parse import Asked, Parser

PROMPTS_OWNER = "batch/prompts"
PLAN_OWNER = "batch/plan"
PLAN_BYTES_PER_TOKEN = 8
"""While planning: the ids with their big end first, and the same cut into prompts."""
STALLED_SECONDS = 0.02
MOST_STALLS = 1500
FEW_ANSWERS = 8
Progress = Callable[[str, int, int], None]


@dataclass(slots=True)
class History:
    """How much of what they may make answers really make: from those that are there, resumed ones too."""

    made: int = 0
    allowed: int = 0
    answers: int = 0

    def add(self, made: int, allowed: int) -> None:
        """One more answer."""
        self.made, self.allowed, self.answers = self.made + made, self.allowed + allowed, self.answers + 1

    def expected(self, allowed: int) -> int:
        """Tokens that an answer of at most so many will likely have."""
        if self.answers < FEW_ANSWERS or not self.allowed:
            return allowed
        return max(min(round(allowed * self.made / self.allowed), allowed), 1)


@dataclass(slots=True)
class _Job:
    """A line on its way: its choices, and how many are not over."""

    found: Found
    line: Line
    asked: Asked
    choices: list[Choice]
    left: int = 0


@dataclass(slots=True)
class BatchRun:
    """One run of a batch. `prepare`, then `run`."""

    serving: Serving
    parser: Parser
    source: BatchInput
    output: BatchOutput
    planned: bool = True
    found: list[Found] = field(default_factory=list)
    plan: BatchPlan | None = None
    history: History = field(default_factory=History)
    seconds: float = 0.0
    completion_tokens: int = 0
    _prompts: Prompts | None = None
    _owners: list[tuple[int, int]] = field(default_factory=list)
    _most: list[int] = field(default_factory=list)
    _jobs: dict[int, _Job] = field(default_factory=dict)
    _offline: OfflineRun | None = None
    _charge: Any = None

    @property
    def num_pending(self) -> int:
        """Lines that this run has to answer."""
        return len({line for line, _ in self._owners})

    @property
    def offline(self) -> OfflineRun:
        """The batch in the engine."""
        assert self._offline is not None
        return self._offline

    def prepare(self, progress: Progress | None = None) -> None:
        """Reads and checks all lines, tokenises those without an answer, and plans. Bad lines become error lines."""
        tokens, starts = array("i"), array("q", [0])
        for found, line in self.source:
            error = found.error
            if line is not None and line.custom_id in self.output.answered:
                self._remember(line)
            elif line is not None:
                try:
                    self._take(len(self.found), line, tokens, starts)
                except ApiError as refused:
                    error = refused
            self.found.append(found)
            if error is not None:
                self.output.fail(found, error)
            if progress is not None and found.number % 64 == 0:
                progress("reading", found.place.offset, self.source.size)
        if not self.found:
            raise InputError(f"{self.source.path}: no requests in it; give one JSON object a line")
        self.output.check({found.custom_id for found in self.found if found.custom_id is not None})
        self._charge = self._charged(PROMPTS_OWNER, tokens.itemsize * len(tokens) + 40 * len(starts))
        ids = np.frombuffer(tokens, np.int32) if tokens else np.zeros(0, np.int32)
        self._prompts = Prompts(tokens=ids, starts=np.frombuffer(starts, np.int64))
        self.plan = self._planned() if self.planned else plan_alone(self._prompts)
        _native.give_back_freed_memory()

    def _take(self, index: int, line: Line, tokens: array[int], starts: array[int]) -> None:
        asked = self._parse(line)
        for number, request in enumerate(asked.requests):
            self._owners.append((index, number))
            self._most.append(request.sampling.max_new_tokens)
            tokens.extend(request.prompt)
            starts.append(len(tokens))

    def _parse(self, line: Line) -> Asked:
        return self.parser.chat(line.body) if line.url == CHAT else self.parser.completion(line.body)

    def _remember(self, line: Line) -> None:
        allowed = line.body.get("max_completion_tokens") or line.body.get("max_tokens")
        made, choices = self.output.usage(line.custom_id)
        if type(allowed) is int and allowed > 0 and choices:
            self.history.add(made, allowed * choices)

    def _charged(self, owner: str, nbytes: int) -> Any:
        try:
            return self.serving.arena.charge(owner, nbytes)
        except BudgetExceeded as refused:
            raise DoesNotFit(
                f"the prompts of {len(self.found):,} lines do not fit beside the model: {refused}. Give more --memory, "
                "or cut the file into several"
            ) from refused

    def _planned(self) -> BatchPlan:
        assert self._prompts is not None
        limits = self.serving.engine.limits
        transient = self._charged(PLAN_OWNER, PLAN_BYTES_PER_TOKEN * len(self._prompts.tokens))
        pages = limits.pages(self.serving.context_tokens)
        room = Room(page_tokens=limits.page_tokens, pages=pages, outputs=self._most)
        outputs = [self.history.expected(most) for most in self._most]
        try:
            return plan_batch(self._prompts, outputs, least_prefix=limits.page_tokens, room=room)
        finally:
            transient.release()

    # ---- running ---------------------------------------------------------------------------------------------------

    def run(self, progress: Progress | None = None) -> None:
        """Answers all lines that have none, then puts the file in order."""
        assert self.plan is not None
        assert self._prompts is not None
        engine = self.serving.engine
        self._offline = OfflineRun(
            engine,
            self.plan,
            self._prompts.lengths.tolist(),
            self._request,
            lambda number: self.history.expected(self._most[number]),
        )
        began, whole, stalls = time.perf_counter(), self.num_pending, 0
        before = len(self.output.answered) + len(self.output.errors)
        while not self._offline.done:
            self.serving.govern()
            steps = engine.totals.steps
            for prompt, event in self._offline.step():
                self._deliver(prompt, event)
            stalls = 0 if engine.totals.steps > steps else stalls + 1
            if stalls:
                self._wait(stalls)
            if progress is not None:
                progress("answering", len(self.output.answered) + len(self.output.errors) - before, whole)
        self.output.finish(self.found)
        self.seconds = time.perf_counter() - began

    def _wait(self, stalls: int) -> None:
        """The budget has no room for anyone now: what the process holds outside the arena may shrink again."""
        if stalls > MOST_STALLS:
            budget = self.serving.budget_bytes
            raise DoesNotFit(
                "there is no room left for a single request"
                + (f" in {format_bytes(budget)}; give more --memory, or a shorter --context" if budget else "")
            )
        _native.give_back_freed_memory()
        if stalls > 2:
            time.sleep(STALLED_SECONDS)

    def _request(self, prompt: int) -> Request:
        index, number = self._owners[prompt]
        job = self._jobs.get(index)
        if job is None:
            line = self.source.read(self.found[index])
            asked = self._parse(line)
            choices = [Choice(self.parser.tokenizer, asked.stop, asked.calls) for _ in asked.requests]
            job = self._jobs[index] = _Job(self.found[index], line, asked, choices, len(choices))
        return job.asked.requests[number]

    def _deliver(self, prompt: int, event: Event) -> None:
        index, number = self._owners[prompt]
        job = self._jobs[index]
        choice = job.choices[number]
        piece = choice.push(event)
        if piece is None or piece.finish is None:
            return
        if event.finish is None:  # a stop text ended it; the engine does not know
            self.offline.end(prompt)
        self.history.add(choice.tokens, self._most[prompt])
        self.completion_tokens += choice.tokens
        job.left -= 1
        if job.left == 0:
            self._write(index, job)

    def _write(self, index: int, job: _Job) -> None:
        del self._jobs[index]
        if any(choice.failed for choice in job.choices):
            self.output.fail(job.found, ApiError("the engine failed at this request", code="server_error"))
            return
        chat = job.line.url == CHAT
        form = Form(asked=job.asked, model=self.parser.settings.name, tokenizer=self.parser.tokenizer, chat=chat)
        self.output.answer(job.line.custom_id, form.whole(job.choices))

    def release(self) -> None:
        """Gives the prompts up."""
        self._prompts = None
        if self._charge is not None:
            self._charge.release()
            self._charge = None

    # ---- what came of it -------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Counts, sharing and steps, for `--json`."""
        assert self.plan is not None
        sharing, totals, steps = self.plan.sharing, self.serving.engine.totals, self.offline.statistics
        first = steps.curve[0][0] if steps.curve else 0.0
        return {
            "lines": len(self.found),
            "answered": len(self.output.answered) - self.output.kept,
            "kept": self.output.kept,
            "errors": len(self.output.errors),
            "first_error": self.output.first_error,
            "seconds": round(self.seconds, 3),
            "completion_tokens": self.completion_tokens,
            "prompt_tokens": sharing.logical,
            "planned_prompt_tokens": sharing.physical,
            "computed_prompt_tokens": totals.computed_prompt_tokens,
            "sharing": {
                "groups": sharing.num_groups,
                "mean_degree": round(sharing.mean_degree, 2),
                "mean_prefix_tokens": round(sharing.mean_prefix, 1),
                "mean_distinct_tokens": round(sharing.mean_distinct, 1),
                "saved": round(sharing.ratio, 4),
                "saved_on_all_levels": round(1 - sharing.tree / sharing.logical, 4) if sharing.logical else 0.0,
            },
            "steps": {
                "count": steps.steps,
                "mean_tokens": round(steps.mean_tokens, 1),
                "tokens_5th_percentile": steps.percentile(0.05),
                "tokens_median": steps.percentile(0.5),
                "most_requests": steps.peak_requests,
            },
            "prefix_bytes": {
                "peak": steps.peak_prefix_bytes,
                "curve": [[round(at - first, 3), held] for at, held in steps.curve],
            },
            "preempted": dict(totals.preempted),
        }
