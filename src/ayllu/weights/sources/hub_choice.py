"""Which files of a hub repository make up the model, decided from their names alone."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ayllu.errors import SourceError, UnsupportedError, UsageError, clip
from ayllu.weights.file_kinds import is_model_file, is_pickle

_SPLIT_GGUF = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_DEFAULT_GGUF = "q4_k_m"


def choose_files(repository: str, names: Sequence[str], wanted: str | None) -> list[str]:
    """The files to fetch: the one `wanted`, else the safetensors with their companions, else the one GGUF.

    Subfolders are left out (they hold other formats of the same model). Raises UsageError when a choice is
    needed, with the command that makes it; UnsupportedError when only pickles are there.
    """
    if wanted is not None:
        if wanted not in names:
            raise SourceError(f"{repository} has no file {clip(wanted)}.", _offer(repository, names))
        if _SPLIT_GGUF.search(wanted):
            raise UnsupportedError(
                f"{clip(wanted)} is one piece of a split GGUF.", "Take a GGUF in one file."
            )
        return [wanted]
    top = sorted(name for name in names if "/" not in name and is_model_file(name) and not is_pickle(name))
    tensors = [name for name in top if name.lower().endswith(".safetensors")]
    if tensors:
        if "config.json" not in top:
            raise UnsupportedError(
                f"{repository} has safetensors but no config.json.", "Use another repository."
            )
        merged = {name for name in tensors if name.startswith("consolidated")}
        skipped = merged if len(merged) < len(tensors) else set()
        return [name for name in top if not name.lower().endswith(".gguf") and name not in skipped]
    return [_choose_gguf(repository, [name for name in top if name.lower().endswith(".gguf")], names)]


def _choose_gguf(repository: str, ggufs: list[str], names: Sequence[str]) -> str:
    whole = [name for name in ggufs if not _SPLIT_GGUF.search(name)]
    preferred = [name for name in whole if _DEFAULT_GGUF in name.lower()]
    if len(whole) == 1 or len(preferred) == 1:
        return (preferred if len(preferred) == 1 else whole)[0]
    if whole:
        raise UsageError(f"{repository} holds {len(whole)} GGUF files.", _offer(repository, whole))
    pickled = sorted(name for name in names if is_pickle(name))
    found = f" It has {clip(pickled[0])}, a pickle, which is never fetched." if pickled else ""
    raise UnsupportedError(
        f"{repository} holds no safetensors or GGUF in one file.{found}", "Use another repository."
    )


def _offer(repository: str, names: Sequence[str]) -> str:
    choices = [name for name in names if name.lower().endswith(".gguf")][:6]
    return (
        f"Choose one: ayllu pull hf:{repository}/{choices[0]} (there are: {', '.join(choices)})"
        if choices
        else ""
    )
