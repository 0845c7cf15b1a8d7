"""From a cold process to the first token, and on to a whole answer: ayllu beside transformers, same file.

Runs both in turn, each in a process of its own, on a quiet machine, and writes medians, spread, ratios and
the share of the measured memory bandwidth to benchmarks/results/. Run: python benchmarks/conversation.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from machine import heading, read_bandwidth, wait_for_quiet, write_result

PROMPT = "Explain in three sentences why the sky is blue."
NEW_TOKENS = 64
PEER = """
import json, sys, time
sys.path.insert(0, {root!r})
from ayllu import process
age, zero = process.age_seconds(), time.perf_counter()
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

gguf = Path({gguf!r})
tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
before = process.resident_bytes()
model = AutoModelForCausalLM.from_pretrained(
    gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, local_files_only=True
).eval()
peak, loaded = process.peak_resident_bytes() - before, time.perf_counter()
moments = []

class Stamp(BaseStreamer):
    def put(self, value):
        moments.append(time.perf_counter())

    def end(self):
        pass

messages = [{{"role": "user", "content": {prompt!r}}}]
ids = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
model.generate(**ids, max_new_tokens={tokens}, min_new_tokens={tokens}, do_sample=False, streamer=Stamp())
first = moments[1]  # the streamer is shown the prompt before the first token
print(json.dumps({{
    "loaded_s": age + loaded - zero,
    "first_token_s": age + first - zero,
    "answer_tokens_per_s": (len(moments) - 2) / (moments[-1] - first),
    "load_peak_bytes": peak,
}}))
"""


def run_ayllu(gguf: Path) -> dict[str, float]:
    command = [
        sys.executable, "-m", "ayllu", "chat", str(gguf), "-p", PROMPT, "--json", "--timing",
        "--temperature", "0", "--max-tokens", str(NEW_TOKENS), "--dtype", "bfloat16",
    ]  # fmt: skip
    output = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    return json.loads(output.stdout)["timing"]


def run_transformers(gguf: Path) -> dict[str, float]:
    root = str(Path(__file__).parent.parent / "src")
    code = PEER.format(root=root, gguf=str(gguf), prompt=PROMPT, tokens=NEW_TOKENS)
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
    )
    return json.loads(output.stdout.splitlines()[-1])


def measure(name: str, runs: int, with_peer: bool) -> dict[str, object]:
    from ayllu.settings import load_settings
    from ayllu.weights.store import open_store

    gguf = open_store(load_settings()).ensure(name).path
    engines = {"ayllu": run_ayllu} | ({"transformers": run_transformers} if with_peer else {})
    samples: dict[str, list[dict[str, float]]] = {engine: [] for engine in engines}
    run_ayllu(gguf)  # warms the disk cache
    for _ in range(runs):
        for engine, run in engines.items():
            wait_for_quiet()
            samples[engine].append(run(gguf))
    result: dict[str, object] = {"model": name, "runs": runs}
    for engine, rows in samples.items():
        result[engine] = {
            key: {
                "median": statistics.median(row[key] for row in rows),
                "min": min(row[key] for row in rows),
                "max": max(row[key] for row in rows),
            }
            for key in rows[0]
            if all(row[key] is not None for row in rows)
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["smollm2-135m-instruct", "qwen2.5-coder-1.5b-instruct"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--no-peer", action="store_true", help="measure ayllu alone")
    options = parser.parse_args()
    wait_for_quiet()
    bandwidth = read_bandwidth()
    report = {
        **heading("conversation", "ayllu", "torch", "transformers", "numpy"),
        "read_bandwidth_bytes_per_s": bandwidth,
        "models": [measure(name, options.runs, not options.no_peer) for name in options.models],
    }
    file = write_result("conversation", report)
    for model in report["models"]:
        _print(model, bandwidth)
    print(f"written to {file}")


def _print(model: dict, bandwidth: float) -> None:
    print(f"\n{model['model']} ({model['runs']} runs, median [min-max])")
    for key in ("loaded_s", "first_token_s", "answer_tokens_per_s", "load_peak_bytes"):
        cells = []
        for engine in ("ayllu", "transformers"):
            if engine in model and key in model[engine]:
                value = model[engine][key]
                cells.append(f"{engine} {value['median']:,.2f} [{value['min']:,.2f}-{value['max']:,.2f}]")
        if len(cells) == 2:
            ours, theirs = (model[engine][key]["median"] for engine in ("ayllu", "transformers"))
            cells.append(f"ratio {theirs / ours if key != 'answer_tokens_per_s' else ours / theirs:.2f}")
        print(f"  {key:<22} {'   '.join(cells)}")
    ours = model["ayllu"]
    used = ours["weight_bytes"]["median"] * ours["answer_tokens_per_s"]["median"]
    share = f"{100 * used / bandwidth:.0f}% of {bandwidth / 1e9:.1f} GB/s measured"
    print(f"  weights read at {used / 1e9:.1f} GB/s, {share}")


if __name__ == "__main__":
    main()
