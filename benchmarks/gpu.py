"""An NVIDIA GPU: do its kernels give the oracle's answers, and how near do they come to what the device can
do?

Random weights: an 8B dense model and Llama 4 Scout, in 4 and 8 bits and bfloat16, beside transformers on the
same device, in turn. Run: python benchmarks/gpu.py (about 15 minutes; --only verify, dense or moe for a
part).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gpu_models import Driver, bytes_per_token, dense_config, random_gpu_decoder, transformers_model, unpacked
from machine import heading, write_result

if TYPE_CHECKING:
    import torch

    from ayllu.model.config import ModelConfig
    from ayllu.model.decoder import Decoder

PARTS = ("verify", "dense", "moe")
DECODED = 64
RUNS = 5
DEPTHS = (512, 4096)


def verify(device: torch.device) -> dict[str, Any]:
    """Greedy tokens of small random models, several sequences together, against the oracle on the CPU.

    In float32, where only a tie could flip a token, for weights as they are and for each packing: there the
    oracle has the unpacked weights.
    """
    from ayllu.engine.gpu_weights import PLANS, prepare
    from ayllu.model.decoder import random_decoder
    from ayllu.model.presets import nano

    small = replace(nano(), layers=nano().layers[:4], vocab_size=4096, vision=None, tie_word_embeddings=False)
    dense = replace(
        small, architecture="llama", qk_norm=False, temperature=None, experts=None,
        layers=tuple(replace(layer, chunk=None, experts=False, rotates=True) for layer in small.layers),
    )  # fmt: skip
    found: dict[str, Any] = {}
    prompts = [
        [(31 * place + 7 * number) % 4000 for place in range(40 + 700 * number)] for number in range(4)
    ]
    for name, config in (("dense", dense), ("experts", small)):
        for weights in (None, *PLANS):
            plan = None if weights is None else PLANS[weights]
            decoder = prepare(random_decoder(config, 1, std=0.05).requires_grad_(False), device, plan)
            expected = oracle_tokens(unpacked(config, decoder), prompts)
            driver = Driver(decoder, slots=len(prompts), context=4096)
            last = [driver.prefill(slot, prompt) for slot, prompt in enumerate(prompts)]
            got = [[token] for token in last]
            for _ in range(15):
                last = driver.step(last)
                for answer, token in zip(got, last, strict=True):
                    answer.append(token)
            same = sum(one == other for one, other in zip(got, expected, strict=True))
            found[f"{name} {weights or 'float32'}"] = f"{same} of {len(prompts)} answers equal the oracle's"
            print(f"verify {name:<8} {weights or 'float32':<9} {same}/{len(prompts)} answers equal")
    return found


def oracle_tokens(decoder: Decoder, prompts: list[list[int]]) -> list[list[int]]:
    """What the oracle answers."""
    from ayllu.engine.oracle import Oracle
    from ayllu.engine.parameters import Sampling

    oracle = Oracle(decoder, 4096)
    return [list(oracle.generate(prompt, Sampling(temperature=0), max_new_tokens=16)) for prompt in prompts]


def ceilings(device: torch.device) -> dict[str, float]:
    """Bytes per second of a copy, read and written counted, and FLOP/s of a bfloat16 product."""
    import torch

    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = min(timed(lambda: target.copy_(source), device) for _ in range(10))
    a, b = torch.randn(2, 8192, 8192, device=device).bfloat16()
    multiplied = min(timed(lambda: a @ b, device) for _ in range(10))
    return {"bytes_per_s": 2 * source.nbytes / copied, "flops": 2 * 8192**3 / multiplied}


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has done it."""
    import torch

    torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure_ours(
    decoder: Decoder, device: torch.device, slots: int, ceiling: dict[str, float]
) -> dict[str, Any]:
    """Prefill and decode at each depth; a step's time includes drawing the likeliest token on the host."""
    import torch

    driver = Driver(decoder, slots=slots, context=max(DEPTHS) + 2 * DECODED)
    found: dict[str, Any] = {}
    for depth in DEPTHS:
        prefills, steps = [], []
        for _ in range(RUNS + 1):
            prompts = torch.randint(0, 32_000, (slots, depth)).tolist()
            begin = time.perf_counter()
            last = [driver.prefill(slot, prompt) for slot, prompt in enumerate(prompts)]
            prefills.append(time.perf_counter() - begin)
            last = driver.step(last)
            begin = time.perf_counter()
            for _ in range(DECODED):
                last = driver.step(last)
            steps.append((time.perf_counter() - begin) / DECODED)
        found[str(depth)] = rates(decoder, depth, slots, prefills[1:], steps[1:], ceiling)
    return found


