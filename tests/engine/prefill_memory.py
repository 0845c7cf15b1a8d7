"""Reads a long prompt with a random `nano` in a process of its own, and prints what that cost as JSON.

python -m tests.engine.prefill_memory TOKENS
"""

from __future__ import annotations

import json
import sys

import torch

from ayllu import process
from ayllu.engine.parameters import Sampling
from ayllu.engine.prepared import PreparedRequest
from ayllu.model.decoder import random_decoder
from ayllu.model.presets import nano
from tests.engine.cores import end_of, run, small_core


def main(tokens: int) -> None:
    decoder = random_decoder(nano(), 1, dtype=torch.bfloat16).requires_grad_(False)
    weights = process.resident_bytes()
    core = small_core(
        decoder,
        slots=1,
        step_tokens=512,
        blocks={"global": -(-(tokens + 4) // 16), "chunk 2048": 2048 // 16},
        block_tokens=16,
        context=tokens + 4,
    )
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 30_000, (tokens,), generator=generator).tolist()
    core.submit(
        PreparedRequest(id="long", token_ids=prompt, max_new_tokens=2, sampling=Sampling(temperature=0))
    )
    said = run(core)
    print(
        json.dumps(
            {
                "new_tokens": end_of(said, "long").new_tokens,
                "peak_above_weights": process.peak_resident_bytes() - weights,
                "weight_bytes": sum(parameter.nbytes for parameter in decoder.parameters()),
            }
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
