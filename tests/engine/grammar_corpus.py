"""Grammars to test with: hostile ones (row T13 of the bar), random schemas, random ways through a grammar.

`random_schema` bounds every string and list, so that even a small model comes to an end.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ayllu.chat.tokenizer import Tokenizer
from ayllu.engine.grammar import TokenGrammar
from ayllu.engine.requests import (
    ChoiceStructure,
    GrammarStructure,
    JsonStructure,
    RegexStructure,
    Structure,
)
from ayllu.errors import AylluError, GrammarError, UnsupportedError

Outcome = type[AylluError] | None


@dataclass(frozen=True)
class Hostile:
    """A grammar somebody could send. expected: the error, None for one that compiles, and both where the
    machine decides (it takes about as long as is allowed)."""

    name: str
    structure: Structure
    expected: tuple[Outcome, ...]


def nested_objects(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def nested_lists(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def doubling(levels: int) -> dict[str, Any]:
    """A small schema whose smallest value has 2**levels parts."""
    pair = {
        f"d{n}": {
            "type": "object",
            "properties": {k: {"$ref": f"#/$defs/d{n + 1}"} for k in "ab"},
            "required": ["a", "b"],
        }
        for n in range(levels)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**pair, f"d{levels}": {"type": "null"}}}


def _json(name: str, schema: Any, *expected: Outcome) -> Hostile:
    return Hostile(name, JsonStructure(schema), expected or (None,))


def _regex(name: str, pattern: str, *expected: Outcome) -> Hostile:
    return Hostile(name, RegexStructure(pattern), expected or (None,))


def _lark(name: str, source: str, *expected: Outcome) -> Hostile:
    return Hostile(name, GrammarStructure(source), expected or (None,))


def _ebnf(name: str, source: str, *expected: Outcome) -> Hostile:
    return Hostile(name, GrammarStructure(source, "ebnf"), expected or (None,))


WRONG, CANNOT = GrammarError, UnsupportedError
WORDS = "|".join(f"word{n}" for n in range(1400))

HOSTILE: Sequence[Hostile] = (
    # Patterns that make backtracking engines hang.
    _regex("nested quantifiers", "(a+)+$"),
    _regex("two ways through", "(x+x+)+y"),
    _regex("alternatives that overlap", "((a|b|ab)*c?){50}"),
    _regex("many states", "[ab]*a[ab]{500}"),
    _regex("many states, any character", "(?s:.*)a(?s:.){400}"),
    _regex("10 KB of alternatives", WORDS),
    _regex("a count of 100,000", "a{0,100000}"),
    _regex("counts of counts", "((a{0,100}){0,100}){0,100}", WRONG, None),
    _regex("counts beyond any number", "a{99999999999}", WRONG),
    _regex("nested groups", "(" * 2000 + "a" + ")" * 2000, WRONG),
    _regex("unicode classes", r"\p{L}+\p{N}*[^\p{Latin}]"),
    _regex("all of unicode but one", "[^a]{0,1000}"),
    _regex("NUL", "a\0b"),
    _regex("look-ahead", "(?=a)a", CANNOT),
    _regex("negative look-behind", "(?<!a)b", CANNOT),
    _regex("back-reference", r"(a)\1", CANNOT),
    _regex("word boundary", r"\bword\b", CANNOT),
    _regex("malformed class", "[a", WRONG),
    _regex("malformed group", "(a", WRONG),
    _regex("malformed escape", "\\", WRONG),
    _regex("malformed repetition", "*a", WRONG),
    _regex("lone surrogate", "a\ud800", WRONG),
    _regex("empty class", "[^\\x{0}-\\x{10ffff}]", WRONG),
    # Schemas.
    _json("10 KB of alternatives in a schema", {"type": "string", "pattern": WORDS}),
    _json("count in a schema", {"type": "string", "pattern": "^(a|b){0,100000}c$"}),
    _json("pattern of nested quantifiers", {"type": "string", "pattern": "(a+)+$"}),
    _json("malformed pattern", {"type": "string", "pattern": "["}, WRONG),
    _json("pattern of no string", {"type": "string", "pattern": 5}, WRONG),
    _json("malformed type", {"type": "sting"}, WRONG),
    _json("type of a number", {"type": 7}, WRONG),
    _json("properties of a list", {"properties": []}, WRONG),
    _json("a schema of a string", {"items": "string"}, WRONG),
    _json("look-ahead in a schema", {"pattern": "^(?!a)"}, CANNOT),
    _json("reference to itself", {"$ref": "#"}, WRONG),
    _json(
        "a ring of references",
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        WRONG,
    ),
    _json(
        "a ring through anyOf",
        {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}, "$ref": "#/$defs/a"},
        WRONG,
    ),
    _json(
        "a ring with siblings",
        {"$defs": {"a": {"$ref": "#/$defs/a", "type": "object"}}, "$ref": "#/$defs/a"},
        WRONG,
    ),
    _json(
        "a value without end",
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        WRONG,
    ),
    _json("a value of 2**60 parts", doubling(60)),
    _json("reference to nothing", {"$ref": "#/$defs/none"}, WRONG),
    _json("reference to an address", {"$ref": "http://127.0.0.1:9/x.json"}, CANNOT),
    _json("reference to a file", {"$ref": "file:///etc/passwd"}, CANNOT),
    _json("depth 500", nested_objects(500), WRONG),
    _json("depth 100,000", nested_lists(100_000), WRONG),
    _json("depth 45", nested_objects(45)),
    _json("10,000 values", {"enum": [f"value number {n}" for n in range(10_000)]}),
    _json("10,000 numbers", {"enum": list(range(10_000))}),
    _json("10,001 values", {"enum": list(range(10_001))}, WRONG),
    _json("3,000 objects", {"anyOf": [nested_objects(1) for _ in range(3000)]}),
    _json(
        "3,000 different objects",
        {"anyOf": [{"type": "object", "properties": {f"k{n}": {}}} for n in range(3000)]},
        WRONG,
    ),
    _json("10,000 properties", {"properties": {f"k{n}": {"type": "null"} for n in range(10_000)}}, WRONG),
    _json("45,000 properties", {"properties": {f"k{n}": {} for n in range(45_000)}}, WRONG),
    _json("300 combinations of 10,000 definitions", {
        "anyOf": [{"allOf": [{"$ref": "#/$defs/d0"}, {}]} for _ in range(300)],
        "$defs": {f"d{n}": {"items": {"$ref": f"#/$defs/d{n + 1}"}} for n in range(10_000)} | {"d10000": {}},
    }, WRONG),
    _json("a chain of 15,000 definitions", {
        "$ref": "#/$defs/d0",
        "$defs": {f"d{n}": {"items": {"$ref": f"#/$defs/d{n + 1}"}} for n in range(15_000)} | {"d15000": {}},
    }, WRONG, None),
    _json("2,000 leaves", {"properties": {f"k{n}": {"maxLength": n + 1} for n in range(2000)}}, WRONG),
    _json("a list of 100,000", {"type": "array", "items": {}, "minItems": 100_000, "maxItems": 100_000}),
    _json("a string of a million", {"type": "string", "maxLength": 1_000_000}),
    _json("a long constant", {"const": "x" * 500_000}, None, WRONG),
    _json("1 MiB of text", {"const": "x" * (1 << 20)}, WRONG),
    _json("100,001 values", {"examples": [0] * 100_001}, WRONG),
    _json("multiples of a prime", {"type": "integer", "multipleOf": 999_983}, WRONG, None),
    _json("a number too large", {"type": "number", "maximum": 10**400}, WRONG),
    _json("not a number", {"type": "number", "minimum": float("nan")}, WRONG),
    _json("1e999", {"const": float("inf")}, WRONG),
    _json("NUL in a constant", {"const": "a\0b"}),
    _json("NUL in a name", {"properties": {"a\0b": {"type": "null"}}, "required": ["a\0b"]}),
    _json("lone surrogate in a schema", {"const": "\ud800"}, WRONG),
    _json("no JSON", {"const": object()}, WRONG),
    _json("no value at all", False, WRONG),
    _json("a contradiction", {"type": "integer", "minimum": 2, "maximum": 1}, WRONG),
    _json("6 times 12 alternatives", {
        "allOf": [{"anyOf": [{"properties": {f"a{i}_{j}": {}}} for j in range(12)]} for i in range(6)]
    }, WRONG),
    # Grammars.
    _lark("not closed", "start: (", WRONG),
    _lark("no start", "a: /x/", WRONG),
    _lark("an unknown name", "start: nothing", WRONG),
    _lark("recursion that writes nothing", "start: a\na: b\nb: a", WRONG),
    _lark("recursion without end", 'start: a\na: a "x"', WRONG),
    _lark("left recursion", 'start: start "a" | "b"'),
    _lark("ambiguity", 'start: a\na: a a | "x" | "y" a'),
    _lark("ambiguity of single characters", "start: a\na: a a a | a a | /[a-z]/", None, WRONG),
    _lark("a chain of 5,000 rules", "start: a0\n" + "\n".join(
        f'a{n}: "x" a{n + 1}?' for n in range(5000)
    ) + '\na5000: "y"', WRONG),
    _lark("a terminal that uses itself", 'start: A\nA: "x" A?', WRONG),
    _lark("a million copies", 'start: "x"{1000000}', WRONG, None),
    _lark("negation of much", "start: A\nA: /(a|b)*/ & ~/(a|b)*a(a|b){60}/"),
    _lark("20,000 substrings", 'start: A\nA: %regex {"substring_chars": "' + "abcdefghij" * 2000 + '"}'),
    _lark("a control token", "start: <|im_start|>", CANNOT),
    _lark("a control token by number", 'start: "a" <[1]>', CANNOT),
    _lark("all tokens", "start: <[*]>", CANNOT),
    _lark("going back", 'start: a "z"\na[stop="b"]: /a*/', CANNOT),
    _lark("JSON within, nested", "start: %json " + "[" * 5000, WRONG),
    _lark("1 MB of comments", "start: A\nA: /a/\n" + "// nothing\n" * 80_000),
    _ebnf("an invalid rule", "root = a", WRONG),
    _ebnf("groups", 'root ::= ' + "(" * 5000 + '"a"' + ")" * 5000, WRONG),
    _ebnf("tokens", "root ::= <[1]>", CANNOT),
    _ebnf("too long", 'root ::= "a"\n' + "# nothing\n" * 100_000, WRONG),
    Hostile("10,000 choices", ChoiceStructure(tuple(f"choice {n}" for n in range(10_000))), (None,)),
    Hostile("a long choice", ChoiceStructure(("x" * 100_000,)), (None,)),
)  # fmt: skip

GOOD = JsonStructure({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})


class SchemaMaker:
    """Random schemas that a value of bounded length meets. ends: no value can be longer than that."""

    def __init__(self, seed: int, *, ends: bool = False) -> None:
        self._random = random.Random(seed)
        self._ends = ends
        self._definitions: dict[str, Any] = {}

    def document(self) -> dict[str, Any]:
        schema = self.schema(3)
        return {**schema, "$defs": self._definitions} if self._definitions else schema

    def schema(self, depth: int) -> dict[str, Any]:
        kinds = [self._text, self._integer, self._number, self._enum, self._constant, self._word]
        if depth:
            kinds += [self._object] * 4 + [self._array, self._tuple, self._any_of, self._one_of, self._map]
            kinds += [self._reference, self._combined, self._types]
        return self._random.choice(kinds)(depth)

    def _text(self, _: int) -> dict[str, Any]:
        patterns = [
            "^[a-z]{1,6}$",
            r"^\d{3}-\d{2}$",
            "^(red|green|blue)$",
            "^[あ-ん]{0,3}$",
            r'^["\\/]{1,2}$',
        ]
        choice = self._random.random()
        if choice < 0.3:
            return {"type": "string", "pattern": self._random.choice(patterns)}
        if choice < 0.4:
            return {"type": "string", "format": self._random.choice(["date", "time", "ipv4", "uuid"])}
        least = self._random.randint(0, 3)
        return {"type": "string", "minLength": least, "maxLength": least + self._random.randint(0, 8)}

    def _integer(self, _: int) -> dict[str, Any]:
        low = self._random.randint(-1000, 1000)
        bounds = {"minimum": low, "maximum": low + self._random.randint(0, 5000)}
        if self._random.random() < 0.2:
            bounds = {"multipleOf": self._random.choice([2, 5, 7])}
        kept = {word: value for word, value in bounds.items() if self._random.random() < 0.6}
        return {"type": "integer", **kept}

    def _number(self, _: int) -> dict[str, Any]:
        low = round(self._random.uniform(-100, 100), 3)
        return self._random.choice([
            {"type": "number"},
            {"type": "number", "minimum": 0},
            {"type": "number", "exclusiveMinimum": 0},
            {"type": "number", "minimum": low, "maximum": low + self._random.choice([0.5, 3, 1000])},
            {"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": low + 1},
            {"type": "number", "minimum": 0, "maximum": 10, "multipleOf": 0.5},
        ])  # fmt: skip

    def _enum(self, _: int) -> dict[str, Any]:
        values = [
            "a",
            "b c",
            'quote " and \\',
            "日本",
            1,
            -2.5,
            None,
            True,
            [1, "x"],
            {"k": None},
            "\n",
            "é\0",
        ]
        return {"enum": self._random.sample(values, self._random.randint(1, 5))}

    def _constant(self, _: int) -> dict[str, Any]:
        return {"const": self._random.choice(["x", 0, False, None, [], {"deep": [{"a": 1}]}])}

    def _word(self, _: int) -> dict[str, Any]:
        return {"type": self._random.choice(["boolean", "null"])}

    def _object(self, depth: int) -> dict[str, Any]:
        names = ["a", "b", "name", 'q"uote', "日", "a b", "a\tb", "x-y"]
        chosen = self._random.sample(names, self._random.randint(0, 5))
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {name: self.schema(depth - 1) for name in chosen},
            "required": [name for name in chosen if self._random.random() < 0.5],
        }
        if chosen and self._random.random() < 0.2:
            schema["additionalProperties"] = self._random.choice([False, {"type": "integer"}])
        if self._ends:
            schema["additionalProperties"] = False
        if not chosen:
            schema["additionalProperties"] = False
        return schema

    def _map(self, _: int) -> dict[str, Any]:
        return {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2}

    def _array(self, depth: int) -> dict[str, Any]:
        least = self._random.randint(0, 2)
        most = least + self._random.randint(0, 2)
        return {"type": "array", "items": self.schema(depth - 1), "minItems": least, "maxItems": most}

    def _tuple(self, depth: int) -> dict[str, Any]:
        return {"type": "array", "prefixItems": [self.schema(depth - 1), self.schema(0)], "items": False}

    def _any_of(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self.schema(depth - 1) for _ in range(self._random.randint(1, 3))]}

    def _one_of(self, depth: int) -> dict[str, Any]:
        return {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"const": kind}, "value": self.schema(depth - 1)},
                    "required": ["kind"],
                }
                for kind in ("one", "two")
            ]
        }

    def _types(self, _: int) -> dict[str, Any]:
        return {"type": ["string", "null", "integer"], "maxLength": 5, "minimum": 0}

    def _reference(self, depth: int) -> dict[str, Any]:
        name = f"d{len(self._definitions)}"
        self._definitions[name] = {}
        chain = {"type": "object", "properties": {"v": self.schema(0), "next": {"$ref": f"#/$defs/{name}"}}}
        self._definitions[name] = self._random.choice([self.schema(depth - 1), {**chain, "required": ["v"]}])
        return {"$ref": f"#/$defs/{name}"}

    def _combined(self, depth: int) -> dict[str, Any]:
        parts = [
            {"type": "object", "properties": {name: self.schema(0)}, "required": [name]} for name in "pq"
        ]
        closed = {"type": "object", "properties": {"p": True, "q": True}, "additionalProperties": False}
        if self._ends:
            return {"allOf": [*parts, closed]}
        pattern = {"type": "object", "patternProperties": {"^n_[a-z]$": {"type": "integer"}}}
        return self._random.choice([{"allOf": [*parts, closed]}, pattern])


def random_schema(seed: int, *, ends: bool = False) -> dict[str, Any]:
    """A schema of the seed's own, in whose values every string and list may be short; with `ends` all are."""
    return SchemaMaker(seed, ends=ends).document()


