"""The server's description for machines (OpenAPI 3.1), served at `/openapi.json`.

Kept as data beside the parser, which does the checking: limits come from the same settings, and a test holds the two
lists of fields together. A library that derives both from types would bring its validator into every server: 10 MB of a
budget that is counted in tens.
"""

from __future__ import annotations

from typing import Any

from memwall import __version__
from memwall.serve.parse import IGNORED, LARGEST_SEED, MOST_BIAS, MOST_BIASED, MOST_PENALTY
from memwall.serve.settings import ServerSettings
from memwall.serve.tools import MOST_TOOLS, NAME

Schema = dict[str, Any]
NUMBER: Schema = {"type": "number"}
COUNT: Schema = {"type": "integer", "minimum": 0}
TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
ANYTHING: Schema = {"type": "object"}
ERROR_STATUS = {
    "400": "the request is wrong: the message says where", "404": "no such model", "413": "the body is too large",
    "415": "the body is not said to be JSON", "421": "a name that this server does not answer to",
    "429": "the queue is full: try again later", "503": "ending, or too much to do",
}  # fmt: skip


def document(settings: ServerSettings, *, vocab: int, adapters: bool, width: int = 0) -> Schema:
    """The whole description. vocab: tokens that the model knows; adapters: whether their routes are there; width: of
    embeddings, 0 where there are none.
    """
    paths: Schema = {
        "/": {"get": _operation("The live page", {"text/html": TEXT})},
        "/memory": {"get": _operation("Memory, pages, queue and latencies now", _json(ANYTHING))},
        "/health": {"get": _operation("200 while requests are taken", _json(_ref("Status")))},
        "/ping": {"get": _operation("200 while requests are taken", _json(_ref("Status")))},
        "/metrics": {"get": _operation("Prometheus metrics", {"text/plain": TEXT})},
        "/version": {"get": _operation("The version of memwall", _json(_object(version=TEXT)))},
        "/openapi.json": {"get": _operation("This description", _json(ANYTHING))},
        "/v1/models": {"get": _operation("The base model and its adapters", _json(_ref("Models")))},
        "/v1/models/{name}": {"get": _operation("One model", _json(_ref("Model")), parameters=[_NAME])},
        "/v1/completions": {"post": _generation("Continue a text", "Completion", "CompletionAnswer")},
        "/v1/chat/completions": {"post": _generation("Answer a conversation", "Chat", "ChatAnswer")},
        "/v1/budget": {
            "get": _operation("The budget, and what is held", _json(_ref("Budget"))),
            "post": _operation("A new budget; no request fails by it", _json(_ref("Budget")), body="NewBudget"),
        },
        "/tokenize": {"post": _operation("Text to ids", _json(_ref("Tokens")), body="Tokenize")},
        "/detokenize": {"post": _operation("Ids to text", _json(_object(prompt=TEXT)), body="Detokenize")},
    }
    if width:
        made = _operation("Vectors of texts", _json(_ref("Embeddings")), body="Embedding")
        paths["/v1/embeddings"] = {"post": made}
    if adapters:
        plain = {"text/plain": TEXT}
        paths["/v1/load_lora_adapter"] = {"post": _operation("Load an adapter", plain, body="LoadAdapter")}
        paths["/v1/unload_lora_adapter"] = {"post": _operation("Forget an adapter", plain, body="UnloadAdapter")}
    bodies = _asked(settings, vocab) | _embedding_body(settings, vocab, width) | _adapter_bodies()
    found: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": "memwall",
            "version": __version__,
            "description": "One model served inside a memory budget, in OpenAI's forms.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": bodies | _answers()},
    }
    if settings.guarded:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found


_NAME: Schema = {"name": "name", "in": "path", "required": True, "schema": TEXT}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: Schema) -> Schema:
    return {"application/json": schema}


def _list(of: Schema, least: int = 0, most: int | None = None) -> Schema:
    found = {"type": "array", "items": of, "minItems": least}
    return found if most is None else {**found, "maxItems": most}


def _object(required: tuple[str, ...] | None = None, *, closed: bool = False, **fields: Schema) -> Schema:
    """required: None for all."""
    found: Schema = {"type": "object", "properties": fields, "required": list(fields if required is None else required)}
    return {**found, "additionalProperties": False} if closed else found


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _within(kind: str, low: float, high: float) -> Schema:
    return {"type": kind, "minimum": low, "maximum": high}


