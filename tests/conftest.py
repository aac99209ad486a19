"""Tests keep measured figures in a cache of their own, so that no run depends on what an earlier one left behind.

Property tests draw the same examples every time. Without a GPU Triton's kernels are interpreted; it asks when it is
first imported, which may be in any test's file.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

# torch's threads are to sleep when they wait: the products' own threads want the cores
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
