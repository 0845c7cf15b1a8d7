"""What `ayllu chat --timing` prints: how long each step took since the process began, and memory."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ayllu.engine.loaded_model import Answer, LoadedModel


def seconds_since_process_start() -> float:
    """Age of this process; on systems that do not tell, the processor time it has used."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError, ValueError, IndexError):
        return time.process_time()


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Timing:
    """Notes the moments of one run."""

    def __init__(self) -> None:
        self._age = seconds_since_process_start()
        self._zero = time.perf_counter()
        self._loaded: float | None = None

    def _since_start(self, moment: float) -> float:
        return self._age + moment - self._zero

    def loaded(self) -> None:
        """The model is in memory."""
        self._loaded = time.perf_counter()

    def report(self, answer: Answer, model: LoadedModel) -> None:
        """Print what is known after an answer, to standard error."""
        lines = [f"model            {model.checkpoint.path.name}, {model.dtype} on {model.device}"]
        if self._loaded is not None:
            lines.append(f"loaded           {self._since_start(self._loaded):.2f} s after process start")
        if answer.first_token_at is not None and answer.prefill_seconds is not None:
            lines.append(
                f"first token      {self._since_start(answer.first_token_at):.2f} s after process start"
            )
            speed = answer.prompt_tokens / max(answer.prefill_seconds, 1e-9)
            lines.append(f"prompt           {answer.prompt_tokens} tokens, {speed:.1f} tokens/s")
        if answer.decode_tokens_per_second is not None:
            lines.append(
                f"answer           {answer.new_tokens} tokens, {answer.decode_tokens_per_second:.1f} tokens/s"
            )
        weights = model.checkpoint.config.parameters * model.oracle.decoder.norm.weight.element_size()
        lines.append(
            f"memory           peak {peak_memory_bytes() / 1e6:.0f} MB, weights {weights / 1e6:.0f} MB"
        )
        print("\n".join(lines), file=sys.stderr)
