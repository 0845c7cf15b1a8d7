"""The log: no secret comes out, no line can be forged, and writing it never holds the server up."""

from __future__ import annotations

import io
import json
import logging
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ayllu.server import logs
from ayllu.server.logs import LogWriter, Redactor, ServerLog, request_context, secrets_of, set_up_logging
from ayllu.server.state.records import Key, User
from ayllu.settings import Settings

SetUp = Callable[..., tuple[LogWriter, Callable[[], str]]]

ALPHABET = "abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789"


def random_text(length: int) -> str:
    """As keys are made; always with digits, small and capital letters."""
    return "aB3" + "".join(secrets.choice(ALPHABET) for _ in range(length - 3))


@pytest.fixture
def set_up(tmp_path: Path) -> Iterator[SetUp]:
    """Sets the log up, and gives what was written so far once the writer has been closed."""
    root, hook = logging.getLogger(), threading.excepthook
    level = root.level
    opened: list[Any] = []

    def start(form: str = "json", **more: Any) -> tuple[LogWriter, Callable[[], str]]:
        file = tmp_path / f"log{len(opened)}"
        stream = file.open("w", encoding="utf-8")
        opened.append(stream)
        # pytest's own, which raises for what cannot be shown.
        root.handlers[:] = [one for one in root.handlers if isinstance(one, LogWriter)]
        writer = set_up_logging(form, stream=stream, **more)  # type: ignore[arg-type]

        def text() -> str:
            writer.close()
            return file.read_text(encoding="utf-8")

        return writer, text

    yield start
    for handler in [*root.handlers]:
        if isinstance(handler, LogWriter):
            root.removeHandler(handler)
            handler.close()
    root.setLevel(level)
    threading.excepthook = hook
    for stream in opened:
        stream.close()


def identity() -> Any:
    """Like access.Identity, as far as the log looks at it."""
    user = User(id="u1", name="Ana", role="user", disabled=False, has_password=True, created_at=0)
    key = Key(
        id="k1",
        user_id="u1",
        name="laptop",
        prefix="ay-aB3dE",
        scopes=(),
        created_at=0,
        expires_at=None,
        revoked_at=None,
        last_used_at=None,
    )
    return type("Identity", (), {"user_id": "u1", "user": user, "key": key})()


def one_json(text: str) -> dict[str, Any]:
    (line,) = text.splitlines()
    body: dict[str, Any] = json.loads(line)
    return body


def access(**changes: Any) -> None:
    ServerLog().access(
        **{
            "request_id": "r1",
            "method": "POST",
            "route": "/v1/responses/{response_id}",
            "status": 200,
            "seconds": 0.0123,
            "identity": identity(),
            "client": "127.0.0.1",
            **changes,
        }
    )


def test_a_request_is_one_line_of_json_with_who_what_and_how_long(set_up: SetUp) -> None:
    _, text = set_up("json")
    access(model="tiny", prompt_tokens=3, new_tokens=7)
    body = one_json(text())
    assert body.pop("ts").endswith("Z")
    assert body == {
        "level": "info",
        "logger": "ayllu.access",
        "event": "request",
        "request_id": "r1",
        "method": "POST",
        "route": "/v1/responses/{response_id}",
        "status": 200,
        "ms": 12.3,
        "user": "u1",
        "key": "ay-aB3dE",
        "client": "127.0.0.1",
        "model": "tiny",
        "prompt_tokens": 3,
        "new_tokens": 7,
    }


def test_a_request_is_one_line_of_text(set_up: SetUp) -> None:
    _, text = set_up("text")
    access(identity=None, status=503)
    written = text()
    assert written.count("\n") == 1
    assert "ERROR   ayllu.access request request_id=r1 method=POST" in written
    assert "route=/v1/responses/{response_id} status=503 ms=12.3 client=127.0.0.1" in written


def test_lines_of_a_request_carry_its_id(set_up: SetUp) -> None:
    _, text = set_up("json")
    with request_context("r7"):
        logging.getLogger("ayllu.server").warning("something %s", "happened")
    body = one_json(text())
    assert body["request_id"] == "r7" and body["event"] == "something happened"


