"""Calls that a grammar writes are read back by the format's own parser as exactly those calls."""

from __future__ import annotations

import ast
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ayllu.chat.formats import CHATML, CallLayout, ChatFormat, PlainFormat, chat_format_for
from ayllu.chat.llama4_format import Llama4Format
from ayllu.chat.messages import ToolCall, ToolDefinition
from ayllu.chat.template import TemplateFormat
from ayllu.chat.tokenizer import Tokenizer, load_tokenizer
from ayllu.chat.toolcalls import TextDelta, ToolCallReady
from ayllu.chat.vocabulary import SpecialToken
from ayllu.engine.grammar import GrammarCompiler
from ayllu.engine.json_schema import validate_json
from ayllu.engine.model_files import tokenizer_for
from ayllu.engine.prepared import GrammarSpec
from ayllu.engine.requests import MAX_TOOLS, ToolUse
from ayllu.engine.tool_grammar import MAX_PARALLEL_CALLS, tool_grammar
from ayllu.engine.tool_parameters import normalised_parameters
from ayllu.errors import GrammarError, UnsupportedError
from ayllu.weights.checkpoint import open_checkpoint
from tests.chat import small_vocabularies
from tests.engine.grammar_corpus import random_answer, random_schema

TEMPLATES = Path(__file__).parent.parent / "chat" / "templates"

WEATHER = ToolDefinition(
    "get_weather",
    "The weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 30},
            "note": {"type": "string"},
            "unit": {"enum": ["c", "f", 'it\'s "x"\n', "日本"]},
            "days": {"type": "integer", "minimum": 0, "maximum": 14},
            "exact": {"type": "boolean"},
            "place": {
                "type": "object",
                "properties": {
                    "x y": {"type": "array", "items": {"type": ["number", "null", "string"]}, "maxItems": 3},
                    "at": {
                        "anyOf": [{"type": "null"}, {"type": "string", "pattern": '^[{}"\\[\\]()]{1,4}$'}]
                    },
                },
            },
        },
        "required": ["city"],
    },
)
GET = ToolDefinition("get", "Same beginning as another", {"type": "object", "properties": {}})
GCD = ToolDefinition(
    "math.gcd",
    "Types as Python names them",
    {
        "type": "dict",
        "properties": {
            "a": {"type": "float"},
            "b": {"type": "tuple", "items": {"type": "any"}, "maxItems": 2},
        },
        "required": ["a", "b"],
    },
)
ODD = ToolDefinition(
    'odd "name" 日本',
    "No name Python would take",
    {"type": "object", "properties": {"$x": {"type": "string", "maxLength": 9}, "class": {"type": "null"}}},
)
OPEN = ToolDefinition("free", "Any arguments", {"type": "object", "additionalProperties": True})
TOOLS = (WEATHER, GET, GCD, ODD, OPEN)


@dataclass(frozen=True)
class Family:
    """A chat format with its tokenizer and compiler."""

    chat_format: ChatFormat
    tokenizer: Tokenizer
    compiler: GrammarCompiler

    def read(self, text: str) -> tuple[str, list[ToolCall]]:
        parser = self.chat_format.tool_call_parser(TOOLS)
        events = [event for piece in text for event in parser.push(piece)] + parser.finish()
        said = "".join(event.text for event in events if isinstance(event, TextDelta))
        return said, [event.call for event in events if isinstance(event, ToolCallReady)]

    def grammar(self, choice: str, *, parallel: bool = True, tools: Any = TOOLS) -> GrammarSpec:
        spec = tool_grammar(self.chat_format, ToolUse(tools, choice, parallel), self.tokenizer)
        assert spec is not None
        return spec

    def answers(self, choice: str, count: int, *, parallel: bool = True) -> list[list[int]]:
        spec = self.grammar(choice, parallel=parallel)
        found = []
        for seed in range(count):
            tokens = random_answer(self.compiler.compiled(spec)[0], self.tokenizer, seed, tokens=700)
            if tokens is not None:
                found.append(tokens)
        assert len(found) > count // 2
        return found

    def follows(self, spec: GrammarSpec, text: str, *, trusted: bool = False) -> bool:
        """Whether the grammar allows `text`, and it may end there."""
        grammar = self.compiler.compiled(spec)[0]
        encode = self.tokenizer.encode_trusted if trusted else self.tokenizer.encode
        for token in encode(text):
            if not grammar.allows(token):
                return False
            grammar.accept(token)
        return grammar.is_complete


