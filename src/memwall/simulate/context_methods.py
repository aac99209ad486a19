"""What compression of keys and values does to each cost of a long context: vectors of multipliers, and their stacking.

Source: Fu 2024 (arXiv 2405.08944), section on existing work: keys and values are layers x heads x tokens x hidden
numbers, and a method shrinks one of these. memwall's own methods bring the bytes that their caches really take
(`kv.savings`, `kv.read_bytes`, `kv.step_macs`); others are entries of NAMED, each with its source.
Idea: a method acts in some phases only. Tokens that are dropped after the prompt save nothing while it is read; codes
of a transfer save nothing in memory; where tokens are dropped while the prompt is read, those behind look at no more
than the share f that stays, which leaves 2 f - f^2 of its attention. Methods on different dimensions multiply; on the
same one a declared rule says: `product` where the second works on what the first left, `min` where both drop the same
things, else `conflict`.
Units and shapes: factors are what is left over what was, above 0.
Differs from the paper: factors of memwall's policies hold for one context (windows and fixed parts weigh less the
longer it is), count scales and residuals, and tell what a step reads apart from what is held.
Cost: a formula per policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

from memwall import kv
from memwall.errors import InputError
from memwall.kv.policy import AMOUNT, Policy, parse, stacked
from memwall.kv.table import DEFAULT_STORE, technique
from memwall.simulate.context_model import ContextModel
from memwall.simulate.long_context_peak_analysis import METRICS, Analysis, Effect, Metric

Dimension = Literal["layer", "head", "token", "hidden", "prefill", "weights"]
CACHE: tuple[Dimension, ...] = ("layer", "head", "token", "hidden")
"""The dimensions of keys and values; `prefill` is a prompt's arithmetic, `weights` are the weights' bytes."""
DIMENSIONS: tuple[Dimension, ...] = (*CACHE, "prefill", "weights")
Phase = Literal["prefill", "memory", "decode", "switch"]
PHASES: tuple[Phase, ...] = ("prefill", "memory", "decode", "switch")
AFTER: frozenset[Phase] = frozenset(("memory", "decode", "switch"))
"""Where a method acts that compresses what a prompt has left."""
Rule = Literal["min", "product", "conflict"]
RULES: Mapping[Dimension, Rule] = {
    "layer": "conflict", "head": "conflict", "token": "min", "hidden": "conflict", "prefill": "conflict",
    "weights": "conflict",
}  # fmt: skip
"""Unless a method declares another: two ways to share layers exclude each other, two droppers of tokens keep what the
stricter one keeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One method. read: bytes that a decode step reads over bytes held. step_flop: what it adds to a user's step."""

    name: str
    factors: Mapping[Dimension, float]
    phases: frozenset[Phase] = AFTER
    rules: Mapping[Dimension, Rule] = field(default_factory=dict)
    read: float = 1.0
    step_flop: float = 0.0
    source: str = "given"

    def __post_init__(self) -> None:
        for dimension, factor in self.factors.items():
            if not (0 < factor < math.inf):
                raise InputError(f"method {self.name}: {dimension} x {factor:g}; it must be above zero, such as 0.25")

    def rule(self, dimension: Dimension) -> Rule:
        """How it goes together with another on the same dimension."""
        return self.rules.get(dimension, RULES[dimension])


def together(dimension: Dimension, methods: Sequence[Method]) -> float:
    """The factor of several methods on one dimension; InputError where they exclude each other."""
    mine = [one for one in methods if dimension in one.factors]
    rules = {one.rule(dimension) for one in mine}
    factors = [one.factors[dimension] for one in mine]
    if len(mine) < 2:
        return factors[0] if mine else 1.0
    if "conflict" in rules:
        names = " and ".join(one.name for one in mine)
        raise InputError(
            f"methods {names} are both about {dimension}; name one, or, if one works on what the other leaves, say so "
            f"of each general one: {dimension}(0.5,rule=product)"
        )
    return min(factors) if "min" in rules else math.prod(factors)


def effect(methods: Sequence[Method]) -> Effect:
    """What a stack of methods does, phase by phase."""

    def left(phase: Phase) -> float:
        acting = [one for one in methods if phase in one.phases]
        return math.prod(together(dimension, acting) for dimension in CACHE)

    for dimension in DIMENSIONS:  # a pair that excludes each other does so whatever its phases
        together(dimension, methods)
    kept = min(together("token", [one for one in methods if "prefill" in one.phases]), 1.0)
    return Effect(
        held=left("memory"), read=left("decode") * math.prod(one.read for one in methods), switched=left("switch"),
        prefill=together("prefill", methods), attention=2 * kept - kept**2, weights=together("weights", methods),
        step_flop=sum(one.step_flop for one in methods),
    )  # fmt: skip