def rates(
    decoder: Decoder,
    depth: int,
    slots: int,
    prefills: list[float],
    steps: list[float],
    ceiling: dict[str, float],
) -> dict[str, float]:
    prefill, step = statistics.median(prefills), statistics.median(steps)
    config = decoder.config
    cached = slots * config.kv_bytes(depth)
    # Of the head, a prompt needs its last row only.
    head = 2 * config.vocab_size * config.hidden_size
    each = sum(config.flops_per_token(place) - head for place in range(0, depth, 64)) * 64
    flops = slots * (each + head)
    return {
        "prefill_tokens_per_s": slots * depth / prefill,
        "prefill_of_matrix_ceiling": flops / prefill / ceiling["flops"],
        "decode_tokens_per_s": slots / step,
        "decode_step_ms": 1e3 * step,
        "decode_step_ms_min": 1e3 * min(steps),
        "decode_step_ms_max": 1e3 * max(steps),
        # For one sequence: several may choose several experts.
        "decode_of_bandwidth_ceiling": (bytes_per_token(decoder) + cached) / step / ceiling["bytes_per_s"],
    }


def measure_transformers(model: Any, device: torch.device, slots: int) -> dict[str, Any]:
    """The same with `generate`: its own cache, and the static one, which it compiles where it can."""
    import torch

    found: dict[str, Any] = {}
    for cache in ("dynamic", "static"):
        for depth in DEPTHS:
            try:
                found[f"{cache} {depth}"] = _generate(model, device, slots, depth, cache)
            except Exception as error:
                found[f"{cache} {depth}"] = f"not measured: {type(error).__name__}: {str(error)[:200]}"
                torch.cuda.empty_cache()
    return found


def _generate(model: Any, device: torch.device, slots: int, depth: int, cache: str) -> dict[str, float]:
    import torch

    def seconds(count: int) -> float:
        ids = torch.randint(0, 32_000, (slots, depth), device=device)
        return timed(
            lambda: model.generate(
                ids, attention_mask=torch.ones_like(ids), min_new_tokens=count, max_new_tokens=count,
                do_sample=False, cache_implementation=cache, pad_token_id=0,
            ),
            device,
        )  # fmt: skip

    for count in (1, DECODED + 1):
        seconds(count)
    first = statistics.median(seconds(1) for _ in range(RUNS))
    whole = statistics.median(seconds(DECODED + 1) for _ in range(RUNS))
    return {
        "prefill_tokens_per_s": slots * depth / first,
        "decode_tokens_per_s": slots * DECODED / (whole - first),
    }


def compare(
    config: ModelConfig, choices: tuple[str | None, ...], device: torch.device, ceiling: dict[str, float], *,
    with_transformers: bool,
) -> dict[str, Any]:  # fmt: skip
    """One shape in several precisions, alone and eight sequences together, then transformers."""
    import torch

    from ayllu.engine.gpu_weights import PLANS

    found: dict[str, Any] = {"parameters": config.text_parameters, "layers": config.num_hidden_layers}
    for weights in choices:
        decoder = random_gpu_decoder(config, None if weights is None else PLANS[weights], device)
        for slots in (1, 8):
            name = f"ayllu {weights or 'bfloat16'} x{slots}"
            found[name] = measure_ours(decoder, device, slots, ceiling)
            say(name, found[name])
        del decoder
        torch.cuda.empty_cache()
    if with_transformers:
        model = transformers_model(config, device)
        for slots in (1, 8):
            name = f"transformers bfloat16 x{slots}"
            found[name] = measure_transformers(model, device, slots)
            say(name, found[name])
        del model
        torch.cuda.empty_cache()
    return found


def say(name: str, figures: dict[str, Any]) -> None:
    for depth, row in figures.items():
        text = row if isinstance(row, str) else "  ".join(f"{key} {value:.4g}" for key, value in row.items())
        print(f"{name:<24} {depth:>12}  {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; may be given several times")
    parser.add_argument(
        "--layers", type=int, default=4, help="layers of Scout beside transformers (bfloat16)"
    )
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.exit("There is no CUDA device here: nothing was verified and nothing was measured.")
    from ayllu.kernels.registry import has_triton
    from ayllu.model.presets import scout

    if not has_triton():
        sys.exit("Triton is not installed: pip install 'ayllu[gpu]'. Nothing was measured.")
    device = torch.device("cuda", torch.cuda.current_device())
    torch.set_grad_enabled(False)
    parts = options.only or PARTS
    report: dict[str, Any] = heading("gpu", "ayllu", "torch", "triton", "transformers", "numpy")
    report["gpu"] = {
        "name": torch.cuda.get_device_name(device),
        "capability": torch.cuda.get_device_capability(device),
        "memory_bytes": torch.cuda.mem_get_info(device)[1],
    }
    if "verify" in parts:
        report["verified"] = verify(device)
    ceiling = report["ceilings"] = ceilings(device)
    print(f"copy {ceiling['bytes_per_s'] / 1e12:.2f} TB/s, bfloat16 {ceiling['flops'] / 1e12:.0f} TFLOP/s")
    if "dense" in parts:
        choices = (None, "int8", "fp8", "int4", "int4-128")
        report["dense 8B"] = compare(dense_config(), choices, device, ceiling, with_transformers=True)
    if "moe" in parts:
        few = replace(scout(), layers=scout().layers[: options.layers], vision=None)
        report["scout, few layers"] = compare(few, (None, "int4"), device, ceiling, with_transformers=True)
        whole = replace(scout(), vision=None)
        report["scout"] = compare(whole, ("int4",), device, ceiling, with_transformers=False)
    print(f"written to {write_result('gpu', report)}")


if __name__ == "__main__":
    main()
