"""From the tree of a schema to the rules of a grammar, for JSON or for Python's literals.

What a grammar can keep short it keeps short (`grammar_text`, `grammar_recursion`); what the schema limits
keeps its limit. Strings and lists without one are the schema's to limit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from ayllu.engine.grammar_keywords import limits_of, within_reach
from ayllu.engine.grammar_nodes import (
    Anything,
    Array,
    Boolean,
    Combined,
    Literals,
    Node,
    Nothing,
    Null,
    Number,
    Object,
    Reference,
    SchemaTree,
    Text,
    Union,
)
from ayllu.engine.grammar_text import LarkWriter, embedded_json, literal, repeated

Style = Literal["json", "python"]

LIBRARY_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""For the parts the library writes itself: the same white space."""

_NO_CONTROL_CHARACTERS = {"json_allowed_escapes": 'nrbtf\\"'}
"""Strings that only have a length need no \\u escapes, by which the library writes control characters. Where
a pattern or a constant asks for one it must have them: it would silently leave the character out."""

_STEP = 1e-9
_SMALLEST_RANGE = 1e-6
_LISTED_TOGETHER = 8
_ANY_LEVELS = 16


class SchemaWriter:
    """Writes nodes of one tree. Every method returns an expression that stands for exactly one value."""

    def __init__(self, writer: LarkWriter, tree: SchemaTree, style: Style = "json") -> None:
        self._writer = writer
        self._tree = tree
        self._style = style
        self._levels = tree.levels
        self._anything = ""
        self._definitions: dict[tuple[str, int | None], str] = {}

    def value(self, node: Node) -> str:
        """One value that meets `node`, which some finite value does within the levels that are left."""
        writer = self._writer
        match node:
            case Anything():
                return self._any()
            case Null():
                return writer.rule(literal(self._word(None)), node.path)
            case Boolean():
                return writer.rule(f"{literal(self._word(True))} | {literal(self._word(False))}", node.path)
            case Literals():
                return writer.terminal(" | ".join(self._spellings(node.values)))
            case Text():
                return self._text(node)
            case Number():
                return self._number(node)
            case Array():
                return self._array(node)
            case Object():
                return self._object(node)
            case Union():
                options = [self.value(option) for option in node.options if self._ends(option)]
                return writer.rule(" | ".join(dict.fromkeys(options)), node.path)
            case Reference():
                return self._reference(node.name)
            case Combined():
                return self._library(node.schema, node.path)
            case Nothing():
                raise AssertionError(f"{node.path}: nothing can be written for an impossible schema")

    def members(self, node: Object, key_of: Mapping[str, str], extra_key: str | None) -> tuple[str, bool]:
        """The properties of an object with commas between, and whether there may be none at all.

        `key_of` gives what is written before each value, `extra_key` before those of undeclared names.
        """
        written = [(name, item) for name, item in node.properties.items() if self._ends(item)]
        pairs = [(f"{key_of[name]} {self.value(item)}", name in node.required) for name, item in written]
        extra = ""
        if extra_key is not None and self._ends(node.extra):
            extra = f"{extra_key} {self.value(node.extra)}"
        members = _Members(self._writer, pairs, extra, node.most_extra, node.path)
        return members.from_pair(0), not any(required for _, required in pairs)

    def _object(self, node: Object) -> str:
        colon = self._writer.shared("COLON")
        keys = {name: f"{self._key(name)} {colon}" for name in node.properties}
        extra = None
        if not isinstance(node.extra, Nothing):
            extra = f"{self._extra_key(node)} {colon}"
        inner, may_be_empty = self.members(node, keys, extra)
        if may_be_empty and not node.not_empty:
            inner = f"({inner})?" if inner else ""
        return self._writer.rule(f'"{{" {inner} "}}"', node.path)

    def _key(self, name: str) -> str:
        if self._style == "json":
            return literal(_json(name))
        return "(" + " | ".join(map(literal, _quotes(name))) + ")"

    def _extra_key(self, node: Object) -> str:
        """A name that is none of the declared: a key must not come twice with different rules."""
        if isinstance(node.key, Literals):
            return self._writer.terminal(" | ".join(literal(_json(value)) for value in node.key.values))
        if isinstance(node.key, Text) and node.key.constraints:
            return self._text(node.key)
        if not node.properties:
            return self._writer.shared("NAME")
        taken = " | ".join(literal(_json(name)) for name in node.properties)
        return self._writer.terminal(f"{self._writer.shared('NAME')} & ~({taken})")

    def _array(self, node: Array) -> str:
        comma = self._writer.shared("COMMA")
        parts = [self.value(item) for item in node.prefix]
        least = node.least - len(node.prefix)
        most = None if node.most is None else node.most - len(node.prefix)
        rest_written = most != 0 and self._ends(node.rest)
        if rest_written and not parts:
            item = self.value(node.rest)
            more = repeated(f"{comma} {item}", max(least - 1, 0), None if most is None else most - 1)
            several = f"{item} {more}"
            inner = f"({several})?" if least == 0 else several
        else:
            inner = f" {comma} ".join(parts)
            if rest_written:
                inner += " " + repeated(f"{comma} {self.value(node.rest)}", least, most)
        return self._writer.rule(f'"[" {inner} "]"', node.path)

    def _text(self, node: Text) -> str:
        if node.constraints:
            options = {} if "pattern" in node.constraints else _NO_CONTROL_CHARACTERS
            return self._library({"type": "string", **node.constraints}, node.path, options)
        plain = self._writer.shared("STRING")
        if self._style == "json":
            return plain
        return self._writer.rule(f"{plain} | {self._writer.shared('QUOTED')}", node.path)

    def _number(self, node: Number) -> str:
        kind = "integer" if node.integer else "number"
        match node.constraints:
            case bounds if not bounds:
                return self._writer.shared("INTEGER" if node.integer else "NUMBER")
            case {"minimum": 0, **rest} if not rest:
                return self._writer.shared("COUNT" if node.integer else "AMOUNT")
            case {"exclusiveMinimum": 0, **rest} if not rest and not node.integer:
                return self._writer.shared("POSITIVE")
        bounds = within_reach(node.constraints)
        lowest, highest = limits_of(bounds)
        if lowest == highest and "multipleOf" not in bounds:
            return self._writer.terminal(literal(_json(int(lowest) if lowest == int(lowest) else lowest)))
        if not node.integer and "multipleOf" not in bounds and highest - lowest >= _SMALLEST_RANGE:
            bounds["multipleOf"] = _STEP  # bounds the digits behind the point
        return self._library({"type": kind, **bounds}, node.path)

    def _reference(self, name: str) -> str:
        """A definition; a recursive one leaves a level less for what it refers to."""
        key = (name, self._levels)
        if key not in self._definitions:
            node, inside = self._tree.definitions[name], self._levels
            if inside is not None and name in self._tree.recursive:
                inside -= 1
            self._definitions[key] = self._writer.promise(lambda: self._within(inside, node), node.path)
        return self._definitions[key]

    def _within(self, levels: int | None, node: Node) -> str:
        before, self._levels = self._levels, levels
        try:
            return self.value(node)
        finally:
            self._levels = before

    def _ends(self, node: Node) -> bool:
        return self._tree.ends(node, self._levels)

    def _any(self) -> str:
        """Any value, nested so deep: the rules are written from the innermost out."""
        if self._anything:
            return self._anything
        comma, colon = self._writer.shared("COMMA"), self._writer.shared("COLON")
        words = [literal(self._word(word)) for word in (None, True, False)]
        plain = [*words, self._writer.shared("NUMBER"), self._text(Text(""))]
        value = self._writer.rule(" | ".join(plain))
        for _ in range(_ANY_LEVELS):
            pair = f"{self._writer.shared('NAME')} {colon} {value}"
            items = f'"[" ({value} ({comma} {value})*)? "]"'
            pairs = f'"{{" ({pair} ({comma} {pair})*)? "}}"'
            value = self._writer.rule(" | ".join([*plain, items, pairs]))
        self._anything = value
        return value

    def _library(self, schema: Mapping[str, Any], path: str, options: Mapping[str, Any] | None = None) -> str:
        text = embedded_json({**schema, "x-guidance": {**LIBRARY_OPTIONS, **(options or {})}})
        return self._writer.rule(f"%json {text}", path)

    def _word(self, value: bool | None) -> str:
        return _json(value) if self._style == "json" else repr(value)

    def _spellings(self, values: Iterable[Any]) -> list[str]:
        texts: dict[str, None] = {}
        for value in values:
            if self._style == "json":
                texts[_json(value)] = None
            elif isinstance(value, str):
                texts |= dict.fromkeys(_quotes(value))
            else:
                texts[repr(value)] = None
        return [literal(text) for text in texts]


