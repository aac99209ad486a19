"""Messages of a chat as templates want them: plain text, and calls of tools with their answers.

A template that knows no tools gets them as text: what may be called in the first message, calls and answers in the
tags that it was told of (`engine.call_forms.TAGGED`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from memwall.engine.call_forms import TAGGED
from memwall.serve.fields import ApiError

Message = dict[str, Any]
INSTRUCTIONS = """You may call functions. These there are, each with a JSON schema of its arguments:
<tools>
{tools}
</tools>
To call one, answer with its name and arguments as JSON between these tags, once for each call:
{opening}{{"name": "NAME", "arguments": {{...}}}}{closing}"""


def read_messages(messages: Any) -> list[Message]:
    """Checked messages with a text as content; parts of type text are joined. Arguments of calls become objects."""
    if not isinstance(messages, list) or not messages:
        raise ApiError("messages must be a list of objects with role and content, at least one", param="messages")
    return [_message(message, number) for number, message in enumerate(messages)]


def _message(message: Any, number: int) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ApiError(f"message {number} must be an object with role and content", param="messages")
    role, content = message["role"], message.get("content")
    found: Message = {"role": "system" if role == "developer" else role}
    calls = message.get("tool_calls")
    if calls is not None and role == "assistant":
        found["tool_calls"] = [_call(call, number) for call in calls] if isinstance(calls, list) else [_call(0, number)]
        content = "" if content is None else content
    if isinstance(content, list):
        content = _joined(content, number)
    if not isinstance(content, str):
        raise ApiError(f"message {number}: content must be a text", param="messages")
    found["content"] = content
    for name in ("tool_call_id", "name"):
        if not isinstance(message.get(name), str | None):
            raise ApiError(f"message {number}: {name} must be a text", param="messages")
        if role == "tool" and message.get(name) is not None:
            found[name] = message[name]
    return found


def _call(call: Any, number: int) -> Message:
    function = call.get("function") if isinstance(call, dict) else None
    if (
        not isinstance(function, dict)
        or not isinstance(function.get("name"), str)
        or call.get("type", "function") != "function"
        or not isinstance(call.get("id"), str | None)
    ):
        message = f"message {number}: tool_calls must be a list of {{id, type, function: {{name, arguments}}}}"
        raise ApiError(message, param="messages")
    arguments = function.get("arguments")
    try:
        value = json.loads(arguments or "{}") if isinstance(arguments, str | None) else arguments
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ApiError(f"message {number}: arguments of a call must be a JSON object", param="messages")
    found = {"type": "function", "function": {"name": function["name"], "arguments": value}}
    return found if call.get("id") is None else {"id": call["id"], **found}


def _joined(parts: list[Any], number: int) -> str:
    """The text of a message that comes in parts."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise ApiError(f"message {number}: only parts of type text are supported", param="messages")
        texts.append(text)
    return "".join(texts)


def with_tools_as_text(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The same conversation without tools: all of it is text."""
    found: list[Message] = []
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if found and found[-1].get("answers"):  # templates may want roles in turns
                found[-1]["content"] += f"\n{text}"
            else:
                found.append({"role": "user", "content": text, "answers": True})
            continue
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
        texts = [message["content"]] if message["content"] or not calls else []
        texts += [f"{TAGGED.opening}{call}{TAGGED.closing}" for call in calls]
        found.append({"role": message["role"], "content": "\n".join(texts)})
    if tools:
        told = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        text = INSTRUCTIONS.format(tools=told, opening=TAGGED.opening, closing=TAGGED.closing)
        if found[0]["role"] not in ("system", "user"):
            found.insert(0, {"role": "user", "content": text})
        else:
            found[0]["content"] = f"{found[0]['content']}\n\n{text}" if found[0]["role"] == "system" else (
                f"{text}\n\n{found[0]['content']}"
            )  # fmt: skip
    return [{"role": message["role"], "content": message["content"]} for message in found]
