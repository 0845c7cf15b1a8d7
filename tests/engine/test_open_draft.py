"""A draft model beside a model: the same answers, one memory plan, and a refusal of another vocabulary."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ayllu.chat.messages import user_message
from ayllu.chat.tokenizer import load_tokenizer
from ayllu.engine import open_native
from ayllu.engine.core import EngineCore
from ayllu.engine.native import open_engine
from ayllu.engine.open_core import open_core
from ayllu.engine.options import EngineOptions
from ayllu.engine.parameters import Sampling
from ayllu.engine.prepared import PreparedRequest
from ayllu.engine.reply import Reply
from ayllu.engine.requests import ChatPrompt, GenerateRequest
from ayllu.errors import NoSpaceError, UsageError
from ayllu.kernels.native.library import native_is_built
from ayllu.weights.hf_save import save_folder
from tests.chat.small_vocabularies import write_tiktoken
from tests.engine.cores import run, tokens_of
from tests.model.tiny import tiny_llama, tiny_qwen2
from tests.weights.small_checkpoints import random_checkpoint

RUNNERS = ["native", "torch"]
SIZES: dict[str, Any] = {"context": 200, "slots": 3, "step_tokens": 64, "device": "cpu"}

PROMPTS = [[5, 6, 7, 8, 9], [11, 12, 13] * 12, list(range(40, 100))]


def model(folder: Path, *, seed: int, tiny: Any = tiny_llama, **changes: Any) -> Path:
    """A folder with a small random model and the vocabulary that all of them share."""
    vocabulary = load_tokenizer(write_tiktoken(folder))
    config = replace(tiny(), vocab_size=vocabulary.vocab_size, **changes)
    save_folder(random_checkpoint(config, seed=seed), folder / "model")
    return write_tiktoken(folder / "model")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return model(tmp_path / "target", seed=1)


def opened(path: Path, **options: Any) -> EngineCore:
    core = open_core(path, EngineOptions(**SIZES | options))
    assert isinstance(core, EngineCore)
    return core


def answers(core: EngineCore, sampling: Sampling, new_tokens: int = 60) -> list[list[int]]:
    """Of all prompts at once."""
    for number, prompt in enumerate(PROMPTS):
        core.submit(
            PreparedRequest(id=str(number), token_ids=prompt, max_new_tokens=new_tokens, sampling=sampling)
        )
    said = run(core)
    return [tokens_of(said, str(number)) for number in range(len(PROMPTS))]


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=1, seed=4)])
@pytest.mark.parametrize("drafts", ["the same model", "another", "of another kind"])
def test_answers_equal_those_without_speculation(
    runner: str, sampling: Sampling, drafts: str, target: Path, tmp_path: Path
) -> None:
    if drafts == "the same model":
        draft = target
    elif drafts == "another":
        draft = model(tmp_path / "draft", seed=9)
    else:
        draft = model(tmp_path / "draft", seed=9, tiny=tiny_qwen2)
    options: dict[str, Any] = {"runner": runner}
    if runner == "torch":
        # In bfloat16, rows computed together round otherwise than alone, and random logits are close.
        options["dtype"] = "float32"
    alone = opened(target, speculate="off", **options)
    expected = answers(alone, sampling)
    assert alone.stats().drafted == 0
    drafting = opened(target, draft_model=draft, **options)
    assert answers(drafting, sampling) == expected
    stats = drafting.stats()
    assert stats.drafted > 0 and stats.failed == 0
    if drafts == "the same model" and sampling.temperature == 0:
        # Not all: some are looked up in the text, and those are guesses.
        assert stats.accepted > stats.drafted / 2
    assert drafting.facts.facts["draft_model"] == draft.name


def test_a_draft_model_with_another_vocabulary_is_refused(target: Path, tmp_path: Path) -> None:
    draft = model(tmp_path / "draft", seed=9)
    file = draft / "tokenizer.model"
    lines = file.read_bytes().splitlines()
    lines[300], lines[301] = (
        b" ".join([lines[301].split()[0], lines[300].split()[1]]),
        b" ".join([lines[300].split()[0], lines[301].split()[1]]),
    )
    file.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(UsageError, match=r"model has another vocabulary .* token 300 is"):
        opened(target, draft_model=draft)


def test_an_embedding_model_is_no_draft_model(target: Path, minilm_folder: Path) -> None:
    with pytest.raises(UsageError, match="embedding model: it cannot draft"):
        opened(target, draft_model=minilm_folder)


def test_a_draft_model_reads_as_far_as_it_can_and_no_further(target: Path, tmp_path: Path) -> None:
    draft = model(tmp_path / "draft", seed=1, max_position_embeddings=80)
    drafting = opened(target, draft_model=draft, speculate="draft")
    assert answers(drafting, Sampling(temperature=0), 120) == answers(
        opened(target, speculate="off"), Sampling(temperature=0), 120
    )
    assert drafting.facts.context == 200


@pytest.mark.skipif(not native_is_built(), reason="this installation has no native runner")
def test_both_models_fit_together_into_what_is_free(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = model(tmp_path / "draft", seed=9)
    facts = opened(target, draft_model=draft).facts.facts
    total, of_draft = facts["total_bytes"], facts["draft_bytes"]
    assert isinstance(total, int) and isinstance(of_draft, int)
    assert total == of_draft + opened(target, speculate="off").facts.facts["total_bytes"]
    monkeypatch.setattr(open_native, "free_memory", lambda: total)
    assert opened(target, draft_model=draft).facts.facts["total_bytes"] == total
    monkeypatch.setattr(open_native, "free_memory", lambda: total - 1)
    with pytest.raises(NoSpaceError, match=r"\+ draft model .* is free"):
        opened(target, draft_model=draft)
    opened(target, speculate="off")


@pytest.mark.large
def test_a_coder_model_answers_the_same_with_its_little_sister_drafting(
    qwen15_gguf: Path, qwen05_gguf: Path
) -> None:
    question = "Write a Python function that returns the n-th Fibonacci number, with a docstring."
    found = []
    for options in (EngineOptions(context=1024, slots=1, speculate="off"), None):
        options = options or EngineOptions(context=1024, slots=1, draft_model=qwen05_gguf)
        with open_engine(qwen15_gguf, options) as engine:
            request = GenerateRequest(
                prompt=ChatPrompt((user_message(question),)),
                sampling=Sampling(temperature=0),
                max_new_tokens=160,
            )
            found.append("".join(Reply(engine.submit(request))))
            stats = engine.stats()
    assert found[0] == found[1]
    # How many depends on how fast this machine is at what.
    assert stats.drafted >= stats.accepted > 0
