"""Numbers within bounds as a grammar: `minimum`, `maximum` and their exclusive forms of JSON Schema.

A bound is compared digit by digit: as long as a text has the digits of a bound, the next digit may not pass it; once a
digit lies inside, any may follow. Units and shapes: bounds are exact decimals, digits at most `MOST_DIGITS` before the
point and as many behind it, or as a bound has; bounded numbers are written without an exponent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any

from memwall.engine.grammar import Grammar, Rule, byte_mask
from memwall.errors import InputError

MOST_DIGITS = 15
BOUNDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
LARGEST = Decimal(10**MOST_DIGITS - 1)


@dataclass(frozen=True, slots=True)
class Bounds:
    """low and high belong to the numbers unless they are open; None where there is none."""

    low: Decimal | None
    high: Decimal | None
    low_open: bool = False
    high_open: bool = False

    @classmethod
    def of(cls, schema: Mapping[str, Any], at: str) -> Bounds | None:
        """Those of a schema; None without any. InputError for what is no number."""
        found = {name: _decimal(schema[name], name, at) for name in BOUNDS & schema.keys()}
        if not found:
            return None
        low, low_open = _tighter(found.get("minimum"), found.get("exclusiveMinimum"), max)
        high, high_open = _tighter(found.get("maximum"), found.get("exclusiveMaximum"), min)
        return cls(low, high, low_open, high_open)

    @property
    def whole(self) -> tuple[int, int]:
        """The smallest and the largest whole number."""
        low, high = -LARGEST, LARGEST
        if self.low is not None:
            found = self.low.to_integral_value(ROUND_CEILING)
            low = max(low, found + 1 if self.low_open and found == self.low else found)
        if self.high is not None:
            found = self.high.to_integral_value(ROUND_FLOOR)
            high = min(high, found - 1 if self.high_open and found == self.high else found)
        return int(low), int(high)


def _decimal(value: Any, name: str, at: str) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name} at {at} must be a number, not {str(value)[:60]}")
    found = Decimal(repr(value))
    if not found.is_finite() or found.adjusted() < -4 * MOST_DIGITS or len(found.as_tuple().digits) > 2 * MOST_DIGITS:
        raise InputError(f"{name} at {at} is {str(value)[:60]}; bounds have at most {2 * MOST_DIGITS} digits")
    return found


def _tighter(closed: Decimal | None, opened: Decimal | None, pick: Any) -> tuple[Decimal | None, bool]:
    if closed is None or opened is None:
        return (closed, False) if opened is None else (opened, True)
    found = pick(closed, opened)
    return found, found == opened


def integers(g: Grammar, bounds: Bounds) -> int:
    """Whole numbers within bounds."""
    low, high = bounds.whole
    signs: list[Rule] = []
    if low < 0 and low <= high:
        signs.append((*g.literal("-"), _magnitudes(g, max(-high, 1), -low)))
    if high >= 0 and low <= high:
        signs.append((_magnitudes(g, max(low, 0), high),))
    return g.rule(*signs)


def numbers(g: Grammar, bounds: Bounds) -> int:
    """Numbers within bounds, with a fraction or without."""
    low, high = bounds.low, bounds.high
    signs: list[Rule] = []
    if high is None or high >= 0:
        over = low is not None and low > 0
        least = low if over and low is not None else Decimal(0)
        signs += _positive(g, least, high, (bounds.low_open and (over or low == 0), bounds.high_open))
    if low is None or low < 0:
        under = high is not None and high < 0
        least = -high if under and high is not None else Decimal(0)
        most = None if low is None else -low
        # zero is not written with a sign
        inside = _positive(g, least, most, (bounds.high_open if under else True, bounds.low_open))
        signs += [(*g.literal("-"), *rule) for rule in inside]
    return g.rule(*signs)


def _positive(g: Grammar, low: Decimal, high: Decimal | None, opened: tuple[bool, bool]) -> list[Rule]:
    """Numbers from low, at least zero, to high; nothing where there are none."""
    if low > LARGEST or (high is not None and low > high):
        return []
    most = LARGEST + 1 if high is None or high > LARGEST else high
    (begin, begin_part), (end, end_part) = _parts(low), _parts(most)
    end_open = opened[1] or most > LARGEST
    if begin == end:
        return [(*g.literal(str(begin)), *part) for part in _fraction(g, begin_part, end_part, (opened[0], end_open))]
    rules = [(*g.literal(str(begin)), *part) for part in _fraction(g, begin_part, None, (opened[0], False))]
    if begin + 1 < end:
        between = _magnitudes(g, begin + 1, end - 1)
        rules += [(between, *part) for part in _fraction(g, "", None, (False, False))]
    if end <= LARGEST:
        rules += [(*g.literal(str(end)), *part) for part in _fraction(g, "", end_part, (False, end_open))]
    return rules


def _parts(value: Decimal) -> tuple[int, str]:
    """Its whole part, and the digits behind the point without zeros at the end."""
    whole, _, part = format(value, "f").partition(".")
    return int(whole), part.rstrip("0")


def _fraction(g: Grammar, low: str, high: str | None, opened: tuple[bool, bool]) -> list[Rule]:
    """Nothing, or a point and digits behind it, from the digits `low` to the digits `high`; None for any."""
    most = max(MOST_DIGITS, len(low) + 1, len(high or "") + 1)
    ends, rules = _Digits(g, most, opened).after(low if low or opened[0] else None, high, 0)
    return [*([()] if ends else []), *([(*g.literal("."), g.rule(*rules))] if rules else [])]


@dataclass(frozen=True, slots=True)
class _Digits:
    """Digits behind the point."""

    g: Grammar
    most: int
    opened: tuple[bool, bool]

    def after(self, low: str | None, high: str | None, at: int) -> tuple[bool, list[Rule]]:
        """Whether the text may end, and how it may go on, once `at` digits stand that are those of the bounds; low and
        high: digits of the bounds that are still to come, None for a bound that was left behind.
        """
        ends = (low is None or not (low or self.opened[0])) and (high is None or bool(high) or not self.opened[1])
        rules: list[Rule] = []
        free = 0
        for digit in range(10) if at < self.most else ():
            least, most = int(low[:1] or 0) if low is not None else 0, int(high[:1] or 0) if high is not None else 9
            if not least <= digit <= most:
                continue
            below = low[1:] if low is not None and digit == least else None
            above = high[1:] if high is not None and digit == most else None
            if below == "" and not self.opened[0]:
                below = None
            if below is None and above is None:
                free |= byte_mask((0x30 + digit, 0x30 + digit))
                continue
            done, more = self.after(below, above, at + 1)
            if done or more:
                rules.append((*self.g.literal(str(digit)), self.g.rule(*([()] if done else []), *more)))
        if free:
            every = self.g.one_of(byte_mask((0x30, 0x39)))
            rules.append((self.g.one_of(free), *self.g.between(every, 0, self.most - at - 1)))
        return ends, rules


def _magnitudes(g: Grammar, low: int, high: int) -> int:
    """Whole numbers from low to high, none below zero."""
    rules: list[Rule] = []
    for length in range(len(str(low)), len(str(high)) + 1):
        least, most = max(low, 10 ** (length - 1) if length > 1 else 0), min(high, 10**length - 1)
        if least <= most:
            rules.append(_alike(g, str(least), str(most)))
    return g.rule(*rules)


def _alike(g: Grammar, low: str, high: str) -> Rule:
    """Texts of as many digits as both have, from one to the other."""
    if not low:
        return ()
    first, last = int(low[0]), int(high[0])
    rest = len(low) - 1
    if first == last:
        return (*g.literal(low[0]), *_alike(g, low[1:], high[1:]))
    rules: list[Rule] = []
    if int(low[1:] or 0):
        rules.append((*g.literal(low[0]), *_alike(g, low[1:], "9" * rest)))
        first += 1
    if (high[1:] or "") != "9" * rest:
        rules.append((*g.literal(high[0]), *_alike(g, "0" * rest, high[1:])))
        last -= 1
    if first <= last:
        every = g.one_of(byte_mask((0x30, 0x39)))
        rules.append((g.one_of(byte_mask((0x30 + first, 0x30 + last))), *(every,) * rest))
    return (g.rule(*rules),)
