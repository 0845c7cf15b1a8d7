"""JSON bodies in OpenAI's shapes: read within bounds, checked field by field, refused at a named place.

A field that is silently dropped gives answers nobody asked for. So every model here is strict: a field it
does not know is an error that names the nearest one it does, and a known field that asks for what ayllu does
not do says so with the reason.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from ayllu.errors import ModelFileError, UsageError, clip, did_you_mean
from ayllu.json_file import parse_json_object

MAX_BODY_BYTES = 32 << 20
"""Holds the largest image (20 MB, a third more in base64) and some text."""

MAX_VALUES = 2_000_000
MAX_DEPTH = 100

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_FIELDS = "docs/api.md lists the fields."


class InvalidBodyError(UsageError):
    """A request body that is wrong at one place.

    `param` is the path of the field ("messages.0.role"; None: the body as a whole), `code` OpenAI's word for
    the kind of mistake.
    """

    def __init__(
        self, problem: str, fix: str, *, param: str | None = None, code: str = "invalid_value"
    ) -> None:
        self.param = param
        self.code = code
        super().__init__(problem, fix)


@contextmanager
def blaming(param: str) -> Iterator[None]:
    """Give a mistake found in the block, where only our own names are known, the caller's name for it."""
    try:
        yield
    except InvalidBodyError:
        raise
    except UsageError as error:
        problem = error.problem if param.split(".")[0] in error.problem else f"{param}: {error.problem}"
        raise InvalidBodyError(problem, error.fix, param=param) from error


def read_json_object(data: bytes, what: str, *, max_bytes: int = MAX_BODY_BYTES) -> dict[str, Any]:
    """The JSON object in `data`; `what` names it in errors.

    Raises InvalidBodyError when it is too large, holds more than MAX_VALUES values, is nested deeper than
    MAX_DEPTH, is not strict JSON (NaN, a key twice), or holds what is no text or no finite number.
    """
    if len(data) > max_bytes:
        raise _unreadable(f"{what} is larger than {max_bytes:,} bytes.", "Send less in one request.")
    # Text can only raise the count, so the exact one is made only when that might matter.
    if _values(data) > MAX_VALUES and _values(_STRING.sub(b"", data)) > MAX_VALUES:
        raise _unreadable(f"{what} holds more than {MAX_VALUES:,} values.", "Send less in one request.")
    try:
        value = parse_json_object(data, Path(what))
    except ModelFileError as error:
        raise _unreadable(error.problem, "Send one JSON object.") from error
    _require_harmless(value, what)
    if _SURROGATE.search(data):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise _unreadable(
                f"{what} holds half of a surrogate pair, which is no character.", "Send whole characters."
            ) from error
    return value


def _values(data: bytes) -> int:
    return 1 + sum(data.count(opener) for opener in (b"[", b"{", b","))


def _require_harmless(value: dict[str, Any], what: str) -> None:
    """Level by level rather than by recursion: what comes later may recurse, and Python's stack is small."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for container in level:
            for item in container.values() if isinstance(container, dict) else container:
                if isinstance(item, dict | list):
                    below.append(item)
                elif isinstance(item, float) and not math.isfinite(item):
                    raise _unreadable(f"{what} holds a number that is not finite.", "Use smaller numbers.")
        if not below:
            return
        level = below
    raise _unreadable(f"{what} is nested deeper than {MAX_DEPTH} levels.", "Make it flatter.")


def _unreadable(problem: str, fix: str) -> InvalidBodyError:
    return InvalidBodyError(problem, fix, code="invalid_json")


class Strict(BaseModel):
    """Base of all bodies. `refused` names fields that others know and ayllu does not do, with the reason and
    what to do instead; null there, as everywhere, means 'not given'."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    refused: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _only_known(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for name, value in data.items():
            if name in known or (name in cls.refused and value is None):
                continue
            if name in cls.refused:
                raise at(name, "is not supported.", cls.refused[name], "unsupported_parameter")
            shown = clip(name, 64)
            raise at(shown, f"is no known field.{did_you_mean(shown, known)}", _FIELDS, "unknown_parameter")
        return {name: value for name, value in data.items() if name in known}


def at(field: str, problem: str, fix: str, code: str = "invalid_value") -> PydanticCustomError:
    """A mistake to be raised by a validator; `field` is relative to where the validator stands."""
    details = {"field": field, "problem": problem, "fix": fix, "code": code}
    return PydanticCustomError("ayllu", "{problem}", details)


Body = TypeVar("Body", bound=Strict)


def validated(model: type[Body], body: Mapping[str, Any]) -> Body:
    """`body` as a `model`. Raises InvalidBodyError for the first field that is wrong."""
    try:
        return model.model_validate(dict(body))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    details = first.get("ctx", {})
    own = first["type"] == "ayllu"
    path = [str(step) for step in first["loc"]]
    if own and details["field"]:
        path.append(details["field"])
    param = clip(".".join(path), 200) or None
    name = param or "The body"
    if own:
        problem, fix, code = f"{name} {details['problem']}", details["fix"], details["code"]
    elif first["type"] == "missing":
        problem, fix, code = f"{name} is missing.", "Give it.", "missing_required_parameter"
    else:
        shown = clip(json.dumps(first["input"], ensure_ascii=False, default=str), 60)
        problem, fix, code = f"{name} = {shown} is not valid.", f"{first['msg']}.", "invalid_value"
    raise InvalidBodyError(problem, fix, param=param, code=code)
