"""Tool calls: every syntax of the corpus, every way of cutting the stream, hostile answers in linear time."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ayllu.chat.call_literals import MAX_DEPTH, NotACall, literal
from ayllu.chat.messages import ToolCall, ToolDefinition
from ayllu.chat.toolcalls import TextDelta, ToolCallParser, ToolCallReady, parse_tool_calls

START, END = "<|python_start|>", "<|python_end|>"
F, G = ToolCall("f", {"a": 1, "b": "x"}), ToolCall("g", {})
JSON_F = '{"name": "f", "parameters": {"a": 1, "b": "x"}}'
JSON_G = '{"name": "g", "arguments": {}}'


def call(name: str = "f", **arguments: Any) -> ToolCall:
    return ToolCall(name, arguments)


# answer -> (text, calls)
CORPUS: dict[str, tuple[str, list[ToolCall]]] = {
    # Python lists, the native form
    '[f(a=1, b="x"), g()]': ("", [F, G]),
    '[f(a=1, b="x"),\n g(),\n]': ("", [F, G]),
    "  [ g ( ) ]  \n": ("", [G]),
    "[f(a=-1, b=+2, c=-1.5e-3, d=1_000)]": ("", [call(a=-1, b=2, c=-0.0015, d=1000)]),
    "[f(a=True, b=true, c=None, d=null, e=False, f=false)]": (
        "",
        [call(a=True, b=True, c=None, d=None, e=False, f=False)],
    ),
    "[f(a=[1, [2, {'k': [None]}]], b={\"x\": {'y': (1, 2)}}, c=[], d={})]": (
        "",
        [call(a=[1, [2, {"k": [None]}]], b={"x": {"y": [1, 2]}}, c=[], d={})],
    ),
    r"""[f(a='it\'s', b="say \"x\"", c='\n\t\\ \x41\u00e9\U0001F600', d='\d+')]""": (
        "",
        [call(a="it's", b='say "x"', c="\n\t\\ Aé😀", d="\\d+")],
    ),
    '[f(a="""x "quoted"\ny""", b=\'\', c="")]': ("", [call(a='x "quoted"\ny', b="", c="")]),
    '[f(a="[g()] {\\"name\\": 1} <|python_end|> ```")]': (
        "",
        [call(a='[g()] {"name": 1} <|python_end|> ```')],
    ),
    "[weather.get_now(city='Líma', 東京=1)]": ("", [call("weather.get_now", city="Líma", 東京=1)]),
    "[get-weather(city='x')]": ("", [call("get-weather", city="x")]),
    # JSON
    JSON_F: ("", [F]),
    '{"type": "function", "name": "f", "parameters": {"a": 1, "b": "x"}}': ("", [F]),
    '{"type":"function","function":{"name":"f","arguments":{"a":1,"b":"x"}}}': ("", [F]),
    '{"id": "c1", "type": "function", "function": {"name": "g", "arguments": "{}"}}': ("", [G]),
    '{"function": "f", "parameters": {"a": 1, "b": "x"}}': ("", [F]),
    '{"name": "f", "arguments": "{\\"a\\": 1, \\"b\\": \\"x\\"}"}': ("", [F]),
    '{"type": "function", "name": "g"}': ("", [G]),
    '{"name": "g", "parameters": null}': ("", [G]),
    '{"parameters": {"u": "\\ud83d\\ude00 \\/ \\ud800"}, "name": "f"}': ("", [call(u="😀 / \ufffd")]),
    f"[{JSON_F}, {JSON_G}]": ("", [F, G]),
    f"{JSON_F}; {JSON_G}": ("", [F, G]),
    f"{JSON_F}\n{JSON_G}\n": ("", [F, G]),
    f"{JSON_F}{JSON_G}": ("", [F, G]),
    # markers
    f"{START}[f(a=1, b='x'), g()]{END}<|eom|>": ("", [F, G]),
    f"{START}{JSON_F}{END}": ("", [F]),
    f"{START}{END}{JSON_F}{JSON_G}<|eot|>": ("", [F, G]),
    f"{START}Let me see.{END}{JSON_F}": ("Let me see.", [F]),
    f"{START}[g()]": ("", [G]),
    f"<|python_tag|>{JSON_F}<|eom_id|>": ("", [F]),
    f"[g()]{END}": ("", [G]),
    "Hi<|eot|>": ("Hi", []),
    # functions in tags
    '<function=f>{"a": 1, "b": "x"}</function>': ("", [F]),
    '<function=f>\n{"a": 1, "b": "x"}\n</function>\n<function=g>{}</function>': ("", [F, G]),
    "<function=g>{}": ("", [G]),
    f"<tool_call>\n{JSON_F}\n</tool_call>": ("", [F]),
    f"<tool_call>\n{JSON_F}\n</tool_call>\n<tool_call>\n{JSON_G}\n</tool_call>": ("", [F, G]),
    f"Sure.\n<tool_call>{JSON_F}{JSON_G}": ("Sure.", [F, G]),
    # built-in tools and code
    f'{START}brave_search.call(query="a (b) c"){END}<|eom|>': ("", [call("brave_search", query="a (b) c")]),
    'wolfram_alpha.call(query="1+1")': ("", [call("wolfram_alpha", query="1+1")]),
    'Looking:\nbrave_search.call(query="x")': ("Looking:", [call("brave_search", query="x")]),
    f"{START}import os\nprint(1 < 2, [g()]){END}<|eom|>": (
        "",
        [call("python", code="import os\nprint(1 < 2, [g()])")],
    ),
    f"{START}x = [1]\nx": ("", [call("python", code="x = [1]\nx")]),
    f"{START}[1, 2]{END} done": (" done", [call("python", code="[1, 2]")]),
    # fences
    f"```json\n{JSON_F}\n```": ("", [F]),
    f"Calling it:\n\n```json\n[{JSON_F}, {JSON_G}]\n```\n": ("Calling it:", [F, G]),
    f"```\n{JSON_F}": ("", [F]),
    "```tool_call\n[g()]\n```": ("", [G]),
    # prose around
    "I will look it up. [g()]": ("I will look it up.", [G]),
    "See [1] and {x}: [g()] ok": ("See [1] and {x}: ok", [G]),
    "[note: [g()]": ("[note:", [G]),
    # text that stays text
    "": ("", []),
    " \n": (" \n", []),
    "Hello, world!\n": ("Hello, world!\n", []),
    "[1, 2, 3]": ("[1, 2, 3]", []),
    "[]": ("[]", []),
    "{}": ("{}", []),
    "[a link](https://x.org) and `[g()` or [x": ("[a link](https://x.org) and `[g()` or [x", []),
    '{"name": "Bob", "age": 3}': ('{"name": "Bob", "age": 3}', []),
    '{"name": "Bob"}': ('{"name": "Bob"}', []),
    '{"type": "object", "name": "f", "parameters": {}}': (
        '{"type": "object", "name": "f", "parameters": {}}',
        [],
    ),
    '{"name": "f", "parameters": [1]}': ('{"name": "f", "parameters": [1]}', []),
    '{"name": "f", "arguments": "nonsense"}': ('{"name": "f", "arguments": "nonsense"}', []),
    "[f(1)]": ("[f(1)]", []),
    "[f(a=1, a=2)]": ("[f(a=1, a=2)]", []),
    "[f(a=1+1)]": ("[f(a=1+1)]", []),
    "[f(a=g())]": ("[f(a=g())]", []),
    "[f(a=__import__('os'))]": ("[f(a=__import__('os'))]", []),
    "[f(a=1e999)]": ("[f(a=1e999)]", []),
    "[f(a=1": ("[f(a=1", []),
    '[f(a="unfinished': ('[f(a="unfinished', []),
    "```python\n[g()]\n```": ("```python\n[g()]\n```", []),
    '```json\n{"a": 1}\n```': ('```json\n{"a": 1}\n```', []),
    "f(a=1)": ("f(a=1)", []),
    "1 < 2 <b> <tool_call> no": ("1 < 2 <b> <tool_call> no", []),
    "<function=f>none</function>": ("<function=f>none</function>", []),
    "<|python_sta": ("<|python_sta", []),
}


def outcome(parser: ToolCallParser, pieces: Sequence[str]) -> tuple[str, tuple[ToolCall, ...]]:
    text, calls = "", []
    for event in [event for piece in pieces for event in parser.push(piece)] + parser.finish():
        if isinstance(event, TextDelta):
            assert event.text
            text += event.text
        else:
            assert isinstance(event, ToolCallReady)
            assert event.index == len(calls)
            calls.append(event.call)
    return text, tuple(calls)


@pytest.mark.parametrize("answer", CORPUS)
def test_corpus(answer: str) -> None:
    text, calls = CORPUS[answer]
    found_text, found = parse_tool_calls(answer)
    assert (found_text, [(c.name, c.arguments) for c in found]) == (
        text,
        [(c.name, c.arguments) for c in calls],
    )
    json.dumps([c.arguments for c in found]).encode()


@pytest.mark.parametrize("answer", CORPUS)
def test_every_cut_in_two_and_single_characters_agree_with_the_whole(answer: str) -> None:
    whole = parse_tool_calls(answer)
    assert outcome(ToolCallParser(), list(answer)) == whole
    for cut in range(len(answer) + 1):
        assert outcome(ToolCallParser(), [answer[:cut], answer[cut:]]) == whole


ALPHABET = [
    *"[]{}()<>`\"'\\,;:=. \n-+1eaf_",
    *(
        "f(",
        "g()",
        "a=1",
        JSON_F,
        JSON_G,
        START,
        END,
        "<|eom|>",
        "<tool_call>",
        "</tool_call>",
        "```",
        "json",
    ),
    *(
        "<function=",
        "f>",
        "</function>",
        "x.call(",
        '"name"',
        '"parameters"',
        "true",
        "None",
        "\\u00e9",
        "text ",
    ),
]
answers = st.lists(st.sampled_from(ALPHABET), max_size=30).map("".join) | st.sampled_from(list(CORPUS))


@settings(max_examples=400, deadline=None)
@given(st.lists(answers, max_size=3).map("".join), st.data())
def test_streamed_and_whole_text_agree_for_any_cuts(answer: str, data: st.DataObject) -> None:
    tools = data.draw(st.sampled_from([None, (), (ToolDefinition("f"),), (ToolDefinition("python"),)]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=6)))
    pieces = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    whole = parse_tool_calls(answer, tools)
    assert outcome(ToolCallParser(tools), pieces) == whole
    assert outcome(ToolCallParser(tools), list(answer)) == whole
    if tools is not None:
        assert {found.name for found in whole[1]} <= {tool.name for tool in tools}


@settings(deadline=None)
@given(st.text(max_size=60))
def test_answers_without_calls_come_back_unchanged(answer: str) -> None:
    text, calls = parse_tool_calls(answer, ())
    assert calls == ()
    assert text == answer


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("aé\"'\\\n", max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(values)
def test_values_written_by_json_and_by_python_are_read_back(value: Any) -> None:
    assert literal(json.dumps(value), json=True) == value
    assert literal(json.dumps(value, ensure_ascii=False, indent=2), json=True) == value
    assert literal(repr(value), json=False) == value


def without_tuples(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [without_tuples(item) for item in value]
    if isinstance(value, dict):
        return {key: without_tuples(item) for key, item in value.items()}
    return value


@settings(max_examples=600, deadline=None)
@given(st.text("[]{}(),:'\"\\ntTrueNone01.-+eE_ ", max_size=25))
def test_whatever_is_read_as_a_literal_python_reads_alike(text: str) -> None:
    try:
        ours = literal(text, json=False)
    except NotACall:
        return
    try:
        theirs = ast.literal_eval(text.strip())
    except (SyntaxError, ValueError):
        return  # we also take JSON's words, line breaks inside quotes and missing items between brackets
    assert ours == without_tuples(theirs)


def test_text_arrives_as_soon_as_it_cannot_be_a_call() -> None:
    parser = ToolCallParser()
    assert parser.push("Hello there") == [TextDelta("Hello there")]
    assert parser.push(" [") == []
    assert parser.push("1") == [TextDelta(" [1")]
    assert parser.push("] `") == [TextDelta("]")]
    assert parser.push('x {"name": "B') == [TextDelta(" `x")]
    assert parser.push('ob", "ag') == []
    assert parser.push('e": 3}') == [TextDelta(' {"name": "Bob", "age": 3}')]
    assert parser.push(" [f(a=1") == []
    assert parser.push("), g()]") == [ToolCallReady(0, call(a=1)), ToolCallReady(1, G)]
    assert parser.finish() == []
    assert parser.finish() == []
    with pytest.raises(ValueError, match="after finish"):
        parser.push("x")


def test_only_tools_on_offer_become_calls() -> None:
    offer = [ToolDefinition("f")]
    assert parse_tool_calls("[f(a=1, b='x')]", offer) == ("", (F,))
    for answer in ("[f(a=1), g()]", "[g()]", JSON_G, f"<tool_call>{JSON_G}</tool_call>", "g.call(query='x')"):
        assert parse_tool_calls(answer, offer) == (answer, ())
    assert parse_tool_calls('{"name": "f"}', offer) == ("", (ToolCall("f", {}),))
    assert parse_tool_calls(f"{START}print(1){END}", offer) == ("print(1)", ())
    interpreter = [ToolDefinition("code_interpreter")]
    found = parse_tool_calls(f"{START}print(1){END}", interpreter)
    assert found == ("", (ToolCall("code_interpreter", {"code": "print(1)"}),))


def test_identifiers_given_by_the_model_are_kept() -> None:
    _, (found,) = parse_tool_calls('{"id": "c1", "name": "g", "arguments": {}}')
    assert found == ToolCall("g", {}, "c1")


def test_nesting_stops_at_the_limit() -> None:
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_tool_calls(f"[f(a={deepest})]")[1]
    too_deep = f"[f(a=[{deepest}])]"
    assert parse_tool_calls(too_deep) == (too_deep, ())


HOSTILE = {
    "open lists": lambda n: "[" * n,
    "open objects": lambda n: "{" * n,
    "open parentheses": lambda n: "[f(a=" + "(" * n,
    "calls in calls": lambda n: "[f(a=" * (n // 5),
    "open calls": lambda n: "[f(" * (n // 3),
    "unfinished string": lambda n: '[f(a="' + "x" * n,
    "backslashes": lambda n: '[f(a="' + "\\" * n,
    "quotes": lambda n: "[f(a=" + '"' * n,
    "triple quotes": lambda n: '[f(a="""' + '""x' * (n // 3),
    "empty strings": lambda n: "[f(a=[" + '"",' * (n // 3),
    "surrogates": lambda n: '[f(a="' + "\\ud83d" * (n // 6) + '")]',
    "digits": lambda n: "[f(a=" + "1" * n,
    "signs": lambda n: "[f(a=" + "-" * n,
    "long name": lambda n: "[" + "f" * n,
    "dotted name": lambda n: "[" + "f." * (n // 2),
    "many arguments": lambda n: "[f(" + "".join(f"a{i}=1," for i in range(n // 10)),
    "many keys": lambda n: '{"name": "f", "parameters": {' + "".join(f'"{i}":1,' for i in range(n // 12)),
    "many calls": lambda n: "[" + "f()," * (n // 4) + "]",
    "calls in a row": lambda n: "[f()]" * (n // 5),
    "separators after a call": lambda n: "[f()]" + ", " * (n // 2),
    "half keys": lambda n: '{"name":' * (n // 8),
    "nested functions": lambda n: '{"function":' * (n // 12),
    "half tags": lambda n: "<|python_star" * (n // 13),
    "open tool calls": lambda n: "<tool_call>" * (n // 11),
    "half closing tags": lambda n: f"<tool_call>{JSON_G}" + "</tool_cal" * (n // 10),
    "functions": lambda n: "<function=f>" * (n // 12),
    "regions": lambda n: START * (n // 16),
    "region ends": lambda n: START + "<|python_end" * (n // 12),
    "backquotes": lambda n: "`" * n,
    "fences": lambda n: "```json\n" * (n // 8),
    "half fences": lambda n: "`` " * (n // 3),
    "white space": lambda n: " \n" * (n // 2),
    "white space in a call": lambda n: "[f(" + " " * n,
    "words on lines": lambda n: "ab\n" * (n // 3),
    "builtin starts": lambda n: "x.call(\n" * (n // 8),
    "arguments in a string": lambda n: '{"name":"f","arguments":"' + '{\\"a\\":' * (n // 7) + '"}',
    "less than": lambda n: "<" * n,
    "prose": lambda n: "word " * (n // 5),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_work_is_linear_in_the_length_whole_and_streamed(name: str) -> None:
    assert len(HOSTILE) >= 30

    def steps(length: int, piece: int) -> int:
        answer = HOSTILE[name](length)
        parser = ToolCallParser()
        for start in range(0, len(answer), piece):
            parser.push(answer[start : start + piece])
        parser.finish()
        return parser.steps

    # Characters looked at: a measure of the work that does not depend on the machine.
    for piece in (10**9, 7):
        half, whole = steps(20_000, piece), steps(40_000, piece)
        assert whole <= 2.3 * half
        assert whole <= 7 * 40_000


@settings(deadline=None)
@given(st.sampled_from(sorted(HOSTILE)), st.integers(0, 300))
def test_hostile_answers_lose_no_text(name: str, length: int) -> None:
    answer = HOSTILE[name](length)
    text, calls = parse_tool_calls(answer, ())
    assert calls == ()
    for marker in (START, END):
        answer = answer.replace(marker, "")
    assert text == answer
