"""One typed settings object for the whole program.

Each value comes from the first of: command-line flag, environment (`AYLLU_<NAME>`), settings file (TOML),
built-in default. Where it came from is kept beside it, so that a surprising value can be explained.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ayllu.errors import UsageError, did_you_mean

ENVIRONMENT_PREFIX = "AYLLU_"


class Settings(BaseModel):
    """Every knob of ayllu that is not an argument of one command."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    store: Path = Field(
        default_factory=lambda: Path(platformdirs.user_data_dir("ayllu", appauthor=False)) / "models",
        description="Folder that holds pulled models.",
    )
    default_model: str = Field(
        default="qwen2.5-coder-1.5b-instruct", description="Model that `ayllu chat` opens when none is named."
    )
    device: str = Field(default="auto", description="Where the model runs: auto, cpu, cuda, cuda:N or mps.")
    dtype: str = Field(
        default="auto", description="Precision of the weights in memory: auto, float32, bfloat16 or float16."
    )
    timeout_s: float = Field(
        default=30.0,
        gt=0,
        le=3600,
        description="Seconds without a byte after which a source counts as stalled.",
    )

    _origins: dict[str, str] = {}

    def origin(self, name: str) -> str:
        """Where the value of `name` came from: 'flag', an environment variable, a file, or 'default'."""
        return self._origins.get(name, "default")


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
    try:
        settings = Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise UsageError(
            f"{name} = {values[name]!r} (from {origins[name]}) is not valid: {first['msg']}.",
            f"{name} means: {Settings.model_fields[name].description}",
        ) from error
    settings._origins.update(origins)
    return settings


def _require_known(name: str, origin: str) -> None:
    if name not in Settings.model_fields:
        known = sorted(Settings.model_fields)
        raise UsageError(
            f"{origin} sets an unknown option {name!r}.{did_you_mean(name, known)}",
            f"Known options: {', '.join(known)}.",
        )
