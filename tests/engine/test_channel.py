"""Whatever bytes arrive: a message as it was sent, or a ChannelError, at a bounded cost."""

from __future__ import annotations

import dataclasses
import json
import math
import socket
import struct
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ayllu import errors
from ayllu.engine.channel import Channel, ChannelClosedError, ChannelError, Frame, FrameTooLargeError, Packed
from ayllu.engine.events import AnswerFinished, Done, Failed, PromptScored, Started, TextDelta, TokenLogprob
from ayllu.engine.messages import (
    Answered,
    Cancel,
    CoreEvent,
    Crashed,
    Embed,
    Embedded,
    ErrorReport,
    Events,
    FromEngine,
    GetStats,
    LoadAdapter,
    Open,
    Ready,
    Refused,
    Shutdown,
    StatsTold,
    Submit,
    TaskAdvanced,
    TaskEnded,
    TaskStarted,
    ToEngine,
    UnloadAdapter,
    from_engine,
    to_engine,
)
from ayllu.engine.options import EngineOptions
from ayllu.engine.parameters import Sampling
from ayllu.engine.prepared import CoreFacts, GrammarSpec, PreparedEmbedding, PreparedImage, PreparedRequest
from ayllu.engine.protocol import EngineStats
from ayllu.errors import AylluError, ModelFileError, OverloadedError, RequestFailedError, UsageError

REQUEST = PreparedRequest(
    id="a",
    token_ids=[1, 2, 3],
    max_new_tokens=4,
    sampling=Sampling(logit_bias={7: -100.0}, seed=3),
    images=(PreparedImage.of(np.arange(24, dtype=np.float32).reshape(1, 3, 2, 4)),) * 2,
    stop_ids=frozenset({5, 6}),
    stop=("\n\n", "終"),
    grammar=GrammarSpec("start: /a+/"),
    tenant="t",
)
LOGPROB = TokenLogprob(b"\xff\x00", -math.inf, 3, (TokenLogprob(b"b", -0.5, 4), TokenLogprob(b"c", -1e300)))
SAID = (
    Started(3, 1),
    PromptScored((1, 2), (None, LOGPROB)),
    TextDelta(0, "é\u2028😀", (3,), (LOGPROB,)),
    AnswerFinished(0, "stop", 1, "\n"),
    Done(3, 1, 1),
)
TO_ENGINE: list[ToEngine] = [
    Open.of(Path("/models/\udcff odd"), EngineOptions(context=64)),
    Submit.of(REQUEST),
    Submit.of(dataclasses.replace(REQUEST, images=(), grammar=None)),
    Cancel("a"),
    Embed.of(PreparedEmbedding(id="e", inputs=[[1, 2], [], [3]])),
    LoadAdapter.of(3, "poems", Path("adapters/poems")),
    UnloadAdapter(4, "poems"),
    GetStats(5),
    Shutdown(),
]
FROM_ENGINE: list[FromEngine] = [
    TaskStarted(0, "Loading", None, "bytes"),
    TaskAdvanced(0, 1 << 40),
    TaskEnded(0),
    Ready(CoreFacts(context=8, slots=2, reads_images=True, vocab_size=9)),
    Refused(ErrorReport("UsageError", "No.", "Yes.")),
    Events(tuple(CoreEvent.of("a", event) for event in SAID)),
    Events(),
    Embedded("e", np.array([[1.5, math.nan], [math.inf, -0.0]], dtype=np.float32)),
    Embedded("e", np.empty((0, 4), dtype=np.float32)),
    Answered(3),
    Answered(3, ErrorReport("UsageError", "No.", "Yes.", {"a": 1})),
    StatsTold(5, EngineStats(steps=4, blocks_free={"global": 3})),
    Crashed("ValueError: no"),
]
NO_BODY = memoryview(b"")


@contextmanager
def pair(**limits: int) -> Iterator[tuple[Channel, Channel]]:
    one, other = (Channel(end, **limits) for end in socket.socketpair())
    try:
        yield one, other
    finally:
        one.close()
        other.close()


def same(left: object, right: object) -> bool:
    """Equal, arrays within by their bytes."""
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return left.shape == right.shape and left.dtype == right.dtype and left.tobytes() == right.tobytes()
    if dataclasses.is_dataclass(left) and type(left) is type(right):
        return all(same(getattr(left, f.name), getattr(right, f.name)) for f in dataclasses.fields(left))
    if isinstance(left, tuple | list) and type(left) is type(right):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


