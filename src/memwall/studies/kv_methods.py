"""The methods of the cache study, and which of their settings meets a budget.

A budget is a share of the bytes of a float16 cache after a prompt of facts. Each method offers its settings from mild
to harsh; the mildest whose predicted bytes fit is taken, so that methods meet at real bytes, not at nominal bits or
shares. A method whose harshest setting is too large has no cell at that budget.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from memwall import kv
from memwall.errors import InputError
from memwall.kv import fitted
from memwall.kv.base import CacheShape

BUDGETS = (0.5, 0.25, 0.125)
QUICK_BUDGETS = (0.5, 0.25)
SHARES = tuple(step / 64 for step in range(63, 1, -1))
CHUNK = 128
"""Tokens between two evictions of the caches that evict while they read: small beside the prompts here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A policy to be measured, or a method that can't be, with the reason. budget: the one it was chosen for."""

    method: str
    budget: float | None
    policy: str = ""
    skipped: str = ""


Settings = Callable[[list[str]], Sequence[str]]
"""Policies of a method from mild to harsh; it is told those that were fitted to the model."""


def _stores(prefix: str = "") -> Settings:
    """KIVI's bits, the newest tokens exact by default or as few as a group needs."""
    forms = ("8bit", "4bit", "4bit,residual=32", "3bit,residual=32", "2bit", "2bit,residual=32")
    return lambda fitted_: [f"{prefix}kivi({form})" for form in forms]


def _shares(form: str) -> Settings:
    return lambda fitted_: [form.format(share) for share in SHARES]


def _fitted(name: str) -> Settings:
    return lambda fitted_: [policy for policy in fitted_ if kv.parse(policy).name == name]


def _locret(fitted_: list[str]) -> Sequence[str]:
    """Any share will do once the heads are there."""
    if not _fitted("locret")(fitted_):
        return []
    return [f"locret({share},chunk={CHUNK})" for share in SHARES]


FLOATS = ("float32", "bfloat16")
BUDGETED = ("kivi", "bfp", "xquant", "cskv", "snapkv", "think", "locret", "epicache")
METHODS: dict[str, Settings] = {
    "float16": lambda fitted_: ["float16"],
    "vattention": lambda fitted_: ["vattention(page_kib=16)"],
    "kivi": _stores(),
    "bfp": lambda fitted_: [f"bfp({bits}bit)" for bits in (8, 6, 4, 3)],
    "xquant": lambda fitted_: [f"xquant({bits}bit)" for bits in (16, 8, 4, 3, 2)],
    "xquant-cl": lambda fitted_: [f"xquant({bits}bit,cl=1)" for bits in (8, 4, 3, 2)],
    "cskv": _fitted("cskv"),
    "snapkv": _shares("snapkv({})"),
    "think": lambda fitted_: [f"think({share / 10})" for share in range(1, 10)],
    "locret": _locret,
    "epicache": _shares(f"epicache({{}},episodes=4,chunk={CHUNK})"),
    "think+kivi": _stores("think(0.4)+"),
    "snapkv+kivi": _shares("snapkv({})+kivi(4bit,residual=32)"),
    "snapkv+think": _shares("snapkv({})+think(0.4)"),
    "snapkv+think+kivi": _shares("snapkv({})+think(0.4)+kivi(4bit,residual=32)"),
}
METHODS |= {name: (lambda fitted_, name=name: [name]) for name in kv.POLICIES if name not in {*METHODS, *FLOATS}}  # type: ignore[misc]
AS_THEY_ARE = tuple(name for name in METHODS if name in kv.POLICIES and name not in BUDGETED)
"""Methods that no budget is asked of, measured once: exact ones, and policies of the table that nobody has yet said how
to set to a budget.
"""
TOO_LARGE: dict[str, tuple[str, ...]] = {
    "xquant": ("xquant(4bit)",),
    "xquant-cl": ("xquant(4bit,cl=1)",),
    "think": ("think(0.4)", "think(0.6)"),
}
"""What is measured of a method that meets no budget of a study, so that it stands in the table nevertheless: the
settings that its authors use, and of ThinK those that other libraries are measured at.
"""
QUICK = ("float16", "kivi", "snapkv", "think", "epicache", "snapkv+kivi", "snapkv+think+kivi")
FITS = {"cskv": "cskv(0.5,init=pca,train=0)", "locret": "locret"}
"""What to fit for a method that has found nothing fitted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What cells are chosen for: the model's shape, what was fitted to it, and a prompt."""

    shape: CacheShape
    fingerprint: str
    model: str
    prompt_tokens: int
    context_tokens: int

    def held_bytes(self, policy: str) -> int:
        """Predicted bytes once the prompt is in; of one episode, where a policy keeps several."""
        one = re.sub(r"episodes=\d+,?", "", policy)
        return kv.held_bytes(one, self.shape, self.prompt_tokens, self.prompt_tokens, self.context_tokens)


