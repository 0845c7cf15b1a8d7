"""GGUF models opened and saved: configs, names, rotary order and bytes, for every architecture."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from ayllu.errors import ModelFileError, UnsupportedError
from ayllu.model.config import LayerSpec, ModelConfig
from ayllu.model.rope_frequencies import rope_frequencies
from ayllu.weights.checkpoint import open_checkpoint
from ayllu.weights.gguf import read_gguf
from ayllu.weights.gguf_blocks import WRITABLE_TYPES, QuantisedTensor
from ayllu.weights.gguf_config import ROPE_LAYOUT
from ayllu.weights.gguf_export import save_gguf
from ayllu.weights.gguf_model import open_gguf
from ayllu.weights.gguf_writer import TensorToWrite, write_gguf
from ayllu.weights.rope_layout import permute_rope_rows
from ayllu.weights.tensors import JoinedTensor, PlainTensor
from tests.weights.hostile_gguf import ARRAY, F32, STRING, U32, Entry, array, text, valid_model
from tests.weights.small_checkpoints import CONFIGS, VISION, random_checkpoint


def as_gguf_has_it(config: ModelConfig) -> ModelConfig:
    return replace(config, rope=replace(config.rope, layout=ROPE_LAYOUT[config.architecture]), vision=None)


def test_smollm2_opens_with_its_published_shape(smollm2_gguf: Path) -> None:
    checkpoint = open_checkpoint(smollm2_gguf)
    config = checkpoint.config
    assert (config.architecture, config.num_hidden_layers, config.hidden_size) == ("llama", 30, 576)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.intermediate_size, config.max_position_embeddings) == (
        49152,
        1536,
        8192,
    )
    assert (config.rope.theta, config.rope.layout, config.rms_norm_eps) == (100_000.0, "interleaved", 1e-5)
    assert config.tie_word_embeddings and not config.qkv_bias
    assert config.parameters == 134_515_008
    assert set(checkpoint.bytes_by_encoding) == {"Q4_1", "Q8_0", "F32"}


@pytest.mark.large
def test_qwen_opens_with_its_published_shape(qwen05_gguf: Path, qwen15_gguf: Path) -> None:
    small, large = open_gguf(qwen05_gguf).config, open_gguf(qwen15_gguf).config
    assert (small.num_hidden_layers, large.num_hidden_layers) == (24, 28)
    for config in (small, large):
        assert (config.architecture, config.vocab_size, config.rope.layout) == ("qwen2", 151_936, "half")
        assert config.qkv_bias and config.rms_norm_eps == 1e-6


def test_smollm2_saved_again_keeps_every_byte_of_its_tensors(smollm2_gguf: Path, tmp_path: Path) -> None:
    source = open_gguf(smollm2_gguf)
    saved = save_gguf(source, tmp_path / "again.gguf")
    assert saved.notes == () and saved.nbytes == saved.path.stat().st_size
    before, after = read_gguf(smollm2_gguf), read_gguf(saved.path)
    assert set(after.infos) == set(before.infos)
    for name in before.infos:
        one, other = before.tensor(name), after.tensor(name)
        assert one.encoding == other.encoding
        if isinstance(one, QuantisedTensor) and isinstance(other, QuantisedTensor):
            np.testing.assert_array_equal(one.raw, other.raw)
        else:
            np.testing.assert_array_equal(one.decode(), other.decode())
    for key, value in before.metadata.items():
        assert before.value_types[key] == after.value_types[key]
        np.testing.assert_array_equal(value, after.metadata[key])
    assert open_gguf(saved.path).config == source.config


@pytest.mark.parametrize("name", CONFIGS)
def test_config_survives_the_way_through_a_file(name: str, tmp_path: Path) -> None:
    saved = save_gguf(random_checkpoint(CONFIGS[name]), tmp_path / "m.gguf", "F32")
    assert open_gguf(saved.path).config == as_gguf_has_it(CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_config_that_standard_keys_can_say_needs_none_of_ours(name: str, tmp_path: Path) -> None:
    save_gguf(random_checkpoint(CONFIGS[name]), tmp_path / "m.gguf", "F32")
    own = {key for key in read_gguf(tmp_path / "m.gguf").metadata if key.startswith("ayllu.")}
    plain = {
        "llama",
        "llama interleaved and tied",
        "qwen2",
        "llama4 as released",
        "llama4 dense, seeing everything",
    }
    assert (own == set()) == (name in plain)


@pytest.mark.parametrize("encoding", WRITABLE_TYPES)
@pytest.mark.parametrize("name", ["llama", "llama4 small chunks"])
def test_saved_files_give_the_gguf_package_the_same_numbers(name: str, encoding: str, tmp_path: Path) -> None:
    save_gguf(random_checkpoint(CONFIGS[name]), tmp_path / "m.gguf", encoding)
    file = read_gguf(tmp_path / "m.gguf")
    theirs = GGUFReader(tmp_path / "m.gguf")
    assert {tensor.name for tensor in theirs.tensors} == set(file.infos)
    for tensor in theirs.tensors:
        kind = GGMLQuantizationType(tensor.tensor_type)
        values = (
            tensor.data.astype(np.float32) if kind.name in ("F32", "F16") else dequantize(tensor.data, kind)
        )
        np.testing.assert_array_equal(values, file.tensor(tensor.name).decode())


def test_norms_and_routers_stay_in_full_precision(tmp_path: Path) -> None:
    save_gguf(random_checkpoint(CONFIGS["llama4 small chunks"]), tmp_path / "m.gguf", "Q4_0")
    kinds = {name: info.kind.name for name, info in read_gguf(tmp_path / "m.gguf").infos.items()}
    full = {name for name, kind in kinds.items() if kind == "F32"}
    assert full == {
        name for name in kinds if "norm" in name or "ffn_gate_inp" in name or "rope_freqs" in name
    }


def test_rows_that_fill_no_blocks_are_written_as_f16_with_a_note(tmp_path: Path) -> None:
    config = replace(CONFIGS["llama"], hidden_size=48)
    saved = save_gguf(random_checkpoint(config), tmp_path / "m.gguf", "Q8_0")
    kinds = {name: info.kind.name for name, info in read_gguf(saved.path).infos.items()}
    assert kinds["blk.0.ffn_up.weight"] == "F16" and kinds["blk.0.ffn_down.weight"] == "Q8_0"
    assert any("ffn_up.weight is written as F16" in note for note in saved.notes)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_saving_without_an_encoding_keeps_plain_numbers_as_they_are(dtype: Any, tmp_path: Path) -> None:
    source = random_checkpoint(CONFIGS["llama4 as released"], dtype=dtype)
    checkpoint = open_gguf(save_gguf(source, tmp_path / "m.gguf").path)
    for name, tensor in source.tensors.items():
        np.testing.assert_array_equal(checkpoint.tensors[name].decode(), tensor.decode())
        if len(tensor.shape) > 1 and "router" not in name:
            assert checkpoint.tensors[name].encoding == tensor.encoding


@pytest.mark.parametrize("encoding", ["F32", "Q8_0"])
def test_half_rotation_heads_are_interleaved_for_llama_and_values_left_alone(
    encoding: str, tmp_path: Path
) -> None:
    source = random_checkpoint(replace(CONFIGS["llama"], qkv_bias=True))
    saved = open_gguf(save_gguf(source, tmp_path / "m.gguf", encoding).path)
    assert saved.config.rope.layout == "interleaved"
    for part, heads in (("q_proj", 4), ("k_proj", 2), ("v_proj", 0)):
        for end in ("weight", "bias"):
            name = f"layers.1.attention.{part}.{end}"
            values = source.tensors[name].decode()
            if heads:
                values = permute_rope_rows(values, heads, source="half", target="interleaved")
                assert (values != source.tensors[name].decode()).any()
            tolerance = 0 if encoding == "F32" else 0.01
            np.testing.assert_allclose(saved.tensors[name].decode(), values, atol=tolerance)


def test_permuting_stored_blocks_equals_permuting_their_numbers(tmp_path: Path) -> None:
    source = random_checkpoint(CONFIGS["llama interleaved and tied"])
    stored = open_gguf(save_gguf(source, tmp_path / "q.gguf", "Q4_1").path)
    relabelled = replace(
        stored, config=replace(stored.config, rope=replace(stored.config.rope, layout="half"))
    )
    saved = open_gguf(save_gguf(relabelled, tmp_path / "again.gguf").path)
    name = "layers.0.attention.q_proj.weight"
    expected = permute_rope_rows(stored.tensors[name].decode(), 4, source="half", target="interleaved")
    assert saved.tensors[name].encoding == "Q4_1"
    np.testing.assert_array_equal(saved.tensors[name].decode(), expected)


def test_projection_in_several_parts_is_permuted_whole(tmp_path: Path) -> None:
    source = random_checkpoint(CONFIGS["llama"])
    name = "layers.0.attention.q_proj.weight"
    whole = source.tensors[name].decode()
    parts = JoinedTensor([PlainTensor(whole[:24]), PlainTensor(whole[24:])], axis=0)
    joined = replace(source, tensors={**source.tensors, name: parts})
    save_gguf(source, tmp_path / "whole.gguf", "Q8_0")
    save_gguf(joined, tmp_path / "parts.gguf", "Q8_0")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "parts.gguf").read_bytes()


def test_scaled_rope_is_written_as_the_factors_llama_cpp_divides_by(tmp_path: Path) -> None:
    config = CONFIGS["llama with scaled rope"]
    save_gguf(random_checkpoint(config), tmp_path / "m.gguf", "F32")
    factors = read_gguf(tmp_path / "m.gguf").tensor("rope_freqs.weight").decode()
    plain = rope_frequencies(replace(config.rope, scaling=None), config.head_dim)
    np.testing.assert_allclose(plain / factors, rope_frequencies(config.rope, config.head_dim), rtol=1e-6)
    assert factors[0] == 1.0 and factors[-1] == 8.0


def test_rope_factors_of_another_program_become_divisors(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    factors = np.array([1, 1, 1, 1.5, 2, 8, 8, 8], np.float32)
    source = open_model(tmp_path)
    tensors = [
        TensorToWrite(name, source.tensor(name), info.kind.name) for name, info in source.infos.items()
    ]
    write_gguf(
        path, source.metadata, [*tensors, TensorToWrite("rope_freqs.weight", PlainTensor(factors), "F32")]
    )
    assert open_gguf(path).config.rope.divisors == tuple(factors.tolist())


def open_model(folder: Path) -> Any:
    path = folder / "valid.gguf"
    path.write_bytes(valid_model().build())
    return read_gguf(path)


@pytest.mark.parametrize("keys", ["rope.scaling", "rope.scale_linear"])
def test_linear_scaling_divides_every_frequency(keys: str, tmp_path: Path) -> None:
    draft = valid_model()
    if keys == "rope.scaling":
        draft.put("llama.rope.scaling.type", STRING, text("linear"))
        draft.put("llama.rope.scaling.factor", F32, struct.pack("<f", 4.0))
    else:
        draft.put("llama.rope.scale_linear", F32, struct.pack("<f", 4.0))
    path = tmp_path / "m.gguf"
    path.write_bytes(draft.build())
    assert open_gguf(path).config.rope.divisors == (4.0,) * 8


def test_scaling_that_contradicts_its_factors_is_refused(tmp_path: Path) -> None:
    save_gguf(random_checkpoint(CONFIGS["llama with scaled rope"]), tmp_path / "m.gguf", "F32")
    file = read_gguf(tmp_path / "m.gguf")
    tensors = [TensorToWrite(name, file.tensor(name), "F32") for name in file.infos]
    metadata = file.metadata | {"ayllu.rope.scaling.factor": np.float64(32.0)}
    write_gguf(tmp_path / "bad.gguf", metadata, tensors)
    with pytest.raises(ModelFileError, match=r"ayllu.rope.scaling.factor"):
        open_gguf(tmp_path / "bad.gguf")


def test_per_layer_head_counts_are_read_where_they_agree(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    draft = valid_model()
    draft.put("llama.attention.head_count_kv", ARRAY, array(U32, 2, struct.pack("<II", 2, 2)))
    path.write_bytes(draft.build())
    assert open_gguf(path).config.num_key_value_heads == 2
    draft.put("llama.attention.head_count_kv", ARRAY, array(U32, 2, struct.pack("<II", 2, 4)))
    path.write_bytes(draft.build())
    with pytest.raises(UnsupportedError, match="differs between layers"):
        open_gguf(path)


def test_padded_embeddings_decide_the_vocabulary_size(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    draft = valid_model()
    draft.entries[0] = Entry(b"token_embd.weight", [40, 64], 8)
    path.write_bytes(draft.build())
    assert open_gguf(path).config.vocab_size == 40


def llama4_metadata(**changes: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes for a small Llama 4, with none of our keys."""
    values = {
        "block_count": 4,
        "context_length": 256,
        "embedding_length": 64,
        "feed_forward_length": 128,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 500_000.0,
        "expert_count": 4,
        "expert_used_count": 2,
        "expert_feed_forward_length": 96,
        "interleave_moe_layer_step": 2,
    } | {key.replace("__", "."): value for key, value in changes.items()}
    return {"general.architecture": "llama4", **{f"llama4.{key}": value for key, value in values.items()}}


