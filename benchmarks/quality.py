"""What the fast path costs in quality: perplexity, and how far its probabilities are from exact ones.

4,000 tokens of text that is installed here, in windows of 512 tokens whose second halves count, so that each
token has at least 256 before it. Exact means: torch in float32 on the file's own weights, decoded. The same
file then runs in ayllu's native runner and in llama.cpp (llama-cpp-python, in its own process).
Run: python benchmarks/quality.py --peer-python PYTHON
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from machine import heading, write_result

WINDOW = 512
PEER = """
import sys, numpy, llama_cpp
model_path, ids_path, out_path, threads, window = sys.argv[1:]
windows, window = numpy.load(ids_path), int(window)
model = llama_cpp.Llama(model_path, n_ctx=window, n_batch=window, n_ubatch=window, logits_all=True,
                        n_threads=int(threads), n_threads_batch=int(threads), verbose=False)
with open(out_path, "wb") as out:
    for ids in windows:
        model.reset()
        model.eval(ids.tolist())
        out.write(numpy.asarray(model.scores[window // 2 - 1 : window - 1], dtype=numpy.float32).tobytes())
print(llama_cpp.__version__)
"""


def text_of_installed_packages() -> str:
    """Prose that comes with Python: the documentation inside well-known modules, the same in every order."""
    import collections
    import decimal
    import inspect
    import logging
    import optparse
    import pickletools
    import random
    import statistics
    import threading
    import typing

    modules = (
        pickletools, optparse, statistics, random, decimal, typing, collections, threading, logging, argparse,
    )  # fmt: skip
    parts = []
    for module in modules:
        parts.append(inspect.getdoc(module) or "")
        for _, value in sorted(vars(module).items()):
            if inspect.isclass(value) and value.__module__ == module.__name__:
                parts.append(inspect.getdoc(value) or "")
    return "\n\n".join(part for part in parts if len(part) > 200)


def windows_of(path: Path, tokens: int) -> np.ndarray:
    """Token ids [windows, WINDOW] of the text; half of each window counts."""
    from ayllu.engine.model_files import open_model_files

    tokenizer = open_model_files(path).tokenizer
    ids = tokenizer.encode(text_of_installed_packages())
    count = -(-tokens // (WINDOW // 2))
    step = WINDOW // 2
    if len(ids) < step * (count + 1):
        sys.exit(f"The installed text has {len(ids)} tokens, too few for {tokens}: ask for fewer.")
    return np.array([ids[start : start + WINDOW] for start in range(0, count * step, step)], np.int32)


def exact_logits(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Logits [WINDOW / 2, vocab] of one window by the torch decoder in float32."""
    import torch

    from ayllu.model.attention import WholeSequence
    from ayllu.weights.checkpoint import open_checkpoint
    from ayllu.weights.load import load_decoder

    decoder = load_decoder(open_checkpoint(path), device=torch.device("cpu"), dtype=torch.float32)

    @torch.inference_mode()
    def compute(ids: np.ndarray) -> np.ndarray:
        tokens = torch.from_numpy(ids.astype(np.int64))[None]
        positions = torch.arange(len(ids))[None]
        attend = WholeSequence(decoder.config.layers, positions)
        hidden = decoder(decoder.embed(tokens), positions, attend)
        return decoder.logits(hidden[0, WINDOW // 2 - 1 : WINDOW - 1]).numpy()

    return compute


def native_logits(path: Path, threads: int, cache_type: str) -> Callable[[np.ndarray], np.ndarray]:
    """The same by the runner that the engine would choose."""
    from ayllu.engine.open_core import open_runner
    from ayllu.engine.options import EngineOptions
    from ayllu.engine.step_runner import RunnerPiece
    from ayllu.progress import SILENT
    from ayllu.weights.checkpoint import open_checkpoint

    options = EngineOptions(
        context=WINDOW, slots=1, block_tokens=16, threads=threads, runner="native", cache_type=cache_type
    )
    opened = open_runner(open_checkpoint(path), options, SILENT, path.name)
    size = opened.plan.block_tokens
    table = list(range(-(-WINDOW // size)))

    def compute(ids: np.ndarray) -> np.ndarray:
        piece = RunnerPiece(ids.tolist(), 0, [table for _ in opened.plan.groups])
        (hidden,) = opened.runner.forward([piece])
        rows = range(WINDOW // 2 - 1, WINDOW - 1)
        return opened.runner.logits([(hidden, row) for row in rows])

    return compute


def peer_logits(
    python: Path, path: Path, windows: np.ndarray, threads: int, vocab: int
) -> Iterator[np.ndarray]:
    """The same by llama.cpp, window after window, through a file."""
    with tempfile.TemporaryDirectory() as folder:
        ids, out = Path(folder, "ids.npy"), Path(folder, "logits")
        np.save(ids, windows)
        subprocess.run(
            [str(python), "-c", PEER, str(path), str(ids), str(out), str(threads), str(WINDOW)],
            check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        logits = np.memmap(out, np.float32, "r", shape=(len(windows), WINDOW // 2, vocab))
        for index in range(len(windows)):
            yield np.array(logits[index])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


class Quality:
    """Of all places that count: negative log-likelihood, KL(exact || it), same likeliest token or not."""

    def __init__(self) -> None:
        self.losses: list[np.ndarray] = []
        self.divergences: list[np.ndarray] = []
        self.agree: list[np.ndarray] = []

    def add(self, exact: np.ndarray, logits: np.ndarray, targets: np.ndarray) -> None:
        found = log_softmax(logits)
        self.losses.append(-found[np.arange(len(targets)), targets])
        self.divergences.append((np.exp(exact) * (exact - found)).sum(-1))
        self.agree.append(exact.argmax(-1) == found.argmax(-1))

    def report(self) -> dict[str, float]:
        divergence = np.concatenate(self.divergences)
        return {
            "places": len(divergence),
            "perplexity": float(np.exp(np.concatenate(self.losses).mean())),
            "kl_mean": float(divergence.mean()),
            "kl_median": float(np.median(divergence)),
            "kl_99th_percent": float(np.quantile(divergence, 0.99)),
            "same_likeliest_token": float(np.concatenate(self.agree).mean()),
        }


def paired(ours: Quality, theirs: Quality) -> dict[str, tuple[float, float]]:
    """Mean difference and its standard error, place by place: below zero, ours is nearer to exact."""
    found = {}
    for key, a, b in (
        ("KL", ours.divergences, theirs.divergences),
        ("loss", ours.losses, theirs.losses),
    ):
        difference = np.concatenate(a) - np.concatenate(b)
        found[key] = (float(difference.mean()), float(difference.std() / np.sqrt(len(difference))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-python", type=Path, help="interpreter that has llama-cpp-python")
    parser.add_argument("--quick", action="store_true", help="two windows, to see that it works")
    options = parser.parse_args()

    from ayllu.settings import load_settings
    from ayllu.weights.store import open_store

    path = open_store(load_settings()).ensure(options.model).path
    windows = windows_of(path, WINDOW if options.quick else options.tokens)
    exact = exact_logits(path)
    native = {kind: native_logits(path, options.threads, kind) for kind in ("auto", "int8")}
    names = ("exact", "ayllu", "ayllu, int8 cache", "llama.cpp")
    found: dict[str, Quality] = {name: Quality() for name in names}
    peer: Iterator[np.ndarray] | None = None
    for ids in windows:
        targets = ids[WINDOW // 2 : WINDOW]
        logits = exact(ids)
        truth = log_softmax(logits)
        found["exact"].add(truth, logits, targets)
        found["ayllu"].add(truth, native["auto"](ids), targets)
        found["ayllu, int8 cache"].add(truth, native["int8"](ids), targets)
        if options.peer_python:
            peer = peer or peer_logits(options.peer_python, path, windows, options.threads, logits.shape[-1])
            found["llama.cpp"].add(truth, next(peer), targets)
        print(".", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    report: dict[str, Any] = {
        **heading("quality", "ayllu", "torch", "numpy"),
        "model": options.model,
        "window": WINDOW,
        **{name: quality.report() for name, quality in found.items() if quality.losses},
    }
    if found["llama.cpp"].losses:
        report["ayllu_minus_llama.cpp"] = paired(found["ayllu"], found["llama.cpp"])
    for name, quality in found.items():
        if quality.losses:
            told = quality.report()
            print(
                f"{name:<18} perplexity {told['perplexity']:.4f}  KL mean {told['kl_mean']:.6f} "
                f"median {told['kl_median']:.6f}  same likeliest {100 * told['same_likeliest_token']:.2f}%"
            )
    for key, (mean, error) in report.get("ayllu_minus_llama.cpp", {}).items():
        print(f"ayllu minus llama.cpp, {key}: {mean:+.6f} +- {error:.6f} (standard error, place by place)")
    print(f"written to {write_result('quality', report)}")


if __name__ == "__main__":
    main()
