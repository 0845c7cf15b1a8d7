"""Real weights against an independent dequantise-and-run: transformers reads the same GGUF its own way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ayllu.engine.model_files import tokenizer_for
from ayllu.engine.oracle import Oracle
from ayllu.engine.parameters import Sampling
from ayllu.weights.checkpoint import open_checkpoint
from ayllu.weights.load import load_decoder

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "日本で一番高い山は",
    "Q: What is 17 + 25?\nA:",
    "import numpy as np\n\nx = np.",
    "The three primary colours are",
    "SELECT name, age FROM",
    "Dear Sir or Madam,\n\nI am writing to",
    '{"name": "Alice", "age": 30, "city":',
]


def _compare_with_transformers(gguf: Path) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = open_checkpoint(gguf)
    tokenizer = tokenizer_for(checkpoint)
    theirs = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
    ).eval()
    oracle = Oracle(load_decoder(checkpoint, dtype=torch.float32))
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        answer = list(oracle.generate(ids, Sampling(temperature=0), max_new_tokens=64))
        with torch.inference_mode():
            expected = theirs(torch.tensor([ids + answer])).logits[0, len(ids) - 1 :]
            # Their likeliest token after each prefix is ours, so their greedy answer is ours.
            assert expected[:-1].argmax(-1).tolist() == answer
            torch.testing.assert_close(oracle.prefill(ids), expected[0], atol=1e-3, rtol=0)
            torch.testing.assert_close(oracle.prefill(ids + answer), expected[-1], atol=1e-3, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_smollm2_logits_and_64_greedy_tokens_equal_transformers(smollm2_gguf: Path) -> None:
    _compare_with_transformers(smollm2_gguf)


@pytest.mark.large
@pytest.mark.filterwarnings("ignore")
def test_qwen_logits_and_64_greedy_tokens_equal_transformers(qwen05_gguf: Path) -> None:
    _compare_with_transformers(qwen05_gguf)
