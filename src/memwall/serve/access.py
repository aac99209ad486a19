"""Who asked for what: an id for every request, and one line a request on standard error where it is wanted.

The id is the client's own `X-Request-Id` where it sends a plain one, so that a gateway's log and this one can be put
together; it goes back with the answer. Scrapes and the page's polling are not told: they would be most of the lines.
"""

from __future__ import annotations

import re
import secrets
import sys
import time
from collections.abc import MutableMapping
from typing import Any, TextIO

REQUEST_ID = b"x-request-id"
PLAIN_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
UNTOLD = frozenset({"/health", "/ping", "/metrics", "/memory"})
TOLD = "memwall.told"
"""Where routes leave words for the line."""
MOST_PATH = 200
GONE = 499


def request_id(headers: MutableMapping[bytes, bytes]) -> bytes:
    """The client's id, or a new one."""
    given = headers.get(REQUEST_ID, b"")
    return given if PLAIN_ID.fullmatch(given) else b"req-" + secrets.token_hex(8).encode()


class AccessLog:
    """Lines `time client "METHOD /path" status seconds key=value ...`, for people and for grep."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream if stream is not None else sys.stderr

    def tell(self, scope: MutableMapping[str, Any], status: int, first: float, seconds: float, number: bytes) -> None:
        """One answer that has ended. status: 0 where the client went before one, told as 499; first: seconds to its
        beginning.
        """
        path = scope["path"]
        if path in UNTOLD and status < 400:
            return
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        client = (scope.get("client") or ("-",))[0]
        shown = path[:MOST_PATH].encode("unicode_escape").decode()
        words = "".join(f" {name}={value}" for name, value in scope.get(TOLD, {}).items())
        line = f'{now} {client} "{scope["method"]} {shown}" {status or GONE} {seconds:.3f}s first={first:.3f}s'
        self.stream.write(f"{line} id={number.decode()}{words}\n")
        self.stream.flush()
