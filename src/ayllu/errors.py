"""Every error a user can meet, drawn as one tree.

Each class carries one process exit code and one HTTP status, and each message says what is wrong and
then what to do about it, in one line. Anything else that escapes is a bug in ayllu, not a user's mistake.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class AylluError(Exception):
    """Base of every expected failure. `fix` is the action that ends it, often an exact command.

    retry_after_s: seconds after which another try makes sense; None where that is not known.
    """

    exit_code = 1
    http_status = 500
    retry_after_s: float | None = None

    def __init__(self, problem: str, fix: str = "") -> None:
        self.problem = one_line(problem)
        self.fix = one_line(fix)
        super().__init__(f"{self.problem} {self.fix}".strip())


class UsageError(AylluError):
    """The command or request itself is wrong: unknown option, impossible value, missing argument."""

    exit_code = 2
    http_status = 400


class UnknownModelError(UsageError):
    """No model of that name is installed or known."""

    exit_code = 3
    http_status = 404


class UnsupportedError(AylluError):
    """A well-formed file or request that asks for something ayllu does not implement."""

    exit_code = 4
    http_status = 400


class ContextOverflowError(AylluError):
    """The conversation does not fit into the model's context window."""

    exit_code = 5
    http_status = 400


class MissingExtraError(AylluError):
    """An optional dependency is needed. The message names the extra that brings it."""

    exit_code = 6
    http_status = 501

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional dependency.", f"Install it: pip install 'ayllu[{extra}]'")


class ModelFileError(AylluError):
    """A model file that is damaged, hostile or not what its name says.

    `field` names the place inside the file, `offset` its byte position where one is known.
    """

    exit_code = 7
    http_status = 422

    def __init__(
        self,
        file: Path | str,
        reason: str,
        *,
        field: str | None = None,
        offset: int | None = None,
        expected: object = None,
        got: object = None,
        fix: str = "Fetch the file again, or use another one.",
    ) -> None:
        self.file = str(file)
        self.field = field
        self.offset = offset
        self.expected = expected
        self.got = got
        where = self.file
        if field is not None:
            where += f", {clip(field)}"
        if offset is not None:
            where += f" (byte {offset})"
        detail = reason.rstrip(".")
        if expected is not None:
            detail += f", expected {clip(expected)}"
        if got is not None:
            detail += f", got {clip(got)}"
        super().__init__(f"{where}: {detail}.", fix)


class IntegrityError(AylluError):
    """Bytes arrived complete but are not the bytes that were promised (SHA-256 differs)."""

    exit_code = 8
    http_status = 502


class SourceError(AylluError):
    """A model source did not deliver: unreachable, refused, cut off, or lying about length."""

    exit_code = 9
    http_status = 502


class NoSpaceError(AylluError):
    """The disk or the memory is too small for what was asked."""

    exit_code = 10
    http_status = 507


class TemplateError(AylluError):
    """A chat template that fails, or that exceeds the limits it runs under."""

    exit_code = 11
    http_status = 422


class ImageError(AylluError):
    """An image that cannot be decoded, or is larger than allowed."""

    exit_code = 12
    http_status = 400


class GrammarError(AylluError):
    """A schema, pattern or grammar that cannot be compiled, or that exceeds the limits of size and time."""

    exit_code = 13
    http_status = 400


class OverloadedError(AylluError):
    """The queue is full: nothing was started."""

    exit_code = 14
    http_status = 429
    retry_after_s: float

    def __init__(self, problem: str, fix: str = "Try again later.", *, retry_after_s: float = 1.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(problem, fix)


class EngineCrashedError(AylluError):
    """The engine ended while the request was open; it starts again by itself, the request does not."""

    exit_code = 15
    http_status = 503


class EngineUnavailableError(AylluError):
    """There is no engine to take the request: closed, still starting, or stopped after repeated crashes."""

    exit_code = 16
    http_status = 503


class RequestFailedError(AylluError):
    """One request failed inside the engine. Others are not affected."""

    exit_code = 17
    http_status = 500


class RemoteEngineError(AylluError):
    """A remote engine could not be reached, timed out, or answered what no such server should."""

    exit_code = 18
    http_status = 502


class AccessError(AylluError):
    """A remote engine refused the key, or the key may not do this."""

    exit_code = 19
    http_status = 403


class SignInError(AylluError):
    """Nobody is signed in, or what was shown (key, cookie, link, password) is wrong, used up or expired."""

    exit_code = 20
    http_status = 401


class ForbiddenError(AylluError):
    """Somebody is signed in who may not do this."""

    exit_code = 21
    http_status = 403


class NotFoundError(AylluError):
    """There is no such thing, or none of the caller's: which of the two is not told."""

    exit_code = 22
    http_status = 404


class ConflictError(AylluError):
    """What was asked contradicts what is there: a name that is taken, a run that has ended."""

    exit_code = 23
    http_status = 409


class TooLargeError(AylluError):
    """A body or an upload that is larger than allowed."""

    exit_code = 24
    http_status = 413


class StateError(AylluError):
    """The database of the server cannot be opened, is newer than this program, or does not answer."""

    exit_code = 25
    http_status = 503


def one_line(text: str) -> str:
    """`text` with line breaks and control characters made visible, so that a message stays one line."""
    return "".join(ch if ch.isprintable() else ch.encode("unicode_escape").decode() for ch in text)


def clip(value: object, limit: int = 120) -> str:
    """`value` as text of at most `limit` characters: file contents must not flood an error message."""
    text = str(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the nearest of `known`, or the empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else ""