@pytest.mark.parametrize("message", TO_ENGINE, ids=lambda message: message.kind)
def test_messages_to_the_engine_arrive_as_they_were_sent(message: ToEngine) -> None:
    with pair() as (here, there):
        here.send(to_engine().pack(message))
        frame = there.receive()
        assert frame is not None
        assert same(to_engine().unpack(frame), message)


@pytest.mark.parametrize("message", FROM_ENGINE, ids=lambda message: message.kind)
def test_messages_from_the_engine_arrive_as_they_were_sent(message: FromEngine) -> None:
    with pair() as (here, there):
        here.send(from_engine().pack(message))
        frame = there.receive()
        assert frame is not None
        assert same(from_engine().unpack(frame), message)


def arrived(message: ToEngine) -> Any:
    """What the other end makes of a message."""
    with pair() as (here, there):
        here.send(to_engine().pack(message))
        frame = there.receive()
        assert frame is not None
        return to_engine().unpack(frame)


def test_requests_are_whole_again_and_their_arrays_writable() -> None:
    whole = arrived(Submit.of(REQUEST)).whole
    assert same(whole, REQUEST)
    assert all(image.pixels.flags.writeable for image in whole.images)
    embedding = PreparedEmbedding(id="e", inputs=[[1, 2], [], [3]], normalise=False)
    assert arrived(Embed.of(embedding)).whole == embedding


def test_paths_that_are_no_unicode_survive() -> None:
    assert arrived(Open.of(Path("/models/\udcff odd"), EngineOptions())).model_path == Path(
        "/models/\udcff odd"
    )


@given(
    token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=50),
    stop=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=3),
    shapes=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=3),
    temperature=st.floats(0, 100),
)
def test_any_request_arrives_as_it_was_sent(
    token_ids: list[int], stop: list[str], shapes: list[list[int]], temperature: float
) -> None:
    images = tuple(PreparedImage.of(np.full(shape, 0.1, dtype=np.float32)) for shape in shapes)
    request = PreparedRequest(
        id="x", token_ids=token_ids, max_new_tokens=1, stop=tuple(stop), images=images,
        sampling=Sampling(temperature=temperature),
    )  # fmt: skip
    packed = to_engine().pack(Submit.of(request))
    body = bytearray(b"".join(packed.blobs))
    received = to_engine().unpack(Frame(packed.header, memoryview(body)))
    assert isinstance(received, Submit)
    assert same(received.whole, request)


SAMPLES = [to_engine().pack(message) for message in TO_ENGINE]
SAMPLES += [from_engine().pack(message) for message in FROM_ENGINE]


def as_bytes(packed: Packed) -> bytes:
    body = b"".join(packed.blobs)
    total = 4 + len(packed.header) + len(body)
    return struct.pack(">II", total, len(packed.header)) + packed.header + body


def wild_frame(random: Random) -> bytes:
    """Noise; or a good frame with bytes changed, cut, doubled, or with other lengths or JSON in it."""
    data = bytearray(as_bytes(random.choice(SAMPLES)))
    place = random.randrange(len(data))
    match random.randrange(6):
        case 0:
            return random.randbytes(random.randrange(200))
        case 1:
            for _ in range(random.randrange(1, 9)):
                data[random.randrange(len(data))] = random.randrange(256)
        case 2:
            del data[place:]
        case 3:
            data[place:place] = data[place : place + random.randrange(50)]
        case 4:
            most = random.choice([300, 2**32 - 1])
            data[:8] = struct.pack(">II", random.randint(0, most), random.randint(0, most))
        case 5:
            header = json.loads(data[8 : 8 + struct.unpack(">I", data[4:8])[0]])
            header[random.choice([*header, "odd"])] = wild_value(random)
            return as_bytes(Packed(json.dumps(header).encode(), (memoryview(bytes(data[-32:])),)))
    return bytes(data)


def wild_value(random: Random, depth: int = 3) -> object:
    kind = random.randrange(9 if depth else 7)
    if kind < 7:
        return (None, True, -1, 2**80, math.nan, "x", random.randrange(100))[kind]
    items = [wild_value(random, depth - 1) for _ in range(random.randrange(5))]
    return items if kind == 7 else {f"k{number}": item for number, item in enumerate(items)}


