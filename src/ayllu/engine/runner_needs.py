"""What a runner takes of memory for a model: each says it itself, and the memory plan only adds up.

Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from ayllu.engine.working_memory import working_bytes
from ayllu.model.config import ModelConfig


class RunnerNeeds(Protocol):
    """What computing one model takes beside its weights. In whole bytes."""

    def block_bytes(self, block_tokens: int) -> int:
        """Of one cache block of so many tokens, in one layer."""

    def working_bytes(self, *, context: int, slots: int, step_tokens: int, block_tokens: int) -> int:
        """An upper bound of one step's memory."""

    def in_bfloat16(self) -> RunnerNeeds | None:
        """The same with numbers of two bytes, where that can be asked for and takes less."""


@dataclass(frozen=True)
class ModelNeeds:
    """One model with the runner that will compute it. disk_bytes: of experts that stay on disk; weight_bytes
    has only those that one token reads."""

    config: ModelConfig
    weight_bytes: int
    runner: RunnerNeeds
    disk_bytes: int = 0

    def in_bfloat16(self) -> ModelNeeds | None:
        """The same with numbers of two bytes; weights that take less already stay as they are."""
        runner = self.runner.in_bfloat16()
        if runner is None:
            return None
        return replace(self, weight_bytes=min(self.weight_bytes, 2 * self.config.parameters), runner=runner)


@dataclass(frozen=True)
class TorchNeeds:
    """Of the torch runner. bytes_per_value: of a number in the cache. expands_heads: see `working_bytes`."""

    config: ModelConfig
    bytes_per_value: int
    expands_heads: bool = False

    def block_bytes(self, block_tokens: int) -> int:
        """A key and a value of every key-value head for each token."""
        config = self.config
        return 2 * block_tokens * config.num_key_value_heads * config.head_dim * self.bytes_per_value

    def working_bytes(self, *, context: int, slots: int, step_tokens: int, block_tokens: int) -> int:
        """See `working_memory.working_bytes`; the size of a block makes no difference."""
        return working_bytes(
            self.config,
            context=context,
            slots=slots,
            step_tokens=step_tokens,
            bytes_per_value=self.bytes_per_value,
            expands_heads=self.expands_heads,
        )

    def in_bfloat16(self) -> TorchNeeds | None:
        """Smaller only than float32."""
        return replace(self, bytes_per_value=2) if self.bytes_per_value > 2 else None
