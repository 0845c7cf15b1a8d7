"""OpenVINO GenAI on the CPU, as its documentation uses it: one pipeline, tokens counted as they come."""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from typing import Any


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def main() -> None:
    task = json.load(sys.stdin)
    genai: Any = importlib.import_module("openvino_genai")
    numpy: Any = importlib.import_module("numpy")
    tensor: Any = importlib.import_module("openvino").Tensor

    class Stamps(genai.StreamerBase):  # type: ignore[misc]  # a class of another program
        def __init__(self) -> None:
            super().__init__()
            self.moments: list[tuple[float, int]] = []

        def write(self, tokens: Any) -> Any:
            self.moments.append((time.perf_counter(), len(tokens) if isinstance(tokens, list) else 1))
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    pipeline = genai.LLMPipeline(task["model"], "CPU", INFERENCE_NUM_THREADS=task["threads"])
    say(event="ready", at=time.perf_counter())
    for job in task["jobs"]:
        ids = numpy.array(job["prompts"], dtype=numpy.int64)
        inputs = genai.TokenizedInputs(tensor(ids), tensor(numpy.ones_like(ids)))
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = job["new_tokens"]
        config.ignore_eos, config.do_sample, config.apply_chat_template = True, False, False
        stamps, start = Stamps(), time.perf_counter()
        pipeline.generate(inputs, config, stamps)
        say(event="job", key=job["key"], runs=[{"start": start, "moments": stamps.moments}])
    say(event="memory", peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    main()
