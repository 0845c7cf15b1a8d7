"""Every parameter of a network by name and shape, from its config alone. Needs no torch.

Readers check files against this list before anything is allocated; a test holds it to the modules.
"""

from __future__ import annotations

from ayllu.model.config import ExpertsConfig, LayerSpec, ModelConfig, VisionConfig

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(config: ModelConfig) -> Shapes:
    """Name -> shape of each parameter, in the order of the forward pass.

    Matrices are [outputs, inputs]; expert stacks are [experts, outputs, inputs].
    """
    shapes: Shapes = {}
    if config.vision is not None:
        shapes |= _vision(config.vision, config.hidden_size)
    shapes["embed_tokens.weight"] = (config.vocab_size, config.hidden_size)
    for index, layer in enumerate(config.layers):
        for name, shape in _layer(config, layer).items():
            shapes[f"layers.{index}.{name}"] = shape
    shapes["norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def _layer(config: ModelConfig, layer: LayerSpec) -> Shapes:
    width = config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    shapes: Shapes = {"attention_norm.weight": (width,)}
    for name, outputs in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        shapes[f"attention.{name}.weight"] = (outputs, width)
        if config.qkv_bias:
            shapes[f"attention.{name}.bias"] = (outputs,)
    shapes["attention.o_proj.weight"] = (width, queries)
    shapes["feed_forward_norm.weight"] = (width,)
    if layer.experts and config.experts is not None:
        shapes |= _experts(config.experts, width)
    else:
        shapes |= _swiglu("feed_forward", width, config.intermediate_size)
    return shapes


def _swiglu(prefix: str, width: int, hidden: int) -> Shapes:
    return {
        f"{prefix}.gate_proj.weight": (hidden, width),
        f"{prefix}.up_proj.weight": (hidden, width),
        f"{prefix}.down_proj.weight": (width, hidden),
    }


def _experts(experts: ExpertsConfig, width: int) -> Shapes:
    count, hidden = experts.num_experts, experts.intermediate_size
    return {
        "feed_forward.router.weight": (count, width),
        "feed_forward.experts.gate_proj": (count, hidden, width),
        "feed_forward.experts.up_proj": (count, hidden, width),
        "feed_forward.experts.down_proj": (count, width, hidden),
        **_swiglu("feed_forward.shared_expert", width, experts.shared_intermediate_size),
    }


def _vision(vision: VisionConfig, decoder_width: int) -> Shapes:
    width, hidden = vision.hidden_size, vision.intermediate_size
    shapes: Shapes = {
        "vision.tower.patch_embedding.weight": (width, vision.num_channels * vision.patch_size**2),
        "vision.tower.class_embedding": (width,),
        "vision.tower.position_embedding": (vision.grid**2 + 1, width),
    }
    shapes |= _affine("vision.tower.norm_before", (width,))
    for index in range(vision.num_hidden_layers):
        block = f"vision.tower.blocks.{index}"
        shapes |= _affine(f"{block}.attention_norm", (width,))
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes |= _affine(f"{block}.attention.{name}", (width, width))
        shapes |= _affine(f"{block}.mlp_norm", (width,))
        shapes |= _affine(f"{block}.mlp.fc1", (hidden, width))
        shapes |= _affine(f"{block}.mlp.fc2", (width, hidden))
    shapes |= _affine("vision.tower.norm_after", (width,))
    shapes["vision.adapter.fc1.weight"] = (vision.adapter_hidden_size, width * vision.shuffle**2)
    shapes["vision.adapter.fc2.weight"] = (vision.adapter_output_size, vision.adapter_hidden_size)
    shapes["vision.projector.weight"] = (decoder_width, vision.adapter_output_size)
    return shapes


def _affine(name: str, weight: tuple[int, ...]) -> Shapes:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}
