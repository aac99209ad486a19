"""Chat templates: a list of messages becomes the prompt that the model was trained on.

Templates come with the model, so they are foreign code: they run in Jinja's immutable sandbox, see nothing but the
messages and the special tokens, and each of their faults ends in an `InputError`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from memwall.errors import InputError
from memwall.formats.checked_json import shown
from memwall.models.config import checked_directory
from memwall.models.tokenizer import read_settings, special_tokens

MAX_TEMPLATE_CHARACTERS = 1_000_000
TEMPLATE_NAME = "chat_template.jinja"
OTHER_TEMPLATES, TOOL_TEMPLATE = "additional_chat_templates", "tool_use"
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
PLAIN_STOP = ("\nUser:", "\nSystem:")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """A model's chat template. `stop` lists strings that end an answer, for models whose template has no end token;
    `tool_text` is used where there are tools, by models that have a template of its own for them.
    """

    source: str
    text: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    tool_text: str | None = None

    @staticmethod
    def from_directory(directory: str | Path, name: str = "default") -> ChatTemplate:
        """`chat_template.jinja`, else the template (called `name`) of `tokenizer_config.json`, else a plain one."""
        folder = checked_directory(directory)
        settings = read_settings(folder)
        tokens = special_tokens(settings)
        path = folder / TEMPLATE_NAME
        if path.is_file():
            other = folder / OTHER_TEMPLATES / f"{TOOL_TEMPLATE}.jinja"
            own = _read_text(other) if other.is_file() else None
            return ChatTemplate(source=str(path), text=_read_text(path), special_tokens=tokens, tool_text=own)
        source = str(folder / "tokenizer_config.json")
        declared = settings.get("chat_template")
        if declared is None:
            return ChatTemplate(source="plain template", text=PLAIN_TEMPLATE, special_tokens=tokens, stop=PLAIN_STOP)
        own = _pick(declared, TOOL_TEMPLATE, source) if _has(declared, TOOL_TEMPLATE) else None
        return ChatTemplate(source=source, text=_pick(declared, name, source), special_tokens=tokens, tool_text=own)

    @property
    def is_plain(self) -> bool:
        """Whether the model brought none."""
        return self.text == PLAIN_TEMPLATE

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt. Encode it with `add_bos=False`: the template writes the begin token itself.

        messages: objects with `role` and `content`. `add_generation_prompt` opens the assistant's turn.
        """
        import jinja2

        _check_messages(messages)
        given = {**self.special_tokens, **variables}
        try:
            template = _environment().from_string((tools and self.tool_text) or self.text)
            return template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                **given,
            )
        except jinja2.TemplateError as error:
            raise InputError(f"{self.source}: the chat template refuses: {str(error)[:300]}") from None
        except Exception as error:  # foreign code may raise anything
            kind = type(error).__name__
            raise InputError(f"{self.source}: the chat template fails: {kind}: {str(error)[:300]}") from None


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if not messages:
        raise InputError("a chat needs at least one message")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"message {number}: must be an object with role (system, user, assistant) and content")


def _environment() -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_tag()]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    return environment


def _generation_tag() -> Any:
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; here it only gives its
    contents.
    """
    from jinja2.ext import Extension

    class GenerationTag(Extension):
        tags = {"generation"}  # noqa: RUF012 - the library's own protocol

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return GenerationTag


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    separators, sort_keys = options.get("separators"), bool(options.get("sort_keys", False))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(str(message))


def _now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)


def _read_text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_TEMPLATE_CHARACTERS + 1)
    except (OSError, UnicodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    return _bounded(text, str(path))


def _has(declared: Any, name: str) -> bool:
    return isinstance(declared, list) and any(
        isinstance(item, Mapping) and item.get("name") == name for item in declared
    )


def _pick(declared: Any, name: str, source: str) -> str:
    if isinstance(declared, str):
        return _bounded(declared, source)
    named = {}
    for item in declared if isinstance(declared, list) else [declared]:
        texts = (item.get("name"), item.get("template")) if isinstance(item, Mapping) else ()
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{source}: chat_template must be a string or a list of objects with name and template")
        named[item["name"]] = item["template"]
    if name not in named:
        raise InputError(f"{source}: no chat template called {shown(name)}; there are {', '.join(map(shown, named))}")
    return _bounded(named[name], source)


def _bounded(text: str, source: str) -> str:
    if len(text) > MAX_TEMPLATE_CHARACTERS:
        raise InputError(f"{source}: the chat template is longer than {MAX_TEMPLATE_CHARACTERS:,} characters")
    return text