def planted() -> dict[str, tuple[str, str]]:
    """25 secrets: what holds each, and the part of it that must not be seen."""
    key, token, hidden = f"ay-{random_text(43)}", random_text(43), random_text(12)
    jwt = f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiI{random_text(9)}.{random_text(30)}"
    basic = "QWxhZGRpbjpvcGVuIHNlc2FtZQ=="
    pem = f"-----BEGIN RSA PRIVATE KEY-----\n{hidden}\nMIIEow\n-----END RSA PRIVATE KEY-----"
    texts = {
        "bare key": (key, key[3:]),
        "key in a sentence": (f"The key {key} is revoked.", key[3:]),
        "bearer": (f"Authorization: Bearer {hidden}", hidden),
        "bearer alone": (f"sent bearer {hidden}", hidden),
        "basic": (f"authorization: Basic {basic}", basic[:12]),
        "basic alone": (f"Basic {basic}", basic[:12]),
        "x-api-key": (f"x-api-key: {hidden}", hidden),
        "raw headers": (str([(b"x-api-key", hidden.encode())]), hidden),
        "header dict": (str({"authorization": f"Bearer {hidden}"}), hidden),
        "cookie": (f"Cookie: a=b; ayllu_session={hidden}; c=d", hidden),
        "raw cookie": (str([(b"cookie", f"ayllu={hidden}".encode())]), hidden),
        "set-cookie": (f"set-cookie: ayllu={hidden}; HttpOnly", hidden),
        "dsn": (f"postgresql+psycopg://ayllu:{hidden}@db/ayllu", hidden),
        "dsn with @ and /": (f"postgresql://ayllu:p@ss/{hidden}@db:5432/x", hidden),
        "token as user": (f"https://{hidden}@hub.example/x", hidden),
        "sign-in link": (f"GET http://127.0.0.1:8420/sign-in?token={hidden} HTTP/1.1", hidden),
        "oidc code": (f"/oidc/back?code={hidden}&state={hidden}", hidden),
        "json password": (json.dumps({"password": f'with "quotes" {hidden}'}), hidden),
        "repr password": (f"SignIn(name='Ana', password='{hidden}')", hidden),
        "password with signs": (f"password=a&b;c({hidden})", hidden),
        "cut off": (f'{{"password": "{hidden} and no end', hidden),
        "environment": (f"OIDC_CLIENT_SECRET={hidden}", hidden),
        "jwt": (f"id {jwt}", jwt[-20:]),
        "pem": (pem, hidden),
        "unnamed token": (f"link {token} was used", token),
    }
    assert len(texts) == 25
    return texts


@pytest.mark.parametrize("form", ["text", "json"])
def test_of_25_planted_secrets_none_is_seen_however_it_is_logged(set_up: SetUp, form: str) -> None:
    _, text = set_up(form)
    log = logging.getLogger("ayllu.server")
    texts = planted()
    for said, _ in texts.values():
        log.info(said)
        log.warning("got %s", said)
        log.error("got %r", {"body": said})
        log.info("with a field", extra={"detail": said})
        log.error("wrong %d", said)
        log.error("x" * (logs.MOST_CHARACTERS - 10) + " " + said)
        try:
            raise ValueError(said)
        except ValueError:
            log.exception("failed")
        try:
            try:
                raise KeyError(said)
            except KeyError as error:
                raise RuntimeError("outer") from error
        except RuntimeError:
            log.exception("failed twice")
        logging.getLogger("uvicorn.error").error("%s", said)
        logging.getLogger("sqlalchemy.engine").error("[parameters: %r]", (said,))
        access(client=said)
        thread = threading.Thread(target=_fail, args=(said,), name="worker")
        thread.start()
        thread.join()
    written = text()
    assert written.count(logs.REDACTED) > 25 * 8
    seen = [line for line in written.splitlines() if any(secret in line for _, secret in texts.values())]
    assert seen == []


def _fail(said: str) -> None:
    raise ValueError(said)


