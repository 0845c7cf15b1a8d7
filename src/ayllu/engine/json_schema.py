"""JSON schemas from outside: measured before anything walks them, pointed into, and used to judge answers.

A schema is plain data of unknown size and shape, so `measure` counts it without recursion first. Addresses
are never fetched. Patterns are matched by an engine of linear time, so no pattern can stall a server.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import unquote

import jsonschema_rs

from ayllu.chat.vocabulary import valid_unicode
from ayllu.errors import AylluError, GrammarError, RequestFailedError, UnsupportedError, clip

MAX_SCHEMA_CHARACTERS = 1 << 20
MAX_SCHEMA_VALUES = 100_000
MAX_SCHEMA_DEPTH = 100
"""Brackets within brackets: below the 128 levels that the library's JSON reader takes."""
MAX_ENUM_VALUES = 10_000
MAX_ANSWER_CHARACTERS = 16 << 20
PATTERN_BYTES = 1 << 20
"""Memory of one compiled pattern. Larger ones are refused before they are built."""

_LONGEST_PATH = 240
_PLAIN_KEY = re.compile(r"[A-Za-z_$][\w$-]*")
_LOOK_AROUND = ("(?=", "(?!", "(?<=", "(?<!")

Schema = dict[str, Any] | bool


def member(path: str, key: str | int) -> str:
    """The JSON path of a member: `$.properties.a`, `$.anyOf[0]`, `$["odd key"]`; long ones are cut."""
    if len(path) > _LONGEST_PATH:
        path = f"{path[: _LONGEST_PATH // 2]}…{path[-_LONGEST_PATH // 2 + 1 :]}"
    if isinstance(key, int):
        return f"{path}[{key}]"
    if _PLAIN_KEY.fullmatch(key) and len(key) <= 60:
        return f"{path}.{key}"
    return f"{path}[{json.dumps(clip(key, 60), ensure_ascii=False)}]"


def measure(schema: object, path: str = "$") -> None:
    """Raises GrammarError, naming the place, for a schema that is no JSON or exceeds a limit of size."""
    characters = values = 0
    waiting: list[tuple[object, str, int]] = [(schema, path, 0)]
    while waiting:
        value, place, depth = waiting.pop()
        values += 1
        if isinstance(value, str):
            characters += len(value)
            _require_unicode(value, place)
        elif isinstance(value, Mapping | list | tuple):
            if depth >= MAX_SCHEMA_DEPTH:
                raise _too_large(
                    "is nested deeper", f"{MAX_SCHEMA_DEPTH} levels", "Use `$ref` to flatten it."
                )
            for key, item in _members(value, place):
                if isinstance(key, str):
                    characters += len(key)
                waiting.append((item, member(place, key), depth + 1))
        elif isinstance(value, float) and not math.isfinite(value):
            raise GrammarError(f"{place}: {value} is no JSON number.", "Use finite numbers.")
        elif value is not None and not isinstance(value, bool | int | float):
            raise GrammarError(f"{place}: {type(value).__name__} is no JSON type.", "Give plain JSON.")
        if values + len(waiting) > MAX_SCHEMA_VALUES:
            raise _too_large("holds more", f"{MAX_SCHEMA_VALUES} values", "Split it or leave parts out.")
        if characters > MAX_SCHEMA_CHARACTERS:
            raise _too_large("is longer", f"{MAX_SCHEMA_CHARACTERS} characters", "Leave descriptions out.")


def _members(
    value: Mapping[object, object] | Sequence[object], path: str
) -> Iterator[tuple[str | int, object]]:
    if not isinstance(value, Mapping):
        yield from enumerate(value)
        return
    for key, item in value.items():
        if not isinstance(key, str):
            raise GrammarError(f"{path}: the key {clip(repr(key))} is no string.", "Give plain JSON.")
        _require_unicode(key, path)
        yield key, item


def _require_unicode(text: str, path: str) -> None:
    if valid_unicode(text) != text:
        problem = f"{path}: the text holds a lone surrogate, which no UTF-8 text can contain."
        raise GrammarError(problem, "Remove it.")


def _too_large(problem: str, limit: str, fix: str) -> GrammarError:
    return GrammarError(f"The schema {problem} than {limit}.", fix)


@dataclass(frozen=True)
class Target:
    """What a reference names: the pointer to it (one spelling each), its path, and the schema."""

    pointer: tuple[str, ...]
    path: str
    schema: Schema


