"""The conversation's commands, with an engine that answers at once or fails on demand."""

from __future__ import annotations

from pathlib import Path

import pytest

from ayllu.chat.messages import Message
from ayllu.cli.conversation import Conversation
from ayllu.cli.terminal import write_answer
from ayllu.engine.events import AnswerFinished, Done, TextDelta
from ayllu.engine.parameters import Sampling
from ayllu.engine.protocol import EngineInfo, Stream
from ayllu.engine.requests import GenerateRequest
from ayllu.errors import AylluError, ContextOverflowError, UsageError


class _Engine:
    """Answers 'yes'; raises `failure` instead when one is set."""

    def __init__(self) -> None:
        self.info = EngineInfo(model="m", context=100)
        self.failure: BaseException | None = None
        self.asked: list[list[Message]] = []

    def submit(self, request: GenerateRequest) -> Stream:
        if self.failure is not None:
            raise self.failure
        self.asked.append(list(request.prompt.messages))
        stream = Stream(request.id, lambda: None, None)
        for event in (TextDelta(0, "ye"), TextDelta(0, "s"), AnswerFinished(0, "stop", 2), Done(9, 2)):
            stream.put(event)
        return stream


@pytest.fixture
def conversation() -> Conversation:
    return Conversation(
        _Engine(), system="Be brief.", images=[], sampling=Sampling(), max_tokens=None, clock=None
    )


def _turns(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in conversation.messages]


def test_turns_are_kept_and_the_system_prompt_leads(conversation: Conversation) -> None:
    conversation.handle("one?")
    conversation.handle("two?")
    assert [message.role for message in conversation.engine.asked[1]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    assert _turns(conversation)[-1] == ("assistant", "yes")


@pytest.mark.parametrize("failure", [ContextOverflowError("too long"), KeyboardInterrupt()])
def test_what_cannot_be_answered_is_not_kept(conversation: Conversation, failure: BaseException) -> None:
    conversation.handle("one?")
    before = _turns(conversation)
    conversation.engine.failure = failure
    for line in ("two?", "/retry"):
        with pytest.raises((AylluError, KeyboardInterrupt)):
            conversation.handle(line)
        assert _turns(conversation) == before


def test_undo_and_new(conversation: Conversation) -> None:
    conversation.handle("one?")
    conversation.handle("two?")
    conversation.handle("/undo")
    assert _turns(conversation) == [("user", "one?"), ("assistant", "yes")]
    conversation.handle("/new")
    assert _turns(conversation) == []


def test_saved_conversations_load_again(conversation: Conversation, tmp_path: Path) -> None:
    conversation.handle("日本語？")
    turns = _turns(conversation)
    conversation.handle(f"/save {tmp_path / 'talk.json'}")
    conversation.handle("/new")
    conversation.handle(f"/load {tmp_path / 'talk.json'}")
    assert _turns(conversation) == turns


def test_settings_are_checked_and_changed_by_name(conversation: Conversation) -> None:
    conversation.handle("/set temperature 0.1")
    conversation.handle("/set top_k 5")
    conversation.handle("/set seed 3")
    conversation.handle("/set seed off")
    conversation.handle("/set max_tokens 9")
    assert conversation.sampling == Sampling(temperature=0.1, top_k=5)
    assert conversation.max_tokens == 9


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/nwe", "Did you mean /new"),
        ("/set temperatur 1", "Did you mean temperature"),
        ("/set temperature warm", "not a number"),
        ("/set top_k 1.5", "not a number"),
        ("/set max_tokens -5", "at least 1"),
        ("/set temperature -1", "out of range"),
        ("/image", "Which image"),
        ("/image 'a", "open quotation"),
        ("/save", "Where to"),
        ("/save ~nosuchuser/x", "nosuchuser"),
        ("/load /absent.json", "not a saved conversation"),
        ("/retry", "nothing to answer"),
    ],
)
def test_mistakes_are_errors_that_say_what_to_do(conversation: Conversation, line: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        conversation.handle(line)


def test_control_characters_of_an_answer_are_shown_not_obeyed(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    write_answer("a\x1b]52;c;AAAA\x07b\n\tc\x9b")
    assert capsys.readouterr().out == "a\\x1b]52;c;AAAA\\x07b\n\tc\\x9b"
