"""Routes beside text: what is here, how it is, and the budget."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from memwall import __version__
from memwall.errors import DoesNotFit, InputError
from memwall.hardware.units import parse_bytes
from memwall.memory import peak_resident_bytes, resident_bytes
from memwall.serve.fields import ApiError, Fields, read_object
from memwall.serve.guard import refuse
from memwall.serve.memory_map import memory_map
from memwall.serve.metrics import exposition
from memwall.serve.openapi import document
from memwall.serve.parse import Parser
from memwall.serve.service import Service

Route = Callable[[Request], Awaitable[Response]]
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)


def answered(function: Callable[..., Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
    """Errors of a route become answers."""

    @functools.wraps(function)
    async def route(self: Any, request: Request) -> Response:
        try:
            return await function(self, request)
        except ApiError as error:
            return refuse(error)

    return route


class Control:
    """The routes, over one service."""

    def __init__(self, service: Service, parser: Parser, *, alias: bool) -> None:
        self.service = service
        self.parser = parser
        self.alias = alias

    @answered
    async def page(self, request: Request) -> Response:
        """The live page."""
        text = resources.files("memwall.serve").joinpath("page.html").read_text("utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": PAGE_POLICY, "X-Frame-Options": "DENY"})

    @answered
    async def memory(self, request: Request) -> Response:
        """What the page shows, as JSON."""
        return JSONResponse(await self.service.call(lambda: memory_map(self.service)))

    @answered
    async def models(self, request: Request) -> Response:
        """The base model and its adapters."""
        base = self._model()
        return JSONResponse({"object": "list", "data": [base, *self.service.adapter_models(base)]})

    @answered
    async def model(self, request: Request) -> Response:
        """The model by its name."""
        name, base = request.path_params["name"], self._model()
        for model in (base, *self.service.adapter_models(base)):
            if model["id"] == name:
                return JSONResponse(model)
        raise ApiError(f"the model {name[:80]!r} is not here", status=404, code="model_not_found")

    @answered
    async def health(self, request: Request) -> Response:
        """200 while requests are taken."""
        if self.service.ending or not self.service.thread.alive:
            raise ApiError("ending" if self.service.ending else "the engine has ended", status=503)
        return JSONResponse({"status": "ok"})

    @answered
    async def metrics(self, request: Request) -> Response:
        """Prometheus text."""
        text = await self.service.call(lambda: exposition(self.service, alias=self.alias))
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @answered
    async def version(self, request: Request) -> Response:
        """The version of memwall."""
        return JSONResponse({"version": __version__})

    @answered
    async def openapi(self, request: Request) -> Response:
        """The server's description for machines."""
        adapters = self.service.serving.adapters is not None
        parser = self.parser
        return JSONResponse(document(self.service.settings, vocab=parser.vocab, adapters=adapters, width=parser.width))

    @answered
    async def tokenize(self, request: Request) -> Response:
        """Text to ids."""
        ids = self.parser.tokens(_body(request))
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": self.parser.context})

    @answered
    async def detokenize(self, request: Request) -> Response:
        """Ids to text."""
        return JSONResponse({"prompt": self.parser.text(_body(request))})

    @answered
    async def budget(self, request: Request) -> Response:
        """GET: the budget and what is held. POST {"memory": "1GB"}: a new one, without failing a request."""
        if request.method == "POST":
            value = Fields(_body(request), ("memory",)).get("memory")
            try:
                nbytes = value if isinstance(value, int) and not isinstance(value, bool) else parse_bytes(str(value))
                await self.service.call(lambda: self.service.serving.set_budget(nbytes))
            except (InputError, DoesNotFit) as error:
                raise ApiError(str(error), param="memory") from None
        return JSONResponse(await self.service.call(self._budget))

    def _budget(self) -> dict[str, Any]:
        serving = self.service.serving
        stack = serving.stack
        return {
            "blocks": None if stack is None else {"held": stack.num_blocks, "most": stack.most_blocks},
            "budget_bytes": serving.budget_bytes,
            "least_bytes": serving.least_budget_bytes(),
            "resident_bytes": resident_bytes(),
            "resident_peak_bytes": peak_resident_bytes(),
            "pages": serving.pool.limit_pages,
            "wanted_pages": serving.engine.wanted_pages,
        }

    def _model(self) -> dict[str, Any]:
        service = self.service
        return {
            "id": service.settings.name,
            "object": "model",
            "created": int(service.started),
            "owned_by": "memwall",
            "max_model_len": self.parser.context,
        }


def _body(request: Request) -> dict[str, Any]:
    return read_object(request.scope["memwall.body"])
