"""`tools` and `tool_choice` of a chat, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memwall.engine.call_forms import MOST_CALLS
from memwall.serve.fields import ApiError, Fields

MOST_TOOLS = 128
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """offered: as they came, for the template. must: an answer is calls of these, and nothing else; parallel: several
    calls in one answer. Who names one tool gets one call.
    """

    offered: tuple[Mapping[str, Any], ...]
    must: tuple[str, ...] = ()
    parallel: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """All that may be called."""
        return tuple(tool["function"]["name"] for tool in self.offered)

    @property
    def most(self) -> int:
        """Calls of one answer that is guided."""
        return MOST_CALLS if self.parallel else 1

    def schemas(self) -> list[tuple[str, Any]]:
        """Names and schemas of the arguments of those that must be called; of all where none must."""
        wanted = self.must or self.names
        functions = {tool["function"]["name"]: tool["function"] for tool in self.offered}
        return [(name, functions[name].get("parameters")) for name in wanted]


def read_tools(fields: Fields) -> Tools | None:
    """None where nothing may be called."""
    offered, choice = fields.get("tools"), fields.get("tool_choice")
    parallel = fields.boolean("parallel_tool_calls", True)
    if not isinstance(offered, list | None) or len(offered or ()) > MOST_TOOLS:
        raise ApiError(f"tools must be a list of at most {MOST_TOOLS} functions", param="tools")
    tools = tuple(_tool(tool, number) for number, tool in enumerate(offered or ()))
    names = [tool["function"]["name"] for tool in tools]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ApiError(f"two tools are called {min(twice)!r}", param="tools")
    must = _must(choice, names)
    parallel = parallel and not isinstance(choice, dict)
    return None if choice == "none" or not tools else Tools(offered=tools, must=must, parallel=parallel)


def _tool(tool: Any, number: int) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    if not isinstance(function, dict):
        raise ApiError(f"tool {number} must be {{type: function, function: {{name, parameters}}}}", param="tools")
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ApiError(f"tool {number}: its name must be 1 to 64 letters, digits, _, . and -", param="tools")
    if not isinstance(function.get("parameters"), dict | None) or not isinstance(function.get("strict"), bool | None):
        raise ApiError(f"tool {name!r}: parameters must be a JSON schema, and strict true or false", param="tools")
    if not isinstance(function.get("description"), str | None):
        raise ApiError(f"tool {name!r}: its description must be a text", param="tools")
    told = {key: value for key, value in function.items() if value is not None and key != "strict"}
    return {"type": "function", "function": told}


def _must(choice: Any, names: list[str]) -> tuple[str, ...]:
    """The tools of which an answer must call one; none where it may be text."""
    if choice in (None, "none", "auto"):
        return ()
    if choice == "required":
        if not names:
            raise ApiError("tool_choice is required, but there are no tools", param="tool_choice")
        return tuple(names)
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        message = "tool_choice must be none, auto, required, or {type: function, function: {name}}"
        raise ApiError(message, param="tool_choice")
    if name not in names:
        raise ApiError(f"tool_choice names {name[:80]!r}, which is none of the tools", param="tool_choice")
    return (name,)
