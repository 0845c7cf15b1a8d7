"""Whatever else is computed at the same time, a request gets the slow oracle's tokens.

Random mixes of requests: lengths, arrival, priorities, tenants, shared beginnings, images, adapters, caches
so small that requests are preempted, steps so small that prompts come in pieces.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from ayllu.engine.adapters import AdapterSet
from ayllu.engine.core import EngineCore, Said
from ayllu.engine.events import AnswerFinished, PromptScored
from ayllu.engine.oracle import Oracle
from ayllu.engine.parameters import Sampling
from ayllu.engine.prepared import EmbeddingsReady, PreparedEmbedding, PreparedImage, PreparedRequest
from ayllu.errors import ContextOverflowError
from ayllu.model.attention import WholeSequence
from ayllu.model.config import ModelConfig
from ayllu.model.decoder import Decoder, random_decoder
from ayllu.weights.adapter import read_adapter
from tests.engine.cores import STOP_ID, all_blocks_free, end_of, run, small_core, tokens_of
from tests.engine.small_adapters import merged_decoder, write_adapter
from tests.model.tiny import tiny_llama, tiny_llama4, tiny_qwen2

GREEDY = Sampling(temperature=0)
PATCH = 90
MIXES = 60
CONFIGS: dict[str, ModelConfig] = {
    "llama": tiny_llama(),
    "qwen2": tiny_qwen2(),
    "llama4-step1": tiny_llama4(layers=4, vision=True),
    "llama4-step2": tiny_llama4(layers=4, expert_step=2, qk_norm=False, vision=True, top_k=2),
}


@dataclass
class Family:
    """One architecture: a random decoder, two adapters, and the slow twin of each."""

    decoder: Decoder
    adapters: AdapterSet
    oracles: dict[str | None, Decoder]

    def expected(self, request: PreparedRequest) -> list[int]:
        """The oracle's greedy answer."""
        oracle = Oracle(self.oracles[request.adapter])
        pixels = (
            torch.from_numpy(np.concatenate([image.pixels for image in request.images]))
            if request.images
            else None
        )
        return list(
            oracle.generate(
                request.token_ids,
                GREEDY,
                max_new_tokens=request.max_new_tokens,
                stop_ids=request.stop_ids,
                pixels=pixels,
            )
        )


@pytest.fixture(scope="module", params=list(CONFIGS))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    config = CONFIGS[request.param]
    decoder = random_decoder(config, 11, std=0.15).requires_grad_(False)
    adapters = AdapterSet(decoder)
    oracles: dict[str | None, Decoder] = {None: decoder}
    for seed, name in enumerate(("one", "two")):
        folder: Path = tmp_path_factory.mktemp(name)
        adapter = read_adapter(write_adapter(folder / "adapter", config, seed), config)
        adapters.load(name, adapter)
        oracles[name] = merged_decoder(decoder, adapter)
    return Family(decoder, adapters, oracles)


def _images(source: random.Random, config: ModelConfig) -> list[PreparedImage]:
    """A few pictures of one or two tiles that requests share."""
    if config.vision is None:
        return []
    numbers = np.random.default_rng(source.randrange(1000))
    size = config.vision.image_size
    return [
        PreparedImage.of(numbers.random((tiles, 3, size, size), np.float32) * 2 - 1) for tiles in (1, 1, 2)
    ]


def _prompt(source: random.Random, config: ModelConfig, shared: list[int], images: list[PreparedImage]):
    length = source.choice((1, 2, 7, 8, 9, 16, 17, source.randint(1, 45)))
    tokens = shared[: source.randint(0, length)]
    tokens = tokens + [source.randrange(PATCH) for _ in range(length - len(tokens))]
    chosen: tuple[PreparedImage, ...] = ()
    if images and source.random() < 0.4:
        assert config.vision is not None
        chosen = tuple(source.choice(images) for _ in range(source.randint(1, 2)))
        for image in chosen:
            place = source.randint(0, len(tokens))
            rows = image.pixels.shape[0] * config.vision.tokens_per_tile
            # Pictures may touch: their rows follow one another in the prompt all the same.
            tokens = tokens[:place] + [PATCH] * rows + tokens[place:]
    return tokens, chosen


def _requests(source: random.Random, config: ModelConfig) -> list[PreparedRequest]:
    shared = [source.randrange(PATCH) for _ in range(45)]
    images = _images(source, config)
    made = []
    for number in range(source.randint(2, 9)):
        tokens, chosen = _prompt(source, config, shared, images)
        made.append(
            PreparedRequest(
                id=str(number),
                token_ids=tokens,
                images=chosen,
                max_new_tokens=source.choice((1, 2, 9, source.randint(1, 24))),
                sampling=GREEDY,
                stop_ids=frozenset({STOP_ID}) if source.random() < 0.5 else frozenset(),
                n=source.choice((1, 1, 1, 2)),
                adapter=source.choice((None, None, "one", "two")),
                priority=source.randint(-4, 4),
                tenant=source.choice(("", "a", "b")),
            )
        )
    return made


