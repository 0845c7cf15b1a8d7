"""Meta's consolidated shards (T6): joined as Meta's loader does, bit-exact both ways, never unpickled."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ayllu.errors import ModelFileError, UnsupportedError, UsageError
from ayllu.model.config import ExpertsConfig, LayerSpec, ModelConfig
from ayllu.model.presets import preset
from ayllu.weights.checkpoint import Checkpoint
from ayllu.weights.hf_fields import Fields
from ayllu.weights.huggingface import open_folder, save_folder
from ayllu.weights.meta import open_meta, save_meta
from ayllu.weights.meta_params import config_from_params, params_from_config
from ayllu.weights.tensors import Floats
from tests.weights.tiny_folders import save_tiny, state_dict

TinyFolder = Callable[..., Path]
Shards = list[dict[str, torch.Tensor]]
LLAMA4 = ("llama4-dense", "llama4-step1", "llama4-step2", "llama4-vision")


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of models that divide by 8 shards: 16 heads, 8 groups."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_tiny(kind, tmp_path_factory.mktemp(kind) / "wide", dtype="bfloat16", wide=True)
        return made[kind]

    return folder


def shards_of(folder: Path) -> Shards:
    files = sorted(folder.glob("consolidated.*.pth"))
    return [torch.load(file, weights_only=True) for file in files]


def same_tensors(one: Checkpoint, other: Checkpoint) -> bool:
    return one.tensors.keys() == other.tensors.keys() and all(
        tensor.decode().tobytes() == other.tensors[name].decode().tobytes()
        for name, tensor in one.tensors.items()
    )


@pytest.mark.parametrize("shards", [1, 2, 8])
@pytest.mark.parametrize("kind", LLAMA4)
def test_meta_to_hugging_face_to_meta_is_bit_exact(
    kind: str, shards: int, wide_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """T6."""
    start = open_folder(wide_folder(kind))
    save_meta(start, tmp_path / "meta", shards=shards)
    joined = open_meta(tmp_path / "meta", context=start.config.max_position_embeddings)
    assert joined.config == start.config
    assert same_tensors(joined, start)
    save_folder(joined, tmp_path / "hf")
    through = (tmp_path / "hf" / "model.safetensors").read_bytes()
    assert through == (wide_folder(kind) / "model.safetensors").read_bytes()
    save_meta(open_folder(tmp_path / "hf"), tmp_path / "again", shards=shards)
    before, after = shards_of(tmp_path / "meta"), shards_of(tmp_path / "again")
    assert len(before) == len(after) == shards
    for one, other in zip(before, after, strict=True):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert tensor.dtype == other[name].dtype
            assert torch.equal(tensor.view(torch.uint16), other[name].view(torch.uint16)), name


def rows(shards: Shards, name: str, axis: int = 0) -> torch.Tensor:
    return torch.cat([shard[name] for shard in shards], axis)


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_shards_hold_what_metas_own_loader_makes_of_them(
    shards: int, wide_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The load hooks of Meta's code, applied to each shard, and its parallel layers, put together by hand."""
    folder = wide_folder("llama4-step2")
    save_meta(open_folder(folder), tmp_path / "meta", shards=shards)
    parts, hf = shards_of(tmp_path / "meta"), state_dict("llama4-step2", folder)
    mixture, dense = "model.layers.1.", "model.layers.0."

    heads, groups, head_dim, width = 16, 8, 4, 64
    local = [heads * head_dim // shards, groups * head_dim // shards, groups * head_dim // shards]
    split = [shard["layers.1.attention.wqkv.weight"].split(local) for shard in parts]
    for index, name in enumerate(("q", "k", "v")):
        whole = torch.cat([piece[index] for piece in split])
        assert torch.equal(whole, hf[f"{mixture}self_attn.{name}_proj.weight"])
    assert torch.equal(
        rows(parts, "layers.1.attention.wo.weight", 1), hf[f"{mixture}self_attn.o_proj.weight"]
    )

    def stacks(name: str) -> list[torch.Tensor]:
        return [shard[f"layers.1.feed_forward.experts.{name}"] for shard in parts]

    w1 = torch.cat([stack.view(4, width, -1) for stack in stacks("moe_w_in_eD_F")], 2)
    w3 = torch.cat([stack.view(4, width, -1) for stack in stacks("moe_w_swiglu_eD_F")], 2)
    w2 = torch.cat([stack.view(4, -1, width) for stack in stacks("moe_w_out_eF_D")], 1)
    assert torch.equal(torch.cat([w1, w3], 2), hf[f"{mixture}feed_forward.experts.gate_up_proj"])
    assert torch.equal(w2, hf[f"{mixture}feed_forward.experts.down_proj"])
    router = parts[0]["layers.1.feed_forward.router_DE"]
    assert torch.equal(router.T, hf[f"{mixture}feed_forward.router.weight"])
    shared = f"{mixture}feed_forward.shared_expert."
    for theirs, ours, axis in (
        ("w_in_shared_FD", "gate", 0),
        ("w_swiglu_FD", "up", 0),
        ("w_out_shared_DF", "down", 1),
    ):
        joined = rows(parts, f"layers.1.feed_forward.{theirs}.weight", axis)
        assert torch.equal(joined, hf[f"{shared}{ours}_proj.weight"])

    halves = [shard["layers.0.feed_forward.mlp.fc1_weight"].chunk(2) for shard in parts]
    for index, name in enumerate(("gate", "up")):
        whole = torch.cat([half[index] for half in halves])
        assert torch.equal(whole, hf[f"{dense}feed_forward.{name}_proj.weight"])
    down = rows(parts, "layers.0.feed_forward.mlp.fc2_weight", 1)
    assert torch.equal(down, hf[f"{dense}feed_forward.down_proj.weight"])
    norms = {
        "layers.0.attention.wqkv.layer_norm_weight": f"{dense}input_layernorm.weight",
        "layers.0.feed_forward.mlp.layer_norm_weight": f"{dense}post_attention_layernorm.weight",
        "layers.1.feed_forward.norm.weight": f"{mixture}post_attention_layernorm.weight",
        "norm.weight": "model.norm.weight",
    }
    for shard in parts:
        assert all(torch.equal(shard[theirs], hf[name]) for theirs, name in norms.items())
    assert torch.equal(rows(parts, "tok_embeddings.weight"), hf["model.embed_tokens.weight"])
    assert torch.equal(rows(parts, "output.weight"), hf["lm_head.weight"])


def test_the_image_tower_splits_as_parallel_layers_do(
    wide_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = wide_folder("llama4-vision")
    save_meta(open_folder(folder), tmp_path / "meta", shards=2)
    parts, hf = shards_of(tmp_path / "meta"), state_dict("llama4-vision", folder)
    block, theirs = (
        "vision_embeddings.vision_encoder.transformer.resblocks.1.",
        "vision_model.model.layers.1.",
    )
    for name, other, axis in (
        ("attn.wq.weight", "self_attn.q_proj.weight", 0),
        ("attn.wv.bias", "self_attn.v_proj.bias", 0),
        ("attn.wo.weight", "self_attn.o_proj.weight", 1),
        ("mlp.c_fc.weight", "mlp.fc1.weight", 0),
        ("mlp.c_fc.bias", "mlp.fc1.bias", 0),
        ("mlp.c_proj.weight", "mlp.fc2.weight", 1),
    ):
        assert torch.equal(rows(parts, block + name, axis), hf[theirs + other])
    for name, other in (
        ("attn.wo.bias", "self_attn.o_proj.bias"),
        ("mlp.c_proj.bias", "mlp.fc2.bias"),
        ("ln_1.weight", "input_layernorm.weight"),
        ("ln_2.bias", "post_attention_layernorm.bias"),
    ):
        assert all(torch.equal(shard[block + name], hf[theirs + other]) for shard in parts)
    fc2 = rows(parts, "vision_embeddings.vision_adapter.mlp.c_proj.weight", 1)
    assert torch.equal(fc2, hf["vision_model.vision_adapter.mlp.fc2.weight"])
    assert torch.equal(rows(parts, "vision_projection.weight"), hf["multi_modal_projector.linear_1.weight"])


@pytest.mark.parametrize("shards", [1, 2])
def test_llama_3_turns_its_rotary_rows_on_the_way(
    shards: int, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    """Meta stores pairs next to each other, Hugging Face stores Llama 2 and 3 in halves."""
    start = open_folder(tiny_folder("llama"))
    save_meta(start, tmp_path / "meta", shards=shards)
    opened = open_meta(tmp_path / "meta")
    assert opened.config == replace(start.config, rope=replace(start.config.rope, layout="interleaved"))
    mine = rows(shards_of(tmp_path / "meta"), "layers.0.attention.wq.weight").numpy()
    halves = start.tensors["layers.0.attention.q_proj.weight"].decode()
    assert np.array_equal(mine.reshape(4, 4, 2, 32).transpose(0, 2, 1, 3).reshape(32, 32), halves)
    save_folder(opened, tmp_path / "hf")
    assert same_tensors(open_folder(tmp_path / "hf"), start)


def test_llama_2_embeddings_split_by_columns_are_joined(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    start = open_folder(tiny_folder("llama"))
    save_meta(start, tmp_path / "meta", shards=2)
    whole = torch.from_numpy(start.tensors["embed_tokens.weight"].decode())
    for number, half in enumerate(whole.chunk(2, dim=1)):
        change(tmp_path / "meta", {"tok_embeddings.weight": half.clone()}, number)
    opened = open_meta(tmp_path / "meta")
    assert opened.tensors["embed_tokens.weight"].shape == (64, 32)
    save_folder(opened, tmp_path / "hf")
    assert same_tensors(open_folder(tmp_path / "hf"), start)


def change(folder: Path, values: dict[str, Any], number: int = 0) -> None:
    file = folder / f"consolidated.{number:02d}.pth"
    content = torch.load(file, weights_only=True) | values
    torch.save({name: value for name, value in content.items() if value is not None}, file)


def read(params: dict[str, Any], **options: Any) -> ModelConfig:
    return config_from_params(Fields(params, Path("params.json")), vocab_size=202_048, **options)


PUBLISHED: dict[str, Any] = {
    "dim": 5120,
    "n_layers": 48,
    "n_heads": 40,
    "n_kv_heads": 8,
    "vocab_size": -1,
    "ffn_exp": 4.0,
    "ffn_dim_multiplier": 1.2,
    "multiple_of": 2048,
    "norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "nope_layer_interval": 4,
    "attention_chunk_size": 8192,
    "vision_args": {
        "image_size": {"height": 336, "width": 336},
        "patch_size": {"height": 14, "width": 14},
        "dim": 1408,
        "n_layers": 34,
        "n_heads": 16,
        "mlp_ratio": 4.0,
        "output_dim": 4096,
        "pixel_shuffle_ratio": 0.5,
    },
}
MOE = {"num_experts": 16, "top_k": 1, "capacity_factor": 1.0, "auto_scale_F": True}
SCOUT = PUBLISHED | {"use_scaled_rope": True, "use_qk_norm": True, "moe_args": MOE}
MAVERICK = PUBLISHED | {"moe_args": MOE | {"num_experts": 128, "interleave_moe_layer_step": 2}}


@pytest.mark.parametrize(("name", "params"), [("scout", SCOUT), ("maverick", MAVERICK)])
def test_the_published_params_give_the_published_models(name: str, params: dict[str, Any]) -> None:
    """FFN widths by the rule of spec 1.1 (16384, 8192), rope 16/1 where the file leaves it out (4.1)."""
    expected = preset(name)
    assert read(params, llama4=True, context=expected.max_position_embeddings) == expected
    back = params_from_config(expected)
    assert read(back, llama4=True, context=expected.max_position_embeddings) == expected
    assert (back["ffn_dim_multiplier"], back["multiple_of"]) == (1.2, 2048)


@pytest.mark.parametrize(
    ("params", "width", "context"),
    [
        ({"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256}, 11_008, 4096),
        (
            {
                "dim": 4096,
                "n_layers": 32,
                "n_heads": 32,
                "n_kv_heads": 8,
                "multiple_of": 1024,
                "rope_theta": 5e5,
            }
            | {"ffn_dim_multiplier": 1.3},
            14_336,
            8192,
        ),
        (
            {
                "dim": 2048,
                "n_layers": 16,
                "n_heads": 32,
                "n_kv_heads": 8,
                "multiple_of": 256,
                "rope_theta": 5e5,
            }
            | {"ffn_dim_multiplier": 1.5, "use_scaled_rope": True},
            8192,
            131_072,
        ),
    ],
)
def test_llama_2_and_3_widths_follow_from_their_params(
    params: dict[str, Any], width: int, context: int
) -> None:
    config = read(params, llama4=False)
    assert (config.intermediate_size, config.max_position_embeddings) == (width, context)
    assert config.rope.layout == "interleaved"


def test_what_the_layout_cannot_say_is_refused() -> None:
    scout = preset("scout")
    experts = scout.experts
    assert isinstance(experts, ExpertsConfig)
    for changed in (
        replace(scout, layers=(LayerSpec(chunk=8), LayerSpec(chunk=16))),
        replace(scout, layers=(LayerSpec(rotates=False), LayerSpec(), LayerSpec())),
        replace(scout, tie_word_embeddings=True),
        replace(scout, qkv_bias=True),
        replace(scout, experts=replace(experts, shared_intermediate_size=16)),
    ):
        with pytest.raises(UnsupportedError):
            params_from_config(changed)


def test_shards_that_do_not_divide_are_refused(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be split over 8 shards"):
        save_meta(open_folder(tiny_folder("llama4-step1")), tmp_path / "meta", shards=8)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def meta_folder(tiny_folder: TinyFolder, tmp_path: Path) -> Path:
    save_meta(open_folder(tiny_folder("llama4-step2")), tmp_path / "meta", shards=2)
    return tmp_path / "meta"


def test_leftovers_of_training_are_dropped(meta_folder: Path, tiny_folder: TinyFolder) -> None:
    import io

    leftovers = {
        "layers.0.attention.wo._extra_state": io.BytesIO(b"state"),
        "rope.freqs": torch.zeros(4),
        "layers.1.feed_forward.running_gate_stats_3E": torch.zeros(3, 4),
        "layers.1.feed_forward.global_gate_stats_3E": torch.zeros(3, 4),
        "layers.1.feed_forward.expert_activation_DE": torch.zeros(32, 4),
    }
    for number in range(2):
        file = meta_folder / f"consolidated.{number:02d}.pth"
        torch.save(torch.load(file, weights_only=True) | leftovers, file)
    assert same_tensors(open_meta(meta_folder), open_folder(tiny_folder("llama4-step2")))


DAMAGE: list[tuple[dict[str, Any], str]] = [
    ({"norm.weight": None}, "other tensors than shard 0"),
    ({"extra.weight": torch.zeros(2)}, "other tensors than shard 0"),
    ({"norm.weight": torch.zeros(32)}, "shards disagree"),
    ({"layers.1.attention.wqkv.weight": torch.zeros(31, 32)}, "wrong shape"),
    ({"layers.1.attention.wqkv.weight": torch.zeros(32)}, "wrong shape"),
    ({"layers.0.feed_forward.mlp.fc1_weight": torch.zeros(31, 32)}, "wrong shape"),
    ({"layers.1.feed_forward.experts.moe_w_in_eD_F": torch.zeros(127, 12)}, "wrong shape"),
    ({"layers.1.feed_forward.experts.moe_w_out_eF_D": torch.zeros(4, 12, 32)}, "wrong shape"),
    ({"layers.1.feed_forward.router_DE": torch.zeros(32)}, "wrong shape"),
    ({"tok_embeddings.weight": torch.zeros(2, 2)}, "do not fit together"),
    ({"norm.weight": "text"}, "other than a tensor"),
]


@pytest.mark.parametrize(("values", "problem"), DAMAGE)
def test_a_damaged_shard_is_named(values: dict[str, Any], problem: str, meta_folder: Path) -> None:
    change(meta_folder, values, number=1)
    with pytest.raises(ModelFileError, match=problem):
        open_meta(meta_folder)


def test_a_missing_shard_is_noticed(meta_folder: Path) -> None:
    (meta_folder / "consolidated.00.pth").unlink()
    with pytest.raises(ModelFileError, match="shards are missing"):
        open_meta(meta_folder)


@pytest.mark.parametrize(
    "params",
    [
        {"dim": 10**18},
        {"n_layers": 10**18},
        {"n_heads": 0},
        {"multiple_of": 0},
        {"ffn_dim_multiplier": 1e300},
        {"moe_args": {"num_experts": 4, "capacity_factor": -2}},
        {"moe_args": []},
        {"vision_args": {"dim": 1}},
        {"nope_layer_interval": -1},
        {"quantization_args": {"scheme": "int4"}},
        {"head_dim": 10**18},
    ],
)
def test_senseless_params_are_refused(params: dict[str, Any], meta_folder: Path) -> None:
    file = meta_folder / "params.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | params))
    with pytest.raises((ModelFileError, UnsupportedError)):
        open_meta(meta_folder)


class Payload:
    """Unpickling one of these makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def test_a_pth_that_would_run_code_is_refused(meta_folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    file = meta_folder / "consolidated.00.pth"
    good = file.read_bytes()
    loaded = torch.load(file, weights_only=True)
    torch.save(loaded | {"norm.weight": Payload(canary)}, file)
    variants = [
        file.read_bytes(),
        pickle.dumps(Payload(canary)),
        good[:-100],
        good[: len(good) // 2],
        b"",
        b"PK",
    ]
    for variant in variants:
        file.write_bytes(variant)
        with pytest.raises(ModelFileError, match=r"consolidated\.00\.pth: was refused") as caught:
            open_meta(meta_folder)
        assert "\n" not in str(caught.value)
    assert not canary.exists()


def test_joined_tensors_are_views_of_the_mapped_shards(meta_folder: Path) -> None:
    tensor = open_meta(meta_folder).tensors["layers.1.feed_forward.shared_expert.gate_proj.weight"]
    parts = getattr(tensor, "parts", ())
    assert len(parts) == 2
    assert not any(part.array.flags.owndata for part in parts)
    whole: Floats = tensor.decode()
    assert np.array_equal(tensor.decode_rows(5, 20), whole[5:20])


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1).expand(1 << 20, 1 << 20), torch.zeros(1, 1).expand(1 << 30, 1), torch.zeros(4, 4).T],
)
def test_a_tensor_that_claims_more_than_its_bytes_is_refused(tensor: torch.Tensor, meta_folder: Path) -> None:
    for number in range(2):
        change(meta_folder, {"norm.weight": tensor}, number)
    with pytest.raises(ModelFileError, match="larger than its bytes"):
        open_meta(meta_folder)
