"""Experts in a file of their own: the same answers, only chosen ones read, a damaged file made again."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ayllu.engine import open_native as open_native_module
from ayllu.engine import packed_file
from ayllu.engine.layer_groups import layer_groups
from ayllu.engine.native_runner import native_decoder
from ayllu.engine.open_native import open_native
from ayllu.engine.opened import OpenedRunner
from ayllu.engine.options import EngineOptions
from ayllu.engine.packed_file import PAGE, layout_of, mapped_experts
from ayllu.engine.packed_weights import expert_bytes, expert_stacks, pack_weights, packed_weight_bytes
from ayllu.engine.step_runner import RunnerPiece
from ayllu.errors import NoSpaceError, UsageError
from ayllu.kernels.native.decoder import NativePiece
from ayllu.kernels.native.library import PackedMatrix, unpacked
from ayllu.model.config import ExpertsConfig, ModelConfig
from ayllu.model.parameters import parameter_shapes
from ayllu.model.presets import llama4_layers
from ayllu.progress import SILENT
from ayllu.weights.checkpoint import Checkpoint, open_checkpoint
from ayllu.weights.hf_save import save_folder
from ayllu.weights.tensors import PlainTensor
from tests.engine.native_models import saved
from tests.model.tiny import tiny_llama, tiny_llama4

LIMIT = 140 << 20
"""Private memory of the limit tests beyond the interpreter's; the experts take more than twice as much."""

