"""`memwall study ptq-impact`: weight formats under the settings of decoding, on one grid of quality, time and memory.

*Source*: Understanding the Impact of Post-Training Quantization on Large Language Models (Somnath Roy, 2023), arXiv
2309.05210.
*Idea*: formats that score alike on benchmarks may answer differently to temperature, top-k and length. So all of them
continue the same prompts with the same random numbers, and a fixed reference, the bfloat16 model, judges the texts.
*Units and shapes*: losses and divergences in nats per token; tables are [prompts, seeds].
*Differs from the paper*: its prompts, grids and metrics are not published. Temperature and top-k are varied one at a
time unless the whole product is asked for, and a length is the beginning of a longer run: since draws are given by the
step, that is the text the shorter run would have made.
*Cost*: (temperatures + top-ks) * prompts * seeds * tokens per format; one model in memory beside bfloat16.
*Holds when*: differences lie past two standard errors (`ptq_statistics`); others are called not shown.

A cell's file is named by all that decides its figures, as in the study of caches, so a study that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from memwall import __version__, kernels
from memwall.engine.counter import CounterDraws
from memwall.errors import InputError
from memwall.models import Checkpoint, ModelConfig
from memwall.models.tokenizer import Tokenizer
from memwall.studies import ptq_peers
from memwall.studies.kv_study import Store
from memwall.studies.ptq_costs import PROMPT_TOKENS, costs_of
from memwall.studies.ptq_models import BASE, FORMATS, PROMPTS, FormatModel, forced, specs_of
from memwall.studies.ptq_statistics import Texts

STUDY_VERSION = 1
TEMPERATURE, TOP_K = 0.8, 200
"""Where one setting is varied, the others stand here."""
SMALL_HIDDEN = 1024

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What is run. tokens: new tokens of a text, but for the one that the lengths are cut from; windows of
    window_tokens: held-out text; repeats: of timings; product: every temperature with every top-k.
    """

    temperatures: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)
    top_ks: tuple[int, ...] = (1, 10, 50, 200)
    lengths: tuple[int, ...] = (50, 100, 250, 500, 1000)
    seeds: int = 5
    tokens: int = 100
    windows: int = 24
    window_tokens: int = 512
    steps: int = 64
    repeats: int = 5
    product: bool = False

    def settings(self) -> list[tuple[float, int]]:
        """(temperature, top-k) of all cells of a format."""
        if self.product:
            return [(t, k) for t in self.temperatures for k in self.top_ks]
        both = [(t, TOP_K) for t in self.temperatures] + [(TEMPERATURE, k) for k in self.top_ks]
        return list(dict.fromkeys([*both, (TEMPERATURE, TOP_K)]))

    def tokens_of(self, temperature: float, top_k: int) -> int:
        """New tokens of a cell."""
        return max((*self.lengths, self.tokens)) if (temperature, top_k) == (TEMPERATURE, TOP_K) else self.tokens


FULL = Grid()
QUICK = Grid(
    temperatures=(0.1, 0.4, 0.5, 0.8, 0.9, 1.0), top_ks=(1, 200), lengths=(16, 32, 64), seeds=3, tokens=32, windows=8,
    window_tokens=256, steps=32, repeats=3,
)  # fmt: skip
QUICK_PROMPTS = 4


@dataclass(slots=True, kw_only=True)
class Row:
    """A format: held-out losses per window, bytes and times, its texts by (temperature, top-k)."""

    format: str
    library: str = "memwall"
    skipped: str = ""
    heldout: list[float] = field(default_factory=list)
    costs: dict[str, Any] = field(default_factory=dict)
    texts: dict[tuple[float, int], Texts] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """All rows, and what they were measured on."""

    model: str
    fingerprint: str
    grid: Grid
    prompts: tuple[str, ...]
    machine: str
    seconds: float
    rows: list[Row]
    version: int = STUDY_VERSION

    @property
    def base(self) -> Row:
        """bfloat16's row, which others are held against."""
        return next(row for row in self.rows if row.format == BASE)

    @property
    def own(self) -> list[Row]:
        """memwall's rows."""
        return [row for row in self.rows if row.library == "memwall" and row.texts]


