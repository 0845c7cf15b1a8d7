"""Which files of a model folder may be opened: those that truly lie in it."""

from __future__ import annotations

import re
from pathlib import Path

from ayllu.errors import ModelFileError, clip

COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Files that travel with a model unchanged when its tensors are converted."""

STORE_MANIFEST = "ayllu-model.json"
"""The file by which the store knows its own folders."""

_BLOB_NAME = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._ -]{0,250}")


def member_path(folder: Path, name: str) -> Path:
    """The file `name` of a model folder.

    Links may point to a file of the same folder; from a snapshot of a Hugging Face cache into the blobs of
    its own repository; and from a model that the store pulled, with the cache on another disk, into any
    repository's blobs. Raises ModelFileError otherwise.
    """
    if not _PLAIN_NAME.fullmatch(name):
        raise ModelFileError(folder, "names a file that is not a plain file name", field=clip(name))
    path = folder / name
    try:
        real, home = path.resolve(strict=True), folder.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise ModelFileError(path, "is missing, or a link that leads nowhere") from error
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    pulled = (home / STORE_MANIFEST).is_file() and _is_hub_blob(real)
    if real.parent not in allowed and not pulled:
        raise ModelFileError(path, "is a link out of the model's folder", got=clip(real))
    if not real.is_file():
        raise ModelFileError(path, "is not a file")
    return path


def _is_hub_blob(path: Path) -> bool:
    return (
        _BLOB_NAME.fullmatch(path.name) is not None
        and path.parent.name == "blobs"
        and path.parent.parent.name.startswith("models--")
    )


def companions(folder: Path) -> list[Path]:
    """The files of COMPANIONS that `folder` has. Raises ModelFileError for links that lead out of it."""
    return [member_path(folder, name) for name in COMPANIONS if (folder / name).is_file()]
