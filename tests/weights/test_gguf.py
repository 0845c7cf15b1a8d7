"""The GGUF container read and written, held against the `gguf` package in both directions."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ayllu.errors import NoSpaceError, UnsupportedError, UsageError
from ayllu.weights import gguf_writer
from ayllu.weights.gguf import read_gguf
from ayllu.weights.gguf_blocks import WRITABLE_TYPES, QuantisedTensor
from ayllu.weights.gguf_writer import TensorToWrite, write_gguf
from ayllu.weights.tensors import JoinedTensor, PlainTensor
from tests.weights.hostile_gguf import U32, valid_model

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "u8": np.uint8(200),
    "i8": np.int8(-100),
    "u16": np.uint16(60_000),
    "i16": np.int16(-30_000),
    "u32": 4_000_000_000,
    "i32": -2_000_000_000,
    "f32": 0.5,
    "yes": True,
    "no": False,
    "text": "Aymar aru — Qhichwa simi 🦙",
    "empty": "",
    "u64": 2**63,
    "i64": -(2**40),
    "f64": np.float64(0.1),
    "texts": ["a", "", "Ġthe", "語"],
    "no texts": [],
    "numbers": np.arange(5, dtype=np.int32),
    "scores": np.linspace(0, 1, 7, dtype=np.float32),
    "flags": np.array([True, False, True]),
    "big": np.array([2**63, 1], np.uint64),
}


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def tensor(rows: int = 6, columns: int = 64, seed: int = 0) -> PlainTensor:
    return PlainTensor(np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32))


def test_every_metadata_type_survives_writing_and_reading(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, METADATA, [TensorToWrite("t", tensor(), "F32")])
    file = read_gguf(path)
    assert {key: plain(value) for key, value in file.metadata.items()} == {
        key: plain(value) for key, value in METADATA.items()
    }
    assert file.value_types["u16"] == "UINT16"
    assert file.value_types["i64"] == "INT64"
    assert file.value_types["texts"] == "ARRAY:STRING"
    assert file.value_types["flags"] == "ARRAY:BOOL"
    assert not file.metadata["numbers"].flags.writeable


def test_the_gguf_package_reads_the_metadata_we_write(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, METADATA, [TensorToWrite("t", tensor(), "F32")])
    theirs = GGUFReader(path)
    read = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert read == {key: plain(value) for key, value in METADATA.items()}


def test_we_read_what_the_gguf_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_custom_alignment(128)
    writer.add_array("texts", ["x", "yz"])
    writer.add_key_value("numbers", [1, -2, 3], GGUFValueType.ARRAY, sub_type=GGUFValueType.INT16)
    writer.add_float64("half", 0.5)
    writer.add_bool("yes", True)
    values = np.random.default_rng(2).normal(size=(3, 4, 64)).astype(np.float32)
    writer.add_tensor("floats", values)
    writer.add_tensor(
        "blocks", quantize(values, GGMLQuantizationType.Q8_0), raw_dtype=GGMLQuantizationType.Q8_0
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(path)
    assert file.alignment == 128
    assert file.metadata["texts"] == ["x", "yz"]
    assert file.metadata["numbers"].tolist() == [1, -2, 3]
    assert (file.metadata["half"], file.metadata["yes"]) == (0.5, True)
    floats, blocks = file.tensor("floats"), file.tensor("blocks")
    assert floats.shape == blocks.shape == (3, 4, 64)
    np.testing.assert_array_equal(floats.decode(), values)
    stored = quantize(values, GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(blocks.decode(), dequantize(stored, GGMLQuantizationType.Q8_0))


@pytest.mark.parametrize("encoding", WRITABLE_TYPES)
def test_the_gguf_package_decodes_the_tensors_we_write(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    source = tensor(rows=40)
    write_gguf(path, {"general.architecture": "llama"}, [TensorToWrite("t", source, encoding)])
    theirs = GGUFReader(path).get_tensor(0)
    kind = GGMLQuantizationType[encoding]
    assert theirs.tensor_type == kind
    assert theirs.shape.tolist() == [64, 40]
    values = (
        dequantize(theirs.data, kind) if encoding not in ("F16", "F32") else theirs.data.astype(np.float32)
    )
    np.testing.assert_array_equal(values, read_gguf(path).tensor("t").decode())
    expected = quantize(source.decode(), kind).view(np.uint8)
    assert theirs.data.view(np.uint8).reshape(-1).tobytes() == expected.reshape(-1).tobytes()


def test_small_pieces_write_the_same_bytes_as_large_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = np.random.default_rng(3).normal(size=(3, 64, 7)).astype(np.float32)
    strided = PlainTensor(experts.transpose(0, 2, 1))
    joined = JoinedTensor([tensor(seed=1), tensor(seed=2)], axis=None)
    tensors = [
        TensorToWrite(f"{number}.{encoding}", source, encoding)
        for encoding in WRITABLE_TYPES
        for number, source in enumerate((tensor(), strided, joined))
    ]
    write_gguf(tmp_path / "large.gguf", {}, tensors)
    monkeypatch.setattr(gguf_writer, "PIECE_ELEMENTS", 100)
    write_gguf(tmp_path / "small.gguf", {}, tensors)
    assert (tmp_path / "large.gguf").read_bytes() == (tmp_path / "small.gguf").read_bytes()
    np.testing.assert_array_equal(
        read_gguf(tmp_path / "small.gguf").tensor("1.F32").decode(), experts.transpose(0, 2, 1)
    )


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), max_size=5),
    metadata=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
        st.one_of(
            st.booleans(),
            st.integers(-(2**63), 2**64 - 1),
            st.text(st.characters(exclude_categories=["Cs"])),
            st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=5),
            st.floats(width=32, allow_nan=False),
        ).filter(lambda value: value != []),
        max_size=6,
    ).filter(lambda keys: "general.alignment" not in keys),
)
def test_any_file_we_write_reads_back(
    tmp_path: Path, shapes: list[list[int]], metadata: dict[str, Any]
) -> None:
    path = tmp_path / "m.gguf"
    rng = np.random.default_rng(0)
    arrays = {f"t{at}": rng.normal(size=shape).astype(np.float32) for at, shape in enumerate(shapes)}
    tensors = [TensorToWrite(name, PlainTensor(array), "F32") for name, array in arrays.items()]
    assert write_gguf(path, metadata, tensors) == path.stat().st_size
    file = read_gguf(path)
    assert file.metadata == metadata
    assert list(file.infos) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.tensor(name).decode(), array)


def test_version_2_reads_like_version_3(tmp_path: Path) -> None:
    draft = valid_model()
    draft.version = 2
    path = tmp_path / "m.gguf"
    path.write_bytes(draft.build())
    assert read_gguf(path).version == 2


def test_alignment_may_stand_anywhere_among_the_keys(tmp_path: Path) -> None:
    draft = valid_model()
    draft.alignment = 256
    draft.put("general.alignment", U32, struct.pack("<I", 256))
    path = tmp_path / "m.gguf"
    path.write_bytes(draft.build())
    file = read_gguf(path)
    assert file.alignment == 256
    assert file.data_offset % 256 == 0


def test_released_tensor_reads_again(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    source = tensor(rows=512)
    write_gguf(path, {}, [TensorToWrite("q", source, "Q8_0"), TensorToWrite("f", source, "F32")])
    file = read_gguf(path)
    for name in ("q", "f"):
        stored = file.tensor(name)
        before = stored.decode()
        stored.release()
        np.testing.assert_array_equal(stored.decode(), before)


def test_numbers_a_format_cannot_express_are_refused_and_leave_no_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for value, encoding in ((1e6, "F16"), (float("nan"), "Q8_0"), (1e30, "Q4_0")):
        values = np.zeros((2, 32), np.float32)
        values[1, 3] = value
        with pytest.raises(UnsupportedError, match=f"Tensor t holds numbers that {encoding} cannot express"):
            write_gguf(path, {}, [TensorToWrite("t", PlainTensor(values), encoding)])
    assert list(tmp_path.iterdir()) == []


def test_failed_writing_leaves_the_old_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"old")

    class Failing(QuantisedTensor):
        def decode_rows(self, start: int, stop: int) -> Any:
            raise KeyboardInterrupt

    source = tensor()
    failing = Failing.__new__(Failing)
    failing.shape, failing.encoding = source.shape, "Q6_K"
    with pytest.raises(KeyboardInterrupt):
        write_gguf(path, {}, [TensorToWrite("a", source, "F32"), TensorToWrite("b", failing, "F32")])
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_too_small_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 100})()
    monkeypatch.setattr(gguf_writer.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(NoSpaceError, match=r"needs 0\.00 GB"):
        write_gguf(tmp_path / "m.gguf", {}, [TensorToWrite("t", tensor(), "F32")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ({"k": object()}, "metadata value of k"),
        ({"k": 2**64}, "of k"),
        ({"k": [1, 2]}, "of k"),
        ({"k": "\ud800"}, "text"),
    ],
)
def test_metadata_gguf_cannot_hold_is_refused(
    metadata: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=complaint):
        write_gguf(tmp_path / "m.gguf", metadata, [])


@pytest.mark.parametrize("encoding", ["Q4_K", "IQ4_NL", "Q9_9", "Q8_0"])
def test_formats_that_are_not_written_or_do_not_fit_are_refused(encoding: str, tmp_path: Path) -> None:
    narrow = PlainTensor(np.zeros((2, 33), np.float32))
    with pytest.raises(UnsupportedError, match="Tensor t"):
        write_gguf(tmp_path / "m.gguf", {}, [TensorToWrite("t", narrow, encoding)])


def test_a_folder_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        write_gguf(tmp_path / "none" / "m.gguf", {}, [TensorToWrite("t", tensor(), "F32")])