class _Members:
    """Members in a fixed order with commas between, some of them optional, and then others.

    The library is slow, and gives up, where too many rules can go on at one place. So a rule lists several
    members that may come next, instead of each member having a rule that may be skipped.
    """

    def __init__(
        self,
        writer: LarkWriter,
        pairs: Sequence[tuple[str, bool]],
        extra: str,
        most_extra: int | None,
        path: str,
    ) -> None:
        self._writer = writer
        self._pairs = pairs
        self._extra = extra
        self._most_extra = most_extra
        self._path = path
        self._last_required = max((n for n, (_, required) in enumerate(pairs) if required), default=-1)
        self._from: dict[int, str] = {}
        self._after: dict[int, str] = {}

    def from_pair(self, index: int) -> str:
        """One member of number `index` or later, and what follows it; '' where there is none."""
        if index not in self._from:
            # Later rules first: written from the end, none of this recurses deeply.
            for place in range(len(self._pairs), index - 1, -1):
                self._from[place] = self._from_body(place)
        return self._from[index]

    def _from_body(self, index: int) -> str:
        options = []
        for place in range(index, min(index + _LISTED_TOGETHER, len(self._pairs))):
            pair, required = self._pairs[place]
            options.append(f"{pair} {self._rest(place)}")
            if required:
                break
        else:
            place = index + _LISTED_TOGETHER
            if place < len(self._pairs):
                options.append(self._from[place])
            elif self._extra:
                more = f"{self._writer.shared('COMMA')} {self._extra}"
                most = None if self._most_extra is None else self._most_extra - 1
                options.append(f"{self._extra} {repeated(more, 0, most)}")
        if len(options) == 1 and index == 0:
            return options[0]
        return self._writer.rule(" | ".join(options), self._path) if options else ""

    def _rest(self, index: int) -> str:
        """What follows member `index`: a comma and more, or perhaps nothing."""
        if index not in self._after:
            following = self._from[index + 1]
            body = f"{self._writer.shared('COMMA')} {following}"
            optional = index >= self._last_required
            self._after[index] = f"({body})?" if following and optional else body if following else ""
        return self._after[index]


def _json(value: Any) -> str:
    """A value as this grammar spells it, which is the one spelling that the names of properties have."""
    return json.dumps(value, ensure_ascii=False)


def _quotes(text: str) -> tuple[str, ...]:
    """A string in Python's two spellings, escapes as JSON has them."""
    double = _json(text)
    single = "'" + double[1:-1].replace('\\"', '"').replace("'", "\\'") + "'"
    return double, single
