"""A state as a cache: fixed size, written down and read back, no way back in time."""

from __future__ import annotations

import numpy as np
import pytest

from memwall import kv
from memwall.errors import InputError
from memwall.memory import Arena, Ledger

LAYERS = (True, False)


def shape(*, static_states: bool = True) -> kv.CacheShape:
    state = kv.StateShape(state_size=16, conv_taps=4, conv_size=40, static_layers=LAYERS, static_states=static_states)
    return kv.CacheShape(num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8, state=state)


def cache(arena: Arena | None = None) -> kv.KVCache:
    return kv.build("float32", shape(), arena or Arena(1 << 24, Ledger()), 100)


def test_bytes_are_predicted_whatever_the_length() -> None:
    arena = Arena(1 << 24, Ledger())
    held = cache(arena)
    rows = {row.owner: row.nbytes for row in arena.ledger.rows()}
    assert rows == kv.predict("state", shape(), 1) == kv.predict("float16", shape(), 100_000, 512)
    assert held.nbytes == sum(rows.values()) == arena.used_bytes
    # 4 heads of 8 x 16 numbers, of one byte and of four; three inputs of 40 channels
    assert rows == {"state/scan": 512 + 2048, "state/convolution": 128 + 512}
    held.release()
    assert arena.used_bytes == 0


def test_types_of_layers() -> None:
    held = cache()
    assert [array.dtype for array in held.states] == [np.int8, np.float32]
    assert [array.dtype for array in held.inputs] == [np.int8, np.float32]
    plain = kv.build("state", shape(static_states=False), Arena(1 << 24, Ledger()), 1)
    assert [array.dtype for array in plain.states] == [np.float32, np.float32]


def test_what_was_dumped_is_restored() -> None:
    first, second = cache(), cache()
    first.states[0][...] = 7
    first.inputs[1][...] = 0.5
    first.advance(9)
    arrays, facts = first.dump()
    assert {name: (a.shape, a.dtype) for name, a in arrays.items()} == second.layout(facts)
    second.restore(facts, 4, lambda name, out: np.copyto(out, arrays[name]))
    assert second.length == 0  # a part of the tokens is none of them
    second.restore(facts, 9, lambda name, out: np.copyto(out, arrays[name]))
    assert second.length == 9
    np.testing.assert_array_equal(second.states[0], first.states[0])
    second.truncate(0)
    assert not second.inputs[1].any()


def test_it_goes_with_models_that_have_a_state() -> None:
    plain = kv.CacheShape(num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8)
    with pytest.raises(InputError, match="keys and values"):
        kv.predict("state", plain, 4)
    with pytest.raises(InputError, match="no settings"):
        kv.predict("state(bits=3)", shape(), 4)
    with pytest.raises(InputError, match="use --kv state"):
        kv.predict("snapkv(0.5)", shape(), 4)
    with pytest.raises(ValueError, match="no keys"):
        cache().append(0, np.zeros(1), np.zeros(1), np.zeros(1))
