"""The remote engine when things go wrong: refusals, retries, cuts, silence, closing; and no secret leaks."""

from __future__ import annotations

import gc
import logging
import socket
import threading
from typing import Any

import pytest

from ayllu.engine.events import AnswerFinished, Done, Event, Started, TextDelta
from ayllu.engine.remote.endpoint import RemoteEndpoint
from ayllu.engine.remote.engine import RemoteEngine
from ayllu.engine.requests import EmbedRequest, GenerateRequest
from ayllu.errors import (
    AccessError,
    AylluError,
    ContextOverflowError,
    EngineUnavailableError,
    OverloadedError,
    RemoteEngineError,
    RequestFailedError,
    UnknownModelError,
    UnsupportedError,
    UsageError,
)
from tests.engine.remote_server import (
    CHAT,
    DONE,
    HANG_GUARD_S,
    HELLO,
    Fault,
    Scripted,
    answer,
    ask,
    asked_once,
    chunk,
    error_of,
    remote_engine,
    remote_server,
    usage,
    wait_until,
)

KEY = "sk-very-secret-0123456789"


@pytest.mark.parametrize(
    ("scripted", "kind"),
    [
        (Scripted.error(400, "temperature must be below 2"), UsageError),
        (Scripted.error(422, "no such field"), UsageError),
        (Scripted.error(413, "too much"), UsageError),
        (Scripted.error(400, "This model's maximum context length is 8 tokens"), ContextOverflowError),
        (Scripted.error(401, "bad key"), AccessError),
        (Scripted.error(403, "not yours"), AccessError),
        (Scripted.error(404, "no model m"), UnknownModelError),
        (Scripted.error(405, "no"), UnsupportedError),
        (Scripted.error(501, "no"), UnsupportedError),
        (Scripted.error(500, "image input is not supported"), UnsupportedError),
        (Scripted.error(302, "", Location="/elsewhere"), RemoteEngineError),
        (Scripted.error(204, ""), RemoteEngineError),
        (Scripted((b"<html>hello</html>",), 200, {"Content-Type": "text/html"}), RemoteEngineError),
        (
            Scripted((b'{"error": {"message": "busy"}}',), 200, {"Content-Type": "application/json"}),
            RequestFailedError,
        ),
        (Scripted((b'{"choices": []}',), 200, {"Content-Type": "application/json"}), RemoteEngineError),
    ],
)
def test_each_refusal_has_its_class_and_is_not_tried_again(
    scripted: Scripted, kind: type[AylluError]
) -> None:
    with remote_server(scripted) as server, remote_engine(server.base) as engine:
        events = ask(engine)
        assert len(events) == 1
        assert type(error_of(events)) is kind
        assert engine.stats().failed == 1
    assert len(server.asked) == 1


def test_the_servers_own_words_are_kept_but_clipped() -> None:
    error = error_of(asked_once(Scripted.error(400, "temperature\nis " + "very " * 500 + "odd")))
    assert "temperature is very" in error.problem
    assert len(str(error)) < 500 and "\n" not in str(error)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(status: int) -> None:
    refusal = Scripted.error(status)
    with remote_server(refusal, refusal, answer(*HELLO)) as server, remote_engine(server.base) as engine:
        assert ask(engine)[-1] == Done(7, 2, 3)
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("scripted", "kind"),
    [
        (Scripted.error(503), RemoteEngineError),
        (Scripted.error(429), OverloadedError),
        (answer(Fault.CUT), RemoteEngineError),
        (answer(), RemoteEngineError),
        (answer(b'data: {"cho', Fault.CUT), RemoteEngineError),
    ],
)
def test_tries_are_finite(scripted: Scripted, kind: type[AylluError]) -> None:
    with remote_server(scripted) as server, remote_engine(server.base, retries=3) as engine:
        assert type(error_of(ask(engine))) is kind
    assert len(server.asked) == 4


def test_a_server_that_is_not_there_is_a_typed_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with remote_engine(f"http://127.0.0.1:{taken.getsockname()[1]}") as engine:
            error = error_of(ask(engine))
    assert isinstance(error, RemoteEngineError)
    assert "cannot be reached" in error.problem


def test_the_wait_the_server_asks_for_is_kept() -> None:
    script = (Scripted.error(429, "slow down", Retry_After="0.4"), answer(*HELLO))
    with remote_server(*script) as server, remote_engine(server.base, longest_pause_s=5.0) as engine:
        assert ask(engine)[-1] == Done(7, 2, 3)
    assert server.asked[1].at - server.asked[0].at >= 0.4


