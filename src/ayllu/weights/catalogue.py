"""The models ayllu knows by name, with licence, hash, size and sources, read from `catalogue.toml`.

A name maps to exact bytes: whichever source answers, the SHA-256 decides. Whole files are verified, since
publishers give no hashes of chunks; where a package mirror splits a file, each part's own hash is listed too.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ayllu.errors import UnknownModelError, UsageError, did_you_mean
from ayllu.weights.sources import FORMS, HubSource, PackageSource, Source
from ayllu.weights.sources.base import Pinned
from ayllu.weights.sources.safe_names import refuse_unless_model_file, safe_digest, safe_model_name
from ayllu.weights.sources.web import WebSource


def _typed[T](check: object) -> object: ...
