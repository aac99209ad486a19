"""Chat templates from each place a model keeps them; foreign template code stays in its sandbox."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memwall.errors import InputError
from memwall.models import DEMO_DIRECTORY
from memwall.models.chat import ChatTemplate

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <there>"}]
CHATML = (
    "{%- for message in messages %}\n{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n{{- '<|im_start|>assistant\\n' }}\n{%- endif %}"
)
CHATML_TEXT = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <there><|im_end|>\n<|im_start|>assistant\n"


def folder(tmp_path: Path, **settings: Any) -> Path:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def of(text: str, **tokens: str) -> ChatTemplate:
    return ChatTemplate(source="test", text=text, special_tokens=tokens)


def test_a_template_as_string_list_and_file(tmp_path: Path) -> None:
    as_text = ChatTemplate.from_directory(folder(tmp_path, chat_template=CHATML))
    assert as_text.render(MESSAGES) == CHATML_TEXT
    assert not as_text.is_plain
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": CHATML}]
    as_list = folder(tmp_path, chat_template=named)
    assert ChatTemplate.from_directory(as_list).render(MESSAGES) == CHATML_TEXT
    assert ChatTemplate.from_directory(as_list, "tool_use").render(MESSAGES) == "tools"
    with pytest.raises(InputError, match="no chat template called 'other'; there are 'tool_use', 'default'"):
        ChatTemplate.from_directory(as_list, "other")
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert ChatTemplate.from_directory(as_list).render(MESSAGES) == "from the file"


def test_the_generation_prompt_can_be_left_out(tmp_path: Path) -> None:
    template = ChatTemplate.from_directory(folder(tmp_path, chat_template=CHATML))
    assert template.render(MESSAGES, add_generation_prompt=False) + "<|im_start|>assistant\n" == CHATML_TEXT


def test_a_model_without_template_gets_a_plain_one() -> None:
    template = ChatTemplate.from_directory(DEMO_DIRECTORY)
    assert template.is_plain
    assert template.render(MESSAGES) == "<|bos|>System: Be brief.\nUser: Hi <there>\nAssistant:"
    assert "\nUser:" in template.stop


def test_special_tokens_as_strings_and_objects(tmp_path: Path) -> None:
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": None}
    path = folder(tmp_path, chat_template="{{ bos_token }}|{{ eos_token }}|{{ pad_token }}", **tokens)
    assert ChatTemplate.from_directory(path).render(MESSAGES) == "<s>|</s>|"


def test_what_templates_of_the_wild_use() -> None:
    assert of("{{ messages | tojson }}").render(MESSAGES) == json.dumps(MESSAGES)
    assert of("{{ {'a': 'ü'} | tojson(indent=1) }}").render(MESSAGES) == '{\n "a": "ü"\n}'
    assert of("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}").render(
        MESSAGES
    ) == ("user")
    assert of("{% generation %}x{% endgeneration %}").render(MESSAGES) == "x"
    assert len(of("{{ strftime_now('%Y') }}").render(MESSAGES)) == 4
    assert of("{{ day }}").render(MESSAGES, day="Monday") == "Monday"
    assert of("{% if tools %}{{ tools[0].name }}{% endif %}").render(MESSAGES, tools=[{"name": "t"}]) == "t"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses: roles must alternate"),
        ("{% for %}", "refuses"),
        ("{{ ''.__class__.__mro__ }}", "refuses"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError"),
        ("{{ messages[0].content + 1 }}", "fails: TypeError"),
        ("{% include 'x' %}", "fails|refuses"),
    ],
)
def test_faults_of_templates_are_input_errors(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        of(text).render(MESSAGES)


def test_bad_messages_and_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one message"):
        of("x").render([])
    with pytest.raises(InputError, match="message 0: must be"):
        of("x").render([{"content": "a"}])
    for declared in (3, [3], [{"name": "default"}], {"default": "x"}):
        with pytest.raises(InputError, match="chat_template must be"):
            ChatTemplate.from_directory(folder(tmp_path, chat_template=declared))
    with pytest.raises(InputError, match="longer than"):
        ChatTemplate.from_directory(folder(tmp_path, chat_template="x" * 1_000_001))
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read"):
        ChatTemplate.from_directory(tmp_path)
