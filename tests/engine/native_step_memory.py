"""One step of the native runner in a process of its own: what it took beside weights and cache, as JSON.

python -m tests.engine.native_step_memory FOLDER SLOTS ROWS START THREADS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from ayllu import process
from ayllu.engine.layer_groups import layer_groups
from ayllu.engine.native_runner import native_decoder
from ayllu.engine.packed_weights import pack_weights
from ayllu.kernels.native.decoder import NativePiece
from ayllu.weights.checkpoint import open_checkpoint

BLOCK_TOKENS = 16


def main(folder: str, slots: int, rows: int, start: int, threads: int) -> None:
    checkpoint = open_checkpoint(Path(folder))
    groups = layer_groups(checkpoint.config)
    weights = pack_weights(checkpoint, threads=threads)
    decoder = native_decoder(checkpoint.config, weights, groups, threads=threads)
    counts = [-(-group.held_tokens(start + rows) // BLOCK_TOKENS) for group in groups]
    decoder.make_cache([slots * count for count in counts], BLOCK_TOKENS)
    tables = [
        [np.arange(slot * count, (slot + 1) * count, dtype=np.int32) for count in counts]
        for slot in range(slots)
    ]
    tokens = np.ones(rows, np.int32)
    # The pages of the cache that the step begins to write, which may be huge.
    decoder.forward([NativePiece(tokens[:1], start, table) for table in tables])
    before = process.resident_bytes()
    hidden = decoder.forward([NativePiece(tokens, start, table) for table in tables])
    decoder.logits([hidden[0]])
    # What a step takes is kept for the next one.
    taken, written = process.resident_bytes() - before, decoder.cache_bytes * rows // (start + rows)
    print(json.dumps({"taken": taken, "written": written}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
