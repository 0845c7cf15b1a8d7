"""The two feed-forwards: a SwiGLU, and a mixture of many of them with one shared.

Llama 4's router is unlike most: each score is an independent sigmoid, and it scales the expert's *input*.
As SwiGLU is not linear, scaling the output instead would be another model (spec 5).

Legend: T tokens, D width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ayllu.model.config import ExpertsConfig
from ayllu.model.layers import Linear


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """(silu(x gate') * x up') down', matrices as [outputs, inputs]."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


class SwiGLU(nn.Module):
    """The dense feed-forward."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, hidden, bias=False)
        self.up_proj = Linear(width, hidden, bias=False)
        self.down_proj = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # Through the modules, not their weights: hooks (adapters) and replaced layers must have their say.
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """A stack of SwiGLUs, of which each token visits a few."""

    def __init__(self, config: ExpertsConfig, width: int) -> None:
        super().__init__()
        count, hidden = config.num_experts, config.intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(count, hidden, width))
        self.up_proj = nn.Parameter(torch.empty(count, hidden, width))
        self.down_proj = nn.Parameter(torch.empty(count, width, hidden))

    def one(self, expert: int, x: Tensor) -> Tensor:
        return swiglu(x, self.gate_proj[expert], self.up_proj[expert], self.down_proj[expert])

    def looped(self, x_TD: Tensor, scores_TK: Tensor, chosen_TK: Tensor) -> Tensor:
        """The reference: token by token, expert by expert, exactly as the formula reads."""
        out_TD = torch.zeros_like(x_TD)
        for token in range(x_TD.shape[0]):
            for score, expert in zip(scores_TK[token], chosen_TK[token].tolist(), strict=True):
                out_TD[token] += self.one(expert, score * x_TD[token])
        return out_TD

    def grouped(self, x_TD: Tensor, scores_TK: Tensor, chosen_TK: Tensor) -> Tensor:
        """The same sum with the tokens sorted by expert: one product per expert that was chosen at all."""
        top_k = chosen_TK.shape[1]
        order = chosen_TK.flatten().argsort(stable=True)
        token_of = order // top_k
        scaled = x_TD[token_of] * scores_TK.flatten()[order].unsqueeze(-1)
        counts = torch.bincount(chosen_TK.flatten(), minlength=self.gate_proj.shape[0]).tolist()
        results = [
            self.one(expert, part) for expert, part in enumerate(scaled.split(counts)) if part.shape[0] > 0
        ]
        return torch.zeros_like(x_TD).index_add(0, token_of, torch.cat(results))


class MixtureFeedForward(nn.Module):
    """Routed experts plus one shared expert that every token visits unscaled."""

    def __init__(self, config: ExpertsConfig, width: int) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.router = Linear(width, config.num_experts, bias=False)
        self.experts = Experts(config, width)
        self.shared_expert = SwiGLU(width, config.shared_intermediate_size)

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and expert numbers of the chosen experts, each [T, K]."""
        logits_TK, chosen_TK = self.router(x_TD).topk(self.top_k, dim=-1)
        return torch.sigmoid(logits_TK.float()).to(x_TD.dtype), chosen_TK

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.flatten(0, -2)
        if x_TD.shape[0] == 0:
            return x
        routed_TD = self.experts.grouped(x_TD, *self.route(x_TD))
        return self.shared_expert(x) + routed_TD.view_as(x)
