"""Loading: every path puts the numbers of the file into the network, once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ayllu.engine.oracle import Oracle
from ayllu.errors import NoSpaceError, UsageError
from ayllu.model.parameters import parameter_shapes
from ayllu.weights.checkpoint import open_checkpoint
from ayllu.weights.gguf_export import save_gguf
from ayllu.weights.load import (
    BLOCK_ELEMENTS,
    MappedEmbedding,
    choose_device,
    choose_dtype,
    load_decoder,
    memory_bytes,
    require_memory,
)
from tests.model.tiny import tiny_llama, tiny_llama4
from tests.weights.small_checkpoints import random_checkpoint


@pytest.mark.parametrize("encoding", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_every_parameter_holds_the_decoded_file(encoding: str, tmp_path: Path) -> None:
    save_gguf(random_checkpoint(tiny_llama(), seed=3), tmp_path / "m.gguf", encoding)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    decoder = load_decoder(checkpoint, dtype=torch.float32)
    for name, parameter in decoder.state_dict().items():
        assert torch.equal(parameter, torch.from_numpy(checkpoint.tensors[name].decode())), name
    assert set(decoder.state_dict()) == set(parameter_shapes(checkpoint.config))


def test_rows_decoded_in_many_blocks_equal_rows_decoded_at_once(smollm2_gguf: Path) -> None:
    checkpoint = open_checkpoint(smollm2_gguf)
    stored = checkpoint.tensors["embed_tokens.weight"]
    assert stored.elements > 4 * BLOCK_ELEMENTS
    decoder = load_decoder(checkpoint, dtype=torch.float32)
    assert torch.equal(decoder.embed_tokens.weight, torch.from_numpy(stored.decode()))


def test_an_untied_quantised_embedding_stays_in_the_file_and_changes_no_answer(tmp_path: Path) -> None:
    save_gguf(random_checkpoint(tiny_llama(tied=False), seed=5), tmp_path / "m.gguf", "Q8_0")
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    mapped = load_decoder(checkpoint, dtype=torch.float32)
    whole = load_decoder(checkpoint, dtype=torch.float32, writable=True)
    assert isinstance(mapped.embed_tokens, MappedEmbedding)
    assert not isinstance(whole.embed_tokens, MappedEmbedding)
    tokens = [5, 1, 96, 5]
    assert torch.equal(Oracle(mapped).prefill(tokens), Oracle(whole).prefill(tokens))
    assert mapped.embed(torch.empty(0, dtype=torch.long)).shape == (0, 64)
    saved = checkpoint.tensors["embed_tokens.weight"].elements * 4
    full = checkpoint.config.parameters * 4
    assert memory_bytes(checkpoint, torch.device("cpu"), torch.float32) == full - saved


def test_plain_weights_in_the_wanted_precision_are_the_file_itself(tmp_path: Path) -> None:
    save_gguf(random_checkpoint(tiny_llama4(expert_step=2), seed=1), tmp_path / "m.gguf", "F32")
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    name = "layers.1.feed_forward.experts.gate_proj"
    address = checkpoint.tensors[name].array.ctypes.data
    assert load_decoder(checkpoint).state_dict()[name].data_ptr() == address
    assert load_decoder(checkpoint, writable=True).state_dict()[name].data_ptr() != address


def test_a_model_larger_than_the_memory_is_refused_with_the_numbers() -> None:
    with pytest.raises(NoSpaceError, match=r"needs 4000\.0 GB"):
        require_memory(4_000_000_000_000, torch.device("cpu"))


def test_unknown_devices_and_precisions_are_refused() -> None:
    with pytest.raises(UsageError, match="cuda:99"):
        choose_device("cuda:99")
    with pytest.raises(UsageError, match="float99"):
        choose_dtype("float99", torch.device("cpu"))
