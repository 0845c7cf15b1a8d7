"""A tokenizer whose encoder is built by the first text: in everything else the one built at once."""

from __future__ import annotations

from pathlib import Path

from ayllu.chat.tokenizer import tokenizer_from_gguf
from ayllu.weights.checkpoint import open_checkpoint


def test_a_deferred_tokenizer_gives_the_same_bytes_and_ids(smollm2_gguf: Path) -> None:
    metadata = open_checkpoint(smollm2_gguf).metadata
    deferred = tokenizer_from_gguf(metadata, smollm2_gguf, deferred=True)
    whole = tokenizer_from_gguf(metadata, smollm2_gguf)
    assert (deferred.specials, deferred.stop_ids, deferred.vocab_size) == (
        whole.specials, whole.stop_ids, whole.vocab_size,
    )  # fmt: skip
    some = range(0, whole.vocab_size, 37)
    assert [deferred.token_bytes(token) for token in some] == [whole.token_bytes(token) for token in some]
    text = "Twelve 12 stones, <|im_end|> and 石."
    assert deferred.encode(text) == whole.encode(text)
    assert deferred.encode_trusted(text) == whole.encode_trusted(text)
