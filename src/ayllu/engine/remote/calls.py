"""Tool calls put together from the pieces a stream brings them in: a name once, arguments a few letters at a
time, several calls side by side."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ayllu.chat.messages import ToolCall
from ayllu.errors import RequestFailedError, clip

MAX_CALLS = 128
MAX_ARGUMENT_CHARACTERS = 4 << 20


@dataclass
class CallPieces:
    """One call while it grows."""

    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)
    characters: int = 0

    @staticmethod
    def add(calls: dict[int, CallPieces], piece: Any) -> None:
        """Put one `tool_calls` entry of a delta where it belongs. Raises ValueError when it is malformed, or
        when the calls grow beyond what any tool takes."""
        if not isinstance(piece, dict):
            raise ValueError("a tool call is no object")
        # Some servers leave the index out when they send a call in one piece.
        index = piece.get("index", len(calls))
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < MAX_CALLS:
            raise ValueError(f"a tool call has the index {clip(repr(index), 40)}")
        function = piece.get("function") or {}
        if not isinstance(function, dict):
            raise ValueError("the function of a tool call is no object")
        call = calls.setdefault(index, CallPieces())
        call.id = call.id or _string(piece.get("id"), "id")
        call.name = call.name or _string(function.get("name"), "name")
        arguments = function.get("arguments")
        text = json.dumps(arguments) if isinstance(arguments, dict) else _string(arguments, "arguments")
        call.characters += len(text)
        if call.characters > MAX_ARGUMENT_CHARACTERS:
            raise ValueError(f"the arguments of a tool call exceed {MAX_ARGUMENT_CHARACTERS} characters")
        call.arguments.append(text)

    @property
    def is_whole(self) -> bool:
        """Whether the arguments are a JSON object so far: no beginning of one is."""
        return isinstance(_parsed("".join(self.arguments)), dict)

    def call(self, default_id: str) -> ToolCall:
        """The finished call. Raises RequestFailedError when its arguments are no JSON object."""
        if not self.name:
            raise RequestFailedError("The model called a tool without naming it.", "Try again.")
        return ToolCall(self.name, arguments_of("".join(self.arguments), self.name), self.id or default_id)


def arguments_of(text: str, name: str) -> dict[str, Any]:
    """The arguments a model wrote. No text at all is no arguments."""
    if not text.strip():
        return {}
    value = _parsed(text)
    if not isinstance(value, dict):
        raise RequestFailedError(
            f"The model called {clip(name, 60)} with arguments that are no JSON object: {clip(text, 80)}",
            "Try again, with a lower temperature or a simpler schema.",
        )
    return value


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None


def _string(value: Any, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"the {name} of a tool call is no string")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)
