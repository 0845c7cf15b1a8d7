"""Lark grammars that users write, looked through before the library reads them.

Two things must not pass: names of special tokens, since an answer must not hold tokens that steer the model,
and lexeme options that need a sampler which can go back. Schemas embedded by `%json` are measured like any.
"""

from __future__ import annotations

import json
import re
from json import JSONDecodeError
from typing import Any

from ayllu.engine.json_schema import measure
from ayllu.errors import GrammarError, UnsupportedError, clip

_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"i?')
_REGEX = re.compile(r"/(?!/)(?:[^/\\]|\\.)+/[a-z]*")
_COMMENT = re.compile(r"(?:#|//)[^\n]*")
_SPECIAL = re.compile(r"<[^<>\s]+>")
_DIRECTIVE = re.compile(r"%(json|llguidance|regex)\b")
_NAME = re.compile(r"[A-Za-z_][\w-]*")
_OPTION = re.compile(r"\s*=")
_REST = re.compile(r"[^\"/#<%A-Za-z_]+")
_REFUSED_OPTIONS = {
    "stop": "Use suffix, or lazy.",
    "max_tokens": "Use max_new_tokens of the request, or {m,n}.",
    "temperature": "Use the temperature of the request.",
}


def check_lark(source: str) -> None:
    """Raises UnsupportedError, naming the line, for special tokens and refused options; GrammarError for an
    embedded schema that is wrong. Everything else is for the library to judge."""
    place = 0
    while place < len(source):
        for pattern in (_REST, _STRING, _COMMENT, _REGEX):
            if match := pattern.match(source, place):
                break
        else:
            match = _SPECIAL.match(source, place)
            if match:
                raise UnsupportedError(
                    f"Line {_line(source, place)} of the grammar names a special token: {clip(match[0])}.",
                    "Describe text only; put it into quotes if it is meant as text.",
                )
            if source[place] in '"/':
                # Going on behind it would read the rest of the grammar once for each of these.
                problem = (
                    f"Line {_line(source, place)} of the grammar has a {source[place]} without its second."
                )
                raise GrammarError(problem, "Close the string or the pattern, or escape it.")
            place = _after_word(source, place)
            continue
        place = match.end()


def _after_word(source: str, place: int) -> int:
    """Where to go on behind a directive, a name or a lone character."""
    if match := _DIRECTIVE.match(source, place):
        value, end = _embedded(source, match.end())
        if match[1] == "json":
            try:
                measure(value)
            except GrammarError as error:
                line = _line(source, place)
                raise GrammarError(
                    f"%json on line {line} of the grammar: {error.problem}", error.fix
                ) from None
        return end
    match = _NAME.match(source, place)
    if match is None:
        return place + 1
    if match[0] in _REFUSED_OPTIONS and _OPTION.match(source, match.end()):
        raise UnsupportedError(
            f"Line {_line(source, place)} of the grammar uses the option {match[0]}, which is not supported.",
            _REFUSED_OPTIONS[match[0]],
        )
    return match.end()


def _embedded(source: str, place: int) -> tuple[Any, int]:
    start = place
    while start < len(source) and source[start].isspace():
        start += 1
    try:
        return json.JSONDecoder().raw_decode(source, start)
    except JSONDecodeError as error:
        reason = f"{error.msg} on line {error.lineno}"
        raise GrammarError(f"The JSON within the grammar is not valid: {reason}.", "Correct it.") from None
    except (ValueError, RecursionError) as error:
        problem = f"The JSON on line {_line(source, place)} of the grammar cannot be read: {clip(error)}."
        raise GrammarError(problem, "Make it smaller or flatter.") from None


def _line(source: str, place: int) -> int:
    return source.count("\n", 0, place) + 1
