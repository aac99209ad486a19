"""Passes over a rank: of published cascades, of others, and against brute force on random ones."""

from __future__ import annotations

import random

import pytest

from memwall.errors import InputError
from memwall.simulate.attention_cascades import TEXTS, cascade, pass_rank
from memwall.simulate.einsum_cascade import Cascade
from memwall.simulate.einsum_passes import fiber_cost, passes
from memwall.simulate.einsum_text import parse_cascade


@pytest.mark.parametrize(
    ("name", "count", "sweeps"),
    [
        ("three-pass", 3, 3), ("three-pass-deferred", 2, 2), ("two-pass", 2, 2), ("two-pass-divided", 3, 2),
        ("online-softmax", 2, 2), ("split-keys", 2, 1), ("one-pass", 1, 1), ("one-pass-divided", 1, 1),
        ("linear", 1, 1), ("two-normalisers", 4, 4), ("two-normalisers-deferred", 2, 2),
        ("layernorm-textbook", 3, 3), ("layernorm-moments", 2, 2), ("layernorm-running", 1, 1),
    ],
)  # fmt: skip
def test_passes_follow_from_what_depends_on_what(name: str, count: int, sweeps: int) -> None:
    one = cascade(name)
    found = passes(one, pass_rank(one))
    assert (found.count, found.sweeps, found.growth) == (count, sweeps, 0)


def test_within_a_tile_the_one_pass_cascade_has_two_and_over_tiles_one() -> None:
    one = cascade("one-pass")
    assert passes(one, "m1").count == 1
    assert passes(one, "m0").count == 2
    assert passes(one, "p").count == passes(one, "e").count == 1
    assert passes(one, "m").by_einsum["SLNV"] == 1
    assert passes(cascade("three-pass"), "m").by_input == {"K": 3, "V": 1}


def test_a_global_maximum_in_place_of_the_running_one_takes_another_pass() -> None:
    lines = TEXTS["one-pass"].replace("RM[m1+1, p]", "GM[p]").splitlines()
    lines = [line for line in lines if not line.startswith(("RM[0", "GM[p] = max(RM", "PRM", "SPD", "SPNV"))]
    text = "\n".join(lines).replace("SPD[m1, p]", "RD[m1, p]").replace("SPNV[f, m1, p]", "RNV[f, m1, p]")
    one = parse_cascade(text + "\nGM[p] = max{m1} LM[m1, p]\n")
    assert passes(one, "m").count == 2 > passes(cascade("one-pass"), "m").count


def test_passes_that_grow_with_steps_are_told() -> None:
    found = passes(cascade("sinkhorn"), "m")
    assert (found.count, found.growth, found.grows_with, str(found)) == (2, 1, "i", "2 + 1 (I - 1)")
    with pytest.raises(InputError, match="grow with i"):
        fiber_cost(cascade("sinkhorn"), "m", {})


def test_sums_over_one_input_do_not_bind_another() -> None:
    one = parse_cascade("S = sum{m} A[m]\nZ = sum{m} (B[m] * S)\nY[m] = A[m] * Z")
    found = passes(one, "m")
    assert found.by_input == {"A": 2, "B": 1}
    assert found.by_einsum == {"S": 1, "Z": 1, "Y": 2}


def test_the_end_of_an_iteration_takes_all_and_a_step_only_what_came_before() -> None:
    start = "R[0] = 0\nR[m+1] = R[m] + X[m]\n"
    assert passes(parse_cascade(start + "Y[m] = X[m] / R[m+1]"), "m").count == 1
    assert passes(parse_cascade(start + "Y[m] = X[m] / R[m]"), "m").count == 1
    assert passes(parse_cascade(start + "Y[m] = X[m] / R[M]"), "m").count == 2


def test_what_lies_between_passes() -> None:
    sizes = {"m": 1000, "p": 3, "e": 64, "f": 32}
    cost = fiber_cost(cascade("three-pass"), "m", sizes)
    assert [(each.tensor, each.made, each.used, each.words) for each in cost.held] == [
        ("QK", 1, 2, 3000), ("SN", 2, 3, 3000),
    ]  # fmt: skip
    assert cost.held_words == 3000
    assert cost.fetched_words == 2 * 64 * 1000
    tiled = {"m": 1000, "m1": 8, "m0": 128, "p": 3, "e": 64, "f": 32}
    for name in ("one-pass", "one-pass-divided"):
        assert fiber_cost(cascade(name), "m", tiled).held_words == fiber_cost(cascade(name), "m", tiled).fetched_words
        assert fiber_cost(cascade(name), "m", tiled).held == ()
    with pytest.raises(InputError, match="sizes of m are wanted"):
        fiber_cost(cascade("three-pass"), "m", {"p": 1, "e": 1, "f": 1})
    with pytest.raises(InputError, match="no rank 'x'"):
        passes(cascade("three-pass"), "x")


def unrolled(one: Cascade, points: int) -> int:
    """Passes over `X` by brute force, element by element: a value that took all of them is there after the latest of
    their passes, and what reads it comes in a later one; a running value takes what came up to its place.
    """
    element: dict[str, list[int]] = {"X": [1] * points}
    scalar: dict[str, int] = {}
    most = 1
    for einsum in one.einsums:
        whole, columns = 0, []
        for read in einsum.reads:
            (index,) = read.indices or (None,)
            if index is None:
                whole = max(whole, scalar[read.tensor])
            elif index.last:
                whole = max(whole, *element[read.tensor])
            elif read.tensor != einsum.name:
                columns.append(element[read.tensor])
        if einsum.starts:
            continue
        if not columns:
            scalar[einsum.name] = whole
            continue
        values = [max(whole + 1, *(column[place] for column in columns)) for place in range(points)]
        if einsum.step is not None:
            values = [max(values[: place + 1]) for place in range(points)]
        most = max(most, *values)
        if einsum.out.indices:
            element[einsum.name] = values
        else:
            scalar[einsum.name] = max(values)
    return most


@pytest.mark.parametrize("seed", range(80))
def test_random_cascades_have_as_many_passes_as_brute_force_finds(seed: int) -> None:
    draw = random.Random(seed)
    vectors, scalars, lines = ["X[m]"], ["1"], []
    for number in range(draw.randint(2, 10)):
        value = f"{draw.choice(vectors)} * {draw.choice(scalars)} + {draw.choice(vectors)}"
        kind = draw.random()
        if kind < 0.3:
            lines.append(f"S{number} = {draw.choice(['sum', 'max'])}{{m}} ({value})")
            scalars.append(f"S{number}")
        elif kind < 0.45:
            lines.append(f"S{number} = {draw.choice(scalars)} + {draw.choice(scalars)}")
            scalars.append(f"S{number}")
        elif kind < 0.65:
            lines += [f"R{number}[0] = 0", f"R{number}[m+1] = R{number}[m] + {value}"]
            vectors += [f"R{number}[m]", f"R{number}[m+1]"]
            scalars.append(f"R{number}[M]")
        else:
            lines.append(f"V{number}[m] = {value}")
            vectors.append(f"V{number}[m]")
    lines.append("OUT = sum{m} " + vectors[-1])
    one = parse_cascade("\n".join(lines))
    assert passes(one, "m").count == unrolled(one, 3)
