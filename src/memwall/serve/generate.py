"""The routes that make text: `/v1/completions` and `/v1/chat/completions`, whole or streamed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse

from memwall.serve.access import TOLD
from memwall.serve.answers import DONE, Form, sse
from memwall.serve.choices import Choice
from memwall.serve.fields import ApiError, read_object
from memwall.serve.guard import Receive, Scope, Send, refuse
from memwall.serve.parse import Asked, Parser
from memwall.serve.service import Service

INLINE_CHARACTERS = 4096
FORMED = (b'"response_format"', b'"tool_choice"')
"""Fields that may ask for an answer in a form."""
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # else nginx keeps the pieces until there are many
]


class Generate:
    """One of the two routes, as an ASGI application of its own: it must see the client go."""

    def __init__(self, service: Service, parser: Parser, *, chat: bool) -> None:
        self.service = service
        self.parser = parser
        self.chat = chat
        self._encoding = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = HttpRequest(scope, receive, send)
        if request.method != "POST":
            return await refuse(ApiError("use POST", status=405))(scope, receive, send)
        try:
            asked = await self._parse(scope["memwall.body"])
        except ApiError as error:
            return await refuse(error)(scope, receive, send)
        scope.setdefault(TOLD, {}).update({"model": asked.model, "in": asked.prompt_tokens})
        form = Form(asked=asked, model=asked.model, tokenizer=self.parser.tokenizer, chat=self.chat)
        work = asyncio.create_task(self._answer(asked, form, scope, receive, send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, gone):
                if not task.done():
                    task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        fault = None if work.cancelled() else work.exception()
        if fault is not None and not isinstance(fault, OSError):
            raise fault
        return None

    async def _parse(self, raw: bytes) -> Asked:
        read = self.parser.chat if self.chat else self.parser.completion
        if len(raw) <= INLINE_CHARACTERS and not any(name in raw for name in FORMED):
            return read(read_object(raw))
        # long texts one at a time, beside the loop: encoding holds many times their size for a moment; forms may take
        # a look at the whole vocabulary
        async with self._encoding:
            return await asyncio.to_thread(lambda: read(read_object(raw)))

    async def _answer(self, asked: Asked, form: Form, scope: Scope, receive: Receive, send: Send) -> None:
        choices: dict[int, Choice] = {}
        try:
            how = self._stream if asked.stream else self._whole
            await how(asked, form, choices, scope, receive, send)
        finally:
            scope[TOLD]["out"] = sum(choice.tokens for choice in choices.values())

    async def _whole(
        self, asked: Asked, form: Form, choices: dict[int, Choice], scope: Scope, receive: Receive, send: Send
    ) -> None:
        try:
            async with aclosing(self.service.run(asked)) as pieces:
                async for index, choice, _ in pieces:
                    choices[index] = choice
        except ApiError as error:
            return await refuse(error)(scope, receive, send)
        whole = form.whole([choices[index] for index in range(len(asked.requests))])
        return await JSONResponse(whole)(scope, receive, send)

    async def _stream(
        self, asked: Asked, form: Form, choices: dict[int, Choice], scope: Scope, receive: Receive, send: Send
    ) -> None:
        async with aclosing(self._events(asked, form, choices)) as events:
            try:
                first = await anext(events)  # refused before anything is sent: with a status of its own
            except ApiError as error:
                return await refuse(error)(scope, receive, send)
            await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
            await send({"type": "http.response.body", "body": first, "more_body": True})
            try:
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            except ApiError as error:
                body = b"data: " + json.dumps(error.body()).encode() + b"\n\n"
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        return None

    async def _events(self, asked: Asked, form: Form, choices: dict[int, Choice]) -> AsyncGenerator[bytes, None]:
        async with aclosing(self.service.run(asked)) as pieces:
            opened = False
            async for index, choice, piece in pieces:
                choices[index] = choice
                value = form.piece(index, piece)
                before = [] if opened else form.opening()
                opened = True
                together = b"".join(sse(one) for one in [*before, *([value] if value is not None else [])])
                if together:
                    yield together
        closing = form.closing([choices[index] for index in range(len(asked.requests))])
        yield (sse(closing) if closing is not None else b"") + DONE


async def _gone(receive: Receive) -> None:
    """Returns when the client has closed its side."""
    while True:
        message: Any = await receive()
        if message["type"] == "http.disconnect":
            return