def _share(amount: float) -> float:
    if not 0 < amount <= 1:
        raise InputError(f"{amount:g}: must be above 0 and at most 1, such as 0.25")
    return amount


def _layers_shared(model: ContextModel, group: float) -> Mapping[Dimension, float]:
    if group < 1 or group != int(group):
        raise InputError(f"{group:g}: layers that share keys and values are a whole number, 2 or more")
    return {"layer": math.ceil(model.layers / group) / model.layers}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Named:
    """A published method by a few facts. amount: its bare number unless given; None: it takes none."""

    factors: Callable[[ContextModel, float], Mapping[Dimension, float]]
    amount: float | None
    source: str
    phases: frozenset[Phase] = AFTER
    rules: Mapping[Dimension, Rule] = field(default_factory=dict)


NAMED: Mapping[str, _Named] = {
    "cla": _Named(
        factors=_layers_shared, amount=2, source="Cross-Layer Attention (Brandon 2024, arXiv 2405.12981): so many "
        "layers share one layer's keys and values",
    ),
    "yoco": _Named(
        factors=lambda model, _: {"layer": 1 / model.layers, "prefill": 0.5}, amount=None,
        source="You Only Cache Once (Sun 2024, arXiv 2405.05254): the upper half reads one shared cache, at which a "
        "prompt leaves the model; the lower half's windows, of fixed size, are left out",
    ),
    "mqa": _Named(
        factors=lambda model, _: {"head": 1 / model.kv_heads}, amount=None,
        source="Multi-query attention (Shazeer 2019, arXiv 1911.02150): one head of keys and values",
    ),
    "retrieval-heads": _Named(
        factors=lambda _, share: {"head": _share(share)}, amount=0.05, rules={"head": "product"},
        source="Retrieval heads (Wu 2024, arXiv 2404.15574): under 5 % of heads look far back; the others' windows, of "
        "fixed size, are left out",
    ),
    "mla": _Named(
        factors=lambda model, _: {"hidden": (512 + 64) / (2 * model.kv_heads * model.head_dim)}, amount=None,
        source="Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): a latent of 512 and 64 rotated numbers a "
        "token and layer in place of keys and values",
    ),
    "cachegen": _Named(
        factors=lambda _, ratio: {"hidden": 1 / ratio}, amount=6.4, phases=frozenset(("switch",)),
        rules={"hidden": "product"}, source="CacheGen (Liu 2023, arXiv 2310.07240): 2.5 of 16 bits a number on the "
        "wire, exact size by text and level (`evidence/cachegen.py`); memory holds the rows as they are",
    ),
}  # fmt: skip
"""Methods that change the model itself, and codes of a transfer; `layer(0.5)`, `head(..)`, `token(..)`, `hidden(..)`,
`prefill(..)` and `weights(..)` stand for any other."""


def read_methods(text: str, model: ContextModel, context: int) -> list[Method]:
    """`snapkv(0.25)+kivi(2bit)+cla(2)`: policies of memwall, names of NAMED and general forms, joined by +.

    A general form may say where it acts and how it stacks: `token(0.1,prefill=1)`, `hidden(0.5,rule=product)`.
    InputError names what is unknown or does not go together.
    """
    own, found = [], []
    for part in parse(text).parts:
        if part.name in DIMENSIONS:
            found.append(_general(part))
        elif part.name in NAMED:
            found.append(_named(part, model))
        elif part.name in kv.POLICIES:
            own.append(part)
        else:
            known = ", ".join([*kv.POLICIES, *NAMED, *DIMENSIONS])
            raise InputError(f"method {part.name!r} is not known; there are {known}")
    return [*policy_methods(stacked(tuple(own)), model, context), *found] if own else found


