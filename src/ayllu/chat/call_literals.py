"""Values out of a stream of characters: the literals of tool calls, read as they arrive.

Every reader is a generator that pauses when the text so far runs out and goes on when more is pushed. There
is one code path for streamed and whole text, so the two cannot disagree; nothing is read twice, so time is
linear; nothing is evaluated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]

MAX_DEPTH = 64
MAX_NAME = 128
MAX_NUMBER = 64

_BLANKS = re.compile(r"\s+")
_PLAIN_STRING = re.compile(r"[^\"'\\]+")
_NAME_TAIL = re.compile(r"[\w-]+")
_NUMBER_TAIL = re.compile(r"[\w.+-]+", re.ASCII)
_INTEGER = re.compile(r"[+-]?\d[\d_]*", re.ASCII)
_FLOAT = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
_SIMPLE_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v"}
_OCTAL = "01234567"
_CODE_ESCAPES = {"x": 2, "u": 4, "U": 8}


class NotACall(Exception):
    """The text under the reader is not a tool call, or has stopped being one."""


class CharacterStream:
    """Text that arrives in pieces. `keep` starts remembering what is consumed, for giving it back as text.

    `steps` counts the characters looked at or consumed: the work done, for tests of linear time.
    """

    def __init__(self) -> None:
        self._chunk = ""
        self._place = 0
        self._closed = False
        self._kept: list[str] = []
        self._kept_from: int | None = None
        self.steps = 0

    def feed(self, text: str) -> None:
        """The next piece. The one before has been consumed: readers pause only at its end."""
        if self._kept_from is not None:
            self._kept.append(self._chunk[self._kept_from :])
            self._kept_from = 0
        self._chunk, self._place = text, 0

    def close(self) -> None:
        """No more text will come."""
        self._closed = True

    def keep(self) -> None:
        """Remember everything consumed from here on."""
        self._kept, self._kept_from = [], self._place

    def kept(self) -> str:
        """What was consumed since `keep`; remembering ends."""
        if self._kept_from is None:
            return ""
        text = "".join([*self._kept, self._chunk[self._kept_from : self._place]])
        self._kept, self._kept_from = [], None
        return text

    def peek(self) -> Reading[str]:
        """The next character, '' at the end of all text."""
        self.steps += 1
        while self._place == len(self._chunk):
            if self._closed:
                return ""
            yield
        return self._chunk[self._place]

    def advance(self) -> None:
        """Consume the character last peeked at."""
        self.steps += 1
        self._place += 1

    def run(self, pattern: re.Pattern[str], limit: int | None = None) -> str:
        """Consume what `pattern` matches here within the piece at hand (perhaps nothing)."""
        end = len(self._chunk) if limit is None else min(len(self._chunk), self._place + limit)
        match = pattern.match(self._chunk, self._place, end)
        if match is None:
            return ""
        self._place = match.end()
        self.steps += len(match[0])
        return match[0]

    def run_all(self, pattern: re.Pattern[str], limit: int | None = None) -> Reading[str]:
        """Consume what `pattern`, a repeated character class, matches here, across pieces.

        Raises NotACall beyond `limit` characters.
        """
        parts: list[str] = []
        left = limit
        while True:
            yield from self.peek()
            part = self.run(pattern, left)
            if not part:
                break
            parts.append(part)
            if left is not None:
                left -= len(part)
                if left <= 0:
                    raise NotACall
        return "".join(parts)

    def expect(self, text: str) -> Reading[None]:
        """Consume exactly `text`, else raise NotACall at the first other character."""
        for wanted in text:
            if (yield from self.peek()) != wanted:
                raise NotACall
            self.advance()


def read_blanks(stream: CharacterStream) -> Reading[str]:
    """Consume white space."""
    return (yield from stream.run_all(_BLANKS))


def read_name(stream: CharacterStream) -> Reading[str]:
    """A function's or argument's name: letters, digits, '_' and '-', dotted parts allowed."""
    name = ""
    while True:
        first = yield from stream.peek()
        if not (first.isalpha() or first == "_"):
            raise NotACall
        name += yield from stream.run_all(_NAME_TAIL, MAX_NAME)
        if (yield from stream.peek()) != "." or len(name) > MAX_NAME:
            break
        stream.advance()
        name += "."
    return name


def read_value(stream: CharacterStream, *, json: bool, depth: int = 0) -> Reading[object]:
    """One literal: string, number, true/false/null in either spelling, list, or object with string keys.

    Python's and JSON's literals are both accepted everywhere; `json` only decides what a backslash before an
    ordinary character means. Tuples become lists. Raises NotACall, also beyond MAX_DEPTH levels.
    """
    yield from read_blanks(stream)
    first = yield from stream.peek()
    if first in ("'", '"'):
        return (yield from read_string(stream, json=json))
    if first in ("[", "(", "{"):
        if depth >= MAX_DEPTH:
            raise NotACall
        if first == "{":
            return (yield from _read_mapping(stream, json=json, depth=depth + 1))
        return (yield from _read_sequence(stream, "]" if first == "[" else ")", json=json, depth=depth + 1))
    if first.isalpha():
        word = yield from stream.run_all(_NAME_TAIL, MAX_NAME)
        if word not in _WORDS:
            raise NotACall
        return _WORDS[word]
    return _number((yield from stream.run_all(_NUMBER_TAIL, MAX_NUMBER)))


def read_string(stream: CharacterStream, *, json: bool) -> Reading[str]:
    """A quoted string, tripled quotes included. Line breaks inside are tolerated: models write them."""
    quote = yield from stream.peek()
    stream.advance()
    closing = 1
    if (yield from stream.peek()) == quote:
        stream.advance()
        if json or (yield from stream.peek()) != quote:
            return ""
        stream.advance()
        closing = 3
    parts: list[str] = []
    seen = 0
    while seen < closing:
        character = yield from stream.peek()
        if character == quote:
            stream.advance()
            seen += 1
            continue
        parts.append(quote * seen)
        seen = 0
        if character == "":
            raise NotACall
        if character == "\\":
            stream.advance()
            parts.append((yield from _read_escape(stream, json=json)))
        elif character in ("'", '"'):
            stream.advance()
            parts.append(character)
        else:
            parts.append(stream.run(_PLAIN_STRING))
    return _without_surrogates("".join(parts))


def _read_escape(stream: CharacterStream, *, json: bool) -> Reading[str]:
    character = yield from stream.peek()
    if character == "":
        raise NotACall
    stream.advance()
    if character in _SIMPLE_ESCAPES:
        return _SIMPLE_ESCAPES[character]
    if character in _CODE_ESCAPES:
        digits = ""
        for _ in range(_CODE_ESCAPES[character]):
            digit = yield from stream.peek()
            if digit == "" or digit not in "0123456789abcdefABCDEF":
                raise NotACall
            stream.advance()
            digits += digit
        code = int(digits, 16)
        if code > 0x10FFFF:
            raise NotACall
        return chr(code)
    if character in _OCTAL:
        digits = character
        while len(digits) < 3 and (digit := (yield from stream.peek())) and digit in _OCTAL:
            stream.advance()
            digits += digit
        return chr(int(digits, 8))
    if character == "\n":
        return ""
    if json or character in "\\'\"":
        return character
    return "\\" + character


def _without_surrogates(text: str) -> str:
    """Surrogate pairs joined, lone ones replaced: arguments must survive UTF-8."""
    if not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_sequence(stream: CharacterStream, closing: str, *, json: bool, depth: int) -> Reading[object]:
    """A list or tuple; parentheses around one value without a comma are only parentheses."""
    stream.advance()
    values: list[object] = []
    commas = 0
    while True:
        yield from read_blanks(stream)
        if (yield from stream.peek()) == closing:
            stream.advance()
            return values[0] if closing == ")" and len(values) == 1 and not commas else values
        values.append((yield from read_value(stream, json=json, depth=depth)))
        commas += yield from read_separator(stream, closing)


def _read_mapping(stream: CharacterStream, *, json: bool, depth: int) -> Reading[dict[str, object]]:
    stream.advance()
    values: dict[str, object] = {}
    while True:
        yield from read_blanks(stream)
        character = yield from stream.peek()
        if character == "}":
            stream.advance()
            return values
        if character not in ("'", '"'):
            raise NotACall
        key = yield from read_string(stream, json=json)
        yield from read_blanks(stream)
        yield from stream.expect(":")
        values[key] = yield from read_value(stream, json=json, depth=depth)
        yield from read_separator(stream, "}")


def read_separator(stream: CharacterStream, closing: str) -> Reading[bool]:
    """Consume a comma if there is one; nothing else may stand here but `closing`, which is left."""
    yield from read_blanks(stream)
    character = yield from stream.peek()
    if character == ",":
        stream.advance()
        return True
    if character != closing:
        raise NotACall
    return False


def literal(text: str, *, json: bool) -> object:
    """The one literal that `text` holds. Raises NotACall for anything else."""
    stream = CharacterStream()
    stream.feed(text)
    stream.close()

    def read() -> Reading[object]:
        value = yield from read_value(stream, json=json)
        yield from read_blanks(stream)
        if (yield from stream.peek()):
            raise NotACall
        return value

    try:
        next(read())
    except StopIteration as done:
        return done.value
    raise AssertionError("a closed stream never waits")


def _number(text: str) -> int | float:
    if _INTEGER.fullmatch(text):
        try:
            return int(text)
        except ValueError as error:
            raise NotACall from error
    if not _FLOAT.fullmatch(text):
        raise NotACall
    value = float(text)
    if not math.isfinite(value):
        raise NotACall
    return value
