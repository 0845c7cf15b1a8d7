"""The requests of a batch: a file of JSON Lines in the layout of OpenAI's batch API, however large.

Lines are streamed and bounded, and a bad one is marked instead of ending the batch. Which ids there are, and
which are done, is kept in a temporary database on disk. `output` is the other file.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ayllu.engine.openai.body import MAX_BODY_BYTES, InvalidBodyError, read_json_object
from ayllu.engine.openai.requests import ENDPOINTS
from ayllu.errors import UsageError, clip, did_you_mean

MAX_LINE_BYTES = MAX_BODY_BYTES
MAX_ID_CHARACTERS = 512
MAX_MODELS = 16
"""Different model names in one batch that are told apart; beyond that only their number matters."""

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Line:
    """One request of the input. `error` says what is wrong with one that cannot be taken: it has no body.

    id: of its answer. It is a digest of the request, so that a request that has changed since it was answered
    is noticed; one without a usable custom_id is known by its number (from 1).
    """

    number: int
    id: str
    custom_id: str | None
    url: str = ""
    body: dict[str, Any] = field(default_factory=dict)
    error: InvalidBodyError | None = None

    @property
    def key(self) -> str:
        """What tells it from all other lines."""
        return f"line {self.number}" if self.custom_id is None else f"id {self.custom_id}"


def read_lines(path: Path) -> Iterator[Line]:
    """The requests of a batch file, in order; blank lines are passed over, bad ones marked.

    Raises UsageError when it is no file that can be read, twice if need be.
    """
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is no ordinary file.", "Put the requests into a file.")
    try:
        with path.open("rb") as file:
            for number, data in enumerate(_bounded_lines(file), 1):
                if data is None:
                    problem = f"The line is longer than {MAX_LINE_BYTES:,} bytes."
                    yield _bad(number, None, InvalidBodyError(problem, "Send less in one request."))
                    continue
                data = data.removeprefix(b"\xef\xbb\xbf") if number == 1 else data
                if data.strip():
                    yield parse_line(number, data)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.", "Check the path.") from error


def _bounded_lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Lines of a file; None for one longer than MAX_LINE_BYTES, which is never held as a whole."""
    while data := file.readline(MAX_LINE_BYTES + 1):
        if len(data) <= MAX_LINE_BYTES or data.endswith(b"\n"):
            yield data
            continue
        while (more := file.readline(_PIECE_BYTES)) and not more.endswith(b"\n"):
            pass
        yield None


def parse_line(number: int, data: bytes) -> Line:
    """One line of a batch file. Never raises: what is wrong with it is in `error`."""
    try:
        value = read_json_object(data, f"line {number}")
    except InvalidBodyError as error:
        return _bad(number, None, error)
    given = value.get("custom_id")
    usable = isinstance(given, str) and 0 < len(given) <= MAX_ID_CHARACTERS
    custom_id = given if usable else None
    whole = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
    line_id = f"batch_req_{hashlib.sha256(whole).hexdigest()[:32]}"
    problem = _first_problem(value)
    if problem is not None:
        return _bad(number, custom_id, problem, line_id)
    return Line(number, line_id, custom_id, value["url"], value["body"])


def _bad(number: int, custom_id: str | None, error: InvalidBodyError, line_id: str | None = None) -> Line:
    if custom_id is None or line_id is None:
        line_id = f"batch_req_line_{number}"
    return Line(number, line_id, custom_id, error=error)


def _first_problem(value: dict[str, Any]) -> InvalidBodyError | None:
    known: dict[str, type] = {"custom_id": str, "method": str, "url": str, "body": dict}
    for name in value:
        if name not in known:
            shown = clip(name, 64)
            return _problem(
                shown, f"{shown} is no known field of a line.{did_you_mean(shown, known)}", "Leave it out."
            )
    for name, kind in known.items():
        if not isinstance(value.get(name), kind):
            word = "an object" if kind is dict else "a string"
            return _problem(name, f"{name} is missing or is not {word}.", f"Give {word}.")
    if not 0 < len(value["custom_id"]) <= MAX_ID_CHARACTERS:
        return _problem(
            "custom_id", "custom_id is empty or too long.", f"Use 1 to {MAX_ID_CHARACTERS} letters."
        )
    if value["method"] != "POST":
        return _problem("method", f"method = {clip(value['method'], 20)} is not valid.", "Use POST.")
    if value["url"] not in ENDPOINTS:
        shown = clip(value["url"], 80)
        return _problem(
            "url",
            f"url = {shown} is unknown.{did_you_mean(shown, ENDPOINTS)}",
            f"Use {', '.join(ENDPOINTS)}.",
        )
    return None


def _problem(param: str, problem: str, fix: str) -> InvalidBodyError:
    return InvalidBodyError(problem, fix, param=param)


@dataclass(frozen=True)
class Survey:
    """What a first reading of the input found. models: names that bodies give; None in it: too many."""

    total: int
    bad: int
    models: frozenset[str]


class Ids:
    """Which requests there are and which are done, in a temporary database that the system removes."""

    def __init__(self) -> None:
        # An empty name: in memory while small, then in a file without a name.
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute(
            "CREATE TABLE requests (key TEXT PRIMARY KEY, line INTEGER, id TEXT, done INTEGER) WITHOUT ROWID"
        )

    def add(self, line: Line) -> int | None:
        """Note a request; the number of the line that has its custom_id already, if there is one."""
        try:
            self._database.execute(
                "INSERT INTO requests VALUES (?, ?, ?, 0)", (line.key, line.number, line.id)
            )
        except sqlite3.IntegrityError:
            return int(self._row(line.key)[0])
        return None

    def finish(self, key: str) -> None:
        """Note that a request is done."""
        self._database.execute("UPDATE requests SET done = 1 WHERE key = ?", (key,))

    def is_done(self, key: str) -> bool:
        return bool(self._row(key)[2])

    def find(self, key: str) -> tuple[int, str] | None:
        """The line number and id of a request; None when there is no such request."""
        row = self._database.execute("SELECT line, id FROM requests WHERE key = ?", (key,)).fetchone()
        return None if row is None else (int(row[0]), str(row[1]))

    def _row(self, key: str) -> tuple[Any, ...]:
        row = self._database.execute("SELECT line, id, done FROM requests WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise UsageError("The input changed while it was being read.", "Run the batch again.")
        return tuple(row)

    @property
    def done(self) -> int:
        """How many are done."""
        return int(self._database.execute("SELECT COUNT(*) FROM requests WHERE done").fetchone()[0])

    def close(self) -> None:
        self._database.close()


def survey(path: Path, ids: Ids, *, strict: bool = False) -> Survey:
    """Read the whole input once before anything runs.

    Raises UsageError, naming the lines, for a custom_id that stands twice, and if `strict` for a line that is
    no valid request.
    """
    total = bad = 0
    models: set[str] = set()
    for line in read_lines(path):
        total += 1
        if (earlier := ids.add(line)) is not None:
            raise UsageError(
                f"Lines {earlier} and {line.number} of {path} have the same custom_id "
                f"{clip(repr(line.custom_id), 80)}.",
                "Give each request its own.",
            )
        try:
            if line.error is not None:
                raise line.error
            if strict:
                ENDPOINTS[line.url](line.body)
        except UsageError as error:
            bad += 1
            if strict:
                problem = f"Line {line.number} of {path} is no valid request: {error.problem}"
                raise UsageError(problem, error.fix) from error
        model = line.body.get("model")
        if isinstance(model, str) and len(models) <= MAX_MODELS:
            models.add(clip(model, MAX_ID_CHARACTERS))
    return Survey(total, bad, frozenset(models))
