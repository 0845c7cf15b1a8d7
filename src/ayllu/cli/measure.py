"""What `ayllu chat --timing` prints: how long each step took since the process began, and memory."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from ayllu import process

if TYPE_CHECKING:
    from ayllu.engine.native import NativeEngine
    from ayllu.engine.reply import Reply


class Timing:
    """Notes the moments of one run."""

    def __init__(self) -> None:
        self._age = process.age_seconds()
        self._zero = time.perf_counter()

    def _since_start(self, moment: float) -> float:
        return self._age + moment - self._zero

    def facts(self, reply: Reply, engine: NativeEngine) -> dict[str, float | int | None]:
        """Seconds since process start, tokens per second and bytes, by name."""
        first = reply.first_token_at
        prefill = reply.prefill_seconds
        facts = engine.info.facts
        return {
            "loaded_s": self._since_start(engine.loaded_at),
            "first_token_s": None if first is None else self._since_start(first),
            "prompt_tokens_per_s": None if prefill is None else reply.prompt_tokens / max(prefill, 1e-9),
            "answer_tokens_per_s": reply.decode_tokens_per_second,
            "weight_bytes": int(facts["weight_bytes"]),
            "load_peak_bytes": int(facts["load_peak_bytes"]),
            "process_peak_bytes": process.peak_resident_bytes(engine.process_id),
        }

    def report(self, reply: Reply, engine: NativeEngine) -> None:
        """Print the facts of an answer to standard error."""
        facts = self.facts(reply, engine)
        told = engine.info.facts
        lines = [f"model        {engine.info.model}, {told['dtype']} on {told['device']}"]
        for label, name, unit in (
            ("loaded", "loaded_s", "s after process start"),
            ("first token", "first_token_s", "s after process start"),
            ("prompt", "prompt_tokens_per_s", f"tokens/s, {reply.prompt_tokens} tokens"),
            ("answer", "answer_tokens_per_s", f"tokens/s, {reply.new_tokens} tokens"),
        ):
            if (value := facts[name]) is not None:
                lines.append(f"{label:<12} {value:.2f} {unit}")
        peak, weights = int(told["load_peak_bytes"]), int(told["weight_bytes"])
        lines.append(
            f"memory       loading took {peak / 1e6:.0f} MB at its peak, "
            f"{peak / weights:.2f} of the weights' {weights / 1e6:.0f} MB"
        )
        lines.append(f"plan         {told['memory']}")
        print("\n".join(lines), file=sys.stderr)
