"""Tool calls out of a model's answer, while it streams: every syntax the families are known to emit.

`[f(a=1), g()]`, JSON objects alone, listed, fenced or between `<|python_start|>` and `<|python_end|>`,
`<function=f>{...}</function>`, `<tool_call>{...}</tool_call>`, `search.call(query="...")`, and code for an
interpreter. What turns out not to be a call comes back as the text it was. Nothing is ever executed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ayllu.chat.call_literals import CharacterStream, NotACall, Reading, read_blanks
from ayllu.chat.call_syntax import CallReader
from ayllu.chat.messages import ToolCall, ToolDefinition

INTERPRETER_NAMES = ("python", "code_interpreter", "ipython")

_REGION_STARTS = ("<|python_start|>", "<|python_tag|>")
_TURN_ENDS = ("<|eom|>", "<|eot|>", "<|eom_id|>", "<|eot_id|>")
_REGION_ENDS = ("<|python_end|>", *_TURN_ENDS)
_TAGS = (*_REGION_STARTS, *_REGION_ENDS, "<tool_call>", "<function=")
_TAG_PREFIXES = frozenset(tag[:length] for tag in _TAGS for length in range(1, len(tag) + 1))

_BLANKS = re.compile(r"\s+")
_PROSE = re.compile(r"[^\[{<`\n]+")
_FENCED = re.compile(r"[^<`]+")
_CODE = re.compile(r"[^<]+")


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
        self._calls_of = CallReader(self._stream, self._known)
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
                yield from self._attempt(self._calls_of.listed)
            elif character == "{":
                yield from self._attempt(self._calls_of.single_object)
            elif character == "`":
                yield from self._read_fence()
            elif blanks := stream.run(_BLANKS):
                self._say(blanks)
            elif character in ",;" and self._after_call and not "".join(self._pending).strip():
                # A separator between two calls: kept back like white space.
                stream.advance()
                self._pending.append(character)
            elif self._line_start and (character.isalpha() or character == "_"):
                yield from self._attempt(self._calls_of.builtin)
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
            yield from self._attempt(self._calls_of.tagged, consumed=tag)
        elif tag == "<function=":
            yield from self._attempt(self._calls_of.function, consumed=tag)
        else:
            self._say(tag)

    def _read_region(self) -> Reading[None]:
        """What follows `<|python_start|>`: calls, code, or text that a template put there."""
        self._line_start = True
        interpreter = self._interpreter()
        if interpreter is None:
            return
        self._stream.keep()
        try:
            calls = yield from self._calls_of.region()
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
        elif not (yield from self._attempt(self._calls_of.fenced, consumed=quotes)):
            yield from self._pass_fenced()

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
