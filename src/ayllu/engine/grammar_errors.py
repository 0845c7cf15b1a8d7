"""What the grammar library says about a grammar it refuses, as errors a user can act on."""

from __future__ import annotations

import re

from ayllu.engine.grammar_text import place_in_source
from ayllu.errors import AylluError, GrammarError, UnsupportedError, clip

_PLACE = re.compile(r"^(?:.*? )?at (\d{1,9})\((\d{1,9})\): (.*)$|^(\d{1,9})\((\d{1,9})\): (.*)$")
_ITEMS = re.compile(r"row has \d+ items")
_TOO_MUCH = (
    "fuel",
    "too complex",
    "too large",
    "too many",
    "too big",
    "too deep",
    "limit",
    "exceed",
    "max is",
)
_CANNOT = ("lookaround", "look-around", "look-ahead", "backreference")
_EMPTY = ("noextension", "unsatisfiable", "regex is empty", "empty intersection")
_CONTRADICTION = "Remove the contradiction, or allow characters that the model can write."


def too_complex(limit: str) -> GrammarError:
    """The refusal of a grammar that exceeds `limit` while it is compiled."""
    return GrammarError(
        f"The grammar is too complex: {limit}.", "Use fewer alternatives, smaller counts or simpler patterns."
    )


def compile_error(message: str, source: str) -> AylluError:
    """The error for what the library said when it compiled `source`."""
    reason, where = _explained(message, source)
    lowered = message.lower()
    if any(word in lowered for word in _CANNOT):
        return UnsupportedError(
            f"{where}: look-around and back-references cannot be matched while generating.",
            "Write the pattern without them.",
        )
    if any(word in lowered for word in _EMPTY):
        return GrammarError(f"{where}: no text matches it.", _CONTRADICTION)
    if any(word in lowered for word in _TOO_MUCH):
        return too_complex(f"{where}: {reason}")
    return GrammarError(f"{where} cannot be compiled: {reason}.", "Correct it.")


def _explained(message: str, source: str) -> tuple[str, str]:
    """What is wrong, without the library's excerpts and dumps, and where: a path, a line, or the grammar."""
    # Bounded: the library quotes whole patterns.
    lines = [line.strip()[:2000] for line in message.split("\n") if line.strip()] or ["no reason given"]
    reason, where = lines[0], "The grammar"
    if match := _PLACE.match(reason):
        line = int(match[1] or match[4])
        reason = match[3] or match[6]
        path = place_in_source(source, line)
        written = source.startswith("%llguidance {}")
        where = path or ("The grammar" if written else f"Line {line} of the grammar")
    detail = next((line.removeprefix("error: ") for line in lines[1:] if line.startswith("error: ")), "")
    if detail:
        reason = f"{reason.partition(': regex parse error')[0]}: {detail}"
    if "max_items_in_row" in message or _ITEMS.search(reason):
        reason = "too many things may come next at one place"
    return clip(reason.rstrip(".:"), 200), where
