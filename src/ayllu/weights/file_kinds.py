"""Which kinds of file a model may consist of, told from their names, and which run code when opened."""

from __future__ import annotations

from pathlib import PurePosixPath

PICKLE_SUFFIXES = frozenset(
    (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".h5", ".hdf5", ".keras", ".joblib")
)
ARCHIVE_SUFFIXES = frozenset(
    (".zip", ".7z", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".msgpack", ".dill", ".ot")
)
WEIGHT_SUFFIXES = frozenset((".safetensors", ".gguf"))
COMPANION_SUFFIXES = frozenset((".json", ".jinja", ".model", ".tiktoken"))
COMPANION_NAMES = frozenset(("merges.txt", "vocab.txt"))
LICENCE_STEMS = ("license", "licence", "notice", "use_policy", "copying")


def is_model_file(name: str) -> bool:
    """True for files a model may consist of: weights, configuration, tokenizer, template, licence."""
    path = PurePosixPath(name)
    suffix = path.suffix.lower()
    if suffix in WEIGHT_SUFFIXES or suffix in COMPANION_SUFFIXES or path.name.lower() in COMPANION_NAMES:
        return True
    return path.stem.lower().startswith(LICENCE_STEMS) and suffix in ("", ".txt", ".md")


def is_pickle(name: str) -> bool:
    """True for file types that run code when opened, or that wrap such files. None is fetched or opened."""
    return any(
        suffix.lower() in PICKLE_SUFFIXES | ARCHIVE_SUFFIXES for suffix in PurePosixPath(name).suffixes
    )
