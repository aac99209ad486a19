"""Reads cascades of extended Einsums from text (`einsum` says what it looks like), and says where a text is wrong.

Cost: a pass over the text, descending into brackets. Nothing is evaluated.
"""

from __future__ import annotations

import re
from difflib import get_close_matches

from memwall.errors import InputError
from memwall.simulate.einsum import (
    COMPARISONS,
    FUNCTIONS,
    REDUCTIONS,
    Call,
    Einsum,
    Expression,
    Index,
    Number,
    Read,
    Size,
    Split,
    Step,
    Stop,
)
from memwall.simulate.einsum_cascade import Cascade

MOST_CHARACTERS = 1 << 16
MOST_DEPTH = 64
"""Brackets within brackets."""
_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)|(?P<name>[A-Za-z_][A-Za-z0-9_]*)"
    r"|(?P<mark><=|>=|[-+*/=<>()\[\]{},]))",
    re.ASCII,
)
_END = "the end of the line"


def parse_cascade(text: str) -> Cascade:
    """A checked cascade; InputError with line and column where the text is none."""
    if len(text) > MOST_CHARACTERS:
        raise InputError(f"a cascade of {len(text):,} characters: {MOST_CHARACTERS:,} at most")
    lines = [(number, line.split("#")[0].rstrip()) for number, line in enumerate(text.splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line.strip()]
    known = {
        name
        for _, line in lines
        for inside in re.findall(r"\[([^\]]*)\]?|\bsplit\b(.*)", line)
        for name in re.findall(r"\b[a-z_][A-Za-z0-9_]*", " ".join(inside))
    }
    found: list[Einsum | Split | Stop] = [_Line(number, line, known).statement() for number, line in lines]
    return Cascade(
        einsums=tuple(each for each in found if isinstance(each, Einsum)),
        splits=tuple(each for each in found if isinstance(each, Split)),
        stops=tuple(each for each in found if isinstance(each, Stop)),
    )


class _Line:
    """One statement, read from left to right."""

    def __init__(self, number: int, line: str, ranks: set[str]) -> None:
        self.number, self.line, self.ranks = number, line, ranks
        self.tokens: list[tuple[str, str, int]] = []
        at = 0
        while at < len(line):
            match = _TOKEN.match(line, at)
            if match is None:
                at += len(line[at:]) - len(line[at:].lstrip())
                raise self.wrong(f"{line[at]!r} has no meaning here", at)
            kind = match.lastgroup or ""
            self.tokens.append((kind, match[kind], match.start(kind)))
            at = match.end()
        self.place = self.depth = 0

    def wrong(self, what: str, at: int | None = None) -> InputError:
        """The error, with its place."""
        if at is None:
            at = self.tokens[self.place][2] if self.place < len(self.tokens) else len(self.line)
        return InputError(f"line {self.number}, column {at + 1} ({self.line.strip()[:100]}): {what}")

    def peek(self, ahead: int = 0) -> str:
        """The text of a token, `_END` beyond the last."""
        return self.tokens[self.place + ahead][1] if self.place + ahead < len(self.tokens) else _END

    def take(self, *marks: str) -> str:
        """The next token if it is one of these."""
        text = self.peek()
        if text not in marks:
            raise self.wrong(f"{text if text == _END else repr(text)} where {' or '.join(marks)} is expected")
        self.place += 1
        return text

    def name(self, what: str, *, rank: bool = False) -> str:
        """The next token if it is a name; of a rank, in lower case."""
        kind, text = (*self.tokens[self.place][:2],) if self.place < len(self.tokens) else ("", _END)
        if kind != "name" or (rank and not text[0].islower()):
            shown = text if text == _END else repr(text)
            raise self.wrong(f"{shown} where {what} is expected" + rank * ": ranks are lower case")
        self.place += 1
        return text

    def statement(self) -> Einsum | Split | Stop:
        """The whole line."""
        made: Einsum | Split | Stop
        if self.peek() == "split" and self.peek(1) not in ("[", "="):
            made = self.split()
        elif self.peek() == "stop" and self.peek(1) not in ("[", "="):
            made = self.stop()
        else:
            made = self.einsum()
        if self.peek() != _END:
            raise self.wrong(f"{self.peek()!r} after the statement's end")
        return made

    def split(self) -> Split:
        self.take("split")
        whole = self.name("the rank to be split", rank=True)
        self.take("=")
        outer = self.name("the rank that counts tiles", rank=True)
        self.take("*")
        return Split(whole, outer, self.name("the rank within a tile", rank=True))

    def stop(self) -> Stop:
        self.take("stop")
        rank = self.name("the rank that ends", rank=True)
        self.take("when")
        left = self.sum()
        return Stop(rank, left, self.take(*COMPARISONS), self.sum())

    def einsum(self) -> Einsum:
        name = self.name("a tensor's name, split or stop")
        if not name[0].isupper():
            raise self.wrong(f"{name!r} is written: tensors begin with a capital", self.tokens[self.place - 1][2])
        out = Read(name, self.indices() if self.peek() == "[" else ())
        self.take("=")
        reduction = "sum"
        over: tuple[str, ...] = ()
        if self.peek() in REDUCTIONS and self.peek(1) == "{":
            reduction = self.take(*REDUCTIONS)
            over = self.reduced()
        return Einsum(out, self.sum(), reduction, over)

    def reduced(self) -> tuple[str, ...]:
        self.take("{")
        ranks = [self.name("a rank", rank=True)]
        while self.take(",", "}") == ",":
            ranks.append(self.name("a rank", rank=True))
        return tuple(ranks)

    def indices(self) -> tuple[Index, ...]:
        self.take("[")
        found = [self.index()]
        while self.take(",", "]") == ",":
            found.append(self.index())
        return tuple(found)

    def index(self) -> Index:
        if self.peek() == "0":
            self.place += 1
            return Index(first=True)
        at = self.place
        name = self.name("a rank (m), its next step (m+1), after its last (M), its first value (0) or m1*M0+m0")
        if not name[0].islower():
            if name.lower() not in self.ranks:
                self.place = at
                raise self.wrong(f"{name!r} as an index is the end of rank {name.lower()!r}, which stands nowhere")
            return Index(name.lower(), last=True)
        if self.peek() == "*":
            self.take("*")
            size = self.name("the size of a tile")
            self.take("+")
            inner = self.name("the rank within a tile", rank=True)
            if size != inner.upper():
                raise self.wrong(f"tiles of {inner} have {inner.upper()} points: write {name}*{inner.upper()}+{inner}")
            return Index(name, split=(name, inner))
        if self.peek() == "+":
            self.take("+")
            self.take("1")
            return Index(name, ahead=True)
        return Index(name)

    # ---- values ----

    def sum(self) -> Expression:
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise self.wrong(f"brackets are more than {MOST_DEPTH} deep")
        value = self.product()
        while self.peek() in ("+", "-"):
            value = Call(self.take("+", "-"), (value, self.product()))
        self.depth -= 1
        return value

    def product(self) -> Expression:
        value = self.factor()
        while self.peek() in ("*", "/"):
            value = Call(self.take("*", "/"), (value, self.factor()))
        return value

    def factor(self) -> Expression:
        minus = 0
        while self.peek() == "-":
            self.take("-")
            minus += 1
        value = self.atom()
        if not minus % 2:
            return value
        return Number(-value.value) if isinstance(value, Number) else Call("neg", (value,))

    def atom(self) -> Expression:
        kind, text = (*self.tokens[self.place][:2],) if self.place < len(self.tokens) else ("", _END)
        if kind == "number" or text == "inf":
            self.place += 1
            return Number(float(text))
        if text == "(":
            self.take("(")
            value = self.sum()
            self.take(")")
            return value
        if text in REDUCTIONS and self.peek(1) == "{":
            raise self.wrong(f"{text}{{..}} stands at the head of a value: give what it reduces a name of its own")
        name = self.name("a tensor, a number, a function or (")
        if self.peek() == "[":
            return Read(name, self.indices())
        if self.peek() == "(":
            return self.call(name)
        if name in self.ranks:
            return Step(name)
        if name.lower() in self.ranks and name.isupper():
            return Size(name.lower())
        if name[0].islower():
            self.place -= 1
            raise self.wrong(f"{name!r} is no rank of this cascade; tensors begin with a capital")
        return Read(name)

    def call(self, name: str) -> Expression:
        if name not in FUNCTIONS:
            self.place -= 1
            near = get_close_matches(name, FUNCTIONS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise self.wrong(f"no function {name!r}: there are {', '.join(FUNCTIONS)}{hint}")
        self.take("(")
        arguments = [self.sum()]
        while self.take(",", ")") == ",":
            arguments.append(self.sum())
        if len(arguments) != FUNCTIONS[name]:
            raise self.wrong(f"{name} takes {FUNCTIONS[name]} argument(s), not {len(arguments)}")
        return Call(name, tuple(arguments))
