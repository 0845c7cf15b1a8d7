"""Whatever else the native runner computes at the same time, a request gets the bits it would get alone.

Random mixes as in `test_core_exactness`: lengths, arrival, priorities, tenants, shared beginnings, images,
adapters, n answers, caches so small that requests are preempted, steps so small that prompts come in pieces;
and drafts besides, right and wrong ones. Log-probabilities are compared exactly, so tokens follow.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from ayllu.engine.block_cache import BlockCache
from ayllu.engine.core import EngineCore, Said
from ayllu.engine.events import PromptScored
from ayllu.engine.native_runner import NativeRunner
from ayllu.engine.parameters import Sampling
from ayllu.engine.prepared import CoreFacts, EmbeddingsReady, PreparedEmbedding, PreparedRequest
from ayllu.engine.scheduler import Scheduler
from ayllu.engine.sequence import Sequence as EngineSequence
from ayllu.engine.speculation import Speculation
from ayllu.errors import ContextOverflowError
from ayllu.model.config import ModelConfig
from ayllu.weights.adapter import Adapter, read_adapter
from ayllu.weights.checkpoint import Checkpoint
from tests.engine.cores import STOP_ID, TOKENIZER, all_blocks_free, run
from tests.engine.native_models import NativeModel, native_model, saved, step
from tests.engine.small_adapters import write_adapter
from tests.engine.test_core_exactness import _images, _prompt
from tests.engine.test_speculation import Always, Answer, Scripted, answer_of
from tests.kernels.native_blocks import SETS
from tests.model.tiny import tiny_llama, tiny_llama4, tiny_qwen2

GREEDY = Sampling(temperature=0)
MIXES = 24
CONFIGS: dict[str, ModelConfig] = {
    "llama": tiny_llama(),
    "qwen2": tiny_qwen2(),
    "llama4-step1": tiny_llama4(layers=4, vision=True),
    "llama4-step2": tiny_llama4(layers=4, expert_step=2, qk_norm=False, top_k=2),
}


@dataclass
class Family:
    """One architecture in three precisions, and two adapters."""

    checkpoints: list[Checkpoint]
    adapters: dict[str, Adapter]

    def core(
        self,
        *,
        encoding: int = 0,
        slots: int = 4,
        step_tokens: int = 60,
        blocks: dict[str, int] | None = None,
        block_tokens: int = 4,
        prefix_cache: bool = True,
        threads: int = 1,
        int8: bool = False,
        instructions: str | None = None,
        speculation: Speculation | None = None,
    ) -> EngineCore:
        """A core of stated sizes. blocks None: more than anybody needs."""
        model = native_model(
            self.checkpoints[encoding], block_tokens=block_tokens, tokens=1024, threads=threads,
            instructions=instructions, int8=int8,
        )  # fmt: skip
        counts = [model.blocks if blocks is None else blocks[group.name] for group in model.groups]
        for name, adapter in self.adapters.items():
            model.runner.adapters.load(name, adapter)
        return EngineCore(
            model.config,
            TOKENIZER.with_embedding_rows(97),
            model.runner,
            Scheduler(
                BlockCache(model.groups, counts, model.block_tokens, remembers=prefix_cache),
                slots=slots, step_tokens=step_tokens, waiting=1000,
            ),
            model.runner.adapters,
            facts=CoreFacts(context=256, slots=slots, reads_images=False, vocab_size=97),
            model_identity="tiny",
            speculation=speculation,
        )  # fmt: skip

    def alone(self, request: PreparedRequest, **options: object) -> list[Answer]:
        """The answers to a request that has a roomy core to itself."""
        core = self.core(prefix_cache=False, **options)  # type: ignore[arg-type]
        core.submit(request)
        said = run(core)
        return [answer_of(said, request.id, index) for index in range(request.n)]


@pytest.fixture(scope="module", params=list(CONFIGS))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    config = CONFIGS[request.param]
    folder: Path = tmp_path_factory.mktemp("family")
    # GGUF keeps no image tower, and a folder no 4-bit weights.
    suffix, encodings = ("", ("F32", "F16", "BF16")) if config.vision else (".gguf", ("F32", "Q4_0", "BF16"))
    checkpoints = [saved(config, folder / f"{encoding}{suffix}", encoding=encoding) for encoding in encodings]
    adapters = {}
    for seed, name in enumerate(("one", "two")):
        # The file's config: GGUF has another rotary layout.
        written = write_adapter(folder / name, config, seed)
        adapters[name] = read_adapter(written, checkpoints[0].config)
    return Family(checkpoints, adapters)


def _requests(source: random.Random, config: ModelConfig) -> list[PreparedRequest]:
    shared = [source.randrange(90) for _ in range(60)]
    images = _images(source, config)
    made = []
    for number in range(source.randint(2, 9)):
        tokens, chosen = _prompt(source, config, shared, images)
        greedy = source.random() < 0.5
        made.append(
            PreparedRequest(
                id=str(number),
                token_ids=tokens,
                images=chosen,
                max_new_tokens=source.choice((1, 2, 9, source.randint(1, 24))),
                sampling=GREEDY if greedy else Sampling(temperature=1.0, seed=source.randrange(99)),
                stop_ids=frozenset({STOP_ID}) if source.random() < 0.5 else frozenset(),
                n=source.choice((1, 1, 1, 2)),
                adapter=source.choice((None, None, "one", "two")),
                priority=source.randint(-4, 4),
                tenant=source.choice(("", "a", "b")),
                logprobs=2,
            )
        )
    return made


def _drafts(source: random.Random, expected: dict[str, list[Answer]]) -> Speculation | None:
    """Nothing, or drafts of which some are right: what the request alone said, with mistakes."""
    right = source.choice((0.0, 0.7, 1.0, None))
    if right is None:
        return None
    answers = [answer for each in expected.values() for answer in each]

    def propose(sequence: EngineSequence, most: int) -> list[int]:
        done = len(sequence.tokens) - sequence.prompt_tokens
        said = tuple(sequence.tokens[sequence.prompt_tokens :])
        known = next((answer.tokens for answer in answers if answer.tokens[:done] == said), ())
        draft = [*known, *range(50)][done : done + most]
        return [token if source.random() < right else (token + 1) % STOP_ID for token in draft]

    return Always(Scripted(propose), most_drafted=source.choice((1, 3, 9)))


@pytest.mark.parametrize("mix", range(MIXES))
def test_any_mix_of_requests_gets_the_answers_of_each_alone(family: Family, mix: int) -> None:
    source = random.Random(mix)
    same = {
        "encoding": source.choice((0, 0, 1, 2)),
        "block_tokens": source.choice((1, 2, 4, 8)),
        "int8": source.random() < 0.3,
        "instructions": source.choice(SETS),
    }
    requests = _requests(source, family.checkpoints[0].config)
    expected = {request.id: family.alone(request, **same) for request in requests}
    slots = source.randint(1, 6)
    core = family.core(
        slots=slots,
        step_tokens=slots + source.choice((0, 3, 8, 30)),
        # As little as one request needs, or a little more: then they drive each other out.
        blocks={
            "global": source.randint(96, 150) // same["block_tokens"],
            "chunk 8": source.randint(8, 30) // same["block_tokens"],
        },
        prefix_cache=source.random() < 0.8,
        threads=1 if source.random() < 0.8 else 2,
        speculation=_drafts(source, expected),
        **same,
    )
    said = _submit_and_run(core, requests, source)
    for request in requests:
        for index in range(request.n):
            assert answer_of(said, request.id, index) == expected[request.id][index]
    assert all_blocks_free(core)
    assert core.open_requests == 0


def _submit_and_run(core: EngineCore, requests: Sequence[PreparedRequest], source: random.Random) -> Said:
    said: Said = []
    for request in requests:
        core.submit(request)
        for _ in range(source.choice((0, 0, 1, 4))):
            said += core.step()
    return said + run(core)


def test_a_prompt_too_long_for_the_blocks_is_refused(family: Family) -> None:
    core = family.core(blocks={"global": 4, "chunk 8": 2})
    with pytest.raises(ContextOverflowError):
        core.submit(PreparedRequest(id="long", token_ids=[1] * 40, max_new_tokens=4))


def test_preempted_requests_get_the_answers_of_each_alone(family: Family) -> None:
    requests = [
        PreparedRequest(
            id=str(n), token_ids=[n + 1] * 8, max_new_tokens=24, sampling=GREEDY, n=1 + n % 2, logprobs=0
        )
        for n in range(5)
    ]
    core = family.core(slots=5, blocks={"global": 16, "chunk 8": 10}, prefix_cache=False)
    said = _submit_and_run(core, requests, random.Random(0))
    assert core.stats().preempted > 3
    for request in requests:
        found = [answer_of(said, request.id, index) for index in range(request.n)]
        assert found == family.alone(request)
    assert all_blocks_free(core)


def test_a_prefix_from_the_cache_changes_no_bit(family: Family) -> None:
    core = family.core()
    tokens = [random.Random(2).randrange(90) for _ in range(40)]
    for name, length in (("first", 40), ("again", 40), ("shorter", 21), ("longer", 40)):
        request = PreparedRequest(
            id=name, token_ids=tokens[:length] + [7] * (name == "longer"), max_new_tokens=8,
            sampling=GREEDY, logprobs=1,
        )  # fmt: skip
        core.submit(request)
        assert [answer_of(run(core), name, 0)] == family.alone(request)
    assert core.stats().cached_prompt_tokens > 80


def test_a_core_says_what_the_runner_says_step_by_step(family: Family) -> None:
    """The oracle of all the others: whole prompt, then the likeliest token again and again."""
    model: NativeModel = native_model(family.checkpoints[0], block_tokens=4)
    sequence = model.sequence([5, 6, 7, 8, 9, 10, 11, 12, 13, 14])
    while sequence.left:
        step(model, [(sequence, sequence.left)])
    for _ in range(12):
        sequence.tokens.append(int(model.logits(sequence.hidden[-1:])[0].argmax()))
        step(model, [(sequence, 1)])
    request = PreparedRequest(id="it", token_ids=sequence.tokens[:10], max_new_tokens=12, sampling=GREEDY)
    assert family.alone(request)[0].tokens == tuple(sequence.tokens[10:])


def test_scores_and_embeddings_are_the_same_beside_others(family: Family) -> None:
    source = random.Random(8)
    prompt = [source.randrange(90) for _ in range(33)]
    found = []
    for others in (0, 4):
        core = family.core(slots=5, step_tokens=9)
        for number in range(others):
            core.submit(PreparedRequest(id=f"o{number}", token_ids=[number + 1] * 20, max_new_tokens=20))
        core.submit(
            PreparedRequest(id="s", token_ids=prompt, max_new_tokens=0, prompt_logprobs=2, adapter="one")
        )
        core.submit(PreparedEmbedding(id="e", inputs=[prompt, prompt[:7]]))
        said = run(core)
        scored = next(event for _, event in said if isinstance(event, PromptScored))
        vectors = next(event.vectors for _, event in said if isinstance(event, EmbeddingsReady))
        found.append((scored.logprobs, [list(map(float, vector)) for vector in vectors]))
    assert found[0][0] == found[1][0]
    # A long input's pieces are summed, and how it was cut shows in the last bits of float64.
    for alone, beside in zip(found[0][1], found[1][1], strict=True):
        assert alone == pytest.approx(beside, abs=1e-6)


def test_the_runner_says_that_batching_changes_nothing() -> None:
    """Schedulers and speculation may count on it; these tests are what it means."""
    assert NativeRunner.batch_invariant
