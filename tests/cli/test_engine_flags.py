"""Flags, environment and file become an engine's options; what was typed outweighs the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ayllu.cli.engine_flags import KEPT_FLAGS, engine_options
from ayllu.engine.gpu_weights import PLANS
from ayllu.engine.options import EngineOptions, GpuWeights
from ayllu.errors import UnknownModelError, UsageError
from ayllu.settings import load_settings


def options(flags: dict[str, Any], environment: dict[str, str], **sizes: Any) -> EngineOptions:
    """What a command would open, with no settings file."""
    environment = {"AYLLU_CONFIG": "/dev/null"} | environment
    return engine_options(load_settings(flags, environment), command="ayllu chat x", pull=False, **sizes)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    file = tmp_path / "small model.gguf"
    file.write_bytes(b"GGUF")
    return file


def test_every_flag_reaches_the_options(model: Path) -> None:
    flags = {
        "device": "cpu",
        "dtype": "bfloat16",
        "runner": "native",
        "threads": 3,
        "cache_type": "int8",
        "weights": "int4",
        "experts": "disk",
        "speculate": "draft",
        "draft": str(model),
    }
    found = options(flags, {}, slots=2)
    assert found.draft_model == model
    for name in flags.keys() - {"draft"}:
        assert getattr(found, name) == flags[name], name
    assert found.slots == 2
    assert set(KEPT_FLAGS) <= flags.keys()


def test_a_refusal_repeats_what_was_typed_and_nothing_else(model: Path) -> None:
    found = options({"draft": str(model), "threads": 1}, {"AYLLU_RUNNER": "native"})
    assert found.command == f"ayllu chat x --threads 1 --draft '{model}'"
    assert options({}, {}).command == "ayllu chat x"


def test_what_was_typed_outweighs_a_setting_that_contradicts_it(model: Path) -> None:
    draft, lookup = {"AYLLU_DRAFT": str(model)}, {"AYLLU_SPECULATE": "lookup"}
    assert options({}, draft).draft_model == model
    assert options({"speculate": "off"}, draft).draft_model is None
    assert options({"draft": str(model)}, lookup).speculate is None
    alone = options({}, draft, deterministic=True)
    assert alone.draft_model is None and alone.speculate is None
    assert options({}, lookup, deterministic=True).speculate is None
    for flags in ({"speculate": "off", "draft": str(model)}, {"speculate": "draft"}):
        with pytest.raises(UsageError):
            options(flags, {})
    with pytest.raises(UsageError, match="deterministic"):
        options({"speculate": "lookup"}, {}, deterministic=True)


def test_a_draft_model_that_is_not_here_is_unknown() -> None:
    with pytest.raises(UnknownModelError):
        options({"draft": "no-such-model"}, {})


def test_the_weights_that_may_be_asked_for_are_those_with_a_plan() -> None:
    assert set(PLANS) == set(GpuWeights.__args__)
