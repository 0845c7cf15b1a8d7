"""`ayllu convert`: every format to every other, and refusals that leave nothing behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ayllu.cli.main import app
from ayllu.errors import AylluError, ModelFileError, UnsupportedError, UsageError
from ayllu.weights.checkpoint import Checkpoint, open_checkpoint
from ayllu.weights.huggingface import open_folder
from ayllu.weights.meta import save_meta
from tests.weights.tiny_folders import save_tiny

TOKENIZER = {
    "model": {"type": "BPE", "vocab": {chr(33 + n): n for n in range(64)}, "merges": []},
    "pre_tokenizer": {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    },
    "decoder": {"type": "ByteLevel"},
    "added_tokens": [],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_tiny("llama", tmp_path_factory.mktemp("convert") / "llama", dtype="float16")
    (made / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return made


def run(*arguments: str | Path) -> str:
    """What the command prints. Expected failures are raised."""
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    if isinstance(result.exception, AylluError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def same_numbers(one: Checkpoint, other: Checkpoint) -> bool:
    return one.tensors.keys() == other.tensors.keys() and all(
        np.array_equal(tensor.decode(), other.tensors[name].decode()) for name, tensor in one.tensors.items()
    )


def test_a_folder_goes_to_gguf_and_back_without_changing_a_number(folder: Path, tmp_path: Path) -> None:
    assert "Wrote" in run(folder, tmp_path / "model.gguf")
    output = run(tmp_path / "model.gguf", tmp_path / "back")
    assert "No tokenizer was written" not in output
    assert same_numbers(open_folder(folder), open_folder(tmp_path / "back"))
    assert open_folder(tmp_path / "back").config == open_folder(folder).config


@pytest.mark.parametrize("kind", ["F16", "bf16", "q8_0"])
def test_the_type_of_a_gguf_can_be_chosen(kind: str, folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "model.gguf", "--type", kind)
    assert kind.upper() in open_checkpoint(tmp_path / "model.gguf").bytes_by_encoding


def test_the_vocabulary_goes_into_the_gguf(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "model.gguf")
    metadata = open_checkpoint(tmp_path / "model.gguf").metadata
    assert len(metadata["tokenizer.ggml.tokens"]) == 64


def test_folders_convert_to_folders_with_their_tokenizer(folder: Path, tmp_path: Path) -> None:
    output = run(folder, tmp_path / "out", "--type", "BF16", "--shard-size", "0.001")
    assert "No tokenizer" not in output
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == TOKENIZER
    assert set(open_folder(tmp_path / "out").bytes_by_encoding) == {"BF16"}


def test_metas_shards_become_a_folder(folder: Path, tmp_path: Path) -> None:
    save_meta(open_folder(folder), tmp_path / "meta", shards=2)
    run(tmp_path / "meta", tmp_path / "out", "--context", "1234")
    assert same_numbers(open_folder(tmp_path / "out"), open_folder(folder))
    assert open_folder(tmp_path / "out").config.max_position_embeddings == 1234


class Payload:
    """Unpickling one of these makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def test_a_hostile_pth_runs_nothing_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    canary, source = tmp_path / "canary", tmp_path / "meta"
    save_meta(open_folder(folder), source, shards=1)
    shard = source / "consolidated.00.pth"
    torch.save(torch.load(shard, weights_only=True) | {"norm.weight": Payload(canary)}, shard)
    zipped = shard.read_bytes()
    for hostile in (zipped, pickle.dumps(Payload(canary)), pickle.dumps({"norm.weight": Payload(canary)})):
        shard.write_bytes(hostile)
        with pytest.raises(ModelFileError, match="restricted loader"):
            run(source, tmp_path / "out")
    assert not canary.exists()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["meta"]


@pytest.mark.parametrize("options", [(), ("--to", "gguf")])
def test_an_existing_target_is_kept_without_force(
    options: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / ("model.gguf" if options else "out")
    run(folder, target, *options)
    with pytest.raises(UsageError, match="exists already"):
        run(folder, target, *options)
    run(folder, target, *options, "--force")
    assert [item.name for item in tmp_path.iterdir()] == [target.name]


WRONG: list[tuple[tuple[str, ...], str]] = [
    (("--to", "safetensors", "--type", "q8_0"), "--type Q8_0 does not go with"),
    (("--to", "gguf", "--unfused"), "--unfused is for safetensors"),
    (("--context", "8"), "--context is for Meta"),
]


@pytest.mark.parametrize(("options", "problem"), WRONG)
def test_options_that_do_not_go_together_are_refused(
    options: tuple[str, ...], problem: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=problem):
        run(folder, tmp_path / "out", *options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_never_converted_onto_itself(folder: Path) -> None:
    before = sorted(file.name for file in folder.iterdir())
    with pytest.raises(UsageError, match="TARGET is SOURCE"):
        run(folder, folder, "--force")
    assert sorted(file.name for file in folder.iterdir()) == before


def test_a_gguf_is_not_written_over_a_folder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        run(folder, tmp_path, "--to", "gguf", "--force")
    assert list(tmp_path.iterdir()) == []


def test_a_pickled_folder_is_pointed_to_safetensors(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "in" / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(UnsupportedError, match="can run code"):
        run(tmp_path / "in", tmp_path / "out")


def test_importing_the_command_loads_neither_torch_nor_numpy() -> None:
    code = "import sys, ayllu.cli.convert; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_force_deletes_nothing_but_models(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "home" / "model").mkdir(parents=True)
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    shutil.copytree(folder, tmp_path / "home" / "source")
    for target in (tmp_path / "home", tmp_path / "home" / "source" / ".."):
        for source in (folder, tmp_path / "home" / "source"):
            with pytest.raises(UsageError):
                run(source, target, "--force")
    with pytest.raises(UsageError, match="not a GGUF"):
        run(folder, tmp_path / "home" / "thesis.txt", "--to", "gguf", "--force")
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["home"]
    assert same_numbers(open_folder(tmp_path / "home" / "source"), open_folder(folder))


def test_a_gguf_is_not_converted_over_the_folder_it_lies_in(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(folder, tmp_path / "m.gguf")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is or holds the source"):
        run("m.gguf", ".", "--force")
    assert [item.name for item in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("target", ["file/model.gguf", "file/out", "x" * 300 + ".gguf", "x" * 300])
def test_a_target_that_cannot_be_written_is_a_usage_error(target: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError):
        run(folder, tmp_path / target)
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("size", ["inf", "nan", "-1", "1e300"])
def test_a_shard_size_is_a_number(size: str, folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["convert", str(folder), str(tmp_path / "out"), "--shard-size", size])
    assert isinstance(result.exception, UsageError) or result.exit_code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("template", "problem"), [(b"\xff\xfe", "not UTF-8"), (b"x" * (2 << 20), "too large")]
)
def test_a_chat_template_is_text_of_a_sensible_size(
    template: bytes, problem: str, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "in")
    (tmp_path / "in" / "chat_template.jinja").write_bytes(template)
    with pytest.raises(ModelFileError, match=problem):
        run(tmp_path / "in", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
