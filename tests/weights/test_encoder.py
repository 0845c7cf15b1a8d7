"""Encoder folders: what transformers saved is read as it is, and hostile ones end in a typed error."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from ayllu.errors import AylluError, ModelFileError, UnsupportedError
from ayllu.model.encoder_config import EncoderConfig
from ayllu.weights.checkpoint import open_checkpoint
from ayllu.weights.encoder import EncoderCheckpoint, is_encoder_folder, open_encoder
from ayllu.weights.encoder_load import load_encoder
from ayllu.weights.encoder_settings import read_encoder_settings
from tests.weights.test_hostile_configs import TEMPTATIONS, TEXTS

CONFIG = {
    "model_type": "bert",
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
}
HUGE = 10**18
CPU = torch.device("cpu")


def save_bert(folder: Path, *, pretraining: bool = False, dtype: str = "float32") -> Any:
    """A random BERT as transformers saves it; every parameter is filled. Returns transformers' own model."""
    import transformers

    torch.manual_seed(3)
    config = transformers.BertConfig(**CONFIG)
    model = transformers.BertForPreTraining(config) if pretraining else transformers.BertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return model.bert if pretraining else model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_bert(tmp_path / "bert")
    return tmp_path / "bert"


def configured(folder: Path, **changes: Any) -> Path:
    """The folder with keys of its config.json changed; None takes one away."""
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return folder


