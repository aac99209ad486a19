from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.formats import codec
from memwall.models import DEMO_DIRECTORY, ModelConfig
from memwall.models.precision import LADDER, LEVEL_CHOICES, bits_of, is_matrix, resolve, tensor_bytes, weight_bytes

CONFIG = ModelConfig.from_directory(DEMO_DIRECTORY)
LEAST = bits_of(CONFIG, resolve(CONFIG, LADDER[0]))


def test_uniform_choice_covers_every_matrix_and_leaves_vectors_float32() -> None:
    specs = resolve(CONFIG, "int4")
    for tensor in CONFIG.tensors():
        assert specs[tensor.name] == ("int4-g64" if is_matrix(tensor) else "float32")


def test_embedding_never_goes_below_four_bits() -> None:
    specs = resolve(CONFIG, "int2")
    assert specs["model.embed_tokens.weight"] == "int4-g64"
    assert specs["model.layers.0.mlp.up_proj.weight"].startswith("int2")


@pytest.mark.parametrize("choice", LEVEL_CHOICES)
def test_level_formats_are_for_every_matrix_but_keep_four_bits_where_it_counts(choice: str) -> None:
    specs = resolve(CONFIG, choice)
    narrow = codec(choice).nbytes((64, 64)) < codec("bipolar4").nbytes((64, 64))
    assert specs["model.layers.0.mlp.up_proj.weight"] == codec(choice).spec
    assert specs["model.embed_tokens.weight"] == ("int4-g64" if narrow and choice != "nf4-dq" else codec(choice).spec)
    assert specs["model.norm.weight"] == "float32"


@given(bits=st.floats(LEAST, 16))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_mixed_stays_at_or_under_its_mean_and_close_to_it(bits: float) -> None:
    reached = bits_of(CONFIG, resolve(CONFIG, f"mixed-{bits}"))
    assert reached <= bits
    # the largest tensor here is a sixth of the model; the gap left is what no remaining step fits in
    assert reached >= bits - 0.35


def test_more_bits_never_narrow_a_tensor_of_a_full_rung() -> None:
    assert set(resolve(CONFIG, "mixed-16").values()) == {"float16", "float32"}
    assert bits_of(CONFIG, resolve(CONFIG, "mixed-4.25")) == pytest.approx(4.25, abs=0.05)


def test_weight_bytes_add_up_by_owner() -> None:
    specs = resolve(CONFIG, "mixed-3.7")
    total = sum(tensor_bytes(tensor, specs[tensor.name]) for tensor in CONFIG.tensors())
    rows = weight_bytes(CONFIG, specs)
    assert sum(rows.values()) == total
    assert set(rows) == {f"weights/{spec}" for spec in specs.values()}


@pytest.mark.parametrize(
    "choice",
    [
        *("int9", "int4-g63", "float8", "", "mixed-x", "mixed-0.5", "mixed-2.0", "saved", "../x"),
        *("mixed(nf4)-5", "mixed(nf4,int8)", "mixed(nf4,int8)-3.0", "mixed(nf4,what)-5", "xr-npe(1)"),
        *("nf4-flat", "e4m3-raw", "int4-g64-rows", "nf5", "e9m9", "posit99"),
    ],
)
def test_unknown_choices_are_refused(choice: str) -> None:
    with pytest.raises(InputError):
        resolve(CONFIG, choice)