def test_secrets_that_the_server_was_told_of_are_hidden_wherever_they_stand(set_up: SetUp) -> None:
    _, text = set_up("json", secrets=["hunter2 hunter2", "", "x"])
    logging.getLogger("ayllu").warning("it is hunter2 hunter2, x")
    assert one_json(text())["event"] == "it is [redacted], x"


def test_the_secrets_of_the_settings_are_known_as_they_are_written_and_as_they_are_meant() -> None:
    found = secrets_of(Settings(database="postgresql://u:p%40ss%20word@h/d", oidc_client_secret="shh-shh"))
    assert {"p%40ss%20word", "p@ss word", "shh-shh"} <= set(found)
    assert Redactor(found)("FATAL: p@ss word is wrong, shh-shh") == "FATAL: [redacted] is wrong, [redacted]"
    assert secrets_of(Settings()) == []


def test_fields_named_like_secrets_are_hidden(set_up: SetUp) -> None:
    _, text = set_up("json")
    logging.getLogger("ayllu").warning("set", extra={"client_secret": "short", "tokens": 12})
    body = one_json(text())
    assert body["client_secret"] == logs.REDACTED and body["tokens"] == 12


@pytest.mark.parametrize(
    "ordinary",
    [
        "max_tokens=16 new_tokens=12 tokens_per_minute: 100",
        "model qwen2.5-coder-1.5b-instruct is ready at http://127.0.0.1:8420/v1",
        "sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "request 0123456789abcdef0123456789abcdef took 12 ms",
        "the password is wrong; a new key is needed; basic authentication",
        "postgresql://ayllu@db:5432/ayllu",
        "/v1/conversations/{conversation_id}/messages/{message_id}",
        "日本語の記録 /v1/responses/{response_id}",
    ],
)
def test_what_is_no_secret_stays_readable(ordinary: str) -> None:
    assert Redactor()(ordinary) == ordinary


