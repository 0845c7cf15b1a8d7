"""`ayllu convert`: a model from one format to another. The only command that opens Meta's .pth files."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ayllu.errors import ModelFileError, UsageError

if TYPE_CHECKING:
    from ayllu.progress import Progress
    from ayllu.weights.checkpoint import Checkpoint

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
MAX_TOKENIZER_BYTES = 64 << 20
MAX_TEMPLATE_BYTES = 1 << 20
MAX_TOKENIZER_VALUES = 4_000_000


class Target(StrEnum):
    """Formats that can be written."""

    safetensors = "safetensors"
    gguf = "gguf"


class Numbers(StrEnum):
    """Number formats that can be written."""

    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    Q8_0 = "Q8_0"
    Q4_0 = "Q4_0"
    Q4_1 = "Q4_1"


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="A .gguf file, a folder with config.json and safetensors, or a folder of Meta's "
            "consolidated.NN.pth with params.json. The name of an installed model works too."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="The folder (safetensors) or file (gguf) to write.")],
    to: Annotated[
        Target | None,
        typer.Option(
            "--to", help="Format to write. Default: gguf if TARGET ends in .gguf, else safetensors."
        ),
    ] = None,
    numbers: Annotated[
        Numbers | None,
        typer.Option(
            "--type",
            case_sensitive=False,
            help="Number format of the weights. Q8_0, Q4_0 and Q4_1 are for gguf. Default: as they are.",
        ),
    ] = None,
    unfused: Annotated[
        bool, typer.Option("--unfused", help="safetensors: one entry per expert instead of fused stacks.")
    ] = False,
    shard_size: Annotated[
        float, typer.Option("--shard-size", min=0.001, help="safetensors: largest file, in gigabytes.")
    ] = 5.0,
    context: Annotated[
        int | None,
        typer.Option(
            "--context", min=1, help="Meta: context length in tokens, which params.json does not say."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace TARGET if it exists.")] = False,
) -> None:
    """Write a model in another format.

    Meta's .pth files are read by torch's restricted loader and only here; everything else in ayllu opens
    safetensors and GGUF alone. Tokenizer files beside SOURCE come along.
    """
    from ayllu.paths import expanded
    from ayllu.progress import TerminalProgress

    source, target = expanded(source), expanded(target)
    wanted = to or (Target.gguf if target.suffix == ".gguf" else Target.safetensors)
    quantised = numbers in (Numbers.Q8_0, Numbers.Q4_0, Numbers.Q4_1)
    if wanted is Target.safetensors and (quantised or target.suffix == ".gguf"):
        what = f"--type {numbers}" if quantised else "A target ending in .gguf"
        raise UsageError(f"{what} does not go with --to safetensors.", "Use --to gguf, or another type.")
    if wanted is Target.gguf and unfused:
        raise UsageError("--unfused is for safetensors: GGUF always stores stacks.", "Leave it out.")
    if wanted is Target.gguf and target.is_dir():
        raise UsageError(
            f"{target} is a folder, and a GGUF is one file.", f"Write to {target / 'model.gguf'}."
        )
    if not math.isfinite(shard_size * 1e9):
        raise UsageError(f"--shard-size {shard_size} is not a size.", "Give a number of gigabytes.")
    if target.exists() and not force and (target.is_file() or any(target.iterdir())):
        raise UsageError(f"{target} exists already.", "Choose another target, or replace it with --force.")
    checkpoint = _open(source, context)
    if _same_place(checkpoint.path, target):
        raise UsageError("TARGET is SOURCE.", "Choose another target.")
    progress = TerminalProgress()
    if wanted is Target.gguf:
        _to_gguf(checkpoint, target, numbers, progress)
    else:
        _to_folder(checkpoint, target, numbers, unfused, int(shard_size * 1e9), force, progress)


def _open(source: Path, context: int | None) -> Checkpoint:
    from ayllu.weights.checkpoint import open_checkpoint

    if (source / "params.json").is_file():
        from ayllu.weights.meta import open_meta

        return open_meta(source, context=context)
    if context is not None:
        raise UsageError("--context is for Meta's folders.", "Leave it out: other formats state it.")
    if not source.exists():
        from ayllu.settings import load_settings
        from ayllu.weights.store import open_store

        source = open_store(load_settings()).find(str(source)).path
    return open_checkpoint(source)


def _same_place(source: Path, target: Path) -> bool:
    return target.exists() and target.resolve() == source.resolve()


def _to_folder(
    checkpoint: Checkpoint,
    target: Path,
    numbers: Numbers | None,
    unfused: bool,
    max_shard_bytes: int,
    force: bool,
    progress: Progress,
) -> None:
    from ayllu.weights.hf_save import save_folder

    save_folder(
        checkpoint,
        target,
        encoding=numbers.value if numbers else None,
        unfused=unfused,
        max_shard_bytes=max_shard_bytes,
        overwrite=force,
        progress=progress,
    )
    _say_written(target)
    if not any((target / name).exists() for name in TOKENIZER_FILES):
        _write_vocabulary(checkpoint, target)


def _write_vocabulary(checkpoint: Checkpoint, target: Path) -> None:
    """Put the vocabulary of a GGUF beside the weights; say so where there is none to put."""
    from ayllu.chat.tokenizer import tokenizer_from_gguf
    from ayllu.chat.tokenizer_export import tokenizer_files
    from ayllu.errors import AylluError

    reason = ""
    if checkpoint.format == "gguf":
        template = checkpoint.metadata.get("tokenizer.chat_template")
        try:
            tokenizer = tokenizer_from_gguf(checkpoint.metadata, checkpoint.path)
            files = tokenizer_files(tokenizer, template if isinstance(template, str) else None)
        except AylluError as error:
            reason = f" {error.problem}"
        else:
            for name, text in files.items():
                (target / name).write_text(text, encoding="utf-8")
            return
    typer.echo(f"No tokenizer was written.{reason} Put the model's tokenizer.json there before chatting.")


def _to_gguf(checkpoint: Checkpoint, target: Path, numbers: Numbers | None, progress: Progress) -> None:
    from ayllu.weights.gguf_export import save_gguf
    from ayllu.weights.new_file import write_failure

    vocabulary = _vocabulary(checkpoint) if checkpoint.path.is_dir() else None
    _require_gguf_target(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_failure(target, error) from error
    saved = save_gguf(
        checkpoint,
        target,
        numbers.value if numbers else None,
        tokenizer_metadata=vocabulary,
        progress=progress,
    )
    for note in saved.notes:
        typer.echo(note)
    _say_written(target)


def _require_gguf_target(target: Path) -> None:
    """--force replaces a GGUF, not whatever else a mistyped name may stand for."""
    if not target.exists():
        return
    start = b""
    if target.is_file():
        with target.open("rb") as file:
            start = file.read(4)
    if start != b"GGUF":
        raise UsageError(f"{target} exists already, and is not a GGUF.", "Choose another target.")


def _template(file: Path) -> str:
    with file.open("rb") as opened:
        data = opened.read(MAX_TEMPLATE_BYTES + 1)
    if len(data) > MAX_TEMPLATE_BYTES:
        raise ModelFileError(file, "is too large", expected=f"at most {MAX_TEMPLATE_BYTES} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelFileError(file, "is not UTF-8 text", offset=error.start) from error


def _vocabulary(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a GGUF says of its tokens, from the tokenizer files of the source's folder."""
    from ayllu.folder_files import companions
    from ayllu.json_file import read_json_object
    from ayllu.weights.gguf_vocabulary import gguf_vocabulary_metadata

    files = {file.name: file for file in companions(checkpoint.path)}
    if "tokenizer.json" not in files:
        typer.echo("SOURCE has no tokenizer.json: the GGUF gets no vocabulary, and cannot be chatted with.")
        return {}

    def read(name: str) -> dict[str, Any]:
        if name not in files:
            return {}
        return read_json_object(files[name], max_bytes=MAX_TOKENIZER_BYTES, max_values=MAX_TOKENIZER_VALUES)

    template = files.get("chat_template.jinja")
    return gguf_vocabulary_metadata(
        read("tokenizer.json"),
        read("tokenizer_config.json"),
        vocab_size=checkpoint.config.vocab_size,
        architecture=checkpoint.config.architecture,
        chat_template=_template(template) if template else None,
    )


def _say_written(target: Path) -> None:
    files = [target] if target.is_file() else [file for file in target.iterdir() if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    typer.echo(
        f"Wrote {target} ({size / 1e9:.2f} GB)." if size >= 1e7 else f"Wrote {target} ({size:,} bytes)."
    )