@pytest.fixture(scope="module")
def families(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    smol = tokenizer_for(open_checkpoint(smollm2_gguf))
    llama4 = load_tokenizer(small_vocabularies.write_tiktoken(tmp_path_factory.mktemp("llama4")))
    qwen = load_tokenizer(small_vocabularies.write_model_folder(tmp_path_factory.mktemp("qwen")))
    hermes = with_control_tags(qwen)
    tools_template = (TEMPLATES / "tools.jinja").read_text(encoding="utf-8")
    llama3_template = '{{ \'{"name": f, "parameters": {}}\' }}{{ messages[0].content }}'
    formats: list[tuple[str, ChatFormat, Tokenizer]] = [
        ("plain", PlainFormat(smol, CHATML), smol),
        ("bare template", TemplateFormat(smol, llama3_template), smol),
        ("tags", TemplateFormat(qwen, tools_template), qwen),
        ("control tags", TemplateFormat(hermes, tools_template), hermes),
        ("llama4 json", Llama4Format(llama4), llama4),
        ("llama4 pythonic", Llama4Format(llama4, call_style="pythonic"), llama4),
    ]
    return {
        name: Family(chat_format, tokenizer, GrammarCompiler(tokenizer, chat_format.stop_ids))
        for name, chat_format, tokenizer in formats
    }


def with_control_tags(tokenizer: Tokenizer) -> Tokenizer:
    """The same vocabulary, its tool tags control tokens, as some models have them."""
    import dataclasses

    def control(special: SpecialToken) -> SpecialToken:
        return dataclasses.replace(special, control=True)

    specials = tuple(map(control, tokenizer.parts.specials))
    return Tokenizer(dataclasses.replace(tokenizer.parts, specials=specials))


FAMILIES = ["plain", "bare template", "tags", "control tags", "llama4 json", "llama4 pythonic"]


def written_calls(family: Family, text: str) -> list[ToolCall]:
    """The calls of an answer of calls alone, read by Python's own readers."""
    layout = family.chat_format.call_layout
    if layout.style == "pythonic" and '{"name"' not in text:
        tree = ast.parse(text, mode="eval").body
        assert isinstance(tree, ast.List)
        calls = []
        for call in tree.elts:
            assert isinstance(call, ast.Call)
            arguments = {word.arg or "": ast.literal_eval(word.value) for word in call.keywords}
            calls.append(ToolCall(ast.unparse(call.func), arguments))
        return calls
    decoder = json.JSONDecoder()
    calls = []
    while text := text.strip().removeprefix("<tool_call>").strip():
        value, end = decoder.raw_decode(text)
        assert list(value) == ["name", layout.arguments_key]
        calls.append(ToolCall(value["name"], value[layout.arguments_key]))
        text = text[end:].strip().removeprefix("</tool_call>")
    return calls


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("choice", ["required", *(tool.name for tool in TOOLS)])
def test_calls_come_back_as_they_were_written(families: dict[str, Family], name: str, choice: str) -> None:
    family = families[name]
    schemas = {tool.name: normalised_parameters(tool.parameters) for tool in TOOLS}
    several = 0
    for tokens in family.answers(choice, 25):
        hidden = family.tokenizer.decode(tokens, skip_specials=True)
        for text in (hidden, family.tokenizer.decode(tokens)):
            said, calls = family.read(text)
            assert said == ""
            assert calls
            mixed = name == "llama4 pythonic" and '{"name"' in text
            if not mixed:
                assert calls == written_calls(family, hidden)
        for call in calls:
            validate_json(schemas[call.name], json.dumps(call.arguments))
        assert len(calls) <= MAX_PARALLEL_CALLS
        several += len(calls) > 1
        if choice != "required":
            assert [call.name for call in calls] == [choice]
    assert (several > 0) == (choice == "required")


@pytest.mark.parametrize("name", FAMILIES)
def test_one_call_alone_where_calls_must_not_be_parallel(families: dict[str, Family], name: str) -> None:
    family = families[name]
    for choice in ("required", "auto"):
        for tokens in family.answers(choice, 10, parallel=False):
            said, calls = family.read(family.tokenizer.decode(tokens, skip_specials=True))
            assert len(calls) == 1 or (choice == "auto" and len(calls) <= 1)
            assert choice == "auto" or not said


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_may_be_text_or_calls_where_tools_are_offered(
    families: dict[str, Family], name: str
) -> None:
    family = families[name]
    spec = family.grammar("auto")
    opening, closing = ("<tool_call>\n", "\n</tool_call>") if "tags" in name else ("", "")
    key = family.chat_format.call_layout.arguments_key
    trusted = name == "control tags"
    for text in (
        "",
        "Hello!",
        " \n 日本 {x} [1] (f) ",
        "3 < 4 <tool",
        '```json\n{"name": 5}\n```',
        '{"x": 1}',
        "[1]",
    ):
        assert family.follows(spec, text), text
        assert family.read(text) == (text, [])
    call = f'{opening}{{"name": "get", "{key}": {{}}}}{closing}'
    pythonic = name == "llama4 pythonic"
    if pythonic:
        call = "[get()]"
        assert family.follows(spec, '[get(), {"name": "free", "parameters": {"a": 1}}]')
    assert family.follows(spec, call, trusted=trusted)
    for broken in (call.replace("get", "got"), call.replace("{}", '{"a": 1}'), call + " and more", call[:-1]):
        if broken != call and not (pythonic and "got" in broken):
            assert not family.follows(spec, broken, trusted=trusted), broken
    if "tags" in name:
        assert family.follows(spec, "I will look." + call, trusted=trusted)
        assert family.read("I will look." + call) == ("I will look.", [ToolCall("get", {})])
    else:
        assert family.follows(spec, "I will look. " + call)


@pytest.mark.parametrize("name", FAMILIES)
def test_random_answers_with_tools_on_offer_end_and_hold_no_other_call(
    families: dict[str, Family], name: str
) -> None:
    family = families[name]
    schemas = {tool.name: normalised_parameters(tool.parameters) for tool in TOOLS}
    layout = family.chat_format.call_layout
    beginnings = {
        "json": ['{"name": "', ' \n{ "name":"'],
        "pythonic": ["[get_weather(", " [ math.gcd(", '[{"name": "'],
    }[layout.style]
    if layout.opening:
        beginnings = [layout.opening, "Let me see." + layout.opening]
    spec = family.grammar("auto")
    for seed in range(12):
        beginning = beginnings[seed % len(beginnings)]
        grammar = family.compiler.compiled(spec)[0]
        prefix = family.tokenizer.encode_trusted(beginning)
        for token in prefix:
            grammar.accept(token)
        rest = random_answer(grammar, family.tokenizer, seed, tokens=700)
        if rest is None:
            continue
        said, calls = family.read(family.tokenizer.decode([*prefix, *rest]))
        assert said == ("Let me see." if "Let me see." in beginning else "")
        assert calls
        for call in calls:
            validate_json(schemas[call.name], json.dumps(call.arguments))


@pytest.mark.parametrize("name", ["llama4 json", "llama4 pythonic"])
def test_llama4_may_announce_calls_by_its_markers(families: dict[str, Family], name: str) -> None:
    family = families[name]
    start, end = "<|python_start|>", "<|python_end|>"
    call = "[get()]" if name == "llama4 pythonic" else '{"name": "get", "parameters": {}}'
    for choice in ("auto", "required"):
        spec = family.grammar(choice)
        for text in (call, start + call, start + call + end, start + end + call):
            assert family.follows(spec, text, trusted=True), text
            assert family.read(text) == ("", [ToolCall("get", {})])
        assert not family.follows(spec, call + end, trusted=True)
        assert not family.follows(spec, start + call + end + end, trusted=True)
        assert not family.follows(spec, start + "<|header_start|>" + call, trusted=True)
        for text in (start + "I will look." + end + call, "I will look." + start + call):
            assert family.follows(spec, text, trusted=True) == (choice == "auto")
            assert family.read(text) == ("I will look.", [ToolCall("get", {})])
    assert family.follows(family.grammar("auto"), f"{start}print(1){end}", trusted=True)


def test_only_the_markers_of_the_format_are_allowed_of_all_control_tokens(
    families: dict[str, Family],
) -> None:
    for name, markers in (
        ("llama4 json", {"<|python_start|>", "<|python_end|>"}),
        ("control tags", {"<tool_call>", "</tool_call>"}),
        ("tags", set()),
    ):
        family = families[name]
        tokenizer = family.tokenizer
        seen = set()
        control = {n for n, t in tokenizer.specials.items() if tokenizer.is_control(t)}
        stops = {n for n in control if tokenizer.specials[n] in family.chat_format.stop_ids}
        for choice in ("auto", "required"):
            for seed in range(10):
                grammar = family.compiler.compiled(family.grammar(choice))[0]
                draws = random.Random(seed)
                for _ in range(60):
                    seen |= {n for n in control - stops if grammar.allows(tokenizer.specials[n])}
                    found = [t for t in range(tokenizer.vocab_size) if grammar.allows(t)]
                    marks = [t for t in found if tokenizer.is_control(t)]
                    token = draws.choice(marks or found)
                    grammar.accept(token)
                    if token in family.chat_format.stop_ids or grammar.must_stop:
                        break
        assert seen == markers


def test_no_grammar_where_no_tool_may_be_called(families: dict[str, Family]) -> None:
    family = families["plain"]
    assert tool_grammar(family.chat_format, ToolUse(TOOLS, "none"), family.tokenizer) is None


def test_a_function_that_must_be_called_hides_the_others_mistakes(families: dict[str, Family]) -> None:
    family = families["plain"]
    wrong = ToolDefinition("wrong", "", {"type": "object", "properties": {"a": {"uniqueItems": True}}})
    family.grammar("get", tools=(GET, wrong))
    with pytest.raises(UnsupportedError) as caught:
        family.grammar("auto", tools=(GET, wrong))
    assert caught.value.problem.startswith("tools[1].parameters.properties.a.uniqueItems: ")


def test_as_many_tools_as_a_request_may_bring(families: dict[str, Family]) -> None:
    tools = tuple(
        ToolDefinition(f"tool_{n}", "", {"type": "object", "properties": {"a": random_schema(n)}})
        for n in range(MAX_TOOLS)
    )
    tools = tuple(
        ToolDefinition(
            tool.name,
            "",
            {**tool.parameters, "$defs": tool.parameters["properties"]["a"].pop("$defs", {})},
        )
        for tool in tools
    )
    for family in families.values():
        for choice in ("auto", "required"):
            grammar = family.compiler.compiled(family.grammar(choice, tools=tools))[0]
            assert random_answer(grammar, family.tokenizer, 1, tokens=2000) is not None


@pytest.mark.parametrize(
    ("template", "layout"),
    [
        ("<tool_call>\n{}\n</tool_call>", CallLayout(arguments_key="arguments", opening="<tool_call>\n",
                                                    closing="\n</tool_call>")),
        ('Answer {"name": f, "parameters": {}}', CallLayout()),
        ('Answer [{"name": f, "arguments": {}}]', CallLayout(arguments_key="arguments")),
        ('{"arguments": 1, "parameters": 2}', CallLayout()),
        ("Hello", CallLayout()),
    ],
)  # fmt: skip
def test_templates_tell_how_calls_are_written(
    families: dict[str, Family], template: str, layout: CallLayout
) -> None:
    text = "{{ '" + template.replace("\n", "\\n") + "' }}"
    chat_format = chat_format_for(families["tags"].tokenizer, text, "qwen2")
    assert chat_format.call_layout == layout


def parameters(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


CLOSED = {"additionalProperties": False}
SCHEMA_AS_VALUE = {"enum": [{"type": "float"}], "default": {"type": "dict"}}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({}, {"type": "object", **CLOSED}),
        ({"type": "dict", "properties": {}}, {**parameters(), **CLOSED}),
        ({"properties": {"a": {"type": "float"}}}, parameters(a={"type": "number"})),
        (parameters(type={"type": "any", "description": "x"}), parameters(type={"description": "x"})),
        (parameters(a={"type": ["string", "any"]}), parameters(a={})),
        (parameters(a={"type": ["double", "None"]}), parameters(a={"type": ["number", "null"]})),
        (parameters(a={"anyOf": [{"type": "bool"}]}), parameters(a={"anyOf": [{"type": "boolean"}]})),
        (
            parameters(a={"type": "tuple", "items": [{"type": "int"}, {"type": "Str"}]}),
            parameters(a={"type": "array", "items": [{"type": "integer"}, {"type": "string"}]}),
        ),
        (
            {"type": "HashMap", "additionalProperties": {"type": "ArrayList"}},
            {"type": "object", "additionalProperties": {"type": "array"}},
        ),
        (parameters(a=SCHEMA_AS_VALUE), parameters(a=SCHEMA_AS_VALUE)),
    ],
)
def test_types_are_read_as_other_languages_name_them(written: Any, meant: Any) -> None:
    before = json.dumps(written)
    assert normalised_parameters(written) == meant
    assert json.dumps(written) == before


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"type": "string"}, "$.type: arguments are always an object, not string."),
        ({"type": "object", "properties": {"a": {"type": "flaot"}}},
         "$.properties.a.type: there is no type 'flaot'. Did you mean float"),
        ({"type": "object", "properties": {"a": {"items": {"type": "matrix"}}}},
         "$.properties.a.items.type: there is no type 'matrix'."),
    ],
)  # fmt: skip
def test_what_cannot_be_parameters_is_refused_by_its_path(parameters: Any, says: str) -> None:
    with pytest.raises(GrammarError) as caught:
        normalised_parameters(parameters)
    assert caught.value.problem.startswith(says)
