"""Schemas are measured without harm, answers judged in linear time, and every complaint names its place."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ayllu.engine.grammar_nodes import same_json
from ayllu.engine.json_schema import (
    MAX_ANSWER_CHARACTERS,
    ends_in_escape,
    measure,
    member,
    parse_json,
    resolve,
    unsupported_in_pattern,
    validate_json,
)
from ayllu.errors import GrammarError, RequestFailedError, UnsupportedError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=15,
)


@pytest.mark.parametrize(
    ("path", "key", "written"),
    [
        ("$", "properties", "$.properties"),
        ("$.a", 3, "$.a[3]"),
        ("$", "a b", '$["a b"]'),
        ("$", 'q"', '$["q\\""]'),
        ("$", "日本", '$["日本"]'),
        ("$", "$ref", "$.$ref"),
        ("$", "x" * 100, '$["' + "x" * 59 + '…"]'),
    ],
)
def test_paths(path: str, key: str | int, written: str) -> None:
    assert member(path, key) == written


@given(JSON)
def test_all_json_within_the_limits_passes(value: Any) -> None:
    measure(value)


def deep(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        (deep(200_000), "nested deeper than 100 levels"),
        ([0] * 200_000, "holds more than 100000 values"),
        ({"a": "x" * (1 << 21)}, "longer than 1048576 characters"),
        ({"x" * (1 << 21): 1}, "longer than 1048576 characters"),
        ({"a": [1, {"b": float("inf")}]}, "$.a[1].b: inf is no JSON number"),
        ({"a": b"bytes"}, "$.a: bytes is no JSON type"),
        ({"a": {5: 1}}, "$.a: the key 5 is no string"),
        ({"a": "\udc00"}, "$.a: the text holds a lone surrogate"),
    ],
)
def test_what_exceeds_a_limit_or_is_no_json_is_refused(schema: Any, says: str) -> None:
    with pytest.raises(GrammarError) as caught:
        measure(schema)
    assert says in caught.value.problem


def test_a_value_that_contains_itself_is_refused() -> None:
    ring: dict[str, Any] = {}
    ring["a"] = ring
    with pytest.raises(GrammarError, match="nested deeper"):
        measure(ring)


ROOT = {"$defs": {"a/b": {"~": [{"type": "null"}]}, "": True, "n": 5}, "items": [{}, False]}


@pytest.mark.parametrize(
    ("reference", "place"),
    [
        ("#", "$"),
        ("#/$defs/a~1b/~0/0", '$.$defs["a/b"]["~"][0]'),
        ("#/%24defs/a~1b/~0/0", '$.$defs["a/b"]["~"][0]'),
        ("#/$defs/", '$.$defs[""]'),
        ("#/items/1", "$.items[1]"),
    ],
)
def test_local_references_are_found(reference: str, place: str) -> None:
    assert resolve(ROOT, reference, "$").path == place


@pytest.mark.parametrize(
    ("reference", "error"),
    [
        ("#/none", GrammarError),
        ("#/items/2", GrammarError),
        ("#/items/-1", GrammarError),
        ("#/items/01", GrammarError),
        ("#/items/" + "9" * 5000, GrammarError),
        ("#/$defs/n", GrammarError),
        ("#/$defs/n/x", GrammarError),
        (7, GrammarError),
        ("#anchor", UnsupportedError),
        ("other.json", UnsupportedError),
        ("https://example.org/#", UnsupportedError),
        ("file:///etc/passwd", UnsupportedError),
        ("", UnsupportedError),
    ],
)
def test_other_references_are_refused(reference: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        resolve(ROOT, reference, "$.x")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("(?=a)", "look-around"),
        ("x(?<!a)", "look-around"),
        (r"\\(?!a)", "look-around"),
        (r"(a)\1", "a back-reference"),
        (r"(?<n>a)\k<n>", "a back-reference"),
        (r"\bx", "a word boundary"),
        (r"\Bx", "a word boundary"),
        (r"\(?=a", None),
        (r"[(?=a)]", None),
        (r"[\b]", None),
        (r"\\1", None),
        (r"(?<name>a)", None),
        (r"(?:a)", None),
        (r"\d\w\s\.\/", None),
        ("(" * 1000, None),
    ],
)
def test_what_no_linear_engine_matches_is_found(pattern: str, found: str | None) -> None:
    assert unsupported_in_pattern(pattern) == found


def test_unfinished_escapes_are_found() -> None:
    assert ends_in_escape("a\\")
    assert ends_in_escape("\\\\\\")
    assert not ends_in_escape("a\\\\")
    assert not ends_in_escape("")


@given(JSON)
def test_any_json_meets_the_empty_schema_and_comes_back(value: Any) -> None:
    text = json.dumps(value)
    try:
        text.encode()
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    assert validate_json({}, text) == value
    assert validate_json(True, text) == value


@pytest.mark.parametrize(
    ("schema", "text", "place"),
    [
        ({"items": {"type": "integer"}}, '[1, "x"]', "at $[1]: "),
        ({"properties": {"a b": {"maxLength": 1}}}, '{"a b": "xx"}', 'at $["a b"]: '),
        ({"required": ["a"]}, "{}", "at $: "),
        (False, "1", "at $: "),
    ],
)
def test_an_answer_that_breaks_its_schema_is_refused_with_the_place(
    schema: Any, text: str, place: str
) -> None:
    with pytest.raises(RequestFailedError) as caught:
        validate_json(schema, text)
    assert place in caught.value.problem


@pytest.mark.parametrize(
    "text",
    ["", "{", "no", "1 2", "NaN", "Infinity", "1e999", "-1e999", '"\ud800"', "9" * 5000, "[" * 99_999],
)
def test_an_answer_that_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(RequestFailedError, match="is not JSON"):
        validate_json({}, text)


def test_an_escaped_surrogate_is_no_text() -> None:
    with pytest.raises(RequestFailedError):
        validate_json({"type": "string"}, '"\\ud800"')


def test_a_long_answer_is_refused_unread() -> None:
    with pytest.raises(RequestFailedError, match="characters"):
        parse_json(" " * (MAX_ANSWER_CHARACTERS + 1))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nothing"},
        {"pattern": "["},
        {"pattern": "(?=a)"},
        {"pattern": "((a{1,100}){1,100}){1,100}"},
        {"$schema": "https://example.org/own"},
        {"$ref": "http://127.0.0.1:9/x"},
        {"$ref": "file:///etc/hostname"},
        {"$ref": "#/none"},
        {"minLength": "3"},
    ],
)
def test_a_schema_that_is_wrong_is_the_users_mistake(schema: Any) -> None:
    with pytest.raises(GrammarError):
        validate_json(schema, "1")


def test_nothing_is_fetched() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        for word in ("$ref", "$schema", "$dynamicRef"):
            with pytest.raises(GrammarError):
                validate_json({word: f"http://127.0.0.1:{server.getsockname()[1]}/x"}, "1")
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"items": [{"type": "null"}], "additionalItems": False}, "[null]", "[1]"),
        ({"maximum": 5, "exclusiveMaximum": True}, "4", "5"),
        ({"prefixItems": [{"type": "null"}]}, "[null]", "[1]"),
        (
            {"$schema": "http://json-schema.org/draft-07/schema#", "items": [{"type": "null"}]},
            "[null]",
            "[1]",
        ),
    ],
)
def test_older_drafts_are_read_by_their_words(schema: Any, right: str, wrong: str) -> None:
    validate_json(schema, right)
    with pytest.raises(RequestFailedError):
        validate_json(schema, wrong)


@pytest.mark.parametrize(
    ("pattern", "repeated"),
    [("^(a+)+$", "a"), ("^(a|a)*$", "a"), ("^(.*a){12}$", "a"), ("(x+x+)+y", "x"), ("^([a-z]+)*$", "ab")],
)
def test_no_pattern_takes_long(pattern: str, repeated: str) -> None:
    """A backtracking engine would need longer than the age of the universe for each of these."""
    with pytest.raises(RequestFailedError):
        validate_json({"pattern": pattern}, json.dumps(repeated * 100_000 + "!"))


@given(JSON, JSON)
def test_equality_of_values_is_that_of_json(one: Any, other: Any) -> None:
    assert same_json(one, one)
    assert same_json(one, other) == same_json(other, one)
    if same_json(one, other):
        assert one == other


def test_equality_tells_numbers_from_words() -> None:
    assert same_json([1, {"a": 2.0}], [1.0, {"a": 2}])
    assert not same_json(1, True)
    assert not same_json(0, False)
    assert not same_json([1], [1, 1])
    assert not same_json({"a": 1}, {"b": 1})
    assert not same_json("1", 1)
    assert not same_json(None, False)
