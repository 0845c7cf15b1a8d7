"""Our safetensors reader and writer against the reference implementation."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from ayllu.errors import UnsupportedError, UsageError
from ayllu.progress import SILENT
from ayllu.weights.safetensors import SafetensorsFile
from ayllu.weights.safetensors_writer import OutgoingTensor, write_safetensors, write_shards
from ayllu.weights.tensors import ENCODING_OF_DTYPE, PLAIN_ENCODINGS, Array


def write(path: Path, arrays: dict[str, Array], metadata: dict[str, str] | None = None) -> None:
    tensors = [outgoing(name, array) for name, array in arrays.items()]
    with SILENT.task("", None) as task:
        write_safetensors(path, tensors, metadata=metadata, task=task)


def outgoing(name: str, array: Array) -> OutgoingTensor:
    return OutgoingTensor(name, ENCODING_OF_DTYPE[array.dtype], array.shape, lambda: [array])


def reference_bytes(arrays: dict[str, Array], metadata: dict[str, str] | None = None) -> bytes:
    return safetensors.numpy.save(arrays, metadata)


def random_array(encoding: str, shape: tuple[int, ...], seed: int) -> Array:
    dtype = PLAIN_ENCODINGS[encoding]
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.random.default_rng(seed).integers(0, 2 if encoding == "BOOL" else 256, count, dtype=np.uint8)
    return raw.view(dtype).reshape(shape)


tensors = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=20).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(
        st.sampled_from(sorted(PLAIN_ENCODINGS)),
        st.lists(st.integers(0, 4), max_size=4).map(tuple),
        st.integers(0, 2**32),
    ),
    max_size=6,
)
notes = st.none() | st.dictionaries(st.text(max_size=8), st.text(max_size=8), min_size=1, max_size=1)


@given(tensors, notes)
def test_reads_and_writes_the_bytes_of_the_reference(
    tmp_path_factory: pytest.TempPathFactory,
    made: dict[str, tuple[str, tuple[int, ...], int]],
    metadata: dict[str, str] | None,
) -> None:
    arrays = {name: random_array(*how) for name, how in made.items()}
    expected = reference_bytes(arrays, metadata)
    path = tmp_path_factory.mktemp("st") / "a.safetensors"
    write(path, arrays, metadata)
    # Only the header's text may differ: JSON writers escape some control characters in their own way.
    if all(
        text.isprintable() and text.isascii()
        for text in [*arrays, *(metadata or {}).values(), *(metadata or {})]
    ):
        assert path.read_bytes() == expected
    path.write_bytes(expected)
    opened = SafetensorsFile(path)
    assert set(opened) == set(arrays)
    assert opened.metadata == (metadata or {})
    for name, array in arrays.items():
        assert opened[name].shape == array.shape
        assert opened[name].array.tobytes() == array.tobytes()


def test_the_reference_reads_what_we_write(tmp_path: Path) -> None:
    arrays = {f"layer.{index}": random_array("F32", (index, 3), index) for index in range(5)}
    write(tmp_path / "a.safetensors", arrays, {"format": "pt"})
    loaded = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == arrays.keys()
    assert all(loaded[name].tobytes() == arrays[name].tobytes() for name in arrays)


def test_tensors_are_views_of_the_mapped_file_not_copies(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", {"a": random_array("F32", (256, 1024), 0)})
    tracemalloc.start()
    tensor = SafetensorsFile(tmp_path / "a.safetensors")["a"]
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used < 1 << 16
    assert not tensor.array.flags.owndata
    assert not tensor.array.flags.writeable


@pytest.mark.parametrize(
    "header",
    [
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        '{"a":{"data_offsets":[0,8],"dtype":"F32","shape":[2]}}',
        '{"a":{"shape":[2],"data_offsets":[0,8],"dtype":"F32"}}',
        '{ "a" : { "dtype" : "F32" , "shape" : [ 2 ] , "data_offsets" : [ 0 , 8 ] } }   ',
        '{"__metadata__":{},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"__metadata__":{"k":"v","l":"w"}}',
        '{\n\t"\\u0061": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}\r\n}',
        '{"empty":{"dtype":"F32","shape":[0,7],"data_offsets":[8,8]},'
        '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        '"also":{"dtype":"I64","shape":[0],"data_offsets":[0,0]}}',
    ],
)
def test_every_valid_spelling_of_a_header_is_read(tmp_path: Path, header: str) -> None:
    values = np.array([1.5, -2.0], np.float32)
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + values.tobytes())
    assert np.array_equal(SafetensorsFile(path)["a"].decode(), values)


@pytest.mark.parametrize("fields", [("dtype", "shape", "data_offsets"), ("data_offsets", "dtype", "shape")])
def test_a_header_of_100_000_tensors_parses_within_a_second(tmp_path: Path, fields: tuple[str, ...]) -> None:
    def entry(index: int) -> dict[str, object]:
        values = {"dtype": "U8", "shape": [1, 1], "data_offsets": [index, index + 1]}
        return {field: values[field] for field in fields}

    header = json.dumps({f"model.layers.{index}.weight": entry(index) for index in range(100_000)}).encode()
    path = tmp_path / "many.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(100_000))
    started = time.process_time()
    opened = SafetensorsFile(path)
    assert time.process_time() - started <= 1.0
    assert len(opened) == 100_000
    assert opened["model.layers.99999.weight"].shape == (1, 1)


def test_encodings_we_cannot_compute_with_are_listed_but_not_read(tmp_path: Path) -> None:
    header = (
        b'{"a":{"dtype":"F4","shape":[4],"data_offsets":[0,2]},'
        b'"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}'
    )
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(3))
    opened = SafetensorsFile(tmp_path / "a.safetensors")
    assert list(opened) == ["a", "b"]
    assert opened["b"].shape == (1,)
    with pytest.raises(UnsupportedError, match="tensor a is stored as F4"):
        opened["a"]


def test_shards_split_by_size_and_the_index_names_each_tensor(tmp_path: Path) -> None:
    arrays = {f"t{index}": random_array("F32", (25,), index) for index in range(5)}
    with SILENT.task("", None) as task:
        write_shards(tmp_path, [outgoing(*item) for item in arrays.items()], task=task, max_shard_bytes=250)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 500
    assert sorted(index["weight_map"]) == sorted(arrays)
    assert sorted(set(index["weight_map"].values())) == [
        f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)
    ]
    for name, shard in index["weight_map"].items():
        assert safetensors.numpy.load_file(tmp_path / shard)[name].tobytes() == arrays[name].tobytes()


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> list[Array]:
        raise KeyboardInterrupt

    tensor = OutgoingTensor("a", "F32", (4,), broken)
    with SILENT.task("", None) as task, pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "a.safetensors", [tensor], task=task)
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        write(tmp_path / "nowhere" / "a.safetensors", {"a": random_array("F32", (1,), 0)})
