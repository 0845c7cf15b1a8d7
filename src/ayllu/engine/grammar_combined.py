"""Schemas that intersect others: `allOf`, siblings of `anyOf` and `$ref`, patterns of names.

The grammar library combines them itself, and gets them here in the words it knows, with references of their
own and numbers of bounded length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ayllu.engine.grammar_keywords import (
    FORMATS,
    IN_PLACE,
    ArrayWords,
    bounds_of,
    types_of,
    unsupported,
    within_reach,
)
from ayllu.engine.grammar_nodes import Combined
from ayllu.engine.json_schema import Target, member

_STEP = 1e-9
"""What a number without multipleOf is a multiple of: it bounds the digits after the point."""


class SchemaSource(Protocol):
    """What stands around a schema: its definitions, and the checks that every schema must pass."""

    def define(self, reference: object, path: str) -> Target: ...
    def check(self, schema: Any, path: str) -> None: ...
    def count_combined(self) -> None: ...
    def require_apart(self, schemas: Any, path: str) -> None: ...


def combined(schema: Mapping[str, Any], path: str, source: SchemaSource) -> Combined:
    """The node of a schema that the library combines. Raises what `SchemaSource` raises, for each part."""
    writer = _Writer(source)
    whole = writer.plain(schema, path)
    if "patternProperties" in schema and not set(IN_PLACE) & schema.keys():
        whole.setdefault("additionalProperties", False)
    defined: dict[str, Any] = {}
    while writer.unwritten:
        name, target = writer.unwritten.pop()
        defined[name] = writer.plain(target.schema, target.path)
    return Combined(path, {**whole, "$defs": defined} if defined else whole)


class _Writer:
    def __init__(self, source: SchemaSource) -> None:
        self._source = source
        self._names: dict[tuple[str, ...], str] = {}
        self.unwritten: list[tuple[str, Target]] = []

    def plain(self, schema: Any, path: str) -> Any:
        """One schema with all inside it."""
        if isinstance(schema, bool):
            return schema
        self._source.count_combined()
        self._source.check(schema, path)
        if "not" in schema:
            return False
        plain: dict[str, Any] = {}
        for word, value in schema.items():
            plain |= self._word(word, value, schema, path)
        numeric = {"number", "integer"} & set(types_of(schema)) and "type" in schema
        if not numeric or {"enum", "const"} & schema.keys():
            return plain | bounds_of(schema)
        if "number" in types_of(schema):
            plain["multipleOf"] = _STEP
        return plain | within_reach(bounds_of(schema))

    def _word(self, word: str, value: Any, schema: Mapping[str, Any], path: str) -> dict[str, Any]:
        place = member(path, word)
        match word:
            case "$ref":
                target = self._source.define(value, place)
                name = self._names.get(target.pointer)
                if name is None:
                    name = self._names[target.pointer] = f"d{len(self._names)}"
                    self.unwritten.append((name, target))
                return {word: f"#/$defs/{name}"}
            case "oneOf":
                self._source.require_apart(value, path)
                if "anyOf" in schema:
                    raise unsupported(path, word, "it stands beside anyOf.", "Use allOf of the two.")
                return {"anyOf": self._list(value, place)}
            case "allOf" | "anyOf":
                return {word: self._list(value, place)}
            case "properties" | "patternProperties":
                return {word: {key: self.plain(item, member(place, key)) for key, item in value.items()}}
            case "additionalProperties":
                return {word: self.plain(value, place)}
            case "items" | "prefixItems" | "additionalItems":
                return self._array(ArrayWords(schema), path)
            case "propertyNames" | "unevaluatedProperties" | "unevaluatedItems":
                raise unsupported(path, word, "it cannot be kept in a combined schema.", "Leave it out.")
            case "minProperties" if value > 1:
                raise unsupported(path, word, "properties cannot be counted here.", "Leave it out.")
            case "format":
                limit = {} if "maxLength" in schema else {"maxLength": FORMATS.get(value)}
                return {word: value, **limit} if value in FORMATS else {}
            case "enum" | "const" | "type" | "required" | "pattern":
                return {word: value}
            case "minLength" | "maxLength" | "minItems" | "maxItems" | "minProperties" | "maxProperties":
                return {word: int(value)}
        return {}

    def _list(self, schemas: Any, place: str) -> list[Any]:
        return [self.plain(schema, member(place, index)) for index, schema in enumerate(schemas)]

    def _array(self, words: ArrayWords, path: str) -> dict[str, Any]:
        plain: dict[str, Any] = {}
        if words.prefix:
            plain["prefixItems"] = self._list(words.prefix, member(path, words.prefix_word))
        if words.rest is not None:
            plain["items"] = self.plain(words.rest, member(path, words.rest_word))
        return plain
