"""Saved caches: equal to the bit, cut to any beginning, and refused when they are another's, damaged or too large."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall import kv
from memwall.errors import BudgetExceeded, InputError
from memwall.formats.safetensors_file import SafetensorsFile, SafetensorsWriter
from memwall.kv.saved import Origin, SavedCache, num_shared, require_saving, save, write
from memwall.memory import Arena, Ledger
from tests.kv.latent_models import loaded

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "hidden_size": 128}
MODEL = loaded("llama", **SIZES)
SHAPE = MODEL.shape
CAPACITY = 300
ORIGIN = Origin(model="a" * 64, weights="int4", specs={"x": "int4-g64"})
SAVING = (
    "float32",
    "float16",
    "bfloat16",
    "int8",
    "int4",
    "kivi",
    "kivi(bits=3,group=16,residual=0)",
    "kivi(8bit,exact=bfloat16)",
    "kv4",
    "kv4(page=32,exact=float32)",
    "bfp",
    "bfp(6bit,axis=tokens,block=16,residual=20)",
)


def build(policy: str, capacity: int = CAPACITY) -> kv.KVCache:
    return kv.build(policy, SHAPE, Arena(1 << 24, Ledger()), capacity, MODEL.model)


def feed(cache: kv.KVCache, seed: int, *counts: int) -> np.ndarray:
    """Forward passes of so many tokens each, behind what is held; all layers' outputs."""
    rng = np.random.default_rng(seed)
    outs = []
    for count in counts:
        q, k, v = (rng.standard_normal((count, heads, 32)).astype(np.float32) for heads in (4, 2, 2))
        positions = np.arange(cache.length, cache.length + count)
        for layer in range(2):
            cache.append(layer, k * (layer + 1), v, positions)
            outs.append(cache.attend(layer, q, positions, np.empty_like(q)))
            cache.settle(layer)
    return np.concatenate(outs)


def saved(path: Path, policy: str, num_tokens: int) -> kv.KVCache:
    cache = build(policy)
    feed(cache, 0, num_tokens)
    save(path, cache, list(range(num_tokens)), ORIGIN)
    return cache


def test_the_settings_cover_all_policies_that_save() -> None:
    able = {name for name in kv.POLICIES if kv.table.technique(name).saves}
    assert {kv.parse(policy).name for policy in SAVING} == able


@pytest.mark.parametrize("policy", SAVING)
@pytest.mark.parametrize("num_tokens", [1, 31, 128, 193])
def test_a_restored_cache_is_the_same_to_the_bit(policy: str, num_tokens: int, tmp_path: Path) -> None:
    cache = saved(tmp_path / "c", policy, num_tokens)
    with SavedCache(tmp_path / "c") as file:
        file.verify()
        file.check_weights(ORIGIN)
        other = build(policy)
        assert file.restore(other, num_tokens) == num_tokens
        assert file.tokens() == list(range(num_tokens))
    mine, theirs = cache.dump(), other.dump()
    assert mine[1] == theirs[1]
    for name, array in mine[0].items():
        np.testing.assert_array_equal(array, theirs[0][name], err_msg=name)
    assert other.nbytes == other.arena.used_bytes
    np.testing.assert_array_equal(feed(cache, 1, 1, 40, 1), feed(other, 1, 1, 40, 1))


@pytest.mark.parametrize("policy", SAVING)
@pytest.mark.parametrize("keep", [1, 15, 16, 64, 100, 150, 193])
def test_any_beginning_can_be_taken_even_where_the_whole_has_no_room(policy: str, keep: int, tmp_path: Path) -> None:
    cache = saved(tmp_path / "c", policy, 193)
    cache.truncate(keep)
    small = build(policy, keep + 42)
    with SavedCache(tmp_path / "c") as file:
        assert file.restore(small, keep) == keep
    np.testing.assert_array_equal(feed(small, 1, 1, 40, 1), feed(cache, 1, 1, 40, 1))


@pytest.mark.parametrize("policy", SAVING)
def test_rows_are_those_that_attention_sees(policy: str) -> None:
    """One query that looks almost only at one token gets that token's value."""
    cache = build(policy)
    feed(cache, 0, 190, 1)
    for begin, end in ((0, 191), (20, 64), (63, 64), (100, 191), (190, 191), (5, 5)):
        for layer in range(2):
            keys, values = cache.rows(layer, begin, end)
            assert keys.shape == values.shape == (end - begin, 2, 32)
            for place in {begin, end - 1} if end > begin else set():
                key = keys[place - begin]
                q = np.repeat(key / np.square(key).sum(-1, keepdims=True), 2, axis=0)[None] * 4000
                out = cache.attend(layer, q.astype(np.float32), np.array([190]), np.empty((1, 4, 32), np.float32))
                np.testing.assert_allclose(out[0, ::2], values[place - begin], atol=1e-2)


