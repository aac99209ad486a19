"""From model, machine and goal to a `Plan`: predict, search, measure, explain.

Headers and configuration are read, never weights, unless quality is measured; measured figures are kept under the
model's fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path

from memwall import __version__
from memwall.errors import InputError
from memwall.hardware.machine import Machine, load_machine
from memwall.hardware.units import format_bytes
from memwall.kv import fitted
from memwall.memory import Budget
from memwall.models.checkpoint import Checkpoint, has_weights
from memwall.models.config import ModelConfig
from memwall.models.precision import resolve
from memwall.models.stack_index import StackIndex
from memwall.plan import store
from memwall.plan.base import Choice, Option, Plan, Quality
from memwall.plan.predict import ModelSpace, check_policy, check_weights, measured_runtime_bytes
from memwall.plan.profile import KernelProfile, load_profile
from memwall.plan.search import (
    AUTO,
    Candidate,
    Goal,
    candidate_of,
    check,
    contexts,
    fits,
    is_open,
    search,
    segment_tokens,
)
from memwall.plan.speed import (
    Speed,
    arithmetic_elsewhere,
    arithmetic_here,
    batching_elsewhere,
    batching_here,
    predict_elsewhere,
    predict_here,
)
from memwall.plan.survey import caches_for, survey

HELD_OUT_NAME = "bundled held-out text"
#: tokens of held-out text a choice is measured on, half of them as prompts: enough for the KL of formats a bit apart to
#: differ by several standard errors
MEASURED_TOKENS = 2048
MAX_RUNNERS_UP = 10
MAX_RUNNERS_UP_SEARCHED = 24
NO_CACHE = "none"
"""In place of a cache policy: whole windows at once, so that only the weights are measured."""

Progress = Callable[[int, int], None]


class Planner:
    """One model on one machine, planned for any number of goals."""

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        machine: str | None = None,
        device: str | None = None,
        runtime_bytes: int | None = None,
        text: str | None = None,
        profile: bool = True,
        measure_all: bool = False,
        search_kv: bool = False,
        config_only: bool = False,
        extra_bytes: Mapping[str, int] | None = None,
        progress: Progress | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        """machine: a preset's name; None is this one. device: cpu or gpu; None is the gpu of a machine that has one,
        else the cpu. config_only: a folder without weights will do, its config.json tells their sizes.

        text: held-out text instead of the bundled one. measure_all: the runners-up too, where quality is measured.
        search_kv: where the cache is left open, combinations of policies too (`plan.survey`), which takes a while.
        profile: measure kernels not yet known. runtime_bytes: the interpreter's own memory, where the caller knows
        it. extra_bytes: see `ModelSpace`. tell: hears what is about to be measured.
        """
        self.model = Path(model)
        config = ModelConfig.from_directory(self.model)
        self._no_weights = config_only and not has_weights(self.model)
        saved = stack = None
        if self._no_weights:
            self.fingerprint = hashlib.sha256(
                json.dumps(config.source, sort_keys=True, default=str).encode()
            ).hexdigest()
        else:
            with Checkpoint(self.model, config) as checkpoint:
                saved = resolve(config, "saved", checkpoint) if checkpoint.manifest is not None else None
                stack = StackIndex.of(checkpoint)
                self.fingerprint = checkpoint.fingerprint()
        self.elsewhere: Machine | None = load_machine(machine) if machine is not None else None
        self.machine_name = self.elsewhere.title if self.elsewhere is not None else "this machine"
        device_tier, host_tier = _tiers(self.elsewhere, device)
        self.device = "cpu" if device_tier == "ram" else "gpu"
        self.space = ModelSpace(
            config,
            saved=saved,
            stack=stack,
            runtime_bytes=runtime_bytes or measured_runtime_bytes(self.model),
            device_tier=device_tier,
            host_tier=host_tier,
            extra_bytes=extra_bytes,
        )
        self._text = text
        self._progress = progress
        self._tell = tell or (lambda what: None)
        self._profile = profile
        self._measure_all = measure_all
        self._search_kv = search_kv
        self._profiles: dict[int, KernelProfile] = {}
        self._evaluator: object | None = None

    def plan(self, goal: Goal, *, measure: bool = True) -> Plan:
        """The best choice for the goal. Raises DoesNotFit or InputError; see `search`."""
        goal = self._complete(goal)
        check_weights(self.space, goal.weights)
        check_policy(self.space, goal.kv)
        if self._no_weights and (self._search_kv or goal.max_kl is not None):
            raise InputError(f"{self.model}: holds no weights to measure losses on; leave out --search-kv and --max-kl")
        measure = measure and not self._no_weights
        if self._search_kv:
            return self._surveyed(goal, measure)
        if measure:
            return self._build(goal, search(self.space, goal, measure=self.quality))
        candidates = search(self.space, replace(goal, max_kl=None))
        # kept figures count only when every candidate has one: known and unknown cannot be compared
        kept = all(self._read_quality(one.choice) is not None for one in candidates)
        if kept or goal.max_kl is not None:
            candidates = search(self.space, goal, measure=self._read_quality if kept else None)
        return self._build(goal, candidates)

    def _surveyed(self, goal: Goal, measure: bool) -> Plan:
        """The best of many caches and their combinations."""
        if goal.kv != AUTO or not measure:
            raise InputError("searching for a cache compares measured losses: leave --kv to auto and measuring on")
        self.space.policies = caches_for(self.space.shape, self.fingerprint, contexts(self.space, goal)[-1])
        progress, self._progress = self._progress, None  # counted in caches here, not in windows of text
        try:
            candidates = search(
                self.space,
                goal,
                measure=self.quality,
                survey=lambda found: survey(found, self.quality, self.weights_quality, tick=progress),
            )
        finally:
            self._progress = progress
        return self._build(goal, candidates)

    def exact(self, goal: Goal, *, measure: bool = False) -> Plan:
        """The plan of settings that are all given, whether or not they fit (`Plan.fits` says)."""
        goal = self._complete(goal)
        if is_open(goal.weights) or goal.kv == AUTO:
            raise InputError("exact planning needs weights and cache named; leave neither to auto")
        check_weights(self.space, goal.weights)
        check_policy(self.space, goal.kv)
        check(self.space, goal)
        context = contexts(self.space, goal)[0]
        choice = Choice(
            weights=goal.weights,
            kv=goal.kv,
            context=context,
            batch=goal.batch or 1,
            threads=goal.threads,
            device=goal.device,
            segment_tokens=segment_tokens(goal, goal.kv, context),
        )
        quality = self.quality(choice) if measure else self._read_quality(choice)
        return self._build(goal, [replace(candidate_of(self.space, choice), quality=quality)])

    def weights_quality(self, choice: Choice) -> Quality | None:
        """Measured loss of a choice's weights alone, with an exact cache."""
        return self.quality(replace(choice, kv=NO_CACHE))

    def quality(self, choice: Choice) -> Quality | None:
        """Measured loss of a choice, from the cache file where it was measured before."""
        known = self._read_quality(choice)
        if known is not None or self._no_weights:
            return known
        from memwall.engine.quality import Evaluator

        if self._evaluator is None:
            self._evaluator = Evaluator(self.model, self.text, limit_tokens=MEASURED_TOKENS, threads=choice.threads)
        assert isinstance(self._evaluator, Evaluator)
        through = None if choice.kv == NO_CACHE else choice.kv
        cache = "" if through is None else f" and a {through} cache"
        self._tell(f"the quality of {choice.weights} weights{cache} on {MEASURED_TOKENS:,} tokens of text")
        figures = self._evaluator.score(choice.weights, through, progress=self._progress)
        if figures.kl_nats is None or figures.top1_agreement is None:
            return None
        name = HELD_OUT_NAME if self._text is None else "the text given"
        quality = Quality(
            kl_nats=figures.kl_nats,
            perplexity=figures.perplexity,
            top1_agreement=figures.top1_agreement,
            measured_on=name,
            tokens=figures.tokens,
        )
        store.update(
            "quality",
            {self._quality_key(choice): [quality.kl_nats, quality.perplexity, quality.top1_agreement, quality.tokens]},
        )
        return quality

    @property
    def text(self) -> str:
        """The held-out text that quality is measured on."""
        return held_out_text() if self._text is None else self._text

    def speed(self, choice: Choice) -> Speed | None:
        """Predicted speed of a choice; None where kernels are not profiled and may not be now."""
        specs = self.space.specs(choice.weights)
        cache_bytes = sum(self.space.cache_rows(choice.kv, choice.context, choice.segment_tokens).values())
        if self.elsewhere is not None:
            return predict_elsewhere(
                self.space.config, specs, choice, cache_bytes, self.elsewhere, self.space.device_tier
            )
        if self.device != "cpu":
            return None  # kernels are profiled on the processor only
        profile = self._profiles.get(choice.threads)
        if profile is None:
            profile = self._profiles[choice.threads] = load_profile(threads=choice.threads, measure=self._profile)
        speed = predict_here(self.space.config, specs, choice, cache_bytes, profile)
        profile.save()
        return speed

    def _arithmetic(self, choice: Choice) -> str:
        """What to know of a cache that rebuilds its keys; empty for others. Call it after `speed`."""
        if self.elsewhere is not None:
            return arithmetic_elsewhere(self.space.config, choice, self.elsewhere, self.space.device_tier)
        profile = self._profiles.get(choice.threads)
        specs = self.space.specs(choice.weights)
        return arithmetic_here(self.space.config, specs, choice, profile) if profile is not None else ""

    def _batching(self, choice: Choice) -> str:
        """What the batch costs; empty for one sequence. Call it after `speed`."""
        specs = self.space.specs(choice.weights)
        if self.elsewhere is not None:
            return batching_elsewhere(self.space.config, specs, choice, self.elsewhere, self.space.device_tier)
        profile = self._profiles.get(choice.threads)
        return batching_here(self.space.config, specs, choice, profile) if profile is not None else ""

    def _fit_first(self, choice: Choice) -> str:
        """What must be run before this choice can."""
        parts = fitted.missing(self.fingerprint, choice.kv)
        return "".join(f" Before it can run, fit it once: `memwall fit {self.model} '{part}'`." for part in parts)

    def _complete(self, goal: Goal) -> Goal:
        """Fill in what the machine implies: its device, and its capacities where another one is planned for without
        a budget.
        """
        if match := re.fullmatch(r"auto(\([^()]*\))", goal.weights):
            self.space.mix(match[1].replace(" ", ""))
            goal = replace(goal, weights=AUTO)
        elif goal.weights == AUTO:
            self.space.mix(None)
        if self.elsewhere is None or goal.budget:
            return replace(goal, device=self.device)
        tiers = dict.fromkeys((self.space.device_tier, self.space.host_tier))
        return replace(
            goal, device=self.device, budget={tier: int(self.elsewhere.tier(tier).capacity_bytes) for tier in tiers}
        )

    def _build(self, goal: Goal, candidates: list[Candidate]) -> Plan:
        best = candidates[0]
        speed = self.speed(best.choice)
        return Plan(
            model=str(self.model),
            fingerprint=self.fingerprint,
            machine=self.machine_name,
            budget=dict(goal.budget),
            choice=best.choice,
            rows=self.space.rows(best.choice),
            peak_bytes=dict(best.peak_bytes),
            bits_per_weight=best.bits_per_weight,
            kv_bits_per_value=best.cache_bits,
            kv_savings=self.space.cache_savings(best.choice).factors,
            decode_tokens_per_s=speed.decode_tokens_per_s if speed else None,
            decode_tokens_per_s_at_start=speed.decode_tokens_per_s_at_start if speed else None,
            prefill_tokens_per_s=speed.prefill_tokens_per_s if speed else None,
            quality=best.quality,
            explanation=explain(self.space, goal, candidates)
            + _considered(candidates)
            + self._arithmetic(best.choice)
            + self._batching(best.choice)
            + self._fit_first(best.choice)
            + (
                " The folder holds no weights: their sizes are those that config.json tells."
                if self._no_weights
                else ""
            ),
            runners_up=tuple(self._runners_up(goal, candidates)),
        )

    def _runners_up(self, goal: Goal, candidates: list[Candidate]) -> list[Option]:
        """The other policies' best, then the uniform formats beside the chosen cache: what more or fewer bits would
        need.
        """
        best = candidates[0]
        options = [self._option(one, self._beside(one, best)) for one in candidates[1:]]
        for weights in sorted({*self.space.uniform, self.space.ceiling}, key=self.space.weight_bits, reverse=True):
            choice = replace(best.choice, weights=weights)
            if self.space.specs(weights) == self.space.specs(best.choice.weights):
                continue  # the chosen one under its own or another name
            candidate = replace(candidate_of(self.space, choice), quality=self._quality_beside(choice))
            if fits(self.space, choice, goal.budget):
                note = "fits; fewer bits" if candidate.bits_per_weight < best.bits_per_weight else "fits"
            else:
                over = max(candidate.peak_bytes.get(tier, 0) - cap for tier, cap in goal.budget.items())
                note = f"needs {format_bytes(over)} more"
            options.append(self._option(candidate, note))
        return options[: MAX_RUNNERS_UP_SEARCHED if self._search_kv else MAX_RUNNERS_UP]

    def _beside(self, one: Candidate, best: Candidate) -> str:
        """The note of a runner-up with another cache."""
        note = one.note or _compared(one, best)
        return f"{note}; bound by arithmetic" if self._arithmetic(one.choice) else note

    def _quality_beside(self, choice: Choice) -> Quality | None:
        return self.quality(choice) if self._measure_all else self._read_quality(choice)

    def _option(self, candidate: Candidate, note: str) -> Option:
        # a cache that was not worth measuring is not worth timing either
        speed = None if candidate.note else self.speed(candidate.choice)
        return Option(
            choice=candidate.choice, peak_bytes=dict(candidate.peak_bytes), bits_per_weight=candidate.bits_per_weight,
            kv_bits_per_value=candidate.cache_bits, decode_tokens_per_s=speed.decode_tokens_per_s if speed else None,
            quality=candidate.quality, note=note,
        )  # fmt: skip

    def _quality_key(self, choice: Choice) -> str:
        digest = hashlib.sha256(self.text.encode()).hexdigest()[:16]
        return f"{__version__} {self.fingerprint} {choice.weights} {choice.kv} {digest} {MEASURED_TOKENS}"

    def _read_quality(self, choice: Choice) -> Quality | None:
        kept = store.read("quality").get(self._quality_key(choice))
        if not (isinstance(kept, list) and len(kept) == 4 and all(isinstance(one, int | float) for one in kept)):
            return None
        name = HELD_OUT_NAME if self._text is None else "the text given"
        return Quality(
            kl_nats=kept[0], perplexity=kept[1], top1_agreement=kept[2], measured_on=name, tokens=int(kept[3])
        )


