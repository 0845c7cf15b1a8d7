"""A GGUF's vocabulary written as tokenizer.json is the same vocabulary, to us and to transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ayllu.chat.tokenizer import load_tokenizer, tokenizer_from_gguf
from ayllu.chat.tokenizer_export import tokenizer_files
from ayllu.errors import UnsupportedError
from ayllu.weights.checkpoint import open_checkpoint
from ayllu.weights.gguf_vocabulary import pre_tokenizer_name
from tests.chat.small_vocabularies import gguf_metadata, sentencepiece_metadata

TEXTS = ["Hello, world!  12345", "日本語のテキスト。", "def f(x):\n    return x ** 2\n", "🙂 <|im_end|> é"]


@pytest.mark.filterwarnings("ignore")
def test_smollm2_from_gguf_to_json_keeps_every_id(smollm2_gguf: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    checkpoint = open_checkpoint(smollm2_gguf)
    original = tokenizer_from_gguf(checkpoint.metadata, checkpoint.path)
    template = checkpoint.metadata["tokenizer.chat_template"]
    for name, text in tokenizer_files(original, template).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    written = load_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert written.encode(text) == original.encode(text)
        assert written.encode_trusted(text) == original.encode_trusted(text)
        assert theirs.encode(text, add_special_tokens=False) == original.encode_trusted(text)
        assert written.decode(written.encode(text)) == text
    assert (written.bos_id, written.eos_id, written.stop_ids) == (
        original.bos_id,
        original.eos_id,
        original.stop_ids,
    )
    assert dict(written.specials) == dict(original.specials)
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == template


@pytest.mark.parametrize("pre", ["qwen2", "smollm", "llama-bpe"])
def test_small_vocabularies_survive(pre: str, tmp_path: Path) -> None:
    original = tokenizer_from_gguf(gguf_metadata(pre), Path("m.gguf"))
    for name, text in tokenizer_files(original).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    written = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert written.encode(text) == original.encode(text)
        assert written.encode_trusted(text) == original.encode_trusted(text)
    document = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert pre_tokenizer_name(document) == pre


def test_other_vocabularies_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="byte-level"):
        tokenizer_files(tokenizer_from_gguf(sentencepiece_metadata(), Path("m.gguf")))
