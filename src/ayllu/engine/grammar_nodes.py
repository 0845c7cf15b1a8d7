"""What a JSON schema allows, as a small tree: between reading a schema and writing a grammar for it.

Every node knows the path in the schema it came from, for error messages. implied: the schema names no type,
so it allows all values of other types as well, though none is written. `Comparison` decides whether an answer
written for one node can also be one of another, which `oneOf` needs to know.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ayllu.engine.grammar_keywords import limits_of

MAX_COMPARISONS = 100_000
_MAX_COMPARED_DEPTH = 8


@dataclass(frozen=True)
class Anything:
    """Any JSON value."""

    path: str


@dataclass(frozen=True)
class Nothing:
    """No value at all."""

    path: str
    implied: bool = False


@dataclass(frozen=True)
class Null:
    path: str


@dataclass(frozen=True)
class Boolean:
    path: str


@dataclass(frozen=True)
class Literals:
    """One of these strings, numbers, or words."""

    path: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Text:
    """A string. `constraints` are the schema's own words for it (minLength, maxLength, pattern, format)."""

    path: str
    constraints: Mapping[str, Any] = field(default_factory=dict)
    implied: bool = False


@dataclass(frozen=True)
class Number:
    """A number. `constraints` are minimum, maximum, exclusiveMinimum, exclusiveMaximum and multipleOf."""

    path: str
    integer: bool
    constraints: Mapping[str, float] = field(default_factory=dict)
    implied: bool = False


@dataclass(frozen=True)
class Array:
    """The items of `prefix`, then items of `rest`, `least` to `most` (None: any number) together."""

    path: str
    prefix: tuple[Node, ...]
    rest: Node
    least: int
    most: int | None
    implied: bool = False


@dataclass(frozen=True)
class Object:
    """Properties in this order, those of `required` always, then up to `most_extra` others, names by `key`
    and values by `extra`. not_empty: at least one property. sealed: whether the schema itself allows no
    others, not only what is written for it."""

    path: str
    properties: Mapping[str, Node]
    required: frozenset[str]
    extra: Node
    key: Node
    most_extra: int | None = None
    not_empty: bool = False
    sealed: bool = False
    implied: bool = False


@dataclass(frozen=True)
class Union:
    """One of these."""

    path: str
    options: tuple[Node, ...]


@dataclass(frozen=True)
class Reference:
    """A definition of the tree, by name."""

    path: str
    name: str


@dataclass(frozen=True)
class Combined:
    """Schemas intersected with each other, by the grammar library itself. Refers only to its own `$defs`."""

    path: str
    schema: Mapping[str, Any]


Node = (
    Anything
    | Nothing
    | Null
    | Boolean
    | Literals
    | Text
    | Number
    | Array
    | Object
    | Union
    | Reference
    | Combined
)


@dataclass(frozen=True)
class SchemaTree:
    """A whole schema. `definitions` is what its references name, `recursive` those that lead back to
    themselves, `heights` how many of these the smallest value of each lies within (absent: no finite value).
    levels: how many of them a value may lie within; None where that is not limited."""

    root: Node
    definitions: Mapping[str, Node]
    recursive: frozenset[str] = frozenset()
    heights: Mapping[str, int] = field(default_factory=dict)
    levels: int | None = None

    def ends(self, node: Node, levels: int | None) -> bool:
        """Whether some finite value meets the node, within so many recursive definitions."""
        needed = height(node, self.heights)
        return needed is not None and (levels is None or needed <= levels)


def height(node: Node, heights: Mapping[str, int]) -> int | None:
    """How many recursive definitions the smallest value of `node` lies within, given those of definitions;
    None where no finite value is known."""

    def highest(nodes: Iterable[Node]) -> int | None:
        found = [height(inner, heights) for inner in nodes]
        return None if None in found else max((each for each in found if each is not None), default=0)

    def lowest(nodes: Iterable[Node]) -> int | None:
        return min((h for inner in nodes if (h := height(inner, heights)) is not None), default=None)

    match node:
        case Nothing():
            return None
        case Reference():
            return heights.get(node.name)
        case Union():
            return lowest(node.options)
        case Array():
            needed = node.prefix[: node.least]
            return highest([*needed, node.rest] if node.least > len(node.prefix) else needed)
        case Object() if node.not_empty and not node.required:
            return lowest([*node.properties.values(), node.extra])
        case Object():
            return highest(node.properties[name] for name in node.required)
        case _:
            return 0


