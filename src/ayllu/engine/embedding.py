"""Texts to vectors: an encoder with its tokenizer, opened from one folder.

The same vectors as sentence-transformers, with one difference: a text that is too long is an error, unless
cutting it was asked for. Only `EmbeddingModel` needs torch; texts are counted and tokenized without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ayllu.chat.tokenizer import Tokenizer, load_tokenizer
from ayllu.errors import ContextOverflowError, ModelFileError, UsageError
from ayllu.progress import SILENT, Progress
from ayllu.weights.encoder import EncoderCheckpoint, open_encoder
from ayllu.weights.encoder_settings import EncoderSettings, read_encoder_settings

if TYPE_CHECKING:
    from torch import Tensor

Vectors = NDArray[np.float32]

CPU_BATCH_TOKENS = 1024
"""Tokens of one forward pass on a CPU, padding included. Larger batches only pad more: 256 texts of 7 to 121
tokens went through MiniLM at 3,460 tokens a CPU second with 1,024, 3,050 with 4,096, 2,320 with 16,384."""

GPU_BATCH_TOKENS = 16_384
"""The same where a pass must be large to fill the device; a choice, not a measurement."""


class EmbeddingTokenizer:
    """Texts to the ids that an encoder reads. Needs no torch.

    context: tokens of one text, [CLS] and [SEP] included. Where none is asked for it is the folder's own
    max_seq_length (256 for all-MiniLM-L6-v2), as sentence-transformers has it; the network's positions (512)
    are the most that can be.
    """

    def __init__(
        self, checkpoint: EncoderCheckpoint, settings: EncoderSettings, context: int | None = None
    ) -> None:
        longest = checkpoint.config.max_position_embeddings
        if context is not None and not 3 <= context <= longest:
            raise UsageError(
                f"A context of {context} tokens is out of range.", f"This model takes 3 to {longest} tokens."
            )
        self.name = checkpoint.path.name
        self.vocab_size = checkpoint.config.vocab_size
        self.context = context or settings.max_tokens
        self.longest = longest
        self.tokenizer = load_tokenizer(checkpoint.path).with_embedding_rows(self.vocab_size)
        self._first, self._last = _enclosing(self.tokenizer, checkpoint.path)

    def encode(self, text: str, *, truncate: bool = False) -> list[int]:
        """[CLS] text [SEP] as ids. What a text spells is never a special token.

        Raises ContextOverflowError for a text that does not fit; with `truncate` its end is dropped instead,
        as sentence-transformers does.
        """
        ids = self.tokenizer.encode(text)
        if truncate:
            ids = ids[: self.context - 2]
        ids = [self._first, *ids, self._last]
        self._require_fitting(ids)
        return ids

    def require_valid(self, token_ids: Sequence[int]) -> None:
        """Check ids that came from elsewhere. Raises UsageError, or ContextOverflowError for too many."""
        if not token_ids:
            raise UsageError("An input has no tokens.", "Give at least one token.")
        self._require_fitting(token_ids)
        outside = next((token for token in token_ids if not 0 <= token < self.vocab_size), None)
        if outside is not None:
            raise UsageError(
                f"Token {outside} is not in the vocabulary of {self.vocab_size}.",
                "Use this model's tokenizer.",
            )

    def _require_fitting(self, token_ids: Sequence[int]) -> None:
        if len(token_ids) > self.context:
            larger = f", or open the model with a context of up to {self.longest}"
            raise ContextOverflowError(
                f"The text has {len(token_ids)} tokens; {self.name} reads at most {self.context}.",
                "Cut the text into pieces, ask for it to be truncated"
                f"{larger if self.context < self.longest else ''}.",
            )


class EmbeddingModel:
    """Turns texts into vectors. Not for use by two callers at once.

    `tokenizer` makes ids of texts; `width` is the length of a vector; `weight_bytes` the size of the weights
    in memory.
    """

    def __init__(
        self, checkpoint: EncoderCheckpoint, settings: EncoderSettings, tokenizer: EmbeddingTokenizer, *,
        device: str, dtype: str, batch_tokens: int | None, progress: Progress,
    ) -> None:  # fmt: skip
        # Torch takes seconds to import: by now the cheap parts have been checked.
        from ayllu.weights.encoder_load import load_encoder
        from ayllu.weights.load import choose_device, choose_dtype

        self.checkpoint = checkpoint
        self.tokenizer = tokenizer
        self.pooling = settings.pooling
        self.width = checkpoint.config.hidden_size
        self._device = choose_device(device)
        on_cpu = self._device.type == "cpu"
        self._batch_tokens = batch_tokens or (CPU_BATCH_TOKENS if on_cpu else GPU_BATCH_TOKENS)
        # Encoders are small, and half precision would cost more than the third digit of a similarity.
        precision = choose_dtype("float32" if dtype == "auto" else dtype, self._device)
        self.device, self.dtype = str(self._device), str(precision).removeprefix("torch.")
        self.weight_bytes = checkpoint.config.parameters * precision.itemsize
        self._encoder = load_encoder(checkpoint, device=self._device, dtype=precision, progress=progress)

    @property
    def context(self) -> int:
        """Tokens of one text, [CLS] and [SEP] included."""
        return self.tokenizer.context

    @property
    def facts(self) -> dict[str, str | int | float]:
        """Names and values to show to a person."""
        return {
            "device": self.device,
            "precision": self.dtype,
            "pooling": self.pooling,
            "width": self.width,
            "weight_bytes": self.weight_bytes,
        }

    def encode(self, text: str, *, truncate: bool = False) -> list[int]:
        """[CLS] text [SEP] as ids; see `EmbeddingTokenizer.encode`."""
        return self.tokenizer.encode(text, truncate=truncate)

    def embed(self, inputs: Sequence[Sequence[int]], *, normalise: bool = True) -> Vectors:
        """One vector per input, float32 [inputs, width], in order; of unit length unless not `normalise`.

        Inputs are ids as `encode` gives them. They are computed in batches of similar length; which others
        stand in a batch changes a vector by rounding alone. Raises UsageError or ContextOverflowError before
        anything is computed.
        """
        import torch

        for token_ids in inputs:
            self.tokenizer.require_valid(token_ids)
        vectors = np.empty((len(inputs), self.width), dtype=np.float32)
        with torch.inference_mode():
            for batch in length_batches([len(token_ids) for token_ids in inputs], self._batch_tokens):
                pooled = self._pooled([inputs[index] for index in batch])
                vectors[batch] = (unit_length(pooled) if normalise else pooled).cpu().numpy()
        return vectors

    def _pooled(self, batch: Sequence[Sequence[int]]) -> Tensor:
        """One vector per input, float32 [N, D]."""
        import torch

        from ayllu.model.encoder import padding_mask

        lengths_N = torch.tensor([len(token_ids) for token_ids in batch], device=self._device)
        longest = max(map(len, batch))
        padded = [[*token_ids, *(0,) * (longest - len(token_ids))] for token_ids in batch]
        tokens_NS = torch.tensor(padded, device=self._device)
        hidden_NSD: Tensor = self._encoder(tokens_NS, lengths_N).float()
        if self.pooling == "cls":
            return hidden_NSD[:, 0]
        seen_NS1 = padding_mask(lengths_N, longest).unsqueeze(-1)
        return (hidden_NSD * seen_NS1).sum(1) / lengths_N.unsqueeze(-1)


def open_embedding_model(
    path: Path,
    *,
    context: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_tokens: int | None = None,
    progress: Progress = SILENT,
) -> EmbeddingModel:
    """Open the folder of an encoder (see `is_encoder_folder`) and load it.

    dtype 'auto' is float32. batch_tokens: tokens of one forward pass (None: as suits the device).

    Raises ModelFileError, UnsupportedError, NoSpaceError, MissingExtraError (torch) or UsageError.
    """
    checkpoint, settings, tokenizer = _open(path, context)
    return EmbeddingModel(
        checkpoint, settings, tokenizer,
        device=device, dtype=dtype, batch_tokens=batch_tokens, progress=progress,
    )  # fmt: skip


def open_embedding_tokenizer(path: Path, *, context: int | None = None) -> EmbeddingTokenizer:
    """The tokenizer alone, for a process that has no torch. The folder is checked as a whole all the same."""
    return _open(path, context)[2]


def _open(path: Path, context: int | None) -> tuple[EncoderCheckpoint, EncoderSettings, EmbeddingTokenizer]:
    checkpoint = open_encoder(path)
    settings = read_encoder_settings(path, checkpoint.config)
    return checkpoint, settings, EmbeddingTokenizer(checkpoint, settings, context)


def _enclosing(tokenizer: Tokenizer, folder: Path) -> tuple[int, int]:
    """The ids that stand before and after a text."""
    if tokenizer.bos_id is None or tokenizer.eos_id is None:
        raise ModelFileError(
            folder, "the tokenizer does not say what stands around a text", field="post_processor"
        )
    return tokenizer.bos_id, tokenizer.eos_id


def length_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indexes of inputs in batches of similar length, the longest first: what does not fit into memory shows
    at once. A batch, padded to its longest, has at most `batch_tokens` tokens, or one input."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def unit_length(vectors: Tensor) -> Tensor:
    """`vectors` [*B, D] divided by their length; one of length 0 stays 0."""
    from torch.nn import functional as F

    return F.normalize(vectors, dim=-1)
