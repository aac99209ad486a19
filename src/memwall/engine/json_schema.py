"""JSON texts as a grammar: any value, or what a JSON schema describes.

*Source*: RFC 8259 (JSON), RFC 3629 (UTF-8), JSON Schema 2020-12, of which the parts in `SUPPORTED` are known; others
are an error that names them, since an answer that ignores them would only look right.

*Differs*: properties come in the order of the schema, and objects with `properties` take no others unless
`additionalProperties` says so. Blanks between parts are one space, or a line break with up to 16 spaces; numbers have
at most 15 digits on each side of the point: without a bound a weak model writes either to the end of its room.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from memwall.engine.grammar import DEAD, Grammar, Rule, Walker, byte_mask
from memwall.engine.json_pattern import strings
from memwall.engine.json_ranges import BOUNDS, MOST_DIGITS, Bounds, integers, numbers
from memwall.errors import InputError

NOTES = frozenset({
    "$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default", "examples", "deprecated",
    "readOnly", "writeOnly", "discriminator",
})  # fmt: skip
SUPPORTED: Mapping[str, frozenset[str]] = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength", "format", "pattern"}),
    "number": BOUNDS, "integer": BOUNDS, "boolean": frozenset(), "null": frozenset(),
}  # fmt: skip
"""Keywords by type, beside NOTES, `type`, `enum`, `const`, `anyOf`, `oneOf`, `allOf` of one, and `$ref` within."""
MOST_REPEATS = 1_000
MOST_NESTING = 64
MOST_INDENT = 16
DIGIT = byte_mask((0x30, 0x39))
HEX = DIGIT | byte_mask((0x41, 0x46), (0x61, 0x66))
PLAIN = byte_mask((0x20, 0x7F)) & ~(1 << 0x22 | 1 << 0x5C)
TAIL = byte_mask((0x80, 0xBF))
FORMATS = ("date", "time", "date-time", "uuid")
MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def walker(schema: Any = None) -> Walker:
    """Texts that a schema describes; any JSON object without one. InputError names the part that is not known."""
    made = Json()
    return walked(made, made.objects() if schema is None else value_of(made, schema))


def value_of(made: Json, schema: Any) -> int:
    """The symbol of what a schema describes."""
    return _Compiler(made, schema).root()


def walked(made: Json, root: int) -> Walker:
    """Texts of a symbol. InputError where there are none."""
    found = Walker(made.grammar, root)
    if found.start == DEAD or not found.next_bytes(found.start):
        raise InputError("the schema describes no value: nothing could be answered")
    return found


class Json:
    """Rules of JSON's own."""

    def __init__(self) -> None:
        self.grammar = g = Grammar()
        space, newline = g.one_of(1 << 0x20), g.one_of(1 << 0x0A)
        self.blank = g.rule((), (space,), (newline, *g.between(space, 0, MOST_INDENT)))
        self.wide = self._wide()
        self.character = self._character()
        quote = g.literal('"')
        self.string = g.rule((*quote, g.many(self.character), *quote))
        self.integer, self.number = self._numbers()
        self.words = {"boolean": g.rule(g.literal("true"), g.literal("false")), "null": g.rule(g.literal("null"))}
        self._value: int | None = None

    def value(self) -> int:
        """Any value."""
        if self._value is None:
            g = self.grammar
            self._value = g.declare()
            plain = [(one,) for one in (self.string, self.number, *self.words.values())]
            g.define(self._value, *plain, (self.objects(),), (self.listed(self._value, 0, None),))
        return self._value

    def objects(self, of: int | None = None) -> int:
        """Objects with any names. of: their values, any unless given."""
        g, value = self.grammar, self.value() if of is None else of
        more = g.many(g.rule((*self.comma(), *self.pair((self.string,), value))))
        inner = g.rule((), (*self.pair((self.string,), value), more, self.blank))
        return g.rule((*g.literal("{"), self.blank, inner, *g.literal("}")))

    def listed(self, value: int, least: int, most: int | None) -> int:
        """Lists of a value."""
        g = self.grammar
        item = g.rule((*self.comma(), value))
        after = max(least - 1, 0)
        more: Rule = (*(item,) * after, g.many(item)) if most is None else g.between(item, after, max(most - 1, after))
        some: Rule = (value, *more, self.blank)
        inner = g.rule(some) if least else g.rule((), some) if most != 0 else g.rule(())
        return g.rule((*g.literal("["), self.blank, inner, *g.literal("]")))

    def comma(self) -> Rule:
        return (*self.grammar.literal(","), self.blank)

    def pair(self, name: Rule, value: int) -> Rule:
        """A name and its value."""
        return (*name, *self.grammar.literal(":"), self.blank, value)

    def shaped(self, form: str) -> int:
        """Strings of one of FORMATS: years 1000 to 2999 without leap days, times in UTC."""
        g = self.grammar
        digit, hexadecimal = g.one_of(DIGIT), g.one_of(HEX)
        days = [f"-{month:02}-{day + 1:02}" for month, most in enumerate(MONTH_DAYS, 1) for day in range(most)]
        date = (g.rule(g.literal("1"), g.literal("2")), *(digit,) * 3, g.rule(*map(g.literal, days)))
        hour, sixty = (g.rule(*(g.literal(f"{number:02}") for number in range(most))) for most in (24, 60))
        time = (hour, *g.literal(":"), sixty, *g.literal(":"), sixty, *g.literal("Z"))
        groups = [(hexadecimal,) * length for length in (8, 4, 4, 4, 12)]
        uuid = tuple(symbol for group in groups for symbol in (*g.literal("-"), *group))[1:]
        inner = {"date": date, "time": time, "date-time": (*date, *g.literal("T"), *time), "uuid": uuid}[form]
        return g.rule((*g.literal('"'), *inner, *g.literal('"')))

    def _wide(self) -> int:
        """Characters that are not of ASCII."""
        g = self.grammar
        tail = g.one_of(TAIL)
        return g.rule(
            (g.one_of(byte_mask((0xC2, 0xDF))), tail),
            (g.one_of(1 << 0xE0), g.one_of(byte_mask((0xA0, 0xBF))), tail),
            (g.one_of(byte_mask((0xE1, 0xEC), (0xEE, 0xEF))), tail, tail),
            (g.one_of(1 << 0xED), g.one_of(byte_mask((0x80, 0x9F))), tail),
            (g.one_of(1 << 0xF0), g.one_of(byte_mask((0x90, 0xBF))), tail, tail),
            (g.one_of(byte_mask((0xF1, 0xF3))), tail, tail, tail),
            (g.one_of(1 << 0xF4), g.one_of(byte_mask((0x80, 0x8F))), tail, tail),
        )

    def _character(self) -> int:
        g, digit = self.grammar, self.grammar.one_of(HEX)
        escape = g.literal("\\")
        simple = g.one_of(sum(1 << byte for byte in b'"\\/bfnrt'))
        surrogate = g.one_of(sum(1 << byte for byte in b"dD"))
        other = g.one_of(HEX & ~sum(1 << byte for byte in b"dD"))
        high, low = g.one_of(sum(1 << b for b in b"89abAB")), g.one_of(sum(1 << b for b in b"cdefCDEF"))
        u, hexes = g.literal("u"), (digit, digit)
        return g.rule(
            (g.one_of(PLAIN),),
            (self.wide,),
            (*escape, simple),
            (*escape, *u, other, digit, *hexes),
            (*escape, *u, surrogate, g.one_of(byte_mask((0x30, 0x37))), *hexes),
            (*escape, *u, surrogate, high, *hexes, *escape, *u, surrogate, low, *hexes),
        )

    def _numbers(self) -> tuple[int, int]:
        g = self.grammar
        digit, minus = g.one_of(DIGIT), g.maybe(*g.literal("-"))
        first = g.one_of(DIGIT & ~(1 << 0x30))
        whole = g.rule(g.literal("0"), (first, *g.between(digit, 0, MOST_DIGITS - 1)))
        integer = g.rule((minus, whole))
        sign = g.maybe(g.one_of(sum(1 << byte for byte in b"+-")))
        fraction = g.maybe(*g.literal("."), *g.between(digit, 1, MOST_DIGITS))
        exponent = g.maybe(g.one_of(sum(1 << byte for byte in b"eE")), sign, *g.between(digit, 1, 2))
        return integer, g.rule((minus, whole, fraction, exponent))


