"""WordPiece: the ids of transformers' own tokenizer, no special token from text, hostile files refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ayllu.chat.tokenizer import Tokenizer, load_tokenizer
from ayllu.errors import AylluError, ModelFileError, UnsupportedError

TEXTS = (
    "",
    " ",
    "\n\t\r ",
    "Hello, World! It's 3.14 o'clock; don't (un)believe [it].",
    "unaffable unbelievably antidisestablishmentarianism",
    "The quick brown fox\njumps   over\tthe lazy dog.",
    "naïve café Ångström İstanbul ǅ ß ﬁ",
    "日本語の文章をベクトルにします。東京タワーは333メートルです。",
    "カタカナ、ひらがな、がぎぐげご、ﾊﾝｶｸ",
    "한국어 텍스트 中文字符 العربية עברית ไทย हिन्दी",
    "😀 👩‍👩‍👧‍👦 🇯🇵 ❤️ text😀text",
    "\x00\x01\x02control\x7f\x80\x9f\ufeffcharacters\u200b\u200d\u2028\u2029\ufffd\u00ad",
    "a" * 100,
    "a" * 101,
    "a" * 5000 + " b",
    "é" * 99 + " " + "e\u0301" * 60,
    "!?.,;:" * 50,
    "[CLS] and [SEP], [UNK] [MASK] [PAD] ##ing ## ##",
    "[cls][sep]【CLS】[ CLS ]",
    "http://example.org/a?b=c&d=%20 user@example.org C:\\x",
    "$5 €10 ¥100 №1 ½ ² Ⅷ ① ١٢٣",
    "word " * 3000,
)

TRICKY = st.lists(
    st.one_of(
        st.sampled_from(
            ["[CLS]", "[SEP]", "[UNK]", "[", "]", "##", "##s", "'s", "’", "\u0301", "\u200d", "\x00",
             "\ufffd", "\u00a0", "\u3000", "\u2028", "\x85", "日", "本", "が", "カ", "ー", "한", "İ", "ß",
             "É", "e", "A", "the ", "ing", " un", "believ", "able", "😀", "12", "-", "_", "\U00020000", "ﬁ"]
        ),
        st.characters(blacklist_categories=["Cs"]),
    ),
    max_size=40,
).map("".join)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(minilm_folder: Path) -> Tokenizer:
    return load_tokenizer(minilm_folder)


@pytest.fixture(scope="module")
def theirs(minilm_folder: Path) -> Any:
    """transformers' fast tokenizer, told to read special tokens in a text as text."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(minilm_folder, split_special_tokens=True)


def their_ids(theirs: Any, text: str) -> list[int]:
    return list(theirs(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text[:20]))
def test_ids_equal_transformers(tokenizer: Tokenizer, theirs: Any, text: str) -> None:
    assert tokenizer.encode(text) == their_ids(theirs, text)


@settings(max_examples=500)
@given(text=TRICKY)
def test_ids_of_any_text_equal_transformers(tokenizer: Tokenizer, theirs: Any, text: str) -> None:
    assert tokenizer.encode(text) == their_ids(theirs, text)


@settings(max_examples=200)
@given(text=TRICKY)
def test_no_text_becomes_a_special_token(tokenizer: Tokenizer, text: str) -> None:
    unknown = tokenizer.special_id("[UNK]")
    assert not [token for token in tokenizer.encode(text) if tokenizer.is_special(token) and token != unknown]


def test_what_stands_around_a_text_comes_from_the_file(tokenizer: Tokenizer, theirs: Any) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id) == (theirs.cls_token_id, theirs.sep_token_id) == (101, 102)
    assert tokenizer.stop_ids == {102} and tokenizer.add_bos
    assert dict(tokenizer.specials) == {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
    assert (tokenizer.vocab_size, tokenizer.embedding_rows) == (30522, 30522)
    ids = tokenizer.encode_trusted("[CLS]hello world[SEP]")
    assert ids == [101, *tokenizer.encode("hello world"), 102] == list(theirs("hello world")["input_ids"])


def test_lone_surrogates_and_long_texts_are_read(tokenizer: Tokenizer, theirs: Any) -> None:
    assert tokenizer.encode("a\ud800b") == their_ids(theirs, "a\ufffdb")
    text = "The word after this one is believable, 日本. " * 20_000
    assert tokenizer.encode(text) == their_ids(theirs, text)


def test_decoding_gives_the_words_back_in_lower_case(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The unaffable  Fox")
    assert len(ids) > 3
    assert tokenizer.decode(ids) == "the unaffable fox"
    assert tokenizer.decode([101, *ids, 102], skip_specials=True) == "the unaffable fox"
    assert tokenizer.decode(ids[-1:], continuation=True) == " fox"


SMALL: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [
        {"id": 0, "content": "[UNK]", "special": True},
        {"id": 1, "content": "[CLS]", "special": True},
        {"id": 2, "content": "[SEP]", "special": True},
    ],
    "normalizer": {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
    },
    "pre_tokenizer": {"type": "BertPreTokenizer"},
    "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 1]},
    "model": {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "##b": 4, "[": 5, "]": 6, "cls": 7},
    },
}
Change = Callable[[dict[str, Any]], object]


