"""`pattern` of JSON Schema as a grammar: regular expressions over the characters of a JSON string.

Known are characters and their escapes, classes, `.`, groups, alternatives, and repeats; `^` and `$` at the ends.
Without them anything may stand before or behind, as the standard has it. What needs memory or a look around
(references, `\\b`, lookaheads) is an error that names it.

*Differs*: each character has one spelling (a quote is `\\"`, never `\\u0022`), and negated classes and `.` take no
control characters but tab and line ends: answers are fewer than the expression has, and each of them matches.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Protocol

from memwall.engine.grammar import Grammar, Rule
from memwall.errors import InputError

MOST_REPEATS = 1_000
MOST_DEPTH = 64
MOST_RANGE = 1_000
"""Characters of a range that are not of ASCII."""
ASCII = 128
COMMON = frozenset({*range(0x20, 0x7F), 0x09, 0x0A, 0x0D})
DIGITS = frozenset(range(0x30, 0x3A))
WORDS = DIGITS | frozenset(range(0x41, 0x5B)) | frozenset(range(0x61, 0x7B)) | {0x5F}
SPACES = frozenset({0x20, 0x09, 0x0A, 0x0D, 0x0C, 0x0B})
CONTROLS = {"t": 0x09, "n": 0x0A, "r": 0x0D, "f": 0x0C, "v": 0x0B, "0": 0x00}


class Texts(Protocol):
    """What is known of JSON's own."""

    grammar: Grammar
    wide: int
    """Any character that is not of ASCII."""


@dataclass(frozen=True, slots=True)
class Class:
    """A set of characters: those named, and with `wide` all that are not of ASCII."""

    named: frozenset[int]
    wide: bool = False

    def __or__(self, other: Class) -> Class:
        return Class(self.named | other.named, self.wide or other.wide)

    def other(self) -> Class:
        """All but these."""
        return Class(COMMON - self.named, not self.wide and all(code < ASCII for code in self.named))


KINDS = {"d": Class(DIGITS), "w": Class(WORDS), "s": Class(SPACES)}
ANY = Class(COMMON, True)
LINE = Class(COMMON - {0x0A, 0x0D}, True)


def strings(texts: Texts, pattern: str, at: str) -> int:
    """Strings, quotes included, that a pattern matches. InputError names what is not known."""
    return _Pattern(texts, pattern, at).whole()


