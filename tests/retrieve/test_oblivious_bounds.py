"""Counts alone: equal to those of the whole map under the same draws, and below the bounds."""

from __future__ import annotations

import numpy as np
import pytest

from memwall import _native
from memwall.errors import InputError
from memwall.retrieve.bolt import MapSettings, ObliviousMap
from memwall.retrieve.oblivious_bounds import fullness
from memwall.retrieve.untrusted import HostMemory


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_simulation_is_the_map_without_pages(share: float) -> None:
    pytest.importorskip("cryptography", reason="pages are sealed with the extra `oblivious`")
    shape, accesses = MapSettings(capacity=512, value_bytes=1, private_share=share, page_slots=20), 3000
    draw = np.random.default_rng(4)
    words = draw.integers(0, 1 << 64, 2 * 512 + 4 * accesses, np.uint64)
    keys = draw.integers(0, 512, accesses).astype(np.uint32)
    stream = iter([bytes(8), words.tobytes() + bytes(1 << 16)])
    found = ObliviousMap(
        shape, HostMemory(shape.num_pages, shape.page_bytes), bytes(32), entropy=lambda _: next(stream)
    )
    found.fill(np.arange(512), np.zeros((512, 1), np.uint8))
    pending = []
    for key in keys:
        found.access(np.zeros(1), key[None])
        pending.append(found.private.count("pending"))
    told = _native.simulate_bins(512, shape.bins, shape.private_bins, accesses, 0, "uniform", keys, words)
    count = found.private.count
    assert told["max_load"] == count("max_load")
    # an item that waits and is asked for counts twice for a moment in the simulation
    assert 0 <= told["max_pending"] - count("max_pending") <= 1
    assert 0 <= told["max_private"] - count("max_private") <= 1
    assert 0 <= told["max_frames"] - count("max_frames") <= 1
    assert told["mean_pending"] == pytest.approx(np.mean(pending[1500:]), abs=1e-9)


@pytest.mark.parametrize("order", ["uniform", "sequential", "one"])
def test_bounds_hold(order: str) -> None:
    found = fullness(MapSettings(capacity=1 << 14), 300_000, seed=1, order=order)
    assert found.hold
    # a single item that moves waits alone
    mean = 0.8 if order == "one" else found.settings.num_pages / 2
    assert found.mean_pending == pytest.approx(mean, rel=0.03)
    assert found.mean_private == pytest.approx(found.settings.private_bins * 8, rel=0.03)
    assert found.to_dict()["bounds"]["load"]["most"] == found.max_load >= found.max_page_load


def test_one_choice_would_pass_the_bound() -> None:
    """The bound is not empty: bins that are chosen without looking fill far more."""
    draw = np.random.default_rng(0)
    loads = np.bincount(draw.integers(0, 2048, 1 << 14), minlength=2048)
    assert loads.max() > MapSettings(capacity=1 << 14).load_bound


def test_bad_input() -> None:
    with pytest.raises(InputError, match="uniform, sequential, one"):
        fullness(MapSettings(capacity=100), 10, order="zipf")
    with pytest.raises(InputError, match="accesses -1"):
        fullness(MapSettings(capacity=100), -1)
