"""Which form of calls a chat template teaches: it is asked to write one, and the forms' readers try to read it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from memwall.engine.call_forms import FORMS, CallForm
from memwall.errors import InputError
from memwall.models.chat import ChatTemplate
from memwall.serve.calls import CallReader, Calls, joined

NAME = "probe_tool"
TOOL = {"type": "function", "function": {"name": NAME, "description": "None.", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "Hello"}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": NAME, "arguments": {"a": 1}}}


def form_of_template(template: ChatTemplate) -> CallForm | None:
    """None where it does not tell of tools, or writes calls as no form here does: then they are told as text."""
    try:
        asked = template.render([USER], tools=[TOOL])
        called: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [CALL]}
        whole = template.render([USER, called], tools=[TOOL], add_generation_prompt=False)
    except InputError:
        return None
    if NAME not in asked:
        return None
    shared = next(
        (at for at, (one, other) in enumerate(zip(asked, whole)) if one != other), min(len(asked), len(whole))
    )
    answer = whole[shared:]
    return next((found for form in FORMS.values() if (found := _read(form, answer)) is not None), None)


def _read(form: CallForm, answer: str) -> CallForm | None:
    reader = CallReader(Calls(form=form, names=(NAME,)))
    text, calls = reader.push(answer)
    if [call.arguments.replace(" ", "") for call in joined(calls)] != ['{"a":1}'] or (form.marker and NAME in text):
        return None
    at = answer.find(form.marker)
    head = answer[at : answer.index("{", at)]
    # how a template spaces it is how the model was trained to
    return form if head == form.opening or not form.marker else replace(form, opening=head)
