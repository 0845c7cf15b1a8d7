"""llama.cpp's grammars mean here what they mean there, or are refused by their line."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from ayllu.chat.tokenizer import Tokenizer
from ayllu.engine.grammar import GrammarCompiler, grammar_of
from ayllu.engine.grammar_ebnf import ebnf_to_lark
from ayllu.engine.model_files import tokenizer_for
from ayllu.engine.prepared import GrammarSpec
from ayllu.engine.requests import GrammarStructure
from ayllu.errors import AylluError, GrammarError, UnsupportedError
from ayllu.weights.checkpoint import open_checkpoint

JSON = r"""
# JSON as it is often written in this dialect
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws

object ::=
  "{" ws (
    string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws

array  ::=
  "[" ws (
    value
    ("," ws value)*
  )? "]" ws

string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) # escapes
  )* "\"" ws

number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf: Path) -> Tokenizer:
    return tokenizer_for(open_checkpoint(smollm2_gguf))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.stop_ids)


def follows(compiler: GrammarCompiler, tokenizer: Tokenizer, spec: GrammarSpec, text: str) -> bool:
    grammar = compiler.compiled(spec)[0]
    for token in tokenizer.encode(text):
        if not grammar.allows(token):
            return False
        grammar.accept(token)
    return grammar.is_complete


@pytest.mark.parametrize(
    ("source", "right", "wrong"),
    [
        (JSON, ['{"a": [1, -2.5e3, true, {}]}', "{\n  }", '{"日": "é\\u00e9\\n"}'], ["{'a': 1}", "[]", "{"]),
        ('root ::= "a" | "b"', ["a", "b"], ["", "ab", "c"]),
        ('root ::= "a"\n  | "b" # or\n\n  | "c"\n', ["a", "b", "c"], ["ab"]),
        ('root::="a"+ [b-d]* .?', ["a", "aabcd", "ax", "a\n"], ["b", "axx"]),
        ('root ::= ("a" | "bc"){2,3} "."', ["aa.", "bcabc."], ["a.", "aaaa."]),
        ('root ::= "x"{2} "y"{1,}', ["xxy", "xxyyy"], ["xy", "xx"]),
        (r'root ::= "\x41\u00e9\U0001F600\t\"\\"', ['Aé😀\t"\\'], ["A"]),
        (r"root ::= [^\]\n^-]+", ["ab[", "日本"], ["]", "\n", "^", "-", ""]),
        (r"root ::= [-a] [a-] [\-x-z]", ["-a-", "a-y"], ["b--"]),
        ("root ::= [a-zA-Z_] [a-z/\"'.]*", ["A/b\"'."], ["1"]),
        ('root ::= "(" root ")" | ""', ["", "()", "((()))"], ["(", "())"]),
        ('root ::= expr\nexpr ::= term (("+"|"-") term)*\nterm ::= [0-9]+ | "(" expr ")"',
         ["1", "12+(3-4)"], ["1+", "()"]),
        ('root ::= my-Rule_2\nmy-Rule_2 ::= "x" start\nstart ::= "y"', ["xy"], ["x"]),
        ('root ::= "<|im_start|>"', ["<|im_start|>"], ["<"]),
        ('root ::= "a" "" | ("b" | )', ["a", "b", ""], ["ab"]),
    ],
)  # fmt: skip
def test_what_grammars_allow(
    compiler: GrammarCompiler, tokenizer: Tokenizer, source: str, right: list[str], wrong: list[str]
) -> None:
    spec = grammar_of(GrammarStructure(source, "ebnf"))
    for text in right:
        assert follows(compiler, tokenizer, spec, text), text
    for text in wrong:
        assert not follows(compiler, tokenizer, spec, text), text


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ('start ::= "a"', "no rule root"),
        ("root ::= a\nb ::= [0-9]", "Line 1 of the grammar: there is no rule 'a'"),
        ('root ::= number\nnumbr ::= "1"', "Did you mean numbr"),
        ('root ::= "a"\nroot ::= "b"', "Line 2 of the grammar: there are two rules 'root'"),
        ('root ::= "a', 'Line 1 of the grammar: expected "'),
        ('root ::= "a\n"', 'Line 1 of the grammar: expected "'),
        ("root ::= [a", "Line 1 of the grammar: expected ]"),
        ("root ::= []", "a class of characters is empty"),
        ("root ::= [z-a]", "a range of characters ends before it begins"),
        ('root ::= ("a"', "expected )"),
        ('root ::= "a" )', "unexpected ')'"),
        (r'root ::= "\q"', "there is no escape \\q"),
        (r'root ::= "\x4"', "\\x wants 2 hexadecimal digits"),
        (r'root ::= "\ud800"', "\\ud800 is no character"),
        (r'root ::= "\UFFFFFFFF"', "is no character"),
        ('root ::= "a"{3,2}', "out of range"),
        ('root ::= "a"{9999999}', "out of range"),
        ('root ::= "a"{x}', "expected a count"),
        ('root ::= "a"{0}', "a count of 0"),
        ("root ::= *", "unexpected '*'"),
        ("root = a", "expected a rule"),
        ("root ::= a%b\na ::= [x]", "unexpected '%'"),
        ("root ::= " + "(" * 100 + '"a"' + ")" * 100, "groups are nested deeper than 64"),
        ('root ::= "' + "a" * (1 << 17) + '"', "more than 131072 characters"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(source: str, says: str) -> None:
    with pytest.raises(GrammarError) as caught:
        ebnf_to_lark(source)
    assert says in caught.value.problem


@pytest.mark.parametrize("source", ["root ::= <think> [a-z]*", "root ::= <[1000]>", 'root ::= "a" !<b>'])
def test_tokens_are_refused(source: str) -> None:
    with pytest.raises(AylluError) as caught:
        ebnf_to_lark(source)
    assert isinstance(caught.value, UnsupportedError) or "!" in source


def test_random_changes_to_a_grammar_are_refused_or_compile(compiler: GrammarCompiler) -> None:
    draws = random.Random(0)
    refused = 0
    for _ in range(300):
        text = list(JSON)
        for _ in range(draws.randint(1, 3)):
            place = draws.randrange(len(text))
            text[place : place + draws.randint(0, 2)] = draws.choice(
                ['"', "[", "(", ")", "|", "\\", "{", "é", ""]
            )
        try:
            compiler.compiled(grammar_of(GrammarStructure("".join(text), "ebnf")))
        except (GrammarError, UnsupportedError):
            refused += 1
    assert 0 < refused < 300