def test_a_refused_restore_leaves_an_empty_cache(tmp_path: Path) -> None:
    for policy in SAVING:
        saved(tmp_path / "c", policy, 193)
        other = build(policy)
        before = other.arena.used_bytes
        other.arena.set_cap(before + 3 * 4096)
        with SavedCache(tmp_path / "c") as file, pytest.raises(BudgetExceeded):
            file.restore(other, 193)
        assert (other.length, other.arena.used_bytes) == (0, before)


def test_other_models_weights_and_policies_are_refused_by_name(tmp_path: Path) -> None:
    saved(tmp_path / "c", "float16", 20)
    with SavedCache(tmp_path / "c") as file:
        with pytest.raises(InputError, match="another model"):
            file.check_model("b" * 64)
        with pytest.raises(InputError, match="--weights 'int4'"):
            file.check_weights(Origin(model=ORIGIN.model, weights="int8", specs={"x": "int8-g64"}))
        with pytest.raises(InputError, match="--kv 'float16'"):
            file.restore(build("float32"), 20)
        other = kv.build("float16", kv.CacheShape(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32),
                         Arena(1 << 24, Ledger()), CAPACITY)  # fmt: skip
        with pytest.raises(InputError, match="arrays are not those"):
            file.restore(other, 20)
        assert other.length == 0


def test_policies_that_cannot_be_saved_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv.table.technique("kivi"), "saves", False)
    with pytest.raises(InputError, match="cannot be saved yet; these can: float32"):
        require_saving("kivi(4bit)")
    monkeypatch.setattr(kv.table.technique("kivi"), "plain_rows", False)
    with pytest.raises(InputError, match="--cache-codec exact"):
        require_saving("kivi(4bit)", "cachegen")
    with pytest.raises(InputError, match="known: exact, cachegen"):
        require_saving("float16", "zip")


@pytest.mark.parametrize("where", ["header", "tokens", "data", "end"])
def test_every_altered_byte_is_found(where: str, tmp_path: Path) -> None:
    path = tmp_path / "c"
    saved(path, "kivi(2bit)", 150)
    data = bytearray(path.read_bytes())
    with SafetensorsFile(path) as file:
        place = {"header": data.index(b'"int4"') + 1, "tokens": file.info("tokens").start, "end": len(data) - 1,
                 "data": file.info("key_blocks.1").start + 5}[where]  # fmt: skip
    data[place] ^= 1
    path.write_bytes(data)
    with SavedCache(path) as file, pytest.raises(InputError, match="altered or damaged"):
        file.verify()


def test_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    saved(path, "float16", 20)
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            SavedCache(path)
    with SafetensorsWriter(path, [("x", np.float32, (2,))], {"format": "pt"}) as writer:
        writer.write("x", np.zeros(2, np.float32))
    with pytest.raises(InputError, match="not a saved cache"):
        SavedCache(path)


@pytest.mark.parametrize(
    "facts",
    [{}, {"tokens": 150}, {"tokens": 150, "coded_keys": 127, "coded_values": 22},
     {"tokens": 150, "coded_keys": 0, "coded_values": 22}, {"tokens": 150, "coded_keys": 256, "coded_values": 22},
     {"tokens": 2**39, "coded_keys": 2**39, "coded_values": 2**39}, {"tokens": -1, "coded_keys": 0, "coded_values": 0},
     {"tokens": "150", "coded_keys": 128, "coded_values": 22}],
)  # fmt: skip
def test_facts_that_cannot_be_are_refused_before_memory_is_taken(facts: dict[str, object], tmp_path: Path) -> None:
    """The digest is right, as a forger would make it: the arrays and facts must still fit each other."""
    cache = build("kivi(2bit)")
    feed(cache, 0, 150)
    write(tmp_path / "c", cache.dump()[0], list(range(150)), ORIGIN, {"policy": cache.policy, "facts": facts})
    other = build("kivi(2bit)")
    before = other.arena.peak_bytes
    with SavedCache(tmp_path / "c") as file:
        file.verify()
        with pytest.raises(InputError):
            file.restore(other, 150)
    assert other.arena.peak_bytes == before


def test_an_interrupted_save_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c"
    saved(path, "float16", 20)
    before = path.read_bytes()

    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SafetensorsWriter, "write", broken)
    with pytest.raises(KeyboardInterrupt):
        saved(path, "float16", 30)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["c"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(one=st.lists(st.integers(0, 2), max_size=8), other=st.lists(st.integers(0, 2), max_size=8))
def test_shared_beginnings(one: list[int], other: list[int]) -> None:
    shared = num_shared(one, other)
    assert one[:shared] == other[:shared]
    assert shared == min(len(one), len(other)) or one[shared] != other[shared]


def test_the_metadata_are_plain_words(tmp_path: Path) -> None:
    saved(tmp_path / "c", "float16", 5)
    with SafetensorsFile(tmp_path / "c") as file:
        assert file.metadata["format"] == "memwall-cache"
        assert json.loads(file.metadata["content"]) == {"facts": {"tokens": 5}, "policy": "float16"}
        assert file.tensor("tokens").tolist() == [0, 1, 2, 3, 4]
