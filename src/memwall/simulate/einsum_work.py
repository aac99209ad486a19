"""What a cascade computes: points of each Einsum and operations at each, as accelerators and energy tables count them.

A multiplication whose products are summed is one multiply-add (`mac`), every other map, function and reduction is an
operation of its own. A reduction has one at each point, its first included, as hardware that starts from the neutral
value does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from memwall.errors import InputError
from memwall.simulate.einsum import Call, Einsum, walk
from memwall.simulate.einsum_cascade import Cascade

KINDS = {"+": "add", "-": "add", "neg": "add", "*": "multiply", "/": "divide", "max": "max", "min": "max",
         "relu": "max", "abs": "max", "square": "multiply"}  # fmt: skip
"""Kinds of operations that differ from their names."""
REDUCED = {"sum": "add", "max": "max", "min": "max", "prod": "multiply"}


def points(einsum: Einsum, sizes: Mapping[str, int]) -> int:
    """Points of an Einsum's ranks. InputError for a rank without a size."""
    missing = [rank for rank in einsum.space if rank not in sizes]
    if missing:
        raise InputError(f"{einsum}: sizes of {', '.join(missing)} are wanted")
    return math.prod(sizes[rank] for rank in einsum.space)


def operations(einsum: Einsum) -> Counter[str]:
    """Operations at one point, by kind: mac, add, multiply, divide, max, exp and others by name."""
    found = Counter(KINDS.get(each.name, each.name) for each in walk(einsum.value) if isinstance(each, Call))
    if einsum.reduced:
        if einsum.reduction == "sum" and found["multiply"]:
            found["multiply"] -= 1
            found["mac"] += 1
        else:
            found[REDUCED[einsum.reduction]] += 1
    return +found


def all_operations(cascade: Cascade, sizes: Mapping[str, int]) -> Counter[str]:
    """Operations of a whole cascade, by kind."""
    whole: Counter[str] = Counter()
    for einsum in cascade.einsums:
        if not einsum.starts:
            number = points(einsum, sizes)
            whole.update({kind: count * number for kind, count in operations(einsum).items()})
    return whole
