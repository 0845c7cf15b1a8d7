"""Replayed decoding steps and the modules of a GPU engine give what the plain runner gives.

Without a GPU the recording is replaced by computing again (`ComputedAgain`); buffers, padding, sizes and the
steps themselves are those of a GPU. What a recording must never do, waiting for the device, is looked for in
the operations of a step.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ayllu.engine import cuda_graphs
from ayllu.engine.core import EngineCore
from ayllu.engine.cuda_graphs import (
    ComputedAgain,
    CudaGraphs,
    RecordedDecoding,
    recordable,
    recorded_decoding,
)
from ayllu.engine.gpu_weights import (
    PLANS,
    KernelExperts,
    KernelNorm,
    PackedLinear,
    load_for_gpu,
    packed_bytes,
    packing_plan,
    prepare,
)
from ayllu.engine.parameters import Sampling
from ayllu.engine.prepared import PreparedImage, PreparedRequest
from ayllu.engine.step_runner import RunnerPiece
from ayllu.errors import UsageError
from ayllu.kernels.reference.packed import unpack
from ayllu.kernels.registry import forced
from ayllu.model.decoder import Decoder, random_decoder
from ayllu.model.parameters import parameter_shapes
from ayllu.weights.checkpoint import open_checkpoint
from tests.engine.cores import run, small_core, tokens_of
from tests.kernels import DEVICE
from tests.model.tiny import tiny_llama, tiny_llama4, tiny_qwen2

CPU = torch.device("cpu")
CONFIGS = {
    "llama": tiny_llama(),
    "untied": tiny_llama(tied=False),
    "qwen2": tiny_qwen2(),
    "llama4": tiny_llama4(layers=4, top_k=2),
}


def core_of(decoder: Decoder, *, replays: bool = False, **sizes) -> EngineCore:
    core = small_core(decoder, **sizes)
    memory = core.runner.memory
    for keys, values in memory.layers:
        # Some tests look at tokens that were never computed: let them be the same ones every time.
        keys.fill_(0.5), values.fill_(0.5)
    record = CudaGraphs() if memory.device.type == "cuda" else ComputedAgain
    core.runner._decoding = RecordedDecoding(decoder, memory, record) if replays else None
    return core


def answers(core: EngineCore, lengths: list[int], new_tokens: int = 8) -> list[list[int]]:
    for number, length in enumerate(lengths):
        prompt = [(7 * number + place * place) % 90 for place in range(length)]
        core.submit(
            PreparedRequest(
                id=str(number),
                token_ids=prompt,
                max_new_tokens=new_tokens + number,
                sampling=Sampling(temperature=0),
            )
        )
    said = run(core)
    return [tokens_of(said, str(number)) for number in range(len(lengths))]


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=6)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_replayed_steps_give_the_tokens_of_the_plain_runner(name: str, lengths: list[int]) -> None:
    """Sequences of every age join and leave, and chunked layers (of 8) pass their borders on the way."""
    decoder = random_decoder(CONFIGS[name], 3, std=0.15)
    replaying = core_of(decoder, replays=True)
    assert answers(replaying, lengths) == answers(core_of(decoder), lengths)
    assert replaying.runner._decoding.sizes


@pytest.mark.parametrize("replays", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "llama4"])
def test_tritons_kernels_give_the_tokens_of_the_plain_runner(name: str, replays: bool) -> None:
    decoder = random_decoder(CONFIGS[name], 3, std=0.15)
    expected = answers(core_of(decoder), [9, 2], 2)
    prepared = prepare(copy.deepcopy(decoder), torch.device(DEVICE), None)
    with forced("triton"):
        assert answers(core_of(prepared, replays=replays), [9, 2], 2) == expected


@pytest.mark.parametrize("weights", PLANS)
@pytest.mark.parametrize("name", ["untied", "llama4"])
def test_packed_weights_give_the_tokens_of_the_decoder_they_stand_for(name: str, weights: str) -> None:
    decoder = random_decoder(CONFIGS[name], 5, std=0.15)
    prepared = prepare(copy.deepcopy(decoder), CPU, packing_plan(weights))
    stands_for = copy.deepcopy(decoder)
    for path, module in prepared.named_modules():
        plain = stands_for.get_submodule(path)
        if isinstance(module, PackedLinear):
            plain.weight.data = unpack(module.packed)
        elif isinstance(module, KernelExperts):
            for stack in ("gate", "up", "down"):
                part = getattr(module, stack)
                whole = part if isinstance(part, torch.Tensor) else unpack(part)
                getattr(plain, f"{stack}_proj").data = whole
    assert answers(core_of(prepared), [9, 4], 6) == answers(core_of(stands_for), [9, 4], 6)
    assert answers(core_of(prepared, replays=True), [9, 4], 6) == answers(core_of(stands_for), [9, 4], 6)


@pytest.mark.parametrize("weights", ["int4", "fp8"])
def test_packed_decoder_computes_with_triton_what_it_computes_plainly(weights: str) -> None:
    decoder = random_decoder(CONFIGS["llama4"], 5, std=0.15)
    expected = answers(core_of(prepare(copy.deepcopy(decoder), CPU, PLANS[weights])), [3], 2)
    prepared = prepare(decoder, torch.device(DEVICE), PLANS[weights])
    with forced("triton"):
        assert answers(core_of(prepared, replays=True), [3], 2) == expected


def test_what_is_packed_and_what_is_not() -> None:
    prepared = prepare(random_decoder(tiny_llama4(layers=4, vision=True), 1), CPU, PLANS["int4"])
    kinds = {path: type(module) for path, module in prepared.named_modules()}
    assert kinds["layers.0.attention.q_proj"] is PackedLinear
    assert kinds["layers.0.feed_forward.experts"] is KernelExperts
    assert kinds["layers.0.feed_forward.shared_expert.up_proj"] is PackedLinear
    assert kinds["norm"] is KernelNorm
    assert kinds["layers.0.feed_forward.router"] is not PackedLinear
    assert prepared.get_submodule("lm_head").packed.kind == "int8"
    assert not any(kind is PackedLinear for path, kind in kinds.items() if path.startswith("vision"))
    # 48 columns are not whole groups of 32: the experts' down projection stays as it is.
    experts = prepared.get_submodule("layers.0.feed_forward.experts")
    assert isinstance(experts.down, torch.Tensor) and experts.up.kind == "int4"


@pytest.mark.parametrize("weights", PLANS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_planned_bytes_are_the_bytes_that_are_held(name: str, weights: str) -> None:
    plan = PLANS[weights]
    decoder = random_decoder(CONFIGS[name], 1, dtype=torch.bfloat16)
    assert sum(p.numel() for p in decoder.parameters()) == sum(
        torch.Size(shape).numel() for shape in parameter_shapes(decoder.config).values()
    )
    prepared = prepare(decoder, CPU, plan)
    held = sum(p.nbytes for p in prepared.parameters())
    for module in prepared.modules():
        if isinstance(module, PackedLinear):
            held += module.packed.nbytes
        elif isinstance(module, KernelExperts):
            held += sum(stack.nbytes for stack in (module.gate, module.up, module.down))
    assert packed_bytes(decoder.config, plan, 2) == held


def test_unknown_weights_are_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean int4"):
        packing_plan("int-4")


def pieces_for(core: EngineCore, count: int, start: int = 5, **facts) -> list[RunnerPiece]:
    """Single tokens of `count` sequences with blocks of their own."""
    blocks = itertools.count()
    groups = len(core.runner.memory.groups)
    tables = [[[next(blocks) for _ in range(3)] for _ in range(groups)] for _ in range(count)]
    return [RunnerPiece([7 + row], start + row, table, **facts) for row, table in enumerate(tables)]


def test_padded_rows_change_nothing_and_write_nowhere_else() -> None:
    decoder = random_decoder(CONFIGS["llama4"], 2, std=0.15)
    plain, replaying = core_of(decoder), core_of(decoder, replays=True)
    pieces = pieces_for(plain, 3)
    expected, found = plain.runner.forward(pieces), replaying.runner.forward(pieces)
    assert replaying.runner._decoding.sizes == ((4, 64, 64),)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-4)
    for one, other in zip(plain.runner.memory.layers, replaying.runner.memory.layers, strict=True):
        for kind in range(2):
            torch.testing.assert_close(other[kind], one[kind], atol=1e-5, rtol=1e-4)


def test_results_stay_when_the_next_step_is_replayed() -> None:
    decoder = random_decoder(CONFIGS["llama"], 2, std=0.15)
    core = core_of(decoder, replays=True)
    first = core.runner.forward(pieces_for(core, 2))
    kept = [hidden.clone() for hidden in first]
    core.runner.forward(pieces_for(core, 2, start=8))
    assert all(torch.equal(hidden, before) for hidden, before in zip(first, kept, strict=True))


def test_a_size_is_recorded_once_and_the_longest_unused_goes(monkeypatch) -> None:
    made: list[int] = []

    def record(compute):
        made.append(1)
        return ComputedAgain(compute)

    decoder = random_decoder(CONFIGS["llama"], 2)
    core = core_of(decoder)
    decoding = RecordedDecoding(decoder, core.runner.memory, record)
    monkeypatch.setattr(cuda_graphs, "MOST_RECORDINGS", 2)
    for count in (1, 2, 1, 3, 4):
        decoding.forward(pieces_for(core, count))
    assert len(made) == 3
    assert decoding.sizes == ((1, 64), (4, 64))
    decoding.forward(pieces_for(core, 2))
    assert len(made) == 4 and decoding.sizes == ((4, 64), (2, 64))


def lacks_memory(compute):
    raise torch.OutOfMemoryError("no memory for a graph")


def lacks_memory_and_cannot_end(compute):
    try:
        lacks_memory(compute)
    finally:
        raise RuntimeError("the recording was invalidated")


@pytest.mark.parametrize("failing", [lacks_memory, lacks_memory_and_cannot_end])
def test_a_size_without_memory_is_computed_and_not_tried_again(failing) -> None:
    tried: list[int] = []

    def record(compute):
        tried.append(1)
        return failing(compute)

    decoder = random_decoder(CONFIGS["llama"], 2, std=0.15)
    core = core_of(decoder)
    expected = core.runner.forward(pieces_for(core, 3))
    core.runner._decoding = RecordedDecoding(decoder, core.runner.memory, record)
    for _ in range(2):
        found = core.runner.forward(pieces_for(core, 3))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert len(tried) == 1


def test_another_fault_of_a_recording_is_not_hidden() -> None:
    def record(compute):
        raise RuntimeError("a fault")

    decoder = random_decoder(CONFIGS["llama"], 2)
    core = core_of(decoder)
    with pytest.raises(RuntimeError, match="a fault"):
        RecordedDecoding(decoder, core.runner.memory, record).forward(pieces_for(core, 1))


def test_prompts_adapters_and_parts_of_images_are_not_replayed() -> None:
    decoder = random_decoder(tiny_llama4(layers=4, vision=True), 2)
    core = core_of(decoder)
    decoding = RecordedDecoding(decoder, core.runner.memory, ComputedAgain)
    (piece,) = pieces_for(core, 1)
    image = PreparedImage(pixels=torch.zeros(1, 3, 56, 56).numpy(), digest="0" * 64)
    assert decoding.takes([piece])
    assert not decoding.takes([])
    assert not decoding.takes([RunnerPiece([1, 2], 5, piece.tables)])
    assert not decoding.takes(pieces_for(core, 1, adapter="a"))
    # A prompt with an image is decoded like any other; only the image's own rows have to be put in.
    assert decoding.takes(pieces_for(core, 1, images=(image,)))
    assert not decoding.takes([RunnerPiece([90], 5, piece.tables, images=(image,))])
    assert not decoding.takes([piece] * (cuda_graphs.MOST_ROWS + 1))


def test_nothing_is_recorded_on_a_cpu() -> None:
    decoder = random_decoder(CONFIGS["llama"], 2)
    assert recorded_decoding(decoder, core_of(decoder).runner.memory) is None


def test_decoders_that_wait_for_the_device_are_not_recorded() -> None:
    assert recordable(random_decoder(CONFIGS["llama"], 2))
    experts = random_decoder(CONFIGS["llama4"], 2)
    assert not recordable(experts)
    assert recordable(prepare(experts, CPU, None))
    in_its_file = random_decoder(CONFIGS["untied"], 2)
    in_its_file.embed_tokens = torch.nn.Module()
    assert not recordable(in_its_file)


def test_a_gpu_engine_without_a_gpu_is_refused(smollm2_gguf: Path) -> None:
    checkpoint = open_checkpoint(smollm2_gguf)
    for weights in (None, "int4"):
        with pytest.raises(UsageError, match="CUDA device"):
            load_for_gpu(checkpoint, device=CPU, dtype=torch.bfloat16, weights=weights)
    with pytest.raises(UsageError, match="Did you mean int8"):
        load_for_gpu(checkpoint, device=CPU, dtype=torch.bfloat16, weights="int-8")


class _Watched(TorchDispatchMode):
    """Notes the operations of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.overloadpacket._qualified_op_name)
        return function(*args, **(kwargs or {}))


