"""What one rendering of a chat template may cost, counted while it runs.

Two budgets: processor time of the rendering thread, and bytes of all values ever made (an upper bound of the
memory in use, too). A value's weight is its size as text, references counted each time: that is what it
costs to compare or print, and what a list that holds itself many times over would explode.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from jinja2 import Undefined

from ayllu.errors import TemplateError

MAX_INTEGER_BITS = 1024
MAX_CALL_DEPTH = 60
_CHECK_EVERY = 64
_BYTES_PER_STEP = 1 << 14
_SLOT = 16
_SCALAR = 64

CURRENT: ContextVar[Meter] = ContextVar("meter of the rendering under way")


class Meter:
    """The budgets of one rendering: `seconds` of thread time, `memory` bytes, `output` characters.

    Every method raises TemplateError once a budget is spent.
    """

    def __init__(self, seconds: float, memory: int) -> None:
        self._seconds = seconds
        self._deadline = time.thread_time() + seconds
        self._memory = memory
        self._largest = memory // 2
        self._left = memory
        self._steps = 0
        self._weights: dict[int, tuple[Any, int]] = {}
        self.depth = 0

    def step(self, count: int = 1) -> None:
        """Account for `count` small operations."""
        self._steps += count
        if self._steps >= _CHECK_EVERY:
            self._steps = 0
            if time.thread_time() > self._deadline:
                raise over_limit(f"it computes longer than {self._seconds:.1f} s")

    def charge(self, size: int) -> None:
        """Account for `size` bytes about to be made."""
        self._left -= size
        if self._left < 0:
            raise over_limit(f"its values take more than {self._memory >> 20} MiB")
        self.step(1 + size // _BYTES_PER_STEP)

    def require(self, size: int) -> None:
        """Refuse to make `size` bytes that the budget does not hold; `made` will charge them."""
        if size > self._left:
            self.charge(size)

    def affordable(self, unit: int) -> int:
        """How many things of `unit` bytes the memory budget still allows."""
        return self._left // unit

    def weight(self, value: object) -> int:
        """The size of `value` as text, in bytes. Raises TemplateError for what no template should print."""
        if isinstance(value, str):
            return sys.getsizeof(value)
        if value is None or isinstance(value, int | float | Undefined):
            return _SCALAR
        if isinstance(value, range):
            return _SCALAR * (len(value) + 1)
        if not isinstance(value, list | tuple | dict):
            raise over_limit(f"it prints or stores a {type(value).__name__}")
        known = self._weights.get(id(value))
        if known is None:
            known = value, self._weigh(value)
            # The value is kept with its weight: its id must not be given to another.
            self._weights[id(value)] = known
        return known[1]

    def made(self, value: Any) -> Any:
        """`value`, a result just made, charged and weighed."""
        if isinstance(value, str):
            self.charge(sys.getsizeof(value))
        elif isinstance(value, int):
            if value.bit_length() > MAX_INTEGER_BITS:
                raise over_limit(f"it computes an integer of more than {MAX_INTEGER_BITS} bits")
            self.step()
        elif isinstance(value, list | tuple | dict):
            self.charge(_SCALAR + _SLOT * len(value))
            self.weight(value)
        else:
            self.step()
        return value

    def each(self, values: Iterable[Any]) -> Iterator[Any]:
        """`values`, one step each."""
        for value in values:
            self.step()
            yield value

    def _weigh(self, value: list[Any] | tuple[Any, ...] | dict[Any, Any]) -> int:
        total = _SCALAR + _SLOT * len(value)
        self.depth += 1
        if self.depth > MAX_CALL_DEPTH:
            raise over_limit("it nests too deeply")
        for item in value:
            self.step()
            total += self.weight(item)
        if isinstance(value, Mapping):
            for item in value.values():
                self.step()
                total += self.weight(item)
        self.depth -= 1
        if total > self._largest:
            raise over_limit(f"one of its values takes more than {self._largest >> 20} MiB as text")
        return total


def over_limit(what: str) -> TemplateError:
    """The error for a template that leaves its bounds."""
    return TemplateError(
        f"The chat template was stopped: {what}.",
        "Do not trust this model file; another copy of the model may have a sound template.",
    )
