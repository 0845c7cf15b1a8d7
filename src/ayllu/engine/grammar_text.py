"""Text of grammars in the library's Lark dialect: names of rules, quotes, terminals that all grammars share.

Everything a small model could write without end has a bound here: one space at most behind a comma or a
colon, no other white space, numbers of at most 41 characters that stay finite, names that a schema leaves
open of at most 64.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from ayllu.errors import GrammarError, clip, one_line

MAX_SOURCE_CHARACTERS = 4 << 20

_PLACE = "// at "

_WHOLE = "(0|[1-9][0-9]{0,18})"
_FRACTION = r"(\.[0-9]{1,16})?([eE][+-]?[0-9]{1,2})?"
_TERMINALS = {
    "COMMA": "/, ?/",
    "COLON": "/: ?/",
    "STRING": r'/"([^"\\\x00-\x1f\x7f]|\\["\\bfnrt])*"/',
    "NAME": r'/"([^"\\\x00-\x1f\x7f]|\\["\\bfnrt]){0,64}"/',
    "QUOTED": r"/'([^'\\\x00-\x1f\x7f]|\\['\\nrt])*'/",
    "INTEGER": f"/-?{_WHOLE}/",
    "NUMBER": f"/-?{_WHOLE}{_FRACTION}/",
    "COUNT": f"/{_WHOLE}/",
    "AMOUNT": f"/{_WHOLE}{_FRACTION}/",
    "POSITIVE": r"AMOUNT & ~/0(\.0*)?([eE][+-]?[0-9]*)?/",
}
_NEEDS = {"POSITIVE": "AMOUNT"}


def literal(text: str) -> str:
    """A Lark string of exactly `text`. `<` is escaped, so that it never looks like a special token's name."""
    quoted = json.dumps(text)
    return quoted.replace("<", "\\u003c").replace("\x7f", "\\u007f")


def repeated(expression: str, least: int, most: int | None) -> str:
    """`least` to `most` (None: any number) of `expression` in a row."""
    if most == 0:
        return ""  # the library knows no count of 0
    return f"({expression}){{{least},{'' if most is None else most}}}"


def embedded_json(value: Mapping[str, Any]) -> str:
    """A schema behind `%json`, in one line and pure ASCII."""
    return json.dumps(value).replace("<", "\\u003c").replace("\x7f", "\\u007f")


def embedded_grammar(lark: str) -> str:
    """A user's grammar in the library's list form, which tells it from the grammars written here."""
    return json.dumps({"grammars": [{"lark_grammar": lark}]})


class LarkWriter:
    """Collects the rules of one grammar. What it returns are expressions, to be put together freely."""

    def __init__(self) -> None:
        self._rules: list[str] = []
        self._used: set[str] = set()
        self._known: dict[tuple[str, str], str] = {}
        self._promised: list[tuple[str, Callable[[], str], str]] = []
        self._count = 0

    def rule(self, body: str, path: str = "", *, lazy: bool = False) -> str:
        """The name of a rule with this body. `path` is where in the schema an error about it lies. A lazy
        rule is one of terminals, and ends where it first can."""
        return self._once("n", body, path, "[lazy]" if lazy else "")

    def terminal(self, body: str) -> str:
        """The name of a terminal: one regular expression, matched as far as it goes."""
        return self._once("T", body, "")

    def shared(self, name: str) -> str:
        """A terminal that every grammar may use, by name (`COMMA`, `STRING`, ...)."""
        self._used.add(name)
        return name

    def source(self, start: str) -> str:
        """The grammar whose answers are `start`. Raises GrammarError if it is too long to be compiled."""
        while self._promised:
            name, body, path = self._promised.pop()
            self._add(name, body(), path)
        used = sorted(self._used | {_NEEDS[name] for name in self._used if name in _NEEDS})
        terminals = [f"{name}: {_TERMINALS[name]}" for name in used]
        source = "\n".join(["%llguidance {}", f"start: {start}", *self._rules, *terminals, ""])
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise GrammarError(
                f"The grammar is too complex: it takes {len(source)} characters of {MAX_SOURCE_CHARACTERS}.",
                "Use fewer properties and alternatives.",
            )
        return source

    def promise(self, body: Callable[[], str], path: str) -> str:
        """The name of a rule whose body is asked for last: rules may refer to themselves, at any depth."""
        name = f"n{self._next()}"
        self._promised.append((name, body, path))
        return name

    def _next(self) -> int:
        self._count += 1
        return self._count

    def _once(self, kind: str, body: str, path: str, options: str = "") -> str:
        known = (kind + options, body)
        if known not in self._known:
            self._known[known] = name = f"{kind}{self._next()}"
            self._add(name + options, body, path)
        return self._known[known]

    def _add(self, name: str, body: str, path: str) -> None:
        if path:
            self._rules.append(f"{_PLACE}{one_line(clip(path, 300))}")
        self._rules.append(f"{name}: {body}")


def place_in_source(source: str, line: int) -> str:
    """The path in the schema that line `line` (from 1) of a written grammar came from, '' if none is told."""
    for text in reversed(source.split("\n")[:line]):
        if text.startswith(_PLACE):
            return text.removeprefix(_PLACE)
    return ""
