"""Requests become what the core computes, events become public; mistakes are told before anything runs."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ayllu.chat.formats import PlainFormat
from ayllu.chat.images import ImageConfig, TiledImage, tile_image
from ayllu.chat.messages import Message, ToolDefinition, user_message
from ayllu.chat.tokenizer import Tokenizer, load_tokenizer
from ayllu.engine.events import (
    AnswerFinished,
    Done,
    Event,
    FinishReason,
    Started,
    TextDelta,
    TokenLogprob,
    ToolCallMade,
)
from ayllu.engine.image_cutter import ImageCutter
from ayllu.engine.model_files import EncoderFiles, ModelFiles, open_model_files
from ayllu.engine.parameters import Sampling
from ayllu.engine.preparation import EncoderPreparation, Preparation, PublicEvents
from ayllu.engine.prepared import CoreFacts, PreparedImage
from ayllu.engine.requests import (
    ChatPrompt,
    ChoiceStructure,
    EmbedRequest,
    GenerateRequest,
    JsonStructure,
    PromptInput,
    RegexStructure,
    TextPrompt,
    TokenPrompt,
    ToolUse,
)
from ayllu.errors import (
    AylluError,
    ContextOverflowError,
    GrammarError,
    ImageError,
    RequestFailedError,
    UnsupportedError,
    UsageError,
)
from ayllu.weights.hf_save import save_folder
from tests.chat.small_vocabularies import write_tiktoken
from tests.engine.toy_engine import toy_folder
from tests.model.tiny import tiny_llama4
from tests.weights.small_checkpoints import random_checkpoint

HELLO = ChatPrompt((Message("user", "hello"),))
ADD = ToolDefinition("add", "Adds.", {"type": "object", "properties": {"a": {"type": "integer"}}})


def facts_for(files: ModelFiles, context: int = 1024, *, reads_images: bool = False) -> CoreFacts:
    size = files.checkpoint.config.vocab_size
    return CoreFacts(context=context, slots=8, reads_images=reads_images, vocab_size=size)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    opened = open_model_files(toy_folder(tmp_path_factory.mktemp("model") / "model"))
    assert isinstance(opened, ModelFiles)
    return opened


@pytest.fixture(scope="module")
def preparation(files: ModelFiles):
    prepares = Preparation(files, facts_for(files))
    yield prepares
    prepares.close()


@pytest.fixture(scope="module")
def llama4(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """A small Llama 4 that sees."""
    folder = tmp_path_factory.mktemp("llama4")
    tokenizer = load_tokenizer(write_tiktoken(folder / "vocabulary"))
    config = dataclasses.replace(tiny_llama4(vision=True), vocab_size=tokenizer.vocab_size)
    assert config.vision is not None
    vision = dataclasses.replace(config.vision, patch_token_id=tokenizer.special_id("<|patch|>"))
    save_folder(random_checkpoint(dataclasses.replace(config, vision=vision), seed=2), folder / "model")
    opened = open_model_files(write_tiktoken(folder / "model"))
    assert isinstance(opened, ModelFiles)
    return opened


def ask(prompt: PromptInput = HELLO, **more: Any) -> GenerateRequest:
    return GenerateRequest(prompt=prompt, **more)


def picture(size: tuple[int, int]) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, "red").save(data, "PNG")
    return data.getvalue()


def test_a_conversation_is_rendered_by_the_models_own_format(
    files: ModelFiles, preparation: Preparation
) -> None:
    sampling = Sampling(seed=1, logit_bias={3: 1.0})
    request = ask(sampling=sampling, stop=("x",), n=2, logprobs=3, prompt_logprobs=0, priority=2, tenant="t")
    prepared = preparation.prepare(request).request
    assert prepared.token_ids == files.chat_format.render(HELLO.messages).token_ids
    assert prepared.stop_ids == files.chat_format.stop_ids
    assert prepared.max_new_tokens == 1024 - len(prepared.token_ids)
    assert not prepared.continuation and prepared.skip_specials
    for name in (
        "id",
        "sampling",
        "stop",
        "n",
        "logprobs",
        "prompt_logprobs",
        "priority",
        "tenant",
        "adapter",
    ):
        assert getattr(prepared, name) == getattr(request, name)


def test_text_goes_on_as_text_whatever_it_spells(files: ModelFiles, preparation: Preparation) -> None:
    prepared = preparation.prepare(ask(TextPrompt("hi <|im_end|>"))).request
    assert prepared.token_ids == files.tokenizer.encode("hi <|im_end|>")
    assert not set(prepared.token_ids) & set(files.tokenizer.specials.values())
    assert prepared.continuation


def test_text_begins_with_bos_where_the_vocabulary_wants_it(files: ModelFiles) -> None:
    parts = dataclasses.replace(files.tokenizer.parts, add_bos=True, bos_id=7)
    with_bos = dataclasses.replace(files, tokenizer=Tokenizer(parts))
    prepared = Preparation(with_bos, facts_for(files)).prepare(ask(TextPrompt("hi"))).request
    assert prepared.token_ids == [7, *files.tokenizer.encode("hi")]


def test_tokens_go_on_as_they_are(preparation: Preparation) -> None:
    prepared = preparation.prepare(ask(TokenPrompt((5, 5, 6)))).request
    assert (prepared.token_ids, prepared.continuation) == ([5, 5, 6], True)


@pytest.mark.parametrize(
    ("asked", "given"), [(None, 60), (10, 10), (60, 60), (61, 60), (1 << 24, 60)], ids=str
)
def test_an_answer_may_be_as_long_as_the_context_holds(
    files: ModelFiles, asked: int | None, given: int
) -> None:
    prepares = Preparation(files, facts_for(files, context=64))
    assert (
        prepares.prepare(ask(TokenPrompt((1, 2, 3, 4)), max_new_tokens=asked)).request.max_new_tokens == given
    )


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(files: ModelFiles) -> None:
    prepares = Preparation(files, facts_for(files, context=8))
    with pytest.raises(ContextOverflowError, match="The prompt has 8 tokens; the context holds 8"):
        prepares.prepare(ask(TokenPrompt((1,) * 8)))
    with pytest.raises(ContextOverflowError, match=r"The conversation has \d+ tokens; the context holds 8"):
        prepares.prepare(ask())
    assert prepares.prepare(ask(TokenPrompt((1,) * 7))).request.max_new_tokens == 1


def test_scoring_alone_needs_no_room_for_an_answer(files: ModelFiles) -> None:
    prepares = Preparation(files, facts_for(files, context=8))
    scored = ask(TokenPrompt((1,) * 8), max_new_tokens=0, prompt_logprobs=1)
    assert prepares.prepare(scored).request.max_new_tokens == 0
    with pytest.raises(ContextOverflowError, match="has 9 tokens; the context holds 8"):
        prepares.prepare(ask(TokenPrompt((1,) * 9), max_new_tokens=0, prompt_logprobs=1))


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (ask(TokenPrompt((1, 1 << 20))), "Token 1048576 in the prompt is not in the vocabulary"),
        (ask(TokenPrompt((-1,))), "Token -1 in the prompt"),
        (ask(sampling=Sampling(logit_bias={1 << 20: 1.0})), "Token 1048576 in logit_bias"),
        (ask(TextPrompt("")), "The prompt is empty"),
        (ask(id=""), "characters of the id = 0"),
        (ask(id="x" * 201), "characters of the id = 201"),
        (ask(id="\ud800"), "The id holds half a character"),
        (ask(tenant="\udfff"), "The tenant holds half a character"),
        (ask(adapter="\ud800"), "The adapter holds half a character"),
        (ask(stop=("a", "\ud83d")), "The stop string holds half a character"),
        (ask(ChatPrompt((user_message("?", [picture((4, 4))]),))), "reads no images"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    preparation: Preparation, request_: GenerateRequest, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        preparation.prepare(request_)


def test_half_characters_in_a_prompt_are_no_mistake(preparation: Preparation) -> None:
    assert preparation.prepare(ask(TextPrompt("a\ud800b"))).request.token_ids


def test_without_stop_tokens_nothing_but_the_limit_ends_an_answer(preparation: Preparation) -> None:
    assert preparation.prepare(ask(ignore_stop_tokens=True)).request.stop_ids == frozenset()


def test_a_base_model_goes_on_with_text_and_says_why_it_does_not_converse(files: ModelFiles) -> None:
    base = dataclasses.replace(
        files, known_format=None, no_chat=UnsupportedError("No template.", "Use text.")
    )
    prepares = Preparation(base, facts_for(files))
    with pytest.raises(UnsupportedError, match=r"No template\. Use text\."):
        prepares.prepare(ask())
    prepared = prepares.prepare(ask(TextPrompt("hello"))).request
    assert prepared.stop_ids == files.tokenizer.stop_ids


def test_images_are_cut_into_tiles_where_the_model_sees(llama4: ModelFiles) -> None:
    prepares = Preparation(llama4, facts_for(llama4, reads_images=True))
    message = user_message("what?", [picture((40, 40)), picture((112, 112))])
    prepared = prepares.prepare(ask(ChatPrompt((message,)))).request
    vision = llama4.checkpoint.config.vision
    assert vision is not None
    size = vision.image_size
    assert [image.pixels.shape[1:] for image in prepared.images] == [(3, size, size)] * 2
    assert [image.pixels.shape[0] for image in prepared.images] == [1, 5]
    again = PreparedImage.of(np.array(prepared.images[0].pixels))
    assert again.digest == prepared.images[0].digest != prepared.images[1].digest
    patches = ImageConfig(size, vision.patch_size, vision.shuffle**2).tokens_per_tile
    assert prepared.token_ids.count(vision.patch_token_id) == patches * (1 + 5)
    prepares.close()


def test_images_that_cannot_fit_together_are_not_all_cut_first(
    llama4: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many images of one pixel are a small request, and would be gigabytes of tiles."""
    cut: list[bytes] = []

    def counting(self: ImageCutter, data: bytes, config: ImageConfig) -> TiledImage:
        cut.append(data)
        return tile_image(data, config)

    monkeypatch.setattr(ImageCutter, "tiles", counting)
    prepares = Preparation(llama4, facts_for(llama4, context=64, reads_images=True))
    message = user_message("what?", [picture((1, 1))] * 10_000)
    with pytest.raises(ContextOverflowError, match="images alone"):
        prepares.prepare(ask(ChatPrompt((message,))))
    assert len(cut) <= 65


