"""The one table of parameter names: ours, Hugging Face's and GGUF's, side by side.

`{i}` stands for a layer. What a format stores in another shape (fused experts, shards) is the business
of that format's module; what a tensor is called is only written here.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Architecture = Literal["llama", "qwen2", "llama4"]


class _Row(NamedTuple):
    ours: str
    hugging_face: str
    gguf: str


_DECODER = (
    _Row("embed_tokens.weight", "model.embed_tokens.weight", "token_embd.weight"),
    _Row(
        "layers.{i}.attention_norm.weight",
        "model.layers.{i}.input_layernorm.weight",
        "blk.{i}.attn_norm.weight",
    ),
    _Row(
        "layers.{i}.attention.q_proj.weight",
        "model.layers.{i}.self_attn.q_proj.weight",
        "blk.{i}.attn_q.weight",
    ),
    _Row("layers.{i}.attention.q_proj.bias", "model.layers.{i}.self_attn.q_proj.bias", "blk.{i}.attn_q.bias"),
    _Row(
        "layers.{i}.attention.k_proj.weight",
        "model.layers.{i}.self_attn.k_proj.weight",
        "blk.{i}.attn_k.weight",
    ),
    _Row("layers.{i}.attention.k_proj.bias", "model.layers.{i}.self_attn.k_proj.bias", "blk.{i}.attn_k.bias"),
    _Row(
        "layers.{i}.attention.v_proj.weight",
        "model.layers.{i}.self_attn.v_proj.weight",
        "blk.{i}.attn_v.weight",
    ),
    _Row("layers.{i}.attention.v_proj.bias", "model.layers.{i}.self_attn.v_proj.bias", "blk.{i}.attn_v.bias"),
    _Row(
        "layers.{i}.attention.o_proj.weight",
        "model.layers.{i}.self_attn.o_proj.weight",
        "blk.{i}.attn_output.weight",
    ),
    _Row(
        "layers.{i}.feed_forward_norm.weight",
        "model.layers.{i}.post_attention_layernorm.weight",
        "blk.{i}.ffn_norm.weight",
    ),
    _Row(
        "layers.{i}.feed_forward.gate_proj.weight",
        "model.layers.{i}.{ffn}.gate_proj.weight",
        "blk.{i}.ffn_gate.weight",
    ),
    _Row(
        "layers.{i}.feed_forward.up_proj.weight",
        "model.layers.{i}.{ffn}.up_proj.weight",
        "blk.{i}.ffn_up.weight",
    ),
    _Row(
        "layers.{i}.feed_forward.down_proj.weight",
        "model.layers.{i}.{ffn}.down_proj.weight",
        "blk.{i}.ffn_down.weight",
    ),
    _Row(
        "layers.{i}.feed_forward.router.weight",
        "model.layers.{i}.{ffn}.router.weight",
        "blk.{i}.ffn_gate_inp.weight",
    ),
    _Row(
        "layers.{i}.feed_forward.shared_expert.gate_proj.weight",
        "model.layers.{i}.{ffn}.shared_expert.gate_proj.weight",
        "blk.{i}.ffn_gate_shexp.weight",
    ),
    _Row(
        "layers.{i}.feed_forward.shared_expert.up_proj.weight",
        "model.layers.{i}.{ffn}.shared_expert.up_proj.weight",
        "blk.{i}.ffn_up_shexp.weight",
    ),
    _Row(
        "layers.{i}.feed_forward.shared_expert.down_proj.weight",
        "model.layers.{i}.{ffn}.shared_expert.down_proj.weight",
        "blk.{i}.ffn_down_shexp.weight",
    ),
    # Hugging Face fuses or unfuses the expert stacks, so its column is never a name in a file here.
    _Row(
        "layers.{i}.feed_forward.experts.gate_proj",
        "model.layers.{i}.{ffn}.experts.gate_proj",
        "blk.{i}.ffn_gate_exps.weight",
    ),
    _Row(
        "layers.{i}.feed_forward.experts.up_proj",
        "model.layers.{i}.{ffn}.experts.up_proj",
        "blk.{i}.ffn_up_exps.weight",
    ),
    _Row(
        "layers.{i}.feed_forward.experts.down_proj",
        "model.layers.{i}.{ffn}.experts.down_proj",
        "blk.{i}.ffn_down_exps.weight",
    ),
    _Row("norm.weight", "model.norm.weight", "output_norm.weight"),
    _Row("lm_head.weight", "lm_head.weight", "output.weight"),
)

_VISION = {
    "vision.tower.patch_embedding.weight": "vision_model.patch_embedding.linear.weight",
    "vision.tower.class_embedding": "vision_model.class_embedding",
    "vision.tower.position_embedding": "vision_model.positional_embedding_vlm",
    "vision.tower.norm_before.{p}": "vision_model.layernorm_pre.{p}",
    "vision.tower.norm_after.{p}": "vision_model.layernorm_post.{p}",
    "vision.tower.blocks.{i}.attention_norm.{p}": "vision_model.model.layers.{i}.input_layernorm.{p}",
    "vision.tower.blocks.{i}.attention.{m}.{p}": "vision_model.model.layers.{i}.self_attn.{m}.{p}",
    "vision.tower.blocks.{i}.mlp_norm.{p}": "vision_model.model.layers.{i}.post_attention_layernorm.{p}",
    "vision.tower.blocks.{i}.mlp.{m}.{p}": "vision_model.model.layers.{i}.mlp.{m}.{p}",
    "vision.adapter.fc1.weight": "vision_model.vision_adapter.mlp.fc1.weight",
    "vision.adapter.fc2.weight": "vision_model.vision_adapter.mlp.fc2.weight",
    "vision.projector.weight": "multi_modal_projector.linear_1.weight",
}

# Meta's own checkpoints. Several of ours may share one entry there: rows of q, k and v lie under each other
# in wqkv, gate and up in fc1 (spec 9.1).
_META = {
    "embed_tokens.weight": "tok_embeddings.weight",
    "norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
    "layers.{i}.attention.o_proj.weight": "layers.{i}.attention.wo.weight",
}
_META_LLAMA = {
    "layers.{i}.attention_norm.weight": "layers.{i}.attention_norm.weight",
    "layers.{i}.attention.q_proj.weight": "layers.{i}.attention.wq.weight",
    "layers.{i}.attention.k_proj.weight": "layers.{i}.attention.wk.weight",
    "layers.{i}.attention.v_proj.weight": "layers.{i}.attention.wv.weight",
    "layers.{i}.feed_forward_norm.weight": "layers.{i}.ffn_norm.weight",
    "layers.{i}.feed_forward.gate_proj.weight": "layers.{i}.feed_forward.w1.weight",
    "layers.{i}.feed_forward.up_proj.weight": "layers.{i}.feed_forward.w3.weight",
    "layers.{i}.feed_forward.down_proj.weight": "layers.{i}.feed_forward.w2.weight",
}
_META_LLAMA4 = {
    "layers.{i}.attention_norm.weight": "layers.{i}.attention.wqkv.layer_norm_weight",
    "layers.{i}.attention.q_proj.weight": "layers.{i}.attention.wqkv.weight",
    "layers.{i}.attention.k_proj.weight": "layers.{i}.attention.wqkv.weight",
    "layers.{i}.attention.v_proj.weight": "layers.{i}.attention.wqkv.weight",
    "layers.{i}.feed_forward_norm.weight": "layers.{i}.feed_forward.norm.weight",
    "layers.{i}.feed_forward.gate_proj.weight": "layers.{i}.feed_forward.mlp.fc1_weight",
    "layers.{i}.feed_forward.up_proj.weight": "layers.{i}.feed_forward.mlp.fc1_weight",
    "layers.{i}.feed_forward.down_proj.weight": "layers.{i}.feed_forward.mlp.fc2_weight",
    "layers.{i}.feed_forward.router.weight": "layers.{i}.feed_forward.router_DE",
    "layers.{i}.feed_forward.experts.gate_proj": "layers.{i}.feed_forward.experts.moe_w_in_eD_F",
    "layers.{i}.feed_forward.experts.up_proj": "layers.{i}.feed_forward.experts.moe_w_swiglu_eD_F",
    "layers.{i}.feed_forward.experts.down_proj": "layers.{i}.feed_forward.experts.moe_w_out_eF_D",
    "layers.{i}.feed_forward.shared_expert.gate_proj.{p}": "layers.{i}.feed_forward.w_in_shared_FD.{p}",
    "layers.{i}.feed_forward.shared_expert.up_proj.{p}": "layers.{i}.feed_forward.w_swiglu_FD.{p}",
    "layers.{i}.feed_forward.shared_expert.down_proj.{p}": "layers.{i}.feed_forward.w_out_shared_DF.{p}",
}
_META_DENSE_NORM = {
    "layers.{i}.feed_forward_norm.weight": "layers.{i}.feed_forward.mlp.layer_norm_weight",
}
_META_VISION = {
    "vision.tower.patch_embedding.weight": "vision_encoder.conv1._linear.weight",
    "vision.tower.class_embedding": "vision_encoder.class_embedding",
    "vision.tower.position_embedding": "vision_encoder.positional_embedding_vlm",
    "vision.tower.norm_before.{p}": "vision_encoder.ln_pre.{p}",
    "vision.tower.norm_after.{p}": "vision_encoder.ln_post.{p}",
    "vision.tower.blocks.{i}.attention_norm.{p}": "vision_encoder.transformer.resblocks.{i}.ln_1.{p}",
    "vision.tower.blocks.{i}.attention.q_proj.{p}": "vision_encoder.transformer.resblocks.{i}.attn.wq.{p}",
    "vision.tower.blocks.{i}.attention.k_proj.{p}": "vision_encoder.transformer.resblocks.{i}.attn.wk.{p}",
    "vision.tower.blocks.{i}.attention.v_proj.{p}": "vision_encoder.transformer.resblocks.{i}.attn.wv.{p}",
    "vision.tower.blocks.{i}.attention.o_proj.{p}": "vision_encoder.transformer.resblocks.{i}.attn.wo.{p}",
    "vision.tower.blocks.{i}.mlp_norm.{p}": "vision_encoder.transformer.resblocks.{i}.ln_2.{p}",
    "vision.tower.blocks.{i}.mlp.fc1.{p}": "vision_encoder.transformer.resblocks.{i}.mlp.c_fc.{p}",
    "vision.tower.blocks.{i}.mlp.fc2.{p}": "vision_encoder.transformer.resblocks.{i}.mlp.c_proj.{p}",
    "vision.adapter.fc1.weight": "vision_adapter.mlp.c_fc.weight",
    "vision.adapter.fc2.weight": "vision_adapter.mlp.c_proj.weight",
}

_SLOT = re.compile(r"\{(\w)\}")
_SLOT_CONTENT = {"i": r"(?P<i>\d+)", "p": r"(?P<p>weight|bias)", "m": r"(?P<m>\w+)"}


def _matcher(pattern: str) -> re.Pattern[str]:
    pieces = _SLOT.split(pattern)
    return re.compile(
        "".join(_SLOT_CONTENT[piece] if at % 2 else re.escape(piece) for at, piece in enumerate(pieces))
        + r"\Z"
    )


class NameMap:
    """Renames between our parameter names and one other format's, both ways."""

    def __init__(self, pairs: list[tuple[str, str]]) -> None:
        self._to = [(_matcher(ours), theirs) for ours, theirs in pairs]
        self._back = [(_matcher(theirs), ours) for ours, theirs in pairs]

    @staticmethod
    def _rename(rules: list[tuple[re.Pattern[str], str]], name: str) -> str | None:
        for matcher, target in rules:
            if found := matcher.match(name):
                return target.format(**found.groupdict())
        return None

    def theirs(self, name: str) -> str | None:
        """Their name of our parameter, or None if the format has none."""
        return self._rename(self._to, name)

    def ours(self, name: str) -> str | None:
        """Our name of their tensor, or None for one that is not ours to load."""
        return self._rename(self._back, name)