def test_looking_for_secrets_takes_little_time_whatever_the_text() -> None:
    redactor = Redactor()
    units = (
        "a",
        "a1B",
        "password=",
        '"',
        "://",
        "session",
        "x:y@",
        "-----BEGIN ",
        "token='\\",
        "?code=&",
        "ey",
    )
    for unit in units:
        text = unit * (2 * logs.MOST_TRACE_CHARACTERS // len(unit))
        start = time.process_time()
        redactor(text, logs.MOST_TRACE_CHARACTERS)
        assert time.process_time() - start < 2, unit


HOSTILE = (
    "a\r\n2026-01-01T00:00:00.000Z INFO ayllu.server forged"
    '\x1b[2J\x00\x85\u2028\u202e\ud800\U000e0001"},{"x":1'
)


def test_a_hostile_text_cannot_forge_a_line_or_reach_the_terminal_in_json(set_up: SetUp) -> None:
    _, text = set_up("json")
    log = logging.getLogger("ayllu.server")
    log.warning(HOSTILE)
    log.warning("x", extra={"field": HOSTILE, HOSTILE: 1})
    access(request_id=HOSTILE, method=HOSTILE, route=HOSTILE, client=HOSTILE)
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        log.exception("failed")
    written = text()
    assert written.replace("\n", "").isprintable()
    lines = [json.loads(line) for line in written.split("\n") if line]
    assert len(lines) == 4
    assert lines[0]["event"] == HOSTILE and lines[2]["route"] == HOSTILE


def test_a_hostile_text_cannot_forge_a_line_or_reach_the_terminal_in_text(set_up: SetUp) -> None:
    _, text = set_up("text")
    log = logging.getLogger("ayllu.server")
    log.warning(HOSTILE)
    log.warning("x", extra={"field": HOSTILE, HOSTILE: 1})
    access(request_id=HOSTILE, method=HOSTILE, route=HOSTILE, client=HOSTILE)
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        log.exception("failed")
    written = text()
    assert written.replace("\n", "").isprintable()
    heads = [line for line in written.splitlines() if not line.startswith("  | ")]
    assert len(heads) == 4 and not any("INFO ayllu.server forged" in line[:60] for line in heads)


def test_long_texts_are_cut_off(set_up: SetUp) -> None:
    _, text = set_up("json")
    logging.getLogger("ayllu").warning("x" * 1_000_000)
    assert len(text()) < logs.MOST_CHARACTERS + 200


def test_uvicorn_goes_through_the_same_writer_and_its_own_access_lines_nowhere(set_up: SetUp) -> None:
    _, text = set_up("json")
    logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    logging.getLogger("uvicorn.access").warning('127.0.0.1 - "GET /sign-in?token=abc HTTP/1.1" 200')
    assert one_json(text())["logger"] == "uvicorn.error"


def test_a_full_pipe_costs_lines_and_not_time(set_up: SetUp) -> None:
    reading, writing = os.pipe()
    stream = os.fdopen(writing, "w")
    writer, _ = set_up("json")
    slow = LogWriter(logs.Lines("json"), stream, queued_lines=100)
    root = logging.getLogger()
    root.handlers[:] = [slow]
    log = logging.getLogger("ayllu.server")
    slowest = 0.0
    for _ in range(2000):
        start = time.thread_time()
        log.warning("x" * 1000)
        slowest = max(slowest, time.thread_time() - start)
    assert slowest < 0.5
    assert slow.dropped >= 2000 - 100 - 65 - 1
    assert logs.lines_dropped() == slow.dropped

    received = bytearray()
    reader = threading.Thread(target=_read_all, args=(reading, received))
    reader.start()
    until = time.monotonic() + 60
    while b"log lines were dropped" not in received and time.monotonic() < until:
        time.sleep(0.01)
    slow.close()
    stream.close()
    reader.join()
    lines = [json.loads(line) for line in received.decode().splitlines()]
    told = sum(line["lines"] for line in lines if line["event"] == "log lines were dropped")
    assert told == slow.dropped and len(lines) + told >= 2000, "every lost line is accounted for"
    writer.close()


def _read_all(descriptor: int, into: bytearray) -> None:
    while data := os.read(descriptor, 65536):
        into.extend(data)
    os.close(descriptor)


def test_a_closed_pipe_costs_lines_and_nothing_else(set_up: SetUp) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    set_up("text")
    with os.fdopen(writing, "w") as stream:
        broken = LogWriter(logs.Lines("text"), stream)
        logging.getLogger().handlers[:] = [broken]
        for _ in range(10):
            logging.getLogger("ayllu").warning("lost")
        broken.close()
        assert broken.dropped == 10


def test_a_program_ends_though_nobody_reads_its_log() -> None:
    code = (
        "import logging\n"
        "from ayllu.server.logs import set_up_logging\n"
        "set_up_logging('json')\n"
        "for _ in range(1000):\n"
        "    logging.getLogger('ayllu').warning('x' * 1000)\n"
        "print('done')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as program:
        try:
            assert program.wait(60) == 0
        finally:
            program.kill()
        assert program.stdout is not None and program.stdout.read() == b"done\n"


def test_closing_writes_what_is_queued_and_is_idempotent() -> None:
    stream = io.StringIO()
    writer = LogWriter(logs.Lines("json"), stream)
    for number in range(500):
        writer.emit(logging.makeLogRecord({"msg": str(number), "levelname": "INFO"}))
    writer.close()
    writer.close()
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == [*map(str, range(500))]


def test_a_value_that_cannot_be_shown_loses_its_line_and_raises_nothing(set_up: SetUp) -> None:
    class Hostile:
        def __str__(self) -> str:
            raise RuntimeError("no")

        __repr__ = __str__

    writer, text = set_up("json")
    log = logging.getLogger("ayllu")
    log.warning("%s", Hostile())
    log.warning("x", extra={"field": Hostile()})
    log.warning("still here", extra={"infinite": float("inf"), "none": None})
    assert json.loads(text().splitlines()[0])["event"] == "still here"
    assert writer.dropped == 2


def test_setting_up_twice_writes_each_line_once(set_up: SetUp) -> None:
    _, first = set_up("json")
    _, second = set_up("json")
    logging.getLogger("ayllu").warning("once")
    assert one_json(second())["event"] == "once" and first() == ""