def opened_llama4(path: Path, config: ModelConfig, metadata: dict[str, Any]) -> ModelConfig:
    """A file with the tensors of `config` and `metadata` as it is, opened."""
    save_gguf(random_checkpoint(config), path, "F32")
    file = read_gguf(path)
    tensors = [TensorToWrite(name, file.tensor(name), "F32") for name in file.infos]
    write_gguf(path, metadata, tensors)
    return open_gguf(path).config


def test_what_llama_cpp_hard_codes_for_llama4_is_assumed(tmp_path: Path) -> None:
    config = replace(CONFIGS["llama4 as released"], layers=CONFIGS["llama4 as released"].layers[:4])
    shared = replace(config, experts=replace(config.experts, shared_intermediate_size=96))
    read = opened_llama4(tmp_path / "m.gguf", shared, llama4_metadata())
    assert read == shared
    assert [layer.chunk for layer in read.layers] == [8192, 8192, 8192, None]
    assert [layer.rotates for layer in read.layers] == [True, True, True, False]
    assert [layer.experts for layer in read.layers] == [False, True, False, True]


def test_llama4_with_a_window_of_0_sees_everything_and_rotates_everywhere(tmp_path: Path) -> None:
    metadata = llama4_metadata(
        attention__sliding_window=0, block_count=2, expert_count=0, interleave_moe_layer_step=0
    )
    read = opened_llama4(tmp_path / "m.gguf", CONFIGS["llama4 dense, seeing everything"], metadata)
    assert read.layers == (LayerSpec(),) * 2
    assert read.temperature is None and read.qk_norm


