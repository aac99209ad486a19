"""The page, as a browser shows it while requests run."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from tests.serve.conftest import Running

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PNG = b"\x89PNG\r\n\x1a\n"


OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--window-size=1100,1000", "--virtual-time-budget=2500",
)  # fmt: skip


def shown(url: str, *options: str) -> str:
    """What a headless browser has after some polls of the page."""
    assert BROWSER is not None
    command = [BROWSER, *OPTIONS, *options, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.fixture
def browser() -> None:
    """Skips where there is no browser that starts."""
    try:
        shown("about:blank", "--dump-dom")
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"needs Chromium that starts: {type(error).__name__}")


def texts(dom: str, tag: str) -> list[str]:
    return [re.sub("<[^>]*>", "", found) for found in re.findall(f"<{tag}[^>]*>(.*?)</{tag}>", dom, re.S)]


@pytest.mark.usefixtures("browser")
def test_a_browser_shows_memory_pages_and_requests(server: Running, tmp_path: Path) -> None:
    body = {"prompt": "The river", "max_tokens": 480, "ignore_eos": True, "stream": True}
    server.post("/v1/completions", {**body, "stream": False})
    done = threading.Event()

    def keep_busy() -> None:
        while not done.is_set():
            server.post("/v1/completions", body)

    busy = [threading.Thread(target=keep_busy) for _ in range(3)]
    for one in busy:
        one.start()
    try:
        dom = shown(server.url + "/", "--dump-dom")
        shown(server.url + "/", f"--screenshot={tmp_path / 'page.png'}")
    finally:
        done.set()
        for one in busy:
            one.join()
    assert 'role="status" class="">live<' in dom
    keys = texts(dom, "span")
    for owner in ("weights/int8", "kv/pages", "runtime"):
        assert any(owner in key for key in keys), owner
    cells = texts(dom, "td")
    assert "running" in cells
    assert {"first token", "each token", "whole answer"} <= set(cells)
    colors = re.findall(r'<b style="background: ([^;"]+)', dom)
    assert len(set(colors)) >= 3  # free pages, kept beginnings, a request's own
    assert (tmp_path / "page.png").read_bytes().startswith(PNG)
    assert (tmp_path / "page.png").stat().st_size > 20_000
