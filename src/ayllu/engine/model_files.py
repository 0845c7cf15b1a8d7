"""What of a model can be opened without torch: config, tensors by name, tokenizer, chat format.

The process that takes requests needs no more than this; the weights are loaded in another.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ayllu.chat.formats import ChatFormat, chat_format_for
from ayllu.chat.images import ImageConfig
from ayllu.chat.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_gguf
from ayllu.errors import ModelFileError, UnsupportedError
from ayllu.folder_files import member_path
from ayllu.json_file import read_json_object
from ayllu.model.config import ModelConfig
from ayllu.weights.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from ayllu.engine.embedding import EmbeddingTokenizer

MAX_TEMPLATE_BYTES = 1 << 20


@dataclass(frozen=True)
class ModelFiles:
    """A model's files, opened. no_chat: why it has no chat format, where it has none (a base model)."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    known_format: ChatFormat | None
    no_chat: UnsupportedError | None = None

    @property
    def chat_format(self) -> ChatFormat:
        """How the model writes conversations. Raises UnsupportedError for a model that knows none."""
        if self.known_format is None:
            assert self.no_chat is not None
            # Again from its parts: one exception raised by several threads would mix their tracebacks.
            raise UnsupportedError(self.no_chat.problem, self.no_chat.fix)
        return self.known_format

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer."""
        return self.tokenizer.stop_ids if self.known_format is None else self.known_format.stop_ids

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of the model, one line each."""
        from ayllu.weights.hf_config import config_notes

        return tuple(config_notes(self.checkpoint.config))


@dataclass(frozen=True)
class EncoderFiles:
    """The files of a model that makes vectors of texts and does not answer, opened."""

    path: Path
    tokenizer: EmbeddingTokenizer


def open_model_files(path: Path, *, context: int | None = None) -> ModelFiles | EncoderFiles:
    """Open a .gguf file or a folder of safetensors. context: as in `EngineOptions`, where it matters.

    Raises ModelFileError, UnsupportedError (a format that could run code), UsageError or TemplateError.
    """
    if is_encoder(path):
        from ayllu.engine.embedding import open_embedding_tokenizer

        return EncoderFiles(path, open_embedding_tokenizer(path, context=context))
    checkpoint = open_checkpoint(path)
    tokenizer = tokenizer_for(checkpoint)
    template = chat_template(checkpoint)
    config = checkpoint.config
    try:
        chat_format = chat_format_for(tokenizer, template, config.architecture, image_config_for(config))
    except UnsupportedError as error:
        return ModelFiles(checkpoint, tokenizer, None, error)
    return ModelFiles(checkpoint, tokenizer, chat_format)


def is_encoder(path: Path) -> bool:
    """Whether `path` is a folder with a model that makes vectors of texts."""
    if not path.is_dir():
        return False
    # Imported here, as a GGUF file needs nothing of what reads folders.
    from ayllu.weights.encoder import is_encoder_folder

    return is_encoder_folder(path)


def tokenizer_for(checkpoint: Checkpoint, *, deferred: bool = False) -> Tokenizer:
    """The tokenizer that came with the weights. deferred: for a process that mostly only decodes, see
    `tokenizer_from_gguf`; it matters for GGUF files alone."""
    if checkpoint.format == "gguf":
        tokenizer = tokenizer_from_gguf(checkpoint.metadata, checkpoint.path, deferred=deferred)
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
