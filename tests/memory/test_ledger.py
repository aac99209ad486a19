from __future__ import annotations

import json
import threading

import pytest

from memwall.memory import Ledger, Row


def test_rows_are_merged_by_owner_and_tier_and_sorted() -> None:
    ledger = Ledger()
    ledger.add("weights/int4", "ram", 100)
    ledger.add("kv/layer 0", "ram", 30)
    ledger.add("weights/int4", "disk", 7)
    second = ledger.add("weights/int4", "ram", 11)
    ledger.add("empty", "ram", 0)
    assert ledger.rows() == [
        Row(owner="weights/int4", tier="disk", nbytes=7),
        Row(owner="kv/layer 0", tier="ram", nbytes=30),
        Row(owner="weights/int4", tier="ram", nbytes=111),
    ]
    assert (ledger.total(), ledger.total("ram"), ledger.total("gpu")) == (148, 141, 0)
    assert ledger.owned("weights") == 118
    assert ledger.owned("weights", "ram") == 111
    assert ledger.owned("wei") == 0
    second.resize(1)
    assert ledger.total("ram") == 131
    second.release()
    second.release()
    assert ledger.total("ram") == 130
    with pytest.raises(ValueError, match="released"):
        second.resize(5)


def test_rows_are_plain_data() -> None:
    ledger = Ledger()
    ledger.add("kv", "ram", 5)
    assert json.loads(json.dumps(ledger.to_json())) == [{"owner": "kv", "tier": "ram", "bytes": 5}]


def test_a_measured_owner_is_put_not_added() -> None:
    ledger = Ledger()
    ledger.put("runtime", "ram", 10)
    entry = ledger.put("runtime", "ram", 12)
    assert ledger.total() == 12
    entry.release()
    ledger.put("runtime", "ram", 3)
    assert ledger.total() == 3


def test_negative_bytes_are_refused() -> None:
    ledger = Ledger()
    with pytest.raises(ValueError, match="kv"):
        ledger.add("kv", "ram", -1)
    with pytest.raises(ValueError, match="kv"):
        ledger.add("kv", "ram", 1).resize(-1)


def test_many_threads_leave_a_right_sum() -> None:
    ledger = Ledger()

    def work() -> None:
        for size in range(200):
            entry = ledger.add("scratch", "ram", size)
            entry.resize(size + 1)
            if size % 2:
                entry.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.total() == 4 * sum(size + 1 for size in range(0, 200, 2))
