"""Policy strings: `float16`, `kivi(2bit)`, `kivi(bits=2,group=32,residual=128)`, `snapkv(0.25)+think(0.4)+kivi(2bit)`.

A policy is a name and settings in brackets. A setting is `key=value`; `2bit` is short for `bits=2`, and a bare number
is the technique's `amount`, whatever it counts. Policies joined by `+` work on top of each other: which tokens stay,
which channels stay, how the rest is stored.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

from memwall.errors import InputError

AMOUNT = "amount"
"""Key of the one setting that may be written without its key, such as the share of tokens kept."""

LONGEST = 1000
"""Characters of a policy string; one with every technique and setting there is has a fraction of it."""

ALIASES = {"w4a4kv4": "kv4"}
"""Other names of policies: `--kv W4A4KV4` is the cache that goes with such weights."""

_POLICY = re.compile(r"\s*([a-z][a-z0-9_-]*)\s*(?:\(([^()]*)\))?\s*")
_BITS = re.compile(r"([0-9]+)\s*-?\s*bits?")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+")
_SETTING = re.compile(r"([a-z_]+)\s*=\s*([a-z0-9_.]+)")


@dataclass(frozen=True, slots=True)
class Policy:
    """A parsed policy string: `str(policy)` is its canonical form. inner: the policy that this one works on top of."""

    name: str
    settings: Mapping[str, str] = field(default_factory=dict)
    inner: Policy | None = None

    def __hash__(self) -> int:
        """Policies are asked for at every token where memory is predicted; what they mean is looked up by them."""
        return hash((self.name, frozenset(self.settings.items()), self.inner))

    def __str__(self) -> str:
        inside = ",".join(value if key == AMOUNT else f"{key}={value}" for key, value in self.settings.items())
        own = f"{self.name}({inside})" if inside else self.name
        return own if self.inner is None else f"{own}+{self.inner}"

    @property
    def parts(self) -> tuple[Policy, ...]:
        """The policies of the string one by one, outermost first, each without its inner one."""
        rest = () if self.inner is None else self.inner.parts
        return (Policy(self.name, self.settings), *rest)

    def integers(self, defaults: Mapping[str, int], words: Collection[str] = ()) -> dict[str, int]:
        """The settings as integers over `defaults`; an unknown one or one that is no number is an error.

        words: settings that are words, which the caller reads itself.
        """
        values = dict(defaults)
        for key, text in self._numeric(defaults, words):
            if not text.isdecimal():
                raise InputError(f"policy {self}: {key}={text!r} is not a whole number")
            values[key] = int(text)
        return values

    def numbers(self, defaults: Mapping[str, float], words: Collection[str] = ()) -> dict[str, float]:
        """The settings as numbers over `defaults`; one whose default is an integer must be a whole number.

        words: settings that are words, which the caller reads itself.
        """
        values = dict(defaults)
        for key, text in self._numeric(defaults, words):
            whole = isinstance(defaults[key], int)
            if not (text.isdecimal() if whole else _NUMBER.fullmatch(text)):
                raise InputError(f"policy {self}: {key}={text!r} is not a {'whole ' if whole else ''}number")
            values[key] = int(text) if whole else float(text)
        return values

    def _numeric(self, defaults: Mapping[str, float], words: Collection[str]) -> Iterator[tuple[str, str]]:
        """Settings that are no words; InputError for one that is neither, with all that there are."""
        for key, text in self.settings.items():
            if key not in defaults and key not in words:
                told = "a bare number" if key == AMOUNT else f"unknown setting {key!r}"
                raise InputError(f"policy {self}: {told}; it takes {', '.join([*defaults, *words]) or 'no settings'}")
            if key not in words:
                yield key, text


def kept_share(policy: Policy, default: float = 0.25) -> float | None:
    """The share of the context that a policy keeps, from its bare number or `default`; None where `tokens=` says it."""
    own, settings = replace(policy, inner=None), policy.settings
    if "tokens" in settings:
        if AMOUNT in settings:
            raise InputError(f"policy {own}: give a share of the context or tokens=, not both")
        if not settings["tokens"].isdecimal() or int(settings["tokens"]) < 1:
            raise InputError(f"policy {own}: tokens={settings['tokens']} must be a whole number, 1 at least")
        return None
    text = settings.get(AMOUNT, str(default))
    if not 0 < float(text) <= 1:
        raise InputError(f"policy {own}: keeps {text} of the context; must be above 0 and at most 1, such as 0.25")
    return float(text)


def stacked(parts: tuple[Policy, ...]) -> Policy:
    """One policy of several, outermost first."""
    whole: Policy | None = None
    for part in reversed(parts):
        whole = replace(part, inner=whole)
    assert whole is not None
    return whole


def parse(text: str) -> Policy:
    """Reads a policy string. Whether names are known, go together and settings make sense is for the table to say."""
    if len(text) > LONGEST:
        raise InputError(f"KV policy {text[:40]!r}...: {len(text):,} characters; the most read is {LONGEST:,}")
    return stacked(tuple(_parse_one(part, text) for part in text.lower().split("+")))


def _parse_one(part: str, text: str) -> Policy:
    match = _POLICY.fullmatch(part)
    if match is None:
        raise InputError(
            f"KV policy {text!r}: must look like float16, kivi(2bit), kivi(bits=2,group=32,residual=128) or "
            "snapkv(0.25)+kivi(2bit)"
        )
    name, inside = ALIASES.get(match[1], match[1]), match[2]
    settings: dict[str, str] = {}
    for item in filter(None, (piece.strip() for piece in (inside or "").split(","))):
        if bits := _BITS.fullmatch(item):
            key, value = "bits", bits.group(1)
        elif setting := _SETTING.fullmatch(item):
            key, value = setting.groups()
        elif _NUMBER.fullmatch(item):
            key, value = AMOUNT, item
        else:
            raise InputError(f"KV policy {text!r}: setting {item!r} must look like bits=2")
        if key in settings:
            raise InputError(f"KV policy {text!r}: {key} is given twice")
        settings[key] = value
    return Policy(name, settings)
