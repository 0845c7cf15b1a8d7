"""The answers of a batch: a file of JSON Lines in the layout of OpenAI's batch API, and its own journal.

A batch may be killed at any moment. What stands whole in the output is done and is not computed again; a last
line that was cut off in mid-write is removed. Nothing else has to be kept, or can be lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from ayllu.engine.batch.file import Ids, Line
from ayllu.errors import UsageError, clip
from ayllu.weights.new_file import new_file, write_failure

SYNC_INTERVAL_S = 1.0
"""Seconds after which answers are forced to the disk. Until then a power failure may cost them; the end of
the program, however sudden, does not."""

_HEAD_BYTES = 16 << 10
_PIECE_BYTES = 1 << 20
_OPENING = b'{"id":"batch_req_'
_HEAD = re.compile(
    rb'\{"id":"(batch_req_[0-9a-z_]++)","custom_id":(null|"(?:[^"\\]++|\\.)*+"),'
    rb'"response":\{"status_code":(\d{3}),'
)


class Output:
    """The answers of a batch. Opening one takes in what an earlier run left; use it in a `with` block.

    A last line that was cut off in mid-write is removed. force: keep answers to requests that have changed or
    are not in the input, instead of refusing to mix them. retry_failed: forget answers whose status is 429 or
    from 500 on, so that their requests run again.

    Raises UsageError when the file is no output of a batch, belongs to another input, or is in use.
    """

    def __init__(
        self, path: Path, source: Path, ids: Ids, *, force: bool = False, retry_failed: bool = False
    ) -> None:
        self.path = path
        self.ids = ids
        self._source = source
        self._force = force
        self._retry_failed = retry_failed
        self._synced = time.monotonic()
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is no ordinary file.", "Choose another --output.")
        if path.exists() and path.samefile(source):
            raise UsageError(f"{path} is the input itself.", "Choose another --output.")
        if not path.parent.is_dir():
            raise UsageError(f"{path.parent} is no folder.", "Make it, or choose another --output.")
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise UsageError(
                f"Another `ayllu batch` is writing {path}.", "Wait for it, or choose another --output."
            ) from error
        except OSError as error:
            raise write_failure(path, error) from error
        try:
            self._end = self._take_in() if path.exists() else 0
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            self._unlock()
            raise write_failure(path, error) from error
        except BaseException:
            self._unlock()
            raise

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, line: Line, status: int, request_id: str, body: dict[str, Any]) -> None:
        """Append the answer to `line`. It is with the system when this returns, and on the disk soon.

        Raises NoSpaceError or UsageError when it cannot be written; the file then ends where it did before.
        """
        data = _record(line, status, request_id, body)
        view = memoryview(data)
        try:
            while view:
                view = view[self._file.write(view) :]
            self._end += len(data)
            self.ids.finish(line.key)
            if time.monotonic() - self._synced >= SYNC_INTERVAL_S:
                self._sync()
        except OSError as error:
            raise write_failure(self.path, error) from error

    def close(self) -> None:
        """Bring everything to the disk. Idempotent."""
        if self._file.closed:
            return
        with self._file, contextlib.suppress(OSError):
            if os.fstat(self._file.fileno()).st_size > self._end:
                # Interrupted in mid-write. Whoever is killed instead leaves this to the next run.
                self._file.truncate(self._end)
            self._sync()
        self._unlock()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def _unlock(self) -> None:
        with contextlib.suppress(OSError):
            Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def _take_in(self) -> int:
        """Note what is done, and repair the file. Returns its length then."""
        end = 0
        forgotten: list[tuple[int, int]] = []
        with self.path.open("rb") as file:
            for number, record in enumerate(_records(file), 1):
                found = _HEAD.match(record.head)
                if not record.whole and record.may_be_torn:
                    break
                if not record.whole or found is None:
                    raise UsageError(
                        f"Line {number} of {self.path} is no answer of `ayllu batch`.",
                        "Choose another --output.",
                    )
                end = record.end
                if self._retry_failed and int(found[3]) in (429, *range(500, 600)):
                    forgotten.append((record.start, record.end))
                else:
                    self._note(found[1].decode(), json.loads(found[2]))
        if forgotten:
            end = self._without(forgotten, end)
        elif end < self.path.stat().st_size:
            os.truncate(self.path, end)
        return end

    def _note(self, record_id: str, custom_id: str | None) -> None:
        if custom_id is None:
            key = f"line {record_id.removeprefix('batch_req_line_')}"
            if self.ids.find(key) is not None:
                self.ids.finish(key)
            return
        key = f"id {custom_id}"
        found = self.ids.find(key)
        if found is None:
            self._refuse(f"{self.path} answers {clip(repr(custom_id), 80)}, which is not in {self._source}.")
            return
        line, line_id = found
        if line_id != record_id:
            self._refuse(
                f"Line {line} of {self._source}, {clip(repr(custom_id), 80)}, is not what it was when "
                f"{self.path} answered it."
            )
        self.ids.finish(key)

    def _refuse(self, problem: str) -> None:
        if not self._force:
            raise UsageError(problem, "Choose another --output, or keep the answers there with --force.")

    def _without(self, forgotten: Sequence[tuple[int, int]], end: int) -> int:
        """Rewrite the file up to `end` without these stretches. Returns its new length."""
        kept, start = 0, 0
        with self.path.open("rb") as old, new_file(self.path) as new:
            for stop, following in (*forgotten, (end, end)):
                old.seek(start)
                while start < stop and (piece := old.read(min(_PIECE_BYTES, stop - start))):
                    new.write(piece)
                    start += len(piece)
                    kept += len(piece)
                start = following
        return kept


def _record(line: Line, status: int, request_id: str, body: dict[str, Any]) -> bytes:
    """A line of the output. `_HEAD` reads its beginning: the order of the fields matters."""
    record = {
        "id": line.id,
        "custom_id": line.custom_id,
        "response": {"status_code": status, "request_id": request_id, "body": body},
        "error": None,
    }
    try:
        text = json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return text.encode() + b"\n"
    except UnicodeEncodeError:
        # Half of a surrogate pair, from a remote engine: JSON can say it in its own way.
        return json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"


@dataclass(frozen=True)
class _Record:
    start: int
    end: int
    head: bytes
    whole: bool

    @property
    def may_be_torn(self) -> bool:
        """Whether a line without an end begins as ours do, or is what a lost write leaves: zeros."""
        return self.head.startswith(_OPENING) or _OPENING.startswith(self.head) or not self.head.strip(b"\0")


def _records(file: BinaryIO) -> Iterator[_Record]:
    """Where the lines of an output stand, and how each begins; the rest of a line is never held."""
    start = 0
    while head := file.readline(_HEAD_BYTES):
        last = head
        while not last.endswith(b"\n") and (piece := file.readline(_PIECE_BYTES)):
            last = piece
        end = file.tell()
        yield _Record(start, end, head, last.endswith(b"\n"))
        start = end
