"""Keys of many people, ids of requests, and the log that puts them together."""

from __future__ import annotations

import io
import re
import signal
import time
from pathlib import Path

import httpx
import pytest

from memwall.errors import InputError
from memwall.serve.access import AccessLog, request_id
from memwall.serve.settings import ServerSettings, read_keys
from tests.serve.conftest import Running, Starter

FEW = ("--memory", "160MB", "--weights", "int8", "--context", "512")


def test_keys_of_many_people_come_and_go(starter: Starter, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# the team\nana key-a\nkey-b  # nobody's\n")
    server = starter(*FEW, "--api-key-file", str(path), "--api-key", "own", "--access-log")
    ask = {"prompt": "Hello", "max_tokens": 3}

    def post(key: str, **headers: str) -> httpx.Response:
        return server.post("/v1/completions", ask, headers={"Authorization": f"Bearer {key}", **headers})

    mine = post("key-a", **{"X-Request-Id": "trace-1"})
    assert (mine.status_code, mine.headers["X-Request-Id"]) == (200, "trace-1")
    assert post("key-b").status_code == 200
    refused = post("key-c")
    assert refused.status_code == 401
    assert refused.headers["X-Request-Id"].startswith("req-")
    assert server.get("/metrics").status_code == 401
    path.write_text("ben key-c\n")
    server.process.send_signal(signal.SIGHUP)
    end = time.monotonic() + 60
    while post("key-c").status_code != 200:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert post("key-a").status_code == 401
    assert post("own").status_code == 200
    path.write_text("")
    server.process.send_signal(signal.SIGHUP)
    assert server.get("/health", headers={"Authorization": "Bearer key-c"}).status_code == 200
    log = server.end()
    lines = [line for line in log.splitlines() if "POST /v1/completions" in line]
    assert re.search(
        r'Z 127\.0\.0\.1 "POST .*" 200 [0-9.]+s first=[0-9.]+s id=trace-1 key=ana model=demo in=\d+ out=3', log
    )
    assert any('" 401 ' in line and "key=" not in line for line in lines)
    assert any("key=ben" in line for line in lines)
    assert "GET /health" not in log
    assert "key-a" not in log
    assert "the keys stay" in log


def test_ids_are_there_without_a_log(server: Running) -> None:
    first, second = (server.get("/health").headers["X-Request-Id"] for _ in range(2))
    assert first != second
    odd = server.get("/version", headers={"X-Request-Id": "a b"})
    assert odd.headers["X-Request-Id"].startswith("req-")


def test_a_line_cannot_be_forged() -> None:
    stream = io.StringIO()
    scope = {"path": "/a\nb", "method": "GET", "client": None}
    AccessLog(stream).tell(scope, 0, 0.0, 0.25, request_id({b"x-request-id": b"x\ny"}))
    assert stream.getvalue().count("\n") == 1
    assert ' - "GET /a\\nb" 499 0.250s' in stream.getvalue()


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "no key"), ("# only\n", "no key"), ("a b c", "line 1"), ("x k1\nx k2", "line 2"), ("kéy", "header")],
)
def test_keys_that_are_wrong(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        ServerSettings(name="demo", api_keys=read_keys(path))


def test_a_file_of_keys_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_keys(tmp_path / "none")