def _operation(
    summary: str, content: Schema, *, body: str | None = None, parameters: list[Schema] | None = None
) -> Schema:
    good: Schema = {"description": summary, "content": {kind: {"schema": schema} for kind, schema in content.items()}}
    errors = {status: {"description": why, "content": _ERROR_CONTENT} for status, why in ERROR_STATUS.items()}
    refused = {"401": {"description": "the key is missing or wrong", "content": _ERROR_CONTENT}}
    found: Schema = {"summary": summary, "responses": {"200": good, **errors, **refused}}
    if body is not None:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(body)}}}
        found["responses"]["403"] = {"description": "not allowed by how the server runs", "content": _ERROR_CONTENT}
    if parameters is not None:
        found["parameters"] = parameters
    return found


_FORMS: Schema = {
    "anyOf": [
        _object(closed=True, type={"enum": ["text", "json_object"]}),
        _object(
            closed=True, type={"const": "json_schema"}, json_schema=_object(("schema",), name=TEXT, schema=ANYTHING)
        ),
    ]
}
_TOOL_CHOICE: Schema = {
    "anyOf": [
        {"enum": ["none", "auto", "required"]},
        _object(type={"const": "function"}, function=_object(name=TEXT)),
    ]
}
_ERROR_CONTENT: Schema = {"application/json": {"schema": _ref("Error")}}


def _generation(summary: str, body: str, answer: str) -> Schema:
    return _operation(summary, {**_json(_ref(answer)), "text/event-stream": {}}, body=body)


def _asked(settings: ServerSettings, vocab: int) -> Schema:
    """Bodies. Every field may be null, which counts as absent."""
    ids = _list(_within("integer", 0, vocab - 1), 1)
    stop = {"type": "string", "minLength": 1, "maxLength": settings.most_stop_characters}
    tokens, seed = _within("integer", 1, 1 << 31), _within("integer", 0, LARGEST_SEED)
    shared = {
        "model": {"type": "string", "const": settings.name},
        "stream": FLAG,
        "stream_options": _object((), closed=True, include_usage=FLAG, include_obfuscation=FLAG),
        "n": _within("integer", 1, settings.most_choices),
        "max_tokens": tokens,
        "temperature": _within("number", 0, 2),
        "top_p": _within("number", 0, 1),
        "top_k": _within("integer", 0, 1 << 31),
        "seed": seed,
        "stop": {"anyOf": [stop, _list(stop, 0, settings.most_stops)]},
        "frequency_penalty": _within("number", -MOST_PENALTY, MOST_PENALTY),
        "presence_penalty": _within("number", -MOST_PENALTY, MOST_PENALTY),
        "logit_bias": {
            "type": "object",
            "maxProperties": MOST_BIASED,
            "propertyNames": {"pattern": "^[0-9]+$"},
            "additionalProperties": _within("number", -MOST_BIAS, MOST_BIAS),
        },
        "response_format": _FORMS,
        "ignore_eos": FLAG,
        "priority": _within("integer", -(1 << 31), 1 << 31),
        "cache_salt": TEXT,
        "user": TEXT,
        "prompt_cache_key": TEXT,
        "return_token_ids": FLAG,
        **{name: {} for name in IGNORED},
    }
    prompts = _prompts(settings, vocab)
    completion = {
        **shared, "prompt": prompts, "echo": FLAG, "best_of": {"const": 1}, "suffix": {"const": ""},
        "logprobs": _within("integer", 0, settings.most_logprobs),
    }  # fmt: skip
    chat = {
        **shared,
        "messages": _list(_ref("Message"), 1),
        "max_completion_tokens": tokens,
        "logprobs": FLAG,
        "top_logprobs": _within("integer", 0, settings.most_logprobs),
        "tools": _list(_ref("Tool"), 0, MOST_TOOLS),
        "functions": {"const": []},
        "tool_choice": _TOOL_CHOICE,
        "modalities": {"const": ["text"]},
        "parallel_tool_calls": FLAG,
    }
    size = {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "examples": ["1GB", "800MiB"]}]}
    return {
        **_messages(),
        "Completion": _body(("prompt",), completion),
        "Chat": _body(("messages",), chat),
        "NewBudget": _object(closed=True, memory=size),
        "Tokenize": _body((), {"model": TEXT, "prompt": TEXT, "messages": _list(_ref("Message"), 1),
                               "add_special_tokens": FLAG}),
        "Detokenize": _body(("tokens",), {"model": TEXT, "tokens": ids}),
    }  # fmt: skip


