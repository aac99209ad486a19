"""How models write calls of tools: texts around JSON objects that name a tool and its arguments.

Source: the chat templates of Qwen 2.5, 3 and Hermes (`<tool_call>`), Mistral (`[TOOL_CALLS]`), and Llama 3.1 (a bare
object). Which one a model was trained on shows in its template (`serve.call_probe`); one that has none is told the
first.
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_CALLS = 8
"""Of one answer that is guided: a weak model would go on to the end of its room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallForm:
    """A call is {"name": ..., `key`: {...}}. opening, between, closing: what stands before the first, between two, and
    behind the last; marker: the beginning of an opening that nothing else begins with, empty for bare objects.
    """

    name: str
    opening: str
    between: str
    closing: str
    marker: str
    key: str = "arguments"


TAGGED = CallForm(
    name="tagged", opening="<tool_call>\n", between="\n</tool_call>\n<tool_call>\n", closing="\n</tool_call>",
    marker="<tool_call>",
)  # fmt: skip
LISTED = CallForm(name="listed", opening="[TOOL_CALLS] [", between=", ", closing="]", marker="[TOOL_CALLS]")
BARE = CallForm(name="bare", opening="", between="; ", closing="", marker="", key="parameters")
FORMS = {form.name: form for form in (TAGGED, LISTED, BARE)}