def feed(stream: bytes, **limits: int) -> int:
    """Messages understood in a stream; what is no message ends it by a ChannelError and nothing else."""
    one, other = socket.socketpair()
    with one:
        one.sendall(stream)
        one.shutdown(socket.SHUT_WR)
        channel = Channel(other, **limits)
        understood = 0
        try:
            while (frame := channel.receive()) is not None:
                for codec in (to_engine(), from_engine()):
                    try:
                        codec.unpack(frame)
                    except ChannelError:
                        continue
                    understood += 1
        except ChannelError:
            pass
        finally:
            channel.close()
        return understood


@settings(max_examples=400)
@given(st.integers(0, 2**64))
def test_ten_thousand_wild_frames_are_messages_or_errors(seed: int) -> None:
    random = Random(seed)
    frames = [wild_frame(random) for _ in range(25)]
    for frame in frames:
        feed(frame)
    feed(b"".join(frames))


def test_the_samples_of_that_test_are_understood() -> None:
    assert [feed(as_bytes(packed)) for packed in SAMPLES] == [1] * len(SAMPLES)


@settings(max_examples=50)
@given(st.integers(0, 2**64))
def test_a_channel_allocates_no_more_than_its_limit(seed: int) -> None:
    limit = 1 << 20
    frames = [wild_frame(Random(seed + number)) for number in range(5)]
    claims = [struct.pack(">II", claim, claim - 4) + b"x" for claim in (limit, limit + 1, 2**32 - 1)]
    tracemalloc.start()
    try:
        for frame in [*frames, *claims]:
            feed(frame, max_frame=limit, max_header=limit)
        assert tracemalloc.get_traced_memory()[1] < 3 * limit
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"kind":"shut up"}',
        b'{"kind":"shutdown","odd":1}',
        b'{"kind":"cancel","request_id":5}',
        b'{"kind":"cancel","request_id":"\\ud800"}',
        b'{"kind":"get_stats","ticket":1.0}',
        b'{"kind":"get_stats","ticket":"1"}',
        b'{"kind":"get_stats","ticket":true}',
        b'{"kind":"open","path":"?","options":{}}',
        b'{"kind":"open","path":"YQ==","options":{"slots":0}}',
        b'{"kind":"open","path":"YQ==","options":{"odd":0}}',
        b'{"kind":"embed","request":{"id":"a","inputs":[]},"token_ids":[0],"lengths":[-1,1]}',
        b'{"kind":"embed","request":{"id":"a","inputs":[]},"token_ids":[0],"lengths":[2]}',
        b'{"kind":"embed","request":{"id":"a","inputs":[]},"token_ids":[1],"lengths":[1]}',
        b'{"kind":"embed","request":{"id":"a","inputs":[]},"token_ids":[-1],"lengths":[]}',
        b'{"kind":"embed","request":{"id":"a","inputs":[]},"token_ids":[99999999999999999999,0],"lengths":[]}',
        b'{"kind":"embed","request":{"id":"a","inputs":[]},"token_ids":[0,0,0,0,0,0,0,0,0],"lengths":[]}',
        b'{"kind":"embed","request":{"id":"a","inputs":[]},"token_ids":"AAAA","lengths":[]}',
        b'{"kind":"submit","request":{"id":"a","token_ids":[],"max_new_tokens":1},"token_ids":[0],"digests":["a"]}',
        b'{"kind":"submit","request":{"id":"a","token_ids":[],"max_new_tokens":1,'
        b'"images":[{"pixels":[1],"digest":"a"}]},"token_ids":[0]}',
        b'{"kind":' * 100_000,
        b"[" * 1_000_000,
    ],
)
def test_a_header_that_is_no_message_is_refused(header: bytes) -> None:
    with pytest.raises(ChannelError):
        to_engine().unpack(Frame(header, NO_BODY))


@pytest.mark.parametrize(
    "event", [{}, {"started": {"prompt_tokens": 1}, "done": {"prompt_tokens": 1, "new_tokens": 1}}]
)
def test_an_event_is_exactly_one_thing(event: dict[str, object]) -> None:
    header = json.dumps({"kind": "events", "events": [{"request_id": "a"} | event]}).encode()
    with pytest.raises(ChannelError, match="one thing at a time"):
        from_engine().unpack(Frame(header, NO_BODY))