def test_llama4_with_128_experts_has_no_qk_norm(tmp_path: Path) -> None:
    base = CONFIGS["llama4 as released"]
    experts = replace(base.experts, num_experts=128, intermediate_size=32)
    config = replace(base, experts=experts, qk_norm=False, layers=base.layers[:4])
    metadata = llama4_metadata(
        expert_count=128, expert_feed_forward_length=32, expert_shared_feed_forward_length=32
    )
    assert opened_llama4(tmp_path / "m.gguf", config, metadata) == config


def test_image_tower_is_left_out_with_a_note(tmp_path: Path) -> None:
    config = replace(CONFIGS["llama4 small chunks"], vision=VISION)
    saved = save_gguf(random_checkpoint(config), tmp_path / "m.gguf", "F16")
    assert any("image tower" in note for note in saved.notes)
    assert open_gguf(saved.path).config == replace(config, vision=None)


def test_vocabulary_and_description_travel_with_the_model(tmp_path: Path) -> None:
    told = {"general.name": "Wayra", "general.file_type": 2, "tokenizer.ggml.tokens": ["a", "b"], "other": 1}
    source = random_checkpoint(CONFIGS["llama"], metadata=told)
    kept = open_gguf(save_gguf(source, tmp_path / "kept.gguf", "F16").path).metadata
    assert (kept["general.name"], kept["tokenizer.ggml.tokens"]) == ("Wayra", ["a", "b"])
    assert kept["general.file_type"] == 1 and "other" not in kept
    given = {"tokenizer.ggml.tokens": ["c"]}
    path = save_gguf(source, tmp_path / "given.gguf", "F16", given).path
    assert open_gguf(path).metadata["tokenizer.ggml.tokens"] == ["c"]


def test_unknown_encoding_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"not written in Q8_1. Did you mean Q8_0.*Q4_1"):
        save_gguf(random_checkpoint(CONFIGS["llama"]), tmp_path / "m.gguf", "Q8_1")


def test_double_precision_is_written_as_bf16_and_said(tmp_path: Path) -> None:
    source = random_checkpoint(CONFIGS["llama"], dtype=np.float64)
    saved = save_gguf(source, tmp_path / "m.gguf")
    assert any("GGUF has no F64" in note for note in saved.notes)
    assert set(open_gguf(saved.path).bytes_by_encoding) == {"BF16", "F32"}
