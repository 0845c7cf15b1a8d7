"""The slow, obvious generator: one sequence, one token at a time, nothing clever.

Its answers are the ones that every faster path must reproduce. It keeps its cache between calls, so a
conversation that only grows is not read again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from ayllu.engine.parameters import DEFAULT_CONTEXT, Sampling
from ayllu.engine.sampling import Sampler
from ayllu.engine.sequence_cache import SequenceCache
from ayllu.errors import ContextOverflowError, UsageError
from ayllu.model.decoder import Decoder

PREFILL_TOKENS = 512
"""Prompt tokens per forward pass: bounds the memory of a long prompt."""


class Oracle:
    """Generates from one decoder. Not for use by two callers at once."""

    def __init__(self, decoder: Decoder, context: int | None = None) -> None:
        longest = decoder.config.max_position_embeddings
        if context is not None and not 1 <= context <= longest:
            raise UsageError(
                f"A context of {context} tokens is out of range.", f"This model takes 1 to {longest} tokens."
            )
        self.decoder = decoder
        self.context = context or min(longest, DEFAULT_CONTEXT)
        self.device = decoder.norm.weight.device
        self._cache = SequenceCache(decoder.config, self.device)
        self._seen: list[int] = []
        self._seen_images: Tensor | None = None

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int], pixels: Tensor | None = None) -> Tensor:
        """Make the cache hold exactly `tokens`, and return the logits [vocab_size] after the last one.

        pixels [tiles, C, size, size] are the image tiles of the prompt in reading order. What the cache
        already holds of the same beginning is not computed again. Raises ContextOverflowError.
        """
        self._check(tokens)
        common = self._common_prefix(tokens) if self._images_agree(pixels) else 0
        # The last token is always computed: its logits are the answer.
        start = self._cache.rewind(min(common, len(tokens) - 1))
        self._seen = list(tokens[:start])
        self._seen_images = pixels
        ids = torch.tensor(tokens, device=self.device)
        rows = None if pixels is None else self.decoder.image_rows(pixels.to(self.device))
        embedded = self.decoder.embed(ids, rows)[start:]
        hidden = embedded
        for piece in embedded.split(PREFILL_TOKENS):
            hidden = self._forward(piece)
        self._seen = list(tokens)
        return self.decoder.logits(hidden[-1])

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        """Logits [vocab_size] after one more token."""
        hidden = self._forward(self.decoder.embed(torch.tensor([token], device=self.device)))
        self._seen.append(token)
        return self.decoder.logits(hidden[-1])

    def generate(
        self,
        tokens: Sequence[int],
        sampling: Sampling,
        *,
        max_new_tokens: int | None = None,
        stop_ids: AbstractSet[int] = frozenset(),
        pixels: Tensor | None = None,
    ) -> Iterator[int]:
        """Yield new tokens until a stop token (not yielded), the limit, or the end of the context."""
        sampler = Sampler(sampling)
        room = self.context - len(tokens)
        limit = room if max_new_tokens is None else min(room, max_new_tokens)
        answer: list[int] = []
        logits = self.prefill(tokens, pixels)
        for count in range(1, limit + 1):
            token = sampler.next_token(logits.float().cpu().numpy(), tokens, answer)
            if token in stop_ids:
                return
            answer.append(token)
            yield token
            if count < limit:
                logits = self.step(token)

    def _forward(self, embedded: Tensor) -> Tensor:
        positions = self._cache.next_positions(embedded.shape[0])
        hidden: Tensor = self.decoder(embedded, positions, self._cache)
        self._cache.advance(embedded.shape[0])
        return hidden

    def _check(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise UsageError("The prompt is empty.", "Give at least one token.")
        if len(tokens) >= self.context:
            raise ContextOverflowError(
                f"The conversation has {len(tokens)} tokens; the context holds {self.context}.",
                "Start a new conversation (/new), shorten the input, or raise --context.",
            )
        size = self.decoder.config.vocab_size
        outside = next((token for token in tokens if not 0 <= token < size), None)
        if outside is not None:
            raise UsageError(
                f"Token {outside} is not in the vocabulary of {size}.", "Use this model's tokenizer."
            )

    def _images_agree(self, pixels: Tensor | None) -> bool:
        if pixels is None or self._seen_images is None:
            return True
        shared = min(pixels.shape[0], self._seen_images.shape[0])
        return torch.equal(pixels[:shared], self._seen_images[:shared])

    def _common_prefix(self, tokens: Sequence[int]) -> int:
        length = 0
        for old, new in zip(self._seen, tokens, strict=False):
            if old != new:
                break
            length += 1
        return length
