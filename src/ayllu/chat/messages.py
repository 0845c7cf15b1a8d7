"""What a conversation is made of, before it becomes tokens and after tokens become calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from ayllu.errors import UsageError, clip

if TYPE_CHECKING:
    from ayllu.chat.images import TiledImage

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class TextPart:
    """A run of plain text inside a message."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """One image inside a message: its encoded bytes (PNG, JPEG, ...), never a path or an address. tiled: what
    the model sees of it, where somebody has cut it already; a chat format cuts the others itself."""

    data: bytes
    tiled: TiledImage | None = field(default=None, repr=False, compare=False)


Part = TextPart | ImagePart


@dataclass(frozen=True)
class ToolDefinition:
    """A function the model may call. `parameters` is a JSON schema of type object."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})


@dataclass(frozen=True)
class ToolCall:
    """One call the model asked for. `arguments` are plain JSON values; nothing is ever executed here."""

    name: str
    arguments: dict[str, Any]
    id: str = ""


@dataclass(frozen=True)
class Message:
    """One turn. Tool results carry role 'tool' and the id (and name) of the call they answer.

    Raises UsageError for a role that is none of `Role`: chat formats write it among their control tokens.
    """

    role: Role
    content: str | tuple[Part, ...] = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        known = get_args(Role)
        if self.role not in known:
            raise UsageError(f"There is no role {clip(repr(self.role))}.", f"Known: {', '.join(known)}.")

    @property
    def parts(self) -> tuple[Part, ...]:
        """The content as parts, whichever way it was given."""
        if isinstance(self.content, str):
            return (TextPart(self.content),) if self.content else ()
        return self.content

    @property
    def text(self) -> str:
        """All text of the message, images left out."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))


def user_message(text: str, images: Sequence[bytes] = ()) -> Message:
    """A user's turn: encoded images first, then the text about them."""
    if not images:
        return Message("user", text)
    return Message("user", (*(ImagePart(data) for data in images), TextPart(text)))
