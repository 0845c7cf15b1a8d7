"""Malformed GGUF files: each is a typed error that names the file, soon, and in little memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ayllu.errors import AylluError, ModelFileError, UnsupportedError
from ayllu.weights.gguf import read_gguf
from ayllu.weights.gguf_model import open_gguf
from tests.weights.hostile_gguf import (
    AMPLIFIERS,
    BREAKS,
    CONTAINER_IS_SOUND,
    SEEDS,
    hostile_file,
    valid_model,
)

SECONDS_ALLOWED = 1.0


def refused(read: Callable[[Path], object], path: Path) -> AylluError:
    """The error that reading ends in. Anything but a typed one that names the file fails the test."""
    start = time.process_time()
    with pytest.raises((ModelFileError, UnsupportedError)) as caught:
        read(path)
    assert time.process_time() - start <= SECONDS_ALLOWED
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return caught.value


def test_the_corpus_has_at_least_300_files() -> None:
    assert len(BREAKS) * len(SEEDS) >= 300


def test_the_unbroken_model_opens(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(valid_model().build())
    assert open_gguf(path).config.num_hidden_layers == 2


@pytest.mark.parametrize("name", BREAKS)
def test_malformed_file_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for seed in SEEDS:
        path.write_bytes(hostile_file(name, seed))
        refused(open_gguf, path)
        if name in CONTAINER_IS_SOUND:
            read_gguf(path)
        else:
            error = refused(read_gguf, path)
            if isinstance(error, ModelFileError):
                assert error.field is not None and error.offset is not None


def test_file_cut_at_any_byte_of_its_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    draft = valid_model()
    path.write_bytes(draft.build())
    for length in reversed(range(len(draft.header()))):
        os.truncate(path, length)
        with pytest.raises(ModelFileError) as caught:
            open_gguf(path)
        assert str(path) in str(caught.value)


def test_file_cut_at_any_page_of_its_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    draft = valid_model()
    whole = draft.build()
    assert len(whole) > 16 * 4096
    for length in range(len(draft.header()), len(whole) - 4095, 4096):
        path.write_bytes(whole[:length])
        assert isinstance(refused(open_gguf, path), ModelFileError)


def test_real_file_cut_anywhere_is_refused(smollm2_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with smollm2_gguf.open("rb") as file:
        head = file.read(4_000_000)
    rng = Random(0)
    for length in sorted(rng.randrange(len(head)) for _ in range(12)):
        path.write_bytes(head[:length])
        refused(open_gguf, path)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_flipped_header_bytes_never_cause_an_untyped_error(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "model.gguf"
    draft = valid_model()
    whole = bytearray(draft.build())
    positions = st.integers(0, len(draft.header()) - 1)
    for position in data.draw(st.lists(positions, min_size=1, max_size=3)):
        whole[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    try:
        checkpoint = open_gguf(path)
    except (ModelFileError, UnsupportedError) as error:
        assert str(path) in str(error)
    else:
        for tensor in checkpoint.tensors.values():
            assert tensor.decode().shape == tensor.shape


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(body=st.binary(max_size=400))
def test_arbitrary_bytes_after_the_magic_never_cause_an_untyped_error(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + body)
    with pytest.raises((ModelFileError, UnsupportedError)):
        open_gguf(path)


def test_folder_or_missing_file_is_a_typed_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.gguf"):
        assert "cannot be opened" in str(refused(read_gguf, path))


@pytest.mark.parametrize("name", AMPLIFIERS)
def test_small_file_that_asks_for_much_is_refused_soon(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(AMPLIFIERS[name]())
    refused(open_gguf, path)


_MEASURE = """
import sys
from pathlib import Path
from ayllu.errors import AylluError
from ayllu.weights.gguf import read_gguf
from ayllu.weights.gguf_model import open_gguf
from tests.weights.hostile_gguf import BREAKS, hostile_file, valid_model

folder = Path(sys.argv[1])
files = {f"{number}.gguf": hostile_file(name, 0) for number, name in enumerate(BREAKS)}
for name, data in files.items():
    (folder / name).write_bytes(data)
small = max(map(len, files.values()))
(folder / "valid.gguf").write_bytes(valid_model().build())
open_gguf(folder / "valid.gguf")

def memory(field):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(field + ":")[1].split()[0])

def grown_by(paths):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is held now
    before = memory("VmRSS")
    for path in paths:
        for read in (read_gguf, open_gguf):
            try:
                read(path)
            except AylluError:
                pass
    return memory("VmHWM") - before

print(small, grown_by(folder / name for name in files))
for number in range(int(sys.argv[2])):
    path = folder / f"amplifier{number}"
    print(path.stat().st_size, grown_by([path]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_memory_stays_below_the_file_plus_64_mib(tmp_path: Path) -> None:
    # Written here, not there: building the files would itself raise the peak that is measured.
    for number, build in enumerate(AMPLIFIERS.values()):
        (tmp_path / f"amplifier{number}").write_bytes(build())
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path), str(len(AMPLIFIERS))],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    lines = [tuple(map(int, line.split())) for line in result.stdout.splitlines()]
    assert len(lines) == 1 + len(AMPLIFIERS)
    for size, growth in lines:
        assert growth <= size + 64 * 2**20, f"{growth} bytes more for a file of {size}"
