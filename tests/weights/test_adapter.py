"""Adapter folders: what is read, and that everything damaged, foreign or hostile is a typed refusal (T27)."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ayllu.errors import AylluError, ModelFileError, UnsupportedError
from ayllu.model.config import ModelConfig
from ayllu.weights import adapter as adapter_module
from ayllu.weights.adapter import read_adapter
from ayllu.weights.adapter_config import MAX_EXPRESSIONS, MAX_NAMES, AdapterConfig
from ayllu.weights.rope_layout import permute_rope_rows
from tests.engine.small_adapters import (
    ALL_TARGETS,
    adapter_settings,
    adapter_tensors,
    save_adapter,
    write_adapter,
)
from tests.model.tiny import tiny_llama, tiny_llama4, tiny_qwen2
from tests.weights.small_checkpoints import CONFIGS

Tensors = dict[str, Any]
Settings = dict[str, Any]

LLAMA = tiny_llama()
LLAMA4 = tiny_llama4(expert_step=2, vision=True)
LAYER = "base_model.model.model.layers.0."
Q = f"{LAYER}self_attn.q_proj"
LLAMA_TENSORS = adapter_tensors(LLAMA)
LLAMA4_TENSORS = adapter_tensors(LLAMA4)


@pytest.mark.parametrize("multimodal", [False, True])
def test_names_lead_to_our_modules(multimodal: bool, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", LLAMA4, layers=[0, 1], multimodal=multimodal)
    attention = [f"attention.{name}_proj" for name in "qkvo"]
    dense = [f"feed_forward.{name}_proj" for name in ("gate", "up", "down")]
    shared = [name.replace("forward.", "forward.shared_expert.") for name in dense]
    expected = [f"layers.0.{name}" for name in attention + dense]
    expected += [f"layers.1.{name}" for name in attention + shared]
    assert sorted(read_adapter(folder, LLAMA4).modules) == sorted(expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_numbers_are_the_files_own(dtype: Any, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", LLAMA, dtype=dtype)
    change = read_adapter(folder, LLAMA).modules["layers.0.attention.v_proj"]
    held = np.float32 if dtype is np.float64 else dtype
    for matrix, side in ((change.a, "A"), (change.b, "B")):
        stored = LLAMA_TENSORS[f"{LAYER}self_attn.v_proj.lora_{side}.weight"].astype(dtype)
        assert matrix.dtype == held
        np.testing.assert_array_equal(matrix, stored.astype(held))


def test_only_rows_of_queries_and_keys_move_to_the_models_rotary_layout(tmp_path: Path) -> None:
    config = CONFIGS["llama interleaved and tied"]
    tensors = adapter_tensors(config)
    adapter = read_adapter(save_adapter(tmp_path / "a", tensors, adapter_settings()), config)
    assert adapter.layout == "interleaved"
    for ours, change in adapter.modules.items():
        kind = ours.rsplit(".", 1)[1]
        block = "self_attn" if "attention" in ours else "mlp"
        stored = f"base_model.model.model.layers.{ours.split('.')[1]}.{block}.{kind}"
        b = tensors[f"{stored}.lora_B.weight"]
        if kind in ("q_proj", "k_proj"):
            moved = permute_rope_rows(b, len(b) // config.head_dim, source="half", target="interleaved")
            assert not np.array_equal(moved, b)
            b = moved
        np.testing.assert_array_equal(change.a, tensors[f"{stored}.lora_A.weight"])
        np.testing.assert_array_equal(change.b, b)


@pytest.mark.parametrize("config", [tiny_qwen2(), LLAMA4], ids=["qwen2", "llama4"])
def test_rows_stay_where_the_model_has_the_layout_of_training(config: ModelConfig, tmp_path: Path) -> None:
    tensors = adapter_tensors(config)
    adapter = read_adapter(save_adapter(tmp_path / "a", tensors, adapter_settings()), config)
    for kind in ("q_proj", "k_proj"):
        held = adapter.modules[f"layers.0.attention.{kind}"].b
        np.testing.assert_array_equal(held, tensors[f"{LAYER}self_attn.{kind}.lora_B.weight"])


def test_scale_is_alpha_over_rank_or_over_its_root(tmp_path: Path) -> None:
    for options, scale in (
        (dict(rank=4, lora_alpha=8), 2.0),
        (dict(rank=8, lora_alpha=2.5), 0.3125),
        (dict(rank=4, lora_alpha=8, use_rslora=True), 4.0),
        (dict(rank=4, lora_alpha=8, alpha_pattern={"q_proj": 2, "v_proj": 6}), 0.5),
        (dict(rank=8), 1.0),
    ):
        folder = write_adapter(tmp_path / f"{scale}", LLAMA, **options)
        assert read_adapter(folder, LLAMA).modules["layers.0.attention.q_proj"].scale == scale


def _config(tmp_path: Path, **changes: Any) -> AdapterConfig:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(adapter_settings(**changes)), "utf-8")
    return AdapterConfig(path)


def test_the_first_pattern_that_matches_decides(tmp_path: Path) -> None:
    ranks = {
        "layers.1.self_attn.q_proj": 1,
        r"layers\.[01]\..*_proj": 2,
        "q_proj": 3,
        "^model.layers.2.mlp.up_proj": 4,
        "mlp.up_proj": 5,
        "^up_proj": 6,
        "attn.v_proj": 7,
    }
    config = _config(tmp_path, r=9, rank_pattern=ranks)
    expected = {
        "model.layers.1.self_attn.q_proj": 1,
        "model.layers.0.self_attn.q_proj": 2,
        "model.layers.11.self_attn.q_proj": 3,
        "model.layers.2.mlp.up_proj": 4,
        "language_model.model.layers.2.mlp.up_proj": 5,
        "model.layers.2.self_attn.v_proj": 9,
    }
    assert {module: config.rank(module) for module in expected} == expected


NAMES = st.sampled_from(["layers.0.self_attn.q_proj", "q_proj", "k_proj", "^model.layers.1.mlp.up_proj"])
EXPRESSIONS = st.sampled_from([r".*attn.*", r"(q|k)_proj", r"layers\.\d+\.mlp\..*", r"self_attn\.[qv]_proj"])


@settings(max_examples=60)
@given(
    patterns=st.lists(st.one_of(NAMES, EXPRESSIONS), unique=True, max_size=5),
    layer=st.integers(0, 12),
    tail=st.sampled_from(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"]),
)
def test_patterns_mean_what_they_mean_to_peft(
    patterns: list[str], layer: int, tail: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from peft.utils.other import get_pattern_key

    module = f"model.layers.{layer}.{tail}"
    ranks = {pattern: place + 1 for place, pattern in enumerate(patterns)}
    config = _config(tmp_path_factory.mktemp("config"), r=100, rank_pattern=ranks)
    assert config.rank(module) == ranks.get(get_pattern_key(list(ranks), module), 100)


def test_harmless_keys_of_training_are_no_obstacle(tmp_path: Path) -> None:
    folder = write_adapter(
        tmp_path / "a",
        LLAMA,
        lora_dropout=0.1,
        peft_version="0.99",
        megatron_core="megatron.core",
        init_lora_weights="gaussian",
        eva_config={"rho": 2.0},
        qalora_group_size=16,
        use_dora=False,
        modules_to_save=[],
        an_option_of_the_future=False,
    )
    assert len(read_adapter(folder, LLAMA).modules) == 3 * len(ALL_TARGETS)


def test_targets_may_be_an_expression_or_all_linear(tmp_path: Path) -> None:
    for number, targets in enumerate((r".*(self_attn|mlp)\.(?!gate)\w+_proj|.*gate_proj", "all-linear")):
        folder = write_adapter(tmp_path / f"{number}", LLAMA, target_modules=targets)
        assert len(read_adapter(folder, LLAMA).modules) == 3 * len(ALL_TARGETS)


def test_targets_that_this_model_has_none_of_are_no_contradiction(tmp_path: Path) -> None:
    targets = ["q_proj", "v_proj", "query_key_value", "c_attn"]
    folder = write_adapter(tmp_path / "a", LLAMA, targets=["q_proj", "v_proj"], target_modules=targets)
    assert len(read_adapter(folder, LLAMA).modules) == 6


def test_the_digest_covers_numbers_scales_and_names_and_not_the_file(tmp_path: Path) -> None:
    def digest(name: str, tensors: Tensors = LLAMA_TENSORS, **changes: Any) -> str:
        folder = save_adapter(tmp_path / name, tensors, adapter_settings(**changes))
        return read_adapter(folder, LLAMA).digest

    first = digest("first")
    assert first == digest("again", dict(reversed(LLAMA_TENSORS.items())), lora_dropout=0.3)
    changed = {name: array.copy() for name, array in LLAMA_TENSORS.items()}
    changed[f"{Q}.lora_A.weight"][0, 0] += 1e-6
    swapped = LLAMA_TENSORS | {
        f"{Q}.lora_A.weight": LLAMA_TENSORS[f"{LAYER}self_attn.k_proj.lora_A.weight"],
        f"{LAYER}self_attn.k_proj.lora_A.weight": LLAMA_TENSORS[f"{Q}.lora_A.weight"],
    }
    others = {digest("alpha", lora_alpha=9), digest("numbers", changed), digest("names", swapped)}
    assert len({first} | others) == 4


def test_a_later_change_of_the_file_changes_nothing_that_was_read(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", LLAMA)
    adapter = read_adapter(folder, LLAMA)
    kept = adapter.modules["layers.2.attention.v_proj"].a.copy()
    path = folder / "adapter_model.safetensors"
    with path.open("r+b") as file:
        file.seek(-4096, 2)
        file.write(b"\xff" * 4096)
    np.testing.assert_array_equal(adapter.modules["layers.2.attention.v_proj"].a, kept)
    with pytest.raises(ModelFileError, match="not finite"):
        read_adapter(folder, LLAMA)


# Each: what is wrong -> (what becomes of good tensors and settings, error, what its message names).
Damage = Callable[[Tensors, Settings], object]


def _set(**changes: Any) -> Damage:
    return lambda tensors, settings: settings.update(changes)


def _drop(key: str) -> Damage:
    return lambda tensors, settings: settings.pop(key)


def _put(name: str, array: Any) -> Damage:
    return lambda tensors, settings: tensors.update({name: array})


def _rename(old: str, new: str) -> Damage:
    def damage(tensors: Tensors, settings: Settings) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return damage


def _change(name: str, change: Callable[[Any], Any]) -> Damage:
    return lambda tensors, settings: tensors.update({name: change(tensors[name])})


def _with(array: Any, value: float) -> Any:
    array = array.copy()
    array[-1, -1] = value
    return array


MATRIX = np.ones((4, 64), np.float32)
ZERO = np.zeros((4, 4), np.float32)
CORPUS: dict[str, tuple[Damage, type[AylluError], str]] = {
    # The config says something else than plain LoRA.
    "no peft_type": (_drop("peft_type"), ModelFileError, "peft_type"),
    "another method": (_set(peft_type="IA3"), UnsupportedError, "IA3"),
    "a method that is no text": (_set(peft_type=["LORA"]), ModelFileError, "peft_type"),
    "bias of all": (_set(bias="all"), UnsupportedError, "bias"),
    "bias of the adapter": (_set(lora_bias=True), UnsupportedError, "lora_bias"),
    "DoRA": (_set(use_dora=True), UnsupportedError, "use_dora"),
    "QALoRA": (_set(use_qalora=True), UnsupportedError, "use_qalora"),
    "whole modules": (_set(modules_to_save=["lm_head"]), UnsupportedError, "modules_to_save"),
    "transposed": (_set(fan_in_fan_out=True), UnsupportedError, "fan_in_fan_out"),
    "replicated layers": (_set(layer_replication=[[0, 3], [1, 3]]), UnsupportedError, "layer_replication"),
    "expert parameters": (
        _set(target_parameters=["feed_forward.experts.down_proj"]),
        UnsupportedError,
        "target_parameters",
    ),
    "new tokens": (_set(trainable_token_indices=[1, 2]), UnsupportedError, "trainable_token_indices"),
    "activated by text": (_set(alora_invocation_tokens=[5]), UnsupportedError, "alora_invocation_tokens"),
    "a changed base": (_set(init_lora_weights="pissa_niter_4"), UnsupportedError, "init_lora_weights"),
    "an option of the future": (_set(use_magic={"level": 3}), UnsupportedError, "use_magic"),
    "other layers": (_set(layers_to_transform=[0], layers_pattern="h"), UnsupportedError, "layers_pattern"),
    # The config makes no sense.
    "rank 0": (_set(r=0), ModelFileError, "r"),
    "rank 513": (_set(r=513), ModelFileError, "512"),
    "rank as text": (_set(r="4"), ModelFileError, "whole number"),
    "rank true": (_set(r=True), ModelFileError, "whole number"),
    "rank too long to print": (_set(r=10**400), ModelFileError, "r"),
    "rank pattern of 1e9": (_set(rank_pattern={"q_proj": 10**9}), ModelFileError, "rank_pattern.q_proj"),
    "rank pattern as a list": (_set(rank_pattern=["q_proj"]), ModelFileError, "rank_pattern"),
    "alpha as text": (_set(lora_alpha="8"), ModelFileError, "lora_alpha"),
    "alpha 1e30": (_set(lora_alpha=1e30), ModelFileError, "lora_alpha"),
    "alpha pattern null": (_set(alpha_pattern={"q_proj": None}), ModelFileError, "alpha_pattern.q_proj"),
    "targets as numbers": (_set(target_modules=[1]), ModelFileError, "target_modules"),
    "too many targets": (_set(target_modules=["q"] * (MAX_NAMES + 1)), ModelFileError, "target_modules"),
    "no targets": (_drop("target_modules"), ModelFileError, "does not target"),
    "an expression that is none": (_set(target_modules="(q_proj"), UnsupportedError, "target_modules"),
    "a huge expression": (_set(target_modules=".{1000}{1000}{1000}"), UnsupportedError, "target_modules"),
    "a long expression": (_set(target_modules="(?:a|" * 900 + "b" + ")" * 900), UnsupportedError, "beyond"),
    "many expressions": (
        _set(rank_pattern={f"x{i}|y": 4 for i in range(MAX_EXPRESSIONS + 1)}),
        UnsupportedError,
        "beyond",
    ),
    "an expression that never ends": (
        _set(target_modules=r"(.*)*(?=(.*)*)\2\2.*.*.*.*.*.*(?<!j)x"),
        UnsupportedError,
        "too many steps",
    ),
    # The config contradicts the tensors.
    "a module not targeted": (_set(target_modules=["q_proj"]), ModelFileError, "does not target"),
    "a target without tensors": (
        lambda tensors, settings: [tensors.pop(name) for name in list(tensors) if "v_proj" in name],
        ModelFileError,
        "v_proj",
    ),
    "a layer not targeted": (_set(layers_to_transform=[0, 1]), ModelFileError, "layers.2"),
    "an excluded module": (_set(exclude_modules=["up_proj"]), ModelFileError, "up_proj"),
    "another rank": (_set(r=8), ModelFileError, "wrong shape"),
    "another rank by pattern": (_set(rank_pattern={"k_proj": 2}), ModelFileError, "k_proj"),
    # Tensors that do not fit, or mean something else.
    "A without B": (lambda tensors, settings: tensors.pop(f"{Q}.lora_B.weight"), ModelFileError, "lora_B"),
    "B without A": (lambda tensors, settings: tensors.pop(f"{Q}.lora_A.weight"), ModelFileError, "lora_A"),
    "no tensors": (lambda tensors, settings: tensors.clear(), ModelFileError, "no tensors"),
    "A transposed": (_change(f"{Q}.lora_A.weight", np.transpose), ModelFileError, "wrong shape"),
    "B too tall": (_put(f"{Q}.lora_B.weight", np.ones((65, 4), np.float32)), ModelFileError, "wrong shape"),
    "A of three axes": (_put(f"{Q}.lora_A.weight", MATRIX[None]), ModelFileError, "wrong shape"),
    "A without axes": (_put(f"{Q}.lora_A.weight", MATRIX[0, 0]), ModelFileError, "wrong shape"),
    "NaN": (_change(f"{Q}.lora_A.weight", lambda a: _with(a, np.nan)), ModelFileError, "not finite"),
    "infinity": (_change(f"{Q}.lora_B.weight", lambda b: _with(b, np.inf)), ModelFileError, "not finite"),
    "BF16 infinity": (
        _change(f"{Q}.lora_B.weight", lambda b: _with(b, -np.inf).astype(ml_dtypes.bfloat16)),
        ModelFileError,
        "not finite",
    ),
    "beyond F32": (
        _change(f"{Q}.lora_A.weight", lambda a: _with(a.astype(np.float64), 1e300)),
        ModelFileError,
        "not finite",
    ),
    "whole numbers": (_change(f"{Q}.lora_A.weight", lambda a: a.astype(np.int32)), UnsupportedError, "I32"),
    "a layer too many": (_rename("layers.2.", "layers.3."), ModelFileError, "layers.3"),
    "a layer far away": (_rename("layers.2.", f"layers.{10**30}."), ModelFileError, "base model"),
    "a negative layer": (_rename("layers.2.", "layers.-1."), ModelFileError, "base model"),
    "a layer written otherwise": (
        _put(f"{LAYER.replace('0', '00')}self_attn.q_proj.lora_A.weight", MATRIX),
        ModelFileError,
        "layers.00",
    ),
    "another digit": (_rename("layers.2.", "layers.٢."), ModelFileError, "base model"),
    "another architecture": (_rename("mlp.", "feed_forward."), ModelFileError, "feed_forward"),
    "no prefix": (_rename("base_model.model.", ""), ModelFileError, "not part of a LoRA adapter"),
    "another name of the adapter": (_rename(".weight", ".default.weight"), ModelFileError, "default"),
    "a norm": (_put(f"{LAYER}input_layernorm.lora_A.weight", MATRIX), ModelFileError, "input_layernorm"),
    "an unknown tensor": (_put("rotary.inv_freq", MATRIX), ModelFileError, "inv_freq"),
    "embeddings": (
        _put("base_model.model.model.embed_tokens.lora_embedding_A", MATRIX),
        UnsupportedError,
        "embeddings",
    ),
    "the head": (_put("base_model.model.lm_head.lora_A.weight", MATRIX), UnsupportedError, "lm_head"),
    "a whole head": (_put("base_model.model.lm_head.weight", MATRIX), UnsupportedError, "a whole module"),
    "a bias": (_put(f"{Q}.bias", MATRIX[0]), UnsupportedError, "biases"),
    "a bias of B": (_put(f"{Q}.lora_B.bias", MATRIX[0]), UnsupportedError, "bias"),
    "a magnitude": (_put(f"{Q}.lora_magnitude_vector", MATRIX[0]), UnsupportedError, "DoRA"),
}
LLAMA4_CORPUS: dict[str, tuple[Damage, type[AylluError], str]] = {
    "the router": (
        _put("base_model.model.model.layers.1.feed_forward.router.lora_A.weight", MATRIX),
        UnsupportedError,
        "the router",
    ),
    "routed experts": (
        _put("base_model.model.model.layers.1.feed_forward.experts.lora_A.weight", MATRIX),
        UnsupportedError,
        "routed experts",
    ),
    "one routed expert": (
        _put("base_model.model.model.layers.1.feed_forward.experts.3.gate_proj.lora_A.weight", MATRIX),
        UnsupportedError,
        "routed experts",
    ),
    "the image tower": (
        _put("base_model.model.vision_model.model.layers.0.self_attn.q_proj.lora_A.weight", MATRIX),
        UnsupportedError,
        "the image tower",
    ),
    "a dense layer that has experts": (
        _put("base_model.model.model.layers.1.feed_forward.gate_proj.lora_A.weight", MATRIX),
        ModelFileError,
        "layers.1.feed_forward.gate_proj",
    ),
    "two ways to name the decoder": (
        _put("base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight", MATRIX),
        ModelFileError,
        "base model",
    ),
}
CASES = [(LLAMA, LLAMA_TENSORS, damage) for damage in CORPUS.items()]
CASES += [(LLAMA4, LLAMA4_TENSORS, damage) for damage in LLAMA4_CORPUS.items()]


@pytest.mark.parametrize(("config", "good", "case"), CASES, ids=[case[0] for *_, case in CASES])
def test_t27_malformed_adapters_are_refused(
    config: ModelConfig, good: Tensors, case: Any, tmp_path: Path
) -> None:
    _, (damage, error, named) = case
    tensors, settings = dict(good), adapter_settings()
    damage(tensors, settings)
    folder = save_adapter(tmp_path / "a", tensors, settings)
    with pytest.raises(error) as caught:
        read_adapter(folder, config)
    assert type(caught.value) is error
    assert named in str(caught.value)
    assert caught.value.fix and len(str(caught.value)) < 1200


def _link_config(folder: Path) -> None:
    (folder / "adapter_config.json").rename(folder.parent / "outside.json")
    (folder / "adapter_config.json").symlink_to(folder.parent / "outside.json")


def _link_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "adapter_model.safetensors").symlink_to(folder.parent / "outside.safetensors")


def _dangling_link(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to("/nowhere")


def _only_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _config_bytes(data: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "adapter_config.json").write_bytes(data)

    return write


def _name_twice(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    one, other = f"{Q}.lora_A.weight".encode(), f"{LAYER}self_attn.k_proj.lora_A.weight".encode()
    assert len(one) == len(other)
    path.write_bytes(data.replace(other, one))


FILES: dict[str, tuple[Callable[[Path], object], type[AylluError]]] = {
    "a config linked from outside": (_link_config, ModelFileError),
    "weights linked from outside": (_link_weights, ModelFileError),
    "a link that leads nowhere": (_dangling_link, ModelFileError),
    "weights as a pickle": (_only_pickle, UnsupportedError),
    "weights cut short": (_cut, ModelFileError),
    "a tensor named twice": (_name_twice, ModelFileError),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), ModelFileError),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), ModelFileError),
    "a config that is no JSON": (_config_bytes(b"\x80\x04K\x01."), ModelFileError),
    "a config that is a list": (_config_bytes(b"[]"), ModelFileError),
    "a config with a key twice": (_config_bytes(b'{"r": 1, "r": 2}'), ModelFileError),
    "a config with NaN": (_config_bytes(b'{"lora_alpha": NaN}'), ModelFileError),
    "a config of brackets": (_config_bytes(b"[" * 4_000_000), ModelFileError),
    "a config too large": (_config_bytes(b'{"a": "' + b"x" * (5 << 20) + b'"}'), ModelFileError),
}


@pytest.mark.parametrize("case", list(FILES))
def test_t27_damaged_and_linked_files_are_refused(case: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", LLAMA)
    damage, error = FILES[case]
    damage(folder)
    with pytest.raises(error) as caught:
        read_adapter(folder, LLAMA)
    assert type(caught.value) is error


def test_a_missing_folder_and_a_file_in_its_place_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for name in ("nothing", "file"):
        with pytest.raises(ModelFileError, match="no such folder"):
            read_adapter(tmp_path / name, LLAMA)


def test_a_file_beyond_the_limit_is_refused_before_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_adapter(tmp_path / "a", LLAMA)
    monkeypatch.setattr(adapter_module, "MAX_ADAPTER_BYTES", 1000)
    with pytest.raises(ModelFileError, match="too large for an adapter"):
        read_adapter(folder, LLAMA)


def test_wrong_shapes_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    # A sparse file of 3 GB: it costs no disk, and reading it would cost 3 GB of memory.
    rows = 3 << 28
    header = {
        f"{Q}.lora_A.weight": {"dtype": "F32", "shape": [rows, 1], "data_offsets": [0, 4 * rows]},
        f"{Q}.lora_B.weight": {"dtype": "F32", "shape": [64, 0], "data_offsets": [4 * rows, 4 * rows]},
    }
    raw = json.dumps(header).encode()
    folder = write_adapter(tmp_path / "a", LLAMA, targets=["q_proj"])
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + 4 * rows)
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError, match="wrong shape"):
            read_adapter(folder, LLAMA)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


@settings(max_examples=150)
@given(data=st.data())
def test_a_flipped_byte_is_read_or_refused_never_a_crash(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = write_adapter(tmp_path_factory.mktemp("flip") / "a", LLAMA, targets=["q_proj"], layers=[0])
    path = folder / data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(content))
    try:
        adapter = read_adapter(folder, LLAMA)
    except AylluError:
        return
    for change in adapter.modules.values():
        assert np.isfinite(change.a).all() and np.isfinite(change.b).all() and np.isfinite(change.scale)
