"""Model templates: as transformers renders honest ones, harmless if hostile, and deaf to typed markers."""

from __future__ import annotations

import time
import tracemalloc
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ayllu.chat.formats import chat_format_for
from ayllu.chat.messages import ImagePart, Message, TextPart, ToolCall, ToolDefinition
from ayllu.chat.template import TemplateFormat
from ayllu.chat.template_sandbox import SandboxedTemplate
from ayllu.chat.tokenizer import Tokenizer, tokenizer_from_gguf
from ayllu.errors import TemplateError, UnsupportedError, UsageError
from tests.chat.hostile_templates import HOSTILE
from tests.chat.letters import CHATML_SPECIALS, Letters

CHATML = Letters(CHATML_SPECIALS, bos="<|endoftext|>", eos="<|im_end|>")
LLAMA3 = Letters(
    ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"],
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
)
INSTRUCT = Letters(["<s>", "</s>", "<unk>", "[INST]", "[/INST]"], bos="<s>", eos="</s>")
PHI = Letters(["<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|end|>"], eos="<|end|>")

# Written for these tests, each in the style of a family.
TEMPLATES = Path(__file__).parent / "templates"
TOOLS_STYLE = (TEMPLATES / "tools.jinja").read_text(encoding="utf-8")
HEADER_STYLE = (TEMPLATES / "header.jinja").read_text(encoding="utf-8")
INSTRUCT_STYLE = (TEMPLATES / "instruct.jinja").read_text(encoding="utf-8")
JSON_STYLE = (TEMPLATES / "json.jinja").read_text(encoding="utf-8")
PIECES_STYLE = (TEMPLATES / "pieces.jinja").read_text(encoding="utf-8")

WEATHER = ToolDefinition(
    "get_weather", "Weather – now <b>", {"type": "object", "properties": {"city": {"type": "string"}}}
)
PLAIN = [
    Message("system", " Be brief. "),
    Message("user", "Hi <b> & 'you' 日本\n"),
    Message("assistant", "a\nb c"),
]
TALK = [
    Message("user", "Weather?\n"),
    Message("assistant", "", tool_calls=(ToolCall("get_weather", {"city": "Líma", "n": [1, None]}),)),
    Message("tool", '{"t": 18}', tool_call_id="c1", name="get_weather"),
    Message("tool", "and rain"),
    Message("assistant", "thought</think>\nIt rains."),
    Message("user", "Thanks"),
]
CASES: dict[str, tuple[str, Letters, list[Message], list[ToolDefinition]]] = {
    "tools": (TOOLS_STYLE, CHATML, TALK, [WEATHER]),
    "tools, none given": (TOOLS_STYLE, CHATML, PLAIN, []),
    "headers": (HEADER_STYLE, LLAMA3, PLAIN, []),
    "headers, tools": (HEADER_STYLE, LLAMA3, TALK, [WEATHER, WEATHER]),
    "instruct": (INSTRUCT_STYLE, INSTRUCT, PLAIN, []),
    "much of the language": (JSON_STYLE, CHATML, PLAIN, []),
    "markers from pieces": (PIECES_STYLE, PHI, PLAIN, []),
}


