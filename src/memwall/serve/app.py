"""The application, and running it: sockets, signals, a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from memwall.engine.serving import Serving
from memwall.errors import DoesNotFit, InputError
from memwall.models.chat import ChatTemplate
from memwall.serve.access import AccessLog
from memwall.serve.control import Control
from memwall.serve.embed import Embed
from memwall.serve.fields import ApiError
from memwall.serve.generate import Generate
from memwall.serve.guard import Guard, refuse
from memwall.serve.loras import Loras
from memwall.serve.parse import Parser
from memwall.serve.service import Service
from memwall.serve.settings import ServerSettings, read_keys

SWITCH_SECONDS = 5e-4
"""How long one thread of Python may keep the other waiting: the engine's many short native calls each ask anew."""
BUDGET_STEP = 0.8
KEEP_ALIVE_SECONDS = 15
HAND_BACK_SECONDS = 5
"""What answers have to reach their clients once the engine has ended them."""
log = logging.getLogger("memwall.serve")


class Server:
    """One model's server. `run` until a signal or `end`."""

    def __init__(
        self, serving: Serving, settings: ServerSettings, template: ChatTemplate, *, alias_metrics: bool = False
    ) -> None:
        assert serving.tokenizer is not None
        self.serving = serving
        self.settings = settings
        self.service = Service(serving, settings)
        parser = Parser(
            settings, serving.tokenizer, template, context=serving.context_tokens, vocab=serving.config.vocab_size,
            adapters=serving.adapters, width=serving.config.hidden_size,
            eos=serving.config.eos_token_ids,
        )  # fmt: skip
        control = Control(self.service, parser, alias=alias_metrics)
        routes = [
            Route("/", control.page),
            Route("/memory", control.memory),
            Route("/health", control.health),
            Route("/ping", control.health),
            Route("/metrics", control.metrics),
            Route("/version", control.version),
            Route("/openapi.json", control.openapi),
            Route("/v1/models", control.models),
            Route("/v1/models/{name:path}", control.model),
            Route("/v1/completions", Generate(self.service, parser, chat=False), methods=["POST"]),
            Route("/v1/chat/completions", Generate(self.service, parser, chat=True), methods=["POST"]),
            Route("/v1/budget", control.budget, methods=["GET", "POST"]),
            Route("/v1/embeddings", Embed(self.service, parser).embeddings, methods=["POST"]),
            *_lora_routes(self.service),
            Route("/tokenize", control.tokenize, methods=["POST"]),
            Route("/detokenize", control.detokenize, methods=["POST"]),
        ]
        handlers = {HTTPException: _http_error, Exception: _fault}
        inner = Starlette(routes=routes, lifespan=self._lifespan, exception_handlers=handlers)
        self.app = Guard(inner, settings, AccessLog() if settings.access_log else None)
        self._first_budget = serving.budget_bytes
        self._uvicorn: uvicorn.Server | None = None
        self.clean_end = True

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.service.start()
        self._watch_budget_signals()
        self._watch_keys()
        yield
        self.clean_end = await self.service.stop(0.0)

    def run(self, announce: Callable[[str, int], None] | None = None) -> None:
        """Serves until SIGINT or SIGTERM. announce(host, port): called once it listens."""
        before = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        try:
            asyncio.run(self._serve(announce))
        finally:
            sys.setswitchinterval(before)

    def end(self) -> None:
        """Ends gracefully; may be called from any thread. What runs may go on for `drain_seconds`, then its clients
        get what there is.
        """
        if self._uvicorn is not None and not self.service.ending:
            self.service.ending = self._uvicorn.should_exit = True
            self.service.hand_back(self.settings.drain_seconds)

    async def _serve(self, announce: Callable[[str, int], None] | None) -> None:
        config = uvicorn.Config(
            self.app,
            host=self.settings.host,
            port=self.settings.port,
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=self.settings.connections,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=int(self.settings.drain_seconds + HAND_BACK_SECONDS),
            h11_max_incomplete_event_size=32 * 1024,
        )
        logging.getLogger("asyncio").setLevel(logging.ERROR)  # that a client left is no news
        self._uvicorn = server = _Uvicorn(config, self)
        announcing = asyncio.create_task(self._announce(server, announce))
        try:
            with self._listen() as listening:
                await server.serve(sockets=[listening])
        finally:
            announcing.cancel()

    def _listen(self) -> socket.socket:
        """Bound here, not by uvicorn, which only says on its log why it could not and exits."""
        host, port = self.settings.host, self.settings.port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            return socket.create_server((host, port), family=family, backlog=self.settings.connections)
        except (OSError, UnicodeError) as error:
            why = str(error).partition(" (while")[0]
            raise InputError(f"cannot listen on {host}:{port}: {why}; try another --host or --port") from None

    async def _announce(self, server: uvicorn.Server, announce: Callable[[str, int], None] | None) -> None:
        while not server.started:
            await asyncio.sleep(0.01)
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        if announce is not None:
            announce(host, port)

    def _watch_budget_signals(self) -> None:
        """SIGUSR1 makes the budget smaller by a fifth, SIGUSR2 larger, up to the first one."""
        loop = asyncio.get_running_loop()
        for name, grows in (("SIGUSR1", False), ("SIGUSR2", True)):
            with contextlib.suppress(AttributeError, NotImplementedError, RuntimeError, ValueError):
                loop.add_signal_handler(getattr(signal, name), self._move_budget, grows)

    def _watch_keys(self) -> None:
        """SIGHUP reads the file of keys again; a file that is wrong changes nothing."""
        path = self.settings.key_file
        if path is None:
            return

        def read() -> None:
            try:
                self.app.take_keys(read_keys(path))
                log.warning("%s: %d keys", path, len(self.app.keys))
            except InputError as error:
                log.error("the keys stay: %s", error)

        with contextlib.suppress(AttributeError, NotImplementedError, RuntimeError, ValueError):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, read)

    def _move_budget(self, grows: bool) -> None:
        now = self.serving.budget_bytes
        if now is None or self._first_budget is None:
            return
        wanted = min(int(now / BUDGET_STEP), self._first_budget) if grows else int(now * BUDGET_STEP)

        def move() -> None:
            try:
                self.serving.set_budget(max(wanted, self.serving.least_budget_bytes()))
            except DoesNotFit as error:
                log.warning("the budget stays: %s", error)

        self.service.thread.call(move)


def _lora_routes(service: Service) -> list[Route]:
    if service.serving.adapters is None:
        return []
    loras = Loras(service)
    return [
        Route("/v1/load_lora_adapter", loras.load, methods=["POST"]),
        Route("/v1/unload_lora_adapter", loras.unload, methods=["POST"]),
    ]


class _Uvicorn(uvicorn.Server):
    """Running requests may end; new ones are refused from the signal on, and the signal ends nothing else."""

    should_exit: bool

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._ours = server

    def handle_exit(self, sig: int, frame: object) -> None:
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True  # asked twice
        self.should_exit = True
        self._ours.end()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = {404: f"there is nothing at {request.url.path[:200]}", 405: f"{request.method} is not for this route"}
    answer = refuse(ApiError(known.get(error.status_code, str(error.detail)), status=error.status_code))
    answer.headers.update(error.headers or {})  # a 405 says what is allowed
    return answer


async def _fault(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return refuse(ApiError("the server failed at this request; see its log", status=500))
