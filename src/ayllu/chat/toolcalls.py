"""Tool calls out of a model's answer, while it streams: every syntax the families are known to emit.

`[f(a=1), g()]`, JSON objects alone, listed, fenced or between `<|python_start|>` and `<|python_end|>`,
`<function=f>{...}</function>`, `<tool_call>{...}</tool_call>`, `search.call(query="...")`, and code for an
interpreter. What turns out not to be a call comes back as the text it was. Nothing is ever executed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from ayllu.chat.messages import ToolCall, ToolDefinition

INTERPRETER_NAMES = ("python", "code_interpreter", "ipython")

_REGION_STARTS = ("<|python_start|>", "<|python_tag|>")
_TURN_ENDS = ("<|eom|>", "<|eot|>", "<|eom_id|>", "<|eot_id|>")
_REGION_ENDS = ("<|python_end|>", *_TURN_ENDS)
_TAGS = (*_REGION_STARTS, *_REGION_ENDS, "<tool_call>", "<function=")
_TAG_PREFIXES = frozenset(tag[:length] for tag in _TAGS for length in range(1, len(tag) + 1))
_CALL_KEYS = frozenset({"type", "id", "name", "function", "parameters", "arguments"})
_CALL_FENCES = frozenset({"", "json", "tool_call", "tool_calls", "tool_code"})

_BLANKS = re.compile(r"\s+")
_PROSE = re.compile(r"[^\[{<`\n]+")
_FENCED = re.compile(r"[^<`]+")
_CODE = re.compile(r"[^<]+")
_LANGUAGE = re.compile(r"[\w+-]+")


@dataclass(frozen=True)
class TextDelta:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True)
class ToolCallReady:
    """A complete call, the `index`-th of this answer (from 0)."""

    index: int
    call: ToolCall


Event = TextDelta | ToolCallReady


class ToolCallParser:
    """Push the decoded answer piece by piece; text comes back as soon as it cannot be part of a call.

    `tools` are the functions on offer: only their names become calls, so with an empty sequence everything
    is text. None means that the offer is unknown, and every well-formed call counts.

    Rules where the syntaxes leave a choice: a list or object that fails anywhere stays text as a whole.
    Reading goes on behind the place where it failed, so time is linear. Code after `<|python_start|>` is a
    call of the interpreter on offer (`python`, `code_interpreter` or `ipython`; `python` when the offer is
    unknown) with the argument `code`, but text when a JSON call follows `<|python_end|>`. A fenced block that
    is no call is passed through, calls inside it included. White space before a call and at the end after one
    is dropped, as are the markers of regions and turns.
    """

    def __init__(self, tools: Sequence[ToolDefinition] | None = None) -> None:
        self._known = None if tools is None else frozenset(tool.name for tool in tools)
        self._stream = CharacterStream()
        self._events: list[Event] = []
        self._pending: list[str] = []
        self._text: list[str] = []
        self._calls = 0
        self._after_call = False
        self._line_start = True
        self._reading = self._read_answer()
        self._finished = False

    @property
    def steps(self) -> int:
        """Characters looked at or consumed so far: the work done."""
        return self._stream.steps

    def push(self, text: str) -> list[Event]:
        """What is certain after `text`."""
        if self._finished:
            raise ValueError("push() after finish(): a parser reads one answer.")
        if text:
            self._stream.feed(text)
            next(self._reading)
        return self._take_events()

    def finish(self) -> list[Event]:
        """What is certain once the answer has ended."""
        if not self._finished:
            self._finished = True
            self._stream.close()
            next(self._reading, None)
            if not self._after_call:
                self._text += self._pending
        return self._take_events()

    def _take_events(self) -> list[Event]:
        self._flush_text()
        events, self._events = self._events, []
        return events

    def _flush_text(self) -> None:
        if self._text:
            self._events.append(TextDelta("".join(self._text)))
            self._text = []

    def _say(self, text: str) -> None:
        """Pass text on; white space waits, because next to a call it is dropped."""
        if not text:
            return
        line = text.rpartition("\n")
        self._line_start = (bool(line[1]) or self._line_start) and not line[2].strip()
        visible = text.rstrip()
        if visible:
            self._text += [*self._pending, visible]
            self._pending = []
            self._after_call = False
        if len(visible) < len(text):
            self._pending.append(text[len(visible) :])

    def _call(self, calls: list[ToolCall]) -> None:
        self._flush_text()
        self._pending = []
        for call in calls:
            self._events.append(ToolCallReady(self._calls, call))
            self._calls += 1
        self._after_call = self._line_start = True

    def _read_answer(self) -> Reading[None]:
        stream = self._stream
        while character := (yield from stream.peek()):
            if character == "<":
                yield from self._read_tag()
            elif character == "[":
                yield from self._attempt(self._read_list)
            elif character == "{":
                yield from self._attempt(self._read_object_call)
            elif character == "`":
                yield from self._read_fence()
            elif blanks := stream.run(_BLANKS):
                self._say(blanks)
            elif character in ",;" and self._after_call and not "".join(self._pending).strip():
                # A separator between two calls: kept back like white space.
                stream.advance()
                self._pending.append(character)
            elif self._line_start and (character.isalpha() or character == "_"):
                yield from self._attempt(self._read_builtin)
            else:
                self._say(stream.run(_PROSE))

    def _attempt(self, read: Callable[[], Reading[list[ToolCall]]], consumed: str = "") -> Reading[bool]:
        """Read calls, or pass `consumed` and all that `read` took on as text; says whether it was calls."""
        self._stream.keep()
        try:
            calls = yield from read()
        except NotACall:
            self._say(consumed + self._stream.kept())
            return False
        self._stream.kept()
        self._call(calls)
        return True

    def _allowed(self, name: str) -> str:
        if self._known is not None and name not in self._known:
            raise NotACall
        return name

    def _read_list(self) -> Reading[list[ToolCall]]:
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
                calls += yield from self._read_object_call()
            else:
                calls.append((yield from self._read_python_call()))
            yield from read_separator(stream, "]")

    def _read_python_call(self) -> Reading[ToolCall]:
        name = self._allowed((yield from read_name(self._stream)))
        return ToolCall(name, (yield from self._read_arguments()))

    def _read_arguments(self) -> Reading[dict[str, Any]]:
        """`(a=1, b="x")`: keyword arguments only, each once."""
        stream = self._stream
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

    def _read_builtin(self) -> Reading[list[ToolCall]]:
        """`tool.call(query="...")` at the start of a line: a call of `tool`."""
        name = yield from read_name(self._stream)
        if not name.endswith(".call"):
            raise NotACall
        name = self._allowed(name.removesuffix(".call"))
        return [ToolCall(name, (yield from self._read_arguments()))]

    def _read_object_call(self) -> Reading[list[ToolCall]]:
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

    def _read_block(self) -> Reading[list[ToolCall]]:
        """One or more lists or objects, blanks, commas or semicolons between them."""
        stream = self._stream
        calls: list[ToolCall] = []
        while True:
            yield from read_blanks(stream)
            character = yield from stream.peek()
            if character == "[":
                calls += yield from self._read_list()
            elif character == "{":
                calls += yield from self._read_object_call()
            elif character and character in ",;" and calls:
                stream.advance()
            elif calls:
                return calls
            else:
                raise NotACall

    def _match_tag(self) -> Reading[str]:
        """Consume as much of a known tag as stands here; the result is a tag if it is complete."""
        seen = ""
        while seen not in _TAGS:
            character = yield from self._stream.peek()
            if character == "" or seen + character not in _TAG_PREFIXES:
                break
            self._stream.advance()
            seen += character
        return seen

    def _read_tag(self) -> Reading[None]:
        tag = yield from self._match_tag()
        if tag in _REGION_STARTS:
            yield from self._read_region()
        elif tag in _REGION_ENDS:
            self._line_start = True
        elif tag == "<tool_call>":
            yield from self._attempt(self._read_tool_call, consumed=tag)
        elif tag == "<function=":
            yield from self._attempt(self._read_function, consumed=tag)
        else:
            self._say(tag)

    def _read_tool_call(self) -> Reading[list[ToolCall]]:
        calls = yield from self._read_block()
        yield from self._read_closing("</tool_call>")
        return calls

    def _read_function(self) -> Reading[list[ToolCall]]:
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

    def _read_region(self) -> Reading[None]:
        """What follows `<|python_start|>`: calls, code, or text that a template put there."""
        self._line_start = True
        interpreter = self._interpreter()
        if interpreter is None:
            return
        self._stream.keep()
        try:
            calls = yield from self._read_region_calls()
        except NotACall:
            yield from self._read_code(interpreter, self._stream.kept())
        else:
            self._stream.kept()
            self._call(calls)

    def _read_code(self, interpreter: str, first: str) -> Reading[None]:
        """The rest of a region that began with `first` and is no call: code, or text before a call."""
        stream = self._stream
        code = [first]
        end = ""
        while end not in _REGION_ENDS and (character := (yield from stream.peek())):
            if character == "<":
                end = yield from self._match_tag()
                if end not in _REGION_ENDS:
                    code.append(end)
            else:
                code.append(stream.run(_CODE))
        text = "".join(code)
        blanks = yield from read_blanks(stream)
        followed = (yield from stream.peek()) in ("{", "[")
        if not text.strip() or (end == "<|python_end|>" and followed):
            self._say(text + blanks)
            self._line_start = True
        else:
            self._call([ToolCall(interpreter, {"code": text.strip()})])
            self._say(blanks)

    def _read_region_calls(self) -> Reading[list[ToolCall]]:
        """Calls, then the end of the region, whose marker is left to be read (and dropped) as any other."""
        yield from read_blanks(self._stream)
        character = yield from self._stream.peek()
        if character in ("[", "{"):
            calls = yield from self._read_block()
        else:
            calls = yield from self._read_builtin()
        yield from read_blanks(self._stream)
        if (yield from self._stream.peek()) not in ("", "<"):
            raise NotACall
        return calls

    def _interpreter(self) -> str | None:
        if self._known is None:
            return INTERPRETER_NAMES[0]
        return next((name for name in INTERPRETER_NAMES if name in self._known), None)

    def _read_fence(self) -> Reading[None]:
        """Backquotes: a fenced call, a fenced block to pass through, or just backquotes."""
        stream = self._stream
        quotes = ""
        while len(quotes) < 3 and (yield from stream.peek()) == "`":
            stream.advance()
            quotes += "`"
        if len(quotes) < 3:
            self._say(quotes)
        elif not (yield from self._attempt(self._read_fenced_calls, consumed=quotes)):
            yield from self._pass_fenced()

    def _read_fenced_calls(self) -> Reading[list[ToolCall]]:
        language = yield from self._stream.run_all(_LANGUAGE, 32)
        if language not in _CALL_FENCES:
            raise NotACall
        calls = yield from self._read_block()
        yield from self._read_closing("```")
        return calls

    def _pass_fenced(self) -> Reading[None]:
        """The rest of a fenced block, to its closing backquotes, as text; markers are still dropped."""
        stream = self._stream
        count = 0
        while count < 3 and (character := (yield from stream.peek())):
            if character == "`":
                stream.advance()
                count += 1
                self._say("`")
                continue
            count = 0
            if character == "<":
                tag = yield from self._match_tag()
                if tag not in (*_REGION_STARTS, *_REGION_ENDS):
                    self._say(tag)
            else:
                self._say(stream.run(_FENCED))


def parse_tool_calls(
    text: str, tools: Sequence[ToolDefinition] | None = None
) -> tuple[str, tuple[ToolCall, ...]]:
    """The text and the calls of a whole answer; see `ToolCallParser` for the rules."""
    parser = ToolCallParser(tools)
    events = parser.push(text) + parser.finish()
    said = "".join(event.text for event in events if isinstance(event, TextDelta))
    return said, tuple(event.call for event in events if isinstance(event, ToolCallReady))