WAITS = {
    "aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::bincount", "aten::masked_select",
    "aten::equal", "aten::lift_fresh", "aten::unique_consecutive", "aten::is_nonzero",
}  # fmt: skip
"""Operations that bring numbers from or to the host, or whose shape depends on them: none may be recorded."""


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the recording itself shows it")
@pytest.mark.parametrize("weights", [None, *PLANS])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_recorded_step_never_waits_for_the_device(name: str, weights: str | None, monkeypatch) -> None:
    """Triton's launches are left out: they are what a graph records; everything around them is looked at."""
    from ayllu.kernels.triton import grouped_experts, heads, linear, paged_attention, rms_norm
    from tests.kernels.compiled_kernels import Recorder

    launches: list[tuple] = []
    for module in (paged_attention, linear, grouped_experts, rms_norm, heads):
        for kernel in [kernel for kernel in vars(module) if kernel.endswith("_kernel")]:
            monkeypatch.setattr(module, kernel, Recorder(getattr(module, kernel), launches))
    decoder = random_decoder(CONFIGS[name], 2)
    prepared = prepare(decoder, CPU, None if weights is None else PLANS[weights])
    core = core_of(prepared)
    watched = _Watched()

    def record(compute):
        with watched:
            compute()
        return ComputedAgain(compute)

    with forced("triton"):
        RecordedDecoding(prepared, core.runner.memory, record).forward(pieces_for(core, 3))
    assert launches and "aten::embedding" in watched.seen
    assert not watched.seen & WAITS
