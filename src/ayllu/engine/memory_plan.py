"""Decides before anything is loaded how much context, how many slots and cache blocks a machine can hold.

Weights + keys and values of `slots` contexts + working memory of one step + image features have to fit into
what is free; with a draft model, its own beside them. What a runner takes it says itself (`runner_needs`).
All in whole bytes. What does not fit is refused with a command that does. Needs no torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ayllu.engine.layer_groups import LayerGroup, fitting_block_tokens, layer_groups
from ayllu.engine.options import DEFAULT_SLOTS, EngineOptions
from ayllu.engine.parameters import DEFAULT_CONTEXT
from ayllu.engine.runner_needs import ModelNeeds
from ayllu.errors import NoSpaceError, UsageError

MIN_CONTEXT = 512
"""A context that nobody asked for shrinks to this before the model is refused: a question and an answer."""

SHARE = (1, 2)
"""The part of the memory left beside weights and working memory that is taken unasked. The first slot of the
smallest choice may take all of it; more slots, and blocks that only remember, keep to the share."""


@dataclass(frozen=True)
class MemoryPlan:
    """What an engine will hold. blocks: cache blocks of `block_tokens` tokens per layer group, by its name.

    Of these bytes, working_bytes and image_cache_bytes are upper bounds. wanted_context: what was asked for,
    or the default, where `context` had to be smaller. disk_bytes: of experts that stay on disk; weight_bytes
    has only those that one token reads. draft: what the draft model beside it will hold.
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
    disk_bytes: int = 0
    draft: MemoryPlan | None = None

    @property
    def total_bytes(self) -> int:
        own = self.weight_bytes + self.kv_bytes + self.working_bytes + self.image_cache_bytes
        return own + (self.draft.total_bytes if self.draft else 0)

    @property
    def block_counts(self) -> tuple[int, ...]:
        """Blocks of each group, in the order of `groups`."""
        return tuple(self.blocks[group.name] for group in self.groups)

    def lines(self) -> tuple[str, ...]:
        """The plan for a person: the sum, the blocks, and what had to be smaller than wanted."""
        images = f" + images {size_text(self.image_cache_bytes)}" if self.image_cache_bytes else ""
        draft = f" + draft model {size_text(self.draft.total_bytes)}" if self.draft else ""
        per_token = size_text(self.context_bytes // self.context)
        lines = [
            f"weights {size_text(self.weight_bytes)} + cache {size_text(self.kv_bytes)} "
            f"({self.slots} x {self.context:,} tokens, {per_token} a token) + working "
            f"{size_text(self.working_bytes)}{images}{draft} = {size_text(self.total_bytes)} "
            f"of {size_text(self.available_bytes)} free",
            f"cache blocks of {self.block_tokens} tokens: "
            + ", ".join(f"{name} {count:,}" for name, count in self.blocks.items()),
        ]
        if self.disk_bytes:
            lines.append(f"experts {size_text(self.disk_bytes)} stay on disk, those in use in free memory")
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
            "disk_bytes": self.disk_bytes,
        }
        if self.draft:
            facts["draft_bytes"] = self.draft.total_bytes
        return facts | {f"blocks {name}": count for name, count in self.blocks.items()}


def plan_memory(
    needs: ModelNeeds,
    *,
    available_bytes: int,
    options: EngineOptions,
    model_name: str,
    draft: ModelNeeds | None = None,
) -> MemoryPlan:
    """The plan for a model and the runner that computes it.

    Without a wish: the model's context, at most 8,192 tokens, and as many slots, at most 8, as fit into half
    of what is left beside weights and working memory; where not even one fits at all, less context. What
    `options` ask for is kept as asked. `kv_bytes`, if given, is the cache's size: it holds one context at
    least, and asked slots share it whatever their number. draft: a draft model, which gets a cache of its own
    for the same slots and contexts, as far as it reads.

    Raises UsageError for a context beyond the model's, NoSpaceError for what does not fit.
    """
    longest = needs.config.max_position_embeddings
    if options.context is not None and options.context > longest:
        raise UsageError(
            f"A context of {options.context} tokens is out of range.",
            f"This model takes 1 to {longest} tokens.",
        )
    choice = _Choice(_Machine(needs, available_bytes, draft), options)
    plan = choice.plan()
    if plan is None:
        raise NoSpaceError(choice.problem(model_name), _way_out(choice, model_name))
    return plan


@dataclass(frozen=True)
class _Machine:
    """What is given: the model, the memory, and a draft model if there is one."""

    needs: ModelNeeds
    available_bytes: int
    draft: ModelNeeds | None

    def in_bfloat16(self) -> _Machine | None:
        """The same with numbers of two bytes; None where that is nothing smaller."""
        needs = self.needs.in_bfloat16()
        draft = self.draft and (self.draft.in_bfloat16() or self.draft)
        return None if needs is None else replace(self, needs=needs, draft=draft)


