"""FP8 weights with a scale per output row, as compressed-tensors writes them (Maverick-FP8, spec 9.2 and 10).

The bytes stay as they are; rows become float32 when they are decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ayllu.errors import ModelFileError
from ayllu.weights.hf_fields import Fields
from ayllu.weights.tensors import Floats, PlainTensor, StoredTensor

SCALED_FP8 = "F8_E4M3_SCALED"


class ScaledTensor(StoredTensor):
    """`weight` [rows, columns] in FP8 times `scale`: one number a row, or one for all."""

    def __init__(self, weight: PlainTensor, scale: PlainTensor, name: str, file: Path) -> None:
        rows = weight.shape[0] if len(weight.shape) == 2 else 0
        if rows == 0 or scale.shape not in ((rows, 1), (rows,), (1, 1), (1,), ()):
            raise ModelFileError(
                file, "a scale does not fit its tensor", field=name, expected=(rows, 1), got=scale.shape
            )
        self.weight = weight
        self.shape = weight.shape
        self.encoding = SCALED_FP8
        self._scale = np.broadcast_to(scale.array.astype(np.float32).reshape(-1, 1), (rows, 1))

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self._scale.nbytes

    def decode_rows(self, start: int, stop: int) -> Floats:
        values = self.weight.decode_rows(start, stop)
        values *= self._scale[start:stop]
        return values

    def release(self) -> None:
        self.weight.release()


def has_fp8_weights(config: Mapping[str, Any], file: Path) -> bool:
    """Whether a config.json declares weights in this format. False for no quantisation at all.

    Raises UnsupportedError for every other kind of quantisation, naming it.
    """
    fields = Fields(config, file)
    quantization = fields.nested("quantization_config")
    if quantization is None:
        text = fields.nested("text_config")
        quantization = text.nested("quantization_config") if text is not None else None
    if quantization is None:
        return False
    method = quantization.text("quant_method", "")
    if method != "compressed-tensors":
        quantization.refuse("quant_method", method)
    groups = quantization.nested("config_groups")
    if groups is None or len(groups.values) != 1:
        quantization.refuse("config_groups", groups and list(groups.values), "one group is expected")
    group = groups.nested(next(iter(groups.values)))
    weights = group.nested("weights") if group is not None else None
    if weights is None:
        groups.refuse("weights", None)
    for key, wanted in (("type", "float"), ("strategy", "channel")):
        if weights.text(key, "") != wanted and (key, weights.values.get(key)) != ("strategy", "tensor"):
            weights.refuse(key, weights.values.get(key))
    if weights.integer("num_bits", 0) != 8:
        weights.refuse("num_bits", weights.values.get("num_bits"))
    return True