def test_a_wait_beyond_all_patience_is_cut_and_passed_on() -> None:
    script = Scripted.error(429, "tomorrow", Retry_After="86400")
    error = error_of(asked_once(script, retries=1))
    assert isinstance(error, OverloadedError)
    assert error.retry_after_s == 86400


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ((chunk("Hel"), Fault.CUT), "broke the connection off"),
        ((chunk("Hel"), b'data: {"choi', Fault.CUT), "broke the connection off"),
        ((chunk("Hel"),), "before the answer was complete"),
        ((chunk("Hel"), DONE), "before the answer was complete"),
        ((chunk("Hel"), b"data: [DONE]"), "before the answer was complete"),
    ],
)
def test_a_cut_after_the_first_event_fails_and_is_not_tried_again(
    pieces: tuple[Any, ...], words: str
) -> None:
    with remote_server(answer(*pieces)) as server, remote_engine(server.base) as engine:
        events = ask(engine)
    assert events[:2] == [Started(0), TextDelta(0, "Hel")]
    error = error_of(events)
    assert isinstance(error, RemoteEngineError) and words in error.problem
    assert len(server.asked) == 1


@pytest.mark.parametrize("rest", [(), (Fault.CUT,), (usage(7, 2, 3), Fault.CUT), (b"data: [DO", Fault.CUT)])
def test_a_cut_after_the_last_answers_end_costs_nothing_but_counts(rest: tuple[Any, ...]) -> None:
    events = asked_once(answer(*HELLO[:3], *rest))
    assert AnswerFinished(0, "stop", 2) in events
    assert isinstance(events[-1], Done)


def test_a_server_that_stops_talking_after_the_answer_is_done_with() -> None:
    assert isinstance(asked_once(answer(*HELLO[:3], Fault.SILENCE), read_timeout_s=0.2)[-1], Done)
    assert asked_once(answer(*HELLO, Fault.SILENCE))[-1] == Done(7, 2, 3)


@pytest.mark.parametrize("pieces", [(), (chunk("Hel"),)])
def test_a_silent_server_runs_into_the_timeout_and_is_not_asked_again(pieces: tuple[bytes, ...]) -> None:
    script = answer(*pieces, Fault.SILENCE)
    with remote_server(script) as server, remote_engine(server.base, read_timeout_s=0.2) as engine:
        error = error_of(ask(engine))
    assert isinstance(error, RemoteEngineError) and "said nothing" in error.problem
    assert len(server.asked) == 1


@pytest.mark.parametrize("pieces", [(), (chunk("Hel"),)])
def test_cancelling_hangs_up_even_on_a_silent_server(pieces: tuple[bytes, ...]) -> None:
    with remote_server(answer(*pieces, Fault.SILENCE)) as server, remote_engine(server.base) as engine:
        stream = engine.submit(GenerateRequest(prompt=CHAT, n=2))
        events = iter(stream)
        seen = [next(events) for _ in range(2 * len(pieces))]
        wait_until(lambda: server.asked)
        stream.cancel()
        seen += list(events)
        stream.cancel()
        assert server.hung_up.wait(HANG_GUARD_S)
        assert engine.stats().cancelled == 1
    assert isinstance(seen[0], Started)
    assert seen[-3:] == [
        AnswerFinished(0, "cancelled", len(pieces)),
        AnswerFinished(1, "cancelled", 0),
        Done(0, len(pieces), 0),
    ]


def test_cancelling_at_once_is_heard_too() -> None:
    with remote_server(answer(*HELLO)) as server, remote_engine(server.base) as engine:
        streams = [engine.submit(GenerateRequest(prompt=CHAT)) for _ in range(20)]
        for stream in streams:
            stream.cancel()
        for stream in streams:
            events = list(stream)
            assert isinstance(events[0], Started) and isinstance(events[-1], Done)
        stats = engine.stats()
        assert stats.cancelled + stats.finished == 20


def test_cancelling_between_two_tries_ends_the_waiting() -> None:
    script = Scripted.error(503, "later", Retry_After="600")
    with remote_server(script) as server, remote_engine(server.base, longest_pause_s=600.0) as engine:
        stream = engine.submit(GenerateRequest(prompt=CHAT))
        wait_until(lambda: server.asked)
        stream.cancel()
        assert isinstance(list(stream)[-1], Done)


def test_closing_fails_open_requests_and_later_ones() -> None:
    with remote_server(answer(chunk("Hel"), Fault.SILENCE)) as server, remote_engine(server.base) as engine:
        streams = [engine.submit(GenerateRequest(prompt=CHAT)) for _ in range(3)]
        firsts = [next(iter(stream)) for stream in streams]
        engine.close()
        engine.close()
        assert all(isinstance(first, Started) for first in firsts)
        assert all(isinstance(error_of(list(stream)), EngineUnavailableError) for stream in streams)
        with pytest.raises(EngineUnavailableError):
            engine.submit(GenerateRequest(prompt=CHAT))
        assert engine.info.model == "m"


