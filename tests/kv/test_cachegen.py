"""CacheGen: chunks give back exactly what the quantizer rounded to, each by itself, and refuse what is broken."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import BudgetExceeded, InputError
from memwall.kv import cachegen, cachegen_profile
from memwall.kv.cachegen import CacheGenSettings, Chunk, cache_planes, encode_chunk, pack_sizes, unpack_sizes
from memwall.kv.policy import parse
from memwall.models import ModelConfig
from tests.kv.cachegen_cases import CONFIG, MODEL, PROFILES, SHAPE, cache, encode, rows

FORMS = ("auto", "delta", "mean", "direct")
RAGGED = (1, 9, 10, 11, 255, 256, 257, 523)


def chunk_of(data: bytes, form: str = "auto", *, own: bool = False) -> Chunk:
    return Chunk(data, SHAPE, model=MODEL, profile=None if own else PROFILES[form])


def slow_round(x: np.ndarray, form: str, plane: int, level: int) -> np.ndarray:
    """The quantizers token by token and channel by channel, as the paper and the official code have them."""
    out = np.empty_like(x)
    profile = PROFILES[form]
    if form == "direct":
        half = cachegen_profile.direct_bins(plane // 2, 3, level)[plane % 2] // 2 - 1
        for t, row in enumerate(x):
            scale = np.float32(np.float16(np.abs(row).max() / half))
            out[t] = np.rint(row / scale).clip(-half, half) * scale
        return out
    third = plane // 2
    widths = profile["widths"][plane % 2] if form == "auto" else (0.5, 1.0, 1.5)
    spreads = profile["spreads"][plane]
    unit = float(np.exp(np.log(spreads.astype(np.float64)).mean()))
    step = np.maximum(
        np.float32(unit * float(widths[third]) * {1: 2.0, 2: 1.0, 3: 0.5}[level]), spreads * np.float32(4 / 31)
    )
    for t, row in enumerate(x):
        if not profile["anchored"][plane]:
            base = profile["means"][plane]
            out[t] = np.rint((row - base) / step) * step + base
        elif t % 256 % 10 == 0:
            scale = np.float32(np.float16(np.abs(row).max() / 127))
            base = out[t] = np.rint(row / scale).clip(-127, 127) * scale
        else:
            out[t] = np.rint((row - base) / step) * step + base
    return out


@pytest.mark.parametrize("num_tokens", RAGGED)
@pytest.mark.parametrize("form", FORMS)
def test_decoding_gives_exactly_what_the_quantizer_rounded_to(form: str, num_tokens: int) -> None:
    for level in (1, 3):
        chunk = chunk_of(encode(num_tokens, form, level), form)
        for plane, x in enumerate(rows(num_tokens)):
            np.testing.assert_array_equal(chunk.plane(plane), slow_round(x, form, plane, level))


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("num_tokens", [1, 11, 257])
def test_tables_of_the_chunk_travel_with_it(form: str, num_tokens: int) -> None:
    data = encode(num_tokens, form, own=True)
    chunk = chunk_of(data, form, own=True)
    assert len(data) > len(encode(num_tokens, form))  # they are counted
    for plane, x in enumerate(rows(num_tokens)):
        error = np.abs(chunk.plane(plane) - x)
        assert error.max() < 0.6 * max(np.abs(x).max() / 5, 1)


def test_bins_beyond_reach_are_stored_apart() -> None:
    planes = rows(300)
    planes[2][17, 3] += 4000
    planes[2][40, 5] -= 900
    data = encode_chunk(planes.__getitem__, SHAPE, model=MODEL, first=0, level=3, form="mean", profile=PROFILES["mean"])
    np.testing.assert_array_equal(chunk_of(data, "mean").plane(2), slow_round(planes[2], "mean", 2, 3))


def test_finer_levels_are_larger_and_closer() -> None:
    for form in FORMS:
        chunks = [encode(400, form, level) for level in (1, 2, 3)]
        assert len(chunks[0]) < len(chunks[1]) < len(chunks[2])
        errors = [
            sum(np.square(chunk_of(c, form).plane(p) - x).mean() for p, x in enumerate(rows(400))) for c in chunks
        ]
        assert errors[0] > errors[1] > errors[2]


def test_the_official_table_at_its_own_number_of_layers() -> None:
    bins = [[cachegen_profile.direct_bins(layer, 32, level) for layer in range(32)] for level in (1, 2, 3)]
    assert [keys for keys, _ in bins[0]] == [16] * 20 + [12] * 12
    assert [values for _, values in bins[0]] == [16] * 2 + [12] * 30
    assert [keys for keys, _ in bins[1]] == [32] * 10 + [16] * 22
    assert [values for _, values in bins[1]] == [32] * 2 + [16] * 30
    assert bins[2] == [(32, 32)] * 32


def test_anchors_have_their_groups_and_groups_their_streams() -> None:
    places = cachegen_profile.anchor_places(300)
    assert places[:12].tolist() == [0] * 10 + [1, 1]
    assert places[[249, 250, 255, 256, 266]].tolist() == [24, 25, 25, 26, 27]


def test_one_changed_token_changes_itself_alone_unless_it_is_an_anchor() -> None:
    """Differences are to the anchor, not to the token before: nothing drifts."""
    planes = rows(60)
    before = chunk_of(encode(60, "delta"), "delta").plane(4)
    for token, changed in ((13, [13]), (20, list(range(20, 30)))):
        other = [x.copy() for x in planes]
        other[4][token] += np.float32(1.7)
        data = encode_chunk(
            other.__getitem__, SHAPE, model=MODEL, first=0, level=2, form="delta", profile=PROFILES["delta"]
        )
        now = chunk_of(data, "delta").plane(4)
        assert set(np.flatnonzero((now != before).any(axis=1))) <= set(changed)
        assert (now[token] != before[token]).any()


def test_a_changed_bit_of_a_stream_stays_inside_the_stream() -> None:
    """Streams are independent: one channel, 256 tokens."""
    chunk = chunk_of(encode(600, "mean"), "mean")
    before = chunk.plane(0)
    streams = chunk._streams = chunk._streams.copy()
    at = int(chunk._sizes[0, : SHAPE.channels + 5].sum())  # the second cut's channel 5
    streams[at] ^= 0x40
    wrong = np.argwhere(chunk.plane(0) != before)
    assert len(wrong)
    assert set(wrong[:, 1]) == {5}
    assert wrong[:, 0].min() >= 256
    assert wrong[:, 0].max() < 512


@pytest.mark.parametrize("begin", [0, 1, 700])
def test_a_chunk_serves_at_any_place(begin: int) -> None:
    """Keys are turned to where they come to lie: as if the same rows had been made there."""
    chunk = chunk_of(encode(300, first=40))
    target = cache()
    other = chunk_of(encode(begin or 1), "auto") if begin else None
    if other is not None:
        other.append_to(target, CONFIG)
    chunk.append_to(target, CONFIG)
    assert target.length == begin + 300
    back = cache_planes(target, CONFIG, begin, begin + 300)
    for plane in range(SHAPE.planes):
        np.testing.assert_allclose(back(plane), chunk.plane(plane), atol=2e-4)


def test_a_cache_s_rows_come_back_through_its_own_rotation() -> None:
    """Encoding what a cache holds and decoding it at the same place gives its keys within a bin."""
    target = cache()
    chunk_of(encode(300)).append_to(target, CONFIG)
    again = encode_chunk(
        cache_planes(target, CONFIG, 0, 300),
        SHAPE,
        model=MODEL,
        first=0,
        level=2,
        form="auto",
        profile=PROFILES["auto"],
    )
    twice = cache()
    chunk_of(again).append_to(twice, CONFIG)
    for layer in range(3):
        for mine, theirs in zip(target.rows(layer, 0, 300), twice.rows(layer, 0, 300)):
            assert np.mean(np.abs(mine - theirs) > 1e-3) < 1e-3  # rounded rows round to themselves


def test_most_tokens_cut_the_last_chunk_and_kivi_takes_chunks_too() -> None:
    chunk = chunk_of(encode(300))
    for policy in ("float16", "kivi(8bit,group=16,residual=32)"):
        target = cache(policy)
        assert chunk.append_to(target, CONFIG, 123) == 123
        assert target.length == 123
        _, values = target.rows(1, 0, 123)
        np.testing.assert_allclose(values.reshape(123, -1), chunk.plane(3)[:123], atol=0.1)


def test_a_full_arena_refuses_before_it_is_over() -> None:
    target = cache()
    target.arena.set_cap(target.arena.used_bytes + 4096)
    with pytest.raises(BudgetExceeded):
        chunk_of(encode(300)).append_to(target, CONFIG)


def reseal(data: bytes, change: dict[str, object]) -> bytes:
    """The chunk with another header, and the checksum of it: what a forger would send."""
    (length,) = struct.unpack("<I", data[4:8])
    header = json.dumps({**json.loads(data[8 : 8 + length]), **change}, separators=(",", ":")).encode()
    body = b"MWCG" + struct.pack("<I", len(header)) + header + data[8 + length : -16]
    return body + hashlib.blake2b(body, digest_size=16).digest()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "x" * 64}, "another model"),
        ({"profile": "00" * 16}, "memwall fit MODEL cachegen"),
        ({"version": 9}, "version 9"),
        ({"tokens": 0}, "tokens"),
        ({"tokens": 600}, "sizes"),
        ({"layers": 4}, "4 layers"),
        ({"channels": 2**19}, "channels"),
        ({"level": 4}, "level"),
        ({"form": "zip"}, "form"),
        ({"scales": [2**60] * 6}, "cannot be"),
        ({"scales": ["x"] * 6}, "cannot be"),
        ({"far": []}, "cannot be"),
        ({"sizes": 2**39}, "shorter"),
        ({"sizes": 1}, "sizes"),
        ({"profile": "", "form": "mean"}, "tables"),
        ({"profile": ""}, "no form"),
    ],
)
def test_headers_that_lie_are_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        chunk_of(reseal(encode(300), change))


def test_scales_and_far_bins_must_be_as_many_as_symbols_say() -> None:
    data = encode(300, "delta")
    fewer = reseal(data, {"scales": [30] + [31] * 5, "far": [1] + [0] * 5})
    with pytest.raises(InputError, match="30 scales instead of 31"):
        chunk_of(fewer, "delta").plane(0)


def test_damage_is_found() -> None:
    data = encode(40)
    for length in (0, 3, 20, len(data) - 1):
        with pytest.raises(InputError, match="damaged"):
            chunk_of(data[:length])
    for place in (5, 50, len(data) // 2, len(data) - 1):
        broken = bytearray(data)
        broken[place] ^= 1
        with pytest.raises(InputError, match="checksum"):
            chunk_of(bytes(broken))


def test_tables_that_swell_are_refused() -> None:
    with pytest.raises(InputError, match="bytes long"):
        cachegen_profile.inflate(__import__("zlib").compress(bytes(10_000_000)), 100)
    with pytest.raises(InputError, match="cannot be read"):
        cachegen_profile.inflate(b"no zlib", 100)


def test_rows_that_are_not_finite_are_refused() -> None:
    planes = rows(30)
    planes[1][4, 4] = np.inf
    with pytest.raises(InputError, match="not finite"):
        encode_chunk(planes.__getitem__, SHAPE, model=MODEL, first=0, level=2, form="mean", profile=PROFILES["mean"])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(0, 2**14 - 1), max_size=60))
def test_stream_sizes_round_trip(sizes: list[int]) -> None:
    data = np.frombuffer(pack_sizes(np.array(sizes, np.uint32)), np.uint8)
    assert len(data) == sum(1 + (size > 127) for size in sizes)
    assert unpack_sizes(data, len(sizes)).tolist() == sizes
    with pytest.raises(InputError):
        unpack_sizes(data, len(sizes) + 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cachegen(level=4)", "level 4"),
        ("cachegen(form=best)", "form=best"),
        ("cachegen(tables=mine)", "tables=mine"),
        ("cachegen(chunk=3)", "chunks of 3"),
        ("cachegen(size=3)", "size"),
    ],
)
def test_settings_are_checked(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        CacheGenSettings.from_policy(parse(text))
    assert CacheGenSettings.from_policy(parse("cachegen(level=2,form=delta,chunk=100)")).levels == (2,)


def test_a_fresh_process_decodes_from_chunk_and_profile_alone(tmp_path: Path) -> None:
    (tmp_path / "chunk").write_bytes(encode(270, "delta"))
    np.savez(tmp_path / "profile.npz", **PROFILES["delta"])
    script = (
        "import sys, numpy as np; from memwall.kv.cachegen import Chunk, Shape; folder = sys.argv[1]\n"
        f"chunk = Chunk(open(folder + '/chunk', 'rb').read(), Shape({SHAPE.num_layers}, {SHAPE.channels}), "
        f"model={MODEL!r}, profile=dict(np.load(folder + '/profile.npz')))\n"
        "np.save(folder + '/out.npy', np.stack([chunk.plane(p) for p in range(6)])); assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, env=environment)
    want = [slow_round(x, "delta", plane, 2) for plane, x in enumerate(rows(270))]
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), np.stack(want))


def test_turning_back_undoes_scaled_rotations() -> None:
    config = ModelConfig.from_dict(
        {**CONFIG.source, "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                                               "original_max_position_embeddings": 64}}
    )  # fmt: skip
    assert config.rope.attention_factor != 1
    x = rows(50)[0]
    y = x.copy()
    cachegen_profile.turn(config, y, np.arange(900, 950))
    assert np.abs(y - x).max() > 0.1
    cachegen_profile.turn(config, y, np.arange(900, 950), back=True)
    np.testing.assert_allclose(y, x, atol=1e-4)


def test_scratch_is_an_upper_bound() -> None:
    assert cachegen.scratch_bytes(SHAPE, 300) >= 3 * rows(300)[0].nbytes