def make_plan(
    model: str | os.PathLike[str],
    *,
    budget: Budget | None = None,
    weights: str = AUTO,
    kv: str = AUTO,
    context: int | None = None,
    prompt_tokens: int | None = None,
    batch: int | None = 1,
    threads: int | None = None,
    device: str | None = None,
    machine: str | None = None,
    measure: bool = True,
    max_kl: float | None = None,
    text: str | None = None,
    runtime_bytes: int | None = None,
    profile: bool | None = None,
    measure_all: bool = False,
    search_kv: bool = False,
    config_only: bool = False,
    extra_bytes: Mapping[str, int] | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> Plan:
    """Plan one model for one goal; with weights and cache both named it is exact and does not raise when it does not
    fit.

    prompt_tokens: length of the prompt, where known. budget: caps per tier (None: no cap, or another machine's
    capacities). measure: measure quality on held-out text where it is not known; profile: measure kernels where they
    are not known (None: as `measure`), otherwise speeds may be missing; measure_all: the runners-up's quality too, for
    a fuller plot; search_kv: many caches and their combinations, measured as far as that is worth it; config_only:
    see `Planner`; extra_bytes: by owner, what the caller will hold besides. progress(done, total) counts windows of
    text, or caches with `search_kv`; tell: hears what is about to be measured.
    """
    planner = Planner(
        model,
        machine=machine,
        device=device,
        runtime_bytes=runtime_bytes,
        text=text,
        profile=measure if profile is None else profile,
        measure_all=measure and measure_all,
        search_kv=search_kv,
        config_only=config_only,
        extra_bytes=extra_bytes,
        progress=progress,
        tell=tell,
    )
    goal = Goal(
        budget=dict(budget.tiers) if budget is not None else {}, weights=weights, kv=kv, context=context,
        prompt_tokens=prompt_tokens, batch=batch,
        threads=threads or default_threads(), max_kl=max_kl,
    )  # fmt: skip
    if not is_open(weights) and kv != AUTO and max_kl is None and not search_kv:
        return planner.exact(goal, measure=measure)
    return planner.plan(goal, measure=measure)


def _tiers(machine: Machine | None, device: str | None) -> tuple[str, str]:
    """(tier of weights and cache, tier of the interpreter): gpu and ram where there are such, else the first tier
    there is.
    """
    if device not in (None, "cpu", "gpu"):
        raise InputError(f"device {device!r} is unknown; use cpu or gpu")
    if machine is None:
        return ("gpu" if device == "gpu" else "ram"), "ram"
    host = "ram" if machine.has_tier("ram") else machine.tiers[0].name
    if device == "cpu" or not machine.has_tier("gpu"):
        if device == "gpu":
            machine.tier("gpu")  # raises, naming the tiers there are
        return host, host
    return "gpu", host


def default_threads() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def held_out_text() -> str:
    """The bundled text: docstrings of Python's standard library (PSF licence), used for nothing else in memwall."""
    return resources.files("memwall.plan").joinpath("heldout.txt").read_text(encoding="utf-8")


def explain(space: ModelSpace, goal: Goal, candidates: list[Candidate]) -> str:
    """Why the first candidate was chosen, in two sentences."""
    best = candidates[0]
    choice = best.choice
    what = (
        f"{choice.weights} weights ({best.bits_per_weight:.2f} bits) with a {choice.kv} cache "
        f"for {choice.context} tokens"
    )
    if not goal.budget:
        first = f"No budget was set, so {what} is taken as it is."
    else:
        # the tier that is fullest for its cap: what does not fit is what must be said
        tier = max(goal.budget, key=lambda tier: best.peak_bytes.get(tier, 0) / goal.budget[tier])
        used = f"{format_bytes(best.peak_bytes.get(tier, 0))} of {format_bytes(goal.budget[tier])} on {tier}"
        if AUTO not in (goal.weights, goal.kv):
            verdict = "fits" if fits(space, choice, goal.budget) else "does not fit"
            first = f"As asked, {what} {verdict}: it needs {used}."
        elif choice.weights == space.ceiling:
            first = f"The weights fit as they are, so {what} is chosen and takes {used}."
        else:
            first = f"{what[0].upper()}{what[1:]} is the most that fits and takes {used}."
    return f"{first} {_why(candidates)}"


def _why(candidates: list[Candidate]) -> str:
    best, others = candidates[0], candidates[1:]
    if best.quality is None:
        second = f", ahead of {others[0].choice.weights} with {others[0].choice.kv}" if others else ""
        return f"Its loss was not measured, so options are ordered by their bits{second}."
    text = (
        f"It loses {best.quality.kl_nats:.3g} nats per token to the float model on {best.quality.tokens} tokens "
        f"of {best.quality.measured_on}"
    )
    if others and others[0].quality is not None:
        other = others[0].choice
        return f"{text}, against {others[0].quality.kl_nats:.3g} for {other.weights} with {other.kv}."
    return f"{text}."


def _considered(candidates: list[Candidate]) -> str:
    """How far a search among many caches went."""
    left = sum(bool(one.note) for one in candidates)
    if not left:
        return ""
    return f" Of {len(candidates)} caches that fit, {len(candidates) - left} were measured; the others could not win."


def _compared(one: Candidate, best: Candidate) -> str:
    if one.quality is not None and best.quality is not None:
        return "fits; more loss" if one.quality.kl_nats > best.quality.kl_nats else "fits"
    return "fits; fewer bits where it counts"
