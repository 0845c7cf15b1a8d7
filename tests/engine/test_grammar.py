"""Masks over the vocabulary: what may come next, when an answer may end, what is remembered of grammars."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llguidance
import numpy as np
import pytest
from numpy.typing import NDArray

from ayllu.chat.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_gguf
from ayllu.engine.grammar import GrammarCompiler, TokenGrammar, grammar_of
from ayllu.engine.grammar_vocabulary import LIMITS, GrammarVocabulary
from ayllu.engine.json_schema import validate_json
from ayllu.engine.model_files import tokenizer_for
from ayllu.engine.prepared import GrammarSpec
from ayllu.engine.requests import (
    ChoiceStructure,
    GrammarStructure,
    JsonStructure,
    RegexStructure,
    Structure,
)
from ayllu.errors import GrammarError, RequestFailedError, UnsupportedError
from ayllu.weights.checkpoint import open_checkpoint
from tests.chat import small_vocabularies
from tests.engine.grammar_corpus import random_answer, random_schema

STRUCTURES: list[Structure] = [
    RegexStructure("[a-z ]{3,9}(日本|é+)?"),
    ChoiceStructure(("yes", "yes, but", "日本", 'a "quote"')),
    GrammarStructure('start: item ("," item)*\nitem: /[0-9]+/ | "(" start ")"'),
    GrammarStructure('root ::= "[" (digit ("," digit)*)? "]"\ndigit ::= [0-9] | root', "ebnf"),
    JsonStructure({"type": "object", "properties": {"a": {"maxLength": 4}, "b": {"type": "number"}}}),
    *(JsonStructure(random_schema(seed)) for seed in range(10)),
]


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf: Path) -> Tokenizer:
    return tokenizer_for(open_checkpoint(smollm2_gguf))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.stop_ids)


def allowed(grammar: TokenGrammar, rows: int) -> NDArray[np.bool_]:
    logits = np.zeros(rows, dtype=np.float32)
    grammar.mask_logits(logits)
    return logits == 0


def follows(compiler: GrammarCompiler, tokenizer: Tokenizer, spec: GrammarSpec, text: str) -> bool:
    grammar = compiler.compiled(spec)[0]
    for token in tokenizer.encode(text):
        if not grammar.allows(token):
            return False
        grammar.accept(token)
    return grammar.is_complete


@pytest.mark.parametrize("structure", STRUCTURES)
def test_masks_are_the_librarys_own_save_control_tokens(
    compiler: GrammarCompiler, tokenizer: Tokenizer, structure: Structure
) -> None:
    spec = grammar_of(structure)
    library = GrammarVocabulary.of(tokenizer, tokenizer.stop_ids).library_tokenizer(tokenizer.encode)
    for seed in range(3):
        tokens = random_answer(compiler.compiled(spec)[0], tokenizer, seed) or []
        grammar = compiler.compiled(spec)[0]
        matcher = llguidance.LLMatcher(library, spec.source, limits=LIMITS)
        for token in [*tokens, None]:
            data = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            bits = np.unpackbits(data, bitorder="little")[: tokenizer.vocab_size].astype(bool)
            mask = allowed(grammar, tokenizer.vocab_size)
            assert np.array_equal(mask, bits)
            assert mask.any()
            assert [grammar.allows(t) for t in range(0, 49152, 997)] == mask[::997].tolist()
            stops = mask[sorted(tokenizer.stop_ids)]
            assert stops.all() == stops.any() == grammar.is_complete == matcher.is_accepting()
            assert grammar.must_stop == (grammar.is_complete and mask.sum() == len(tokenizer.stop_ids))
            if token is not None:
                grammar.accept(token)
                assert matcher.consume_token(token)


def test_logits_that_are_allowed_stay_and_rows_without_a_token_go(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    grammar = compiler.compiled(grammar_of(RegexStructure("a|b")))[0]
    logits = np.random.default_rng(0).normal(size=tokenizer.vocab_size + 100).astype(np.float32)
    before = logits.copy()
    grammar.mask_logits(logits)
    kept = np.flatnonzero(np.isfinite(logits)).tolist()
    assert sorted(map(tokenizer.token_bytes, kept)) == [b"a", b"b"]
    assert np.array_equal(logits[kept], before[kept])


@pytest.mark.parametrize(
    "structure",
    [
        GrammarStructure("start: A\nA: ~/foo/"),
        GrammarStructure("start: A\nA: ~/(?s:.*)foo(?s:.*)/"),
        GrammarStructure("start: /(?s:.*)/"),
        GrammarStructure('start: ("a" | A)*\nA: ~("a" | "b")'),
        RegexStructure("(?s:.*)"),
        JsonStructure({"type": "string"}),
        RegexStructure(r"<\|im_(start|end)\|>"),
        ChoiceStructure(("<|im_start|>", "<[1]>", "<|im_end|>")),
        JsonStructure({"enum": ["<[1]>", "<|im_start|>"]}),
        JsonStructure({"properties": {"<[1]>": {"pattern": "<\\[1\\]>"}}, "required": ["<[1]>"]}),
    ],
)
def test_no_grammar_of_a_user_allows_a_control_token(
    compiler: GrammarCompiler, tokenizer: Tokenizer, structure: Structure
) -> None:
    """A negated pattern matches any bytes in the library, control tokens too."""
    control = [t for t in range(tokenizer.vocab_size) if tokenizer.is_control(t)]
    others = [t for t in control if t not in tokenizer.stop_ids]
    assert len(others) > 10
    for seed in range(3):
        grammar = compiler.compiled(grammar_of(structure))[0]
        for _ in range(20):
            mask = allowed(grammar, tokenizer.vocab_size)
            assert not mask[others].any()
            assert mask[sorted(tokenizer.stop_ids)].any() == grammar.is_complete
            text = np.setdiff1d(np.flatnonzero(mask), control)
            if not text.size:
                break
            token = int(np.random.default_rng(seed).choice(text))
            grammar.accept(token)
            assert not tokenizer.is_control(token)


def test_an_answer_ends_once(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    (token,) = tokenizer.encode("a")
    stop = min(tokenizer.stop_ids)
    grammar = compiler.compiled(grammar_of(RegexStructure("a+")))[0]
    assert not grammar.is_complete
    with pytest.raises(RequestFailedError):
        grammar.accept(stop)
    with pytest.raises(RequestFailedError):
        grammar.accept(tokenizer.encode("b")[0])
    for outside in (-1, tokenizer.vocab_size, 1 << 40):
        with pytest.raises(RequestFailedError):
            grammar.accept(outside)
    grammar.accept(token)
    assert grammar.is_complete
    assert not grammar.must_stop
    grammar.accept(stop)
    assert grammar.is_complete
    assert grammar.must_stop
    for after in (lambda: grammar.accept(token), lambda: grammar.mask_logits(np.zeros(9, np.float32))):
        with pytest.raises(RequestFailedError):
            after()
    with pytest.raises(RequestFailedError):
        grammar.roll_back(1)


def test_going_back_gives_the_same_masks(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    spec = grammar_of(JsonStructure({"type": "array", "items": {"type": "integer"}}))
    tokens = tokenizer.encode("[12, 345, 6]")
    grammar = compiler.compiled(spec)[0]
    masks = []
    for token in tokens:
        masks.append(allowed(grammar, tokenizer.vocab_size))
        grammar.accept(token)
    for count in (1, 3, len(tokens)):
        grammar.roll_back(count)
        assert np.array_equal(allowed(grammar, tokenizer.vocab_size), masks[len(tokens) - count])
        for token in tokens[len(tokens) - count :]:
            grammar.accept(token)


def test_answers_of_one_grammar_do_not_disturb_each_other(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    one, other = compiler.compile(grammar_of(RegexStructure("a[0-9]b")), 2).result()
    one.accept(tokenizer.encode("a")[0])
    assert allowed(other, tokenizer.vocab_size).sum() < allowed(one, tokenizer.vocab_size).sum()
    assert other.allows(tokenizer.encode("a")[0])
    assert not one.allows(tokenizer.encode("a")[0])


@pytest.mark.parametrize(
    ("structure", "error"),
    [
        (RegexStructure("[a"), GrammarError),
        (GrammarStructure("start: ("), GrammarError),
        (GrammarStructure("start: a\na: b\nb: a"), GrammarError),
        (JsonStructure({"type": "string", "pattern": "a{2}{3}{"}), GrammarError),
        (JsonStructure({"allOf": [{"type": "null"}, {"type": "string"}]}), GrammarError),
    ],
)
def test_what_does_not_compile_fails_its_future(
    compiler: GrammarCompiler, structure: Structure, error: type[Exception]
) -> None:
    with pytest.raises(error):
        compiler.compile(grammar_of(structure)).result()


def test_a_grammar_that_becomes_too_complex_fails_its_answer_and_is_compiled_anew(
    tokenizer: Tokenizer,
) -> None:
    """All uses share the lexer: once that had reached its limit, the grammar failed for everybody."""
    compiler = GrammarCompiler(tokenizer, tokenizer.stop_ids)
    spec = grammar_of(RegexStructure(r"(\p{L}*a\p{L}{30})+"))
    reached = []
    for seed in range(4):
        grammar = compiler.compiled(spec)[0]
        draws = np.random.default_rng(seed)
        with pytest.raises(RequestFailedError, match="cannot be followed any further"):
            for step in range(100_000):
                reached.append(step)
                mask = allowed(grammar, tokenizer.vocab_size)
                mask[sorted(tokenizer.stop_ids)] = False
                grammar.accept(int(draws.choice(np.flatnonzero(mask))))
        assert reached.pop() > 5


def test_what_is_remembered_stays_within_its_limits(tokenizer: Tokenizer) -> None:
    by_count = GrammarCompiler(tokenizer, tokenizer.stop_ids, max_grammars=3)
    by_size = GrammarCompiler(tokenizer, tokenizer.stop_ids, max_bytes=1 << 20)
    for number in range(12):
        spec = grammar_of(RegexStructure(f"word{number}"))
        for compiler in (by_count, by_size):
            compiler.compiled(spec)
            assert compiler.cached_grammars <= 3 or compiler is by_size
            assert compiler.cached_bytes <= 1 << 20 or compiler is by_count
    assert by_count.cached_grammars == 3
    assert 1 <= by_size.cached_grammars < 12
    by_size.compiled(grammar_of(ChoiceStructure(("x" * 5000,))))
    assert by_size.cached_bytes <= 1 << 20


def test_what_was_used_last_is_remembered_longest(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ayllu.engine import grammar as module

    compiled: list[str] = []
    original = module.compiled_matcher

    def counting(library: llguidance.LLTokenizer, spec: GrammarSpec) -> llguidance.LLMatcher:
        compiled.append(spec.source)
        return original(library, spec)

    monkeypatch.setattr(module, "compiled_matcher", counting)
    compiler = GrammarCompiler(tokenizer, tokenizer.stop_ids, max_grammars=2)
    one, two, three = (grammar_of(RegexStructure(f"g{n}")) for n in range(3))
    for spec in (one, two, one, three, one, two):
        compiler.compiled(spec)
    assert compiled == [one.source, two.source, three.source, two.source]


def test_a_grammar_used_for_long_is_compiled_anew(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, tokenizer.stop_ids)
    spec = grammar_of(JsonStructure({"type": "array", "items": {"type": "integer"}}))
    grammar = compiler.compiled(spec)[0]
    fresh = compiler.cached_bytes
    grammar._compiled.mask_seconds += 0.01
    assert fresh < compiler.cached_bytes <= fresh + (16 << 20)
    grammar._compiled.mask_seconds += 100
    assert compiler.cached_bytes == fresh + (16 << 20)
    assert compiler.compiled(spec)[0]._compiled is not grammar._compiled
    assert compiler.cached_bytes == fresh


def test_threads_compile_and_follow_the_same_grammars(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, tokenizer.stop_ids, max_grammars=3)
    schemas = [random_schema(seed) for seed in range(6)]
    specs = [grammar_of(JsonStructure(schema)) for schema in schemas]
    begin = threading.Barrier(6)

    def work(number: int) -> int:
        begin.wait()
        answers = 0
        for turn in range(6):
            place = (number + turn) % len(specs)
            for grammar in compiler.compile(specs[place], 2).result():
                tokens = random_answer(grammar, tokenizer, number * 100 + turn)
                if tokens is not None:
                    validate_json(schemas[place], tokenizer.decode(tokens))
                    answers += 1
        return answers

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(work, range(6))) > 40
    compiler.close()
    compiler.close()


def test_a_vocabulary_without_stop_tokens_ends_by_itself(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, ())
    grammar = compiler.compiled(grammar_of(RegexStructure("ab?")))[0]
    grammar.accept(tokenizer.encode("a")[0])
    assert grammar.is_complete
    assert not grammar.must_stop
    assert allowed(grammar, tokenizer.embedding_rows + 64).sum() == 1
    grammar.accept(tokenizer.encode("b")[0])
    assert grammar.must_stop
    assert not allowed(grammar, tokenizer.embedding_rows).any()


@pytest.mark.parametrize("kind", ["gpt2", "llama4", "sentencepiece"])
def test_forced_text_comes_out_whole_whatever_the_vocabulary_adds(kind: str, tmp_path: Path) -> None:
    """A SentencePiece vocabulary adds a space when it encodes: the library took its tokens on trust, and the
    answer began with one that no constant has."""
    if kind == "gpt2":
        tokenizer = tokenizer_from_gguf(small_vocabularies.gguf_metadata(), tmp_path)
    elif kind == "llama4":
        tokenizer = load_tokenizer(small_vocabularies.write_tiktoken(tmp_path / "model"))
    else:
        tokenizer = tokenizer_from_gguf(small_vocabularies.sentencepiece_metadata(), tmp_path)
    compiler = GrammarCompiler(tokenizer, tokenizer.stop_ids)
    constant = {"name": "the cat in 日本 \u2028 e\u0301", "b": [True, None, 1.5]}
    for seed in range(5):
        grammar = compiler.compiled(grammar_of(JsonStructure({"const": constant})))[0]
        tokens = random_answer(grammar, tokenizer, seed, tokens=2000)
        assert tokens is not None
        assert json.loads(tokenizer.decode(tokens, continuation=True)) == constant


def test_a_byte_that_no_text_has_marks_no_token(tmp_path: Path) -> None:
    """The library takes a first byte of 0xFF for the mark of a control token; byte-level BPE has one."""
    tokenizer = tokenizer_from_gguf(small_vocabularies.gguf_metadata(), tmp_path)
    marked = [t for t in range(tokenizer.vocab_size) if tokenizer.token_bytes(t) == b"\xff"]
    assert marked
    grammar = GrammarCompiler(tokenizer, tokenizer.stop_ids).compiled(
        grammar_of(GrammarStructure("start: A\nA: ~/foo/"))
    )[0]
    assert not any(grammar.allows(token) for token in marked)


@pytest.mark.parametrize(
    ("structure", "right", "wrong"),
    [
        (RegexStructure("^a+$"), ["a", "aa"], ["", "b", "a\n", " a"]),
        (RegexStructure("a/b"), ["a/b"], ["ab"]),
        (RegexStructure(r"\d\w\s."), ["1a x", "٣é\u3000日"], ["ab c"]),
        (RegexStructure("(?i)straße"), ["STRAßE"], ["strasse"]),
        (RegexStructure("a\nb\\n"), ["a\nb\n"], ["anb"]),
        (ChoiceStructure(("a", "ab", "a")), ["a", "ab"], ["b", "abc", ""]),
        (ChoiceStructure(("", "x")), ["", "x"], ["y"]),
        (ChoiceStructure(('"\\\n\x7f\0', "<tool_call>")), ['"\\\n\x7f\0', "<tool_call>"], ["<"]),
        (GrammarStructure('start: "a" B # c\nB: /b+/ // "<|x|>"'), ["ab", "abb"], ["a"]),
        (GrammarStructure('start: "<|im_start|>" /<[1]>/'), ["<|im_start|><1>"], ["<|im_start|>"]),
        (GrammarStructure('start: %json {"const": "<x>"}'), ['"<x>"'], ["<x>"]),
    ],
)
def test_what_structures_allow(
    compiler: GrammarCompiler,
    tokenizer: Tokenizer,
    structure: Structure,
    right: list[str],
    wrong: list[str],
) -> None:
    spec = grammar_of(structure)
    for text in right:
        assert follows(compiler, tokenizer, spec, text), text
    for text in wrong:
        assert not follows(compiler, tokenizer, spec, text), text


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("start: x\nx: <|im_start|>", "Line 2 of the grammar names a special token"),
        ('start: "a" <[0-5]>', "Line 1 of the grammar names a special token"),
        ("start: <a>", "Line 1 of the grammar names a special token"),
        ('start: "a" // "\n  | <[*]>', "Line 2 of the grammar names a special token"),
        ('start: /"/ <[1]> /"/', "Line 1 of the grammar names a special token"),
        ('start: "\\"" <[1]> "\\""', "Line 1 of the grammar names a special token"),
        ("start: 'x' <[1]> 'x'", "Line 1 of the grammar names a special token"),
        ('start: %json {"const": "}"} <[1]>', "Line 1 of the grammar names a special token"),
        ('start: a\na[stop = "x"]: /y/', "Line 2 of the grammar uses the option stop"),
        ("start: a\na[max_tokens=5]: /y/", "Line 2 of the grammar uses the option max_tokens"),
        ('start: /a\n"b/ <[1]> "/"', "Line 2 of the grammar names a special token"),
        ("start: a\na[lazy, temperature=0.5]: /y/", "Line 2 of the grammar uses the option temperature"),
    ],
)
def test_special_tokens_and_options_in_grammars_are_refused_by_line(source: str, says: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        grammar_of(GrammarStructure(source))
    assert caught.value.problem.startswith(says)


@pytest.mark.parametrize(
    "source",
    [
        'start: %json {"a": [}',
        'start: "' + '\\"' * 500_000,
        "start: /" + "\\/" * 500_000,
        'start: %json {"a": "\ud800"}',
        "start: " + "%json 1 " * 120_000 + "%json [",
        "start: %json " + '{"items": ' * 200 + "{}" + "}" * 200,
        "start: %json " + "[" * 100_000,
    ],
)
def test_what_stands_within_grammars_is_measured_in_linear_time(source: str) -> None:
    with pytest.raises(GrammarError):
        grammar_of(GrammarStructure(source))