class Runner:
    """One model and its material; runs the cells that the store lacks. One format is in memory at a time, and bfloat16
    beside it.
    """

    def __init__(self, directory: Path, text: str, prompts: Sequence[str], grid: Grid, store: Store) -> None:
        self.directory, self.grid, self.store, self.prompts = directory, grid, store, tuple(prompts)
        self.config = ModelConfig.from_directory(directory)
        with Checkpoint(directory, self.config) as checkpoint:
            if checkpoint.manifest is not None:
                raise InputError(f"{directory}: holds compressed weights; give the folder of the float model")
            self.fingerprint = checkpoint.fingerprint()
        tokenizer = Tokenizer.from_directory(directory)
        self.tokens = tokenizer.encode(text, add_bos=False)
        self.opening = [] if self.config.bos_token_id is None else [self.config.bos_token_id]
        self.encoded = [[*self.opening, *tokenizer.encode(prompt, add_bos=False)] for prompt in prompts]
        self._text = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._models: dict[str, FormatModel] = {}
        self._check()

    def _check(self) -> None:
        """Refuses what the model cannot take, before anything runs."""
        grid, positions = self.grid, self.config.max_position
        longest = max(map(len, self.encoded)) + max(grid.tokens_of(*each) for each in grid.settings())
        self._positions = max(longest, grid.window_tokens + 1)
        if longest > positions:
            raise InputError(
                f"prompt and new tokens need {longest} positions, and this model has {positions}: give shorter "
                f"--lengths or --tokens"
            )
        if not all(map(len, self.encoded)):
            raise InputError("a prompt is empty; give at least one word a line")
        timed = PROMPT_TOKENS + grid.steps + 1
        if max(grid.window_tokens + 1, timed) > positions:
            raise InputError(
                f"the study reads {max(grid.window_tokens + 1, timed)} positions; this model has {positions}"
            )
        needed = max(grid.windows * grid.window_tokens, timed)
        if len(self.tokens) < needed:
            raise InputError(f"the text has {len(self.tokens):,} tokens; give at least {needed:,}")

    def fill(self, row: Row, task: str, setting: tuple[float, int], texts: Texts | None) -> None:
        """One cell of a row, from the store or measured now. texts: bfloat16's at this setting, once they are there."""
        described = self._described(row.format, task, setting)
        key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]
        figures = self.store.read(key)
        if figures is None:
            figures = getattr(self, f"_{task}")(row.format, setting, texts)
            self.store.write(key, described, figures)
        if task == "heldout":
            row.heldout = figures["losses"]
        elif task == "costs":
            row.costs = figures
        elif task == "texts":
            row.texts[setting] = self._texts_of(row.format, setting, figures)
        else:
            held = row.texts[setting]
            held.kl[:], held.agreement[:] = figures["kl"], figures["agreement"]

    def _described(self, form: str, task: str, setting: tuple[float, int]) -> dict[str, Any]:
        grid = self.grid
        found: dict[str, Any] = {"study": f"ptq-impact {STUDY_VERSION}", "memwall": __version__,
                                 "model": self.fingerprint, "format": form, "task": task}  # fmt: skip
        if task in ("texts", "forced"):
            draws = {"prompts": self.prompts, "seeds": grid.seeds, "tokens": grid.tokens_of(*setting)}
            return {**found, "temperature": setting[0], "top_k": setting[1], **draws}
        if task == "heldout":
            return {**found, "text": self._text, "windows": grid.windows, "window_tokens": grid.window_tokens}
        threads = kernels.num_threads()
        return {**found, "text": self._text, "steps": grid.steps, "repeats": grid.repeats, "threads": threads}

    def _texts_of(self, form: str, setting: tuple[float, int], figures: dict[str, Any]) -> Texts:
        return Texts(
            format=form, temperature=setting[0], top_k=setting[1], num_tokens=self.grid.tokens_of(*setting),
            seeds=self.grid.seeds, tokens=figures["tokens"], losses=figures["losses"], kl=[], agreement=[],
        )  # fmt: skip

    def model(self, form: str) -> FormatModel:
        """The format's model, loaded when it is first needed; the one before it goes."""
        if form not in self._models:
            self.release(but=BASE)
            self._models[form] = FormatModel(self.directory, form, context_tokens=self._positions)
        return self._models[form]

    def release(self, but: str = "") -> None:
        """Gives models back."""
        for name in [name for name in self._models if name != but]:
            self._models.pop(name).release()

    def _sequences(self) -> Iterator[tuple[int, int]]:
        return ((prompt, seed) for prompt in range(len(self.prompts)) for seed in range(self.grid.seeds))

    def _heldout(self, form: str, setting: tuple[float, int], texts: Texts | None) -> dict[str, Any]:
        size, losses, opening = self.grid.window_tokens, [], self.opening
        for window in range(self.grid.windows):
            tokens = self.tokens[window * size : (window + 1) * size]
            prompt, scored = (opening, tokens) if opening else (tokens[:1], tokens[1:])
            found = self.model(form).losses(prompt, scored)
            losses.append(sum(found) / len(found))
        return {"losses": losses}

    def _texts(self, form: str, setting: tuple[float, int], texts: Texts | None) -> dict[str, Any]:
        temperature, top_k = setting
        made, losses = [], []
        for prompt, seed in self._sequences():
            tokens = self.model(form).sample(
                self.encoded[prompt], CounterDraws(seed=seed, prompt=prompt), temperature=temperature, top_k=top_k,
                num_tokens=self.grid.tokens_of(*setting),
            )  # fmt: skip
            made.append(tokens)
            judged = self.model(BASE).losses(self.encoded[prompt], tokens) if tokens else []
            losses.append([round(loss, 5) for loss in judged])
        return {"tokens": made, "losses": losses}

    def _forced(self, form: str, setting: tuple[float, int], texts: Texts | None) -> dict[str, Any]:
        assert texts is not None
        found: dict[str, Any] = {"kl": [], "agreement": []}
        for (prompt, _), tokens in zip(self._sequences(), texts.tokens, strict=True):
            tokens = tokens[: self.grid.tokens]
            pair: tuple[float | None, float | None] = (None, None)
            if tokens:
                pair = forced(self.model(BASE), self.model(form), self.encoded[prompt], tokens, setting[0])
            found["kl"].append(pair[0])
            found["agreement"].append(pair[1])
        return found

    def _costs(self, form: str, setting: tuple[float, int], texts: Texts | None) -> dict[str, Any]:
        self.release()
        grid = self.grid
        return costs_of(
            self.directory, form, self.tokens[: PROMPT_TOKENS + grid.steps], steps=grid.steps, repeats=grid.repeats,
            threads=kernels.num_threads(),
        )  # fmt: skip


