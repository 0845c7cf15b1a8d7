"""Fixtures of all tests: real models out of the local store, fetched by hash-checked code on first use."""

from __future__ import annotations

from pathlib import Path

import pytest


def _installed(name: str) -> Path:
    from ayllu.settings import load_settings
    from ayllu.weights.store import Store

    store = Store(load_settings().store)
    return store.ensure(name).path


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1: the small real model that every test run uses."""
    return _installed("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def qwen05_gguf() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct, Q4_K_M (only for tests marked large)."""
    return _installed("qwen2.5-coder-0.5b-instruct")


@pytest.fixture(scope="session")
def qwen15_gguf() -> Path:
    """Qwen2.5-Coder-1.5B-Instruct, Q4_K_M (only for tests marked large)."""
    return _installed("qwen2.5-coder-1.5b-instruct")