def small(folder: Path, change: Change = lambda root: None) -> Tokenizer:
    root = copy.deepcopy(SMALL)
    change(root)
    (folder / "tokenizer.json").write_text(json.dumps(root))
    return load_tokenizer(folder)


def _set(*place: str, to: object) -> Change:
    def change(root: dict[str, Any]) -> None:
        for key in place[:-1]:
            root = root[key]
        root[place[-1]] = to

    return change


def _drop(*place: str) -> Change:
    def change(root: dict[str, Any]) -> None:
        for key in place[:-1]:
            root = root[key]
        del root[place[-1]]

    return change


def test_a_small_vocabulary_splits_into_its_pieces(tmp_path: Path) -> None:
    tokenizer = small(tmp_path)
    assert tokenizer.encode("ab abb a c [CLS]") == [3, 4, 3, 4, 4, 3, 0, 5, 7, 6]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_without_a_splitting_step_a_special_token_still_cannot_be_spelled(tmp_path: Path) -> None:
    tokenizer = small(tmp_path, _set("pre_tokenizer", to=None))
    assert tokenizer.encode("[CLS]") == [0]
    cased = small(tmp_path, _set("normalizer", "lowercase", to=False))
    assert 1 not in cased.encode("[CLS] [SEP]") and 2 not in cased.encode("[CLS] [SEP]")


@pytest.mark.parametrize(
    ("processor", "around"),
    [
        (None, (None, None)),
        ({"type": "ByteLevel"}, (None, None)),
        ({"type": "TemplateProcessing", "single": []}, (None, None)),
        ({"type": "TemplateProcessing", "single": [1, 2, 3]}, (None, None)),
        ({"type": "BertProcessing", "cls": [], "sep": None}, (None, None)),
        ({"type": "BertProcessing", "cls": ["[UNSEEN]", 9], "sep": ["[SEP]", 2]}, (None, 2)),
        (
            {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                    {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
                ],
            },
            (1, 2),
        ),
    ],
)
def test_what_stands_around_a_text_is_read_from_either_kind_of_rule(
    tmp_path: Path, processor: object, around: tuple[int | None, int | None]
) -> None:
    tokenizer = small(tmp_path, _set("post_processor", to=processor))
    assert (tokenizer.bos_id, tokenizer.eos_id) == around


@pytest.mark.parametrize(
    "change",
    [
        _set("model", "unk_token", to="[NONE]"),
        _set("model", "unk_token", to=None),
        _set("model", "unk_token", to=5),
        _drop("model", "unk_token"),
        _set("model", "max_input_chars_per_word", to=10**9),
        _set("model", "max_input_chars_per_word", to=0),
        _set("model", "max_input_chars_per_word", to="100"),
        _set("model", "max_input_chars_per_word", to=True),
        _set("model", "continuing_subword_prefix", to=5),
        _set("model", "vocab", to=[]),
        _drop("model", "vocab"),
        _set("model", "vocab", "##b", to=3),
        _set("model", "vocab", "##b", to=1),
        _set("model", "vocab", "##b", to=-1),
        _set("model", "vocab", "##b", to=1 << 21),
        _set("model", "vocab", "##b", to="4"),
        _set("model", "type", to="Unigram"),
        _set("model", "type", to=["WordPiece"]),
        _set("normalizer", to={"type": "Precompiled", "precompiled_charsmap": "x"}),
        _set("normalizer", to={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}),
        _set("normalizer", to={"type": "BertNormalizer"}),
        _set("normalizer", to={"type": "BertNormalizer", "clean_text": "x"}),
        _set("normalizer", to="BertNormalizer"),
        _set("pre_tokenizer", to={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}),
        _set("pre_tokenizer", to={"type": "evil.PreTokenizer"}),
        _set("added_tokens", to=[{"id": 3, "content": "x"}]),
        _set("added_tokens", to="x"),
    ],
)
def test_a_hostile_file_is_a_typed_error(tmp_path: Path, change: Change) -> None:
    with pytest.raises((ModelFileError, UnsupportedError)) as caught:
        small(tmp_path, change)
    assert isinstance(caught.value, AylluError) and str(caught.value).isprintable()


def test_words_up_to_the_longest_allowed_take_bounded_time(tmp_path: Path) -> None:
    tokenizer = small(tmp_path, _set("model", "max_input_chars_per_word", to=1000))
    assert tokenizer.encode("a" + "b" * 999) == [3, *[4] * 999]
    assert tokenizer.encode("a" + "b" * 1000) == [0]
    assert tokenizer.encode(("a" * 1000 + " ") * 300) == [0] * 300
