"""Random numbers that a counter gives: the draw of a step depends on seed, prompt and step, and on nothing before it.

*Source*: Parallel Random Numbers: As Easy as 1, 2, 3 (Salmon, 2011), Philox 4x32 with 10 rounds.
A generator with a state runs ahead as far as its run has come, so that two runs that once took different numbers of
draws never meet again. Here runs of different formats see the same number at the same step of the same prompt, however
they got there. In plain Python: ten multiplications a token are nothing beside the token, and numpy.random costs 3 MB.
"""

from __future__ import annotations

from dataclasses import dataclass

from memwall.errors import InputError

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Words = tuple[int, int, int, int]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Four words of 32 bits, as random as any, of a counter of four words and a key of two."""
    a, b, c, d = counter
    low, high = key
    for _ in range(_ROUNDS):
        first, second = _MULTIPLIERS[0] * a, _MULTIPLIERS[1] * c
        a, b, c, d = (second >> 32) ^ b ^ low, second & _MASK, (first >> 32) ^ d ^ high, first & _MASK
        low, high = (low + _WEYL[0]) & _MASK, (high + _WEYL[1]) & _MASK
    return a, b, c, d


@dataclass(frozen=True, slots=True, kw_only=True)
class CounterDraws:
    """The numbers of one sequence. seed: 0 to 2^64 - 1; prompt: the prompt's number, 0 to 2^32 - 1."""

    seed: int
    prompt: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 64:
            raise InputError(f"seed is {self.seed}; it must be 0 to 2^64 - 1")
        if not 0 <= self.prompt <= _MASK:
            raise InputError(f"the prompt's number is {self.prompt}; it must be 0 to 2^32 - 1")

    def at(self, step: int) -> float:
        """The number of a step (0 to 2^64 - 1), evenly spread over [0, 1), with the 53 bits that a float has."""
        counter = (step & _MASK, (step >> 32) & _MASK, self.prompt, 0)
        first, second, _, _ = philox(counter, (self.seed & _MASK, self.seed >> 32))
        return ((first >> 5) * (1 << 26) + (second >> 6)) / (1 << 53)