def shaped(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages the way callers of transformers write them."""
    conversation = []
    for message in messages:
        entry: dict[str, Any] = {"role": message.role, "content": message.text}
        if message.tool_calls:
            entry["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in message.tool_calls
            ]
        entry |= {"tool_call_id": message.tool_call_id} if message.tool_call_id else {}
        entry |= {"name": message.name} if message.name else {}
        conversation.append(entry)
    return conversation


def by_transformers(
    template: str, messages: list[Message], tools: list[ToolDefinition], generate: bool, bos: str, eos: str
) -> str:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    functions = [
        {"name": tool.name, "description": tool.description, "parameters": tool.parameters} for tool in tools
    ]
    rendered, _ = utils.render_jinja_template(
        conversations=[shaped(messages)],
        tools=[{"type": "function", "function": function} for function in functions] or None,
        chat_template=template,
        add_generation_prompt=generate,
        bos_token=bos,
        eos_token=eos,
    )
    return rendered[0]


def name_of(letters: Letters | Tokenizer, token: int | None) -> str:
    return next((name for name, number in letters.specials.items() if number == token), "")


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_honest_templates_render_as_transformers_renders_them(case: str, generate: bool) -> None:
    template, letters, messages, tools = CASES[case]
    chat = chat_format_for(letters, template, "llama")
    assert isinstance(chat, TemplateFormat)
    ours = letters.decode(chat.render(messages, tools, add_generation_prompt=generate).token_ids)
    names = name_of(letters, letters.bos_id), name_of(letters, letters.eos_id)
    assert ours == by_transformers(template, messages, tools, generate, *names)


def check_real_model(file: Path) -> None:
    fields = pytest.importorskip("gguf").GGUFReader(file).fields
    metadata = {
        name: field.contents() for name, field in fields.items() if name.startswith(("tokenizer", "general"))
    }
    tokenizer = tokenizer_from_gguf(metadata, file)
    template = str(metadata["tokenizer.chat_template"])
    chat = chat_format_for(tokenizer, template, str(metadata["general.architecture"]))
    names = name_of(tokenizer, tokenizer.bos_id), name_of(tokenizer, tokenizer.eos_id)
    for messages, tools in (
        [PLAIN, []],
        [TALK, [WEATHER]],
        [TALK, []],
        [[Message("user", "<|im_end|>")], []],
    ):
        ids = chat.render(messages, tools).token_ids
        assert tokenizer.decode(ids) == by_transformers(template, messages, tools, True, *names)
    for special in tokenizer.specials:
        hostile = chat.render(everywhere(special), [tool_named(special)]).token_ids
        harmless = chat.render(everywhere("x"), [tool_named("x")]).token_ids
        assert list(filter(tokenizer.is_special, hostile)) == list(filter(tokenizer.is_special, harmless))
        assert f"u {special} u" in tokenizer.decode(hostile)


def test_smollm2_template_of_the_model_file(smollm2_gguf: Path) -> None:
    check_real_model(smollm2_gguf)


@pytest.mark.large
def test_qwen_template_of_the_model_file(qwen05_gguf: Path) -> None:
    check_real_model(qwen05_gguf)


def everywhere(text: str) -> list[Message]:
    """A conversation with `text` wherever a user, a tool or a model can put it, whole and in two halves."""
    half = len(text) // 2
    return [
        Message("system", f"s {text} s"),
        Message("user", (TextPart(f"u {text} u"), TextPart(text[:half]), TextPart(text[half:]))),
        Message("assistant", text, tool_calls=(ToolCall(text, {text: [text, {"k": text}]}),)),
        Message("tool", text, name=text, tool_call_id=text),
        Message("user", text),
    ]


def tool_named(text: str) -> ToolDefinition:
    return ToolDefinition(text, f"d {text}", {"type": "object", "properties": {text: {"enum": [text]}}})


# Templates that take user text apart and put it together in every way the sandbox knows.
MIXING = {
    "joined": "<|im_start|>{{ messages | map(attribute='content') | join }}<|im_end|>",
    "removed": "<|im_start|>{% for m in messages %}{{ m.content | replace('x', '') }}{% endfor %}<|im_end|>",
    "stripped": "<|im_start|>{% for m in messages %}{{ m.content.strip('x \n') }}{% endfor %}<|im_end|>",
    "split": "<|im_start|>{% for m in messages %}{{ m.content.split('x') | join }}{% endfor %}<|im_end|>",
    "reversed": "<|im_start|>{% for m in messages %}{{ m.content | reverse }}{% endfor %}<|im_end|>",
    "lowered": "<|im_start|>{% for m in messages %}{{ m.content | lower }}{% endfor %}<|im_end|>",
    "sliced": "<|im_start|>{% for m in messages %}{{ m.content[1:] ~ m.content[:1] }}{% endfor %}<|im_end|>",
    "character by character": "<|im_start|>{% for m in messages %}{% for c in m.content %}{{ c if c != 'x' }}"
    "{% endfor %}{% endfor %}<|im_end|>",
    "sorted": "<|im_start|>{% for m in messages %}{{ m.content | list | sort | join }}{% endfor %}<|im_end|>",
    "bars between": "<|im_start|>{{ messages | map(attribute='content') | join('|') }}<|im_end|>",
    "inside pieces": "{% for m in messages %}{{ '<|' ~ m.content ~ '|>' }}{% endfor %}<|im_start|>",
    "json": "<|im_start|>{{ messages | tojson }}{{ messages | tojson(ensure_ascii=true) }}<|im_end|>",
    "tags": "<|im_start|>{% for m in messages %}<{{ m.content }}>{% endfor %}<think></think><|im_end|>",
}
FRAGMENTS = [
    *CHATML_SPECIALS,
    "<|im_",
    "end|>",
    "<|",
    "|>",
    "|",
    "<",
    ">",
    "im_end",
    "im_start",
    "x",
    " ",
    "think",
    "a",
]


@pytest.mark.parametrize("name", MIXING)
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join), min_size=1, max_size=4))
def test_no_text_becomes_a_marker_whatever_the_template_does_to_it(name: str, texts: list[str]) -> None:
    chat = TemplateFormat(CHATML, MIXING[name])
    expected = CHATML.markers(chat.render([Message("user", "a")] * len(texts)).token_ids)
    try:
        found = CHATML.markers(chat.render([Message("user", text) for text in texts]).token_ids)
    except TemplateError as error:
        assert name in ("inside pieces", "tags", "bars between")
        assert "control tokens" in str(error)
    else:
        assert found == expected


@pytest.mark.parametrize("case", ["tools", "headers", "instruct", "markers from pieces"])
def test_typed_markers_stay_text_everywhere(case: str) -> None:
    template, letters, _, _ = CASES[case]
    chat = TemplateFormat(letters, template)
    for special in letters.specials:

        def conversation(text: str) -> list[Message]:
            return everywhere(text)[: 3 if case == "instruct" else 5]

        hostile = chat.render(conversation(special), [tool_named(special)]).token_ids
        harmless = chat.render(conversation("x"), [tool_named("x")]).token_ids
        assert letters.markers(hostile) == letters.markers(harmless)
        assert f"u {special} u" in letters.decode(hostile)


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_text_comes_back_as_it_was(text: str) -> None:
    chat = TemplateFormat(CHATML, "<|im_start|>{{ messages[0].content }}<|im_end|>")
    ids = chat.render([Message("user", text)]).token_ids
    assert CHATML.texts(ids)[1] == text or "\x00" in text


def test_private_characters_of_the_user_survive() -> None:
    text = "\U000f0000|\U000f0001 \\udb80\\udc00"
    chat = TemplateFormat(CHATML, "<|im_start|>{{ messages[0].content }}<|im_end|>")
    assert CHATML.texts(chat.render([Message("user", text)]).token_ids)[1] == text


def test_text_that_leaves_no_private_character_is_refused_rather_than_trusted() -> None:
    chat = TemplateFormat(CHATML, "<|im_start|>{{ messages[0].content }}<|im_end|>")
    every = "".join(map(chr, range(0xF0000, 0xFFFFE)))
    with pytest.raises(UsageError, match=r"every private character.*U\+F0000"):
        chat.render([Message("user", f"{every}<|im_end|>")])
    text = f"{every[1:]}<|im_end|>"
    assert CHATML.texts(chat.render([Message("user", text)]).token_ids)[1] == text


@pytest.mark.parametrize("role", ["<|im_end|>", "user\n", "User", "", None, ["user"]])
def test_a_message_of_an_unknown_role_cannot_be_made(role: Any) -> None:
    with pytest.raises(UsageError, match=r"no role.*Known: system, user, assistant, tool"):
        Message(role, "hi")


CONVERSATION = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_a_template_error_within_two_seconds(name: str) -> None:
    assert len(HOSTILE) >= 25
    start = time.thread_time()
    with pytest.raises(TemplateError) as caught:
        SandboxedTemplate(HOSTILE[name]).render({"messages": CONVERSATION})
    assert time.thread_time() - start < 2
    assert " at 0x" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "name", [name for name in HOSTILE if name.startswith(("doubling", "many", "split", "text"))]
)
def test_hostile_templates_take_bounded_memory(name: str) -> None:
    template = SandboxedTemplate(HOSTILE[name])
    tracemalloc.start()
    try:
        with pytest.raises(TemplateError):
            template.render({"messages": CONVERSATION})
        assert tracemalloc.get_traced_memory()[1] < 160 << 20
    finally:
        tracemalloc.stop()


def test_a_hostile_template_leaves_the_next_one_unharmed() -> None:
    with pytest.raises(TemplateError):
        SandboxedTemplate(HOSTILE["recursive macro"]).render({"messages": CONVERSATION})
    assert SandboxedTemplate("{{ messages[0].content }}").render({"messages": CONVERSATION}) == "hi"


@pytest.mark.parametrize(
    "source",
    [
        "".join(f"{{%set a{i}=1%}}" for i in range(2000)) + "{%if 1%}{%endif%}" * 2000,
        "{%if 1%}" + "".join(f"{{%elif a{i}%}}" for i in range(4000)) + "{%endif%}",
        "{#" * 30000,
        "{{" * 30000,
        "{% call m() %}" * 95 + "{% endcall %}" * 95,
    ],
)
def test_templates_that_are_slow_to_compile_are_refused_in_time(source: str) -> None:
    start = time.thread_time()
    with pytest.raises(TemplateError):
        SandboxedTemplate(source).render({"messages": CONVERSATION})
    assert time.thread_time() - start < 2


def test_a_long_honest_conversation_renders() -> None:
    messages = [Message("user", "word " * 200), Message("assistant", "x" * 1000)] * 1000
    ids = TemplateFormat(CHATML, TOOLS_STYLE).render(messages, [WEATHER]).token_ids
    assert len(ids) > 2_000_000


def test_the_clock_is_an_argument() -> None:
    chat = TemplateFormat(CHATML, "{{ strftime_now('%Y-%m-%d') }}", now=lambda: datetime(2024, 2, 29))
    assert CHATML.decode(chat.render([]).token_ids) == "2024-02-29"


def test_a_template_can_refuse_a_conversation() -> None:
    chat = TemplateFormat(INSTRUCT, INSTRUCT_STYLE)
    with pytest.raises(TemplateError, match=r"refuses.*not number 1"):
        chat.render([Message("user", "a"), Message("system", "b")])


def test_images_and_bottomless_tools_are_refused() -> None:
    chat = TemplateFormat(CHATML, TOOLS_STYLE)
    with pytest.raises(UnsupportedError, match="image"):
        chat.render([Message("user", (ImagePart(b""),))])
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"x": deep}
    with pytest.raises(UsageError, match="nests deeper"):
        chat.render([Message("user", "a")], [ToolDefinition("f", "", deep)])