def policy_methods(policy: str | Policy, model: ContextModel, context: int) -> list[Method]:
    """A policy's parts, with the bytes that memwall's caches take after a prompt of `context` tokens, over those of
    16-bit rows. Factors multiply to the whole policy's bytes.
    """
    shape = cache_shape(model)
    resolved = kv.resolve(policy)
    if kv.tiers(resolved):
        raise InputError(f"{resolved}: keeps keys and values on another tier; this analysis has one place for them")
    told = kv.savings(resolved, shape, context, context)
    plain_read = kv.read_bytes(DEFAULT_STORE, shape, context)
    read = kv.read_bytes(resolved, shape, context) / plain_read / told.product
    methods = []
    for part in resolved.parts:
        if str(part) not in told.factors:
            continue  # 16-bit rows below what chooses tokens or channels
        kind = technique(part.name)
        dimension: Dimension = "token" if kind.role == "tokens" else "hidden"
        methods.append(
            Method(
                name=str(part),
                factors={dimension: told.factors[str(part)]},
                phases=AFTER | {"prefill"} if kind.sheds_prompt else AFTER,
                rules={"hidden": "product"},
                source=f"bytes of memwall's {part.name} at {context:,} tokens",
            )
        )
    methods[0] = replace(methods[0], read=read, step_flop=2.0 * kv.step_macs(resolved, shape, context))
    return methods


def cache_shape(model: ContextModel) -> kv.CacheShape:
    """What memwall's caches must know of the model."""
    return kv.CacheShape(
        num_layers=model.layers, num_heads=model.heads, num_kv_heads=model.kv_heads, head_dim=model.head_dim,
        windows=model.windows or None, hidden_size=model.hidden,
    )  # fmt: skip


def _general(part: Policy) -> Method:
    """`hidden(0.5)`, with `prefill=1` or `rule=`."""
    amount = part.numbers({AMOUNT: 0.0, "prefill": 0}, words=("rule",))
    rule = part.settings.get("rule")
    if AMOUNT not in part.settings:
        raise InputError(f"method {part}: give what is left, such as {part.name}(0.25)")
    if rule is not None and rule not in ("min", "product", "conflict"):
        raise InputError(f"method {part}: rule={rule}; it is min, product or conflict")
    dimension = cast(Dimension, part.name)
    rules: dict[Dimension, Rule] = {} if rule is None else {dimension: cast(Rule, rule)}
    return Method(
        name=str(part), factors={dimension: amount[AMOUNT]}, rules=rules,
        phases=AFTER | {"prefill"} if amount["prefill"] else AFTER,
    )  # fmt: skip


def _named(part: Policy, model: ContextModel) -> Method:
    named = NAMED[part.name]
    amount = named.amount or 0.0
    if named.amount is None and part.settings:
        raise InputError(f"method {part}: {part.name} takes no settings")
    if named.amount is not None:
        amount = part.numbers({AMOUNT: named.amount})[AMOUNT]
    try:
        factors = named.factors(model, amount)
    except (InputError, ZeroDivisionError) as error:
        raise InputError(f"method {part}: {error}") from None
    return Method(name=str(part), factors=factors, phases=named.phases, rules=named.rules, source=named.source)


RANKED = (
    "int8", "int4", "kivi(2bit)", "cskv", "xquant", "think(0.4)", "snapkv(0.25)", "locret(0.25)", "epicache",
    "cachegen", "cla(2)", "yoco", "mqa", "retrieval-heads", "mla",
)  # fmt: skip
"""What is ranked unless others are named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """How many times better each metric becomes by a method alone, or by a stack."""

    methods: str
    context: int
    effect: Effect
    gains: Mapping[Metric, float]


def gain(analysis: Analysis, text: str) -> Gain:
    """Of a string of methods over the analysis without any. Users are not rounded to whole ones."""
    plain = replace(analysis, whole=False, effect=Effect())
    context = round(analysis.workload.context)
    changed = replace(plain, effect=effect(read_methods(text, analysis.model, context)))
    gains: dict[Metric, float] = {}
    for metric in METRICS:
        before, after = plain.value(metric), changed.value(metric)
        better = (after, before) if metric in ("users", "sessions") else (before, after)
        gains[metric] = better[0] / better[1] if better[1] else math.inf if better[0] else 1.0
    return Gain(methods=text, context=context, effect=changed.effect, gains=gains)


def rank(analysis: Analysis, names: Iterable[str] = RANKED) -> tuple[list[Gain], dict[str, str]]:
    """Methods by the sessions that they gain, and why others cannot be told for this model."""
    found, left_out = [], {}
    for name in names:
        try:
            found.append(gain(analysis, name))
        except InputError as error:
            left_out[name] = str(error)
    return sorted(found, key=lambda one: -one.gains["sessions"]), left_out


def order(gains: Sequence[Gain], metric: Metric) -> list[str]:
    """Names of methods that help with a metric, the best first."""
    helping = [one for one in gains if one.gains[metric] > 1 + 1e-9]
    return [one.methods for one in sorted(helping, key=lambda one: -one.gains[metric])]
