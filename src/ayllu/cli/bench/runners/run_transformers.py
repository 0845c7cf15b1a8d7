"""transformers in bfloat16 through torch, eager: the file's tensors are decoded by it while loading."""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


class Stamps:
    """A streamer: `generate` shows it the prompt first, then each token."""

    def __init__(self) -> None:
        self.moments: list[tuple[float, int]] = []
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        if self._prompt_seen:
            self.moments.append((time.perf_counter(), int(value.numel())))
        self._prompt_seen = True

    def end(self) -> None:
        pass


def main() -> None:
    task = json.load(sys.stdin)
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    torch.set_num_threads(task["threads"])
    path = Path(task["model"])
    where = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, local_files_only=True, **where
    ).eval()
    say(event="ready", at=time.perf_counter())
    for job in task["jobs"]:
        ids = torch.tensor(job["prompts"])
        count = job["new_tokens"]
        stamps, start = Stamps(), time.perf_counter()
        with torch.inference_mode():
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count,
                min_new_tokens=count, do_sample=False, streamer=stamps,
            )  # fmt: skip
        say(event="job", key=job["key"], runs=[{"start": start, "moments": stamps.moments}])
    say(event="memory", peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    main()
