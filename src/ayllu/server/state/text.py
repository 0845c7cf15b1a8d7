"""Text as the database keeps it, and as it is searched: without regard to case, in any language."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

MAX_SEARCHED_CHARACTERS = 1 << 20
"""Of one message; what lies beyond is kept, but not found."""

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def storable(text: str) -> str:
    """`text` with what no database keeps (NUL, lone surrogates) replaced by U+FFFD."""
    return text if text.isascii() and "\x00" not in text else _UNSTORABLE.sub("\ufffd", text)


def folded(text: str) -> str:
    """The form in which texts that read the same are the same: width, case and composition are gone."""
    return storable(unicodedata.normalize("NFKC", text).casefold())


def like_pattern(query: str) -> str:
    r"""What LIKE ... ESCAPE '\' finds `query` with, anywhere, each of its characters meaning itself."""
    escaped = re.sub(r"([\\%_])", r"\\\1", folded(query))
    return f"%{escaped}%"


def searched_text(content: Any) -> str:
    """The words of a message, folded: all texts of its parts, none of its images and files."""
    parts = content if isinstance(content, list) else [content]
    words = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return folded("\n".join(word for word in words if isinstance(word, str))[:MAX_SEARCHED_CHARACTERS])
