"""The text form of cascades: round trips, and errors that say where."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.simulate.attention_cascades import TEXTS, cascade
from memwall.simulate.einsum import Call, Einsum, Expression, Index, Number, Read, Size, Step
from memwall.simulate.einsum_text import parse_cascade

ATOMS: list[Expression] = [
    Read("X", (Index("m"), Index("p"))), Read("Y", (Index("p"),)), Read("ALPHA"), Number(0.5), Number(-3.0),
    Size("m"), Step("p"),
]  # fmt: skip


def calls(inner: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
    pairs = st.tuples(inner, inner)
    return st.one_of(
        st.builds(Call, st.sampled_from(["+", "-", "*", "/", "max", "min"]), pairs),
        st.builds(Call, st.sampled_from(["exp", "neg", "rsqrt", "square", "elu"]), st.tuples(inner)),
    )


@settings(max_examples=150, deadline=None)
@given(st.recursive(st.sampled_from(ATOMS), calls, max_leaves=12), st.sampled_from(["sum", "max", "min", "prod"]))
def test_what_is_written_is_read_back(value: Expression, reduction: str) -> None:
    whole = Call("*", (Call("+", (ATOMS[0], ATOMS[1])), value))
    made = Einsum(Read("Z", (Index("p"),)), whole, reduction, ("m",))
    (found,) = parse_cascade(f"{made}\n").einsums
    assert found == made


@pytest.mark.parametrize("name", TEXTS)
def test_cascades_are_written_and_read_back(name: str) -> None:
    one = cascade(name)
    assert parse_cascade(one.to_text()) == one


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ZXm01p[],=+-*/(){} splitmaxwhen\n#<", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        one = parse_cascade(text)
    except InputError:
        return
    assert parse_cascade(one.to_text()) == one


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "one Einsum at least"),
        ("Z[p] = X[m, p] $ 2", r"line 1, column 16 .*'\$' has no meaning"),
        ("Z[p] = X[m, p] X[m, p]", "column 16.*'X' after the statement's end"),
        ("\nz[p] = X[m, p]", "line 2, column 1.*tensors begin with a capital"),
        ("Z[P2] = X[m, p]", "'P2' as an index is the end of rank 'p2'"),
        ("Z[p] = X[m, p", "the end of the line where , or ] is expected"),
        ("Z[p] = exq(X[m, p])", "no function 'exq'.*did you mean exp"),
        ("Z[p] = max(X[m, p])", "max takes 2 argument"),
        ("Z[p] = q * X[m, p]", "'q' is no rank of this cascade"),
        ("Z[p] = 1 + sum{m} X[m, p]", "stands at the head of a value"),
        ("Z[p] = max{e} X[m, p]", "what is reduced are the ranks of the right that are missing on the left"),
        ("Z[p, q] = X[m, p]", "q on the left is no rank of the right"),
        ("Z[p] = X[p, p]", "a rank stands twice"),
        ("Z[p] = X[m, p]\nZ[p] = X[m, p]", "Z: it is written more than once"),
        ("Z[m+1] = Z[m] + X[m]", r"its first value \(0\) is missing"),
        ("Z[0] = 1", "its steps .* are missing"),
        ("Z[0, q] = 0 * Y[q]\nZ[m+1, p] = Z[m, p] + X[m, p]", "a first value has the indices of the steps"),
        ("Z[0, 0] = 1\nZ[m+1, p+1] = 1", "one iterative rank"),
        ("Z[M] = X[m]", "on the left stand ranks"),
        ("Z[p] = X[m+1, p]", "m\\+1 is for the rank over which a tensor is written step by step"),
        ("Z[p] = X[m, p] + X[m]", "X has 2 indices elsewhere"),
        ("A[p] = B[p] + X[p]\nB[p] = A[p]", "A, B depend on each other; write T"),
        ("Z[0] = 0\nZ[m+1] = Z[M] + X[m]", r"Z\[M\] is not known inside the iteration"),
        ("Z[0] = 0\nZ[m+1] = Z[m] + Y[m]\nY[m] = Z[m+1] * X[m]", "is written later in the same step"),
        ("Z[0] = 0\nY[p] = Z[m] * X[m, p]\nZ[m+1] = Z[m] * Y[p]", "needs m on the left"),
        ("Z[p] = X[m1*M0+m0, p]", "write `split RANK = m1 \\* m0` before"),
        ("split m = m1 * m0\nZ[p] = X[m1*M1+m0, p]", "tiles of m0 have M0 points"),
        ("split m = m1 * m0\nY[m, p] = X[m, p]\nZ[p] = Y[m1*M0+m0, p]", "only inputs are read in tiles"),
        ("split m = m1 * m\nZ[p] = X[m, p]", "a rank is split once"),
        ("stop m when X[m] < 1\nZ[p] = X[m] * Y[p]", "nothing is written step by step over m"),
        ("Z[p] = " + "(" * 70 + "X[m, p]" + ")" * 70, "more than 64 deep"),
        ("# " + "x" * (1 << 16), "65,536 at most"),
    ],
)  # fmt: skip
def test_errors_name_the_place_and_what_would_work(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse_cascade(text)


def test_functions_and_reductions_are_checked_when_made() -> None:
    out, read = Read("Z", (Index("p"),)), Read("X", (Index("m"), Index("p")))
    with pytest.raises(InputError, match="no function 'cos'"):
        parse_cascade("Z[p] = X[m, p]").__class__((Einsum(out, Call("cos", (read,))),))
    with pytest.raises(InputError, match="no reduction 'mean'"):
        parse_cascade("Z[p] = X[m, p]").__class__((Einsum(out, read, "mean"),))
