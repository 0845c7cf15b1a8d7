"""Eight clients at once: ayllu beside llama.cpp's server on the same file, and on its best 4-bit format.

Every client sends a prompt of its own and reads 128 tokens; also one client alone, for what batching gives.
The Q4_0 file is made by `llama-quantize --allow-requantize FILE Q4_0.gguf Q4_0`. Run:
python benchmarks/concurrency.py --llama-cpp FOLDER --peer-file Q4_0.gguf
"""

from __future__ import annotations

import argparse
from pathlib import Path

from contests import add_options, rule_of, run_and_write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--llama-cpp", type=Path, help="folder of llama.cpp's programs (default: PATH's)")
    parser.add_argument(
        "--peer-file", type=Path, action="append", default=[], help="the model in another format"
    )
    add_options(parser)
    options = parser.parse_args()

    from ayllu import __version__
    from ayllu.cli.bench.peers import LLAMA_CPP, find_peers, ourselves
    from ayllu.cli.bench.plan import BenchPlan
    from ayllu.settings import load_settings
    from ayllu.weights.store import open_store

    path = open_store(load_settings()).ensure(options.model).path
    plan = BenchPlan(
        threads=options.threads,
        prefill=(),
        depths=(),
        decode=32 if options.quick else 128,
        clients=(1, options.clients),
        rounds=options.rounds,
    )
    present, absent = find_peers(
        [LLAMA_CPP], path, llama_cpp=options.llama_cpp, other_files=options.peer_file
    )
    contenders = [ourselves(__version__), *present]
    result = run_and_write("concurrency", path, plan, contenders, absent, rule_of(options))
    ours = result["contenders"]["ayllu"]["summary"]
    together, alone = (ours[f"clients_{count}"]["median"] for count in (options.clients, 1))
    print(f"{options.clients} clients of ayllu together: {together / alone:.2f} x one")


if __name__ == "__main__":
    main()
