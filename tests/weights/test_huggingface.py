"""Folders in Hugging Face's layout: what transformers saves opens here and the reverse, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch

from ayllu.errors import ModelFileError, UnsupportedError, UsageError
from ayllu.folder_files import STORE_MANIFEST, member_path
from ayllu.weights.checkpoint import Checkpoint, open_checkpoint
from ayllu.weights.huggingface import open_folder, save_folder
from ayllu.weights.safetensors import SafetensorsFile
from ayllu.weights.tensors import Array, PlainTensor
from tests.weights.tiny_folders import KINDS, save_tiny, state_dict

TinyFolder = Callable[..., Path]
MIXTURES = ("llama4-step1", "llama4-step2", "llama4-vision")


def same_bits(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints have equal configs and equal bytes in equal encodings."""
    return (
        one.config == other.config
        and one.tensors.keys() == other.tensors.keys()
        and all(
            tensor.encoding == other.tensors[name].encoding
            and tensor.decode().tobytes() == other.tensors[name].decode().tobytes()
            for name, tensor in one.tensors.items()
        )
    )


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def rewrite(folder: Path, change: Callable[[dict[str, Array]], Mapping[str, Array]]) -> Path:
    """Replace the tensors of a folder by what `change` makes of them."""
    file = folder / "model.safetensors"
    arrays = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file(dict(change(arrays)), file, {"format": "pt"})
    return folder