CLOSERS = frozenset((b'"', b"]", b"}", b")", b"'", b'"}', b'"]', b"]}", b"}}", b",", b":", b": ", b", "))


def random_answer(
    grammar: TokenGrammar, tokenizer: Tokenizer, seed: int, *, tokens: int = 400, stop: float = 0.4
) -> list[int] | None:
    """Tokens drawn from the masks alone, with a liking for those that close something; None if they do not
    come to an end. Fails the test where nothing may come next."""
    draws = random.Random(seed)
    closers = np.array([t for t in range(tokenizer.vocab_size) if tokenizer.token_bytes(t) in CLOSERS])
    stops = sorted(grammar.stop_ids)
    answer: list[int] = []
    while len(answer) < tokens:
        if grammar.is_complete and (grammar.must_stop or draws.random() < stop):
            return answer
        logits = np.zeros(tokenizer.embedding_rows, dtype=np.float32)
        grammar.mask_logits(logits)
        allowed = logits == 0
        allowed[stops] = False
        closing = closers[allowed[closers]]
        liking = 0.4 if len(answer) < tokens // 3 else 0.9
        choices = closing if closing.size and draws.random() < liking else np.flatnonzero(allowed)
        if not choices.size:
            return answer if grammar.is_complete else None
        answer.append(int(choices[draws.randrange(choices.size)]))
        grammar.accept(answer[-1])
    return None
