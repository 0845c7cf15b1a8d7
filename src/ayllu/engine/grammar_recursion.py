"""How deep a value goes that a schema describes by itself, such as a tree: measured, and limited.

A small model that may nest for ever often does. So definitions that lead back to themselves are written once
for each level, the last of which must end. Where that is too much to write, nesting stays without limit.
"""

from __future__ import annotations

from collections.abc import Mapping

from ayllu.engine.grammar_nodes import Array, Node, Object, Reference, SchemaTree, height, parts
from ayllu.errors import GrammarError

MAX_LEVELS = 32
"""Twice this many brackets are what our own reader of tool calls takes."""

_MAX_PARTS = 8_000
_MAX_WORK = 5_000_000


def measured_tree(root: Node, definitions: Mapping[str, Node]) -> SchemaTree:
    """The tree with the facts of its recursion. Raises GrammarError when finding them takes too long."""
    uses: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    nesting: set[str] = set()
    for name, node in definitions.items():
        inside = list(parts(node))
        uses[name] = [part.name for part in inside if isinstance(part, Reference)]
        sizes[name] = len(inside)
        if any(isinstance(part, Array | Object) for part in inside):
            nesting.add(name)
    # Names that only stand for others nest nothing: each ring has one that does.
    recursive = _recursive(uses) & nesting
    heights = _heights(definitions, uses, sizes, recursive)
    size = sum(sizes[name] for name in recursive)
    needed = height(root, heights)
    limited = bool(recursive) and size * MAX_LEVELS <= _MAX_PARTS and (needed or 0) <= MAX_LEVELS
    return SchemaTree(root, definitions, recursive, heights, MAX_LEVELS if limited else None)


def _recursive(uses: Mapping[str, list[str]]) -> frozenset[str]:
    """Names that lead back to themselves, or lie on a way from one such to another."""
    remaining = set(uses)
    users: dict[str, list[str]] = {}
    for name, used in uses.items():
        for one in used:
            users.setdefault(one, []).append(name)
    for forward, backward in ((uses, users), (users, uses)):
        counts = {name: sum(one in remaining for one in forward.get(name, ())) for name in remaining}
        waiting = [name for name, count in counts.items() if count == 0]
        while waiting:
            name = waiting.pop()
            remaining.discard(name)
            for other in backward.get(name, ()):
                if other in remaining:
                    counts[other] -= 1
                    if counts[other] == 0:
                        waiting.append(other)
    return frozenset(remaining)


def _heights(
    definitions: Mapping[str, Node],
    uses: Mapping[str, list[str]],
    sizes: Mapping[str, int],
    recursive: frozenset[str],
) -> dict[str, int]:
    """Heights of all definitions that some finite value meets, found from the lowest up."""
    users: dict[str, set[str]] = {}
    for name, used in uses.items():
        for one in used:
            users.setdefault(one, set()).add(name)
    heights: dict[str, int] = {}
    by_height: dict[int, set[str]] = {}
    work = 0
    touched = set(definitions)
    while touched or by_height:
        for name in touched:
            work += sizes[name]
            if work > _MAX_WORK:
                raise GrammarError(
                    "The schema's definitions refer to each other too often.", "Write some of them in place."
                )
            found = height(definitions[name], heights)
            if found is not None:
                by_height.setdefault(found + (name in recursive), set()).add(name)
        if not by_height:
            break
        lowest = min(by_height)
        reached = [name for name in by_height.pop(lowest) if name not in heights]
        heights.update(dict.fromkeys(reached, lowest))
        touched = {user for name in reached for user in users.get(name, ()) if user not in heights}
    return heights
