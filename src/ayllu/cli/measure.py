"""What `ayllu chat --timing` prints: how long each step took since the process began, and memory."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from ayllu import process

if TYPE_CHECKING:
    from ayllu.engine.loaded_model import Answer, LoadedModel


class Timing:
    """Notes the moments of one run."""

    def __init__(self) -> None:
        self._age = process.age_seconds()
        self._zero = time.perf_counter()

    def _since_start(self, moment: float) -> str:
        return f"{self._age + moment - self._zero:.2f} s after process start"

    def report(self, answer: Answer, model: LoadedModel) -> None:
        """Print what is known after an answer, to standard error."""
        weights = model.weight_bytes
        lines = [
            f"model        {model.checkpoint.path.name}, {model.dtype} on {model.device}",
            f"loaded       {self._since_start(model.loaded_at)}",
        ]
        if answer.first_token_at is not None and answer.prefill_seconds is not None:
            speed = answer.prompt_tokens / max(answer.prefill_seconds, 1e-9)
            lines.append(f"first token  {self._since_start(answer.first_token_at)}")
            lines.append(f"prompt       {answer.prompt_tokens} tokens, {speed:.1f} tokens/s")
        if answer.decode_tokens_per_second is not None:
            lines.append(
                f"answer       {answer.new_tokens} tokens, {answer.decode_tokens_per_second:.1f} tokens/s"
            )
        lines.append(
            f"memory       loading took {model.load_peak_bytes / 1e6:.0f} MB at its peak, "
            f"{model.load_peak_bytes / weights:.2f} of the weights' {weights / 1e6:.0f} MB; "
            f"the process peaked at {process.peak_resident_bytes() / 1e6:.0f} MB"
        )
        print("\n".join(lines), file=sys.stderr)
