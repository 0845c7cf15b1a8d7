"""From a JSON schema to the tree of what is written for it.

What is written always meets the schema, but may be less than it allows, where "anything" would let a small
model wander: an object that declares properties gets no others unless the schema asks for them, a tuple is
written whole, and a schema that says `properties` without a type means an object.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from ayllu.engine.grammar_combined import combined
from ayllu.engine.grammar_keywords import (
    CONSTRAINING,
    FORMATS,
    IN_PLACE,
    WORDS_OF_TYPE,
    ArrayWords,
    bounds_of,
    check_words,
    limits_of,
    types_of,
    unsupported,
)
from ayllu.engine.grammar_nodes import (
    Anything,
    Array,
    Boolean,
    Comparison,
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
    json_type,
    same_json,
)
from ayllu.engine.grammar_recursion import measured_tree
from ayllu.engine.json_schema import Schema, Target, measure, member, resolve
from ayllu.errors import GrammarError

MAX_COMBINED_PARTS = 50_000


def read_schema(schema: Schema, path: str = "$") -> SchemaTree:
    """The tree of a schema that stands at `path` of what the user gave.

    Raises GrammarError (wrong, too large, or met by no finite value) and UnsupportedError (a keyword that
    cannot be kept), both naming the path.
    """
    measure(schema, path)
    reader = _Reader(schema, path)
    root = reader.node(schema, path)
    reader.read_definitions()
    reader.check_cycles()
    reader.check_one_of()
    tree = measured_tree(root, reader.definitions)
    if not tree.ends(root, tree.levels):
        raise GrammarError(
            f"{path}: no finite value meets this schema.",
            "Remove the contradiction, or the endless recursion.",
        )
    return tree


class _Reader:
    """Reads one schema and what it refers to. `definitions` are named by the pointers to them."""

    def __init__(self, root: Schema, path: str) -> None:
        self._root = root
        self._path = path
        self._targets: dict[str, Target] = {}
        self._unread: list[str] = []
        self._combined_parts = 0
        self._one_of: list[tuple[str, tuple[Node, ...], bool]] = []
        self.definitions: dict[str, Node] = {}

    def node(self, schema: Any, path: str) -> Node:
        """The tree of one schema."""
        if isinstance(schema, bool):
            return Anything(path) if schema else Nothing(path)
        self.check(schema, path)
        words = CONSTRAINING & schema.keys()
        if "not" in schema:
            return Nothing(path)
        if words & {"enum", "const"}:
            simple = words <= {"enum", "const", "type"}
            return _literals(schema, path) if simple else combined(schema, path, self)
        in_place = words & set(IN_PLACE)
        if in_place:
            simple = len(words) == 1
            return self._in_place(in_place.pop(), schema, path) if simple else combined(schema, path, self)
        if "patternProperties" in words:
            return combined(schema, path, self)
        nodes = tuple(self._typed(kind, schema, path) for kind in types_of(schema))
        if "type" not in schema:
            nodes = tuple(map(_implied, nodes))
        if not nodes:
            return Anything(path)
        return nodes[0] if len(nodes) == 1 else Union(path, nodes)

    def check(self, schema: Any, path: str) -> None:
        """Raises GrammarError or UnsupportedError for what `schema` itself says, not what lies inside."""
        if not isinstance(schema, Mapping):
            raise GrammarError(f"{path}: a schema must be an object, true or false.", "Correct the schema.")
        check_words(schema, path, at_root=schema is self._root)

    def count_combined(self) -> None:
        """Called for each part of a combined schema: every one brings all the definitions it refers to."""
        self._combined_parts += 1
        if self._combined_parts > MAX_COMBINED_PARTS:
            raise GrammarError(
                f"{self._path}: combined schemas have over {MAX_COMBINED_PARTS} parts, definitions included.",
                "Use fewer of allOf and of keywords beside $ref and anyOf.",
            )

    def define(self, reference: object, path: str) -> Target:
        """What `reference` names."""
        return resolve(self._root, reference, path, self._path)

    def read_definitions(self) -> None:
        """Read what is referred to, and what that refers to, until nothing is missing."""
        while self._unread:
            name = self._unread.pop()
            target = self._targets[name]
            self.definitions[name] = self.node(target.schema, target.path)

    def check_cycles(self) -> None:
        """Raises GrammarError for definitions that come back to themselves without a value between."""
        done: set[str] = set()
        for start in self.definitions:
            trail = [(start, _in_same_place(self.definitions[start]))]
            open_names = {start}
            while trail and start not in done:
                name, following = trail[-1]
                target = next(following, None)
                if target is None:
                    trail.pop()
                    open_names.discard(name)
                    done.add(name)
                elif target in open_names:
                    raise GrammarError(
                        f"{self._targets[target].path}: this reference leads back to itself.",
                        "Put an object or a list between, so that every round writes something.",
                    )
                elif target not in done:
                    trail.append((target, _in_same_place(self.definitions[target])))
                    open_names.add(target)

    def check_one_of(self) -> None:
        """Raises UnsupportedError for a `oneOf` of which one answer could meet two schemas."""
        narrow, whole = Comparison(self.definitions), Comparison(self.definitions, whole=True)
        for path, options, written_whole in self._one_of:
            comparison = whole if written_whole else narrow
            for one in options:
                for other in options:
                    if one is other or comparison.excludes(one, other):
                        continue
                    why = (
                        "are too many to compare" if comparison.exhausted else "may both be met by one answer"
                    )
                    raise unsupported(
                        path,
                        "oneOf",
                        f"{one.path} and {other.path} {why}.",
                        "Use anyOf, or give each a required property with a const of its own.",
                    )

    def require_apart(self, schemas: Any, path: str) -> None:
        """Have it checked that no value is valid for two of the schemas of a `oneOf` in a combined schema."""
        self._one_of.append((path, self._options(schemas, member(path, "oneOf")), True))

    def _options(self, schemas: Any, place: str) -> tuple[Node, ...]:
        return tuple(self.node(schema, member(place, index)) for index, schema in enumerate(schemas))

    def _in_place(self, word: str, schema: Mapping[str, Any], path: str) -> Node:
        """A schema that says nothing but `$ref`, `allOf`, `anyOf` or `oneOf`."""
        place = member(path, word)
        if word == "$ref":
            target = self.define(schema[word], place)
            name = "/".join(step.replace("~", "~0").replace("/", "~1") for step in target.pointer)
            if name not in self._targets:
                self._targets[name] = target
                self._unread.append(name)
            return Reference(path, name)
        if word == "allOf" and len(schema[word]) > 1:
            return combined(schema, path, self)
        options = self._options(schema[word], place)
        if word == "oneOf":
            self._one_of.append((path, options, False))
        return options[0] if len(options) == 1 else Union(path, options)

    def _typed(self, kind: str, schema: Mapping[str, Any], path: str) -> Node:
        match kind:
            case "null":
                return Null(path)
            case "boolean":
                return Boolean(path)
            case "string":
                return _text(schema, path)
            case "number" | "integer":
                return _number(schema, path, integer=kind == "integer")
            case "array":
                return self._array(schema, path)
            case _:
                return self._object(schema, path)

    def _array(self, schema: Mapping[str, Any], path: str) -> Node:
        words = ArrayWords(schema)
        place = member(path, words.prefix_word)
        prefix = tuple(self.node(item, member(place, index)) for index, item in enumerate(words.prefix))
        rest_word = words.rest_word if words.rest is not None else "unevaluatedItems"
        rest_schema = words.rest if words.rest is not None else schema.get("unevaluatedItems", not prefix)
        rest = self.node(rest_schema, member(path, rest_word))
        most = int(schema["maxItems"]) if "maxItems" in schema else None
        # A tuple is written whole, as far as something can stand in its places.
        usable = next((n for n, item in enumerate(prefix) if isinstance(item, Nothing)), len(prefix))
        if usable < len(prefix):
            rest = Nothing(path)
        prefix = prefix[: usable if most is None else min(usable, most)]
        if isinstance(rest, Nothing):
            most = len(prefix)
        least = max(int(schema.get("minItems", 0)), len(prefix))
        if most is not None and least > most:
            return Nothing(path)
        return Array(path, prefix, rest, least, most)

    def _object(self, schema: Mapping[str, Any], path: str) -> Node:
        place = member(path, "properties")
        declared: Mapping[str, Any] = schema.get("properties", {})
        properties = {name: self.node(item, member(place, name)) for name, item in declared.items()}
        required = frozenset(schema.get("required", ()))
        word = next((w for w in ("additionalProperties", "unevaluatedProperties") if w in schema), "")
        others = schema[word] if word else True
        place = member(path, word or "required")
        for name in schema.get("required", ()):
            if name not in properties:
                properties[name] = self.node(others, place)
        extra = self.node(others if word else not properties, place)
        key = self._key(schema, path)
        if properties and not (isinstance(key, Text) and not key.constraints):
            raise unsupported(
                path,
                "propertyNames",
                "names can be ruled only where no property is declared.",
                "Leave it out, and declare every property.",
            )
        return _counted(Object(path, properties, required, extra, key, sealed=others is False), schema)

    def _key(self, schema: Mapping[str, Any], path: str) -> Node:
        """What the names of extra properties may be."""
        place = member(path, "propertyNames")
        key = self.node(schema.get("propertyNames", True), place)
        if isinstance(key, Anything):
            return Text(place)
        words = isinstance(key, Literals) and all(isinstance(value, str) for value in key.values)
        if not words and not isinstance(key, Text):
            raise unsupported(path, "propertyNames", "this is no schema of a string.", "Use pattern or enum.")
        return key


def _implied(node: Node) -> Node:
    """The node of a schema that names no type, only words of one."""
    if isinstance(node, Nothing | Text | Number | Array | Object):
        return dataclasses.replace(node, implied=True)
    return node


def _literals(schema: Mapping[str, Any], path: str) -> Node:
    values = list(schema["enum"]) if "enum" in schema else [schema["const"]]
    if "const" in schema:
        values = [value for value in values if same_json(value, schema["const"])]
    if "type" in schema:
        allowed = set(types_of(schema))
        if "number" in allowed:
            allowed.add("integer")
        values = [value for value in values if json_type(value) in allowed]
    plain = tuple(value for value in values if not isinstance(value, dict | list | tuple))
    options: list[Node] = [Literals(path, plain)] if plain else []
    options += [_constant(value, path) for value in values if isinstance(value, dict | list | tuple)]
    if not options:
        return Nothing(path)
    return options[0] if len(options) == 1 else Union(path, tuple(options))


def _constant(value: Any, path: str) -> Node:
    """Exactly this value. Its parts are nodes like any others: written as one literal, it would keep the
    library from going on with another object or list that begins alike."""
    if isinstance(value, dict):
        parts = {name: _constant(item, path) for name, item in value.items()}
        return Object(path, parts, frozenset(parts), Nothing(path), Text(path), sealed=True)
    if isinstance(value, list | tuple):
        items = tuple(_constant(item, path) for item in value)
        return Array(path, items, Nothing(path), len(items), len(items))
    return Literals(path, (value,))


def _text(schema: Mapping[str, Any], path: str) -> Node:
    constraints = {word: schema[word] for word in WORDS_OF_TYPE["string"] if word in schema}
    if constraints.get("format", "date") not in FORMATS:
        del constraints["format"]  # nobody's standard: an annotation
    for word in ("minLength", "maxLength"):
        if word in constraints:
            constraints[word] = int(constraints[word])
    if constraints.get("minLength") == 0:
        del constraints["minLength"]
    if "format" in constraints:
        longest = FORMATS[constraints["format"]]
        constraints["maxLength"] = min(longest, constraints.get("maxLength", longest))
    if "maxLength" in constraints and constraints.get("minLength", 0) > constraints["maxLength"]:
        return Nothing(path)
    return Text(path, constraints)


def _number(schema: Mapping[str, Any], path: str, *, integer: bool) -> Node:
    bounds = bounds_of(schema)
    lowest, highest = limits_of(bounds)
    excluded = lowest in (bounds.get("exclusiveMinimum"), bounds.get("exclusiveMaximum"))
    if lowest > highest or (lowest == highest and excluded):
        return Nothing(path)
    return Number(path, integer, bounds)


def _counted(node: Object, schema: Mapping[str, Any]) -> Node:
    """An object with minProperties and maxProperties, as far as a grammar can count."""
    least = int(schema.get("minProperties", 0))
    if least > max(1, len(node.required)):
        # Two extra properties may have the same name, and then count once.
        raise unsupported(
            node.path,
            "minProperties",
            "only 1, or as many as are required, can be kept.",
            "List the properties in required.",
        )
    if "maxProperties" not in schema:
        return dataclasses.replace(node, not_empty=least > 0)
    most = int(schema["maxProperties"])
    if most < max(len(node.required), least):
        return Nothing(node.path)
    if most < len(node.properties):
        raise unsupported(
            node.path,
            "maxProperties",
            "optional properties cannot be counted.",
            "Leave it out, or require the properties.",
        )
    room = most - len(node.properties)
    extra = node.extra if room else Nothing(node.path)
    return dataclasses.replace(node, not_empty=least > 0, extra=extra, most_extra=room)


def _in_same_place(node: Node) -> Iterator[str]:
    """Definitions that stand in a node's own place, with nothing written before them."""
    match node:
        case Reference(name=name):
            yield name
        case Union(options=options):
            for option in options:
                yield from _in_same_place(option)
        case _:
            pass
