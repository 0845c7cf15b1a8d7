"""The reader of server-sent events, against an obvious one that sees the whole stream at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ayllu.engine.remote.sse import ServerEvent, SseReader
from ayllu.errors import RemoteEngineError

LINES = st.one_of(
    st.sampled_from(
        ["", "", "data", "data:", "data: [DONE]", ": ping", ":", "event: error", "id: 7", "retry: 5"]
    ),
    st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=12).map(
        "data: ".__add__
    ),
    st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=12),
)


def read_whole(text: str) -> list[ServerEvent]:
    """What the standard says, with the whole text at hand."""
    events, kind, data = [], "", []
    *lines, _ = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for line in lines:
        name, _, value = line.partition(":")
        value = value[1:] if value.startswith(" ") else value
        if not line:
            if data:
                events.append(ServerEvent(kind or "message", "\n".join(data)))
            kind, data = "", []
        elif name == "data":
            data.append(value)
        elif name == "event":
            kind = value
    return events


@given(st.lists(st.tuples(LINES, st.sampled_from(["\n", "\r\n", "\r"])), max_size=30), st.data())
def test_events_are_the_same_however_the_bytes_are_cut(
    lines: list[tuple[str, str]], data: st.DataObject
) -> None:
    text = "".join(line + end for line, end in lines)
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=12)))
    reader, events = SseReader(1 << 20), []
    for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        events += reader.feed(raw[start:end])
    assert events == read_whole(text)


@given(st.binary(max_size=300), st.integers(1, 7))
def test_any_bytes_are_read_without_failing(raw: bytes, size: int) -> None:
    reader, whole = SseReader(1 << 20), SseReader(1 << 20)
    events = [event for at in range(0, len(raw), size) for event in reader.feed(raw[at : at + size])]
    assert events == whole.feed(raw)


def test_a_character_cut_between_its_bytes_is_whole_again() -> None:
    reader = SseReader(1024)
    raw = "data: añañã€\n\n".encode()
    events = [event for byte in raw for event in reader.feed(bytes([byte]))]
    assert events == [ServerEvent("message", "añañã€")]


def test_several_data_lines_are_one_text_and_comments_are_nothing() -> None:
    events = SseReader(1024).feed(b": keep-alive\n\nevent: error\ndata: a\n: ping\ndata:b\n\n")
    assert events == [ServerEvent("error", "a\nb")]


def test_what_no_blank_line_ended_is_no_event() -> None:
    assert SseReader(1024).feed(b"data: [DONE]\n") == []


@pytest.mark.parametrize("raw", [b"x" * 2000, b"data: " + b"y" * 2000, b"data: z\n" * 300])
def test_an_event_without_end_is_refused_before_it_fills_the_memory(raw: bytes) -> None:
    reader = SseReader(1024)
    with pytest.raises(RemoteEngineError, match="more than 1024 bytes"):
        for at in range(0, len(raw), 100):
            reader.feed(raw[at : at + 100])


def test_many_small_events_are_no_large_one() -> None:
    assert len(SseReader(1024).feed(b"data: z\n\n" * 3000)) == 3000