class _Choice:
    """Which contexts and slots fit on a machine under given options."""

    def __init__(self, machine: _Machine, options: EngineOptions) -> None:
        config = machine.needs.config
        self.machine = machine
        self.needs = machine.needs
        self.options = options
        self.groups = layer_groups(config)
        self.block_tokens = fitting_block_tokens(self.groups, options.block_tokens)
        self.block_bytes = self.needs.runner.block_bytes(self.block_tokens)
        self.image_cache_bytes = options.image_cache_bytes if config.vision else 0
        self.wanted_context = options.context or min(config.max_position_embeddings, DEFAULT_CONTEXT)
        self.least_context = options.context or min(self.wanted_context, MIN_CONTEXT)
        self.most_slots = options.slots or min(DEFAULT_SLOTS, options.step_tokens)
        self.least_slots = options.slots or 1
        self.draft: _Choice | None = None
        if machine.draft is not None:
            own = replace(options, kv_bytes=None, context=None)
            self.draft = _Choice(_Machine(machine.draft, machine.available_bytes, None), own)

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
        return replace(
            self.plan_of(context, slots, self.blocks(context, slots)),
            image_cache_bytes=self.image_cache_bytes,
            wanted_context=self.wanted_context,
            draft=None if self.draft is None else self.draft.as_draft(context, slots),
        )

    def as_draft(self, context: int, slots: int) -> MemoryPlan:
        """The plan of a draft model beside one with so many slots of so much context: a cache for as much of
        each as it can read. It reads no images."""
        context = min(context, self.needs.config.max_position_embeddings)
        return self.plan_of(context, slots, [slots * count for count in self.blocks_of_one(context)])

    def plan_of(self, context: int, slots: int, blocks: list[int]) -> MemoryPlan:
        """The plan with these sizes, of a model that nothing else is wanted of."""
        return MemoryPlan(
            context=context,
            slots=slots,
            block_tokens=self.block_tokens,
            groups=self.groups,
            blocks={group.name: count for group, count in zip(self.groups, blocks, strict=True)},
            kv_bytes=self.bytes_of(blocks),
            weight_bytes=self.needs.weight_bytes,
            working_bytes=self.working_bytes(context, slots),
            image_cache_bytes=0,
            available_bytes=self.machine.available_bytes,
            context_bytes=self.context_bytes(context),
            wanted_context=context,
            disk_bytes=self.needs.disk_bytes,
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
        """Bytes for the cache beside weights, working memory, images and all of a draft model; negative where
        these do not fit."""
        taken = self.needs.weight_bytes + self.image_cache_bytes + self.working_bytes(context, slots)
        return self.machine.available_bytes - taken - self.draft_bytes(context, slots)

    def draft_bytes(self, context: int, slots: int) -> int:
        """All that the draft model takes; 0 without one."""
        return 0 if self.draft is None else self.draft.as_draft(context, slots).total_bytes

    def working_bytes(self, context: int, slots: int) -> int:
        return self.needs.runner.working_bytes(
            context=context,
            slots=slots,
            step_tokens=self.options.step_tokens,
            block_tokens=self.block_tokens,
        )

    def context_bytes(self, context: int) -> int:
        """Cache bytes of one full context."""
        return self.bytes_of(self.blocks_of_one(context))

    def blocks_of_one(self, context: int) -> list[int]:
        """The most blocks of each group that one sequence of `context` tokens holds at once."""
        return [-(-group.held_tokens(context) // self.block_tokens) for group in self.groups]

    def bytes_of(self, blocks: list[int]) -> int:
        return sum(
            count * self.block_bytes * len(group.layers)
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
        draft = self.draft_bytes(context, slots)
        needed = self.needs.weight_bytes + cache + working + self.image_cache_bytes + draft
        needs, free = size_text(needed), size_text(self.machine.available_bytes)
        if needs == free:
            needs, free = f"{needed:,} bytes", f"{self.machine.available_bytes:,} bytes"
        images = f" + images {size_text(self.image_cache_bytes)}" if self.image_cache_bytes else ""
        beside = f" + draft model {size_text(draft)}" if draft else ""
        return (
            f"{model_name} needs {needs} of memory (weights {size_text(self.needs.weight_bytes)} + cache "
            f"{size_text(cache)} for {slots} x {context:,} tokens + working {size_text(working)}{images}"
            f"{beside}), {free} is free."
        )


def _way_out(choice: _Choice, model_name: str) -> str:
    """A command that fits where there is one: first in the same precision, then in bfloat16."""
    ways = [_command(choice, model_name)]
    if (smaller := choice.machine.in_bfloat16()) is not None:
        ways.append(_command(_Choice(smaller, choice.options), model_name, "bfloat16"))
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
