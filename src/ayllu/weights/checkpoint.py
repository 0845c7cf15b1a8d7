"""A model on disk, opened: its config and its tensors under our names, whatever the format.

Only safetensors and GGUF are opened; both are plain data. Every tensor the config calls for must be
there with the right shape before anyone starts to load.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ayllu.errors import ModelFileError, UnsupportedError
from ayllu.model.config import ModelConfig
from ayllu.model.parameters import Shapes, parameter_shapes
from ayllu.weights.tensors import StoredTensor


@dataclass(frozen=True)
class Checkpoint:
    """`tensors` has exactly the parameters of `config`.

    `metadata` is what a GGUF says of itself (tokens, chat template); folders keep that in files beside the
    weights, so there it is empty. Format 'meta' comes from `ayllu convert` alone.
    """

    path: Path
    format: Literal["gguf", "safetensors", "meta"]
    config: ModelConfig
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_tensors(self.path, self.tensors, parameter_shapes(self.config))

    @property
    def bytes_by_encoding(self) -> dict[str, int]:
        """Bytes stored in each encoding, largest first."""
        return bytes_by_encoding(self.tensors.values())


def require_tensors(path: Path, tensors: Mapping[str, StoredTensor], expected: Shapes) -> None:
    """Raises ModelFileError unless `tensors` are exactly the `expected` ones, each of its shape."""
    for name, shape in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise ModelFileError(path, "a tensor is missing", field=name, expected=shape)
        if tensor.shape != shape:
            raise ModelFileError(
                path, "a tensor has the wrong shape", field=name, expected=shape, got=tensor.shape
            )
    for name in tensors:
        if name not in expected:
            raise ModelFileError(path, "a tensor does not belong to this architecture", field=name)


def bytes_by_encoding(tensors: Iterable[StoredTensor]) -> dict[str, int]:
    """Bytes stored in each encoding, largest first."""
    totals: dict[str, int] = {}
    for tensor in tensors:
        totals[tensor.encoding] = totals.get(tensor.encoding, 0) + tensor.nbytes
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a .gguf file or a folder of safetensors with its config.json.

    Raises ModelFileError for damaged files, UnsupportedError for formats that could run code.
    """
    if path.is_dir():
        from ayllu.weights.huggingface import open_folder

        return open_folder(path)
    if not path.is_file():
        raise ModelFileError(path, "there is no such file", fix="Check the path, or run `ayllu list`.")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        from ayllu.weights.gguf_model import open_gguf

        return open_gguf(path)
    if path.suffix == ".safetensors":
        raise UnsupportedError(
            f"{path} is one safetensors file without its config.",
            "Name the folder that holds it together with config.json.",
        )
    raise UnsupportedError(
        f"{path} is neither GGUF nor a folder of safetensors.",
        "Formats that can run code are never opened; for Meta's own .pth files use `ayllu convert`.",
    )
