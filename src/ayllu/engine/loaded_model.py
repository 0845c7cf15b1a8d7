"""A model ready to talk: network, tokenizer and chat format, opened together from one path."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ayllu import process
from ayllu.chat.detokenizer import StreamDecoder
from ayllu.chat.formats import ChatFormat, chat_format_for
from ayllu.chat.images import ImageConfig, TiledImage
from ayllu.chat.messages import Message
from ayllu.chat.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_gguf
from ayllu.engine.parameters import Sampling
from ayllu.errors import ModelFileError, UnsupportedError
from ayllu.folder_files import member_path
from ayllu.json_file import read_json_object
from ayllu.model.config import ModelConfig
from ayllu.progress import SILENT, Progress
from ayllu.weights.checkpoint import Checkpoint, open_checkpoint
from ayllu.weights.hf_config import config_notes

if TYPE_CHECKING:
    from torch import Tensor

MAX_TEMPLATE_BYTES = 1 << 20


@dataclass
class Answer:
    """One answer while it is being made: iterate over it for the text, then read the counts.

    finish_reason is 'stop' (the model ended), 'length' (a limit) or 'cancelled' (the caller stopped early).
    """

    pieces: Iterator[str]
    prompt_tokens: int
    new_tokens: int = 0
    finish_reason: str = "cancelled"
    started: float = field(default_factory=time.perf_counter)
    first_token_at: float | None = None
    last_token_at: float | None = None

    def __iter__(self) -> Iterator[str]:
        return self.pieces

    @property
    def prefill_seconds(self) -> float | None:
        return None if self.first_token_at is None else self.first_token_at - self.started

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Speed after the first token; None for answers too short to tell."""
        if self.first_token_at is None or self.last_token_at is None or self.new_tokens < 2:
            return None
        return (self.new_tokens - 1) / max(self.last_token_at - self.first_token_at, 1e-9)


class LoadedModel:
    """Answers conversations. Not for use by two callers at once.

    weight_bytes: size of the weights in memory. load_peak_bytes: how far the resident memory rose while
    loading. loaded_at: `time.perf_counter()` when loading ended. notes: what a person should know of the
    model.
    """

    def __init__(
        self, checkpoint: Checkpoint, tokenizer: Tokenizer, chat_format: ChatFormat, *, context: int | None,
        device: str, dtype: str, progress: Progress,
    ) -> None:  # fmt: skip
        # Torch takes seconds to import: by now the cheap parts have been checked.
        from ayllu.engine.oracle import Oracle
        from ayllu.weights.load import choose_device, choose_dtype, load_decoder, memory_bytes, require_memory

        self.checkpoint = checkpoint
        self.tokenizer = tokenizer
        self.chat_format = chat_format
        target = choose_device(device)
        precision = choose_dtype(dtype, target)
        self.notes = config_notes(checkpoint.config)
        self.weight_bytes = memory_bytes(checkpoint, target, precision)
        require_memory(self.weight_bytes, target)
        before = process.resident_bytes()
        decoder = load_decoder(checkpoint, device=target, dtype=precision, progress=progress)
        self.load_peak_bytes = process.peak_resident_bytes() - before
        self.loaded_at = time.perf_counter()
        self.oracle = Oracle(decoder, context)
        self.device = str(target)
        self.dtype = str(precision).removeprefix("torch.")

    def answer(
        self,
        messages: Sequence[Message],
        *,
        sampling: Sampling | None = None,
        max_new_tokens: int | None = None,
    ) -> Answer:
        """The answer to a conversation, made while it is iterated.

        Raises ImageError or TemplateError here, ContextOverflowError when the iteration begins.
        """
        prompt = self.chat_format.render(messages)
        answer = Answer(iter(()), len(prompt.token_ids))
        answer.pieces = self._pieces(
            answer, prompt.token_ids, prompt.images, sampling or Sampling(), max_new_tokens
        )
        return answer

    def _pieces(
        self,
        answer: Answer,
        tokens: Sequence[int],
        images: Sequence[TiledImage],
        sampling: Sampling,
        max_new_tokens: int | None,
    ) -> Iterator[str]:
        decoder = StreamDecoder(self.tokenizer, skip_specials=True)
        pixels = _pixels(images)
        room = self.oracle.context - len(tokens)
        limit = room if max_new_tokens is None else min(room, max_new_tokens)
        generated = self.oracle.generate(
            tokens, sampling, max_new_tokens=limit, stop_ids=self.chat_format.stop_ids, pixels=pixels
        )
        for token in generated:
            answer.last_token_at = time.perf_counter()
            if answer.first_token_at is None:
                answer.first_token_at = answer.last_token_at
            answer.new_tokens += 1
            if text := decoder.push(token):
                yield text
        answer.finish_reason = "length" if answer.new_tokens >= limit else "stop"
        if text := decoder.finish():
            yield text


def _pixels(images: Sequence[TiledImage]) -> Tensor | None:
    if not images:
        return None
    import numpy as np
    import torch

    return torch.from_numpy(np.concatenate([image.pixels for image in images]))


def open_model(
    path: Path,
    *,
    context: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = SILENT,
) -> LoadedModel:
    """Open a .gguf file or a folder of safetensors and load it.

    Raises ModelFileError, UnsupportedError, NoSpaceError, MissingExtraError (torch) or UsageError.
    """
    checkpoint = open_checkpoint(path)
    with ThreadPoolExecutor(1) as pool:
        # Importing torch takes longer than building a large vocabulary, and neither needs the other.
        importing = pool.submit(importlib.import_module, "ayllu.weights.load")
        tokenizer = tokenizer_for(checkpoint)
        config = checkpoint.config
        chat_format = chat_format_for(
            tokenizer, chat_template(checkpoint), config.architecture, image_config_for(config)
        )
        importing.result()
    return LoadedModel(
        checkpoint, tokenizer, chat_format, context=context, device=device, dtype=dtype, progress=progress
    )


def tokenizer_for(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer that came with the weights."""
    if checkpoint.format == "gguf":
        tokenizer = tokenizer_from_gguf(checkpoint.metadata, checkpoint.path)
    else:
        tokenizer = load_tokenizer(checkpoint.path)
    return tokenizer.with_embedding_rows(checkpoint.config.vocab_size)


def image_config_for(config: ModelConfig) -> ImageConfig | None:
    """How images are cut for this model's vision tower; None for a text model."""
    if config.vision is None:
        return None
    return ImageConfig(
        tile_size=config.vision.image_size,
        patch_size=config.vision.patch_size,
        downsample=config.vision.shuffle**2,
    )


def chat_template(checkpoint: Checkpoint) -> str | None:
    """The jinja template that came with the weights, or None."""
    if checkpoint.format == "gguf":
        template = checkpoint.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None
    folder = checkpoint.path
    if (folder / "chat_template.jinja").is_file():
        return _small_text(member_path(folder, "chat_template.jinja"))
    if not (folder / "tokenizer_config.json").is_file():
        return None
    config_file = member_path(folder, "tokenizer_config.json")
    template = read_json_object(config_file, max_bytes=16 * MAX_TEMPLATE_BYTES).get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = entries[-1].get("template") if entries else None
    return template if isinstance(template, str) else None


def _small_text(file: Path) -> str:
    if file.stat().st_size > MAX_TEMPLATE_BYTES:
        raise UnsupportedError(
            f"{file} is larger than {MAX_TEMPLATE_BYTES} bytes.", "Remove the file to go without it."
        )
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelFileError(file, "is not UTF-8 text") from error
