"""Parameters of tools, as people write them: JSON schemas, more or less.

Tools described for Python or Java name types as those do (`dict`, `float`, `ArrayList`). Where such a name
can mean only one JSON type it is read so; any other is refused by its path.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ayllu.engine.grammar_keywords import IN_PLACE, TYPES
from ayllu.engine.json_schema import measure, member
from ayllu.errors import GrammarError, clip, did_you_mean

_OTHER_NAMES = {
    "str": "string",
    "char": "string",
    "int": "integer",
    "long": "integer",
    "short": "integer",
    "byte": "integer",
    "bigint": "integer",
    "float": "number",
    "double": "number",
    "bool": "boolean",
    "dict": "object",
    "hashmap": "object",
    "hashtable": "object",
    "list": "array",
    "tuple": "array",
    "arraylist": "array",
    "queue": "array",
    "stack": "array",
    "none": "null",
}
_ANYTHING = "any"

_OTHER_MEMBERS = ("additionalProperties", "patternProperties", "required")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = (*IN_PLACE, "prefixItems")
_SINGLE = ("items", "additionalItems", "additionalProperties", "propertyNames")


def normalised_parameters(parameters: Mapping[str, Any], path: str = "$") -> dict[str, Any]:
    """The JSON schema of a tool's arguments, which is always that of an object.

    A tool that declares no parameters takes none. Raises GrammarError, naming the path, for types of no known
    name, for parameters that are no object, and for what exceeds a limit of size.
    """
    measure(parameters, path)
    schema = _normalised(parameters, path)
    if not isinstance(schema, dict):
        raise GrammarError(f"{path} must be a JSON schema of type object.", "Write it as an object.")
    if schema.setdefault("type", "object") != "object":
        problem = f"{member(path, 'type')}: arguments are always an object, not {clip(schema['type'])}."
        raise GrammarError(problem, "Put the value into a property.")
    if not schema.get("properties") and not {*_OTHER_MEMBERS, *IN_PLACE} & schema.keys():
        schema["additionalProperties"] = False
    return schema


def _normalised(schema: Any, path: str) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    found: dict[str, Any] = {}
    for word, value in schema.items():
        place = member(path, word)
        if word == "type":
            types = _types(value, place)
            if types is not None:
                found[word] = types
        elif word in _MAPS and isinstance(value, Mapping):
            found[word] = {name: _normalised(item, member(place, name)) for name, item in value.items()}
        elif (word in _LISTS or word == "items") and isinstance(value, list | tuple):
            found[word] = [_normalised(item, member(place, index)) for index, item in enumerate(value)]
        elif word in _SINGLE:
            found[word] = _normalised(value, place)
        else:
            found[word] = value
    return found


def _types(value: Any, path: str) -> Any:
    """`type` in JSON's names; None where it allows anything."""
    if isinstance(value, list | tuple):
        names = [_types(name, path) for name in value]
        return None if None in names else names
    if not isinstance(value, str) or value in TYPES:
        return value
    name = value.lower()
    if name == _ANYTHING:
        return None
    if name in TYPES:
        return name
    if name in _OTHER_NAMES:
        return _OTHER_NAMES[name]
    hint = did_you_mean(name, (*TYPES, *_OTHER_NAMES))
    raise GrammarError(
        f"{path}: there is no type {clip(repr(value))}.{hint}", f"Use one of {', '.join(TYPES)}."
    )
