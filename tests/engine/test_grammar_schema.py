"""Schemas into grammars: every answer meets the schema, and what cannot be kept is refused by its path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from ayllu.chat.tokenizer import Tokenizer
from ayllu.engine.grammar import GrammarCompiler, grammar_of
from ayllu.engine.grammar_recursion import MAX_LEVELS
from ayllu.engine.json_schema import validate_json
from ayllu.engine.model_files import tokenizer_for
from ayllu.engine.requests import JsonStructure
from ayllu.errors import AylluError, GrammarError, UnsupportedError
from ayllu.weights.checkpoint import open_checkpoint
from tests.engine.grammar_corpus import random_answer, random_schema


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf: Path) -> Tokenizer:
    return tokenizer_for(open_checkpoint(smollm2_gguf))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.stop_ids)


def written(compiler: GrammarCompiler, tokenizer: Tokenizer, schema: Any, seed: int) -> str:
    """An answer that ends, drawn at random."""
    spec = grammar_of(JsonStructure(schema))
    for attempt in range(20):
        tokens = random_answer(compiler.compiled(spec)[0], tokenizer, seed * 100 + attempt)
        if tokens is not None:
            return tokenizer.decode(tokens)
    raise AssertionError(f"no answer ends: {json.dumps(schema)}")


def follows(compiler: GrammarCompiler, tokenizer: Tokenizer, schema: Any, text: str) -> bool:
    """Whether the grammar of `schema` allows exactly `text`."""
    grammar = compiler.compiled(grammar_of(JsonStructure(schema)))[0]
    for token in tokenizer.encode(text):
        if not grammar.allows(token):
            return False
        grammar.accept(token)
    return grammar.is_complete


@pytest.mark.parametrize("start", range(0, 200, 20))
def test_random_answers_meet_their_random_schemas(
    compiler: GrammarCompiler, tokenizer: Tokenizer, start: int
) -> None:
    for seed in range(start, start + 20):
        schema = random_schema(seed)
        for attempt in range(2):
            text = written(compiler, tokenizer, schema, 2 * seed + attempt)
            assert validate_json(schema, text) == json.loads(text)


FORMATS = {
    "date-time": ("2026-11-24T23:59:59Z", "2026-11-24"),
    "time": ("12:00:00+01:00", "25:00:00Z"),
    "date": ("2024-02-29", "2024-13-01"),
    "duration": ("P1DT2H", "1 day"),
    "email": ("a.b@example.org", "a.b.example.org"),
    "hostname": ("a-1.example", "-a"),
    "ipv4": ("192.168.0.1", "256.1.1.1"),
    "ipv6": ("::1", "1:2"),
    "uuid": ("123e4567-e89b-12d3-a456-426614174000", "123e4567"),
    "uri": ("https://example.org/a?b#c", "no uri"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_kept(compiler: GrammarCompiler, tokenizer: Tokenizer, name: str) -> None:
    schema = {"type": "string", "format": name}
    right, wrong = FORMATS[name]
    assert follows(compiler, tokenizer, schema, json.dumps(right))
    assert not follows(compiler, tokenizer, schema, json.dumps(wrong))
    assert jsonschema_rs.is_valid(schema, right, validate_formats=True)


def test_no_format_goes_on_for_ever(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    """A small model wrote ones behind the seconds of a time until it was stopped."""
    for schema in ({"type": "string", "format": "time"}, {"allOf": [{"format": "time"}, {"type": "string"}]}):
        assert follows(compiler, tokenizer, schema, '"12:00:00.123456789+01:00"')
        assert not follows(compiler, tokenizer, schema, '"12:00:00.1234567891+01:00"')
    for name in FORMATS:
        spec = grammar_of(JsonStructure({"type": "string", "format": name}))
        for seed in range(3):
            assert random_answer(compiler.compiled(spec)[0], tokenizer, seed, tokens=2100) is not None


SEPARATED = '{"a": [1, 2], "b": {}}'
LIST_AND_OBJECT = {
    "type": "object",
    "properties": {"a": {"type": "array", "items": {"type": "integer"}}, "b": {"type": "object"}},
}


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        (SEPARATED, True),
        (SEPARATED.replace(" ", ""), True),
        (SEPARATED.replace(" ", "  "), False),
        (SEPARATED.replace(" ", "\n"), False),
        (" " + SEPARATED, False),
        (SEPARATED + "\n", False),
        ('{ "a": []}', False),
    ],
)
def test_white_space_is_one_space_at_most(
    compiler: GrammarCompiler, tokenizer: Tokenizer, text: str, allowed: bool
) -> None:
    assert follows(compiler, tokenizer, LIST_AND_OBJECT, text) is allowed


@pytest.mark.parametrize(
    ("schema", "text", "allowed"),
    [
        ({"type": "number"}, "-1.5e-30", True),
        ({"type": "number"}, "1e999", False),
        ({"type": "number"}, "0." + "3" * 17, False),
        ({"type": "number"}, "01", False),
        ({"type": "integer"}, "9223372036854775807", True),
        ({"type": "integer"}, "9" * 20, False),
        ({"type": "integer"}, "1.0", False),
        ({"type": "number", "minimum": 0}, "6.02e23", True),
        ({"type": "number", "minimum": 0}, "-1", False),
        ({"type": "number", "exclusiveMinimum": 0}, "1.6e-19", True),
        ({"type": "number", "exclusiveMinimum": 0}, "0.000e5", False),
        ({"type": "number", "minimum": 0, "maximum": 1}, "0.125", True),
        ({"type": "number", "minimum": 0, "maximum": 1}, "1.5", False),
        ({"type": "number", "minimum": 0, "maximum": 1}, "0." + "1" * 10, False),
        ({"type": "number", "maximum": 5, "exclusiveMaximum": True}, "5", False),
        ({"type": "number", "maximum": 5, "exclusiveMaximum": True}, "4.5", True),
        ({"type": "integer", "minimum": -3, "maximum": 12}, "-3", True),
        ({"type": "integer", "minimum": -3, "maximum": 12}, "13", False),
        ({"type": "integer", "multipleOf": 7}, "21", True),
        ({"type": "integer", "multipleOf": 7}, "22", False),
        ({"type": "number", "minimum": 1e-9, "maximum": 2e-9}, "0.0000000015", True),
        ({"type": "number", "minimum": 10**15}, str(10**15), True),
        ({"type": "number", "minimum": -1e300, "maximum": 1e300}, "5", True),
        ({"type": "integer", "minimum": -(10**30), "maximum": 5}, "-9007199254740991", True),
    ],
)
def test_numbers_stay_short_and_finite_and_within_bounds(
    compiler: GrammarCompiler, tokenizer: Tokenizer, schema: Any, text: str, allowed: bool
) -> None:
    assert follows(compiler, tokenizer, schema, text) is allowed


OPTIONAL = {"properties": {"a": {"type": "null"}, "b": {"type": "null"}, "c": {"type": "null"}}}


@pytest.mark.parametrize("required", [[], ["a"], ["b"], ["c"], ["a", "b"], ["a", "c"], ["b", "c"]])
def test_every_choice_of_optional_properties_can_be_written(
    compiler: GrammarCompiler, tokenizer: Tokenizer, required: list[str]
) -> None:
    for bits in range(8):
        present = [name for place, name in enumerate("abc") if bits >> place & 1]
        text = json.dumps(dict.fromkeys(present))
        allowed = set(required) <= set(present)
        assert follows(compiler, tokenizer, {**OPTIONAL, "required": required}, text) is allowed, text


@pytest.mark.parametrize("count", [7, 8, 9, 20])
def test_objects_of_more_properties_than_one_rule_lists(
    compiler: GrammarCompiler, tokenizer: Tokenizer, count: int
) -> None:
    schema = {"properties": {f"p{n}": {"type": "null"} for n in range(count)}}
    for present in (range(count), range(0, count, 3), [count - 1], [0, count - 1], []):
        text = json.dumps({f"p{n}": None for n in present})
        assert follows(compiler, tokenizer, schema, text), text


@pytest.mark.parametrize(
    ("schema", "text", "allowed"),
    [
        # What may be written is never more than the schema allows, and no more than it names.
        ({"properties": {"a": {"type": "null"}}}, '{"b": 1}', False),
        ({"properties": {"a": {"type": "null"}}, "additionalProperties": True}, '{"b": 1}', True),
        ({"properties": {"a": {"type": "null"}}, "additionalProperties": True}, '{"a": 1}', False),
        ({"type": "object"}, '{"b": {"c": [1, "x", null]}}', True),
        ({"properties": {"a": {"type": "null"}}, "required": ["z"]}, '{"z": 3}', True),
        ({"properties": {"a": {"type": "null"}}, "minProperties": 1}, "{}", False),
        ({"type": "object", "minProperties": 1}, "{}", False),
        ({"type": "object", "maxProperties": 1}, '{"a": 1, "b": 2}', False),
        ({"type": "object", "maxProperties": 0}, "{}", True),
        ({"type": "object", "propertyNames": {"pattern": "^a+$"}}, '{"aa": 1}', True),
        ({"type": "object", "propertyNames": {"pattern": "^a+$"}}, '{"b": 1}', False),
        ({"type": "object", "propertyNames": {"enum": ["x"]}}, '{"x": 1}', True),
        ({"properties": {"a": {"$ref": "#"}, "b": {"type": "null"}}}, '{"a": {"a": {"b": null}}}', True),
        ({"items": [{"type": "null"}, {"type": "boolean"}]}, "[null, true]", True),
        ({"items": [{"type": "null"}], "additionalItems": {"type": "integer"}}, "[null, 1, 2]", True),
        ({"prefixItems": [{"type": "null"}]}, "[]", False),
        ({"prefixItems": [{"type": "null"}], "maxItems": 0}, "[]", True),
        ({"type": "array", "maxItems": 0}, "[]", True),
        ({"type": "array", "items": False}, "[]", True),
        ({"type": "array", "items": {"type": "null"}, "minItems": 2}, "[null]", False),
        ({"type": ["null", "boolean"]}, "true", True),
        ({"type": "string", "enum": ["a", 1]}, "1", False),
        ({"enum": [1, "1"], "const": 1.0}, "1", True),
        ({"enum": [[], {}, [1, {"a": None}]]}, '[1, {"a": null}]', True),
        ({"enum": [[], {}, [1, {"a": None}]]}, '[1, {"a": null}, 2]', False),
        ({"enum": [[], {}, [1, {"a": None}]]}, "{}", True),
        ({"anyOf": [{"const": {"k": "a"}}, {"properties": {"k": {"const": "b"}}}]}, '{"k": "b"}', True),
        ({"anyOf": [{"const": {"k": "a"}}, {"properties": {"k": {"const": "b"}}}]}, '{"k": "a"}', True),
        ({"anyOf": [{"const": [1, 2]}, {"items": {"enum": [1, 3]}}]}, "[1, 3]", True),
        ({"const": "日本"}, '"日本"', True),
        ({"type": "string"}, '"tab\\t"', True),
        ({"type": "string"}, '"\\u0041"', False),
        ({"type": "string"}, '"\t"', False),
        ({"not": {}, "type": "null"}, "null", False),
        ({"anyOf": [False, {"type": "null"}]}, "null", True),
        ({"allOf": [{"type": "null"}]}, "null", True),
        ({"type": "string", "anyOf": [{"const": "a"}, {"minLength": 2, "maxLength": 3}]}, '"bb"', True),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "null"}}}, "null", True),
        ({"$ref": "#/$defs/a~1b%25", "$defs": {"a/b%": {"type": "null"}}}, "null", True),
        ({"definitions": {"a": {"type": "null"}}, "items": {"$ref": "#/definitions/a"}}, "[null]", True),
        ({"type": "string", "format": "int32", "x-unknown": 5, "maxLength": 3}, '"abc"', True),
        ({"patternProperties": {"^n_": {"type": "integer"}}}, '{"n_a": 1}', True),
        ({"patternProperties": {"^n_": {"type": "integer"}}}, '{"m": 1}', False),
    ],
)  # fmt: skip
def test_what_schemas_mean(
    compiler: GrammarCompiler, tokenizer: Tokenizer, schema: Any, text: str, allowed: bool
) -> None:
    if schema == {"not": {}, "type": "null"}:
        with pytest.raises(GrammarError):
            grammar_of(JsonStructure(schema))
        return
    assert follows(compiler, tokenizer, schema, text) is allowed
    if allowed:
        validate_json(schema, text)


NODE = {"type": "object", "properties": {"v": {"type": "null"}, "next": {"$ref": "#/$defs/n"}}}
ONE_OF = {
    "type": "object",
    "properties": {"next": {"oneOf": [{"$ref": "#/$defs/n"}, {"const": 5}]}},
    "required": ["next"],
}
EITHER = {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}


def nested(levels: int, end: str) -> str:
    return '{"next": ' * levels + end + "}" * levels


@pytest.mark.parametrize(
    ("definition", "end"),
    [
        (NODE, "{}"),
        ({**NODE, "properties": {"next": EITHER}, "required": ["next"]}, '{"next": null}'),
        ({"properties": {"next": {"$ref": "#/$defs/m"}}}, "{}"),
        (ONE_OF, '{"next": 5}'),
    ],
)  # fmt: skip
def test_what_describes_itself_nests_so_deep_and_no_deeper(
    compiler: GrammarCompiler, tokenizer: Tokenizer, definition: Any, end: str
) -> None:
    """A small model that may nest for ever did: {"v": null, "next": {"v": null, ... until it was stopped."""
    schema = {"$ref": "#/$defs/n", "$defs": {"n": definition, "m": {"$ref": "#/$defs/n"}}}
    deepest = MAX_LEVELS - 1
    assert follows(compiler, tokenizer, schema, nested(deepest, end))
    assert not follows(compiler, tokenizer, schema, nested(deepest + 1, end))
    validate_json(schema, nested(deepest, end))


def test_any_value_nests_so_deep_and_no_deeper(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    assert follows(compiler, tokenizer, {}, "[" * 16 + "]" * 16)
    assert not follows(compiler, tokenizer, {}, "[" * 17 + "]" * 17)
    assert follows(compiler, tokenizer, {"type": "object"}, nested(16, "[]"))


def test_definitions_that_do_not_describe_themselves_nest_without_limit(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    levels = 3 * MAX_LEVELS
    chain: dict[str, Any] = {
        f"d{n}": {"properties": {"next": {"$ref": f"#/$defs/d{n + 1}"}}} for n in range(levels)
    }
    schema = {"$ref": "#/$defs/d0", "$defs": {**chain, f"d{levels}": {"const": 1}}}
    assert follows(compiler, tokenizer, schema, nested(levels, "1"))


def test_a_large_description_of_itself_nests_without_limit(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    many = {f"p{n}": {"type": "null"} for n in range(400)}
    schema = {"$ref": "#/$defs/n", "$defs": {"n": {"properties": {"next": {"$ref": "#/$defs/n"}, **many}}}}
    assert follows(compiler, tokenizer, schema, nested(2 * MAX_LEVELS, "{}"))


def test_a_value_that_needs_more_levels_than_there_are_is_written_all_the_same(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    """Definitions that lead on to each other and back, of which the smallest value is deep already."""
    levels = MAX_LEVELS + 8
    chain: dict[str, Any] = {
        f"d{n}": {
            "properties": {"next": {"$ref": f"#/$defs/d{n + 1}"}, "back": {"$ref": "#/$defs/d0"}},
            "required": ["next"],
        }
        for n in range(levels)
    }
    schema = {"$ref": "#/$defs/d0", "$defs": {**chain, f"d{levels}": {"const": 1}}}
    assert follows(compiler, tokenizer, schema, nested(levels, "1"))


def test_references_in_combined_schemas_keep_their_meaning(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    schema = {
        "$defs": {
            "named": {
                "type": "object",
                "properties": {"name": {"$ref": "#/$defs/text"}},
                "required": ["name"],
            },
            "text": {"type": "string", "maxLength": 3},
        },
        "allOf": [{"$ref": "#/$defs/named"}, {"properties": {"n": {"type": "number"}}, "required": ["n"]}],
    }
    assert follows(compiler, tokenizer, schema, '{"name":"abc","n":1.5}')
    assert not follows(compiler, tokenizer, schema, '{"name":"abcd","n":1.5}')
    assert not follows(compiler, tokenizer, schema, '{"name":"abc"}')
    assert not follows(compiler, tokenizer, schema, '{"name":"abc","n":1e999}')


ONE_KIND = {"type": "object", "properties": {"kind": {"const": "a"}}, "required": ["kind"]}
REQUIRES_B = {"type": "object", "properties": {"b": {}}, "required": ["b"]}
OTHER_KIND = {"type": "object", "properties": {"kind": {"enum": ["b", "c"]}}, "required": ["kind"]}


@pytest.mark.parametrize(
    ("options", "apart"),
    [
        ([ONE_KIND, OTHER_KIND], True),
        ([ONE_KIND, ONE_KIND], False),
        ([{"type": "string"}, {"type": "null"}, {"type": "integer"}], True),
        ([{"type": "integer"}, {"type": "number"}], False),
        ([{"const": 1}, {"const": 1.0}], False),
        ([{"const": 1}, {"const": True}], True),
        ([{"type": "integer", "maximum": 3}, {"type": "integer", "minimum": 4}], True),
        ([{"type": "integer", "maximum": 4}, {"type": "integer", "minimum": 4}], False),
        ([{"properties": {"a": {"type": "null"}}, "required": ["a"]},
          {"properties": {"b": {"type": "null"}}, "required": ["b"]}], True),
        ([{"properties": {"a": {"type": "null"}}},
          {"properties": {"b": {"type": "null"}}, "required": ["b"]}], False),
        ([{"type": "string", "maxLength": 3}, {"type": "string", "minLength": 4}], False),
        ([{"$ref": "#/$defs/one"}, {"$ref": "#/$defs/other"}], True),
        ([{}, {"type": "null"}], False),
        # A schema without a type allows all values of other types, though none is written for it.
        ([{"properties": {"a": {}}}, {"const": 5}], False),
        ([{"type": "object", "properties": {"a": {}}}, {"const": 5}], True),
        ([{"minimum": 5, "maximum": 3}, {"type": "string"}], False),
        ([{"maxLength": 5}, {"type": "null"}], False),
        ([{"items": {}}, {"type": "null"}], False),
    ],
)  # fmt: skip
def test_one_of_is_taken_where_no_answer_can_meet_two(options: list[Any], apart: bool) -> None:
    schema = {"$defs": {"one": ONE_KIND, "other": OTHER_KIND}, "properties": {"x": {"oneOf": options}}}
    if apart:
        grammar_of(JsonStructure(schema))
        return
    with pytest.raises(UnsupportedError) as caught:
        grammar_of(JsonStructure(schema))
    assert caught.value.problem.startswith("$.properties.x.oneOf: ")


@pytest.mark.parametrize(
    ("options", "apart"),
    [
        ([ONE_KIND, OTHER_KIND], True),
        ([{"type": "string"}, {"type": "null"}], True),
        ([{"required": ["a"]}, {"required": ["b"]}], False),
        ([{"type": "object", "properties": {"a": {}}, "required": ["a"]},
          {"type": "object", "properties": {"b": {}}, "required": ["b"]}], False),
        ([{**ONE_KIND, "additionalProperties": False}, {**REQUIRES_B, "additionalProperties": False}], True),
        ([{"properties": ONE_KIND["properties"], "required": ["kind"]},
          {"properties": OTHER_KIND["properties"], "required": ["kind"]}], False),
        ([{"maximum": 5}, {"minimum": 6}], False),
        ([{"minimum": 5}, {"type": "string"}], False),
        ([{"minimum": 5, "maximum": 3}, {"type": "string"}], False),
    ],
)  # fmt: skip
def test_one_of_in_a_combined_schema_counts_what_the_library_may_write(
    options: list[Any], apart: bool
) -> None:
    """The library writes properties that no schema names: an answer of one could become one of the other."""
    schema = {"title": "x", "oneOf": options, "allOf": [{}, {}]}
    if apart:
        grammar_of(JsonStructure(schema))
        return
    with pytest.raises(UnsupportedError, match=r"\$\.oneOf: "):
        grammar_of(JsonStructure(schema))


UNSUPPORTED = {
    "uniqueItems": True,
    "contains": {},
    "if": {},
    "then": {},
    "else": {},
    "dependentRequired": {"a": ["b"]},
    "dependentSchemas": {},
    "dependencies": {},
    "not": {"type": "null"},
    "$dynamicRef": "#a",
    "$anchor": "a",
    "$id": "https://example.org/x",
    "format": "idn-email",
    "pattern": r"(a)\1",
    "minProperties": 3,
    "minimum": 1e18,
}


@pytest.mark.parametrize("word", UNSUPPORTED)
@pytest.mark.parametrize(
    ("place", "path"),
    [
        (lambda inner: {"properties": {"a": inner}}, "$.properties.a"),
        (lambda inner: {"items": {"anyOf": [{}, inner]}}, "$.items.anyOf[1]"),
        (lambda inner: {"allOf": [{"properties": {"b c": inner}}, {}]}, '$.allOf[0].properties["b c"]'),
        (lambda inner: {"$ref": "#/$defs/x", "$defs": {"x": inner}}, "$.$defs.x"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_its_path(word: str, place: Any, path: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        grammar_of(JsonStructure(place({word: UNSUPPORTED[word]})))
    assert caught.value.problem.startswith(f"{path}.{word}: ")
    assert caught.value.fix


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        (
            {"properties": {"a": {"type": "intger"}}},
            "$.properties.a.type: there is no type 'intger'. Did you mean",
        ),
        ({"properties": {"a": 5}}, "$.properties.a: a schema must be"),
        ({"minLength": -1}, "$.minLength must be a whole number"),
        ({"minLength": True}, "$.minLength must be a whole number"),
        ({"items": {"required": "a"}}, "$.items.required must be a list"),
        ({"enum": "a"}, "$.enum must be a list"),
        ({"anyOf": []}, "$.anyOf must be a list"),
        ({"multipleOf": 0}, "$.multipleOf must be above 0"),
        ({"minimum": "0"}, "$.minimum must be a number"),
        ({"type": []}, "$.type names no type"),
        ({"patternProperties": {"\\": {}}}, "$.patternProperties ends in the middle"),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}}, "$.properties.a.$ref: '#/$defs/b' names nothing"),
        ({"$ref": 5}, "$.$ref: a reference must be a string"),
        ({"properties": {"a": {"enum": []}}, "required": ["a"]}, "$: no finite value"),
        ({"properties": {"\ud800": {}}}, "$.properties: the text holds a lone surrogate"),
        ({"a": {1: 2}}, "$.a: the key 1 is no string"),
        ({"a": {1, 2}}, "$.a: set is no JSON type"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(schema: Any, place: str) -> None:
    with pytest.raises(GrammarError) as caught:
        grammar_of(JsonStructure(schema))
    assert caught.value.problem.startswith(place)


def test_an_error_of_the_library_names_the_place_in_the_schema(compiler: GrammarCompiler) -> None:
    schema = {"properties": {"list": {"items": {"type": "string", "pattern": "a("}}}}
    with pytest.raises(GrammarError) as caught:
        compiler.compiled(grammar_of(JsonStructure(schema)))
    assert caught.value.problem.startswith("$.properties.list.items ")


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"const": "a\0b"}, "a\0b"),
        ({"enum": ["x", "a\x01b"]}, "a\x01b"),
        ({"type": "string", "pattern": "^a\\x01b$"}, "a\x01b"),
        ({"type": "string", "allOf": [{"enum": ["a\x01b"]}, {}]}, "a\x01b"),
        ({"properties": {"a\x01": {"const": 1}}, "required": ["a\x01"]}, {"a\x01": 1}),
    ],
)
def test_control_characters_that_a_schema_asks_for_are_written(
    compiler: GrammarCompiler, tokenizer: Tokenizer, schema: Any, text: Any
) -> None:
    """Without \\u escapes the library left them out: "ab" for the constant "a\\0b"."""
    assert follows(compiler, tokenizer, schema, json.dumps(text))
    shorter = json.dumps(text).replace("\\u0000", "").replace("\\u0001", "")
    assert not follows(compiler, tokenizer, schema, shorter)


def test_options_of_the_grammar_library_in_a_schema_mean_nothing(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    """A schema's own x-guidance could have brought back white space without end."""
    for schema in (LIST_AND_OBJECT, {"allOf": [LIST_AND_OBJECT, {}]}):
        loose = {**schema, "x-guidance": {"whitespace_flexible": True}}
        assert not follows(compiler, tokenizer, loose, '{"a":   []}')


@pytest.mark.parametrize("seed", range(300))
def test_a_schema_with_one_part_broken_is_refused_or_compiles(compiler: GrammarCompiler, seed: int) -> None:
    import random

    draws = random.Random(seed)
    schema = random_schema(seed)
    waiting: list[Any] = [schema]
    places: list[tuple[Any, Any]] = []
    while waiting:
        value = waiting.pop()
        items = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        places += [(value, key) for key, _ in items]
        waiting += [item for _, item in items]
    owner, key = draws.choice(places)
    owner[key] = draws.choice([None, 5, "x", [], {}, -1, 1e300, True, ["a"], {"a": 1}, "(", "\0"])
    try:
        compiler.compiled(grammar_of(JsonStructure(schema)))
    except AylluError as error:
        assert isinstance(error, GrammarError | UnsupportedError)
        assert error.fix
