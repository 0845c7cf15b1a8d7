"""Fixtures of all tests: real models out of the local store, fetched by hash-checked code on first use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# No deadlines: a busy machine is no failure. In CI the examples are the same every time, so that a change is
# judged by what it changed; at home they are new ones on every run.
settings.register_profile("home", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "home")


def _installed(name: str) -> Path:
    from ayllu.settings import load_settings
    from ayllu.weights.store import open_store

    return open_store(load_settings()).ensure(name).path


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1: the small real model that every test run uses."""
    return _installed("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """all-MiniLM-L6-v2, float32: the small real embedding model that every test run uses."""
    return _installed("all-minilm-l6-v2")


@pytest.fixture(scope="session")
def qwen05_gguf() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct, Q4_K_M (only for tests marked large)."""
    return _installed("qwen2.5-coder-0.5b-instruct")


@pytest.fixture(scope="session")
def qwen15_gguf() -> Path:
    """Qwen2.5-Coder-1.5B-Instruct, Q4_K_M (only for tests marked large)."""
    return _installed("qwen2.5-coder-1.5b-instruct")
