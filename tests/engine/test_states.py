"""Mamba models behind the engine: each request has a state of its own, and products are made together."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memwall.engine import Sampling
from memwall.engine.sequence import Request
from memwall.engine.serving import Serving
from memwall.errors import InputError
from memwall.models.ssm_decoder import CHUNK_ROWS, StatePart, _groups
from tests.compress.test_quamba2 import compress, make_model
from tests.engine.test_kept_caches import answer
from tests.engine.test_own_caches import alone, caches_of
from tests.engine.test_own_caches import serving as own_serving
from tests.models.ssm_models import CONFIGS, MAMBA, MAMBA2, write_model

LENGTHS = (3, 61, 300, 17, 130, 1, 44)


def requests(vocabulary: int = 96) -> list[Request]:
    draw = np.random.default_rng(0)
    return [
        Request(
            prompt=tuple(map(int, draw.integers(0, vocabulary, n))),
            sampling=Sampling(max_new_tokens=12 + at, ignore_eos=True),
        )
        for at, n in enumerate(LENGTHS)
    ]


def serving(folder: Path, kv: str = "float16", **changes: Any) -> Serving:
    return own_serving(kv, folder, **{"weights": "float32", "max_sequences": 5, **changes})


def run(held: Serving) -> list[list[int]]:
    pool = caches_of(held)
    held.engine.wanted_pages = 4 * pool.limit_pages
    sequences = [held.engine.submit(request) for request in requests()]
    most = 0
    while held.engine.busy:
        held.engine.step()
        most = max(most, len(pool.caches))
        assert pool.committed_bytes == sum(cache.nbytes for cache in pool.caches.values())
        assert pool.committed_bytes <= pool.used_pages * pool.page_bytes
    assert most >= 4
    return [list(one.made) for one in sequences]


@pytest.mark.parametrize("name", CONFIGS)
def test_answers_are_those_of_a_session_by_itself(name: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", CONFIGS[name])
    held = serving(folder)
    assert held.settings.kv == "state"
    assert run(held) == alone(held, requests(), folder)
    held.release()


@pytest.mark.parametrize(("config", "bits"), [(MAMBA2, "w8a8"), (MAMBA, "w4a8")])
def test_models_on_integers_too(config: dict[str, object], bits: str, tmp_path: Path) -> None:
    """States of 8 bits are rounded once a chunk: requests beside each other must be cut as each alone would be."""
    source = make_model(tmp_path / "model", config)
    compress(source, tmp_path / "small", bits)
    held = serving(tmp_path / "small", weights="saved", token_budget=400)
    assert run(held) == alone(held, requests(), tmp_path / "small")
    held.release()


def test_a_state_goes_on_where_all_it_has_seen_comes_again(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", MAMBA2)
    held, fresh = serving(folder, keep_prefixes=True), serving(folder)
    first = answer(held, list(range(50)))
    turn = [*first.tokens, 7, 8, 9]
    again = answer(held, turn)
    assert again.cached == len(first.tokens) - 1
    assert list(again.made) == list(answer(fresh, turn).made)
    assert answer(held, [*turn[:55], 1]).cached == 0, "a state cannot be cut"
    held.release()
    fresh.release()


def test_chunks_of_a_batch() -> None:
    class Part:
        def __init__(self, begin: int, end: int) -> None:
            self.begin, self.end, self.cache = begin, end, None

    ends = [0, 1, 3, CHUNK_ROWS + 60, CHUNK_ROWS + 61, 2 * CHUNK_ROWS + 100]
    parts: list[StatePart] = [Part(a, b) for a, b in itertools.pairwise(ends)]
    groups = _groups(parts)
    rows = [range(piece.start, piece.stop) for group in groups for piece, _ in group]
    assert [row for piece in rows for row in piece] == list(range(ends[-1]))
    assert all(group[-1][0].stop - group[0][0].start <= CHUNK_ROWS for group in groups)
    for part in parts:
        own = [piece for group in groups for piece, of in group if of is part]
        assert all(piece.stop - piece.start == CHUNK_ROWS for piece in own[:-1]), "cut as if it came alone"


def test_caches_of_keys_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", MAMBA2)
    for kv in ("kivi(2bit)", "int8", "vattention"):
        with pytest.raises(InputError, match="--kv state"):
            serving(folder, kv=kv)