def gguf_names() -> NameMap:
    """Ours <-> GGUF (llama.cpp's names)."""
    return NameMap([(row.ours, row.gguf) for row in _DECODER])


def hugging_face_names(architecture: Architecture, *, multimodal: bool) -> NameMap:
    """Ours <-> Hugging Face. Multimodal Llama 4 puts the decoder under `language_model.`."""
    ffn = "feed_forward" if architecture == "llama4" else "mlp"
    prefix = "language_model." if multimodal else ""
    pairs = [(row.ours, prefix + row.hugging_face.replace("{ffn}", ffn)) for row in _DECODER]
    return NameMap(pairs + (list(_VISION.items()) if multimodal else []))


def meta_names(*, llama4: bool, dense_layer: bool = False) -> NameMap:
    """Ours -> Meta's consolidated checkpoints. Llama 4 names the norm of a dense layer otherwise than that of
    a mixture; several of our names may lead to one of theirs, so only this direction is meaningful there."""
    pairs = list(_META.items())
    if not llama4:
        return NameMap(pairs + list(_META_LLAMA.items()))
    layers = _META_LLAMA4 | _META_DENSE_NORM if dense_layer else _META_LLAMA4
    vision = [(ours, f"vision_embeddings.{theirs}") for ours, theirs in _META_VISION.items()]
    projector = ("vision.projector.weight", "vision_projection.weight")
    return NameMap([*pairs, *layers.items(), *vision, projector])
