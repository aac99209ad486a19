"""Answers that call tools as a grammar: objects that name a tool, with arguments that its schema describes, and around
them the texts of a form of `call_forms`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from memwall.engine.call_forms import FORMS, MOST_CALLS, CallForm
from memwall.engine.grammar import Rule, Walker
from memwall.engine.json_schema import Json, value_of, walked
from memwall.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRules:
    """What an answer that calls tools looks like. tools: (name, schema of the arguments or None); opened: the opening
    stands in the prompt already.
    """

    form: CallForm
    tools: Sequence[tuple[str, Any]]
    most: int = MOST_CALLS
    opened: bool = True


def calls_of(made: Json, rules: CallRules) -> int:
    """The symbol of one to `most` calls."""
    g, form = made.grammar, rules.form
    each: list[Rule] = []
    for name, schema in rules.tools:
        try:
            value = value_of(made, {"type": "object"} if schema is None else schema)
        except InputError as error:
            raise InputError(f"tool {name!r}: {error}") from None
        head = made.pair(g.literal('"name"'), g.rule(g.literal(json.dumps(name))))
        rest = made.pair(g.literal(json.dumps(form.key)), value)
        each.append((*g.literal("{"), made.blank, *head, *made.comma(), *rest, made.blank, *g.literal("}")))
    call = g.rule(*each)
    more = g.between(g.rule((*g.literal(form.between), call)), 0, rules.most - 1)
    opening = () if rules.opened else g.literal(form.opening)
    return g.rule((*opening, call, *more, *g.literal(form.closing)))


def form_walker(spec: dict[str, Any]) -> Walker:
    """Texts of an answer, by a description that goes through JSON: `schema` (or null for any object) where it may be a
    value, `calls` where it may be calls: {form, opening, tools, most, opened}.
    """
    made, ways = Json(), []
    if "schema" in spec:
        ways.append((made.objects() if spec["schema"] is None else value_of(made, spec["schema"]),))
    if "calls" in spec:
        told = spec["calls"]
        form = replace(FORMS[told["form"]], opening=told["opening"])
        rules = CallRules(form=form, tools=told["tools"], most=told["most"], opened=told["opened"])
        ways.append((calls_of(made, rules),))
    return walked(made, made.grammar.rule(*ways))


def calls_spec(rules: CallRules) -> dict[str, Any]:
    """The description of `calls` for `form_walker`."""
    form = rules.form
    tools = [list(tool) for tool in rules.tools]
    return {"form": form.name, "opening": form.opening, "tools": tools, "most": rules.most, "opened": rules.opened}
