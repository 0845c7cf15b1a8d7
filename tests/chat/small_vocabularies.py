"""Small vocabularies made on the spot, written in each of the three forms ayllu reads.

One byte-level BPE is trained on a few lines of mixed text; the same tokens then serve as `tokenizer.json`,
as GGUF metadata and as a tiktoken file, so that the three readers can be held against each other.
"""

from __future__ import annotations

import base64
import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from ayllu.chat.bpe_vocabulary import BYTE_OF_CHARACTER
from ayllu.chat.pretokenizers import PATTERNS

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's what we've said, and they'll say THE SAME.",
    "def encode(self, text: str) -> list[int]:\n    return [self.table[c] for c in text]  # 12345\n",
    "日本語の文章をトークンに分けます。吾輩は猫である。名前はまだ無い。東京都は日本の首都です。",
    "😀😃👩‍👩‍👧‍👦🇯🇵 café cafe\u0301 Straße ÀÉÎ ñandú Привет мир مرحبا",
    "import numpy as np\r\nfor i in range(10):\r\n\tprint(i, i ** 2)\r\n\r\n",
    "   spaces    and\t\ttabs \n\n\n  mixed \r\n lines 1 22 333 4444 55555",
] * 4

SAMPLES = [
    "",
    " ",
    "Hello, world! It's 2026; we've got 1,234,567 tokens.",
    "日本語の文章、そして英語 mixed 文章です。「括弧」も。",
    "def f(x):\n\treturn x**2  # comment\n\n\nclass A:\n    pass\n",
    "😀👩‍👩‍👧‍👦🇯🇵🏴󠁧󠁢󠁥󠁮󠁧󠁿 emoji",
    "cafe\u0301 vs café, が vs が",
    "line one\r\nline two\rline three\n\n",
    "  leading and trailing   ",
    "a    b\t\tc \n \n d",
    "Ünïcödé ǅ ʰ ªº ½ ² Ⅷ ٣ 123abc456",
    "'S 's 'LL don'T I'VE",
    'https://example.org/a/b?c=d&e=f#g <b>bold</b> </s> {"k": [1, 2.5e-3]}',
    "x" * 3000,
    " " * 3000 + "end",
    "あ" * 1000,
    "\u00a0\u3000\u2028\u0085 odd spaces\u200b",
]

CHAT_SPECIALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
CHAT_TEXT_TOKENS = ["<tool_call>", "</tool_call>"]


@cache
def trained(pre: str, size: int = 700) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Tokens in id order and merges of a byte-level BPE trained behind the split `pre`."""
    steps: list[Any] = [pre_tokenizers.Split(Regex(p), "isolated") for p in PATTERNS[pre]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tuple(tokens), tuple((left, right) for left, right in model["merges"])


def gguf_metadata(pre: str = "qwen2") -> dict[str, object]:
    """GGUF metadata of the trained vocabulary with chat specials, text tokens and two unused slots."""
    tokens, merges = trained(pre)
    extra = [*CHAT_SPECIALS, *CHAT_TEXT_TOKENS, "[PAD0]", "[PAD1]"]
    types = [1] * len(tokens) + [3] * 3 + [4] * 2 + [5] * 2
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, *extra],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": len(tokens) + 2,
        "tokenizer.ggml.eos_token_id": len(tokens) + 1,
        "tokenizer.ggml.add_bos_token": False,
    }


def json_document(pre: str = "qwen2") -> dict[str, Any]:
    """The same vocabulary as the contents of a `tokenizer.json`, without the unused slots."""
    tokens, merges = trained(pre)
    first = len(tokens)
    steps: list[Any] = [
        {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
        for p in PATTERNS[pre]
    ]
    steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False})
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": first + place, "content": name, "special": name in CHAT_SPECIALS, **flags}
        for place, name in enumerate([*CHAT_SPECIALS, *CHAT_TEXT_TOKENS])
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False},
        "model": {
            "type": "BPE",
            "vocab": {token: place for place, token in enumerate(tokens)},
            "merges": [list(merge) for merge in merges],
            "byte_fallback": False,
            "ignore_merges": pre in ("llama4", "llama-bpe"),
        },
    }


def write_model_folder(folder: Path, pre: str = "qwen2") -> Path:
    """A model folder with `tokenizer.json` and the config files beside it."""
    first = len(trained(pre)[0])
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Any] = {
        "tokenizer.json": json_document(pre),
        "tokenizer_config.json": {"bos_token": None, "eos_token": {"content": "<|im_end|>"}},
        "generation_config.json": {"eos_token_id": [first + 1, first + 2], "bos_token_id": first + 2},
        "config.json": {"vocab_size": first + 40, "eos_token_id": first + 1},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def token_bytes(token: str) -> bytes:
    return bytes(BYTE_OF_CHARACTER[character] for character in token)


def tiktoken_lines(pre: str = "llama4") -> list[bytes]:
    return [
        base64.b64encode(token_bytes(token)) + b" " + str(rank).encode()
        for rank, token in enumerate(trained(pre)[0])
    ]


def write_tiktoken(folder: Path) -> Path:
    """A folder with the trained vocabulary as `tokenizer.model`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(b"\n".join(tiktoken_lines()) + b"\n")
    return folder


def sentencepiece_pieces() -> list[str]:
    """Multi-character pieces, best first, over the characters of `sentencepiece_metadata`."""
    words = [
        "▁t",
        "he",
        "▁the",
        "in",
        "▁a",
        "an",
        "▁an",
        "▁in",
        "▁in▁",
        "er",
        "▁▁",
        "日本",
        "日本語",
        "▁c",
        "at",
    ]
    return [*words, "▁cat", "ab", "aba", "bab", "abab", "▁▁▁▁", "s>", "</", "<s"]


def sentencepiece_metadata(*, add_space_prefix: bool = True) -> dict[str, object]:
    """GGUF metadata of a hand-made SentencePiece BPE vocabulary with all byte tokens."""
    specials = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = sentencepiece_pieces()
    characters = sorted(set("".join(pieces)) | set("abcdefghijklmnopqrstuvwxyz.,"))
    tokens = [*specials, *byte_tokens, *pieces, *characters]
    scores = [0.0] * 259 + [-float(place) for place in range(len(pieces) + len(characters))]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(pieces) + len(characters))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": add_space_prefix,
    }


def sentencepiece_json() -> dict[str, Any]:
    """The same vocabulary as Llama 2's `tokenizer.json` spells it (Prepend, Replace, byte fallback)."""
    metadata = sentencepiece_metadata()
    tokens: Any = metadata["tokenizer.ggml.tokens"]
    vocab = {token: place for place, token in enumerate(tokens)}
    merges = []
    for piece in sentencepiece_pieces():
        cuts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        found = [(left, right) for left, right in cuts if left in vocab and right in vocab]
        merges += [list(pair) for pair in sorted(found, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": place, "content": tokens[place], **flags} for place in range(3)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "ByteFallback"},
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": merges,
            "unk_token": "<unk>",
            "byte_fallback": True,
        },
    }
