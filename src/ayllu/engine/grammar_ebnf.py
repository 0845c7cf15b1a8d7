"""llama.cpp's grammar dialect (GBNF: `root ::= "a" | [0-9]+`), turned into the library's Lark.

Rules that do not refer back to themselves become terminals, as the library's lexer needs: a terminal takes as
much text as it can, so a rule must not rely on a part of itself being left for the next one. What has no
counterpart is refused by its line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from ayllu.engine.grammar_text import literal
from ayllu.errors import GrammarError, UnsupportedError, clip, did_you_mean

MAX_EBNF_CHARACTERS = 1 << 17
MAX_GROUP_DEPTH = 64
MAX_REPEATS = 1_000_000

_BLANKS = re.compile(r"(?:[ \t]|#[^\n]*)*")
_BLANKS_AND_LINES = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BEFORE_BAR = re.compile(r"(?:(?:[ \t\r\n]|#[^\n]*)*(?=\|))?")
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_DEFINITION = re.compile(r"([A-Za-z0-9_-]+)[ \t]*::=")
_REPEAT = re.compile(r"\{\s*(\d{1,7})\s*(?:(,)\s*(\d{1,7})?\s*)?\}", re.ASCII)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-", "^": "^"}
_CODES = {"x": 2, "u": 4, "U": 8}
_HEX = frozenset("0123456789abcdefABCDEF")


@dataclass
class _Rule:
    """A rule: its body with `{name}` left open for the rules it uses, and their names."""

    line: int
    parts: list[str] = field(default_factory=list)
    uses: list[str] = field(default_factory=list)


def ebnf_to_lark(source: str) -> str:
    """The Lark grammar of the same language.

    Raises GrammarError (not well formed, too large, no `root`) and UnsupportedError (tokens by name or id).
    """
    if len(source) > MAX_EBNF_CHARACTERS:
        raise GrammarError(
            f"The grammar has more than {MAX_EBNF_CHARACTERS} characters.", "Shorten it, or write it as Lark."
        )
    rules = _Parser(source).rules()
    if "root" not in rules:
        hint = did_you_mean("root", rules)
        raise GrammarError(f"The grammar has no rule root.{hint}", "Add root ::= ... as the start.")
    for rule in rules.values():
        for name in rule.uses:
            if name not in rules:
                hint = did_you_mean(name, rules)
                raise _wrong(rule.line, f"there is no rule {clip(repr(name))}.{hint}")
    terminal = _terminals(rules)
    names = {
        name: f"T{number}" if name in terminal else f"n{number}" for number, name in enumerate(rules, start=1)
    }
    lines = ["%llguidance {}", f"start: {names['root']}"]
    for name, rule in rules.items():
        used = iter(rule.uses)
        body = "".join(part or names[next(used)] for part in rule.parts)
        lines.append(f"{names[name]}: {body}")
    return "\n".join([*lines, ""])


def _terminals(rules: dict[str, _Rule]) -> set[str]:
    """Rules that reach no rule which reaches itself: those are regular expressions."""
    terminal: set[str] = set()
    users: dict[str, list[str]] = {}
    open_uses = {}
    for name, rule in rules.items():
        distinct = set(rule.uses)
        open_uses[name] = len(distinct)
        for used in distinct:
            users.setdefault(used, []).append(name)
    waiting = [name for name, count in open_uses.items() if count == 0]
    while waiting:
        name = waiting.pop()
        terminal.add(name)
        for user in users.get(name, ()):
            open_uses[user] -= 1
            if open_uses[user] == 0:
                waiting.append(user)
    return terminal


def _wrong(line: int, problem: str) -> GrammarError:
    return GrammarError(f"Line {line} of the grammar: {problem.rstrip('.')}.", "Correct it.")


class _Parser:
    """Reads GBNF from front to back, every character once. An empty string in `parts` is a rule's name."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._place = 0

    def rules(self) -> dict[str, _Rule]:
        found: dict[str, _Rule] = {}
        self._skip(_BLANKS_AND_LINES)
        while self._place < len(self._source):
            match = _DEFINITION.match(self._source, self._place)
            if match is None:
                raise self._error("expected a rule, name ::= body")
            if match[1] in found:
                raise self._error(f"there are two rules {clip(repr(match[1]))}")
            rule = found[match[1]] = _Rule(self._line())
            self._place = match.end()
            self._skip(_BLANKS_AND_LINES)
            self._alternatives(rule, depth=0)
            if self._place < len(self._source) and self._peek() not in "\r\n":
                raise self._error(f"unexpected {self._peek()!r}")
            self._skip(_BLANKS_AND_LINES)
        return found

    def _alternatives(self, rule: _Rule, depth: int) -> None:
        if depth > MAX_GROUP_DEPTH:
            raise self._error(f"groups are nested deeper than {MAX_GROUP_DEPTH}")
        blanks = _BLANKS_AND_LINES if depth else _BLANKS
        while True:
            empty = True
            while self._at_item():
                empty = False
                self._item(rule, depth)
                self._skip(blanks)
                self._repetition(rule)
                rule.parts.append(" ")
                self._skip(blanks)
            if empty:
                rule.parts.append('""')
            self._skip(_BEFORE_BAR)
            if self._peek() != "|":
                return
            self._place += 1
            rule.parts.append(" | ")
            self._skip(_BLANKS_AND_LINES)

    def _at_item(self) -> bool:
        return self._peek() in set('"[(.<') or _NAME.match(self._source, self._place) is not None

    def _item(self, rule: _Rule, depth: int) -> None:
        match self._peek():
            case '"':
                rule.parts.append(literal(self._literal()))
            case "[":
                rule.parts.append(self._class())
            case ".":
                self._place += 1
                rule.parts.append("/(?s:.)/")
            case "(":
                self._place += 1
                rule.parts.append("(")
                self._skip(_BLANKS_AND_LINES)
                self._alternatives(rule, depth + 1)
                if self._peek() != ")":
                    raise self._error("expected )")
                self._place += 1
                rule.parts.append(")")
            case "<":
                raise UnsupportedError(
                    f"Line {self._line()} of the grammar names a token, which is not supported.",
                    "Describe text only; put it into quotes if it is meant as text.",
                )
            case _:
                name = _NAME.match(self._source, self._place)
                assert name is not None
                self._place = name.end()
                rule.uses.append(name[0])
                rule.parts.append("")

    def _repetition(self, rule: _Rule) -> None:
        sign = self._peek()
        if sign and sign in "*+?":
            self._place += 1
            rule.parts.append(sign)
        elif sign == "{":
            match = _REPEAT.match(self._source, self._place)
            if match is None:
                raise self._error("expected a count such as {2}, {2,} or {2,4}")
            least = int(match[1])
            most = least if match[2] is None else int(match[3]) if match[3] else None
            if max(least, most or 0) > MAX_REPEATS or (most is not None and most < least):
                raise self._error(f"the count {match[0]} is out of range")
            self._place = match.end()
            if most == 0:
                raise self._error("a count of 0 writes nothing")
            rule.parts.append(f"{{{least},{'' if most is None else most}}}")

    def _literal(self) -> str:
        self._place += 1
        return "".join(self._characters('"'))

    def _class(self) -> str:
        """A character class as a regular expression."""
        self._place += 1
        negated = self._peek() == "^"
        self._place += negated
        body: list[str] = []
        members = self._characters("]")
        for character in members:
            body.append(f"\\x{{{ord(character):x}}}")
            if self._peek() == "-" and self._source[self._place + 1 : self._place + 2] != "]":
                self._place += 1
                last = next(members, "")
                if not last or last < character:
                    raise self._error("a range of characters ends before it begins")
                body.append(f"-\\x{{{ord(last):x}}}")
        if not body:
            raise self._error("a class of characters is empty")
        return f"/[{'^' if negated else ''}{''.join(body)}]/"

    def _characters(self, end: str) -> Iterator[str]:
        """Characters up to `end`, which is consumed, escapes undone."""
        while (character := self._peek()) != end:
            if not character or character == "\n":
                raise self._error(f"expected {end} on this line")
            self._place += 1
            yield self._escape() if character == "\\" else character
        self._place += 1

    def _escape(self) -> str:
        character = self._peek()
        self._place += 1
        if character in _ESCAPES:
            return _ESCAPES[character]
        if character not in _CODES or not character:
            raise self._error(f"there is no escape \\{character}")
        digits = self._source[self._place : self._place + _CODES[character]]
        if len(digits) != _CODES[character] or not _HEX.issuperset(digits):
            raise self._error(f"\\{character} wants {_CODES[character]} hexadecimal digits")
        self._place += len(digits)
        code = int(digits, 16)
        if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
            raise self._error(f"\\{character}{digits} is no character")
        return chr(code)

    def _skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self._source, self._place)
        assert match is not None
        self._place = match.end()

    def _peek(self) -> str:
        return self._source[self._place : self._place + 1]

    def _line(self) -> int:
        return self._source.count("\n", 0, self._place) + 1

    def _error(self, problem: str) -> GrammarError:
        return _wrong(self._line(), problem)