@dataclass(slots=True)
class _Pattern:
    texts: Texts
    text: str
    where: str
    at: int = 0
    _made: dict[Class, int] = field(default_factory=dict)

    def whole(self) -> int:
        """All alternatives, each with what may stand around it."""
        g, quote = self.texts.grammar, self.texts.grammar.literal('"')
        rules: list[Rule] = []
        while True:
            begins = self._take("^")
            inner, ends = self._sequence(0)
            around = g.many(self._symbol(ANY))
            rules.append((*(() if begins else (around,)), *inner, *(() if ends else (around,))))
            if not self._take("|"):
                break
        if self.at < len(self.text):
            raise self._refuse("a bracket that nothing opened")
        return g.rule((*quote, g.rule(*rules), *quote))

    def _sequence(self, depth: int) -> tuple[Rule, bool]:
        """Up to the next alternative or the end of a group, and whether `$` ended it."""
        if depth > MOST_DEPTH:
            raise self._refuse("so deep a nesting")
        found: list[int] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            if self._take("$"):
                if depth or (self.at < len(self.text) and self.text[self.at] != "|"):
                    raise self._refuse("$ anywhere but at the end")
                return tuple(found), True
            found += self._repeated(self._atom(depth))
        return tuple(found), False

    def _atom(self, depth: int) -> Rule:
        g, letter = self.texts.grammar, self._next()
        if letter == "(":
            if self._take("?") and not self._take(":"):
                raise self._refuse("(? with anything but a colon")
            rules = [self._sequence(depth + 1)[0]]
            while self._take("|"):
                rules.append(self._sequence(depth + 1)[0])
            if not self._take(")"):
                raise self._refuse("a group without an end")
            return (g.rule(*rules),)
        if letter == "[":
            return (self._symbol(self._class()),)
        if letter == ".":
            return (self._symbol(LINE),)
        if letter == "\\":
            return (self._symbol(self._escape()),)
        if letter in "*+?{^":
            raise self._refuse(
                f"{letter} with nothing before it" if letter != "^" else "^ anywhere but at the beginning"
            )
        return (self._symbol(Class(frozenset({ord(letter)}))),)

    def _repeated(self, atom: Rule) -> Rule:
        g, (least, most) = self.texts.grammar, self._count()
        if (least, most) == (1, 1):
            return atom
        if self._take("?") or self._take("+"):
            pass  # lazy or possessive: which text is met first is no matter here
        one = atom[0] if len(atom) == 1 else g.rule(atom)
        return (*(one,) * least, g.many(one)) if most is None else g.between(one, least, most)

    def _count(self) -> tuple[int, int | None]:
        for sign, counts in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(sign):
                return counts
        if not self._take("{"):
            return 1, 1
        inner, _, rest = self.text[self.at :].partition("}")
        low, comma, high = inner.partition(",")
        if not low.isdecimal() or not (high.isdecimal() or not high) or not low.isascii() or not high.isascii():
            raise self._refuse("{ that counts nothing (write \\{ for the character)")
        self.at = len(self.text) - len(rest)
        least, most = int(low[:9]), (int(high[:9]) if high else None) if comma else int(low[:9])
        if max(least, most or 0) > MOST_REPEATS or (most is not None and most < least):
            raise self._refuse(f"{{{inner[:20]}}}: counts go up to {MOST_REPEATS:,}")
        return least, most

    def _class(self) -> Class:
        negated, found = self._take("^"), Class(frozenset())
        while not self._take("]"):
            low = self._member()
            if self.text[self.at : self.at + 1] == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                high = self._member()
                if len(low.named) != 1 or len(high.named) != 1 or low.wide or high.wide:
                    raise self._refuse("a range between more than two characters")
                first, last = min(low.named), min(high.named)
                if last < first or last - max(first, ASCII) > MOST_RANGE:
                    raise self._refuse("a range that is empty or of very many characters")
                low = Class(frozenset(code for code in range(first, last + 1) if not 0xD800 <= code < 0xE000))
            found |= low
        return found.other() if negated else found

    def _member(self) -> Class:
        letter = self._next()
        return self._escape() if letter == "\\" else Class(frozenset({ord(letter)}))

    def _escape(self) -> Class:
        letter = self._next()
        if letter.lower() in KINDS:
            found = KINDS[letter.lower()]
            return found.other() if letter.isupper() else found
        if letter in CONTROLS:
            return Class(frozenset({CONTROLS[letter]}))
        if letter in "xu":
            digits = self.text[self.at : self.at + (2 if letter == "x" else 4)]
            self.at += len(digits)
            if len(digits) < 2 or not all(digit in "0123456789abcdefABCDEF" for digit in digits):
                raise self._refuse(f"\\{letter} without its digits")
            if 0xD800 <= int(digits, 16) < 0xE000:
                raise self._refuse("half of a surrogate pair")
            return Class(frozenset({int(digits, 16)}))
        if letter.isalnum():
            raise self._refuse(f"\\{letter}")
        return Class(frozenset({ord(letter)}))

    def _symbol(self, members: Class) -> int:
        """One character of a class, as JSON writes it."""
        if members not in self._made:
            g = self.texts.grammar
            plain = [code for code in members.named if 0x20 <= code < ASCII and code not in b'"\\']
            rules: list[Rule] = [(g.one_of(sum(1 << code for code in plain)),)] if plain else []
            spelled = sorted(members.named.difference(plain))
            rules += [g.literal(json.dumps(chr(code), ensure_ascii=False)[1:-1]) for code in spelled
                      if not (members.wide and code >= ASCII)]  # fmt: skip
            rules += [(self.texts.wide,)] if members.wide else []
            self._made[members] = g.rule(*rules)
        return self._made[members]

    def _take(self, letter: str) -> bool:
        there = self.text[self.at : self.at + 1] == letter
        self.at += there
        return there

    def _next(self) -> str:
        if self.at >= len(self.text):
            raise self._refuse("an end in the middle")
        self.at += 1
        return self.text[self.at - 1]

    def _refuse(self, what: str) -> InputError:
        return InputError(f"pattern at {self.where} has {what}, which is not supported: {self.text[:60]!r}")