def parts(node: Node) -> Iterator[Node]:
    """A node and all within it, references not followed."""
    waiting = [node]
    while waiting:
        part = waiting.pop()
        yield part
        match part:
            case Union(options=options):
                waiting += options
            case Array(prefix=prefix, rest=rest):
                waiting += [*prefix, rest]
            case Object(properties=properties, extra=extra):
                waiting += [*properties.values(), extra]
            case _:
                pass


def json_type(value: object) -> str:
    """The JSON type of a value; whole numbers are integers, as the standard says, 1.0 too."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case str():
            return "string"
        case int():
            return "integer"
        case float():
            return "integer" if value.is_integer() else "number"
        case list() | tuple():
            return "array"
        case _:
            return "object"


def same_json(left: object, right: object) -> bool:
    """Equality of JSON values: 1 equals 1.0, but not true."""
    waiting: list[tuple[Any, Any]] = [(left, right)]
    while waiting:
        one, other = waiting.pop()
        kinds = {json_type(one), json_type(other)}
        if len(kinds) > 1:
            return False
        if "array" in kinds:
            if len(one) != len(other):
                return False
            waiting += zip(one, other, strict=True)
        elif "object" in kinds:
            if one.keys() != other.keys():
                return False
            waiting += [(item, other[key]) for key, item in one.items()]
        elif one != other:
            return False
    return True


class Comparison:
    """Compares nodes of one tree, within a budget of work. Unsure counts as no.

    whole: what is written for a node is all that its schema allows, as the grammar library writes it.
    """

    def __init__(self, definitions: Mapping[str, Node], *, whole: bool = False) -> None:
        self._definitions = definitions
        self._whole = whole
        self._left = MAX_COMPARISONS

    @property
    def exhausted(self) -> bool:
        """Whether the budget ran out: then answers say no more than unsure."""
        return self._left <= 0

    def excludes(self, written: Node, other: Node, depth: int = 0) -> bool:
        """Whether nothing that is written for `written` is valid for `other`."""
        self._left -= 1
        if depth > _MAX_COMPARED_DEPTH or self._left <= 0:
            return False
        match written, other:
            case (_, Nothing(implied=False)) | (Nothing(implied=False), _):
                return True
            case Nothing(), _ if not self._whole:
                return True
            case Reference(), _:
                return self.excludes(self._definitions[written.name], other, depth + 1)
            case _, Reference():
                return self.excludes(written, self._definitions[other.name], depth + 1)
            case Union(), _:
                return all(self.excludes(option, other, depth + 1) for option in written.options)
            case _, Union():
                return all(self.excludes(written, option, depth + 1) for option in other.options)
            case Literals(), Literals():
                self._left -= len(written.values) * len(other.values)
                return self._left > 0 and not any(
                    same_json(one, two) for one in written.values for two in other.values
                )
            case (Object(implied=True), Object(implied=True)) | (
                Number(implied=True),
                Number(implied=True),
            ) if self._whole:
                return False  # both may be of a type that neither says anything about
            case Object(), Object():
                return self._objects(written, other, depth)
            case Number(), Number():
                (lowest, highest), (least, most) = (
                    limits_of(written.constraints),
                    limits_of(other.constraints),
                )
                return highest < least or most < lowest
        return not _types(written, allowed=self._whole) & _types(other, allowed=True)

    def _objects(self, written: Object, other: Object, depth: int) -> bool:
        for name in other.required:
            closed = written.sealed or (isinstance(written.extra, Nothing) and not self._whole)
            if name not in written.properties and closed:
                return True
        for name in written.required | other.required:
            mine, theirs = written.properties.get(name), other.properties.get(name)
            if mine is not None and theirs is not None and self.excludes(mine, theirs, depth + 1):
                return True
            if name in written.required and theirs is None and other.sealed:
                return True
        return False


_ALL = frozenset({"null", "boolean", "string", "integer", "number", "array", "object"})


def _types(node: Node, *, allowed: bool) -> frozenset[str]:
    """Types of what is written for a node, or of what its schema allows."""
    match node:
        case Nothing(implied=True) | Text(implied=True) if allowed:
            return _ALL
        case Number(implied=True) | Array(implied=True) | Object(implied=True) if allowed:
            return _ALL
        case Null():
            return frozenset({"null"})
        case Boolean():
            return frozenset({"boolean"})
        case Text():
            return frozenset({"string"})
        case Number():
            return frozenset({"integer"} if node.integer else {"integer", "number"})
        case Array():
            return frozenset({"array"})
        case Object():
            return frozenset({"object"})
        case Literals():
            return frozenset(json_type(value) for value in node.values)
        case _:
            return _ALL
