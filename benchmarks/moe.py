"""A mixture of experts of Llama 4's class beside transformers, as shipped and with its expert layer replaced.

252M random parameters in bfloat16 (hidden 512, 8 layers, 16 experts top-1 and a shared one, 32,000 tokens,
chunks of 2,048), written once to the cache. As shipped, transformers computes every expert for every token;
the patched form loops over the experts that were chosen. That patch is ours: it measures dispatch alone.
Run: python benchmarks/moe.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from contests import add_options, rule_of, run_and_write

SIZES = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "intermediate_size": 1024,
    "intermediate_size_mlp": 1024,
    "vocab_size": 32_000,
    "attention_chunk_size": 2048,
    "max_position_embeddings": 16_384,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def model_folder() -> Path:
    """The model's folder in the cache, written if it is not there."""
    import platformdirs

    folder = Path(platformdirs.user_cache_dir("ayllu")) / "benchmarks" / "llama4-class-moe"
    if not (folder / "tokenizer.json").exists():
        print(f"writing {folder}", file=sys.stderr)
        _write_model(folder)
    return folder


def _write_model(folder: Path) -> None:
    import torch
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    torch.manual_seed(0)
    model = Llama4ForCausalLM(Llama4TextConfig(**SIZES, dtype="bfloat16"))
    with torch.no_grad():
        for parameter in model.parameters():
            # transformers leaves expert stacks empty, as it expects them to be loaded.
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1)
    model.to(torch.bfloat16).save_pretrained(folder)
    _write_tokenizer(folder)


def _write_tokenizer(folder: Path) -> None:
    """All bytes, and names without meaning for the other ids: prompts here are ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<bos>", "<eos>", *alphabet]
    words += [f"w{number}" for number in range(SIZES["vocab_size"] - len(words))]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def loop_over_chosen(self: Any, hidden_states: Any) -> Any:
    """transformers' `Llama4TextMoe.forward`, computing only the experts that some token chose (top-1)."""
    import torch

    x_TD = hidden_states.reshape(-1, self.hidden_dim)
    scores, logits = self.router(x_TD)
    chosen_T = logits.argmax(-1)
    out = self.shared_expert(x_TD)
    experts = self.experts
    for expert in chosen_T.unique().tolist():
        rows = (chosen_T == expert).nonzero().squeeze(1)
        x = x_TD[rows] * scores[rows, expert, None].to(x_TD.dtype)
        gate, up = (x @ experts.gate_up_proj[expert]).chunk(2, dim=-1)
        out[rows] += (up * torch.nn.functional.silu(gate)) @ experts.down_proj[expert]
    return out, logits


def run_patched_peer() -> None:
    """transformers with the layer above, as a contender's process."""
    from transformers.models.llama4 import modeling_llama4

    from ayllu.cli.bench.runners import run_transformers

    modeling_llama4.Llama4TextMoe.forward = loop_over_chosen
    run_transformers.main()


def main() -> None:
    if sys.argv[1:] == ["patched-peer"]:
        run_patched_peer()
        return
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    options = parser.parse_args()

    from ayllu import __version__
    from ayllu.cli.bench.peers import Contender, find_peers, ourselves
    from ayllu.cli.bench.plan import BenchPlan

    folder = model_folder()
    plan = BenchPlan(
        threads=options.threads,
        prefill=(512,) if options.quick else (512, 8192),
        decode=32 if options.quick else 64,
        depths=(512,),
        rounds=options.rounds,
    )
    present, absent = find_peers(["transformers"], folder)
    command = (sys.executable, __file__, "patched-peer")
    patched = Contender("transformers, patched", present[0].version, command, precision="bfloat16")
    run_and_write("moe", folder, plan, [ourselves(__version__), *present, patched], absent, rule_of(options))


if __name__ == "__main__":
    main()
