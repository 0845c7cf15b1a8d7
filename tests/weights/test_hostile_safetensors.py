"""Malformed and malicious safetensors (T5 and T2 of the threat list): each a typed error, quick and small."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ayllu.errors import AylluError, ModelFileError, UnsupportedError
from ayllu.weights.checkpoint import open_checkpoint
from ayllu.weights.huggingface import open_folder
from ayllu.weights.safetensors import MAX_HEADER_BYTES, MAX_NAME_BYTES, MAX_TENSORS, SafetensorsFile

Entry = dict[str, Any]
ALLOWED_BYTES = 64 << 20


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> Entry:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def container(header: object, data: bytes = bytes(8), length: int | None = None) -> bytes:
    """A file with that header: an object to be written as JSON, or bytes as they are."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


GOOD = container({"a": entry(), "b": entry("U8", [4], [8, 12])}, bytes(12))


def lengths_and_beginnings() -> Iterator[tuple[str, bytes]]:
    for size in range(9):
        yield f"only {size} bytes", GOOD[:size]
    for length in (
        0,
        1,
        len(GOOD),
        1 << 20,
        MAX_HEADER_BYTES,
        MAX_HEADER_BYTES + 1,
        10**8,
        2**31,
        2**63,
        2**64 - 1,
    ):
        yield f"header length {length}", container({"a": entry()}, length=length)
    for start in (
        b"[]",
        b"null",
        b'"a"',
        b"1",
        b" {}",
        b"\n{}",
        b"\xef\xbb\xbf{}",
        b"",
        b"\x80\x02}q\x00.",
        b"PK\x03\x04",
    ):
        yield f"header {start!r}", container(start, b"")
    yield "empty object with data", container({}, bytes(1))
    yield "something after the header", container(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}x')
    yield "a second object", container(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}{}')
    yield "NULs after the header", container(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}\0\0')


def layouts() -> Iterator[tuple[str, bytes]]:
    yield "one byte too few", container({"a": entry()}, bytes(7))
    yield "one byte too many", container({"a": entry()}, bytes(9))
    yield "a page too many", container({"a": entry()}, bytes(8 + 4096))
    yield "hole at the start", container({"a": entry(offsets=[4, 12])}, bytes(12))
    yield "hole in the middle", container({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20))
    yield "two tensors share bytes", container({"a": entry(), "b": entry()})
    yield "overlap of one byte", container({"a": entry(), "b": entry(offsets=[7, 15])}, bytes(15))
    yield "one inside the other", container({"a": entry(), "b": entry("U8", [2], [2, 4])})
    yield "offsets reversed", container({"a": entry(offsets=[8, 0])})
    yield "empty tensor inside another", container({"a": entry(), "b": entry("F32", [0], [4, 4])})
    yield "empty tensor past the end", container({"a": entry(), "b": entry("F32", [0], [9, 9])})
    yield "empty tensor that takes bytes", container({"a": entry("F32", [0], [0, 8])})
    yield "scalar without bytes", container({"a": entry("F32", [], [0, 0])}, b"")
    yield "data beyond the file", container({"a": entry("U8", [2**40], [0, 2**40])})
    yield "shape and offsets differ", container({"a": entry("F32", [3], [0, 8])})
    yield "dtype and offsets differ", container({"a": entry("F64", [2], [0, 8])})
    yield "half a byte", container({"a": entry("F4", [1], [0, 0])}, b"")
    yield "shape that overflows", container({"a": entry("U8", [4194305, 4194305, 211106198978564], [0, 8])})
    yield "shape that overflows to fit", container({"a": entry("U8", [2**32, 2**32], [0, 0])}, b"")
    yield "shape of 2**63", container({"a": entry("U8", [2**63], [0, 8])})
    yield "impossible shape of no elements", container({"a": entry("U8", [0, 9 * 10**18], [0, 0])}, b"")
    for shape in (
        [-1],
        [-2, -4],
        [2.0],
        ["2"],
        [None],
        [True],
        [[2]],
        {"0": 2},
        2,
        "2",
        None,
        [1] * 17 + [2],
    ):
        yield f"shape {shape!r}", container({"a": entry(shape=shape)})
    for offsets in (
        [],
        [0],
        [0, 8, 8],
        [-8, 0],
        [0.0, 8.0],
        ["0", "8"],
        [None, 8],
        {"0": 8},
        8,
        [0, 2**63],
        [0, 10**30],
    ):
        yield f"offsets {offsets!r}", container({"a": entry(offsets=offsets)})
    for dtype in (
        "f32",
        "F33",
        "",
        "FLOAT",
        "../../etc",
        "F32\0",
        "O",
        32,
        None,
        ["F32"],
        {"F": 32},
        "F" * 10_000,
    ):
        yield f"dtype {str(dtype)[:20]!r}", container({"a": entry(dtype)})


