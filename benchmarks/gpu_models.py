"""What `gpu.py` measures: networks of noise in real shapes, and a driver that asks a runner for steps."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ayllu.engine.gpu_weights import PackingPlan
    from ayllu.engine.runner import Runner
    from ayllu.kernels.reference.packed import Kind, PackedMatrix
    from ayllu.model.config import ModelConfig
    from ayllu.model.decoder import Decoder

BLOCK_TOKENS = 16
PIECE_TOKENS = 2048


class Driver:
    """Sequences over one runner, each with blocks of its own: what a scheduler would ask for, without one."""

    def __init__(self, decoder: Decoder, *, slots: int, context: int) -> None:
        from ayllu.engine.adapters import AdapterSet
        from ayllu.engine.layer_groups import fitting_block_tokens, layer_groups
        from ayllu.engine.paged_memory import PagedMemory
        from ayllu.engine.runner import Runner

        groups = layer_groups(decoder.config)
        size = fitting_block_tokens(groups, BLOCK_TOKENS)
        each = [-(-group.held_tokens(context) // size) for group in groups]
        weight = decoder.norm.weight
        memory = PagedMemory(
            decoder.config, groups, [count * slots for count in each], size,
            dtype=weight.dtype, device=weight.device,
        )  # fmt: skip
        self.runner: Runner = Runner(decoder, memory, AdapterSet(decoder), image_cache_bytes=0)
        self.tables = [[list(range(slot * n, (slot + 1) * n)) for n in each] for slot in range(slots)]
        self.lengths = [0] * slots
        self.piece = min([PIECE_TOKENS, *(group.chunk for group in groups if group.chunk is not None)])

    def prefill(self, slot: int, tokens: list[int]) -> int:
        """Read a prompt from the beginning; the likeliest next token."""
        from ayllu.engine.step_runner import RunnerPiece

        for start in range(0, len(tokens), self.piece):
            part = tokens[start : start + self.piece]
            (hidden,) = self.runner.forward([RunnerPiece(part, start, self._held(slot, start + len(part)))])
        self.lengths[slot] = len(tokens)
        return int(self.runner.logits([(hidden, len(part) - 1)])[0].argmax())

    def step(self, tokens: list[int]) -> list[int]:
        """One more token of every sequence; the likeliest next ones."""
        from ayllu.engine.step_runner import RunnerPiece

        pieces = [
            RunnerPiece([token], self.lengths[slot], self._held(slot, self.lengths[slot] + 1))
            for slot, token in enumerate(tokens)
        ]
        hidden = self.runner.forward(pieces)
        self.lengths = [length + 1 for length in self.lengths]
        logits = self.runner.logits([(rows, 0) for rows in hidden])
        return [int(token) for token in logits.argmax(-1)]

    def _held(self, slot: int, stop: int) -> list[list[int]]:
        """The blocks in use when `stop` tokens are there: of a chunked group, those of the last one's
        chunk."""
        memory = self.runner.memory
        return [
            table[: ((stop - 1) % (group.chunk or stop)) // memory.block_tokens + 1]
            for table, group in zip(self.tables[slot], memory.groups, strict=True)
        ]


def unpacked(config: ModelConfig, decoder: Decoder) -> Decoder:
    """The plain decoder, on the CPU, that a prepared one stands for."""
    import torch

    from ayllu.engine.gpu_weights import KernelExperts, PackedLinear
    from ayllu.kernels.reference.packed import PackedMatrix, unpack
    from ayllu.model.decoder import Decoder

    def plain(stack: torch.Tensor | PackedMatrix) -> torch.Tensor:
        return (unpack(stack) if isinstance(stack, PackedMatrix) else stack).cpu()

    with torch.device("meta"):
        copy = Decoder(config)
    state = {name: tensor.cpu() for name, tensor in decoder.state_dict().items()}
    for path, module in decoder.named_modules():
        if isinstance(module, PackedLinear):
            state[f"{path}.weight"] = plain(module.packed)
        elif isinstance(module, KernelExperts):
            for part in ("gate", "up", "down"):
                state[f"{path}.{part}_proj"] = plain(getattr(module, part))
    copy.load_state_dict(state, assign=True)
    return copy.eval().requires_grad_(False)


def random_gpu_decoder(config: ModelConfig, plan: PackingPlan | None, device: torch.device) -> Decoder:
    """A network of that shape filled with noise where it will live: nothing is ever there unpacked."""
    import torch
    from torch import nn

    from ayllu.engine.gpu_weights import (
        KernelExperts,
        KernelNorm,
        PackedLinear,
        exchange_modules,
        with_fused_steps,
    )
    from ayllu.model.attention import RMSNorm
    from ayllu.model.decoder import Decoder
    from ayllu.model.feed_forward import Experts
    from ayllu.model.layers import Linear

    generator = torch.Generator(device).manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator)

    def matrix(shape: tuple[int, ...], kind: Kind | None) -> Any:
        return noise(*shape) if kind is None else random_packed(shape, kind, plan, generator)

    def exchanged(name: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, RMSNorm):
            module.weight = nn.Parameter(noise(*module.weight.shape) + 1, requires_grad=False)
            return KernelNorm(module)
        if isinstance(module, Experts):
            stacks = (module.gate_proj, module.up_proj, module.down_proj)
            return KernelExperts(*(matrix(stack.shape, plan and plan.layers) for stack in stacks))
        if isinstance(module, Linear) and plan is not None and name != "router":
            return PackedLinear(
                matrix(module.weight.shape, plan.head if name == "lm_head" else plan.layers), None
            )
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight = nn.Parameter(noise(*module.weight.shape), requires_grad=False)
        return None

    with torch.device("meta"):
        decoder = Decoder(replace(config, vision=None))
    exchange_modules(decoder, exchanged)
    exchange_modules(decoder, with_fused_steps)
    return decoder.eval().requires_grad_(False)


def random_packed(
    shape: tuple[int, ...], kind: Kind, plan: PackingPlan | None, generator: torch.Generator
) -> PackedMatrix:
    """Noise in packed form, about as large as trained weights."""
    import torch

    from ayllu.kernels.reference.packed import PackedMatrix

    *leading, columns = shape
    bits4 = kind == "int4"
    group = (plan.group if plan is not None and bits4 else None) or columns
    values = torch.empty(
        *leading, columns // 2 if bits4 else columns, dtype=torch.uint8, device=generator.device
    )
    # Below 0x78: a byte of that kind is a number in every format, and e4m3 has no NaN there.
    values.random_(0, 256 if bits4 else 0x78, generator=generator)
    scale_type = torch.bfloat16 if bits4 else torch.float32
    step = {"int4": 4e-3, "int8": 4e-4, "fp8": 1e-3}[kind]
    scale = torch.full((*leading, columns // group), step, dtype=scale_type, device=generator.device)
    minimum = scale * -7.5 if bits4 and plan is not None and plan.with_minimum else None
    return PackedMatrix(kind, values.view(torch.int8) if kind == "int8" else values, scale, minimum, group)


def bytes_per_token(decoder: Decoder) -> int:
    """Bytes of weights that one decoding step of one sequence reads."""
    from ayllu.engine.gpu_weights import KernelExperts, PackedLinear

    config = decoder.config
    total = sum(parameter.nbytes for parameter in decoder.parameters())
    if not config.tie_word_embeddings:
        total -= decoder.embed_tokens.weight.nbytes
    for module in decoder.modules():
        if isinstance(module, PackedLinear):
            total += module.packed.nbytes
        elif isinstance(module, KernelExperts):
            stacks = sum(stack.nbytes for stack in (module.gate, module.up, module.down))
            total += stacks * config.experts.top_k // config.experts.num_experts
    return total


def dense_config() -> ModelConfig:
    """The shape of Llama 3.1 8B."""
    from ayllu.model.config import LayerSpec, ModelConfig, RopeConfig

    return ModelConfig(
        architecture="llama", vocab_size=128_256, hidden_size=4096, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, intermediate_size=14_336, layers=(LayerSpec(),) * 32,
        max_position_embeddings=131_072, rope=RopeConfig(theta=500_000.0),
    )  # fmt: skip


def transformers_model(config: ModelConfig, device: torch.device) -> Any:
    """transformers' model of the same shape, bfloat16, random."""
    import torch
    import transformers

    shared = dict(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, head_dim=config.head_dim,
        num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads, max_position_embeddings=131_072,
    )  # fmt: skip
    if config.experts is None:
        kind = transformers.LlamaForCausalLM
        settings = transformers.LlamaConfig(intermediate_size=config.intermediate_size, **shared)
    else:
        kind = transformers.Llama4ForCausalLM
        settings = transformers.Llama4TextConfig(
            intermediate_size=config.experts.intermediate_size,
            intermediate_size_mlp=config.intermediate_size,
            num_local_experts=config.experts.num_experts, num_experts_per_tok=config.experts.top_k, **shared,
        )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return kind(settings).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
