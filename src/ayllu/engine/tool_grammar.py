"""Tool calls that cannot go wrong: a grammar of the calls a chat format writes, for the tools on offer.

Where a call must come, the answer is nothing but calls. Where it may come, the answer is free until a call
begins, and from there follows the tool's schema to its end. What the grammar writes, the format's own
`tool_call_parser` reads back as exactly those calls, whether or not control tokens are shown to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ayllu.chat.formats import CallLayout, ChatFormat
from ayllu.chat.tokenizer import Tokenizer
from ayllu.engine.grammar_nodes import Nothing, Object, SchemaTree
from ayllu.engine.grammar_reader import read_schema
from ayllu.engine.grammar_text import LarkWriter, literal, repeated
from ayllu.engine.grammar_writer import SchemaWriter
from ayllu.engine.prepared import GrammarSpec
from ayllu.engine.requests import ToolUse
from ayllu.engine.tool_parameters import normalised_parameters

MAX_PARALLEL_CALLS = 16
"""Calls in one answer. A small model that may repeat a call may never stop."""

_PYTHON_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_FUNCTION_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*(\.[A-Za-z_][A-Za-z0-9_-]*)*")
_LONGEST_NAME = 120
_BLANKS = r"[ \t\r\n]{0,4}"
_OPEN_OBJECT = '{"name": "'


def tool_grammar(chat_format: ChatFormat, tool_use: ToolUse, tokenizer: Tokenizer) -> GrammarSpec | None:
    """The grammar of an answer that may or must call tools; None where no tool may be called.

    Choice 'required': one call, or several where calls may be parallel. The name of a tool: one call of it.
    'auto': text, or such calls; text may come before calls that a marker announces, and nothing after.

    Raises GrammarError or UnsupportedError, naming the tool's place, for parameters no grammar can keep.
    """
    if tool_use.choice == "none":
        return None
    named = [
        (f"tools[{index}].parameters", tool)
        for index, tool in enumerate(tool_use.tools)
        if tool_use.choice in ("auto", "required", tool.name)
    ]
    tools = [
        _Tool(tool.name, read_schema(normalised_parameters(tool.parameters, path), path))
        for path, tool in named
    ]
    several = tool_use.parallel and tool_use.choice in ("auto", "required")
    layout = chat_format.call_layout
    writer = LarkWriter()
    calls = _Calls(writer, layout, tools, MAX_PARALLEL_CALLS - 1 if several else 0)
    markers = _Markers(layout, tokenizer)
    if tool_use.choice != "auto":
        start = _only_calls(calls, markers)
    elif layout.opening:
        start = _text_or_tagged_calls(writer, calls, markers)
    else:
        start = _text_or_calls(writer, calls, markers)
    return GrammarSpec(writer.source(writer.rule(start)))


@dataclass(frozen=True)
class _Tool:
    name: str
    tree: SchemaTree

    @property
    def python_arguments(self) -> Object | None:
        """The arguments as keywords of a Python call, where they can be written so."""
        root = self.tree.root
        if not _FUNCTION_NAME.fullmatch(self.name) or len(self.name) > _LONGEST_NAME:
            return None
        if not isinstance(root, Object) or not isinstance(root.extra, Nothing):
            return None
        names = root.properties
        fits = all(_PYTHON_NAME.fullmatch(name) and len(name) <= _LONGEST_NAME for name in names)
        return root if fits else None


class _Markers:
    """What stands around calls, as expressions. start, end: control tokens, '' where the vocabulary has none.
    trigger: the opening without the white space at its end, and that, where no control token stands in it."""

    def __init__(self, layout: CallLayout, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        start, end = layout.region or ("", "")
        self.start, self.end = self._token(start), self._token(end)
        self.opening = self._written(layout.opening)
        self.closing = self._written(layout.closing)
        self.between = self._written(layout.between)
        self.trigger: tuple[str, str] | None = None
        if self.opening == [literal(layout.opening)]:
            marker = layout.opening.rstrip()
            self.trigger = marker, layout.opening[len(marker) :]

    def _token(self, name: str) -> str:
        token = self._tokenizer.specials.get(name)
        return f"<[{token}]>" if token is not None and self._tokenizer.is_control(token) else ""

    def _written(self, text: str) -> list[str]:
        """Expressions for a text in which names of control tokens may stand."""
        for name in self._tokenizer.specials:
            if name and name in text and self._token(name):
                before, _, after = text.partition(name)
                return [*self._written(before), self._token(name), *self._written(after)]
        return [literal(text)] if text else []


@dataclass(frozen=True)
class _Beginning:
    """One way for calls to begin: exactly `written`, or as loosely as `pattern`, and what follows."""

    written: str
    pattern: str
    rest: str


class _Calls:
    """Calls of the tools, up to `more` after the first, in the style of a layout."""

    def __init__(self, writer: LarkWriter, layout: CallLayout, tools: Sequence[_Tool], more: int) -> None:
        self._writer = writer
        self._layout = layout
        self._tools = tools
        self.more = more
        self.pythonic = layout.style == "pythonic"
        self._python_tools = [tool for tool in tools if self.pythonic and tool.python_arguments is not None]
        self._object_tools = [tool for tool in tools if tool not in self._python_tools]
        bodies = [self._object_body(tool) for tool in self._object_tools]
        self.object_body = writer.rule(" | ".join(bodies)) if bodies else ""
        self._calls_of = {id(tool): self._python_body(tool) for tool in self._python_tools}

    def beginnings(self, between: Sequence[str]) -> list[_Beginning]:
        """How an answer of bare calls may begin."""
        if not self.pythonic:
            next_call = " ".join([*between, literal(_OPEN_OBJECT), self.object_body])
            return [
                _Beginning(
                    _OPEN_OBJECT, _object_pattern(""), f"{self.object_body} {self.following(next_call)}"
                )
            ]
        comma = self._writer.shared("COMMA")
        others = [f"{literal(tool.name + '(')} {self._calls_of[id(tool)]}" for tool in self._python_tools]
        if self.object_body:
            others.append(f"{literal(_OPEN_OBJECT)} {self.object_body}")
        next_call = f"{comma} {self._writer.rule(' | '.join(others))}"
        tail = self._writer.rule(f'{self.following(next_call)} "]"')
        found = [
            _Beginning(
                f"[{tool.name}(",
                rf"{_BLANKS}\[ ?{re.escape(tool.name)}\(",
                f"{self._calls_of[id(tool)]} {tail}",
            )
            for tool in self._python_tools
        ]
        if self.object_body:
            pattern = _object_pattern(rf"{_BLANKS}\[")
            found.append(_Beginning("[" + _OPEN_OBJECT, pattern, f"{self.object_body} {tail}"))
        return found

    def following(self, call: str) -> str:
        """As many more calls as there may be."""
        return repeated(call, 0, self.more)

    def _object_body(self, tool: _Tool) -> str:
        """The rest of `{"name": "`, behind the quotation mark."""
        name = literal(json.dumps(tool.name, ensure_ascii=False)[1:])
        key = literal(json.dumps(self._layout.arguments_key))
        arguments = SchemaWriter(self._writer, tool.tree).value(tool.tree.root)
        comma, colon = self._writer.shared("COMMA"), self._writer.shared("COLON")
        return f'{name} {comma} {key} {colon} {arguments} "}}"'

    def _python_body(self, tool: _Tool) -> str:
        """The rest of `name(`."""
        root = tool.python_arguments
        assert root is not None
        keys = {name: literal(f"{name}=") for name in root.properties}
        members, may_be_empty = SchemaWriter(self._writer, tool.tree, "python").members(root, keys, None)
        if members and may_be_empty and not root.not_empty:
            members = f"({members})?"
        return self._writer.rule(f'{members} ")"')


def _object_pattern(before: str) -> str:
    return rf'{before}{_BLANKS}\{{{_BLANKS}"name" ?: ?"'


def _only_calls(calls: _Calls, markers: _Markers) -> str:
    call = " | ".join(f"{literal(one.written)} {one.rest}" for one in calls.beginnings(markers.between))
    if markers.opening:
        call = _tagged(calls, markers, markers.opening)
    if not markers.start:
        return call
    if not markers.end:
        return f"({call}) | {markers.start} ({call})"
    return f"({call}) | {markers.start} ({call}) {markers.end}? | {markers.start} {markers.end} ({call})"


def _tagged(calls: _Calls, markers: _Markers, opening: Sequence[str]) -> str:
    """Calls that each stand between two markers, the first behind `opening`."""
    body = [literal(_OPEN_OBJECT), calls.object_body, *markers.closing]
    following = " ".join([*markers.between, *markers.opening, *body])
    return " ".join([*opening, *body, calls.following(following)])


def _text_or_tagged_calls(writer: LarkWriter, calls: _Calls, markers: _Markers) -> str:
    """Text up to the first marker, then calls, or text alone."""
    text = writer.terminal("/(?s:.*)/")
    if markers.trigger is None:
        return f"{text} | {text} {_tagged(calls, markers, markers.opening)}"
    # Lazy: the text ends where the marker first stands, and is no text from there on.
    trigger, behind = markers.trigger
    head = writer.rule(f"{text} {literal(trigger)}", lazy=True)
    return f"{text} | {_tagged(calls, markers, [head, *([literal(behind)] if behind else [])])}"


def _text_or_calls(writer: LarkWriter, calls: _Calls, markers: _Markers) -> str:
    """Calls from the beginning, or text that does not begin as they do; control tokens may announce them."""
    beginnings = calls.beginnings(markers.between)
    patterns = [writer.terminal(f"/{one.pattern}/") for one in beginnings]
    text = writer.terminal(f"/(?s:.+)/ & ~(({' | '.join(patterns)}) /(?s:.*)/)")
    called = writer.rule(
        " | ".join(f"{pattern} {one.rest}" for pattern, one in zip(patterns, beginnings, strict=True))
    )
    if not markers.start:
        return f"{text}? | {called}"
    end = f"{markers.end}?" if markers.end else ""
    announced = writer.rule(f"{text}? {markers.start} {text}? {end}")
    return f"{text}? | {called} | {announced} | {announced} {called} {end}"
