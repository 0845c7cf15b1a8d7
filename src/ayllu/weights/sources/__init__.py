"""Where models come from: a hub (`hf:`), Python packages (`pypi:`), this machine (`file:`), web mirrors.

Each source only brings verified files into a folder it is given; the store decides what becomes a model.
"""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING, Any

from ayllu.errors import UnknownModelError, UsageError, clip
from ayllu.paths import expanded

if TYPE_CHECKING:
    from ayllu.weights.sources.base import Source
    from ayllu.weights.sources.files import FileSource
    from ayllu.weights.sources.hub import HubSource
    from ayllu.weights.sources.packages import PackageSource
    from ayllu.weights.sources.web import WebSource

__all__ = [
    "FORMS",
    "FileSource",
    "HubSource",
    "PackageSource",
    "Source",
    "WebSource",
    "looks_like_path",
    "parse_source",
]

_PLACES = {
    "FileSource": "files",
    "HubSource": "hub",
    "PackageSource": "packages",
    "Source": "base",
    "WebSource": "web",
}


def __getattr__(name: str) -> Any:
    # Imported when they are asked for: who only opens a model that is here needs no HTTP library.
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)


FORMS = "hf:org/name[@revision][/file], pypi:package==version, or file:PATH"

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def looks_like_path(text: str) -> bool:
    """True when a person's `text` can only mean a file or folder, not a model's name."""
    return text.startswith(("/", "./", "../", "~", ".\\")) or "/" in text or text.lower().endswith(".gguf")


def parse_source(text: str) -> Source | None:
    """The source a person wrote, or None when `text` has no scheme and is no path: then it is a model's name.

    Raises UsageError for an unknown scheme or a malformed source.
    """
    from ayllu.weights.sources.files import FileSource

    scheme, colon, rest = text.partition(":")
    if scheme == "hf" and colon:
        from ayllu.weights.sources.hub import HubSource

        return HubSource.parse(text)
    if scheme == "pypi" and colon:
        from ayllu.weights.sources.packages import PackageSource

        return PackageSource.parse(text)
    if scheme == "file" and colon:
        return FileSource(expanded(rest).absolute())
    if scheme in ("http", "https") and colon:
        raise UsageError(
            f"{clip(ascii(text))} carries no hash to check.",
            f"Download it yourself and use file:PATH, or name one of: {FORMS}.",
        )
    if looks_like_path(text) and "://" not in text:
        path = expanded(text)
        if _REPOSITORY.fullmatch(text) and not path.exists():
            raise UnknownModelError(
                f"There is no file {text}.", f"On a hub it would be: ayllu pull hf:{text}"
            )
        return FileSource(path.absolute())
    if colon:
        raise UsageError(
            f"{clip(ascii(scheme))}: is not a kind of source.", f"Write a model's name, {FORMS}."
        )
    return None
