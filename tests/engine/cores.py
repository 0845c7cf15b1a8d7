"""Engine cores over tiny random decoders, in this process, for tests: no files, no worker.

`LetterVocabulary` gives each of the tiny models' 97 ids a short text, so that stop strings and detokenising
have something to do.
"""

from __future__ import annotations

import torch

from ayllu.chat.tokenizer import Tokenizer
from ayllu.chat.vocabulary import SpecialToken, TokenizerParts
from ayllu.engine.adapters import AdapterSet
from ayllu.engine.block_cache import BlockCache
from ayllu.engine.core import EngineCore, Said
from ayllu.engine.events import AnswerFinished, Failed, TextDelta
from ayllu.engine.layer_groups import fitting_block_tokens, layer_groups
from ayllu.engine.paged_memory import PagedMemory
from ayllu.engine.prepared import CoreFacts
from ayllu.engine.runner import Runner
from ayllu.engine.scheduler import Scheduler
from ayllu.engine.speculation import Speculation
from ayllu.model.decoder import Decoder

STOP_ID = 96


class LetterVocabulary:
    """96 short texts, some of several letters, one with half a Japanese character."""

    size = 96
    space_prefix = "none"

    def __init__(self) -> None:
        letters = [bytes([97 + i % 26]) * (1 + i // 26) for i in range(92)]
        self._texts = [*letters, "日本".encode()[:4], "日本".encode()[4:], b" ", b"\n"]

    def encode(self, text: str, *, prefix_space: bool) -> list[int]:
        return [self._texts.index(character.encode()) for character in text]

    def bytes_of(self, token: int) -> bytes:
        return self._texts[token]


def letter_tokenizer() -> Tokenizer:
    """97 ids: the letters, and one control token that ends an answer."""
    stop = SpecialToken("<stop>", STOP_ID)
    return Tokenizer(
        TokenizerParts(LetterVocabulary(), (stop,), None, STOP_ID, frozenset({STOP_ID}), False, "letters")
    )


TOKENIZER = letter_tokenizer()


def small_core(
    decoder: Decoder,
    *,
    slots: int = 4,
    step_tokens: int = 16,
    blocks: int | dict[str, int] = 64,
    block_tokens: int = 4,
    waiting: int = 1000,
    context: int = 256,
    prefix_cache: bool = True,
    deterministic: bool = False,
    image_cache_bytes: int = 1 << 20,
    adapters: AdapterSet | None = None,
    speculation: Speculation | None = None,
) -> EngineCore:
    """A core of stated sizes. blocks: of every group, or by the group's name."""
    groups = layer_groups(decoder.config)
    size = fitting_block_tokens(groups, block_tokens)
    counts = [blocks if isinstance(blocks, int) else blocks[group.name] for group in groups]
    piece = max(1, (step_tokens - slots + 1) // 2) if deterministic else None
    cache = BlockCache(groups, counts, size, remembers=prefix_cache, alignment=piece or 1)
    weight = decoder.norm.weight
    memory = PagedMemory(decoder.config, groups, counts, size, dtype=weight.dtype, device=weight.device)
    adapters = adapters or AdapterSet(decoder)
    return EngineCore(
        decoder.config,
        TOKENIZER.with_embedding_rows(decoder.config.vocab_size),
        Runner(decoder, memory, adapters, image_cache_bytes=image_cache_bytes),
        Scheduler(cache, slots=slots, step_tokens=step_tokens, waiting=waiting, fixed_piece=piece),
        adapters,
        facts=CoreFacts(context=context, slots=slots, reads_images=False, vocab_size=97),
        model_identity="tiny",
        deterministic=deterministic,
        speculation=speculation,
    )


def run(core: EngineCore, most_steps: int = 20_000) -> Said:
    """Step until nothing is open; everything that was said."""
    said: Said = []
    for _ in range(most_steps):
        if not core.has_work:
            return said
        said += core.step()
    raise AssertionError(f"still at work after {most_steps} steps: {core.stats()}")


def tokens_of(said: Said, request_id: str, index: int = 0) -> list[int]:
    """The tokens of an answer."""
    found: list[int] = []
    for name, event in said:
        if name == request_id and isinstance(event, TextDelta) and event.index == index:
            found += event.token_ids
    return found


def text_of(said: Said, request_id: str, index: int = 0) -> str:
    """The text of an answer."""
    return "".join(
        event.text
        for name, event in said
        if name == request_id and isinstance(event, TextDelta) and event.index == index
    )


def end_of(said: Said, request_id: str, index: int = 0) -> AnswerFinished | Failed:
    """How an answer ended."""
    ends = [
        event
        for name, event in said
        if name == request_id
        and (isinstance(event, Failed) or (isinstance(event, AnswerFinished) and event.index == index))
    ]
    assert len(ends) == 1, ends
    return ends[0]


def all_blocks_free(core: EngineCore) -> bool:
    """Whether exactly every block is back; asserts the accounting besides."""
    cache = core.scheduler.cache
    cache.check()
    return cache.free() == tuple(pool.total for pool in cache.pools)


def one_thread() -> None:
    """Tiny matrices are computed faster by one thread."""
    torch.set_num_threads(1)