def resolve(root: Schema, reference: object, path: str, root_path: str = "$") -> Target:
    """What a local `$ref`, which stands at `path`, names in the schema `root`, which stands at `root_path`.

    Raises UnsupportedError for addresses and anchors, GrammarError for a pointer at nothing.
    """
    if not isinstance(reference, str):
        raise GrammarError(f"{path}: a reference must be a string.", 'Write it as "#/$defs/name".')
    if not reference.startswith("#"):
        problem = f"{path}: {clip(repr(reference))} lies outside the schema, and nothing is ever fetched."
        raise UnsupportedError(problem, "Copy what it names into `$defs` and refer to it there.")
    pointer = unquote(reference[1:])
    if pointer and not pointer.startswith("/"):
        raise UnsupportedError(
            f"{path}: the anchor {clip(repr(reference))} is not supported.", 'Write it as "#/$defs/name".'
        )
    value: Any = root
    place = root_path
    steps = tuple(step.replace("~1", "/").replace("~0", "~") for step in pointer.split("/")[1:])
    for step in steps:
        key: str | int = step
        if isinstance(value, list) and re.fullmatch(r"0|[1-9][0-9]{0,8}", step, re.ASCII):
            key = int(key)
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            problem = f"{path}: {clip(repr(reference))} names nothing in this schema."
            raise GrammarError(problem, "Add it to `$defs`, or correct the reference.") from None
        place = member(place, key)
    if not isinstance(value, dict | bool):
        raise GrammarError(
            f"{path}: what {clip(repr(reference))} names is no schema.", "Correct the reference."
        )
    return Target(steps, place, value)


def unsupported_in_pattern(pattern: str) -> str | None:
    """What no engine of linear time can match, by name: look-around, word boundaries, back-references."""
    within_class = escaped = False
    for index, character in enumerate(pattern):
        if escaped:
            escaped = False
            if not within_class and character in "123456789k":
                return "a back-reference"
            if not within_class and character in "bB":
                return "a word boundary"
        elif character == "\\":
            escaped = True
        elif within_class:
            within_class = character != "]"
        elif character == "[":
            within_class = True
        elif character == "(" and pattern.startswith(_LOOK_AROUND, index):
            return "look-around"
    return None


def ends_in_escape(pattern: str) -> bool:
    """Whether a pattern stops behind a lone backslash, which the grammar library would not notice."""
    return (len(pattern) - len(pattern.rstrip("\\"))) % 2 == 1


def validate_json(schema: Schema, text: str) -> Any:
    """The value of `text`, which is checked to be JSON of this schema.

    `format` is taken as the annotation that the standard says it is. Raises RequestFailedError naming the
    place in the answer, and GrammarError for a schema that is itself wrong or too large.
    """
    measure(schema)
    value = parse_json(text)
    try:
        validator = _validator_kind(schema)(
            schema,
            validate_formats=False,
            pattern_options=jsonschema_rs.RegexOptions(
                size_limit=PATTERN_BYTES, dfa_size_limit=PATTERN_BYTES
            ),
            offline=True,
        )
    except (ValueError, jsonschema_rs.ReferencingError) as error:
        reason = clip(str(error).partition("\n")[0])
        raise GrammarError(f"The schema is not valid: {reason}.", "Correct it.") from None
    try:
        validator.validate(value)
    except jsonschema_rs.ValidationError as error:
        place = "$"
        for key in error.instance_path:
            place = member(place, key)
        reason = clip(str(error.message))
        raise RequestFailedError(
            f"The answer breaks its schema at {place}: {reason}.", "Ask again, or allow more tokens."
        ) from None
    except ValueError as error:
        raise _not_json(clip(error)) from None
    return value


def _validator_kind(schema: Schema) -> Callable[..., Any]:
    """How to read a schema: as its `$schema` says, else by words that newer drafts do not know."""
    kind: Callable[..., Any] = jsonschema_rs.validator_for
    if isinstance(schema, dict) and "$schema" not in schema:
        waiting: list[Any] = [schema]
        while waiting:
            value = waiting.pop()
            if isinstance(value, list | tuple):
                waiting += value
            elif isinstance(value, dict):
                waiting += value.values()
                if any(
                    isinstance(value.get(word), bool) for word in ("exclusiveMinimum", "exclusiveMaximum")
                ):
                    return jsonschema_rs.Draft4Validator
                if isinstance(value.get("items"), list | tuple):
                    kind = jsonschema_rs.Draft7Validator
    return kind


def parse_json(text: str) -> Any:
    """The value of `text`, strictly: finite numbers and whole characters. Raises RequestFailedError."""
    if len(text) > MAX_ANSWER_CHARACTERS:
        raise RequestFailedError(
            f"The answer has more than {MAX_ANSWER_CHARACTERS} characters.", "Limit max_new_tokens."
        )

    def refuse(constant: str) -> NoReturn:
        raise _not_json(f"{clip(constant)} is no JSON number")

    def finite(number: str) -> float:
        value = float(number)
        return value if math.isfinite(value) else refuse(number)

    try:
        value = json.loads(text, parse_constant=refuse, parse_float=finite)
        text.encode()
    except AylluError:
        raise
    except (ValueError, RecursionError) as error:
        raise _not_json(clip(error)) from None
    return value


def _not_json(reason: str) -> RequestFailedError:
    return RequestFailedError(f"The answer is not JSON: {reason}.", "Ask again, or allow more tokens.")
