"""Lists on several machines: the same answers, few machines asked, and machines that answer over a socket."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import numpy as np
import pytest

from memwall.errors import InputError
from memwall.retrieve.spann import SearchSettings, SpannSettings, build
from memwall.retrieve.spann_file import SpannFile, write_spann
from memwall.retrieve.spann_shards import RemoteShard, ShardedIndex, ShardServer, owners, shard_path, write_shards
from tests.retrieve.test_head_tree import drawn

SOME = SearchSettings(lists=12, ratio=4, budget=2048)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    built = build(drawn(2500), SpannSettings(page_limit=None))
    write_spann(tmp_path / "whole", built, metric="l2")
    owner = owners(built.graph.vectors, 3)
    assert set(owner.tolist()) == {0, 1, 2}
    made = write_shards(tmp_path / "i", built, owner, metric="l2")
    assert made == [shard_path(tmp_path / "i", part) for part in range(3)]
    return tmp_path


def test_several_machines_answer_as_one(folder: Path) -> None:
    asked = drawn(60, seed=8)
    whole = SpannFile(folder / "whole").vectors
    front = SpannFile(folder / "i")
    assert front.machines == 3
    assert front.lists.directory.records["count"].sum() == 0
    index = ShardedIndex.local(front)
    every = SearchSettings(lists=2500, ratio=float("inf"), budget=2500)
    for settings in (SOME, every):
        one, read = whole.search_counted(asked, 7, settings)
        many, reads = index.search_counted(asked, 7, settings)
        np.testing.assert_allclose(many.scores, one.scores, rtol=1e-5)
        assert np.mean(many.ids == one.ids) > 0.99
        np.testing.assert_array_equal(reads.lists, read.lists)
        assert reads.rounds.max() == 1
        assert reads.machines is not None
    assert (reads.machines == 3).all()
    _, reads = index.search_counted(asked, 7, SOME)
    assert reads.machines is not None
    assert reads.machines.mean() < 2
    index.close()


def test_a_machines_file_is_an_index_of_its_own(folder: Path) -> None:
    parts = [SpannFile(shard_path(folder / "i", part)).vectors for part in range(3)]
    x = drawn(2500)
    assert sum(len(one.head_ids) for one in parts) == len(SpannFile(folder / "whole").vectors.head_ids)
    for one in parts:
        hits, _ = one.search_counted(x[one.head_ids[:5]], 1)
        np.testing.assert_array_equal(hits.ids[:, 0], one.head_ids[:5])  # ids are those of the whole


def test_machines_answer_over_sockets(folder: Path) -> None:
    files = [SpannFile(shard_path(folder / "i", part)) for part in range(3)]
    servers = [ShardServer(file) for file in files]
    threads = [threading.Thread(target=server.serve_forever, args=(0.01,)) for server in servers]
    for thread in threads:
        thread.start()
    try:
        assert all(server.server_address[0] == "127.0.0.1" for server in servers)
        shards = [RemoteShard(*server.server_address[:2]) for server in servers]  # type: ignore[misc]
        index = ShardedIndex(SpannFile(folder / "i"), shards, [len(file.vectors.head_ids) for file in files])
        local = ShardedIndex.local(SpannFile(folder / "i"))
        asked = drawn(20, seed=3)
        ours, theirs = local.search_counted(asked, 5, SOME), index.search_counted(asked, 5, SOME)
        np.testing.assert_array_equal(ours[0].ids, theirs[0].ids)
        np.testing.assert_array_equal(ours[0].scores, theirs[0].scores)
        np.testing.assert_array_equal(ours[1].pages, theirs[1].pages)
        for question in ([0, 1, 32], [5, -1, 32], [5, 1, 31], [5, 1 << 30, 32], [20_000, 1, 32]):
            with socket.create_connection(servers[0].server_address[:2], 5) as bad:  # type: ignore[arg-type]
                bad.sendall(np.array(question, "<i4").tobytes())
                assert bad.recv(1) == b""
        with socket.create_connection(servers[0].server_address[:2], 5) as bad:  # type: ignore[arg-type]
            bad.sendall(np.array([5, 1, 32], "<i4").tobytes() + np.zeros(32, "<f4").tobytes())
            bad.sendall(np.array([1 << 20], "<i4").tobytes())  # no list of this machine
            assert bad.recv(1) == b""
        shards[0].close()
        with pytest.raises(InputError, match="no answer"):
            shards[0].scan(np.zeros(1, np.int32), np.zeros(32, np.float32), 3)
        for one in shards[1:]:
            one.close()
        index.close()
        local.close()
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


def test_bad_numbers_of_machines(folder: Path) -> None:
    with pytest.raises(InputError, match="0 machines"):
        owners(drawn(5), 0)
    with pytest.raises(InputError, match="9 machines for 5 heads"):
        owners(drawn(5), 9)
    assert owners(drawn(5), 1).tolist() == [0] * 5
    front = SpannFile(folder / "i")
    with pytest.raises(InputError, match="0 machines with"):
        ShardedIndex(front, [], [3])
    shard_path(folder / "i", 1).unlink()
    with pytest.raises(InputError, match=r"i\.1 is not there"):
        ShardedIndex.local(front)
    with pytest.raises(InputError, match="in 0 files"):
        ShardedIndex.local(SpannFile(folder / "whole"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(InputError, match="no machine answers"):
            RemoteShard("127.0.0.1", free.getsockname()[1])