class _Compiler:
    """A schema's rules."""

    def __init__(self, made: Json, schema: Any) -> None:
        self.json = made
        self.schema = schema
        self._named: dict[str, int] = {}
        self._types: dict[str, Callable[[Mapping[str, Any], str], int]] = {
            "object": self._object, "array": self._array, "string": self._string,
            "number": self._number, "integer": self._integer,
            "boolean": lambda schema, at: made.words["boolean"], "null": lambda schema, at: made.words["null"],
        }  # fmt: skip

    def root(self) -> int:
        return self._ref("#", "#", 0)

    def _rule(self, schema: Any, at: str, depth: int) -> int:
        g = self.json.grammar
        if schema is True or schema == {}:
            return self.json.value()
        if not isinstance(schema, Mapping):
            raise InputError(f"the schema at {at} must be an object, not {json.dumps(schema)[:60]}")
        if depth > MOST_NESTING:
            raise InputError(f"the schema is nested deeper than {MOST_NESTING} at {at[:80]}")
        if "$ref" in schema:
            self._check(schema, {"$ref"}, at)
            return self._ref(schema["$ref"], at, depth)
        if "enum" in schema or "const" in schema:
            self._check(schema, {"enum", "const", "type"}, at)
            values = schema["enum"] if "enum" in schema else [schema["const"]]
            if not isinstance(values, list) or not 0 < len(values) <= MOST_REPEATS:
                raise InputError(f"enum at {at} must be a list of 1 to {MOST_REPEATS:,} values")
            return g.rule(*(g.literal(_text(value)) for value in values))
        for name in ("anyOf", "oneOf", "allOf"):
            if name in schema:
                return self._choice(schema, name, at, depth)
        kinds = schema.get("type", "object" if "properties" in schema else "array" if "items" in schema else None)
        if kinds is None:
            self._check(schema, set(), at)
            return self.json.value()
        kinds = kinds if isinstance(kinds, list) else [kinds]
        if unknown := [kind for kind in kinds if not isinstance(kind, str) or kind not in SUPPORTED]:
            raise InputError(f"type {json.dumps(unknown[0])[:60]} at {at} is none of {', '.join(SUPPORTED)}")
        self._check(schema, {"type"}.union(*(SUPPORTED[kind] for kind in kinds)), at)
        self._depth = depth
        return g.rule(*((self._types[kind](schema, at),) for kind in kinds))

    def _choice(self, schema: Mapping[str, Any], name: str, at: str, depth: int) -> int:
        self._check(schema, {name}, at)
        parts = schema[name]
        if not isinstance(parts, list) or not parts or (name == "allOf" and len(parts) > 1):
            raise InputError(f"{name} at {at} must be a list of {'one schema' if name == 'allOf' else 'schemas'}")
        rules = [(self._rule(part, f"{at}/{name}/{i}", depth + 1),) for i, part in enumerate(parts)]
        return self.json.grammar.rule(*rules)

    def _ref(self, name: Any, at: str, depth: int) -> int:
        """A schema by its place in the whole; each is one rule, so that schemas may name themselves."""
        if not isinstance(name, str) or not (name == "#" or name.startswith("#/")):
            raise InputError(f"$ref {json.dumps(name)[:60]} at {at} must be a place in the schema: #/$defs/NAME")
        if name not in self._named:
            found = self.schema
            for part in name[2:].split("/") if name != "#" else ():
                part = part.replace("~1", "/").replace("~0", "~")
                if not isinstance(found, Mapping) or part not in found:
                    raise InputError(f"$ref {name[:60]!r} at {at}: there is no such place in the schema")
                found = found[part]
            self._named[name] = self.json.grammar.declare()
            self.json.grammar.define(self._named[name], (self._rule(found, name, depth + 1),))
        return self._named[name]

    def _object(self, schema: Mapping[str, Any], at: str) -> int:
        depth, g, made = self._depth, self.json.grammar, self.json
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise InputError(f"properties at {at} must be an object, and required a list of their names")
        if missing := [name for name in required if name not in properties]:
            raise InputError(f"required at {at} names {json.dumps(missing[0])[:60]}, which properties does not have")
        others = schema.get("additionalProperties", not properties)
        more = None if others is False else self._rule(others, f"{at}/additionalProperties", depth + 1)
        if not properties:
            return made.objects(more) if more is not None else g.rule((*g.literal("{"), made.blank, *g.literal("}")))
        pairs = [
            (
                made.pair(g.literal(_text(name)), self._rule(part, f"{at}/properties/{name}", depth + 1)),
                name in required,
            )
            for name, part in properties.items()
        ]
        return g.rule((*g.literal("{"), made.blank, self._members(pairs, more), *g.literal("}")))

    def _members(self, pairs: Sequence[tuple[Rule, bool]], more: int | None) -> int:
        """Members in their order, those that may be left out left out or not. Built from the end: what may follow once
        something stands before it (after a comma), and what may come first.
        """
        g, made = self.json.grammar, self.json
        after, first = g.rule((made.blank,)), g.rule(())
        if more is not None:
            pair = made.pair((made.string,), more)
            others = g.many(g.rule((*made.comma(), *pair)))
            after, first = g.rule((others, made.blank)), g.rule((), (*pair, others, made.blank))
        for pair, needed in reversed(pairs):
            here, later = (*pair, after), (*made.comma(), *pair, after)
            first = g.rule(here) if needed else g.rule(here, (first,))
            after = g.rule(later) if needed else g.rule(later, (after,))
        return first

    def _array(self, schema: Mapping[str, Any], at: str) -> int:
        depth = self._depth
        least, most = self._counts(schema, "minItems", "maxItems", at)
        return self.json.listed(self._rule(schema.get("items", True), f"{at}/items", depth + 1), least, most)

    def _string(self, schema: Mapping[str, Any], at: str) -> int:
        made = self.json
        if (form := schema.get("format")) is not None:
            if not isinstance(form, str) or form not in FORMATS:
                raise InputError(
                    f"format {json.dumps(form)[:60]} at {at} is not supported; known are {', '.join(FORMATS)}"
                )
            return made.shaped(form)
        if (pattern := schema.get("pattern")) is not None:
            if not isinstance(pattern, str):
                raise InputError(f"pattern at {at} must be a text, not {json.dumps(pattern)[:60]}")
            if beside := schema.keys() & {"minLength", "maxLength", "format"}:
                raise InputError(f"{min(beside)!r} at {at} is not supported beside pattern; leave one of them out")
            return strings(made, pattern, at)
        least, most = self._counts(schema, "minLength", "maxLength", at)
        if not least and most is None:
            return made.string
        g, one = made.grammar, made.character
        inner: Rule = (*(one,) * least, g.many(one)) if most is None else g.between(one, least, most)
        return g.rule((*g.literal('"'), *inner, *g.literal('"')))

    def _integer(self, schema: Mapping[str, Any], at: str) -> int:
        bounds = Bounds.of(schema, at)
        return self.json.integer if bounds is None else integers(self.json.grammar, bounds)

    def _number(self, schema: Mapping[str, Any], at: str) -> int:
        bounds = Bounds.of(schema, at)
        return self.json.number if bounds is None else numbers(self.json.grammar, bounds)

    def _counts(self, schema: Mapping[str, Any], low: str, high: str, at: str) -> tuple[int, int | None]:
        least, most = schema.get(low, 0), schema.get(high)
        for name, value in ((low, least), (high, most)):
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (whole and 0 <= value <= MOST_REPEATS):
                raise InputError(f"{name} at {at} is {json.dumps(value)[:60]}; it must be 0 to {MOST_REPEATS:,}")
        if most is not None and most < least:
            raise InputError(f"{high} at {at} is below {low}")
        return least, most

    def _check(self, schema: Mapping[str, Any], known: set[str], at: str) -> None:
        for name in schema:
            if name not in known and name not in NOTES:
                raise InputError(f"{name[:60]!r} at {at} is not supported beside what stands there; leave it out")


def _text(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise InputError(f"{str(value)[:60]!r} is no JSON value: {error}") from None
