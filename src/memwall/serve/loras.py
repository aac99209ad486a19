"""Adapters as models: loaded and unloaded by request, with bodies as vLLM's.

A path from outside is only ever read below the folder that the server was started with; names never become paths.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from memwall.engine.adapters import Adapters
from memwall.engine.serving import Serving
from memwall.errors import MemwallError
from memwall.models.lora import LoraWeights
from memwall.serve.control import answered
from memwall.serve.fields import ApiError, Fields, read_object
from memwall.serve.service import Service

MOST_NAME_CHARACTERS = 128
KNOWN_FIELDS = ("lora_name", "lora_path", "lora_int_id", "load_inplace")


class Loras:
    """The routes, over one service. `folder`: where adapters may be loaded from; None for nowhere."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.folder = service.settings.lora_folder
        self._one_at_a_time = asyncio.Lock()

    @answered
    async def load(self, request: Request) -> Response:
        """POST {"lora_name": ..., "lora_path": ...}: a name and a folder below `--lora-dir`."""
        fields = self._fields(request)
        name = self._name(fields)
        folder = self._path(fields)
        serving, again = self.service.serving, fields.boolean("load_inplace")
        async with self._one_at_a_time:
            if name in _adapters(serving).names and not again:
                message = f"the adapter {name!r} is loaded already; unload it first, or give load_inplace: true"
                raise ApiError(message, param="lora_name")
            try:
                weights = await asyncio.to_thread(serving.read_adapter, folder)
                await self.service.call(lambda: _enter(serving, name, weights))
            except MemwallError as error:
                raise ApiError(str(error), param="lora_path") from None
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @answered
    async def unload(self, request: Request) -> Response:
        """POST {"lora_name": ...}: requests that have it go on, new ones are refused."""
        fields = self._fields(request)
        name = self._name(fields)
        async with self._one_at_a_time:
            if name not in _adapters(self.service.serving).names:
                raise ApiError(f"the adapter {name!r} is not here", status=404, param="lora_name")
            await self.service.call(lambda: _adapters(self.service.serving).remove(name))
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    def _fields(self, request: Request) -> Fields:
        fields = Fields(read_object(request.scope["memwall.body"]), KNOWN_FIELDS)
        if self.folder is None:
            raise ApiError("adapters come and go only where the server was started with --lora-dir", status=403)
        return fields

    def _name(self, fields: Fields) -> str:
        name = fields.text("lora_name")
        if name is None:
            raise ApiError("lora_name is missing", param="lora_name")
        return checked_name(name, self.service.settings.name)

    def _path(self, fields: Fields) -> Path:
        assert self.folder is not None
        text = fields.text("lora_path")
        if not text or "\0" in text:
            raise ApiError("lora_path is missing: give a folder below the server's --lora-dir", param="lora_path")
        try:
            root = self.folder.resolve()
            path = (root / text).resolve()
        except (OSError, RuntimeError, ValueError):
            raise ApiError("lora_path is no path", param="lora_path") from None
        if root not in path.parents:
            raise ApiError("lora_path lies outside the server's --lora-dir", status=403, param="lora_path")
        return path


def checked_name(name: str, base: str) -> str:
    """The name, or an error that says why no adapter may be called so."""
    if not 0 < len(name) <= MOST_NAME_CHARACTERS or not name.isprintable() or name != name.strip():
        raise ApiError(f"lora_name must be 1 to {MOST_NAME_CHARACTERS} printable characters", param="lora_name")
    if name == base:
        raise ApiError(f"{name!r} is the base model's own name; choose another", param="lora_name")
    return name


def _adapters(serving: Serving) -> Adapters:
    assert serving.adapters is not None
    return serving.adapters


def _enter(serving: Serving, name: str, weights: LoraWeights) -> None:
    """Between two steps. An adapter of that name gives way; where the new one has no room, it comes back."""
    old = _adapters(serving).describe(name)
    if old is not None:
        _adapters(serving).remove(name)
    try:
        serving.add_adapter(name, weights)
    except MemwallError:
        if old is not None and old.weights is not None:
            serving.add_adapter(name, old.weights)
        raise
