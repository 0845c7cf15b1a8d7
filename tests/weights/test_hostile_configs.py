"""Mutated config.json and index files (T3): a typed error or a clean load, nothing imported, no network."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ayllu.errors import AylluError, ModelFileError, UnsupportedError
from ayllu.weights.hf_config import config_from_hugging_face, read_config
from ayllu.weights.huggingface import open_folder

BASE: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA4 = BASE | {"model_type": "llama4_text", "num_local_experts": 4, "intermediate_size_mlp": 48}
HUGE = 10**18
BEYOND = 10**400
WRONG = ("64", [64], {"64": 64}, True, 1.5, -1, 0, HUGE, BEYOND, "http://127.0.0.1:9/x")
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "head_dim",
)

# Each of these would run, fetch or import something in a loader that believes its config.
TEMPTATIONS: list[dict[str, Any]] = [
    {"auto_map": {"AutoConfig": "configuration_evil.EvilConfig", "AutoModel": "modeling_evil.Evil"}},
    {"auto_map": {"AutoModelForCausalLM": "someone/repository--modeling_evil.Evil"}},
    {"trust_remote_code": True},
    {"trust_remote_code": "yes", "auto_map": {"AutoConfig": "evil.Evil"}},
    {"text_config": {"trust_remote_code": True, "auto_map": {"AutoConfig": "evil.Evil"}}},
    {"_attn_implementation": "someone/kernel"},
    {"_attn_implementation_internal": "someone/kernel"},
    {"attn_implementation": "evil:run"},
    {"_attn_implementation_autoset": True},
    {"_name_or_path": "http://127.0.0.1:9/model"},
    {"_name_or_path": "../../../etc/passwd"},
    {"name_or_path": "someone/repository"},
    {"tokenizer_class": "evil.Tokenizer"},
    {"custom_pipelines": {"evil": {"impl": "evil.Pipeline"}}},
    {"architectures": ["evil.Model"]},
    {"architectures": ["http://127.0.0.1:9/Model"]},
    {"torch_dtype": "__import__('os').system('true')"},
    {"dtype": "os.system"},
    {"transformers_version": "__import__('os')"},
    {"__class__": "os._wrap_close", "__reduce__": ["os.system", ["true"]]},
    {"__init__": {"__globals__": {}}, "__dict__": {}},
    {"!!python/object/apply:os.system": ["true"]},
    {"py/object": "os.system"},
    {"$ref": "http://127.0.0.1:9/schema"},
    {"quantization_config": {"quant_method": "someone/evil"}},
    {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": "x"}}}},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    {"kernel_config": {"path": "../evil.so"}, "lib": "/tmp/evil.so"},
    {"rope_scaling": {"rope_type": "__import__"}},
    {"rope_scaling": {"type": "evil.rope"}},
    {"hidden_act": "evil.activation"},
    {"hidden_act": "http://127.0.0.1:9/act"},
    {"generation_config": "http://127.0.0.1:9/generation"},
    {"adapter": "http://127.0.0.1:9/adapter", "peft_config": {"auto_mapping": {"base_model_class": "evil"}}},
    {"chat_template": "{{ cycler.__init__.__globals__.os.system('true') }}"},
]

REFUSED: list[tuple[str, dict[str, Any]]] = [
    *((f"{key} = {str(value)[:24]}", BASE | {key: value}) for key in SIZES[:6] for value in WRONG),
    *((f"llama4 {key} = {HUGE}", LLAMA4 | {key: HUGE}) for key in SIZES if key != "num_key_value_heads"),
    *(
        (f"{key} = text", BASE | {key: "x"})
        for key in ("rms_norm_eps", "rope_theta", "tie_word_embeddings", "mlp_bias")
    ),
    *((f"{key} negative", BASE | {key: -1}) for key in ("rms_norm_eps", "rope_theta", "head_dim")),
    *((f"{key} = {BEYOND}", BASE | {key: BEYOND}) for key in ("rms_norm_eps", "rope_theta")),
    *((f"rope_scaling {value}", BASE | {"rope_scaling": value}) for value in ("x", [1], 1, True)),
    ("rope factor zero", BASE | {"rope_scaling": {"rope_type": "linear", "factor": 0}}),
    ("rope factor missing", BASE | {"rope_scaling": {"rope_type": "llama3"}}),
    ("model_type missing", {key: value for key, value in BASE.items() if key != "model_type"}),
    ("model_type a list", BASE | {"model_type": ["llama"]}),
    ("model_type a path", BASE | {"model_type": "../llama"}),
    ("a long model_type", BASE | {"model_type": "x" * 1_000_000}),
    ("no_rope_layers too short", LLAMA4 | {"no_rope_layers": [1]}),
    ("no_rope_layers of text", LLAMA4 | {"no_rope_layers": ["1", "1"]}),
    ("no_rope_layers too long", LLAMA4 | {"no_rope_layers": [1] * 50_000}),
    ("no_rope_layer_interval zero", LLAMA4 | {"no_rope_layer_interval": 0}),
    ("layer_types of numbers", LLAMA4 | {"layer_types": [1, 2]}),
    ("layer_types too long", LLAMA4 | {"layer_types": ["full_attention"] * 50_000}),
    ("moe_layers text", LLAMA4 | {"moe_layers": "0"}),
    ("moe_layers too long", LLAMA4 | {"moe_layers": [0] * 50_000}),
    ("a negative step", LLAMA4 | {"interleave_moe_layer_step": -1}),
    ("more experts per token than experts", LLAMA4 | {"num_experts_per_tok": 5}),
    ("a million experts", LLAMA4 | {"num_local_experts": 10**6}),
    ("a chunk of no tokens", LLAMA4 | {"attention_chunk_size": 0}),
    ("text_config a list", {"model_type": "llama4", "text_config": [], "vision_config": {}}),
    ("vision_config text", {"model_type": "llama4", "text_config": LLAMA4, "vision_config": "x"}),
]

TEXTS: list[tuple[str, bytes]] = [
    ("empty", b""),
    ("not JSON", b"model_type: llama"),
    ("a list", b"[]"),
    ("cut off", json.dumps(BASE).encode()[:-1]),
    ("NaN", json.dumps(BASE | {"rms_norm_eps": float("nan")}).encode()),
    ("Infinity", json.dumps(BASE | {"rope_theta": float("inf")}).encode()),
    ("a number too large for a float", json.dumps(BASE).encode()[:-1] + b', "rms_norm_eps": 1e999}'),
    ("a number of 5000 digits", json.dumps(BASE).encode()[:-1] + b', "vocab_size": ' + b"9" * 5000 + b"}"),
    ("a key twice", json.dumps(BASE).encode()[:-1] + b', "hidden_size": 32}'),
    ("a key twice, deep down", json.dumps(BASE).encode()[:-1] + b', "a": {"b": {"c": 1, "c": 2}}}'),
    ("bytes that are no text", b'{"model_type": "\xff\xfe"}'),
    ("UTF-16", json.dumps(BASE).encode("utf-16")),
    ("deeply nested lists", b'{"a":' + b"[" * 90_000),
    ("deeply nested objects", b'{"a":' * 90_000),
    ("a million lists", b'{"a":[' + b"[]," * 1_000_000 + b"[]]}"),
    ("a long list", b'{"a":[' + b"1," * 1_500_000 + b"1]}"),
    ("too large", b'{"a":"' + b"x" * (5 << 20) + b'"}'),
    ("a pickle", b"\x80\x04\x95\x0e\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94."),
]

INDEXES: list[tuple[str, object]] = [
    ("no weight_map", {}),
    ("an empty weight_map", {"weight_map": {}}),
    ("weight_map a list", {"weight_map": ["model.safetensors"]}),
    *(
        (f"shard {str(name)[:40]!r}", {"weight_map": {"model.norm.weight": name}})
        for name in (
            "../model.safetensors",
            "../../../etc/passwd",
            "/etc/passwd",
            "/tmp/model.safetensors",
            "a/b.safetensors",
            "a\\b.safetensors",
            "C:\\model.safetensors",
            "..",
            ".",
            "",
            ".hidden.safetensors",
            "a\0.safetensors",
            "a\n.safetensors",
            "http://127.0.0.1:9/model.safetensors",
            "file:///etc/passwd",
            "model.bin",
            "model.safetensors.pkl",
            "absent.safetensors",
            "x" * 5000 + ".safetensors",
            "ⅼ.safetensors",
            1,
            None,
            ["model.safetensors"],
        )
    ),
    ("too many shards", {"weight_map": {f"t{n}": f"s{n}.safetensors" for n in range(5000)}}),
]


def refused(act: Callable[[], object]) -> AylluError:
    started = time.perf_counter()
    with pytest.raises((ModelFileError, UnsupportedError)) as caught:
        act()
    assert time.perf_counter() - started <= 1.0
    assert len(str(caught.value)) < 2000
    return caught.value


@pytest.mark.parametrize(("what", "values"), REFUSED, ids=[what for what, _ in REFUSED])
def test_a_senseless_value_is_refused(what: str, values: dict[str, Any]) -> None:
    refused(lambda: config_from_hugging_face(values, Path("config.json")))


@pytest.mark.parametrize(("what", "text"), TEXTS, ids=[what for what, _ in TEXTS])
def test_a_senseless_file_is_refused_by_name(tmp_path: Path, what: str, text: bytes) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text)

    def act() -> None:
        config_from_hugging_face(read_config(tmp_path), file)

    assert str(file) in str(refused(act))
    tracemalloc.start()
    with pytest.raises((ModelFileError, UnsupportedError)):
        act()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= len(text) + (64 << 20)


@pytest.mark.parametrize(("what", "index"), INDEXES, ids=[what for what, _ in INDEXES])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, what: str, index: object) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"outside")
    (folder / "config.json").write_text(json.dumps(BASE))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside" not in str(refused(lambda: open_folder(folder)))


def test_enough_files_are_tried() -> None:
    assert len(TEMPTATIONS) >= 30
    assert len(REFUSED) + len(TEXTS) + len(INDEXES) + len(TEMPTATIONS) >= 150


WATCHED = """
import json, sys
from pathlib import Path
from ayllu.errors import AylluError
from ayllu.weights.checkpoint import open_checkpoint

