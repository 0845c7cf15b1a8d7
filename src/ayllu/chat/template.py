"""Chat formats that come inside a model as a jinja template: sandboxed, and safe from typed markers.

User text must never turn into a control token, whatever the template does to it (joins, strips, splits).
So before rendering, one character that every marker of this template needs (such as '|' in `<|im_end|>`) is
exchanged for a private stand-in throughout the user's strings, and back afterwards. A marker in the
rendered text then has its original character, which only the template can have written.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ayllu.chat.formats import (
    CallLayout,
    Prompt,
    PromptBuilder,
    TextEncoder,
    openai_tool,
    refuse_images,
    special_name,
)
from ayllu.chat.messages import Message, ToolCall, ToolDefinition
from ayllu.chat.template_sandbox import SandboxedTemplate
from ayllu.errors import TemplateError, UsageError

if TYPE_CHECKING:
    from ayllu.chat.toolcalls import ToolCallParser

_STAND_INS = range(0xF0000, 0xFFFFE)
_MAX_DEPTH = 50


class TemplateFormat:
    """A model's own template. `now` is the clock of templates that write the date.

    Raises TemplateError for a template that cannot be compiled.
    """

    name = "template"

    def __init__(
        self, tokenizer: TextEncoder, template: str, *, now: Callable[[], datetime] = datetime.now
    ) -> None:
        self._tokenizer = tokenizer
        self._template = SandboxedTemplate(template, now)
        self._variables = {
            "bos_token": special_name(tokenizer, tokenizer.bos_id) or "",
            "eos_token": special_name(tokenizer, tokenizer.eos_id) or "",
        }
        used = [value for name, value in self._variables.items() if name in self._template.names]
        self._markers = TemplateMarkers(tokenizer.specials, [*self._template.literals, *used])
        self.stop_ids = tokenizer.stop_ids
        self.call_layout = _call_layout("\n".join(self._template.literals))

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolDefinition] = (),
        *,
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """See `ChatFormat.render`.

        Raises UnsupportedError for images, and TemplateError when the template refuses the conversation,
        fails, exceeds its limits, or builds markers from pieces that the conversation's text could complete.
        """
        refuse_images(messages, self.name)
        conversation = [_message(message) for message in messages]
        offered = [openai_tool(tool) for tool in tools] or None
        used = set("".join(_strings([conversation, offered])))

        def rendered(exchanged: str) -> tuple[list[tuple[str, str]], str]:
            stand_ins = StandIns(exchanged, used)
            variables = {
                **self._variables,
                "messages": [stand_ins.in_message(message) for message in conversation],
                "tools": stand_ins.within(offered),
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
            }
            text = self._template.render(variables)
            pieces = [(stand_ins.undone(plain), marker) for plain, marker in self._markers.split(text)]
            return pieces, stand_ins.undone(text)

        pieces, text = rendered(self._markers.guards)
        if self._markers.completable:
            # The template holds loose pieces of markers, so guards alone prove nothing. Exchange every
            # character they are made of: what is a marker even then, the template wrote alone.
            inert, inert_text = rendered(self._markers.completable)
            if inert_text != text and [marker for _, marker in inert] != [marker for _, marker in pieces]:
                raise TemplateError(
                    "The chat template would turn text of this conversation into control tokens.",
                    "Change names or texts that look like parts of control tokens.",
                )
            pieces = inert if inert_text == text else pieces
        builder = PromptBuilder(self._tokenizer)
        for plain, marker in pieces:
            builder.text(plain)
            if marker:
                builder.special(marker)
        return builder.build()

    def tool_call_parser(self, tools: Sequence[ToolDefinition] | None = None) -> ToolCallParser:
        """See `ChatFormat.tool_call_parser`."""
        from ayllu.chat.toolcalls import ToolCallParser

        return ToolCallParser(tools)


def _call_layout(literals: str) -> CallLayout:
    """How the models of a template with these texts write calls: tagged as Qwen's, or bare as Llama's."""
    if "<tool_call>" in literals:
        return CallLayout(arguments_key="arguments", opening="<tool_call>\n", closing="\n</tool_call>")
    only_arguments = '"arguments"' in literals and '"parameters"' not in literals
    return CallLayout(arguments_key="arguments" if only_arguments else "parameters")


class TemplateMarkers:
    """The special tokens that a template can write, judged by its literal texts; no other is recognised.

    `guards`: characters of which every such marker has one that no literal holds loose, so that a marker
    without user text's help is a marker the template wrote. `completable`: where literals do hold loose
    pieces (such as '<|' and '|>' around a role), all characters of the markers they could grow into.
    """

    def __init__(self, specials: Iterable[str], literals: Sequence[str]) -> None:
        names = sorted(name for name in specials if name)
        joined = "\0".join(literals)
        whole = {name for name in names if name in joined}
        loose = _LoosePieces(names, literals)
        built = {name for name in names if name not in whole and loose.enclose(name)}
        guards: set[str] = set()
        for name in sorted(whole | built, key=lambda name: (len(_marks(name)), name)):
            if not guards.intersection(name):
                guards.add(_guard(name, joined, loose))
        risky = built | {name for name in whole if loose.hold(name, guards)}
        guards.update(character for name in risky for character in _marks(name))
        self.guards = "".join(sorted(guards))
        self.completable = "".join(sorted({*guards, *"".join(risky)})) if risky else ""
        longest_first = sorted(whole | built, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def split(self, text: str) -> list[tuple[str, str]]:
        """(plain text, marker behind it) in order; the last marker is empty."""
        pieces: list[tuple[str, str]] = []
        start = 0
        for found in self._pattern.finditer(text) if self._pattern else ():
            pieces.append((text[start : found.start()], found[0]))
            start = found.end()
        return [*pieces, (text[start:], "")]


class _LoosePieces:
    """Ends and beginnings of literals that are the beginning or end of a marker, but not all of it."""

    def __init__(self, names: Sequence[str], literals: Sequence[str]) -> None:
        beginnings = {name[:length] for name in names for length in range(1, len(name))}
        endings = {name[length:] for name in names for length in range(1, len(name))}
        longest = max(map(len, names), default=0)
        reach = [range(1, min(len(literal), longest) + 1) for literal in literals]
        ends = {text[-n:] for text, lengths in zip(literals, reach, strict=True) for n in lengths}
        starts = {text[:n] for text, lengths in zip(literals, reach, strict=True) for n in lengths}
        self._tails = ends & beginnings
        self._heads = starts & endings
        self._inner = [text for text in literals if 0 < len(text) < longest]

    def of(self, name: str) -> Iterator[str]:
        """The loose pieces that fit into `name`."""
        yield from (tail for tail in self._tails if name.startswith(tail) and tail != name)
        yield from (head for head in self._heads if name.endswith(head) and head != name)
        yield from (text for text in self._inner if text != name and text in name)

    def hold(self, name: str, guards: Iterable[str]) -> bool:
        """Whether a loose piece of `name` has one of its guards."""
        own = set(guards).intersection(name)
        return any(own.intersection(piece) for piece in self.of(name))

    def enclose(self, name: str) -> bool:
        """Whether a literal's end and another's beginning leave only a word of `name` to be filled in."""
        tails = [tail for tail in self._tails if name.startswith(tail)]
        heads = [head for head in self._heads if name.endswith(head)]
        return any(
            len(tail) + len(head) <= len(name) and not _marks(name[len(tail) : len(name) - len(head)])
            for tail in tails
            for head in heads
        )


def _marks(name: str) -> set[str]:
    return {character for character in name if not (character.isalnum() or character in "_ ")}


def _guard(name: str, literals: str, loose: _LoosePieces) -> str:
    """The character of `name` that disturbs templates least when user text is stripped of it."""
    in_pieces = set("".join(loose.of(name)))
    candidates = sorted(_marks(name)) or [name[0]]
    return min(candidates, key=lambda mark: (mark in in_pieces, mark not in "|｜", literals.count(mark)))


class StandIns:
    """Exchanges `characters` for private code points that do not occur in `used`, and back.

    One code point for one: lengths, stripping and splitting work on the exchanged text as on the original.
    Raises UsageError where `used` leaves too few.
    """

    def __init__(self, characters: str, used: set[str]) -> None:
        free = (chr(code) for code in _STAND_INS if chr(code) not in used)
        chosen = list(itertools.islice(free, len(characters)))
        if len(chosen) < len(characters):
            raise UsageError(
                "The text uses every private character.", "Remove characters U+F0000 to U+FFFFD."
            )
        pairs = dict(zip(characters, chosen, strict=True))
        self._forth = str.maketrans(pairs)
        self._back = str.maketrans({stand_in: character for character, stand_in in pairs.items()})
        # A template may ask for JSON in pure ASCII, which writes stand-ins as surrogate escapes.
        self._escapes = {json.dumps(new)[1:-1]: json.dumps(old)[1:-1] for old, new in pairs.items()}

    def undone(self, text: str) -> str:
        """Rendered text with the original characters."""
        if "\\udb" in text:
            for escaped, original in self._escapes.items():
                text = text.replace(escaped, original)
        return text.translate(self._back)

    def within(self, value: Any, depth: int = 0) -> Any:
        """`value` (plain data) with every string exchanged, keys too save the words of JSON schemas."""
        if isinstance(value, str):
            return value.translate(self._forth)
        if depth > _MAX_DEPTH:
            raise UsageError(f"A tool's data nests deeper than {_MAX_DEPTH} levels.", "Flatten it.")
        if isinstance(value, Mapping):
            return {
                key if key in _SCHEMA_WORDS else self.within(str(key)): self.within(item, depth + 1)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.within(item, depth + 1) for item in value]
        return value

    def in_message(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message with its strings exchanged, save those that only ayllu writes."""
        return {key: item if key == "role" else self._field(key, item) for key, item in message.items()}

    def _field(self, key: str, item: Any) -> Any:
        if key != "tool_calls":
            return self.within(item)
        return [{**self.within(call), "type": "function"} for call in item]


_SCHEMA_WORDS = frozenset(
    {
        "$defs",
        "$ref",
        "additionalProperties",
        "allOf",
        "anyOf",
        "arguments",
        "const",
        "default",
        "description",
        "enum",
        "format",
        "function",
        "id",
        "items",
        "maximum",
        "minimum",
        "name",
        "oneOf",
        "parameters",
        "properties",
        "required",
        "title",
        "type",
    }
)


def _message(message: Message) -> dict[str, Any]:
    """A message in the shape that templates expect."""
    shaped: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.tool_calls:
        shaped["tool_calls"] = [_call(call) for call in message.tool_calls]
    if message.tool_call_id:
        shaped["tool_call_id"] = message.tool_call_id
    if message.name:
        shaped["name"] = message.name
    return shaped


def _call(call: ToolCall) -> dict[str, Any]:
    shaped = {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
    return {"id": call.id, **shaped} if call.id else shaped


def _strings(value: Any) -> Iterator[str]:
    """Every string in plain data, keys too."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            waiting += [*map(str, item.keys()), *item.values()]
        elif isinstance(item, list | tuple):
            waiting += item