def entries() -> Iterator[tuple[str, bytes]]:
    for value in (None, 1, 1.5, "a", [], [entry()], True):
        yield f"entry {str(value)[:10]!r}", container({"a": value})
    for missing in ("dtype", "shape", "data_offsets"):
        yield f"without {missing}", container({"a": {k: v for k, v in entry().items() if k != missing}})
        twice = json.dumps(entry())[:-1] + f', "{missing}": {json.dumps(entry()[missing])}' + "}"
        yield f"{missing} twice", container(b'{"a": ' + twice.encode() + b"}")
    yield "empty entry", container({"a": {}})
    yield "an extra field", container({"a": entry() | {"code": "import os"}})
    yield "a nested field", container({"a": entry() | {"shape": {"a": entry()}}})
    one = json.dumps(entry())
    yield "a tensor twice", container(f'{{"a": {one}, "a": {one}}}'.encode())
    yield "a tensor twice, once escaped", container(f'{{"a": {one}, "\\u0061": {one}}}'.encode())
    yield "metadata twice", container(f'{{"__metadata__": {{}}, "a": {one}, "__metadata__": {{}}}}'.encode())
    for metadata in (1, "a", [], None, {"a": 1}, {"a": None}, {"a": {}}, {"a": ["b"]}, {"a": float("nan")}):
        yield f"metadata {metadata!r}", container({"__metadata__": metadata, "a": entry()})
    yield "a metadata key twice", container(b'{"__metadata__": {"a": "b", "a": "c"}}', b"")
    yield "NaN in the header", container(b'{"a": NaN}')
    yield "Infinity as an offset", container(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,Infinity]}}')
    yield "an exponent as an offset", container(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8e0]}}')
    yield "a leading zero", container(b'{"a":{"dtype":"F32","shape":[02],"data_offsets":[0,8]}}')
    yield "a plus sign", container(b'{"a":{"dtype":"F32","shape":[+2],"data_offsets":[0,8]}}')
    yield (
        "digits of another script",
        container('{"a":{"dtype":"F32","shape":[２],"data_offsets":[0,8]}}'.encode()),
    )
    yield "a trailing comma", container(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},}')
    yield "a trailing comma in a list", container(b'{"a":{"dtype":"F32","shape":[2,],"data_offsets":[0,8]}}')
    yield "a comma alone", container(b"{,}")
    yield "no comma", container(f'{{"a": {one} "b": {one}}}'.encode())
    yield "single quotes", container(b"{'a': {}}")
    yield "a comment", container(f'{{/* */"a": {one}}}'.encode())
    yield "a name that never ends", container(b'{"' + b"a" * 5000)
    yield "a backslash at the end", container(b'{"a\\')
    yield "bytes that are no text", container(b'{"\xff\xfe": ' + one.encode() + b"}")
    yield "half a surrogate pair", container(b'{"\\ud800": ' + one.encode() + b"}")
    yield "a wrong escape", container(b'{"\\x41": ' + one.encode() + b"}")
    yield "a control character in a name", container(b'{"a\nb": ' + one.encode() + b"}")
    yield "a name too long", container({"a" * (MAX_NAME_BYTES + 1): entry()})


