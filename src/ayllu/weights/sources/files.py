"""`file:PATH`: taking a GGUF file, or a folder of safetensors, that is already on this machine.

Files are hard-linked when store and original share a filesystem, otherwise copied: models are tens of
gigabytes and nobody edits them in place. Deleting the original later therefore does not harm the store.
"""

from __future__ import annotations

import contextlib
import shutil
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from ayllu.errors import IntegrityError, ModelFileError, UnknownModelError
from ayllu.folder_files import member_path
from ayllu.weights.file_kinds import is_model_file, is_pickle
from ayllu.weights.sources import base
from ayllu.weights.sources.base import Fetched, Intake, Order
from ayllu.weights.sources.safe_names import model_name_from, safe_name

GGUF_MAGIC = b"GGUF"


@dataclass(frozen=True)
class FileSource:
    """A model on the local disk."""

    path: Path

    @property
    def text(self) -> str:
        return f"file:{self.path}"

    def suggested_name(self) -> str:
        """The file's stem or the folder's name."""
        return model_name_from(self.path.stem if self.path.is_file() else self.path.name)

    def fetch(self, order: Order) -> list[Fetched]:
        """Hash the files in place. They stay where they are; the store links them."""
        wanted = local_model_files(self.path)
        total = sum(path.stat().st_size for path in wanted)
        fetched = []
        with order.progress.task(order.label, total) as task:
            for path in wanted:
                digest = base.sha256_of(path, task.advance)
                name = str(safe_name(unicodedata.normalize("NFKC", path.name)))
                fetched.append(
                    Fetched(name, path.resolve(), path.stat().st_size, digest, Intake.LINK_OR_COPY)
                )
        if order.pinned.sha256 is not None and fetched[0].sha256 != order.pinned.sha256:
            raise IntegrityError(
                f"{self.path} has SHA-256 {fetched[0].sha256[:16]}…, not {order.pinned.sha256[:16]}….",
                "The file was left alone. Fetch it again.",
            )
        return fetched


def local_model_files(path: Path) -> list[Path]:
    """The files that make up the model at `path`: the GGUF itself, or a folder's safetensors and companions.

    Raises UnknownModelError when nothing is there, ModelFileError when it is not a model ayllu opens, or when
    a file of the folder is a link out of it.
    """
    if not path.exists():
        raise UnknownModelError(
            f"There is no file or folder {path}.", "Check the path; `ayllu list` shows models."
        )
    if path.is_file():
        with path.open("rb") as file:
            magic = file.read(4)
        if is_pickle(path.name) or path.suffix.lower() != ".gguf" or magic != GGUF_MAGIC:
            raise ModelFileError(
                path,
                "not a GGUF file",
                fix="Give a .gguf file, or a folder holding config.json and *.safetensors.",
            )
        return [path]
    if not path.is_dir():
        raise ModelFileError(path, "neither a file nor a folder", fix="Give a .gguf file or a model folder.")
    inside = sorted(item for item in path.iterdir() if item.is_file() and not item.name.startswith("."))
    names = {item.name for item in inside}
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        pickled = sorted(name for name in names if is_pickle(name))
        found = f" (it holds {pickled[0]}, a pickle, which is never opened)" if pickled else ""
        raise ModelFileError(
            path, f"no model in this folder{found}", fix="It needs config.json and *.safetensors files."
        )
    return [
        member_path(path, item.name)
        for item in inside
        if is_model_file(item.name) and not is_pickle(item.name)
    ]


def take_in(file: Fetched, target: Path) -> None:
    """Make `target` hold the bytes of `file`, in the way its intake says."""
    if file.intake is Intake.MOVE:
        file.path.replace(target)
        return
    original = file.path.resolve()
    try:
        target.hardlink_to(original)
    except OSError:
        if file.intake is Intake.LINK_OR_POINT:
            with contextlib.suppress(OSError):
                target.symlink_to(original)
                return
        base.require_space(target.parent, file.size_bytes)
        with base.full_disk_is_typed(target.parent):
            shutil.copyfile(original, target)
