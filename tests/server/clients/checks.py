"""What the jobs share: named checks, run one after the other and told as one JSON object on standard output.

A job is a script for the clients' own environment. It knows the server by BASE_URL, KEY, MODEL and their like
in its environment, and ends with 0 if every check held. `python some_job.py NAME ...` runs only those checks.
"""

from __future__ import annotations

import base64
import json
import os
import struct
import sys
import time
import traceback
import zlib
from collections.abc import Callable
from typing import Any

Check = Callable[[], Any]
_checks: dict[str, Check] = {}

BASE_URL = os.environ.get("BASE_URL", "")
KEY = os.environ.get("KEY", "")
MODEL = os.environ.get("MODEL", "")
EMBEDDING_MODEL = os.environ.get("EMBEDDING_MODEL", "")
VISION_MODEL = os.environ.get("VISION_MODEL", "")
LIMITED_KEY = os.environ.get("LIMITED_KEY", "")

SYSTEM = "You are a helpful assistant."
"""Its own word for itself makes SmolLM2 talk of other things."""

QUESTION = "What is the capital of France?"
PERSON_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Ada", "Alan", "Grace"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER_SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Lima", "Tokyo"]},
        "unit": {"type": "string", "enum": ["C", "F"]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
WEATHER = "How warm is it in Paris, in degrees Celsius?"


def check(function: Check) -> Check:
    """Make a function one of the job's checks."""
    _checks[function.__name__] = function
    return function


def equal(found: Any, expected: Any, what: str = "") -> None:
    """Fail with both values in the message."""
    assert found == expected, f"{what or 'found'}: {found!r}, expected {expected!r}"


def fits_weather(arguments: str | dict[str, Any]) -> None:
    """Whether a call's arguments are what WEATHER_SCHEMA asks for."""
    found = json.loads(arguments) if isinstance(arguments, str) else arguments
    equal(set(found), {"city", "unit"}, "arguments")
    assert found["city"] in ("Paris", "Lima", "Tokyo") and found["unit"] in ("C", "F"), found


def fits_person(found: dict[str, Any]) -> None:
    """Whether an answer is what PERSON_SCHEMA asks for."""
    equal(set(found), {"name", "age"}, "person")
    assert found["name"] in ("Ada", "Alan", "Grace") and 0 <= found["age"] <= 120, found


def png(red: int, green: int, blue: int, size: int = 56) -> bytes:
    """A square picture of one colour."""

    def piece(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    rows = (b"\0" + bytes((red, green, blue)) * size) * size
    return (
        b"\x89PNG\r\n\x1a\n"
        + piece(b"IHDR", header)
        + piece(b"IDAT", zlib.compress(rows))
        + piece(b"IEND", b"")
    )


def data_url(image: bytes) -> str:
    """A PNG as the URL that holds it."""
    return "data:image/png;base64," + base64.b64encode(image).decode()


def report(job: str) -> None:
    """Run the checks, print what came of them, and end the program."""
    wanted = sys.argv[1:] or list(_checks)
    passed: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name in wanted:
        started = time.monotonic()
        try:
            _checks[name]()
            passed[name] = round(time.monotonic() - started, 2)
        except Exception:
            failed[name] = traceback.format_exc(limit=-4)[-3000:]
    print(json.dumps({"job": job, "passed": passed, "failed": failed}, indent=1))
    sys.exit(1 if failed else 0)
