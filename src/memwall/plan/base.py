"""What a plan is: the settings chosen, what they cost per owner and tier, how fast and how good they are, and why.

A `Plan` is plain data with a versioned JSON form, so that programs can keep it, compare it and hand it to the
runtime. Quantities carry their unit in their name; bytes are exact integers; speeds are tokens per second of one
sequence times the batch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from memwall.errors import InputError

PLAN_VERSION = 1
#: prompt tokens worked at once unless the context is shorter
LONGEST_SEGMENT_TOKENS = 512

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The settings a plan decides.

    weights: a codec spec, or `mixed-B` for B true bits per weight over the matrices. kv: a cache policy.
    context: positions the cache must hold, prompt included. segment_tokens: prompt tokens worked at once, which sizes
    the activations. device: where weights and cache live.
    """

    weights: str
    kv: str
    context: int
    batch: int = 1
    segment_tokens: int = LONGEST_SEGMENT_TOKENS
    threads: int = 1
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """Bytes that one owner will hold on one tier."""

    owner: str
    tier: str
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Loss against the float model on held-out text. kl_nats: mean per token, KL(float || this)."""

    kl_nats: float
    perplexity: float
    top1_agreement: float
    measured_on: str
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One candidate in short form: what a plan lists as its runners-up.

    kv_bits_per_value counts the whole cache at the context asked (exact tail included). note: why it was not chosen.
    """

    choice: Choice
    peak_bytes: Mapping[str, int]
    bits_per_weight: float
    kv_bits_per_value: float
    decode_tokens_per_s: float | None = None
    quality: Quality | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What will run, what it will cost, and why it was chosen.

    fingerprint: digest of configuration and tensor headers. budget: cap per tier, empty when none was asked.
    rows: predicted bytes by owner and tier; their sum per tier is `peak_bytes`. decode_tokens_per_s holds at the end
    of the context asked, decode_tokens_per_s_at_start with an empty cache. explanation: two sentences. kv_savings: of
    each part of the cache policy, its bytes over those of a float16 cache without it; the whole saves their product.
    """

    model: str
    fingerprint: str
    machine: str
    budget: Mapping[str, int]
    choice: Choice
    rows: tuple[PlanRow, ...]
    peak_bytes: Mapping[str, int]
    bits_per_weight: float
    kv_bits_per_value: float
    kv_savings: Mapping[str, float] = field(default_factory=dict)
    decode_tokens_per_s: float | None = None
    decode_tokens_per_s_at_start: float | None = None
    prefill_tokens_per_s: float | None = None
    quality: Quality | None = None
    explanation: str = ""
    runners_up: tuple[Option, ...] = field(default=())
    version: int = PLAN_VERSION

    @property
    def fits(self) -> bool:
        """True when no tier's predicted peak goes over its cap."""
        return all(self.peak_bytes.get(tier, 0) <= cap for tier, cap in self.budget.items())

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, version first."""
        body = asdict(self)
        body["rows"] = [{"owner": row.owner, "tier": row.tier, "bytes": row.nbytes} for row in self.rows]
        return {"version": body.pop("version"), **body}

    def to_json(self, *, indent: int | None = None) -> str:
        """The versioned JSON text."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_dict(cls, document: Any) -> Plan:
        """Rebuild a plan; raises InputError naming the field that is unknown, missing or of the wrong version."""
        body = _mapping(document, "plan")
        if body.get("version") != PLAN_VERSION:
            raise InputError(
                f"plan version {body.get('version')!r} is not supported; this memwall reads version {PLAN_VERSION}"
            )
        body["choice"] = _record(Choice, body.get("choice"), "choice")
        body["rows"] = tuple(_row(row) for row in _sequence(body.get("rows", []), "rows"))
        body["quality"] = _quality(body.get("quality"))
        body["runners_up"] = tuple(_option(option) for option in _sequence(body.get("runners_up", []), "runners_up"))
        return _record(cls, body, "plan")

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Parse the JSON text of a plan."""
        try:
            document = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"not a plan: {error}") from error
        return cls.from_dict(document)


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where} must be a JSON object, got {type(value).__name__}")
    return dict(value)


def _sequence(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise InputError(f"{where} must be a JSON array, got {type(value).__name__}")
    return list(value)


def _record(kind: type[_T], value: Any, where: str) -> _T:
    body = _mapping(value, where)
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    for name in body:
        if name not in known:
            raise InputError(f"{where} has an unknown field {name!r}; known are {', '.join(sorted(known))}")
    try:
        return kind(**body)
    except TypeError as error:
        raise InputError(f"{where} is incomplete: {error}") from error


def _row(value: Any) -> PlanRow:
    body = _mapping(value, "rows")
    if "bytes" in body:
        body["nbytes"] = body.pop("bytes")
    return _record(PlanRow, body, "rows")


def _quality(value: Any) -> Quality | None:
    return None if value is None else _record(Quality, value, "quality")


def _option(value: Any) -> Option:
    body = _mapping(value, "runners_up")
    body["choice"] = _record(Choice, body.get("choice"), "runners_up.choice")
    body["quality"] = _quality(body.get("quality"))
    return _record(Option, body, "runners_up")