def check_formats(config: ModelConfig, formats: Sequence[str]) -> list[str]:
    """The formats with bfloat16 first, which the rest is held against; InputError for an unknown one."""
    for form in formats:
        specs_of(config, form)
    return list(dict.fromkeys([BASE, *formats]))


def study_ptq(
    directory: Path,
    name: str,
    *,
    formats: Sequence[str] = tuple(FORMATS),
    grid: Grid = FULL,
    prompts: Sequence[str] = PROMPTS,
    text: str,
    store: Path,
    costs: bool = True,
    peer_python: str | None = None,
    machine: str = "",
    progress: Progress | None = None,
) -> Study:
    """Runs what is missing and gives all rows. name: the model as the user called it. peer_python: an interpreter with
    transformers and bitsandbytes, whose rows come beside; None leaves them out. progress(done, in all, what).
    """
    began = time.perf_counter()
    names = check_formats(ModelConfig.from_directory(directory), formats)
    runner = Runner(directory, text, prompts, grid, Store(store))
    rows = [Row(format=form) for form in names]
    jobs: list[tuple[Row, str, tuple[float, int]]] = []
    for row in rows:
        jobs.append((row, "heldout", (0.0, 0)))
        for setting in grid.settings():
            jobs.append((row, "texts", setting))
            if setting[1] == TOP_K:
                jobs.append((row, "forced", setting))
    jobs += [(row, "costs", (0.0, 0)) for row in rows if costs]
    whole = len(jobs) + (peer_python is not None)
    try:
        for done, (row, task, setting) in enumerate(jobs):
            if progress is not None:
                progress(done, whole, f"{row.format}, {_label(task, setting)}")
            runner.fill(row, task, setting, rows[0].texts.get(setting))
    finally:
        runner.release()
    if peer_python is not None:
        if progress is not None:
            progress(len(jobs), whole, "bitsandbytes")
        rows += _peer_rows(runner, peer_python, names)
    if progress is not None:
        progress(whole, whole, "done")
    return Study(
        model=name, fingerprint=runner.fingerprint, grid=grid, prompts=tuple(prompts), machine=machine,
        seconds=time.perf_counter() - began, rows=rows,
    )  # fmt: skip


def _label(task: str, setting: tuple[float, int]) -> str:
    return task if not setting[1] else f"{task} at temperature {setting[0]:g}, top-k {setting[1]}"


def _peer_rows(runner: Runner, python: str, names: Sequence[str]) -> Iterator[Row]:
    """transformers with bitsandbytes on the same held-out windows."""
    grid = runner.grid
    size = grid.window_tokens
    # the products of a small model are over before a second thread has woken
    threads = 1 if runner.config.hidden_size <= SMALL_HIDDEN else kernels.num_threads()
    windows = [[*runner.opening, *runner.tokens[i * size : (i + 1) * size]] for i in range(grid.windows)]
    for form in names:
        if form not in ptq_peers.FORMS:
            continue
        described = {**runner._described(form, "heldout", (0.0, 0)), "task": "peer", "steps": grid.steps,
                     "repeats": grid.repeats, "python": python}  # fmt: skip
        key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]
        figures = runner.store.read(key)
        if figures is None:
            figures = ptq_peers.ask(
                python, runner.directory, form, windows, steps=grid.steps, repeats=grid.repeats, threads=threads
            )  # fmt: skip
            if not figures.get("skipped"):  # what is missing may be there the next time
                runner.store.write(key, described, figures)
        yield Row(
            format=form, library=figures["library"], skipped=figures.get("skipped", ""),
            heldout=figures.get("losses", []), costs=figures.get("costs", {}),
        )  # fmt: skip


def described_grid(study: Study) -> dict[str, Any]:
    """The grid as JSON shows it."""
    return {**asdict(study.grid), "prompts": list(study.prompts)}
