"""The link: what is asked for comes, throttled as the trace says; what is not whole or not there is an error."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from memwall.errors import InputError
from memwall.kv.link import ChunkLink, ChunkServer, Index, LinkBroken, Throttle, Trace, text_digest
from memwall.kv.saved import Origin, SavedCache, write
from tests.kv.cachegen_cases import MODEL, encode

TOKENS = list(range(100, 190))
LENGTHS = [40, 40, 10]
DATA = {f"chunk.{i}.level.{v}": encode(n, level=v) for i, n in enumerate(LENGTHS) for v in (1, 3)}


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[SavedCache]:
    arrays = {name: np.frombuffer(data, np.uint8) for name, data in DATA.items()}
    origin = Origin(model=MODEL, weights="float16", specs={})
    write(tmp_path / "c", arrays, TOKENS, origin, {"codec": "cachegen", "chunk_tokens": LENGTHS})
    with SavedCache(tmp_path / "c") as file:
        yield file


def test_everything_that_is_there_can_be_asked_for(saved: SavedCache) -> None:
    with ChunkServer(saved) as server, ChunkLink(server.address) as link:
        index = link.index()
        assert index.chunk_tokens == (40, 40, 10)
        assert index.sizes == {v: tuple(len(DATA[f"chunk.{i}.level.{v}"]) for i in range(3)) for v in (1, 3)}
        assert (index.model, index.codec, index.weights) == (MODEL, "cachegen", "float16")
        for chunk in (2, 0, 1):
            for level in (1, 3):
                assert link.chunk(chunk, level, index.sizes[level][chunk]) == DATA[f"chunk.{chunk}.level.{level}"]
        assert link.text(1, 40).tolist() == TOKENS[40:80]
        assert [index.num_matching(TOKENS[:n]) for n in (0, 39, 40, 79, 80, 90)] == [0, 0, 1, 1, 2, 3]
        assert index.num_matching([*TOKENS[:50], 7, *TOKENS[51:]]) == 1


def test_what_is_not_there_ends_the_connection_and_the_next_request_opens_one(saved: SavedCache) -> None:
    with ChunkServer(saved) as server, ChunkLink(server.address, timeout_seconds=5) as link:
        for ask in (lambda: link.chunk(3, 1, 10**6), lambda: link.chunk(0, 2, 10**6), lambda: link.chunk(-1, 1, 10**6)):
            with pytest.raises(LinkBroken):
                ask()
            assert len(link.index().texts) == 3
        with pytest.raises(LinkBroken, match="announces"):
            link.chunk(0, 1, 10)
        with pytest.raises(LinkBroken, match="instead of"):
            link.text(2, 40)
        with socket.create_connection(server.address) as raw:
            raw.sendall(b"\0\xff{" * 2000)
            raw.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):  # the server may leave before it has read all of that
                assert raw.recv(10) == b""
        assert len(link.index().texts) == 3
    with pytest.raises(LinkBroken):
        ChunkLink(server.address, timeout_seconds=1).index()


def test_no_piece_waits_for_an_acknowledgement(saved: SavedCache) -> None:
    """A reply goes out in pieces; held back until the one before is acknowledged, each chunk took 40 ms more."""
    with ChunkServer(saved) as server, ChunkLink(server.address) as link:
        link.index()
        ends = [*server._open, link._socket]
        assert len(ends) == 2
        assert all(end is not None and end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for end in ends)


def test_a_throttle_lets_pass_what_the_trace_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of its own: no test waits, and none depends on how busy the machine is."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    throttle = Throttle(Trace((1000.0, 100.0), step_seconds=2.0))
    throttle.wait(500)
    assert now[0] == pytest.approx(100.5)
    throttle.wait(1600)  # 1500 in what is left of the first step, 100 in the second
    assert now[0] == pytest.approx(103.0)
    now[0] += 0.5  # nothing is saved up while the link is idle
    throttle.wait(50)
    assert now[0] == pytest.approx(104.0)
    throttle.wait(1000)
    assert now[0] == pytest.approx(105.0)


def test_traces_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "bw.jsonl"
    path.write_text('{"bw": [0.8, 8]}\n{"bw": [1]}\n')
    first, second = Trace.read(path, step_seconds=0.5, scale=0.01)
    assert first.rates == pytest.approx((1e6, 1e7))
    assert second.rate(17.3)[0] == pytest.approx(1.25e6)
    for bad in ('{"bw": [-1]}', '{"bw": "x"}', "{}", '{"bw": []}'):
        path.write_text(bad)
        with pytest.raises(InputError):
            Trace.read(path, step_seconds=1)


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": {}},
        {"sizes": {"7": [1, 1, 1]}},
        {"sizes": {"1": [1, 1]}},
        {"sizes": {"1": [1, 0, 1]}},
        {"chunk_tokens": []},
        {"chunk_tokens": [1.5, 1, 1]},
        {"texts": ["a", "b"]},
        {"texts": [1, 2, 3]},
        {"codec": None},
    ],
)
def test_an_index_that_does_not_add_up_is_refused(change: dict[str, object]) -> None:
    good = {"model": "m", "weights": "w", "weights_sha256": "s", "codec": "cachegen", "chunk_tokens": [1, 2, 3],
            "texts": ["a", "b", "c"], "sizes": {"1": [1, 2, 3]}}  # fmt: skip
    assert Index.parse(json.dumps(good).encode()).sizes == {1: (1, 2, 3)}
    with pytest.raises(InputError):
        Index.parse(json.dumps({**good, **change}).encode())


def test_digests_name_texts() -> None:
    assert text_digest([1, 2]) == text_digest(np.array([1, 2])) != text_digest([2, 1])