def _core(source: random.Random, family: Family) -> EngineCore:
    slots = source.randint(1, 6)
    block_tokens = source.choice((1, 2, 4, 8))
    return small_core(
        family.decoder,
        slots=slots,
        step_tokens=slots + source.choice((0, 3, 8, 30)),
        # As little as one request needs, or a little more: then they drive each other out.
        blocks={
            "global": source.randint(64, 130) // block_tokens,
            "chunk 8": source.randint(8, 30) // block_tokens,
        },
        block_tokens=block_tokens,
        prefix_cache=source.random() < 0.8,
        deterministic=source.random() < 0.25,
        image_cache_bytes=source.choice((0, 1 << 20)),
        adapters=family.adapters,
    )


@pytest.mark.parametrize("mix", range(MIXES))
def test_any_mix_of_requests_gets_the_oracles_tokens(family: Family, mix: int) -> None:
    source = random.Random(mix)
    core = _core(source, family)
    taken: list[PreparedRequest] = []
    said: Said = []
    for request in _requests(source, family.decoder.config):
        try:
            core.submit(request)
        except ContextOverflowError:
            continue
        taken.append(request)
        for _ in range(source.choice((0, 0, 1, 4))):
            said += core.step()
    said += run(core)
    for request in taken:
        expected = family.expected(request)
        for index in range(request.n):
            assert tokens_of(said, request.id, index) == expected
            end = end_of(said, request.id, index)
            assert isinstance(end, AnswerFinished)
            assert end.reason == ("length" if len(expected) == request.max_new_tokens else "stop")
            assert end.new_tokens == len(expected)
    assert all_blocks_free(core)
    assert core.open_requests == 0


def test_a_preempted_request_gets_the_oracles_tokens(family: Family) -> None:
    core = small_core(
        family.decoder, slots=5, blocks={"global": 16, "chunk 8": 10}, prefix_cache=False,
        adapters=family.adapters,
    )  # fmt: skip
    requests = [
        PreparedRequest(id=str(n), token_ids=[n + 1] * 8, max_new_tokens=24, sampling=GREEDY, n=1 + n % 2)
        for n in range(5)
    ]
    for request in requests:
        core.submit(request)
    said = run(core)
    assert core.stats().preempted > 3
    for request in requests:
        for index in range(request.n):
            assert tokens_of(said, request.id, index) == family.expected(request)
    assert all_blocks_free(core)


def test_prefixes_and_pictures_are_computed_once(family: Family) -> None:
    source = random.Random(5)
    core = small_core(family.decoder, adapters=family.adapters)
    images = _images(source, family.decoder.config)[:1]
    tokens = [7] * 9 + [PATCH] * (4 if images else 0) + [3] * 9
    first = PreparedRequest(id="1", token_ids=tokens, images=tuple(images), max_new_tokens=4, sampling=GREEDY)
    core.submit(first)
    run(core)
    core.submit(PreparedRequest(**{**vars(first), "id": "2", "token_ids": [*tokens, 5, 6]}))
    run(core)
    assert core.stats().cached_prompt_tokens == len(tokens) // 4 * 4
    if images:
        assert core.runner._features.computed == 1
    for strange in ({"tenant": "other"}, {"adapter": "one"}):
        before = core.stats().cached_prompt_tokens
        core.submit(PreparedRequest(**{**vars(first), "id": str(strange), **strange}))
        run(core)
        assert core.stats().cached_prompt_tokens == before


@pytest.mark.parametrize("family", ["llama4-step1", "llama4-step2"], indirect=True)
def test_another_picture_behind_the_same_tokens_is_another_prompt(family: Family) -> None:
    images = _images(random.Random(1), family.decoder.config)[:2]
    core = small_core(family.decoder, adapters=family.adapters)
    answers = []
    for image in images:
        request = PreparedRequest(
            id=image.digest,
            token_ids=[7] * 8 + [PATCH] * 4 + [3] * 8,
            images=(image,),
            max_new_tokens=6,
            sampling=GREEDY,
        )
        core.submit(request)
        answers.append(tokens_of(run(core), request.id))
        assert answers[-1] == family.expected(request)
    # The text before the picture is the same, and found.
    assert core.stats().cached_prompt_tokens == 8


def _whole_logits(decoder: Decoder, tokens: list[int]) -> torch.Tensor:
    ids, positions = torch.tensor([tokens]), torch.arange(len(tokens))[None]
    with torch.no_grad():
        return decoder.logits(
            decoder(decoder.embed(ids), positions, WholeSequence(decoder.config.layers, positions))
        )[0]


