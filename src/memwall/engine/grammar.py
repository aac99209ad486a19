"""Context-free grammars over bytes, walked one byte at a time along all readings at once.

A state is a set of stacks of symbols that are still to come. Stacks share their tails and are numbered, states too, so
that a state is one number and a step that was taken before is a look-up. Readings that differ (a number may end here or
go on, a choice of schemas) are stacks of one state; none is ever taken back.
"""

from __future__ import annotations

from memwall.errors import InputError

MOST_RULES = 50_000
MOST_STACKS = 4_096
"""Of one state: readings of one text."""
MOST_DEPTH = 512
"""Symbols on a stack: deeper nesting is not begun."""
KEPT_STEPS = 100_000
BYTES = 256
DEAD = 0
"""The state that nothing leads out of and that is not complete."""

Rule = tuple[int, ...]


def byte_mask(*spans: tuple[int, int]) -> int:
    """A set of bytes as the bits of a number. spans: first and last of each."""
    mask = 0
    for first, last in spans:
        mask |= (1 << (last + 1)) - (1 << first)
    return mask


class Grammar:
    """Symbols: zero or more is a rule's number, below zero a set of bytes."""

    def __init__(self) -> None:
        self.rules: list[tuple[Rule, ...]] = []
        self.masks: list[int] = []
        self._mask_symbols: dict[int, int] = {}

    def one_of(self, mask: int) -> int:
        """The symbol of a set of bytes."""
        if mask not in self._mask_symbols:
            self._mask_symbols[mask] = ~len(self.masks)
            self.masks.append(mask)
        return self._mask_symbols[mask]

    def literal(self, text: str) -> Rule:
        """Symbols of a text."""
        return tuple(self.one_of(1 << byte) for byte in text.encode())

    def declare(self) -> int:
        """A rule that is defined later, so that rules may name themselves."""
        if len(self.rules) >= MOST_RULES:
            raise InputError(f"the schema becomes more than {MOST_RULES:,} rules; make it smaller")
        self.rules.append(())
        return len(self.rules) - 1

    def define(self, symbol: int, *alternatives: Rule) -> int:
        """What a declared rule stands for."""
        self.rules[symbol] = alternatives
        return symbol

    def rule(self, *alternatives: Rule) -> int:
        """A rule of its own: one of the alternatives."""
        return self.define(self.declare(), *alternatives)

    def maybe(self, *symbols: int) -> int:
        """These symbols or nothing."""
        return self.rule((), symbols)

    def many(self, symbol: int) -> int:
        """Any number of it, none too. The symbol must not stand for the empty text."""
        again = self.declare()
        return self.define(again, (), (symbol, again))

    def between(self, symbol: int, least: int, most: int) -> Rule:
        """From `least` to `most` of it, as symbols."""
        rest = self.rule(())
        for _ in range(most - least):
            rest = self.rule((), (symbol, rest))
        return (*(symbol,) * least, *((rest,) if most > least else ()))


class Walker:
    """Where texts stand in a grammar."""

    def __init__(self, grammar: Grammar, root: int) -> None:
        self.grammar = grammar
        self._stacks: list[tuple[int, int, int]] = [(0, 0, 0)]  # symbol, the stack below, depth; the empty one first
        self._stack_numbers: dict[tuple[int, int], int] = {}
        self._states: list[tuple[int, ...]] = [()]
        self._state_numbers: dict[tuple[int, ...], int] = {(): DEAD}
        self._steps: dict[tuple[int, int], int] = {}
        self.start = self._state({self._push(root, 0)})

    def step(self, state: int, byte: int) -> int:
        """The state after one more byte; DEAD where it may not come."""
        found = self._steps.get((state, byte))
        if found is None:
            masks, bit = self.grammar.masks, 1 << byte
            tops = (self._stacks[stack] for stack in self._states[state] if stack)
            found = self._state({below for symbol, below, _ in tops if masks[~symbol] & bit})
            if len(self._steps) < KEPT_STEPS:
                self._steps[state, byte] = found
        return found

    def feed(self, state: int, text: bytes) -> int:
        """The state after these bytes."""
        for byte in text:
            state = self.step(state, byte)
            if state == DEAD:
                break
        return state

    def next_bytes(self, state: int) -> int:
        """The set of bytes that may come next."""
        mask = 0
        for stack in self._states[state]:
            if stack:
                mask |= self.grammar.masks[~self._stacks[stack][0]]
        return mask

    def complete(self, state: int) -> bool:
        """Whether the text may end here."""
        return 0 in self._states[state]

    def _push(self, symbol: int, below: int) -> int:
        number = self._stack_numbers.get((symbol, below))
        if number is None:
            number = self._stack_numbers[symbol, below] = len(self._stacks)
            self._stacks.append((symbol, below, self._stacks[below][2] + 1))
        return number

    def _state(self, stacks: set[int]) -> int:
        """The state of these stacks, with rules on top replaced by what they stand for."""
        todo, seen, tops = list(stacks), set(stacks), set()
        while todo:
            stack = todo.pop()
            symbol, below, depth = self._stacks[stack]
            if stack == 0 or symbol < 0:
                tops.add(stack)
                continue
            if depth > MOST_DEPTH:
                continue
            for rule in self.grammar.rules[symbol]:
                other = below
                for part in reversed(rule):
                    other = self._push(part, other)
                if other not in seen:
                    seen.add(other)
                    todo.append(other)
        key = tuple(sorted(tops)[:MOST_STACKS])
        if key not in self._state_numbers:
            self._state_numbers[key] = len(self._states)
            self._states.append(key)
        return self._state_numbers[key]
