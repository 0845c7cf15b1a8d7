"""The words of JSON schemas: which constrain, which only describe, and what each must look like.

A word that constrains and cannot be kept is refused by its path, never dropped; words of no standard are
annotations, as the standard says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ayllu.engine.json_schema import MAX_ENUM_VALUES, ends_in_escape, member, unsupported_in_pattern
from ayllu.errors import GrammarError, UnsupportedError, clip, did_you_mean

LARGEST_WHOLE = (1 << 53) - 1
"""The largest whole number that every JSON reader keeps (RFC 7493, section 2.2)."""

TYPES = ("null", "boolean", "object", "array", "number", "integer", "string")

FORMATS = {
    "date-time": 35,
    "time": 24,
    "date": 10,
    "duration": 40,
    "email": 254,
    "hostname": 253,
    "ipv4": 15,
    "ipv6": 45,
    "uuid": 36,
    "uri": 2048,
}
"""Formats that are kept, and the characters they need at most: fractions of seconds down to nanoseconds,
addresses as long as RFC 5321 and RFC 1035 have them. Without a limit a time may go on for ever."""
_UNKEPT_FORMATS = frozenset(
    {
        "idn-email",
        "idn-hostname",
        "iri",
        "iri-reference",
        "json-pointer",
        "regex",
        "relative-json-pointer",
        "uri-reference",
        "uri-template",
    }
)
"""Formats of the standard that the grammar library does not know. All others are annotations."""

WORDS_OF_TYPE = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "array": ("items", "prefixItems", "additionalItems", "minItems", "maxItems", "unevaluatedItems"),
    "object": (
        "properties",
        "required",
        "additionalProperties",
        "patternProperties",
        "minProperties",
        "maxProperties",
        "propertyNames",
        "unevaluatedProperties",
    ),
}
IN_PLACE = ("$ref", "allOf", "anyOf", "oneOf")
CONSTRAINING = frozenset(
    {"type", "enum", "const", *IN_PLACE, *(word for words in WORDS_OF_TYPE.values() for word in words)}
)

_UNSUPPORTED = {
    "if": "Use anyOf with one schema per case.",
    "then": "Use anyOf with one schema per case.",
    "else": "Use anyOf with one schema per case.",
    "contains": "Use prefixItems for the item that must be there.",
    "minContains": "Use minItems.",
    "maxContains": "Use maxItems.",
    "dependentRequired": "Use anyOf with one schema per case.",
    "dependentSchemas": "Use anyOf with one schema per case.",
    "dependencies": "Use anyOf with one schema per case.",
    "$dynamicRef": "Use $ref.",
    "$recursiveRef": "Use $ref.",
    "$dynamicAnchor": "Use $ref and $defs.",
    "$anchor": "Refer to it by its place, such as #/$defs/name.",
}
_NUMBERS = frozenset(WORDS_OF_TYPE["number"])
_COUNTS = frozenset({"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"})
_LISTS_OF_SCHEMAS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_MAPS_OF_SCHEMAS = frozenset({"properties", "patternProperties"})


def unsupported(path: str, word: str, problem: str, fix: str) -> UnsupportedError:
    """The refusal of a word at its path."""
    return UnsupportedError(f"{member(path, word)}: {problem}", fix)


def wrong(path: str, word: str, problem: str) -> GrammarError:
    """The refusal of a word that does not say what the standard wants there."""
    return GrammarError(f"{member(path, word)} {problem}.", "Correct the schema.")


def check_words(schema: Mapping[str, Any], path: str, *, at_root: bool) -> None:
    """Raises GrammarError or UnsupportedError for the first word of this one schema that cannot be kept."""
    for word, value in schema.items():
        _check_word(word, value, path)
        if word == "$id" and not at_root:
            raise unsupported(path, word, "a schema within a schema cannot be kept.", "Remove it.")


def _check_word(word: str, value: Any, path: str) -> None:
    if word in _UNSUPPORTED:
        raise unsupported(path, word, "this keyword cannot be kept while generating.", _UNSUPPORTED[word])
    if word == "uniqueItems" and value is not False:
        raise unsupported(path, word, "a grammar cannot compare items.", "Leave it out and check the answer.")
    if word == "not" and value not in ({}, True):
        raise unsupported(path, word, "a grammar cannot exclude a schema.", "Say what is allowed instead.")
    if word == "type":
        _check_type(value, path)
    elif word == "enum":
        if not isinstance(value, list | tuple):
            raise wrong(path, word, "must be a list of values")
        if len(value) > MAX_ENUM_VALUES:
            raise wrong(path, word, f"holds more than {MAX_ENUM_VALUES} values")
    elif word in _COUNTS:
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value != int(value):
            raise wrong(path, word, "must be a whole number from 0")
    elif word in _NUMBERS:
        _check_number(word, value, path)
    elif word in _LISTS_OF_SCHEMAS:
        if not isinstance(value, list | tuple) or (not value and word != "prefixItems"):
            raise wrong(path, word, "must be a list of schemas, at least one")
    elif word in _MAPS_OF_SCHEMAS:
        if not isinstance(value, Mapping):
            raise wrong(path, word, "must be an object of schemas")
        for key in value if word == "patternProperties" else ():
            _check_pattern(key, path, word)
    elif word == "required":
        if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
            raise wrong(path, word, "must be a list of names of properties")
    elif word == "pattern":
        _check_pattern(value, path, word)
    elif word == "format":
        if not isinstance(value, str):
            raise wrong(path, word, "must be a string")
        if value in _UNKEPT_FORMATS:
            known = ", ".join(sorted(FORMATS))
            raise unsupported(
                path, word, f"the format {value!r} cannot be kept.", f"Use pattern, or one of {known}."
            )


def _check_type(value: Any, path: str) -> None:
    names = value if isinstance(value, list | tuple) else [value]
    if not names:
        raise wrong(path, "type", "names no type")
    for name in names:
        if name not in TYPES:
            hint = did_you_mean(name, TYPES) if isinstance(name, str) else ""
            raise GrammarError(
                f"{member(path, 'type')}: there is no type {clip(repr(name))}.{hint}",
                f"Use one of {', '.join(TYPES)}.",
            )


def _check_number(word: str, value: Any, path: str) -> None:
    if isinstance(value, bool) and word.startswith("exclusive"):
        return  # draft 4 writes it so, and the reader translates it
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong(path, word, "must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or abs(number) > 1e300:
        raise wrong(path, word, "is too large")
    if word == "multipleOf" and number <= 0:
        raise wrong(path, word, "must be above 0")
    if (word.endswith("inimum") and number > LARGEST_WHOLE) or (
        word.endswith("aximum") and number < -LARGEST_WHOLE
    ):
        raise unsupported(path, word, "numbers so large lose digits.", f"Stay within {LARGEST_WHOLE}.")


def _check_pattern(pattern: Any, path: str, word: str) -> None:
    if not isinstance(pattern, str):
        raise wrong(path, word, "must be a regular expression")
    if ends_in_escape(pattern):
        raise wrong(path, word, "ends in the middle of an escape")
    if found := unsupported_in_pattern(pattern):
        raise unsupported(
            path, word, f"{clip(repr(pattern), 60)} uses {found}.", "Write the pattern without it."
        )


def types_of(schema: Mapping[str, Any]) -> tuple[str, ...]:
    """The types a schema names, or those whose words it uses; none for a schema of any type."""
    named = schema.get("type")
    if named is None:
        return tuple(kind for kind, words in WORDS_OF_TYPE.items() if any(word in schema for word in words))
    names = list(dict.fromkeys([named] if isinstance(named, str) else named))
    if "number" in names and "integer" in names:
        names.remove("integer")
    return tuple(names)


def bounds_of(schema: Mapping[str, Any]) -> dict[str, float]:
    """The words about a number's size, in the newest draft's spelling."""
    found = {word: schema[word] for word in WORDS_OF_TYPE["number"] if word in schema}
    for limit, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(found.get(exclusive), bool) and found.pop(exclusive) and limit in found:
            found[exclusive] = found.pop(limit)
    return found


def limits_of(bounds: Mapping[str, float]) -> tuple[float, float]:
    """The lowest and the highest number within `bounds`, whether or not they are excluded themselves."""
    lowest = max(bounds.get("minimum", -math.inf), bounds.get("exclusiveMinimum", -math.inf))
    highest = min(bounds.get("maximum", math.inf), bounds.get("exclusiveMaximum", math.inf))
    return lowest, highest


def within_reach(bounds: Mapping[str, float]) -> dict[str, float]:
    """`bounds` drawn in to whole numbers that every JSON reader keeps, a missing side closed."""
    closed = {word: value if word == "multipleOf" else _drawn_in(value) for word, value in bounds.items()}
    lowest, highest = limits_of(bounds)
    if lowest == -math.inf:
        closed["minimum"] = -LARGEST_WHOLE
    if highest == math.inf:
        closed["maximum"] = LARGEST_WHOLE
    return closed


def _drawn_in(value: float) -> float:
    return min(max(value, -LARGEST_WHOLE), LARGEST_WHOLE)


class ArrayWords:
    """`prefixItems` and `items`, in whichever draft's words they are written. rest None: not said."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        items = schema.get("items")
        old = isinstance(items, list | tuple)
        self.prefix: Any = items if old else schema.get("prefixItems", ())
        self.prefix_word = "items" if old else "prefixItems"
        self.rest: Any = schema.get("additionalItems") if old else items
        self.rest_word = "additionalItems" if old else "items"
