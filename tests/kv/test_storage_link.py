"""Storage processes that die, hang, fill up or are left behind: a clear error, and nothing stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memwall import kv
from memwall.engine import Sampling, Settings, load
from memwall.errors import BudgetExceeded, InputError
from memwall.kv import storage_link
from memwall.kv.instinfer import InstInferCache
from memwall.kv.storage_link import StorageLost
from memwall.memory import Arena, Ledger
from memwall.models import model_directory
from tests.kv.test_instinfer import SHAPE, Feeder, cache_of


def pids(cache: InstInferCache) -> list[int]:
    return [drive["pid"] for drive in cache.report()["drives"]]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("drives", [1, 2])
def test_a_killed_process_is_a_clear_error_and_starting_anew_works(drives: int) -> None:
    cache = cache_of(f"instinfer(1,drives={drives})")
    feeder = Feeder(cache)
    feeder.step(100)
    found = pids(cache)
    os.kill(found[-1], signal.SIGKILL)
    with pytest.raises(StorageLost, match=r"signal 9|is gone"):
        feeder.step(1)
    cache.truncate(100)  # as the decoder does when a pass fails
    with pytest.raises(StorageLost, match="read the prompt again"):
        feeder.step(1)
    assert all(gone(pid) for pid in found)
    assert cache.rewindable(100) == 0
    cache.truncate(0)
    again = Feeder(cache, seed=1)
    assert max(again.error(count) for count in (100, 1)) < 2e-3
    cache.release()
    assert cache.arena.ledger.total() == 0


def test_a_process_that_hangs_is_ended_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of("instinfer(1)")
    feeder = Feeder(cache)
    feeder.step(20)
    (pid,) = pids(cache)
    monkeypatch.setattr("memwall.kv.storage_pool.TIMEOUT_SECONDS", 0.5)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(StorageLost, match="did not answer"):
        feeder.step(1)
    assert gone(pid)
    cache.release()


def test_forks_outlive_each_other() -> None:
    cache = cache_of("instinfer(1)")
    Feeder(cache).step(100)
    fork = cache.fork()
    (pid,) = pids(cache)
    cache.release()
    assert not gone(pid)
    assert fork.length == 100
    Feeder(fork).step(1)
    fork.release()
    assert gone(pid)
    assert fork.arena.ledger.total() == 0


def test_a_fork_of_what_was_lost_does_not_take_from_what_was_started_anew() -> None:
    cache = cache_of("instinfer(1)")
    Feeder(cache).step(300)
    fork = cache.fork()
    os.kill(pids(cache)[0], signal.SIGKILL)
    with pytest.raises(StorageLost):
        Feeder(cache).step(1)
    cache.truncate(0)
    again = Feeder(cache)
    assert again.error(200) < 2e-3
    assert fork.rewindable(300) == 0
    fork.release()
    assert max(again.error(count) for count in (500, 1)) < 2e-3
    cache.release()
    assert cache.arena.ledger.total() == 0


def test_a_full_disk_refuses_before_anything_changes() -> None:
    arena = Arena(1 << 28, Ledger(), other_caps={"disk": 1 << 20})
    cache = kv.build("instinfer(1,block_kib=256)", SHAPE, arena, 4096)
    feeder = Feeder(cache)
    feeder.step(300)
    with pytest.raises(BudgetExceeded, match="on disk"):
        feeder.step(3000)
    cache.truncate(300)
    for layer in feeder.rows:
        for which, part in enumerate(layer):
            layer[which] = part[:1]
    assert feeder.error(1) < 2e-3
    cache.release()


def test_pages_that_direct_io_cannot_take_are_said_to_go_through_the_cache() -> None:
    shape = kv.CacheShape(num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8)
    with pytest.warns(RuntimeWarning, match="no multiple of 512"):
        cache = cache_of("instinfer(1)", shape)
    assert Feeder(cache).error(50) < 2e-3
    assert cache.report()["drives"][0]["direct"] is False
    cache.release()


def test_a_session_goes_on_after_its_storage_was_killed() -> None:
    settings = Settings(weights="float16", kv="instinfer(1)", context_tokens=256, segment_tokens=64)
    session = load(model_directory("demo"), settings)
    assert isinstance(session.cache, InstInferCache)
    sampling = Sampling(max_new_tokens=12, ignore_eos=True)
    prompt = list(range(5, 105))
    list(session.generate(prompt, sampling))
    said = session.last.tokens
    session.reset()
    steps = session.generate(prompt, sampling)
    os.kill(pids(session.cache)[0], signal.SIGKILL)
    with pytest.raises(StorageLost):
        list(steps)
    session.reset()
    list(session.generate(prompt, sampling))
    assert session.last.tokens == said
    session.release()
    assert session.ledger.owned("kv") == 0


CHILD = """
import sys, time
import numpy as np
from memwall import kv
from memwall.memory import Arena, Ledger
shape = kv.CacheShape(num_layers=1, num_heads=1, num_kv_heads=1, head_dim=32)
cache = kv.build("instinfer(1)", shape, Arena(1 << 28, Ledger()), 1024)
rows = np.ones((600, 1, 32), np.float32)
cache.append(0, rows, rows, np.arange(600))
cache.settle(0)
print(cache.report()["drives"][0]["pid"], flush=True)
if sys.argv[1] == "raise":
    raise RuntimeError("no release")
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["raise", signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_however_the_host_ends(how: str | signal.Signals, tmp_path: Path) -> None:
    host = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(how)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert host.stdout is not None
    pid = int(host.stdout.readline())
    if isinstance(how, signal.Signals):
        host.send_signal(how)
    host.wait(60)
    host.stdout.close()
    deadline = time.monotonic() + 60
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gone(pid)
    assert not list(tmp_path.iterdir())


def command_line(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # another child, which has ended
        return b""


def test_ctrl_c_ends_a_run_and_its_storage(tmp_path: Path) -> None:
    """In the middle of a transfer: status 130, as for any other run, and nothing left."""
    command = ["run", "demo", "A city on a river. " * 40, "--kv", "instinfer(1,link_mb=0.05,drives=2)"]
    run = subprocess.Popen(
        [sys.executable, "-m", "memwall", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    found: list[str] = []
    deadline = time.monotonic() + 60
    while len(found) < 2 and time.monotonic() < deadline:
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        found = [pid for pid in children if b"storage_process" in command_line(pid)]
    time.sleep(1)  # well into the prompt, which takes many seconds over this link
    run.send_signal(signal.SIGINT)
    _, error = run.communicate(timeout=60)
    assert len(found) == 2
    assert run.returncode == 130, error
    assert "interrupted" in error
    assert all(gone(int(pid)) for pid in found)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("instinfer(0)", "above 0"),
        ("instinfer(2)", "at most 1"),
        ("instinfer(group=24)", "power of two"),
        ("instinfer(channels=5)", "do not divide"),
        ("instinfer(drives=3)", "cannot be split"),
        ("instinfer(r=33)", "at most 32"),
        ("instinfer(speed=3)", "unknown setting"),
    ],
)
def test_settings_are_checked(policy: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        cache_of(policy)


def test_an_emulated_link_takes_its_time() -> None:
    shape = kv.CacheShape(num_layers=1, num_heads=4, num_kv_heads=4, head_dim=32)
    cache = cache_of("instinfer(1,link_mb=1)", shape)
    began = time.perf_counter()
    Feeder(cache).step(400)
    sent = cache.report()["drives"][0]["link"]["down_bytes"]
    assert time.perf_counter() - began > 0.9 * sent / 1e6
    assert cache.report()["emulated"] is True
    assert json.dumps(cache.report())
    cache.release()


def test_timeouts_grow_with_what_an_emulated_drive_must_read() -> None:
    cache = cache_of("instinfer(1,flash_mb=1)")
    Feeder(cache).step(512)
    assert all(link.timeout_seconds > storage_link.TIMEOUT_SECONDS for link in cache._drives)
    cache.release()
