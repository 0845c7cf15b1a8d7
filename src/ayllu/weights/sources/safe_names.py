"""Which names may reach the disk.

Every file name that comes from outside (a hub listing, a catalogue, a manifest, an archive) passes
`safe_name` before it is joined to a folder, so no source can write outside the store on any system.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import PurePosixPath

from ayllu.errors import SourceError, UnsupportedError, UsageError, clip
from ayllu.weights.file_kinds import is_model_file, is_pickle

MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,95}")
SHA256 = re.compile(r"[0-9a-f]{64}")
SHA1 = re.compile(r"[0-9a-f]{40}")

_FORBIDDEN = frozenset('\\:<>"|?*')
_DEVICES = frozenset(
    ["CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", "CLOCK$"]
    + [f"{port}{digit}" for port in ("COM", "LPT") for digit in "0123456789"]
)


def safe_name(name: str) -> PurePosixPath:
    """`name` as a relative path that means the same file, inside its folder, on every system.

    Raises UsageError naming the rule that was broken: absolute, `..`, hidden, control characters, device
    names, reserved characters, trailing dots or spaces, look-alike characters, over-long.
    """
    problem = _name_problem(name)
    if problem:
        raise UsageError(f"The file name {clip(ascii(name))} is refused: {problem}.", "Use another source.")
    return PurePosixPath(name)


def _name_problem(name: str) -> str | None:
    if not name:
        return "it is empty"
    if len(name) > 512:
        return "it is longer than 512 characters"
    if not name.isprintable():
        return "it holds control or invisible characters"
    if unicodedata.normalize("NFKC", name) != name:
        return "it holds look-alike characters"
    if bad := sorted(_FORBIDDEN.intersection(name)):
        return f"it holds {bad[0]!r}"
    if name.startswith(("/", "~")):
        return "it is not relative"
    components = name.split("/")
    if len(components) > 8:
        return "it is more than 8 folders deep"
    return next((problem for part in components if (problem := _component_problem(part))), None)


def _component_problem(part: str) -> str | None:
    if part in ("", ".", ".."):
        return f"it has {part!r} as a folder"
    if len(part.encode("utf-8")) > 200:
        return "one part of it is longer than 200 bytes"
    if part.startswith("."):
        return "it is hidden (starts with a dot)"
    if part[0] == " " or part[-1] in " .":
        return "it starts with a space, or ends with a space or a dot"
    if part.split(".", 1)[0].rstrip().upper() in _DEVICES:
        return "it is a device name on Windows"
    return None


def safe_offered_name(name: str) -> PurePosixPath:
    """`safe_name` for a name that a source offers: SourceError, since no person wrote it."""
    try:
        return safe_name(name)
    except UsageError as error:
        raise SourceError(error.problem, error.fix) from error


def safe_model_name(name: str) -> str:
    """`name` if it may name a model in the store (lower-case letters, digits, `.`, `_`, `-`)."""
    if not MODEL_NAME.fullmatch(name) or ".." in name or _name_problem(name):
        raise UsageError(
            f"{clip(ascii(name))} cannot name a model.",
            "Use 1 to 96 lower-case letters, digits, dots, dashes or underscores; no dot or dash first.",
        )
    return name


def model_name_from(text: str) -> str:
    """A model name made from a repository or file name: lower-case, anything unusual replaced by a dash."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return safe_model_name(
        re.sub(r"[^a-z0-9_]*\.[^a-z0-9_]*|[^a-z0-9._]+", _separator, plain).strip("._-")[:96]
    )


def _separator(match: re.Match[str]) -> str:
    return "." if match[0] == "." else "-"


def safe_digest(digest: str) -> str:
    """`digest` if it is a SHA-256 in lower-case hexadecimal, else UsageError."""
    if not SHA256.fullmatch(digest):
        raise UsageError(
            f"{clip(ascii(digest))} is not a SHA-256 digest.", "It needs 64 lower-case hex digits."
        )
    return digest


def refuse_unless_model_file(name: str) -> PurePosixPath:
    """`name` as a safe path if it may be part of a model; UnsupportedError for pickles and anything else."""
    path = safe_name(name)
    if is_pickle(name):
        raise UnsupportedError(
            f"{clip(name)} is a pickle or an archive, which could run code when opened.",
            "ayllu never fetches those. Look for the model's safetensors or GGUF files.",
        )
    if not is_model_file(name):
        raise UnsupportedError(
            f"{clip(name)} is not a model file.",
            "ayllu takes safetensors and GGUF, with their configuration, tokenizer and template files.",
        )
    return path