ROOM = MAX_HEADER_BYTES - 64
FEW = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
ODD = b'"%d" :{"dtype":"U8","shape":[0],"data_offsets":[0,0] },'
# Headers that a general parser turns into many times their size.
BOMBS: dict[str, Callable[[], bytes]] = {
    "nested arrays": lambda: b"{" + b"[" * ROOM,
    "nested objects": lambda: b'{"a":' * (ROOM // 5),
    "empty arrays": lambda: b'{"a":[' + b"[]," * (ROOM // 3),
    "a long string": lambda: b'{"' + b"a" * ROOM,
    "a long string of escapes": lambda: b'{"' + b"\\n" * (ROOM // 2) + b'":1}',
    "a long number": lambda: b'{"a":{"shape":[' + b"9" * ROOM,
    "a long shape": lambda: b'{"a":{"shape":[' + b"1," * (ROOM // 2),
    "spaces": lambda: b"{" + b" " * ROOM,
    "spaces after the header": lambda: b"{}" + b" " * ROOM + b"x",
    "long metadata": lambda: b'{"__metadata__":{"a":"' + "é".encode() * (ROOM // 2 - 20) + b'"}}',
    "too many tensors": lambda: b"{" + b"".join(FEW % n for n in range(MAX_TENSORS + 1)),
    "many tensors, unusually spaced": lambda: b"{" + b"".join(ODD % n for n in range(30_000)),
}


CASES = [*lengths_and_beginnings(), *layouts(), *entries()]


def refused(path: Path, data: bytes) -> AylluError:
    path.write_bytes(data)
    started = time.process_time()
    with pytest.raises((ModelFileError, UnsupportedError)) as caught:
        opened = SafetensorsFile(path)
        for name in opened:
            opened[name]
    assert time.process_time() - started <= 1.0
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000
    return caught.value


@pytest.mark.parametrize(("what", "data"), CASES, ids=[what for what, _ in CASES])
def test_a_malformed_file_is_refused_by_name(tmp_path: Path, what: str, data: bytes) -> None:
    refused(tmp_path / "bad.safetensors", data)


def test_enough_files_are_tried() -> None:
    assert len(CASES) >= 120
    assert len({data for _, data in CASES}) >= 115


@pytest.mark.parametrize("what", BOMBS)
def test_a_header_bomb_costs_little_time_and_memory(tmp_path: Path, what: str) -> None:
    path, data = tmp_path / "bomb.safetensors", container(BOMBS[what]())
    error = refused(path, data)
    assert isinstance(error, ModelFileError)
    size = len(data)
    del data
    tracemalloc.start()
    with pytest.raises(ModelFileError):
        SafetensorsFile(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= size + ALLOWED_BYTES


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    SafetensorsFile(write(tmp_path / "good.safetensors", GOOD))
    for size in range(len(GOOD)):
        refused(tmp_path / "cut.safetensors", GOOD[:size])


def test_any_changed_byte_of_the_header_is_harmless(tmp_path: Path) -> None:
    """A flipped byte may still give a valid file (another name); anything else is a typed error."""
    chance = random.Random(5)
    header_end = 8 + struct.unpack("<Q", GOOD[:8])[0]
    path = tmp_path / "changed.safetensors"
    for _ in range(400):
        changed = bytearray(GOOD)
        for _ in range(chance.choice((1, 1, 2, 5))):
            changed[chance.randrange(header_end)] = chance.randrange(256)
        write(path, bytes(changed))
        try:
            opened = SafetensorsFile(path)
            total = sum(opened[name].nbytes for name in opened)
        except (ModelFileError, UnsupportedError) as error:
            assert str(path) in str(error)
        else:
            assert total == 12


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


class Payload:
    """Unpickling one of these makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def pickles(canary: Path) -> dict[str, bytes]:
    """File name -> bytes, each of which would run code in a careless loader."""
    plain = pickle.dumps(Payload(canary))
    named = pickle.dumps({"model.embed_tokens.weight": Payload(canary)})
    as_zip, as_tar, as_npy = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(as_zip, "w") as archive:
        archive.writestr("archive/data.pkl", named)
    with tarfile.open(fileobj=as_tar, mode="w") as tar:
        info = tarfile.TarInfo("data.pkl")
        info.size = len(named)
        tar.addfile(info, io.BytesIO(named))
    np.save(as_npy, np.array([Payload(canary)], dtype=object), allow_pickle=True)
    files = {
        "pytorch_model.bin": as_zip.getvalue(),
        "model.pt": as_zip.getvalue(),
        "model.pth": named,
        "consolidated.00.pth": as_zip.getvalue(),
        "model.pkl": plain,
        "model.pickle": plain,
        "model.ckpt": as_zip.getvalue(),
        "weights.npy": as_npy.getvalue(),
        "weights.npz": as_zip.getvalue(),
        "model.h5": b"\x89HDF\r\n\x1a\n" + named,
        "model.keras": as_zip.getvalue(),
        "model.joblib": plain,
        "model.tar": as_tar.getvalue(),
        "model.zip": as_zip.getvalue(),
        "model.7z": b"7z\xbc\xaf\x27\x1c" + named,
    }
    renamed = {f"{index}.safetensors": data for index, data in enumerate((plain, named, as_zip.getvalue()))}
    return files | renamed | {"tar.safetensors": as_tar.getvalue(), "npy.gguf": as_npy.getvalue()}


CONFIG = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
}


def test_no_pickle_is_opened_under_any_name(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    files = pickles(canary)
    assert len(files) == 20
    for number, (name, data) in enumerate(files.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG))
        write(folder / name, data)
        for path in (folder, folder / name):
            with pytest.raises((ModelFileError, UnsupportedError)):
                open_checkpoint(path)
    assert not canary.exists()
    # The payload is live: the files above were refused, not harmless.
    pickle.loads(files["model.pkl"])  # noqa: S301
    assert canary.exists()


def test_a_link_to_a_pickle_is_not_followed(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    write(tmp_path / "elsewhere.pkl", pickle.dumps(Payload(canary)))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.pkl")
    with pytest.raises(ModelFileError, match="link out of the model's folder"):
        open_folder(folder)
    assert not canary.exists()


def test_a_pickle_beside_safetensors_is_ignored(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    canary, folder = tmp_path / "canary", tmp_path / "model"
    folder.mkdir()
    for file in tiny_folder("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    write(folder / "pytorch_model.bin", pickle.dumps(Payload(canary)))
    assert open_folder(folder).config.architecture == "llama"
    assert not canary.exists()
