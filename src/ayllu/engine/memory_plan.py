"""Decides before anything is loaded how much context, how many slots and cache blocks a machine can hold.

Weights + keys and values of `slots` contexts + working memory of one step + image features have to fit into
what is free. All in whole bytes. What does not fit is refused with a command that does. Needs no torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ayllu.engine.layer_groups import LayerGroup, fitting_block_tokens, layer_groups
from ayllu.engine.options import DEFAULT_SLOTS, EngineOptions
from ayllu.engine.parameters import DEFAULT_CONTEXT
from ayllu.engine.working_memory import working_bytes
from ayllu.errors import NoSpaceError, UsageError
from ayllu.model.config import ModelConfig

MIN_CONTEXT = 512
"""A context that nobody asked for shrinks to this before the model is refused: a question and an answer."""

SHARE = (1, 2)
"""The part of the memory left beside weights and working memory that is taken unasked. The first slot of the
smallest choice may take all of it; more slots, and blocks that only remember, keep to the share."""


@dataclass(frozen=True)
class MemoryPlan:
    """What an engine will hold. blocks: cache blocks of `block_tokens` tokens per layer group, by its name.

    Of these bytes, working_bytes and image_cache_bytes are upper bounds. wanted_context: what was asked for,
    or the default, where `context` had to be smaller.
    """

    context: int
    slots: int
    block_tokens: int
    groups: tuple[LayerGroup, ...]
    blocks: Mapping[str, int]
    kv_bytes: int
    weight_bytes: int
    working_bytes: int
    image_cache_bytes: int
    available_bytes: int
    context_bytes: int
    wanted_context: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.working_bytes + self.image_cache_bytes

    @property
    def block_counts(self) -> tuple[int, ...]:
        """Blocks of each group, in the order of `groups`."""
        return tuple(self.blocks[group.name] for group in self.groups)

    def lines(self) -> tuple[str, ...]:
        """The plan for a person: the sum, the blocks, and what had to be smaller than wanted."""
        images = f" + images {size_text(self.image_cache_bytes)}" if self.image_cache_bytes else ""
        per_token = size_text(self.context_bytes // self.context)
        lines = [
            f"weights {size_text(self.weight_bytes)} + cache {size_text(self.kv_bytes)} "
            f"({self.slots} x {self.context:,} tokens, {per_token} a token) + working "
            f"{size_text(self.working_bytes)}{images} = {size_text(self.total_bytes)} "
            f"of {size_text(self.available_bytes)} free",
            f"cache blocks of {self.block_tokens} tokens: "
            + ", ".join(f"{name} {count:,}" for name, count in self.blocks.items()),
        ]
        if self.context < self.wanted_context:
            lines.append(
                f"context {self.context:,} instead of {self.wanted_context:,} tokens: more does not fit"
            )
        return tuple(lines)

    def facts(self) -> dict[str, str | int | float]:
        """Names and values for programs."""
        facts: dict[str, str | int | float] = {
            "context": self.context,
            "slots": self.slots,
            "block_tokens": self.block_tokens,
            "weight_bytes": self.weight_bytes,
            "kv_bytes": self.kv_bytes,
            "working_bytes": self.working_bytes,
            "image_cache_bytes": self.image_cache_bytes,
            "total_bytes": self.total_bytes,
            "available_bytes": self.available_bytes,
        }
        return facts | {f"blocks {name}": count for name, count in self.blocks.items()}


def plan_memory(
    config: ModelConfig,
    *,
    weight_bytes: int,
    available_bytes: int,
    bytes_per_value: int,
    options: EngineOptions,
    model_name: str,
    expands_heads: bool = False,
) -> MemoryPlan:
    """The plan for a model of `weight_bytes` whose cache takes `bytes_per_value` per number.

    Without a wish: the model's context, at most 8,192 tokens, and as many slots, at most 8, as fit into half
    of what is left beside weights and working memory; where not even one fits at all, less context. What
    `options` ask for is kept as asked. `kv_bytes`, if given, is the cache's size: it holds one context at
    least, and asked slots share it whatever their number. expands_heads: see `working_bytes`.

    Raises UsageError for a context beyond the model's, NoSpaceError for what does not fit.
    """
    longest = config.max_position_embeddings
    if options.context is not None and options.context > longest:
        raise UsageError(
            f"A context of {options.context} tokens is out of range.",
            f"This model takes 1 to {longest} tokens.",
        )
    machine = _Machine(config, weight_bytes, available_bytes, bytes_per_value, expands_heads)
    choice = _Choice(machine, options)
    plan = choice.plan()
    if plan is None:
        raise NoSpaceError(choice.problem(model_name), _way_out(choice, model_name))
    return plan


@dataclass(frozen=True)
class _Machine:
    """What is given: the model and the memory."""

    config: ModelConfig
    weight_bytes: int
    available_bytes: int
    bytes_per_value: int
    expands_heads: bool

    def in_bfloat16(self) -> _Machine:
        """The same with numbers of two bytes; weights that take less already stay as they are."""
        weights = min(self.weight_bytes, 2 * self.config.parameters)
        return replace(self, weight_bytes=weights, bytes_per_value=2)


class _Choice:
    """Which contexts and slots fit on a machine under given options."""

    def __init__(self, machine: _Machine, options: EngineOptions) -> None:
        config = machine.config
        self.machine = machine
        self.options = options
        self.groups = layer_groups(config)
        self.block_tokens = fitting_block_tokens(self.groups, options.block_tokens)
        self.token_bytes = 2 * config.num_key_value_heads * config.head_dim * machine.bytes_per_value
        self.image_cache_bytes = options.image_cache_bytes if config.vision else 0
        self.wanted_context = options.context or min(config.max_position_embeddings, DEFAULT_CONTEXT)
        self.least_context = options.context or min(self.wanted_context, MIN_CONTEXT)
        self.most_slots = options.slots or min(DEFAULT_SLOTS, options.step_tokens)
        self.least_slots = options.slots or 1

    def plan(self) -> MemoryPlan | None:
        """The largest that fits: context before slots, slots before remembered blocks."""
        context = self.largest_context(self.least_context, self.wanted_context, self.least_slots)
        if context is None:
            return None
        slots = next(
            slots
            for slots in range(self.most_slots, self.least_slots - 1, -1)
            if slots == self.least_slots or self.fits(context, slots, *SHARE)
        )
        blocks = self.blocks(context, slots)
        return MemoryPlan(
            context=context,
            slots=slots,
            block_tokens=self.block_tokens,
            groups=self.groups,
            blocks={group.name: count for group, count in zip(self.groups, blocks, strict=True)},
            kv_bytes=self.bytes_of(blocks),
            weight_bytes=self.machine.weight_bytes,
            working_bytes=self.working_bytes(context, slots),
            image_cache_bytes=self.image_cache_bytes,
            available_bytes=self.machine.available_bytes,
            context_bytes=self.context_bytes(context),
            wanted_context=self.wanted_context,
        )

    def largest_context(self, least: int, most: int, slots: int) -> int | None:
        """The longest context of whole blocks in [least, most] that fits `slots` times; None: none does."""
        if self.fits(most, slots):
            return most
        if not self.fits(least, slots):
            return None
        low, high = least // self.block_tokens, most // self.block_tokens
        while low < high:
            middle = (low + high + 1) // 2
            if self.fits(middle * self.block_tokens, slots):
                low = middle
            else:
                high = middle - 1
        return max(least, low * self.block_tokens)

    def fits(self, context: int, slots: int, numerator: int = 1, denominator: int = 1) -> bool:
        """Whether so much fits into that part of what is left for the cache."""
        left, one = self.left(context, slots), self.context_bytes(context)
        given = self.options.kv_bytes
        if given is None:
            return slots * one * denominator <= left * numerator
        asked = self.options.slots is not None
        return given <= left and (one if asked else slots * one) <= given

    def left(self, context: int, slots: int) -> int:
        """Bytes for the cache beside weights, working memory and images; negative where these do not fit."""
        taken = self.machine.weight_bytes + self.image_cache_bytes + self.working_bytes(context, slots)
        return self.machine.available_bytes - taken

    def working_bytes(self, context: int, slots: int) -> int:
        return working_bytes(
            self.machine.config,
            context=context,
            slots=slots,
            step_tokens=self.options.step_tokens,
            bytes_per_value=self.machine.bytes_per_value,
            expands_heads=self.machine.expands_heads,
        )

    def context_bytes(self, context: int) -> int:
        """Cache bytes of one full context."""
        return self.bytes_of(self.blocks_of_one(context))

    def blocks_of_one(self, context: int) -> list[int]:
        """The most blocks of each group that one sequence of `context` tokens holds at once."""
        return [-(-group.held_tokens(context) // self.block_tokens) for group in self.groups]

    def bytes_of(self, blocks: list[int]) -> int:
        return sum(
            count * self.block_tokens * self.token_bytes * len(group.layers)
            for group, count in zip(self.groups, blocks, strict=True)
        )

    def blocks(self, context: int, slots: int) -> list[int]:
        """Blocks of each group.

        Without `kv_bytes` each slot has a whole context. Chunked layers leave the blocks of a finished chunk
        while global layers keep theirs; to remember such prefixes in both, chunked groups get up to as many
        again, within the share. With `kv_bytes`, all groups grow or shrink in proportion until it is used.
        """
        one = self.blocks_of_one(context)
        full = [slots * count for count in one]
        if self.options.kv_bytes is not None:
            useful = self.options.kv_bytes
            if not self.options.prefix_cache:
                useful = min(useful, self.bytes_of(full))
            return [count * useful // self.bytes_of(one) for count in one]
        leaves_chunks = [group.chunk is not None and group.chunk < context for group in self.groups]
        extra = [count if leaves else 0 for count, leaves in zip(full, leaves_chunks, strict=True)]
        extra_bytes = self.bytes_of(extra)
        if not self.options.prefix_cache or extra_bytes == 0:
            return full
        spare = self.left(context, slots) * SHARE[0] // SHARE[1] - self.bytes_of(full)
        spare = min(max(spare, 0), extra_bytes)
        return [count + more * spare // extra_bytes for count, more in zip(full, extra, strict=True)]

    def problem(self, model_name: str) -> str:
        """What does not fit, with the numbers."""
        context, slots, given = self.least_context, self.least_slots, self.options.kv_bytes
        one = self.context_bytes(context)
        if given is not None and given < one:
            return (
                f"A cache of {given:,} bytes (kv_bytes) is too small for {model_name}: "
                f"one context of {context:,} tokens takes {one:,} bytes."
            )
        cache = slots * one if given is None else given
        working = self.working_bytes(context, slots)
        needed = self.machine.weight_bytes + cache + working + self.image_cache_bytes
        needs, free = size_text(needed), size_text(self.machine.available_bytes)
        if needs == free:
            needs, free = f"{needed:,} bytes", f"{self.machine.available_bytes:,} bytes"
        images = f" + images {size_text(self.image_cache_bytes)}" if self.image_cache_bytes else ""
        return (
            f"{model_name} needs {needs} of memory (weights {size_text(self.machine.weight_bytes)} + cache "
            f"{size_text(cache)} for {slots} x {context:,} tokens + working {size_text(working)}{images}), "
            f"{free} is free."
        )


def _way_out(choice: _Choice, model_name: str) -> str:
    """A command that fits where there is one: first in the same precision, then in bfloat16."""
    ways = [_command(choice, model_name)]
    if choice.machine.bytes_per_value > 2:
        ways.append(_command(_Choice(choice.machine.in_bfloat16(), choice.options), model_name, "bfloat16"))
    commands = [command for command in ways if command]
    if choice.options.kv_bytes is not None and (limit := _fitting_kv_bytes(choice)) is not None:
        commands.append(limit)
    return f"Use {', or '.join(commands)}." if commands else "Use a smaller model (`ayllu list`)."


def _command(choice: _Choice, model_name: str, dtype: str | None = None) -> str | None:
    """The command nearest to the wish that fits: fewer slots of the same context, then less context."""
    found = next(_fitting(choice), None)
    if found is None:
        return None
    context, slots = found
    words = [choice.options.command or f"ayllu chat {shlex.quote(model_name)}", f"--context {context}"]
    if (slots, choice.options.slots) != (1, 1):
        # A conversation has one slot and no such flag.
        words.append(f"--slots {slots}")
    if dtype:
        words.append(f"--dtype {dtype}")
    return f"`{' '.join(words)}`"


def _fitting(choice: _Choice) -> Iterator[tuple[int, int]]:
    """Contexts and slots that fit, nearest to the wish first."""
    if plan := choice.plan():
        yield plan.context, plan.slots
    for slots in range(choice.most_slots, 0, -1):
        if choice.fits(choice.wanted_context, slots):
            yield choice.wanted_context, slots
    least = min(choice.wanted_context, MIN_CONTEXT)
    context = choice.largest_context(least, choice.wanted_context, 1)
    if context is not None:
        yield context, 1


def _fitting_kv_bytes(choice: _Choice) -> str | None:
    """The largest cache that fits the wish, where a smaller one is large enough."""
    left = choice.left(choice.least_context, choice.least_slots)
    needed = choice.context_bytes(choice.least_context)
    return f"kv_bytes from {needed:,} to {left:,}" if needed <= left else None


def size_text(count: int) -> str:
    """Bytes for a person, in decimal units as disks and memory are sold: 812 MB, 3.1 GB."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= size:
            tenths = (count * 10 + size // 2) // size
            if tenths < 1000:
                return f"{tenths // 10}.{tenths % 10} {unit}"
            return f"{(count + size // 2) // size:,} {unit}"
    return f"{count} bytes"