def _messages() -> Schema:
    """What a conversation is made of."""
    said = {"anyOf": [TEXT, _list(_object(type={"const": "text"}, text=TEXT))]}
    arguments = _or_null({"anyOf": [TEXT, {"type": "object"}]})
    called = _object(("name",), name=TEXT, arguments=arguments)
    call = _object(("function",), id=_or_null(TEXT), type={"const": "function"}, function=called)
    text = _object(("role", "content"), role=TEXT, content=said, tool_call_id=_or_null(TEXT), name=_or_null(TEXT))
    calls = _object(("role", "tool_calls"), role={"const": "assistant"}, content=_or_null(said), tool_calls=_list(call))
    function = _object(
        ("name",),
        name={"type": "string", "pattern": f"^{NAME.pattern}$"},
        description=_or_null(TEXT),
        parameters=_or_null({"type": "object"}),
        strict=_or_null(FLAG),
    )
    return {
        "Message": {"anyOf": [text, calls]},
        "Tool": _object(type={"const": "function"}, function=function),
    }


def _prompts(settings: ServerSettings, vocab: int) -> Schema:
    text, ids = {"type": "string", "minLength": 1}, _list(_within("integer", 0, vocab - 1), 1)
    return {"anyOf": [text, ids, _list(text, 1, settings.most_prompts), _list(ids, 1, settings.most_prompts)]}


def _embedding_body(settings: ServerSettings, vocab: int, width: int) -> Schema:
    fields = {
        "model": {"type": "string", "const": settings.name},
        "input": _prompts(settings, vocab),
        "encoding_format": {"enum": ["float", "base64"]},
        "dimensions": {"const": width},
        "user": TEXT,
        "priority": _within("integer", -(1 << 31), 1 << 31),
        **{name: {} for name in IGNORED},
    }
    return {"Embedding": _body(("input",), fields)}


def _adapter_bodies() -> Schema:
    some_text = {"type": "string", "minLength": 1}
    load = {"lora_name": some_text, "lora_path": some_text, "lora_int_id": {}, "load_inplace": FLAG}
    return {
        "LoadAdapter": _body(("lora_name", "lora_path"), load),
        "UnloadAdapter": _body(("lora_name",), {"lora_name": some_text, "lora_int_id": {}}),
    }


def _body(required: tuple[str, ...], fields: Schema) -> Schema:
    return _object(
        required, closed=True, **{name: one if name in required else _or_null(one) for name, one in fields.items()}
    )


def _answers() -> Schema:
    usage = _object(prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT, prompt_tokens_details=ANYTHING)
    finish, logprobs = {"enum": ["stop", "length", "tool_calls", None]}, _or_null(ANYTHING)
    called = _object(id=TEXT, type={"const": "function"}, function=_object(name=TEXT, arguments=TEXT))
    message = _object(
        ("role", "content", "refusal"), role={"const": "assistant"}, content=_or_null(TEXT), refusal={"type": "null"},
        tool_calls=_list(called, 1),
    )  # fmt: skip
    text = _object(index=COUNT, text=TEXT, logprobs=logprobs, finish_reason=finish)
    answer = _object(index=COUNT, message=message, logprobs=logprobs, finish_reason=finish)
    numbers = {"anyOf": [_list({"type": "number"}, 1), TEXT]}
    vector = _object(object={"const": "embedding"}, index=COUNT, embedding=numbers)
    counts = _object(prompt_tokens=COUNT, total_tokens=COUNT)
    error = _object(message=TEXT, type=TEXT, param=_or_null(TEXT), code=_or_null(TEXT))

    def whole(choice: Schema) -> Schema:
        return _object(id=TEXT, object=TEXT, created=COUNT, model=TEXT, choices=_list(choice, 1), usage=usage)

    return {
        "Error": _object(error=error),
        "Status": _object(status=TEXT),
        "Model": _object(id=TEXT, object=TEXT, created=COUNT, owned_by=TEXT, max_model_len=COUNT),
        "Models": _object(object={"const": "list"}, data=_list(_ref("Model"), 1)),
        "CompletionAnswer": whole(text),
        "ChatAnswer": whole(answer),
        "Embeddings": _object(object={"const": "list"}, data=_list(vector, 1), model=TEXT, usage=counts),
        "Tokens": _object(tokens=_list(COUNT), count=COUNT, max_model_len=COUNT),
        "Budget": _object(
            budget_bytes=_or_null(COUNT), least_bytes=COUNT, resident_bytes=COUNT, resident_peak_bytes=COUNT,
            pages=COUNT, wanted_pages=COUNT,
        ),
    }  # fmt: skip