def change_config(folder: Path, **values: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_saves_holds_its_numbers_here(
    kind: str, dtype: str, tiny_folder: TinyFolder
) -> None:
    opened = open_folder(tiny_folder(kind, dtype))
    theirs = {
        name: tensor.float().numpy() for name, tensor in state_dict(kind, tiny_folder(kind, dtype)).items()
    }
    prefix = "language_model." if kind == "llama4-vision" else ""
    layer = f"{prefix}model.layers.1."
    pairs = {
        "embed_tokens.weight": theirs[f"{prefix}model.embed_tokens.weight"],
        "layers.1.attention.k_proj.weight": theirs[f"{layer}self_attn.k_proj.weight"],
        "layers.1.feed_forward_norm.weight": theirs[f"{layer}post_attention_layernorm.weight"],
        "norm.weight": theirs[f"{prefix}model.norm.weight"],
    }
    if kind in MIXTURES:
        hidden = opened.config.experts.intermediate_size if opened.config.experts else 0
        fused = theirs[f"{layer}feed_forward.experts.gate_up_proj"]
        pairs["layers.1.feed_forward.experts.gate_proj"] = fused[:, :, :hidden].transpose(0, 2, 1)
        pairs["layers.1.feed_forward.experts.up_proj"] = fused[:, :, hidden:].transpose(0, 2, 1)
        down = theirs[f"{layer}feed_forward.experts.down_proj"]
        pairs["layers.1.feed_forward.experts.down_proj"] = down.transpose(0, 2, 1)
        pairs["layers.1.feed_forward.router.weight"] = theirs[f"{layer}feed_forward.router.weight"]
    if kind == "llama4-vision":
        pairs["vision.projector.weight"] = theirs["multi_modal_projector.linear_1.weight"]
        pairs["vision.tower.position_embedding"] = theirs["vision_model.positional_embedding_vlm"]
        pairs["vision.tower.blocks.1.mlp.fc2.bias"] = theirs["vision_model.model.layers.1.mlp.fc2.bias"]
    for ours, expected in pairs.items():
        assert np.array_equal(opened.tensors[ours].decode(), expected), ours


@pytest.mark.parametrize("kind", KINDS)
def test_what_we_save_transformers_loads_to_the_same_state(
    kind: str, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    source = tiny_folder(kind, "bfloat16")
    save_folder(open_folder(source), tmp_path / "ours", max_shard_bytes=30_000)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists()
    before, after = state_dict(kind, source), state_dict(kind, tmp_path / "ours")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_keeps_every_bit(kind: str, dtype: str, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    source = open_folder(tiny_folder(kind, dtype))
    save_folder(source, tmp_path / "ours")
    assert same_bits(source, open_folder(tmp_path / "ours"))
    theirs = SafetensorsFile(tiny_folder(kind, dtype) / "model.safetensors")
    ours = SafetensorsFile(tmp_path / "ours" / "model.safetensors")
    assert set(theirs) == set(ours)
    assert all(theirs[name].array.tobytes() == ours[name].array.tobytes() for name in theirs)


@pytest.mark.parametrize("kind", MIXTURES)
def test_fused_to_unfused_and_back_keeps_every_bit(
    kind: str, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    fused = open_folder(tiny_folder(kind, "bfloat16"))
    save_folder(fused, tmp_path / "unfused", unfused=True)
    unfused = open_folder(tmp_path / "unfused")
    names = set(SafetensorsFile(tmp_path / "unfused" / "model.safetensors"))
    assert any(name.endswith("feed_forward.experts.3.down_proj.weight") for name in names)
    assert not any(name.endswith("gate_up_proj") for name in names)
    assert same_bits(fused, unfused)
    save_folder(unfused, tmp_path / "fused")
    original = (tiny_folder(kind, "bfloat16") / "model.safetensors").read_bytes()
    assert (tmp_path / "fused" / "model.safetensors").read_bytes() == original


def test_expert_stacks_are_views_into_the_mapped_file(tiny_folder: TinyFolder) -> None:
    tensors = open_folder(tiny_folder("llama4-step1")).tensors
    for name in ("gate_proj", "up_proj", "down_proj"):
        stack = tensors[f"layers.0.feed_forward.experts.{name}"]
        assert isinstance(stack, PlainTensor)
        assert not stack.array.flags.owndata


@pytest.mark.parametrize("encoding", ["BF16", "F16", "F32"])
def test_another_encoding_rounds_each_number_once(
    encoding: str, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    source = open_folder(tiny_folder("llama4-step2"))
    save_folder(source, tmp_path / "ours", encoding=encoding)
    dtype = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}[encoding]
    for name, tensor in open_folder(tmp_path / "ours").tensors.items():
        assert tensor.encoding == encoding
        assert np.array_equal(tensor.decode(), source.tensors[name].decode().astype(dtype).astype(np.float32))


def test_a_weight_too_large_for_f16_is_refused_not_made_infinite(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    folder = copy(tiny_folder("llama"), tmp_path / "model")
    rewrite(folder, lambda arrays: arrays | {"model.norm.weight": arrays["model.norm.weight"] * 1e6})
    with pytest.raises(UnsupportedError, match="too large for F16"):
        save_folder(open_folder(folder), tmp_path / "ours", encoding="F16")
    assert not (tmp_path / "ours").exists()
    assert [item.name for item in tmp_path.iterdir()] == ["model"]


def test_tokenizer_files_and_token_ids_come_along(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    source = copy(tiny_folder("llama4-vision"), tmp_path / "model")
    (source / "tokenizer.json").write_text("{}")
    (source / "evil.py").write_text("")
    save_folder(open_folder(source), tmp_path / "ours")
    assert (tmp_path / "ours" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "ours" / "generation_config.json").exists()
    assert not (tmp_path / "ours" / "evil.py").exists()
    written = json.loads((tmp_path / "ours" / "config.json").read_text())["text_config"]
    assert (written["bos_token_id"], written["eos_token_id"], written["pad_token_id"]) == (1, [2, 3], 0)


def test_a_target_in_the_way_is_left_alone_unless_told_otherwise(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    target = tmp_path / "ours"
    target.mkdir()
    (target / "precious.txt").write_text("mine")
    checkpoint = open_folder(tiny_folder("llama"))
    with pytest.raises(UsageError, match="exists already"):
        save_folder(checkpoint, target)
    with pytest.raises(UsageError, match=r"not only a model: it holds precious\.txt"):
        save_folder(checkpoint, target, overwrite=True)
    assert (target / "precious.txt").read_text() == "mine"
    (target / "precious.txt").unlink()
    save_folder(checkpoint, target)
    save_folder(checkpoint, target, overwrite=True)
    assert same_bits(checkpoint, open_folder(target))
    assert [item.name for item in tmp_path.iterdir()] == ["ours"]


def test_a_gguf_becomes_a_folder_in_half_rotation_order(smollm2_gguf: Path, tmp_path: Path) -> None:
    """Blocks decode as the gguf package decodes them; rotary rows move from pairs to halves."""
    from gguf import GGUFReader, dequantize

    save_folder(open_checkpoint(smollm2_gguf), tmp_path / "ours")
    opened = open_folder(tmp_path / "ours")
    assert (opened.config.rope.layout, opened.config.tie_word_embeddings) == ("half", True)
    ours = SafetensorsFile(tmp_path / "ours" / "model.safetensors")
    theirs = {tensor.name: tensor for tensor in GGUFReader(smollm2_gguf).tensors}
    for name, stored, heads in (
        ("model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight", 9),
        ("model.layers.29.self_attn.k_proj.weight", "blk.29.attn_k.weight", 3),
        ("model.layers.29.self_attn.v_proj.weight", "blk.29.attn_v.weight", None),
        ("model.layers.7.mlp.down_proj.weight", "blk.7.ffn_down.weight", None),
        ("model.norm.weight", "output_norm.weight", None),
    ):
        expected = np.asarray(dequantize(theirs[stored].data, theirs[stored].tensor_type))
        if heads is not None:
            order = [2 * pair + half for half in (0, 1) for pair in range(32)]
            expected = expected.reshape(heads, 64, -1)[:, order].reshape(expected.shape)
        kept = np.float32 if expected.ndim == 1 else np.float16
        assert np.allclose(ours[name].decode(), expected.astype(kept), rtol=1e-3, atol=1e-7), name


def without(arrays: dict[str, Array], name: str) -> dict[str, Array]:
    return {key: value for key, value in arrays.items() if key != name}


def test_a_missing_tensor_is_named(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    folder = rewrite(copy(tiny_folder("llama"), tmp_path / "m"), lambda a: without(a, "model.norm.weight"))
    with pytest.raises(ModelFileError, match=r"norm\.weight: a tensor is missing"):
        open_folder(folder)


STRANGERS = [
    "model.layers.0.self_attn.q_norm.weight",
    "model.layers.7.self_attn.q_proj.weight",
    "model.layers.0.feed_forward.experts.gate_up_proj",
    "model.layers.0.feed_forward.experts.0.up_proj.weight",
    "score.weight",
    "vision_model.class_embedding",
]


@pytest.mark.parametrize("name", STRANGERS)
def test_a_tensor_that_does_not_belong_is_named(name: str, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    extra = {name: np.zeros((4, 4), np.float32)}
    folder = rewrite(copy(tiny_folder("llama"), tmp_path / "m"), lambda arrays: arrays | extra)
    with pytest.raises(ModelFileError, match="does not belong to this architecture"):
        open_folder(folder)


LEFTOVERS = [
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.layers.0.feed_forward.running_gate_stats_3E",
    "model.layers.0.feed_forward.global_gate_stats_3E",
    "model.layers.0.feed_forward.expert_activation_DE",
]


def test_leftover_buffers_are_ignored(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    extra = {name: np.zeros(4, np.float32) for name in LEFTOVERS}
    folder = rewrite(copy(tiny_folder("llama"), tmp_path / "m"), lambda arrays: arrays | extra)
    assert same_bits(open_folder(folder), open_folder(tiny_folder("llama")))


def test_a_tied_head_may_be_stored_if_it_is_equal(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    folder = copy(tiny_folder("llama-tied"), tmp_path / "m")
    rewrite(folder, lambda a: a | {"lm_head.weight": a["model.embed_tokens.weight"].copy()})
    assert same_bits(open_folder(folder), open_folder(tiny_folder("llama-tied")))
    rewrite(folder, lambda a: a | {"lm_head.weight": a["model.embed_tokens.weight"] + 1})
    with pytest.raises(ModelFileError, match="lm_head"):
        open_folder(folder)


def test_integer_weights_without_a_scale_are_refused_by_name(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    def quantised(arrays: dict[str, Array]) -> dict[str, Array]:
        name = "model.layers.0.mlp.up_proj.weight"
        return arrays | {name: arrays[name].astype(np.int8)}

    with pytest.raises(UnsupportedError, match=r"mlp\.up_proj\.weight is stored as I8"):
        open_folder(rewrite(copy(tiny_folder("llama"), tmp_path / "m"), quantised))


@pytest.mark.parametrize("kind", ["gate_up_proj", "down_proj"])
def test_a_fused_stack_of_the_wrong_shape_is_named(
    kind: str, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    name = f"model.layers.0.feed_forward.experts.{kind}"
    folder = copy(tiny_folder("llama4-step1"), tmp_path / "m")
    rewrite(folder, lambda a: a | {name: np.ascontiguousarray(a[name].swapaxes(1, 2))})
    with pytest.raises(ModelFileError, match=f"{kind}: a tensor has the wrong shape"):
        open_folder(folder)


def test_a_missing_expert_is_counted(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    save_folder(open_folder(tiny_folder("llama4-step1")), tmp_path / "m", unfused=True)
    gone = "model.layers.0.feed_forward.experts.2.up_proj.weight"
    rewrite(tmp_path / "m", lambda arrays: without(arrays, gone))
    with pytest.raises(ModelFileError, match="experts are missing or stored twice, expected 4, got 3"):
        open_folder(tmp_path / "m")


def fp8(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Unfused experts as compressed-tensors stores them: FP8 rows, each with a scale."""
    stored: dict[str, Array] = {}
    for name, array in arrays.items():
        if ".experts." in name:
            scale = np.abs(array).max(axis=1, keepdims=True) / 448
            stored[name] = (array / scale).astype(ml_dtypes.float8_e4m3fn)
            stored[f"{name}_scale"] = scale.astype(ml_dtypes.bfloat16)
        else:
            stored[name] = array
    return stored


COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
    },
}


def test_scaled_fp8_experts_are_decoded_row_by_row(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    plain = open_folder(tiny_folder("llama4-step1"))
    folder = tmp_path / "m"
    save_folder(plain, folder, unfused=True)
    rewrite(folder, fp8)
    with pytest.raises((ModelFileError, UnsupportedError)):
        open_folder(folder)
    change_config(folder, quantization_config=COMPRESSED)
    opened = open_folder(folder)
    stored = SafetensorsFile(folder / "model.safetensors")
    name = "model.layers.2.feed_forward.experts.3.up_proj.weight"
    expected = stored[name].decode() * stored[f"{name}_scale"].decode()
    decoded = opened.tensors["layers.2.feed_forward.experts.up_proj"].decode()
    assert np.array_equal(decoded[3], expected)
    original = plain.tensors["layers.2.feed_forward.experts.up_proj"].decode()
    assert np.abs(decoded - original).max() < 0.05 * np.abs(original).max()
    save_folder(opened, tmp_path / "plain")
    assert open_folder(tmp_path / "plain").bytes_by_encoding.keys() == {"BF16", "F32"}


def test_a_scale_of_the_wrong_shape_is_named(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    save_folder(open_folder(tiny_folder("llama4-step1")), folder, unfused=True)
    name = "model.layers.2.feed_forward.experts.3.up_proj.weight_scale"
    rewrite(folder, lambda arrays: fp8(arrays) | {name: np.ones((2, 7), np.float32)})
    change_config(folder, quantization_config=COMPRESSED)
    with pytest.raises(ModelFileError, match="a scale does not fit its tensor"):
        open_folder(folder)


def hub_cache(source: Path, root: Path) -> Path:
    """`source` laid out as huggingface_hub caches it: snapshots of links into blobs."""
    snapshot, blobs = root / "snapshots" / "0a1b2c", root / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copyfile(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / f"{number:064x}")
    return snapshot


def test_the_links_of_the_hub_cache_are_followed(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    source = tmp_path / "sharded"
    save_folder(open_folder(tiny_folder("llama")), source, max_shard_bytes=30_000)
    cached = open_folder(hub_cache(source, tmp_path / "models--org--name"))
    assert same_bits(cached, open_folder(tiny_folder("llama")))


def test_links_within_the_folder_are_followed_and_others_refused(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    folder = copy(tiny_folder("llama"), tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "weights.dat")
    (folder / "model.safetensors").symlink_to("weights.dat")
    assert same_bits(open_folder(folder), open_folder(tiny_folder("llama")))
    (folder / "weights.dat").rename(tmp_path / "weights.dat")
    with pytest.raises(ModelFileError, match="leads nowhere"):
        open_folder(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "weights.dat")
    with pytest.raises(ModelFileError, match="link out of the model's folder"):
        open_folder(folder)


def test_a_snapshot_may_not_link_to_another_repository(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    snapshot = hub_cache(tiny_folder("llama"), tmp_path / "models--org--name")
    (tmp_path / "models--other--name" / "blobs").mkdir(parents=True)
    blob = (snapshot / "model.safetensors").resolve()
    moved = blob.rename(tmp_path / "models--other--name" / "blobs" / blob.name)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(moved)
    with pytest.raises(ModelFileError, match="link out of the model's folder"):
        open_folder(snapshot)


def test_a_tokenizer_that_links_elsewhere_is_not_copied(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    folder = copy(tiny_folder("llama"), tmp_path / "m")
    (tmp_path / "secret").write_text("secret")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelFileError, match="link out of the model's folder"):
        save_folder(open_folder(folder), tmp_path / "ours")


def test_shards_without_an_index_are_read_together(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    save_folder(open_folder(tiny_folder("llama")), tmp_path / "m", max_shard_bytes=30_000)
    (tmp_path / "m" / "model.safetensors.index.json").unlink()
    assert same_bits(open_folder(tmp_path / "m"), open_folder(tiny_folder("llama")))
    shutil.copyfile(*[tmp_path / "m" / f"model-0000{n}-of-00003.safetensors" for n in (1, 2)])
    with pytest.raises(ModelFileError, match="holds a tensor that"):
        open_folder(tmp_path / "m")


def test_a_tensor_that_its_shard_does_not_hold_is_named(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    save_folder(open_folder(tiny_folder("llama")), tmp_path / "m", max_shard_bytes=30_000)
    index = tmp_path / "m" / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    shards = sorted(set(values["weight_map"].values()))
    values["weight_map"]["model.norm.weight"] = shards[0]
    index.write_text(json.dumps(values))
    with pytest.raises(
        ModelFileError, match=r"model\.norm\.weight: names a tensor that its shard does not hold"
    ):
        open_folder(tmp_path / "m")


def test_a_folder_without_weights_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"no config\.json"):
        open_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelFileError, match=r"no \*\.safetensors"):
        open_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        UnsupportedError, match=r"pytorch_model\.bin, a format that can run code.*ayllu convert"
    ):
        open_folder(tmp_path)


def test_opening_maps_and_copies_nothing(tmp_path: Path) -> None:
    import tracemalloc

    folder = save_tiny("llama4-step1", tmp_path / "m")
    tracemalloc.start()
    opened = open_folder(folder)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used < 1 << 20
    assert sum(tensor.nbytes for tensor in opened.tensors.values()) > 100_000


@pytest.mark.parametrize("foreign", ["config.json only as a folder", "subfolder", "link", "no config.json"])
def test_only_what_is_plainly_a_model_is_overwritten(
    foreign: str, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    checkpoint, target = open_folder(tiny_folder("llama")), tmp_path / "ours"
    save_folder(checkpoint, target)
    if foreign == "subfolder":
        (target / "notes").mkdir()
    elif foreign == "link":
        (target / "extra.json").symlink_to(target / "config.json")
    else:
        (target / "config.json").unlink()
        if foreign.startswith("config"):
            (target / "config.json").mkdir()
    before = sorted(target.iterdir())
    with pytest.raises(UsageError, match="not only a model"):
        save_folder(checkpoint, target, overwrite=True)
    assert sorted(target.iterdir()) == before


def test_every_kind_of_pickle_is_named(tmp_path: Path) -> None:
    from ayllu.weights.file_kinds import PICKLE_SUFFIXES

    for suffix in sorted(PICKLE_SUFFIXES):
        folder = tmp_path / suffix[1:]
        folder.mkdir()
        (folder / "config.json").write_text(
            '{"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1,'
            ' "num_attention_heads": 1, "intermediate_size": 8, "max_position_embeddings": 8}'
        )
        (folder / f"model{suffix}").write_bytes(b"x")
        with pytest.raises(UnsupportedError, match="can run code"):
            open_folder(folder)


def test_a_pulled_model_may_link_to_the_hub_cache_on_another_disk_and_others_may_not(tmp_path: Path) -> None:
    blob = tmp_path / "hub" / "models--org--name" / "blobs" / ("ab" * 32)
    blob.parent.mkdir(parents=True)
    blob.write_text("{}", encoding="utf-8")
    folder = tmp_path / "store" / "name"
    folder.mkdir(parents=True)
    (folder / "config.json").symlink_to(blob)
    with pytest.raises(ModelFileError, match="link out of"):
        member_path(folder, "config.json")
    (folder / STORE_MANIFEST).write_text("{}", encoding="utf-8")
    assert member_path(folder, "config.json").read_text(encoding="utf-8") == "{}"
    (folder / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(ModelFileError, match="link out of"):
        member_path(folder, "tokenizer.json")
