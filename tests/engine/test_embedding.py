"""Texts to vectors: the real model against transformers, batches that change nothing, limits that are told.

The independent side is put together from transformers alone, as sentence-transformers does it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ayllu.engine.embedding import (
    EmbeddingModel,
    length_batches,
    open_embedding_model,
    open_embedding_tokenizer,
    unit_length,
)
from ayllu.errors import ContextOverflowError, ModelFileError, UsageError

TEXTS = (
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "A monkey is playing drums.",
    "",
    "東京は日本の首都です。😀",
    "word " * 200,
    "The quick brown fox jumps over the lazy dog. " * 20,
)


@pytest.fixture(scope="module")
def model(minilm_folder: Path) -> EmbeddingModel:
    return open_embedding_model(minilm_folder, device="cpu")


@pytest.fixture(scope="module")
def theirs(minilm_folder: Path) -> Any:
    """What sentence-transformers computes, put together from transformers alone: text -> ids -> BertModel ->
    mean of the tokens' states -> unit length."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder)
    bert = transformers.BertModel.from_pretrained(minilm_folder, attn_implementation="eager").eval()

    def embed(texts: Sequence[str], *, normalise: bool = True, length: int = 256) -> tuple[Any, np.ndarray]:
        encoded = tokenizer(
            list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        with torch.no_grad():
            hidden = bert(**encoded).last_hidden_state
        mask = encoded["attention_mask"].unsqueeze(-1).float()
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        ids = [
            row[keep.bool()].tolist() for row, keep in zip(encoded["input_ids"], mask[..., 0], strict=True)
        ]
        return ids, (mean / mean.norm(dim=1, keepdim=True) if normalise else mean).numpy()

    return embed


@pytest.mark.parametrize("normalise", [True, False])
def test_the_vectors_of_the_real_model_equal_transformers(
    model: EmbeddingModel, theirs: Any, normalise: bool
) -> None:
    ids, expected = theirs(TEXTS, normalise=normalise)
    assert [model.encode(text) for text in TEXTS] == ids
    got = model.embed(ids, normalise=normalise)
    assert (got.shape, got.dtype, model.width) == ((len(TEXTS), 384), np.float32, 384)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_the_first_numbers_of_a_sentence_are_the_published_ones(model: EmbeddingModel) -> None:
    """The example of the model's card, as many programs print it."""
    (vector,) = model.embed([model.encode("This is an example sentence")])
    np.testing.assert_allclose(vector[:4], [0.0676, 0.0635, 0.0487, 0.0793], atol=1e-4)


def test_alike_sentences_are_nearer_than_others(model: EmbeddingModel) -> None:
    vectors = model.embed([model.encode(text) for text in TEXTS[:4]])
    assert vectors[0] @ vectors[1] > 0.7 > 0.3 > vectors[0] @ vectors[3]


@settings(max_examples=20)
@given(
    st.lists(st.integers(0, 120), min_size=1, max_size=12),
    st.integers(1, 600),
    st.randoms(use_true_random=False),
)
def test_order_and_neighbours_change_nothing(
    minilm_folder: Path, model: EmbeddingModel, lengths: list[int], batch_tokens: int, random: Any
) -> None:
    inputs = [[101, *(random.randrange(1000, 30_000) for _ in range(n)), 102] for n in lengths]
    alone = np.concatenate([model.embed([token_ids]) for token_ids in inputs])
    order = random.sample(range(len(inputs)), len(inputs))
    small = open_embedding_model(minilm_folder, device="cpu", batch_tokens=batch_tokens)
    for other in (model, small):
        shuffled = other.embed([inputs[index] for index in order])
        np.testing.assert_allclose(shuffled, alone[order], rtol=0, atol=1e-5)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_batches_hold_every_input_once_and_stay_within_the_bound(lengths: list[int], bound: int) -> None:
    batches = list(length_batches(lengths, bound))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * longest <= bound
    in_order = [lengths[index] for batch in batches for index in batch]
    assert in_order == sorted(lengths, reverse=True)


def test_no_inputs_give_no_vectors(model: EmbeddingModel) -> None:
    assert model.embed([]).shape == (0, 384)


def test_unit_length_is_an_option(model: EmbeddingModel) -> None:
    ids = [model.encode(text) for text in TEXTS]
    plain, unit = model.embed(ids, normalise=False), model.embed(ids)
    lengths = np.linalg.norm(plain, axis=1)
    assert np.abs(lengths - 1).min() > 0.01
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(plain / lengths[:, None], unit, atol=1e-6)


def test_a_text_that_is_too_long_is_refused_with_the_limit_and_cut_only_if_asked(
    model: EmbeddingModel, theirs: Any
) -> None:
    fits, long = "word " * 254, "word " * 255
    assert len(model.encode(fits)) == model.context == 256
    with pytest.raises(ContextOverflowError, match=r"has 257 tokens; .* reads at most 256\..* up to 512"):
        model.encode(long)
    cut = model.encode(long, truncate=True)
    ids, expected = theirs([long])
    assert [cut] == ids and cut == model.encode(fits)
    np.testing.assert_allclose(model.embed([cut]), expected, rtol=0, atol=1e-5)
    assert model.encode("short", truncate=True) == model.encode("short")


def test_a_context_up_to_the_networks_positions_can_be_asked_for(minilm_folder: Path, theirs: Any) -> None:
    model = open_embedding_model(minilm_folder, context=512, device="cpu")
    ids, expected = theirs(["word " * 510, "short"], length=512)
    assert [model.encode("word " * 510), model.encode("short")] == ids and len(ids[0]) == 512
    np.testing.assert_allclose(model.embed(ids), expected, rtol=0, atol=1e-5)
    with pytest.raises(ContextOverflowError, match=r"513 tokens; .* at most 512\. [^0-9]*$"):
        model.encode("word " * 511)
    for context in (0, 2, 513):
        with pytest.raises(UsageError, match="3 to 512"):
            open_embedding_tokenizer(minilm_folder, context=context)


@pytest.mark.parametrize(
    ("token_ids", "error"),
    [
        ([], UsageError),
        ([-1], UsageError),
        ([101, 30_522, 102], UsageError),
        ([101] * 257, ContextOverflowError),
    ],
)
def test_ids_from_elsewhere_are_checked_before_anything_is_computed(
    model: EmbeddingModel, token_ids: list[int], error: type[Exception]
) -> None:
    with pytest.raises(error):
        model.embed([[101, 102], token_ids])


def test_what_a_text_spells_is_never_a_special_token(model: EmbeddingModel) -> None:
    ids = model.encode("[SEP] [CLS] [PAD]")
    assert (ids[0], ids[-1]) == (101, 102)
    assert not {0, 101, 102} & set(ids[1:-1])


def test_half_precision_is_near(minilm_folder: Path, model: EmbeddingModel) -> None:
    half = open_embedding_model(minilm_folder, device="cpu", dtype="bfloat16")
    assert (model.dtype, half.dtype) == ("float32", "bfloat16")
    assert half.weight_bytes * 2 == model.weight_bytes == model.facts["weight_bytes"]
    ids = [model.encode(text) for text in TEXTS]
    assert (model.embed(ids) * half.embed(ids)).sum(1).min() > 0.99


def test_cls_pooling_takes_the_first_state(minilm_folder: Path, tmp_path: Path) -> None:
    import json

    for file in minilm_folder.iterdir():
        (tmp_path / file.name).hardlink_to(file.resolve())
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    model = open_embedding_model(tmp_path, device="cpu")
    ids = model.encode("A man is eating food.")
    with torch.inference_mode():
        hidden = model._encoder(torch.tensor([ids]), torch.tensor([len(ids)]))
    np.testing.assert_allclose(model.embed([ids], normalise=False)[0], hidden[0, 0].numpy(), atol=1e-6)


def test_a_tokenizer_that_does_not_say_what_stands_around_a_text_is_refused(
    minilm_folder: Path, tmp_path: Path
) -> None:
    import json

    for file in minilm_folder.iterdir():
        if file.name != "tokenizer.json":
            (tmp_path / file.name).hardlink_to(file.resolve())
    root = json.loads((minilm_folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(root | {"post_processor": None}))
    with pytest.raises(ModelFileError, match="post_processor"):
        open_embedding_tokenizer(tmp_path)


def test_a_vector_of_no_length_stays_as_it_is() -> None:
    assert torch.equal(unit_length(torch.zeros(3)), torch.zeros(3))


def test_texts_are_tokenized_without_torch_and_the_model_names_the_extra(minilm_folder: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from ayllu.engine.embedding import open_embedding_model, open_embedding_tokenizer\n"
        "from ayllu.errors import MissingExtraError\n"
        "tokenizer = open_embedding_tokenizer(Path(sys.argv[1]))\n"
        "print(tokenizer.context, tokenizer.encode('hello world'))\n"
        "try: open_embedding_model(Path(sys.argv[1]))\n"
        "except MissingExtraError as error: print(error.fix)\n"
    )
    command = [sys.executable, "-c", code, str(minilm_folder)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert answer == "256 [101, 7592, 2088, 102]\nInstall it: pip install 'ayllu[torch]'\n"


def _ayllu(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ayllu", *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | environment,
        check=False,
    )


def test_the_commands_know_an_embedding_model(minilm_folder: Path) -> None:
    shown = _ayllu("show", "all-minilm-l6-v2")
    assert shown.returncode == 0, shown.stderr
    for said in (
        "22,565,376",
        "bert",
        "256 of at most 512",
        "384 numbers, the mean",
        "Apache-2.0",
        "0.09 GB",
    ):
        assert said in shown.stdout
    assert "all-minilm-l6-v2" in _ayllu("list").stdout
    refused = _ayllu("chat", "all-minilm-l6-v2", "-p", "hello")
    assert refused.returncode in (2, 4), refused.stderr
    assert "makes vectors of texts" in refused.stderr and refused.stderr.count("\n") == 1
