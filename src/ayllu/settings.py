"""One typed settings object for the whole program.

Each value comes from the first of: command-line flag, environment (`AYLLU_<NAME>`), settings file (TOML),
built-in default. Where it came from is kept beside it, so that a surprising value can be explained.
"""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import platformdirs

from ayllu.errors import UsageError, did_you_mean

ENVIRONMENT_PREFIX = "AYLLU_"

# What `engine.options` says of each; rooms below do not import it, and a test compares them.
RunnerName = Literal["auto", "native", "torch"]
CacheType = Literal["auto", "int8"]
GpuWeights = Literal["int4", "int4-128", "int8", "fp8"]
ExpertPlace = Literal["auto", "memory", "disk"]
Speculate = Literal["off", "lookup", "draft"]


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("it should be text")
    return value


def _path(value: object) -> Path:
    if not isinstance(value, str | Path):
        raise ValueError("it should be a path")
    return Path(value)


def _timeout(value: object) -> float:
    try:
        seconds = float(value) if isinstance(value, str | int | float) and value is not True else math.nan
    except (ValueError, OverflowError):
        seconds = math.nan
    if not 0 < seconds <= 3600:
        raise ValueError("it should be a number above 0 and at most 3600")
    return seconds


def _threads(value: object) -> int:
    count = int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 5 else value
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= 1024:
        raise ValueError("it should be a whole number from 1 to 1024")
    return count


def _one_of(kind: Any) -> Callable[[object], str]:
    """kind: a Literal of names."""
    names = get_args(kind)

    def read(value: object) -> str:
        if value not in names:
            raise ValueError(f"it should be {', '.join(names[:-1])} or {names[-1]}")
        return str(value)

    return read


def _about(read: Callable[[object], Any], description: str) -> dict[str, Any]:
    """What a field's value is made with, from what was given (ValueError for what it cannot be), and told."""
    return {"read": read, "description": description}


# Not a pydantic model, which would cost every command 70 ms of start for these few.
@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every knob of ayllu that is not an argument of one command."""

    store: Path = field(
        default_factory=lambda: Path(platformdirs.user_data_dir("ayllu", appauthor=False)) / "models",
        metadata=_about(_path, "Folder that holds pulled models."),
    )
    default_model: str = field(
        default="qwen2.5-coder-1.5b-instruct",
        metadata=_about(_text, "Model that `ayllu chat` opens when none is named."),
    )
    device: str = field(
        default="auto", metadata=_about(_text, "Where the model runs: auto, cpu, cuda, cuda:N or mps.")
    )
    dtype: str = field(
        default="auto",
        metadata=_about(_text, "Precision of the weights in memory: auto, float32, bfloat16 or float16."),
    )
    runner: RunnerName = field(
        default="auto",
        metadata=_about(_one_of(RunnerName), "What computes: native, torch, or auto."),
    )
    threads: int | None = field(
        default=None, metadata=_about(_threads, "Threads of the native runner; one per processor if not set.")
    )
    cache_type: CacheType = field(
        default="auto",
        metadata=_about(_one_of(CacheType), "How keys and values are kept: auto or int8."),
    )
    weights: GpuWeights | None = field(
        default=None,
        metadata=_about(
            _one_of(GpuWeights),
            "How weights are packed on an NVIDIA GPU: int4, int4-128, int8 or fp8.",
        ),
    )
    experts: ExpertPlace = field(
        default="auto",
        metadata=_about(_one_of(ExpertPlace), "Where a mixture's experts are: memory, disk, or auto."),
    )
    speculate: Speculate | None = field(
        default=None,
        metadata=_about(_one_of(Speculate), "How tokens are drafted ahead: off, lookup or draft."),
    )
    draft: str | None = field(
        default=None, metadata=_about(_text, "Smaller model of the same family that drafts.")
    )
    timeout_s: float = field(
        default=30.0,
        metadata=_about(_timeout, "Seconds without a byte after which a source counts as stalled."),
    )
    origins: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def origin(self, name: str) -> str:
        """Where the value of `name` came from: 'flag', an environment variable, a file, or 'default'."""
        return self.origins.get(name, "default")


_KNOBS = {knob.name: knob.metadata for knob in fields(Settings) if knob.metadata}


def settings_file(environment: Mapping[str, str] = os.environ) -> Path:
    """The settings file that would be read; it need not exist."""
    named = environment.get(ENVIRONMENT_PREFIX + "CONFIG")
    return (
        Path(named) if named else Path(platformdirs.user_config_dir("ayllu", appauthor=False)) / "ayllu.toml"
    )


def load_settings(
    flags: Mapping[str, Any] | None = None, environment: Mapping[str, str] = os.environ
) -> Settings:
    """Settings for this process. `flags` holds the command-line values; None means 'not given'.

    Raises UsageError for an unknown name or an invalid value, naming its origin.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    file = settings_file(environment)
    if file.exists() or environment.get(ENVIRONMENT_PREFIX + "CONFIG"):
        try:
            from_file = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"{file} cannot be read: {error.strerror}.", "Correct AYLLU_CONFIG.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{file} is not valid TOML: {error}.", "Correct or remove the file.") from error
        for name, value in from_file.items():
            _require_known(name, str(file))
            values[name], origins[name] = value, str(file)
    for variable, value in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or not value:
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if name in ("config", "api_key"):  # where the file is; and a secret, which is nobody's setting
            continue
        _require_known(name, f"environment variable {variable}")
        values[name], origins[name] = value, variable
    for name, value in (flags or {}).items():
        if value is not None:
            _require_known(name, "flag")
            values[name], origins[name] = value, "flag"
    for name, value in values.items():
        try:
            values[name] = _KNOBS[name]["read"](value)
        except ValueError as error:
            raise UsageError(
                f"{name} = {value!r} (from {origins[name]}) is not valid: {error}.",
                f"{name} means: {_KNOBS[name]['description']}",
            ) from error
    return Settings(**values, origins=origins)


def _require_known(name: str, origin: str) -> None:
    if name not in _KNOBS:
        known = sorted(_KNOBS)
        raise UsageError(
            f"{origin} sets an unknown option {name!r}.{did_you_mean(name, known)}",
            f"Known options: {', '.join(known)}.",
        )