def cells(methods: Sequence[str], budgets: Sequence[float], ground: Ground) -> list[Cell]:
    """The cells of methods by name, at each budget, and of policies that are written out, once."""
    learned = fitted.stored(ground.fingerprint)
    found: list[Cell] = []
    for method in methods:
        if method not in METHODS:
            found.append(_of_policy(method, ground))
            continue
        settings = METHODS[method](learned)
        if not settings:
            todo = f"not fitted to this model: run `memwall fit {ground.model} '{FITS[method]}'` first"
            found.append(Cell(method=method, budget=None, skipped=todo))
        elif method in AS_THEY_ARE:
            found.append(replace(_of_policy(settings[0], ground), method=method))
        else:
            mine = _at_budgets(method, settings, budgets, ground)
            found += mine
            if not any(cell.policy for cell in mine) and len(mine) == len(budgets):
                standing = [_of_policy(policy, ground) for policy in TOO_LARGE.get(method, ())]
                found += [replace(cell, method=method) for cell in standing]
    return found


def _of_policy(policy: str, ground: Ground) -> Cell:
    """A policy as the user wrote it: InputError where it cannot be, a skipped cell where it must be fitted first."""
    ground.held_bytes(policy)
    parts = fitted.missing(ground.fingerprint, policy)
    todo = f"not fitted to this model: run `memwall fit {ground.model} '{parts[0]}'` first" if parts else ""
    return Cell(method=str(kv.parse(policy)), budget=None, policy=policy, skipped=todo)


def _at_budgets(method: str, settings: Sequence[str], budgets: Sequence[float], ground: Ground) -> list[Cell]:
    plain, found = ground.held_bytes("float16"), []
    try:
        sizes = [(ground.held_bytes(policy), policy) for policy in settings]
    except InputError as refused:
        return [Cell(method=method, budget=None, skipped=str(refused))]
    for budget in budgets:
        fitting = [(nbytes, policy) for nbytes, policy in sizes if nbytes <= budget * plain]
        if not fitting:
            least = min(nbytes for nbytes, _ in sizes) / plain
            found.append(Cell(method=method, budget=budget, skipped=f"its least is {least:.2f} of float16 here"))
            continue
        policy = max(fitting, key=lambda pair: pair[0])[1]
        if all(policy != cell.policy for cell in found):
            found.append(Cell(method=method, budget=budget, policy=policy))
    return found


def parse_methods(text: str) -> list[str]:
    """Names and policies between commas that stand outside brackets; InputError for a name that is neither."""
    names = [name.strip() for name in re.split(r",(?![^()]*\))", text) if name.strip()]
    if not names:
        raise InputError(f"--methods {text!r} names none; known: {', '.join(METHODS)}, and policies such as kivi(2bit)")
    for name in names:
        if name not in METHODS:
            kv.resolve(name)
    return list(dict.fromkeys(names))


def parse_budgets(text: str) -> list[float]:
    """Shares between commas, each above 0 and at most 1, largest first."""
    try:
        budgets = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        budgets = []
    if not budgets or not all(0 < budget <= 1 for budget in budgets):
        raise InputError(f"--budgets {text!r}: must be shares of a float16 cache above 0 and at most 1, as 0.5,0.25")
    return sorted(set(budgets), reverse=True)