def test_closing_from_inside_a_delivery_does_not_wait_for_itself() -> None:
    closed = threading.Event()

    def deliver(event: Event) -> None:
        if isinstance(event, Started):
            engine.close()
            closed.set()

    with remote_server(answer(chunk("Hel"), Fault.SILENCE)) as server, remote_engine(server.base) as engine:
        engine.submit(GenerateRequest(prompt=CHAT), deliver)
        assert closed.wait(HANG_GUARD_S)


def test_waiting_inside_a_delivery_is_refused_instead_of_waiting_for_ever() -> None:
    said: list[object] = []

    def deliver(event: Event) -> None:
        if isinstance(event, Started):
            said.append(engine.info.context)
            try:
                engine.embed(EmbedRequest(inputs=("x",)))
            except AylluError as error:
                said.append(type(error))

    with remote_server(answer(*HELLO)) as server, remote_engine(server.base) as engine:
        stream = engine.submit(GenerateRequest(prompt=CHAT), deliver)
        wait_until(lambda: stream.ended)
    assert said == [None, EngineUnavailableError]


def test_a_delivery_that_raises_harms_no_other_request(caplog: pytest.LogCaptureFixture) -> None:
    def broken(event: Event) -> None:
        raise ValueError("broken")

    with remote_server(answer(*HELLO)) as server, remote_engine(server.base) as engine:
        engine.submit(GenerateRequest(prompt=CHAT), broken)
        assert ask(engine)[-1] == Done(7, 2, 3)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_many_streams_at_the_same_time_do_not_mix() -> None:
    def pieces(name: str) -> Scripted:
        return answer(*(chunk(f"{name} ") for _ in range(20)), chunk(finish="stop"), DONE)

    with (
        remote_server(*(pieces(str(number)) for number in range(80))) as server,
        remote_engine(server.base) as engine,
    ):
        streams = [engine.submit(GenerateRequest(prompt=CHAT)) for _ in range(80)]
        texts = [
            "".join(event.text for event in stream if isinstance(event, TextDelta)) for stream in streams
        ]
    assert sorted(texts) == sorted(f"{number} " * 20 for number in range(80))


def test_more_than_the_limit_are_refused_at_once() -> None:
    with remote_server(answer(Fault.SILENCE)) as server, remote_engine(server.base, max_open=2) as engine:
        streams = [engine.submit(GenerateRequest(prompt=CHAT)) for _ in range(2)]
        assert engine.stats().waiting == 2
        with pytest.raises(OverloadedError):
            engine.submit(GenerateRequest(prompt=CHAT))
        for stream in streams:
            stream.cancel()
            list(stream)
        engine.submit(GenerateRequest(prompt=CHAT)).cancel()


def test_proxies_of_the_environment_are_for_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert asked_once(answer(*HELLO))[-1] == Done(7, 2, 3)
    monkeypatch.setenv("HTTPS_PROXY", "nonsense://somewhere")
    with pytest.raises(RemoteEngineError, match="HTTPS_PROXY"):
        RemoteEngine(RemoteEndpoint(base_url="https://example.org", model="m"))


def test_the_key_is_in_no_repr_error_or_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    echo = Scripted.error(401, f"Incorrect API key {KEY} and header gateway-secret")
    settings = {"api_key": KEY, "headers": {"X-Gateway": "gateway-secret"}}
    with remote_server(echo) as server, remote_engine(server.base, **settings) as engine:
        error = error_of(ask(engine))
    assert server.asked[0].headers["authorization"] == f"Bearer {KEY}"
    assert server.asked[0].headers["x-gateway"] == "gateway-secret"
    told = [str(error), repr(error), error.problem, error.fix, caplog.text]
    told.append(repr(RemoteEndpoint(base_url="https://h", model="m", **settings)))
    assert not any(KEY in text or "gateway-secret" in text for text in told)
    assert (error.__cause__, error.__context__, error.__traceback__) == (None, None, None)


def test_a_redirect_is_not_followed_with_the_key() -> None:
    with remote_server(answer(*HELLO)) as other:
        redirect = Scripted.error(307, "", Location=other.base + "/v1/chat/completions")
        error = error_of(asked_once(redirect, api_key=KEY))
        assert not other.asked
    assert "redirect" in error.problem


def test_an_engine_that_is_forgotten_ends_its_thread() -> None:
    with remote_server(answer(*HELLO)) as server:
        engine = RemoteEngine(RemoteEndpoint(base_url=server.base, model="m"))
        ask(engine)
        thread = engine._line._thread
        del engine
        wait_until(lambda: gc.collect() is not None and not thread.is_alive())


def test_a_used_connection_is_used_again() -> None:
    with remote_server(answer(*HELLO)) as server, remote_engine(server.base) as engine:
        ports = set()
        original = server._answer

        def noting(request: Any) -> None:
            ports.add(request.client_address[1])
            original(request)

        server._answer = noting  # type: ignore[method-assign]
        for _ in range(3):
            ask(engine)
    assert len(ports) == 1
