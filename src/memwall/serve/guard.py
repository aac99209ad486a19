"""What stands before every route: the key, the host's name, sizes, and how much is read at once.

Browsers can reach a loopback server from any page; so a local server answers only to local names (else a foreign name
could be pointed at it), and bodies must say they are JSON, which no foreign page may send without being asked first.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from starlette.responses import Response

from memwall.serve.access import REQUEST_ID, TOLD, AccessLog, request_id
from memwall.serve.fields import ApiError
from memwall.serve.settings import LOOPBACK, ServerSettings

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

BODY_SECONDS = 30.0
BODIES_AT_ONCE = 4
"""Bodies of the largest size that are held at once; more wait their turn."""


class Guard:
    """An ASGI layer around the whole application: nothing behind it runs for who may not come in."""

    def __init__(self, app: App, settings: ServerSettings, log: AccessLog | None = None) -> None:
        """log: where answers are told."""
        self.app = app
        self.settings = settings
        self.log = log
        self.take_keys(settings.api_keys)
        self._room = BODIES_AT_ONCE * settings.most_body_bytes
        self._freed = asyncio.Condition()

    def take_keys(self, keys: Mapping[str, str]) -> None:
        """Keys by the names of their owners in place of those there were; that of --api-key stays."""
        own = self.settings.api_key
        self.keys = dict(keys) if own is None else {**keys, "": own}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.lower(): value for name, value in scope["headers"]}
        number, began, told = request_id(headers), time.perf_counter(), [0, 0.0]

        async def with_id(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                told[:] = [message["status"], time.perf_counter() - began]
                message = {**message, "headers": [*message.get("headers", ()), (REQUEST_ID, number)]}
            await send(message)

        try:
            return await self._let_in(scope, headers, receive, with_id)
        finally:
            if self.log is not None:
                self.log.tell(scope, int(told[0]), told[1], time.perf_counter() - began, number)

    async def _let_in(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        try:
            self._check_host(headers)
            owner = self._check_key(headers)
            if owner:
                scope.setdefault(TOLD, {})["key"] = owner
            size = self._check_body(scope, headers)
        except ApiError as error:
            return await refuse(error)(scope, receive, send)
        if not size:
            return await self.app(scope, receive, send)
        async with self._freed:
            await self._freed.wait_for(lambda: self._room >= size)
            self._room -= size
        try:
            body = await self._read(receive, size)
        except ApiError as error:
            return await refuse(error)(scope, receive, send)
        finally:
            async with self._freed:
                self._room += size
                self._freed.notify_all()
        if body is None:
            return None  # the client went away
        scope["memwall.body"] = body
        return await self.app(scope, receive, send)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        if not self.settings.local or self.settings.guarded:
            return
        host = headers.get(b"host", b"").decode("latin-1")
        name = host[: host.rfind("]") + 1].strip("[]") if host.startswith("[") else host.split(":")[0]
        if name.lower() not in LOOPBACK:
            raise ApiError(f"this server answers to {', '.join(LOOPBACK)} only, not {name[:80]!r}", status=421)

    def _check_key(self, headers: dict[bytes, bytes]) -> str:
        """Whose key it is."""
        if not self.settings.guarded:
            return ""
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() == b"basic":  # what a browser asks for; the name does not matter
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                given = b""
        given = given.strip()
        # all are compared, so that the time tells nothing
        owners = [owner for owner, key in self.keys.items() if hmac.compare_digest(given, key.encode())]
        if not owners:
            raise ApiError("the API key is missing or wrong", status=401, code="invalid_api_key")
        return owners[0]

    def _check_body(self, scope: Scope, headers: dict[bytes, bytes]) -> int:
        """Bytes to read; zero where there is no body."""
        if scope["method"] != "POST":
            return 0  # no other method has a route that reads one
        most = self.settings.most_body_bytes
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != b"application/json":
            raise ApiError("send JSON with the header Content-Type: application/json", status=415)
        told = headers.get(b"content-length")
        if told is None:
            return most
        if not told.isdigit() or len(told) > 18:
            raise ApiError("Content-Length is no number")
        if int(told) > most:
            raise ApiError(f"the body has {int(told):,} bytes; at most {most:,} are taken", status=413)
        return max(int(told), 1)

    async def _read(self, receive: Receive, most: int) -> bytes | None:
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise ApiError(f"the body has more than {most:,} bytes", status=413)
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(f"the body took longer than {BODY_SECONDS:.0f} seconds") from None


def refuse(error: ApiError) -> Response:
    """The error as an answer."""
    headers = {}
    if error.status == 401:
        headers["WWW-Authenticate"] = 'Basic realm="memwall", charset="UTF-8"'
    if error.status in (429, 503):
        headers["Retry-After"] = "1"
    # in ASCII: a message may quote what no encoding takes
    body = json.dumps(error.body())
    return Response(body, status_code=error.status, headers=headers, media_type="application/json")