def stored(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    from safetensors.numpy import load_file

    return dict(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("pretraining", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_transformers_saved_is_read_as_it_is(tmp_path: Path, pretraining: bool, dtype: str) -> None:
    theirs = save_bert(tmp_path, pretraining=pretraining, dtype=dtype).float().eval()
    checkpoint = open_encoder(tmp_path)
    assert checkpoint.config == EncoderConfig(**{key: CONFIG[key] for key in CONFIG if key != "model_type"})
    assert sum(checkpoint.bytes_by_encoding.values()) == checkpoint.config.parameters * (
        4 if dtype == "float32" else 2
    )
    ours = load_encoder(checkpoint, device=CPU)
    tokens = torch.randint(0, 60, (3, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = ours(tokens, torch.tensor([11, 11, 11]))
        torch.testing.assert_close(got, theirs(tokens).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_weights_in_the_wanted_precision_stay_in_the_file(folder: Path) -> None:
    checkpoint = open_encoder(folder)
    ours = load_encoder(checkpoint, device=CPU)
    for name, parameter in ours.named_parameters():
        assert parameter.data_ptr() == checkpoint.tensors[name].array.ctypes.data, name
        assert not parameter.requires_grad
    half = load_encoder(checkpoint, device=CPU, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_absent_keys_take_transformers_own_defaults(tmp_path: Path) -> None:
    import transformers

    from ayllu.weights.encoder import encoder_config_from_hugging_face

    theirs = transformers.BertConfig()
    ours = encoder_config_from_hugging_face({"model_type": "bert"}, tmp_path / "config.json")
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        assert getattr(ours, key) == getattr(theirs, key)
    for key in ("max_position_embeddings", "type_vocab_size", "layer_norm_eps"):
        assert getattr(ours, key) == getattr(theirs, key)


def refused(folder: Path, error: type[AylluError] = AylluError) -> AylluError:
    """The typed error that opening the folder ends in, one line of bounded length."""
    with pytest.raises(error) as caught:
        open_encoder(folder)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 2000
    return caught.value


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "type_vocab_size",
    ],
)
@pytest.mark.parametrize("value", ["64", [64], True, 1.5, -1, 0, 7, HUGE, 1 << 19])
def test_a_config_with_another_size_than_the_tensors_is_refused(folder: Path, key: str, value: Any) -> None:
    refused(configured(folder, **{key: value}))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu_new"},
        {"hidden_act": "evil.activation"},
        {"position_embedding_type": "relative_key"},
        {"is_decoder": True},
        {"add_cross_attention": True},
        {"model_type": "roberta"},
        {"layer_norm_eps": 0},
        {"layer_norm_eps": "small"},
    ],
    ids=str,
)
def test_what_would_change_the_arithmetic_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    refused(configured(folder, **changes))


@pytest.mark.parametrize("temptation", TEMPTATIONS, ids=lambda value: str(value)[:40])
def test_a_config_cannot_name_code_to_run(folder: Path, temptation: dict[str, Any]) -> None:
    before = set(sys.modules)
    try:
        open_encoder(configured(folder, **temptation))
    except AylluError as error:
        assert str(error).isprintable()
    assert not [name for name in set(sys.modules) - before if "evil" in name]


@pytest.mark.parametrize(("name", "text"), TEXTS, ids=[name for name, _ in TEXTS])
def test_a_config_that_is_no_json_is_refused(folder: Path, name: str, text: bytes) -> None:
    (folder / "config.json").write_bytes(text)
    refused(folder)
    assert not is_encoder_folder(folder)


def test_tensors_must_be_there_with_their_shapes_and_no_others(folder: Path) -> None:
    tensors, file = stored(folder), folder / "model.safetensors"
    key = "encoder.layer.1.output.dense.weight"
    for changed, says in (
        ({name: value for name, value in tensors.items() if name != key}, "missing"),
        (tensors | {key: tensors[key].T.copy()}, "wrong shape"),
        (tensors | {key: np.zeros((24, 41), np.float32)}, "wrong shape"),
        (tensors | {"encoder.layer.2.output.dense.weight": tensors[key]}, "does not belong"),
        (tensors | {"embeddings.evil.weight": tensors[key]}, "does not belong"),
        (tensors | {f"bert.{key}": tensors[key]}, "does not belong"),
        (tensors | {key: tensors[key].astype(np.int32)}, "stored as I32"),
        ({}, "missing"),
    ):
        save_file(changed, file)
        assert says in str(refused(folder))


def test_a_huge_claim_is_refused_before_anything_is_allocated(folder: Path) -> None:
    configured(folder, vocab_size=1 << 24, hidden_size=1 << 20, num_attention_heads=1, num_hidden_layers=1024)
    tracemalloc.start()
    refused(folder, ModelFileError)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_the_weights_are_one_file_of_the_folder_and_never_a_pickle(folder: Path, tmp_path: Path) -> None:
    file = folder / "model.safetensors"
    file.rename(tmp_path / "outside.safetensors")
    refused(folder, ModelFileError)
    file.symlink_to(tmp_path / "outside.safetensors")
    assert "link out" in str(refused(folder, ModelFileError))
    file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "can run code" in str(refused(folder, UnsupportedError))
    for shard in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (folder / shard).write_bytes(b"")
    assert "2 safetensors files" in str(refused(folder, UnsupportedError))


def test_an_encoder_folder_is_known_by_its_model_type(folder: Path, tmp_path: Path) -> None:
    assert is_encoder_folder(folder)
    assert not is_encoder_folder(folder / "config.json")
    assert not is_encoder_folder(tmp_path / "nothing")
    assert not is_encoder_folder(configured(folder, model_type="llama"))
    assert not is_encoder_folder(configured(folder, model_type=["bert"]))


def test_opened_as_a_model_to_talk_to_it_says_what_it_is(folder: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"bert is an embedding model \(bert\)") as caught:
        open_checkpoint(folder)
    assert str(caught.value).isprintable()


def test_everything_but_loading_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from ayllu.weights.encoder import is_encoder_folder, open_encoder\n"
        "from ayllu.weights.encoder_settings import read_encoder_settings\n"
        "folder = Path(sys.argv[1])\n"
        "print(is_encoder_folder(folder), read_encoder_settings(folder, open_encoder(folder).config))\n"
    )
    command = [sys.executable, "-c", code, str(folder)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert answer == "True EncoderSettings(max_tokens=16, pooling='mean')\n"


def module(kind: str, path: str = "") -> dict[str, Any]:
    return {"idx": 0, "name": "0", "path": path, "type": f"sentence_transformers.models.{kind}"}


STEPS = [module("Transformer"), module("Pooling", "1_Pooling")]
CLS = {"word_embedding_dimension": 24, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}


def described(folder: Path, steps: Any = None, pooling: Any = None, sentence: Any = None) -> Path:
    """The folder with the settings files of sentence-transformers beside the model."""
    (folder / "1_Pooling").mkdir(exist_ok=True)
    for name, value in (
        ("modules.json", steps),
        ("1_Pooling/config.json", pooling),
        ("sentence_bert_config.json", sentence),
    ):
        (folder / name).unlink(missing_ok=True)
        if value is not None:
            (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def settings_of(folder: Path) -> tuple[int, str]:
    settings = read_encoder_settings(folder, open_encoder(folder).config)
    return settings.max_tokens, settings.pooling


@pytest.mark.parametrize(
    ("steps", "pooling", "sentence", "expected"),
    [
        (None, None, None, (16, "mean")),
        (STEPS, MEAN, {"max_seq_length": 8, "do_lower_case": False}, (8, "mean")),
        ([*STEPS, module("Normalize", "2_Normalize")], CLS, {"max_seq_length": 4096}, (16, "cls")),
        (STEPS, {"pooling_mode": "cls"}, {"max_seq_length": None}, (16, "cls")),
    ],
)
def test_the_settings_of_sentence_transformers_are_followed(
    folder: Path, steps: Any, pooling: Any, sentence: Any, expected: tuple[int, str]
) -> None:
    assert settings_of(described(folder, steps, pooling, sentence)) == expected


@pytest.mark.parametrize(
    ("steps", "pooling", "sentence"),
    [
        ([module("Transformer")], MEAN, None),
        ([*STEPS, module("Dense", "2_Dense")], MEAN, None),
        ([*STEPS, module("Normalize"), module("Normalize")], MEAN, None),
        ([module("Transformer"), module("Pooling", "../1_Pooling")], MEAN, None),
        ([module("Transformer"), module("Pooling", "")], MEAN, None),
        ([module("Transformer"), module("Pooling", "/etc")], MEAN, None),
        ([{"type": 5}], MEAN, None),
        ([{}], MEAN, None),
        ({}, MEAN, None),
        ([1], MEAN, None),
        ("not json", MEAN, None),
        ("[" * 50_000, MEAN, None),
        ('"' + "x" * 70_000 + '"', MEAN, None),
        (STEPS, {}, None),
        (STEPS, MEAN | {"pooling_mode_max_tokens": True}, None),
        (STEPS, {"pooling_mode_max_tokens": True}, None),
        (STEPS, {"pooling_mode_lasttoken": True}, None),
        (STEPS, {"pooling_mode": "max"}, None),
        (STEPS, {"pooling_mode": ["mean"]}, None),
        (STEPS, {"pooling_mode_mean_tokens": "yes"}, None),
        (STEPS, MEAN | {"word_embedding_dimension": 384}, None),
        (STEPS, "[]", None),
        (STEPS, MEAN, {"max_seq_length": 2}),
        (STEPS, MEAN, {"max_seq_length": -1}),
        (STEPS, MEAN, {"max_seq_length": "256"}),
        (STEPS, MEAN, {"do_lower_case": True}),
        (STEPS, MEAN, "[]"),
    ],
)
def test_settings_that_would_give_other_vectors_are_refused(
    folder: Path, steps: Any, pooling: Any, sentence: Any
) -> None:
    with pytest.raises((ModelFileError, UnsupportedError)) as caught:
        settings_of(described(folder, steps, pooling, sentence))
    assert str(caught.value).isprintable()


def test_a_pooling_that_is_described_elsewhere_is_never_guessed(folder: Path) -> None:
    described(folder, STEPS)
    with pytest.raises(ModelFileError, match=r"Put 1_Pooling/config\.json of the same model"):
        settings_of(folder)
    manifest = folder / "ayllu-model.json"
    manifest.write_text(json.dumps({"pooling": "cls"}))
    assert settings_of(folder) == (16, "cls")
    manifest.write_text(json.dumps({"pooling": "max"}))
    with pytest.raises(ModelFileError, match="1_Pooling"):
        settings_of(folder)
    described(folder, STEPS, MEAN)
    manifest.write_text(json.dumps({"pooling": "cls"}))
    assert settings_of(folder) == (16, "mean")


def test_links_of_the_settings_stay_in_the_folder_or_in_its_hub_cache(folder: Path, tmp_path: Path) -> None:
    described(folder, STEPS)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "config.json").write_text(json.dumps(MEAN))
    (folder / "1_Pooling" / "config.json").symlink_to(outside / "config.json")
    with pytest.raises(ModelFileError, match="link out"):
        settings_of(folder)
    (folder / "1_Pooling" / "config.json").unlink()
    (folder / "1_Pooling").rmdir()
    (folder / "1_Pooling").symlink_to(outside)
    with pytest.raises(ModelFileError, match="link out"):
        settings_of(folder)
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "c0ffee"
    snapshot.parent.mkdir(parents=True)
    (folder / "1_Pooling").unlink()
    folder.rename(snapshot)
    blob = repository / "blobs" / ("0" * 40)
    blob.parent.mkdir()
    blob.write_text(json.dumps(CLS))
    (snapshot / "1_Pooling").mkdir()
    (snapshot / "1_Pooling" / "config.json").symlink_to(Path("../../../blobs") / blob.name)
    assert settings_of(snapshot) == (16, "cls")


def test_the_checkpoint_of_the_real_model_is_whole(minilm_folder: Path) -> None:
    checkpoint = open_encoder(minilm_folder)
    assert isinstance(checkpoint, EncoderCheckpoint)
    # The publisher counts 22,713,216: the pooler of BERT's pretraining is among them, and is not loaded.
    assert checkpoint.config.parameters == 22_713_216 - (384 * 384 + 384)
    assert read_encoder_settings(minilm_folder, checkpoint.config).max_tokens == 256