def test_bytes_that_belong_to_no_array_are_refused() -> None:
    with pytest.raises(ChannelError, match="belong to no array"):
        to_engine().unpack(Frame(b'{"kind":"shutdown"}', memoryview(b"abcd")))


def test_text_that_is_no_unicode_cannot_be_sent() -> None:
    with pytest.raises(ChannelError, match="cannot be written"):
        to_engine().pack(Cancel("\ud800"))


def test_too_large_a_message_is_refused_before_a_byte_is_written() -> None:
    with pair(max_frame=100, max_header=90) as (here, there):
        for message in (Packed(b"x" * 91), Packed(b"x" * 60, (memoryview(b"x" * 60),))):
            with pytest.raises(FrameTooLargeError, match="at most 100 and 90"):
                here.send(message)
        here.send(Packed(b"fits", (memoryview(b"well"),)))
        frame = there.receive()
        assert frame is not None
        assert (frame.header, bytes(frame.body)) == (b"fits", b"well")


def test_the_end_of_the_other_side_is_told() -> None:
    with pair() as (here, there):
        here.send(Packed(b"last"))
        here.close()
        assert there.receive() is not None
        assert there.receive() is None
        with pytest.raises(ChannelClosedError):
            for _ in range(3):
                there.send(Packed(b"x" * 100_000))


def test_hanging_up_wakes_who_waits_for_a_frame() -> None:
    with pair() as (here, _):
        received: list[Frame | None] = []
        waiting = threading.Thread(target=lambda: received.append(here.receive()))
        waiting.start()
        here.hang_up()
        waiting.join(60)
        assert received == [None]


def test_frames_of_several_threads_do_not_mix() -> None:
    with pair() as (here, there):
        sizes = [1, 1000, 300_000]

        def send(name: int) -> None:
            for size in sizes * 5:
                blob = memoryview(bytes([name]) * size)
                here.send(Packed(bytes([name]) * size, (blob, blob)))

        threads = [threading.Thread(target=send, args=(name,)) for name in range(8)]
        for thread in threads:
            thread.start()
        for _ in range(8 * len(sizes) * 5):
            frame = there.receive()
            assert frame is not None
            assert len(set(frame.header)) == 1
            assert set(frame.header) == set(frame.body)
            assert len(frame.body) == 2 * len(frame.header) and len(frame.header) in sizes
        for thread in threads:
            thread.join()


def made(kind: type[AylluError]) -> AylluError:
    match kind.__name__:
        case "ModelFileError":
            return ModelFileError(
                "/m/\udcff.gguf", "is odd", field="a\nb", offset=7, expected=(1, 2), got=None
            )
        case "OverloadedError":
            return OverloadedError("Full.", retry_after_s=2.5)
        case _:
            return kind("A problem\nof two lines", "a fix")


KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AylluError)]


@pytest.mark.parametrize("kind", KINDS)
def test_errors_cross_as_what_they_are(kind: type[AylluError]) -> None:
    error = made(kind)
    frame = from_engine().pack(Refused(ErrorReport.of(error)))
    report = from_engine().unpack(Frame(frame.header, NO_BODY))
    assert isinstance(report, Refused)
    again = report.error.error()
    assert type(again) is kind
    assert (str(again), again.problem, again.fix) == (str(error), error.problem, error.fix)
    assert (again.exit_code, again.http_status) == (error.exit_code, error.http_status)
    for name in ("offset", "retry_after_s"):
        assert getattr(again, name, None) == getattr(error, name, None)


def test_an_error_of_another_room_crosses_as_its_nearest_known_base() -> None:
    class OddUsageError(UsageError):
        pass

    assert type(ErrorReport.of(OddUsageError("p", "f")).error()) is UsageError


@pytest.mark.parametrize("name", ["OSError", "__builtins__", "Path", "one_line", ""])
def test_a_name_that_is_no_error_of_ours_becomes_a_failed_request(name: str) -> None:
    error = ErrorReport(name, "p", "f").error()
    assert type(error) is RequestFailedError
    assert str(error) == "p f"


def test_a_failed_event_carries_its_error() -> None:
    event = CoreEvent.of("a", Failed(OverloadedError("Full.", retry_after_s=2.5))).event
    assert isinstance(event, Failed) and isinstance(event.error, OverloadedError)
    assert event.error.retry_after_s == 2.5