ENCODINGS = {"F32": "m.gguf", "BF16": "folder", "Q8_0": "m.gguf", "Q4_0": "m.gguf"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return saved(tiny_llama4(layers=4, top_k=2), tmp_path / "model", encoding="BF16")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "packed"


def file_in(folder: Path) -> Path:
    (path,) = folder.glob("*.packed")
    return path


def bytes_of(matrices: dict[str, PackedMatrix], checkpoint: Checkpoint) -> dict[str, bytes]:
    """The packed bytes of each stack."""
    count = checkpoint.config.experts.num_experts  # type: ignore[union-attr]
    return {
        name: ctypes.string_at(matrix.address, count * matrix.nbytes)
        for name, matrix in matrices.items()
        if "experts." in name and "shared" not in name
    }


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_file_holds_the_bytes_that_packing_into_memory_gives(
    encoding: str, tmp_path: Path, folder: Path
) -> None:
    checkpoint = saved(
        tiny_llama4(layers=3, expert_step=2), tmp_path / ENCODINGS[encoding], encoding=encoding
    )
    in_memory = bytes_of(pack_weights(checkpoint, threads=1).matrices, checkpoint)
    mapped = mapped_experts(checkpoint, threads=2, folder=folder)
    assert bytes_of(mapped, checkpoint) == in_memory
    assert set(mapped) == {name for name, _ in expert_stacks(checkpoint)}
    assert all(matrix.address % PAGE == 0 for matrix in mapped.values())


def test_experts_on_disk_are_not_packed_into_memory_too(checkpoint: Checkpoint, folder: Path) -> None:
    mapped = mapped_experts(checkpoint, threads=1, folder=folder)
    weights = pack_weights(checkpoint, threads=1, packed=mapped)
    sizes = expert_bytes(checkpoint)
    assert weights.memory.nbytes < packed_weight_bytes(checkpoint) - sizes.total + PAGE
    assert sizes.one_token == sizes.total // 2  # two of four experts
    for name, matrix in mapped.items():
        assert weights.matrices[name] is matrix


def test_the_mapping_outlives_everything_but_its_matrices(checkpoint: Checkpoint, folder: Path) -> None:
    matrix = mapped_experts(checkpoint, threads=1, folder=folder).popitem()[1]
    file_in(folder).unlink()
    assert np.isfinite(unpacked(matrix)).all()


def test_a_whole_file_is_used_again(checkpoint: Checkpoint, folder: Path) -> None:
    mapped_experts(checkpoint, threads=1, folder=folder)
    before = file_in(folder).stat()
    mapped_experts(open_checkpoint(checkpoint.path), threads=1, folder=folder)
    after = file_in(folder).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert after.st_mode & 0o777 == 0o600


def _shortened(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _lengthened(path: Path) -> None:
    os.truncate(path, path.stat().st_size + PAGE)


def _emptied(path: Path) -> None:
    os.truncate(path, 0)


def _foreign(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def _of_another_version(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(8)
        file.write(struct.pack("<I", packed_file.VERSION + 1))


def _a_link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


@pytest.mark.parametrize(
    "damage", [_shortened, _lengthened, _emptied, _foreign, _of_another_version, _a_link]
)
def test_a_file_that_is_not_as_it_must_be_is_made_again(
    damage: Any, checkpoint: Checkpoint, folder: Path
) -> None:
    expected = bytes_of(mapped_experts(checkpoint, threads=1, folder=folder), checkpoint)
    damage(file_in(folder))
    found = mapped_experts(checkpoint, threads=1, folder=folder)
    assert bytes_of(found, checkpoint) == expected
    assert file_in(folder).read_bytes().startswith(layout_of(checkpoint).header)
    assert not file_in(folder).is_symlink()


def test_every_flipped_byte_of_the_header_is_seen(checkpoint: Checkpoint, folder: Path) -> None:
    mapped_experts(checkpoint, threads=1, folder=folder)
    path, layout = file_in(folder), layout_of(checkpoint)
    whole = path.read_bytes()
    for place in range(len(layout.header)):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(bytes([whole[place] ^ 0x40]))
            file.flush()
            assert packed_file._opened(path, layout) is None, place
            file.seek(place)
            file.write(whole[place : place + 1])
    assert packed_file._opened(path, layout) is not None


def test_another_users_file_is_not_trusted(
    checkpoint: Checkpoint, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped_experts(checkpoint, threads=1, folder=folder)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert packed_file._opened(file_in(folder), layout_of(checkpoint)) is None


def test_a_changed_model_replaces_its_file(tmp_path: Path, folder: Path) -> None:
    first = saved(tiny_llama4(layers=4), tmp_path / "model", encoding="BF16", seed=1)
    before = bytes_of(mapped_experts(first, threads=1, folder=folder), first)
    shutil.rmtree(tmp_path / "model")
    second = saved(tiny_llama4(layers=4), tmp_path / "model", encoding="BF16", seed=2)
    after = bytes_of(mapped_experts(second, threads=1, folder=folder), second)
    assert before != after
    assert after == bytes_of(pack_weights(second, threads=1).matrices, second)
    file_in(folder)  # there is one


def test_another_way_of_packing_replaces_the_file(
    checkpoint: Checkpoint, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped_experts(checkpoint, threads=1, folder=folder)
    before = file_in(folder).stat().st_ino, file_in(folder).read_bytes()[:PAGE]
    monkeypatch.setattr(packed_file, "_packing_fingerprint", lambda encoding: "another")
    mapped_experts(checkpoint, threads=1, folder=folder)
    assert (file_in(folder).stat().st_ino, file_in(folder).read_bytes()[:PAGE]) != before


def test_the_file_of_a_model_that_is_gone_goes_when_another_is_made(tmp_path: Path, folder: Path) -> None:
    gone = saved(tiny_llama4(layers=2), tmp_path / "gone", encoding="BF16")
    mapped_experts(gone, threads=1, folder=folder)
    (folder / "notes.packed").write_bytes(b"not ours")
    shutil.rmtree(tmp_path / "gone")
    mapped_experts(saved(tiny_llama4(layers=2), tmp_path / "here"), threads=1, folder=folder)
    names = sorted(path.name for path in folder.glob("*.packed"))
    assert [name.partition("-")[0] for name in names] == ["here", "notes.packed"]


# A disk that is too small, a writer that is killed, two writers.


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    checkpoint: Checkpoint, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 20, 1 << 20, 1 << 10))
    with pytest.raises(NoSpaceError, match=r"1\.0 KB is free there.*XDG_CACHE_HOME"):
        mapped_experts(checkpoint, threads=1, folder=folder)
    assert not [path for path in folder.iterdir() if not path.name.endswith(".lock")]


@pytest.mark.parametrize("reserves", [True, False])
def test_a_disk_that_fills_while_writing_is_a_typed_error_and_leaves_nothing(
    reserves: bool, checkpoint: Checkpoint, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not reserves:

        def refuse(*_: int) -> None:
            raise OSError(errno.EOPNOTSUPP, "not here")

        monkeypatch.setattr(os, "posix_fallocate", refuse)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (layout_of(checkpoint).nbytes // 2, before[1]))
    try:
        with pytest.raises(NoSpaceError, match="has no room"):
            mapped_experts(checkpoint, threads=1, folder=folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [path for path in folder.iterdir() if not path.name.endswith(".lock")]
    mapped_experts(checkpoint, threads=1, folder=folder)


def test_a_folder_that_cannot_be_made_is_a_typed_error(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match="cannot be written"):
        mapped_experts(checkpoint, threads=1, folder=tmp_path / "file" / "packed")


SLOW_WRITER = """
import sys, time
from pathlib import Path
from ayllu.engine import packed_file
from ayllu.weights.checkpoint import open_checkpoint
write = packed_file._write_stack
def slowly(*arguments):
    write(*arguments)
    print("wrote", flush=True)
    time.sleep(float(sys.argv[3]))
packed_file._write_stack = slowly
packed_file.mapped_experts(open_checkpoint(Path(sys.argv[1])), threads=1, folder=Path(sys.argv[2]))
print("done", flush=True)
"""


@contextlib.contextmanager
def slow_writer(checkpoint: Checkpoint, folder: Path, pause_s: float) -> Iterator[subprocess.Popen[str]]:
    """A process that packs and rests after each stack. It has written its first one."""
    arguments = [sys.executable, "-c", SLOW_WRITER, str(checkpoint.path), str(folder), str(pause_s)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "wrote\n"
            yield process
        finally:
            process.kill()


def test_a_killed_writer_leaves_nothing_that_is_used_or_kept(checkpoint: Checkpoint, folder: Path) -> None:
    with slow_writer(checkpoint, folder, 600) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(list(folder.glob(".*.partial"))) == 1
    assert not list(folder.glob("*.packed"))
    found = mapped_experts(checkpoint, threads=1, folder=folder)
    assert bytes_of(found, checkpoint) == bytes_of(pack_weights(checkpoint, threads=1).matrices, checkpoint)
    assert not list(folder.glob(".*.partial"))


def test_of_two_processes_one_makes_the_file_and_the_other_waits_for_it(
    checkpoint: Checkpoint, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    monkeypatch.setattr(packed_file, "_make", lambda path, *_: made.append(path))
    found: list[dict[str, PackedMatrix]] = []
    with slow_writer(checkpoint, folder, 0.05) as process:
        waits = threading.Thread(
            target=lambda: found.append(mapped_experts(checkpoint, threads=1, folder=folder))
        )
        waits.start()
        process.wait()
        waits.join()
    assert not made and len(found) == 1
    assert bytes_of(found[0], checkpoint) == bytes_of(
        pack_weights(checkpoint, threads=1).matrices, checkpoint
    )


# Where the experts are.


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, for this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ayllu" / "packed"


def opened_with(checkpoint: Checkpoint, place: str) -> OpenedRunner:
    options = EngineOptions(
        context=64,
        slots=1,
        step_tokens=64,
        threads=1,
        prefix_cache=False,
        experts=place,  # type: ignore[arg-type]
    )
    return open_native(checkpoint, options, SILENT, "a-mixture")


def free(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(open_native_module, "free_memory", lambda: nbytes)


@pytest.mark.usefixtures("cache_home")
def test_on_disk_the_answers_are_those_in_memory(checkpoint: Checkpoint) -> None:
    in_memory, on_disk = (opened_with(checkpoint, place) for place in ("memory", "disk"))
    prompt = [3, 1, 4, 1, 5]
    tables = [list(range(count)) for count in in_memory.plan.block_counts]
    piece = RunnerPiece(prompt, 0, tables)
    (expected,), (found,) = (opened.runner.forward([piece]) for opened in (in_memory, on_disk))
    np.testing.assert_array_equal(found, expected)


def test_the_plan_and_its_facts_tell_what_stays_on_disk(checkpoint: Checkpoint, cache_home: Path) -> None:
    sizes = expert_bytes(checkpoint)
    in_memory, on_disk = (opened_with(checkpoint, place).plan for place in ("memory", "disk"))
    assert on_disk.weight_bytes == in_memory.weight_bytes - sizes.total + sizes.one_token
    assert on_disk.disk_bytes == on_disk.facts()["disk_bytes"] == sizes.total
    assert any("stay on disk" in line for line in on_disk.lines())
    assert in_memory.disk_bytes == 0 and not any("disk" in line for line in in_memory.lines())
    assert file_in(cache_home).stat().st_size >= sizes.total


def test_auto_leaves_experts_on_disk_only_when_that_makes_them_fit(
    checkpoint: Checkpoint, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = opened_with(checkpoint, "memory").plan
    free(monkeypatch, whole.total_bytes)
    assert opened_with(checkpoint, "auto").plan.disk_bytes == 0
    assert not cache_home.exists()
    free(monkeypatch, whole.total_bytes - 1)
    assert opened_with(checkpoint, "auto").plan.disk_bytes == expert_bytes(checkpoint).total
    with pytest.raises(NoSpaceError, match="a-mixture needs"):
        opened_with(checkpoint, "memory")
    sizes = expert_bytes(checkpoint)
    free(monkeypatch, whole.total_bytes - sizes.total + sizes.one_token - 1)
    for place in ("auto", "disk"):
        with pytest.raises(NoSpaceError, match="a-mixture needs"):
            opened_with(checkpoint, place)


def test_a_model_without_experts_has_none_to_keep_on_disk(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no experts to keep on disk"):
        opened_with(saved(tiny_llama(), tmp_path / "m.gguf"), "disk")


def test_a_place_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match="experts = tape is unknown"):
        EngineOptions(experts="tape")  # type: ignore[arg-type]


# Only chosen experts are read.


@pytest.mark.parametrize("top_k", [1, 2])
def test_only_chosen_experts_are_read(top_k: int, tmp_path: Path, folder: Path) -> None:
    """All others are overwritten with NaN in the packed file: the hidden states do not change."""
    config = tiny_llama4(layers=4, expert_step=2, top_k=top_k)
    checkpoint = saved(config, tmp_path / "model", encoding="BF16")
    groups = layer_groups(config)

    def hidden(rows: int) -> tuple[np.ndarray[Any, Any], int]:
        mapped = mapped_experts(checkpoint, threads=1, folder=folder)
        decoder = native_decoder(
            config, pack_weights(checkpoint, threads=1, packed=mapped), groups, threads=1
        )
        decoder.advise_experts()
        decoder.make_cache([1] * len(groups), 8)
        piece = NativePiece(np.arange(3, 3 + rows, dtype=np.int32), 0, [np.zeros(1, np.int32)] * len(groups))
        return decoder.forward([piece]), decoder.experts_read

    assert config.experts is not None
    mixtures = sum(layer.experts for layer in config.layers)
    for rows in (1, 2, 7):
        expected, read = hidden(rows)
        if rows == 1:
            assert read == mixtures * top_k
        assert mixtures * top_k <= read <= mixtures * min(rows * top_k, config.experts.num_experts)
        harmless = 0
        for stack in range(mixtures):
            for expert in range(config.experts.num_experts):
                with poisoned(file_in(folder), checkpoint, stack, expert):
                    harmless += np.array_equal(hidden(rows)[0], expected)
        assert harmless == mixtures * config.experts.num_experts - read


@contextlib.contextmanager
def poisoned(path: Path, checkpoint: Checkpoint, mixture: int, expert: int) -> Iterator[None]:
    """Inside, the three matrices of an expert are NaN in the packed file."""
    layout = layout_of(checkpoint)
    saved_parts = []
    with path.open("r+b") as file:
        for stack in layout.stacks[3 * mixture : 3 * mixture + 3]:
            size = stack.nbytes // stack.count
            place = len(layout.header) + stack.offset + expert * size
            file.seek(place)
            saved_parts.append((place, file.read(size)))
            file.seek(place)
            file.write(b"\xff" * size)
        file.flush()
        try:
            yield
        finally:
            for place, part in saved_parts:
                file.seek(place)
                file.write(part)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages are in memory")
def test_the_system_holds_the_pages_of_chosen_experts_alone(tmp_path: Path, folder: Path) -> None:
    config = replace(
        tiny_llama4(layers=4),
        experts=ExpertsConfig(num_experts=8, top_k=1, intermediate_size=512, shared_intermediate_size=512),
    )
    checkpoint = saved(config, tmp_path / "model", encoding="BF16")
    mapped = mapped_experts(checkpoint, threads=1, folder=folder)
    weights = pack_weights(checkpoint, threads=1, packed=mapped)
    groups = layer_groups(config)
    decoder = native_decoder(config, weights, groups, threads=1)
    decoder.advise_experts()
    decoder.make_cache([1] * len(groups), 8)
    piece = NativePiece(np.array([5], np.int32), 0, [np.zeros(1, np.int32)] * len(groups))
    expected = decoder.forward([piece])
    forget(file_in(folder), mapped)
    if resident(mapped, 8).any():
        pytest.skip("this file system holds its files in memory")
    np.testing.assert_array_equal(decoder.forward([piece]), expected)
    shares = resident(mapped, 8).reshape(4, 3, 8)
    assert (np.sort(shares, axis=2)[:, :, -1] == 1).all()  # one expert whole in each layer
    assert (shares.argmax(2) == shares.argmax(2)[:, :1]).all()  # the same one in its three stacks
    assert shares.mean() < 1 / 4  # a file system may bring some pages beside it


def forget(path: Path, mapped: dict[str, PackedMatrix]) -> None:
    """Give all pages of a packed file back to the system: it must read them again."""
    for owner in {id(matrix.owner): matrix.owner for matrix in mapped.values()}.values():
        owner.base.obj.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(mapped: dict[str, PackedMatrix], experts: int) -> np.ndarray[Any, Any]:
    """The share of each expert's pages [stacks * experts] that is in memory (mincore(2))."""
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    shares = []
    for matrix in mapped.values():
        assert matrix.nbytes % mmap.PAGESIZE == 0
        for expert in range(experts):
            pages = np.zeros(matrix.nbytes // mmap.PAGESIZE, np.uint8)
            assert mincore(matrix.address + expert * matrix.nbytes, matrix.nbytes, pages.ctypes.data) == 0
            shares.append((pages & 1).mean())
    return np.array(shares)


# A model of twice the limit.


def large_mixture() -> ModelConfig:
    """Experts of 302 MB in bfloat16: 6 layers of 16, 3.1 MB each."""
    return replace(
        tiny_llama4(layers=6, chunk=256),
        vocab_size=512,
        hidden_size=512,
        num_attention_heads=8,
        head_dim=64,
        intermediate_size=1024,
        layers=llama4_layers(6, chunk=256, expert_step=1),
        experts=ExpertsConfig(num_experts=16, top_k=1, intermediate_size=1024, shared_intermediate_size=1024),
    )


def save_large(config: ModelConfig, path: Path) -> None:
    """Random bfloat16 weights as a folder of safetensors, made tensor by tensor."""
    rng = np.random.default_rng(7)
    tensors = {}
    for name, shape in parameter_shapes(config).items():
        if len(shape) == 1:
            values = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        else:
            values = rng.standard_normal(shape, np.float32)
            values *= 1.5 / shape[-1] ** 0.5
        tensors[name] = PlainTensor(values.astype(ml_dtypes.bfloat16))
    save_folder(Checkpoint(Path("random"), "safetensors", config, tensors), path)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "mixture"
    save_large(large_mixture(), path)
    assert expert_bytes(open_checkpoint(path)).total > 2 * LIMIT
    return path


def generate(path: Path, place: str, limit: int, cache: Path, group: str = "-") -> dict[str, Any]:
    """What `limited_generation` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.limited_generation", str(path), place, str(limit), group, "24"],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_mixture_of_twice_the_memory_limit_gives_the_tokens_it_gives_without(
    large: Path, tmp_path: Path
) -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux limits private memory by RLIMIT_DATA")
    expected = generate(large, "memory", 0, tmp_path)
    assert len(set(expected["tokens"])) > 4
    refused = generate(large, "memory", LIMIT, tmp_path)
    assert refused["error"] == "NoSpaceError"  # the limit limits
    for _ in ("packs", "finds packed"):
        found = generate(large, "disk", LIMIT, tmp_path)
        assert found["tokens"] == expected["tokens"]
        assert found["disk_bytes"] > 2 * LIMIT


@pytest.fixture
def group() -> Iterator[Path]:
    """A cgroup with LIMIT bytes of memory, page cache included."""
    base = Path("/sys/fs/cgroup")
    own = Path("/proc/self/cgroup")
    lines = own.read_text("ascii").splitlines() if own.exists() else []
    own_path = next((line[3:] for line in lines if line.startswith("0::")), None)
    if own_path is None or not (base / "cgroup.controllers").exists():
        pytest.skip("there is no cgroup 2 here")
    parent = base / own_path.lstrip("/")
    control = parent / "cgroup.subtree_control"
    if not control.exists() or "memory" not in control.read_text("ascii").split():
        pytest.skip("this process's cgroup does not hand the memory controller on")
    made = parent / f"ayllu-test-{os.getpid()}"
    try:
        made.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error.strerror}")
    try:
        (made / "memory.max").write_text(str(LIMIT), "ascii")
        yield made
    finally:
        while made.exists():
            try:
                made.rmdir()
            except OSError:  # its last process is still ending
                time.sleep(0.01)


def test_a_mixture_of_twice_its_cgroups_memory_stays_on_disk_and_answers(
    large: Path, group: Path, tmp_path: Path
) -> None:
    expected = generate(large, "memory", 0, tmp_path)
    found = generate(large, "auto", 0, tmp_path, str(group))
    assert found["tokens"] == expected["tokens"]
    assert found["disk_bytes"] > 2 * LIMIT