def test_an_image_that_breaks_its_decoder_is_that_requests_error(llama4: ModelFiles) -> None:
    prepares = Preparation(llama4, facts_for(llama4, reads_images=True))
    for data in (b"no image", picture((9, 9))[:40]):
        with pytest.raises(ImageError, match="cannot be decoded"):
            prepares.prepare(ask(ChatPrompt((user_message("what?", [data]),))))
    assert prepares.prepare(ask(ChatPrompt((user_message("what?", [picture((9, 9))]),)))).request.images
    prepares.close()


@pytest.mark.parametrize("fault", [ValueError("odd"), MemoryError(), RecursionError("deep")], ids=repr)
def test_a_fault_of_ours_names_its_stage(
    preparation: Preparation, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(PlainFormat, "render", broken)
    with pytest.raises(RequestFailedError, match=f"rendered as a prompt: {type(fault).__name__}"):
        preparation.prepare(ask())


def test_a_plain_request_loads_neither_torch_nor_grammars(files: ModelFiles) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from ayllu.chat.messages import Message\n"
        "from ayllu.engine.model_files import open_model_files\n"
        "from ayllu.engine.native import NativeEngine\n"
        "from ayllu.engine.preparation import Preparation\n"
        "from ayllu.engine.prepared import CoreFacts\n"
        "from ayllu.engine.requests import ChatPrompt, GenerateRequest\n"
        "facts = CoreFacts(context=64, slots=1, reads_images=False, vocab_size=10**6)\n"
        "prepares = Preparation(open_model_files(Path(sys.argv[1])), facts)\n"
        "prepares.prepare(GenerateRequest(prompt=ChatPrompt((Message('user', 'hi'),))))\n"
        "heavy = {'torch', 'llguidance', 'jsonschema_rs', 'multiprocessing', 'httpx2'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    path = str(files.checkpoint.path)
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_embedding_inputs_become_tokens(files: ModelFiles, preparation: Preparation) -> None:
    request = EmbedRequest(inputs=("hello", (1, 2)), normalise=False, tenant="t")
    prepared = preparation.prepare_embedding(request)
    assert prepared.inputs == [files.tokenizer.encode("hello"), [1, 2]]
    assert (prepared.id, prepared.normalise, prepared.tenant) == (request.id, False, "t")


@pytest.mark.parametrize(
    ("inputs", "kind", "says"),
    [
        (("a", ""), UsageError, "An input has no tokens"),
        (((1, 1 << 20),), UsageError, "Token 1048576 in an input"),
        (((1,) * 1025,), ContextOverflowError, "An input has 1025 tokens; the context holds 1024"),
    ],
)
def test_embedding_inputs_that_cannot_be_read_are_told(
    preparation: Preparation, inputs: tuple[str | tuple[int, ...], ...], kind: type[AylluError], says: str
) -> None:
    with pytest.raises(kind, match=says):
        preparation.prepare_embedding(EmbedRequest(inputs=inputs))


def test_an_encoder_makes_vectors_and_does_not_answer(minilm_folder: Path) -> None:
    encoder = open_model_files(minilm_folder)
    assert isinstance(encoder, EncoderFiles)
    prepares = EncoderPreparation(encoder)
    with pytest.raises(UsageError, match="does not answer"):
        prepares.prepare(ask())
    prepared = prepares.prepare_embedding(EmbedRequest(inputs=("hello", (101, 7592, 102))))
    assert prepared.inputs == [[101, 7592, 102]] * 2
    with pytest.raises(ContextOverflowError):
        prepares.prepare_embedding(EmbedRequest(inputs=("word " * 1000,)))
    with pytest.raises(UsageError, match="not in the vocabulary"):
        prepares.prepare_embedding(EmbedRequest(inputs=((1 << 20,),)))


# Grammars.


def test_a_structure_becomes_a_grammar_and_a_wrong_one_is_told(preparation: Preparation) -> None:
    for structure in (
        JsonStructure({"type": "object"}),
        RegexStructure("[ab]+"),
        ChoiceStructure(("a", "b")),
    ):
        assert preparation.prepare(ask(structure=structure)).request.grammar is not None
    with pytest.raises(GrammarError):
        preparation.prepare(ask(structure=RegexStructure("(")))
    assert preparation.prepare(ask(structure=RegexStructure("[ab]+"))).request.grammar is not None


def test_tools_are_shown_and_their_calls_found(files: ModelFiles, preparation: Preparation) -> None:
    plain = preparation.prepare(ask()).request
    auto = preparation.prepare(ask(tool_use=ToolUse((ADD,)))).request
    assert len(auto.token_ids) > len(plain.token_ids)
    # Markers of calls are control tokens in some families: the parser must see them.
    assert not auto.skip_specials
    required = preparation.prepare(ask(tool_use=ToolUse((ADD,), choice="required"))).request
    assert required.grammar is not None


def test_tools_that_must_not_be_used_are_not_shown(preparation: Preparation) -> None:
    plain = preparation.prepare(ask()).request
    prepared = preparation.prepare(
        ask(tool_use=ToolUse((ADD,), choice="none"), structure=ChoiceStructure(("a",)))
    )
    assert prepared.request.token_ids == plain.token_ids
    assert prepared.request.skip_specials
    call = TextDelta(0, '{"name": "add", "parameters": {}}', (1,))
    assert prepared.public.of(call) == [call]


# Events.

CALL = '{"name": "add", "parameters": {"a": 1}}'


def tools_of(files: ModelFiles, *, parallel: bool = True) -> PublicEvents:
    tools = ToolUse((ADD,), parallel=parallel)
    request = ask(tool_use=tools, id="r")
    return PublicEvents(request, tools, lambda: files.chat_format.tool_call_parser(tools.tools))


def said(public: PublicEvents, *texts: str, index: int = 0, reason: FinishReason = "stop") -> list[Event]:
    events = [event for i, text in enumerate(texts) for event in public.of(TextDelta(index, text, (i,)))]
    return events + public.of(AnswerFinished(index, reason, len(texts)))


def calls_in(events: list[Event]) -> list[ToolCallMade]:
    return [event for event in events if isinstance(event, ToolCallMade)]


def text_in(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def test_without_tools_events_pass_as_they_are() -> None:
    public = PublicEvents(ask())
    events = [Started(3), TextDelta(0, CALL, (1,)), AnswerFinished(0, "stop", 1), Done(3, 1)]
    assert [passed for event in events for passed in public.of(event)] == events


def test_a_call_becomes_an_event_and_the_reason(files: ModelFiles) -> None:
    events = said(tools_of(files), "I add.\n", CALL[:10], CALL[10:])
    assert text_in(events) == "I add."
    assert [(made.index, made.call_index, made.call.name) for made in calls_in(events)] == [(0, 0, "add")]
    assert calls_in(events)[0].call.arguments == {"a": 1}
    assert events[-1] == AnswerFinished(0, "tool_calls", 3)


@pytest.mark.parametrize("reason", ["length", "cancelled"])
def test_an_answer_that_was_cut_stays_cut_though_it_made_a_call(
    files: ModelFiles, reason: FinishReason
) -> None:
    events = said(tools_of(files), CALL, reason=reason)
    assert len(calls_in(events)) == 1
    assert events[-1] == AnswerFinished(0, reason, 1)


def test_an_answer_without_calls_ends_as_it_did(files: ModelFiles) -> None:
    events = said(tools_of(files), "{", "no call")
    assert text_in(events) == "{no call"
    assert events[-1] == AnswerFinished(0, "stop", 2)


def test_answers_side_by_side_are_read_apart_and_their_calls_have_their_own_ids(files: ModelFiles) -> None:
    public = tools_of(files)
    events = public.of(TextDelta(0, CALL[:12], (1,))) + public.of(TextDelta(1, "text", (1,)))
    events += public.of(TextDelta(0, CALL[12:] + CALL, (2,)))
    events += said(public, index=0) + said(public, CALL, index=1)
    made = calls_in(events)
    assert [(call.index, call.call_index) for call in made] == [(0, 0), (0, 1), (1, 0)]
    assert len({call.call.id for call in made}) == 3
    assert all(call.call.id.startswith("call_") for call in made)


def test_an_id_that_the_model_wrote_is_not_trusted(files: ModelFiles) -> None:
    call = '{"id": "same", "name": "add", "parameters": {}}'
    made = calls_in(said(tools_of(files), call, call))
    assert len(made) == len({call.call.id for call in made}) == 2


def test_where_one_call_is_allowed_others_are_left_out(files: ModelFiles) -> None:
    events = said(tools_of(files, parallel=False), CALL + "\n" + CALL)
    assert len(calls_in(events)) == 1
    assert events[-1] == AnswerFinished(0, "tool_calls", 1)


@given(
    cuts=st.lists(st.integers(0, 120), max_size=12), text=st.sampled_from(["", "some text\n", "a {b} c\n"])
)
def test_tokens_are_all_told_however_the_text_is_cut(files: ModelFiles, cuts: list[int], text: str) -> None:
    whole = text + CALL
    edges = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    public = tools_of(files)
    events: list[Event] = []
    logprobs = [TokenLogprob(b"", -float(number), number) for number in range(len(edges))]
    for number, (start, stop) in enumerate(pairwise(edges)):
        events += public.of(TextDelta(0, whole[start:stop], (number,), (logprobs[number],)))
    events += public.of(AnswerFinished(0, "stop", len(edges) - 1))
    deltas = [event for event in events if isinstance(event, TextDelta)]
    assert [token for delta in deltas for token in delta.token_ids] == list(range(len(edges) - 1))
    assert [lp for delta in deltas for lp in delta.logprobs] == logprobs[: len(edges) - 1]
    assert text_in(events).rstrip() == text.rstrip()
    assert len(calls_in(events)) == 1


def structured(schema: dict[str, Any] | bool, *texts: str, **end: Any) -> list[Event]:
    public = PublicEvents(ask(structure=JsonStructure(schema)))
    events = [event for text in texts for event in public.of(TextDelta(0, text, (1,)))]
    return events + public.of(AnswerFinished(0, end.get("reason", "stop"), 1, end.get("stop")))


def test_an_answer_of_its_schema_passes() -> None:
    events = structured({"type": "object", "required": ["a"]}, '{"a"', ": 1}")
    assert text_in(events) == '{"a": 1}'


@pytest.mark.parametrize("text", ['{"b": 1}', '{"a": 1', "", "[]"])
def test_an_answer_that_breaks_its_schema_is_a_failure(text: str) -> None:
    with pytest.raises(RequestFailedError, match="The answer"):
        structured({"type": "object", "required": ["a"]}, text)


def test_an_answer_that_was_cut_is_not_judged() -> None:
    for end in ({"reason": "length"}, {"reason": "cancelled"}, {"reason": "stop", "stop": "x"}):
        assert structured({"type": "object"}, '{"a": ', **end)
