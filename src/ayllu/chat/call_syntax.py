"""The syntaxes of tool calls, each read from a stream of characters until it is complete or cannot be one.

The readers know what a call looks like and which names are on offer; `ayllu.chat.toolcalls` knows where in an
answer one may begin, and what happens to the text around it.
"""

from __future__ import annotations

import re
from typing import Any

from ayllu.chat.call_literals import (
    CharacterStream,
    NotACall,
    Reading,
    literal,
    read_blanks,
    read_name,
    read_separator,
    read_string,
    read_value,
)
from ayllu.chat.messages import ToolCall

_CALL_KEYS = frozenset({"type", "id", "name", "function", "parameters", "arguments"})
_CALL_FENCES = frozenset({"", "json", "tool_call", "tool_calls", "tool_code"})
_LANGUAGE = re.compile(r"[\w+-]+")


class CallReader:
    """Reads calls of the functions in `known` (any function for None) off a stream.

    Every reader starts behind what announced it, consumes the call, and raises NotACall at the first
    character that cannot belong to one.
    """

    def __init__(self, stream: CharacterStream, known: frozenset[str] | None) -> None:
        self._stream = stream
        self._known = known

    def _allowed(self, name: str) -> str:
        if self._known is not None and name not in self._known:
            raise NotACall
        return name

    def listed(self) -> Reading[list[ToolCall]]:
        """`[f(a=1), g()]` or `[{...}, {...}]`."""
        stream = self._stream
        yield from stream.expect("[")
        calls: list[ToolCall] = []
        while True:
            yield from read_blanks(stream)
            character = yield from stream.peek()
            if character == "]" and calls:
                stream.advance()
                return calls
            if character == "{":
                calls += yield from self.single_object()
            else:
                calls.append((yield from self._read_python_call()))
            yield from read_separator(stream, "]")

    def _read_python_call(self) -> Reading[ToolCall]:
        name = self._allowed((yield from read_name(self._stream)))
        return ToolCall(name, (yield from self._read_arguments()))

    def _read_arguments(self) -> Reading[dict[str, Any]]:
        """`(a=1, b="x")`: keyword arguments only, each once."""
        stream = self._stream
        yield from read_blanks(stream)
        yield from stream.expect("(")
        arguments: dict[str, Any] = {}
        while True:
            yield from read_blanks(stream)
            if (yield from stream.peek()) == ")":
                stream.advance()
                return arguments
            name = yield from read_name(stream)
            if name in arguments:
                raise NotACall
            yield from read_blanks(stream)
            yield from stream.expect("=")
            arguments[name] = yield from read_value(stream, json=False)
            yield from read_separator(stream, ")")

    def builtin(self) -> Reading[list[ToolCall]]:
        """`tool.call(query="...")` at the start of a line: a call of `tool`."""
        name = yield from read_name(self._stream)
        if not name.endswith(".call"):
            raise NotACall
        name = self._allowed(name.removesuffix(".call"))
        return [ToolCall(name, (yield from self._read_arguments()))]

    def single_object(self) -> Reading[list[ToolCall]]:
        """`{"name": ..., "parameters": {...}}` and its variants; another key shows that it is just JSON."""
        return [(yield from self._read_object(nested=False))]

    def _read_object(self, *, nested: bool) -> Reading[ToolCall]:
        stream = self._stream
        yield from stream.expect("{")
        fields: dict[str, Any] = {}
        inner: ToolCall | None = None
        while True:
            yield from read_blanks(stream)
            character = yield from stream.peek()
            if character == "}" and fields:
                stream.advance()
                break
            if character not in ("'", '"'):
                raise NotACall
            key = yield from read_string(stream, json=True)
            if key not in _CALL_KEYS or key in fields:
                raise NotACall
            yield from read_blanks(stream)
            yield from stream.expect(":")
            yield from read_blanks(stream)
            if key == "function" and not nested and (yield from stream.peek()) == "{":
                inner = yield from self._read_object(nested=True)
                fields[key] = None
            else:
                fields[key] = yield from read_value(stream, json=True)
                self._check_field(key, fields[key])
            yield from read_separator(stream, "}")
        return inner or self._object_call(fields)

    def _check_field(self, key: str, value: object) -> None:
        if key in ("name", "function"):
            if not isinstance(value, str) or not value:
                raise NotACall
            self._allowed(value)
        elif key == "type" and value != "function":
            raise NotACall

    def _object_call(self, fields: dict[str, Any]) -> ToolCall:
        name = fields.get("name", fields.get("function"))
        if not isinstance(name, str) or ("name" in fields and "function" in fields):
            raise NotACall
        given = [key for key in ("parameters", "arguments") if key in fields]
        if not given and "type" not in fields and self._known is None:
            raise NotACall
        arguments = fields[given[0]] if given else {}
        if isinstance(arguments, str):
            arguments = literal(arguments, json=True) if arguments.strip() else {}
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict) or len(given) > 1:
            raise NotACall
        identifier = fields.get("id")
        return ToolCall(name, arguments, identifier if isinstance(identifier, str) else "")

    def _block(self) -> Reading[list[ToolCall]]:
        """One or more lists or objects, blanks, commas or semicolons between them."""
        stream = self._stream
        calls: list[ToolCall] = []
        while True:
            yield from read_blanks(stream)
            character = yield from stream.peek()
            if character == "[":
                calls += yield from self.listed()
            elif character == "{":
                calls += yield from self.single_object()
            elif character and character in ",;" and calls:
                stream.advance()
            elif calls:
                return calls
            else:
                raise NotACall

    def tagged(self) -> Reading[list[ToolCall]]:
        """The inside of `<tool_call>`."""
        calls = yield from self._block()
        yield from self._read_closing("</tool_call>")
        return calls

    def function(self) -> Reading[list[ToolCall]]:
        """What follows `<function=`."""
        name = self._allowed((yield from read_name(self._stream)))
        yield from self._stream.expect(">")
        yield from read_blanks(self._stream)
        if (yield from self._stream.peek()) != "{":
            raise NotACall
        arguments = yield from read_value(self._stream, json=True)
        yield from read_blanks(self._stream)
        yield from self._read_closing("</function>")
        return [ToolCall(name, arguments if isinstance(arguments, dict) else {})]

    def _read_closing(self, tag: str) -> Reading[None]:
        """`tag`, or the end of the answer: models stop right behind the arguments."""
        if (yield from self._stream.peek()):
            yield from self._stream.expect(tag)

    def region(self) -> Reading[list[ToolCall]]:
        """Calls, then the end of the region, whose marker is left to be read (and dropped) as any other."""
        yield from read_blanks(self._stream)
        character = yield from self._stream.peek()
        if character in ("[", "{"):
            calls = yield from self._block()
        else:
            calls = yield from self.builtin()
        yield from read_blanks(self._stream)
        if (yield from self._stream.peek()) not in ("", "<"):
            raise NotACall
        return calls

    def fenced(self) -> Reading[list[ToolCall]]:
        """What follows three backquotes: perhaps a language, calls, three backquotes."""
        language = yield from self._stream.run_all(_LANGUAGE, 32)
        if language not in _CALL_FENCES:
            raise NotACall
        calls = yield from self._block()
        yield from self._read_closing("```")
        return calls
