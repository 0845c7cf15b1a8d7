"""Fixtures of the weights tests: tiny models saved by transformers, made once per run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.weights.tiny_folders import save_tiny


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_folder(kind, dtype="float32")`: a folder that transformers saved. Read-only by agreement."""
    made: dict[tuple[str, str], Path] = {}

    def folder(kind: str, dtype: str = "float32") -> Path:
        if (kind, dtype) not in made:
            made[kind, dtype] = save_tiny(kind, tmp_path_factory.mktemp(kind) / "model", dtype=dtype)
        return made[kind, dtype]

    return folder