folders = [Path(folder) for folder in sys.argv[1:]]
seen = []

def watch(event, arguments):
    if event == "import":
        name = arguments[0].partition(".")[0]
        if name != "ayllu" and name not in sys.stdlib_module_names:
            seen.append([event, arguments[0]])
    elif event == "open" and isinstance(arguments[0], str):
        inside = any(Path(arguments[0]).resolve().is_relative_to(folder) for folder in folders)
        if not inside and not arguments[0].endswith((".py", ".pyc")):
            seen.append([event, arguments[0]])
    elif event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "ctypes.")):
        seen.append([event, repr(arguments)[:200]])

try:
    open_checkpoint(folders[0] / "absent")
except AylluError:
    pass
sys.addaudithook(watch)
outcomes = []
for folder in folders:
    try:
        open_checkpoint(folder)
        outcomes.append("loaded")
    except AylluError as error:
        outcomes.append(type(error).__name__)
json.dump({"seen": seen, "outcomes": outcomes}, sys.stdout)
"""


def test_no_config_makes_us_import_fetch_or_run_anything(
    tmp_path: Path, tiny_folder: Callable[..., Path]
) -> None:
    """T3: in a process whose every import, socket and subprocess is reported."""
    source = tiny_folder("llama")
    good = json.loads((source / "config.json").read_text())
    folders = []
    for number, temptation in enumerate([{}, *TEMPTATIONS]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
        (folder / "config.json").write_text(json.dumps(good | temptation))
        for trap in ("configuration_evil.py", "modeling_evil.py", "evil.py"):
            (folder / trap).write_text("raise SystemExit('imported')\n")
        folders.append(str(folder))
    run = subprocess.run(
        [sys.executable, "-c", WATCHED, *folders], capture_output=True, text=True, timeout=60, check=True
    )
    report = json.loads(run.stdout)
    assert report["seen"] == []
    assert set(report["outcomes"]) == {"loaded", "UnsupportedError", "ModelFileError"}
    # What does not touch the arithmetic is ignored; what does is refused.
    assert report["outcomes"][0] == "loaded"
    assert report["outcomes"].count("loaded") >= 20