def test_logprobs_of_prompt_and_answer_are_those_of_the_whole_sequence(family: Family) -> None:
    prompt = [random.Random(3).randrange(PATCH) for _ in range(21)]
    core = small_core(family.decoder, step_tokens=7, adapters=family.adapters)
    for repeat in range(2):  # the second finds the prompt in the cache and must score it all the same
        core.submit(
            PreparedRequest(
                id=str(repeat), token_ids=prompt, max_new_tokens=5, sampling=GREEDY, logprobs=3,
                prompt_logprobs=2, n=2,
            )
        )  # fmt: skip
        said = [event for _, event in run(core)]
        scored = [event for event in said if isinstance(event, PromptScored)]
        assert len(scored) == 1
        answer = [
            token for event in said if getattr(event, "index", None) == 0 and hasattr(event, "logprobs")
            for token in event.logprobs
        ]  # fmt: skip
        tokens = [*prompt, *(token.token_id for token in answer)]
        logprobs = _whole_logits(family.decoder, tokens).log_softmax(-1)
        assert scored[0].logprobs[0] is None
        found = [*scored[0].logprobs[1:], *answer]
        assert len(found) == len(tokens) - 1
        for place, token in enumerate(found):
            assert token is not None
            assert token.token_id == tokens[place + 1]
            assert token.logprob == pytest.approx(logprobs[place, token.token_id].item(), abs=1e-4)
            count = 2 if place + 1 < len(prompt) else 3
            best = logprobs[place].topk(count).values.tolist()
            assert [other.logprob for other in token.alternatives] == pytest.approx(best, abs=1e-4)


def test_a_prompt_can_be_scored_without_an_answer(family: Family) -> None:
    core = small_core(family.decoder, adapters=family.adapters)
    core.submit(PreparedRequest(id="s", token_ids=[1, 2, 3], max_new_tokens=0, prompt_logprobs=0))
    said = run(core)
    assert tokens_of(said, "s") == []
    assert end_of(said, "s").new_tokens == 0
    assert any(isinstance(event, PromptScored) for _, event in said)
    assert all_blocks_free(core)


def test_embeddings_are_the_mean_of_hidden_states_whatever_runs_beside(family: Family) -> None:
    source = random.Random(8)
    inputs = [[source.randrange(PATCH) for _ in range(length)] for length in (1, 30, 9, 17)]
    core = small_core(
        family.decoder, blocks={"global": 16, "chunk 8": 6}, step_tokens=9, adapters=family.adapters
    )
    core.submit(PreparedRequest(id="beside", token_ids=[1] * 20, max_new_tokens=20, sampling=GREEDY))
    core.submit(PreparedEmbedding(id="e", inputs=inputs))
    said = run(core)
    vectors = next(event.vectors for _, event in said if isinstance(event, EmbeddingsReady))
    for tokens, vector in zip(inputs, vectors, strict=True):
        positions = torch.arange(len(tokens))[None]
        attend = WholeSequence(family.decoder.config.layers, positions)
        with torch.no_grad():
            hidden = family.decoder(family.decoder.embed(torch.tensor([tokens])), positions, attend)[0]
        mean = hidden.mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)
    assert all_blocks_free(core)


@pytest.mark.parametrize("seed", range(6))
def test_deterministic_mode_gives_the_same_numbers_to_the_bit(family: Family, seed: int) -> None:
    """Alone, or among others that preempt it: the same logits, so the same log-probabilities exactly."""
    source = random.Random(seed)
    request = PreparedRequest(
        id="it", token_ids=[source.randrange(PATCH) for _ in range(30)], max_new_tokens=16,
        sampling=Sampling(temperature=1.0, seed=seed), logprobs=1,
    )  # fmt: skip

    def logprobs(others: int) -> list[float]:
        core = small_core(
            family.decoder, deterministic=True, slots=3, step_tokens=20,
            blocks={"global": 14, "chunk 8": 7}, adapters=family.adapters,
        )  # fmt: skip
        said: Said = []
        for number in range(others):
            tokens = [*request.token_ids[: source.randint(0, 20)], source.randrange(PATCH)]
            core.submit(
                PreparedRequest(id=f"o{number}", token_ids=tokens, max_new_tokens=12, priority=number % 3)
            )
            said += core.step()
        core.submit(request)
        said += run(core)
        return [
            token.logprob for name, event in said if name == "it" and hasattr(event, "logprobs")
            for token in event.logprobs
        ]  # fmt: skip

    alone = logprobs(0)
    assert len(alone) > 3
    assert logprobs(5) == alone
    assert logprobs(9) == alone


def test_the_same_seed_draws_the_same_whatever_runs_beside(family: Family) -> None:
    def answers(others: int) -> list[list[int]]:
        core = small_core(family.decoder, adapters=family.adapters, blocks={"global": 24, "chunk 8": 10})
        for number in range(others):
            core.submit(PreparedRequest(id=f"o{number}", token_ids=[number + 1] * 9, max_new_tokens=15))
        sampling = Sampling(temperature=1.2, top_p=0.95, seed=9)
        core.submit(PreparedRequest(id="it", token_ids=[5] * 10, max_new_tokens=12, sampling=sampling, n=3))
        said = run(core)
        return [tokens_of(said, "it", index) for index in range(3)]

    alone = answers(0)
    assert answers(6) == alone
    assert len({tuple(answer) for answer in alone}) > 1
