"""Tool-call accuracy on simple BFCL cases, decoding constrained: ayllu beside llama.cpp, same file and cases.

Both must call the one function on offer; a case counts when name and arguments are among the accepted ones,
by BFCL's own rules for values. llama.cpp leaves `tool_choice: required` unenforced under Qwen's template (it
writes fenced JSON and never stops), so it gets the same prompt, token by token, and the call's JSON schema.
The cases come out of the `bfcl-eval` wheel, whose hash is checked; nothing of it is installed or run.
Run: python benchmarks/tool_calls.py
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from machine import RESULTS, heading, write_result

WHEEL = "bfcl-eval==2026.3.23"
WHEEL_SHA256 = "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a"
CASES = "bfcl_eval/data/BFCL_v4_simple_python.json"
ANSWERS = "bfcl_eval/data/possible_answer/BFCL_v4_simple_python.json"
NEW_TOKENS = 200

PEER = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.port = 0
params.n_parallel = 4
params.n_ctx = 4 * 4096
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
params.use_jinja = True
params.warmup = False
server = xllamacpp.Server(params)
print("listening on " + server.listening_address, flush=True)
sys.stdin.read()
"""


def fetch_cases(count: int) -> list[dict[str, Any]]:
    """The first `count` cases: id, messages, tools as OpenAI writes them, accepted calls."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL],
            check=True,
        )
        (wheel,) = Path(folder).glob("*.whl")
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
            sys.exit(f"{wheel.name} is not the file this benchmark was made with: no result.")
        with zipfile.ZipFile(wheel) as archive:
            cases, answers = (
                [json.loads(line) for line in archive.read(name).decode().splitlines()[:count]]
                for name in (CASES, ANSWERS)
            )
    return [
        {"id": case["id"], "messages": case["question"][0], "tools": case["function"], "truth": truth}
        for case, answer in zip(cases, answers, strict=True)
        for truth in (answer["ground_truth"],)
    ]


def request_of(case: dict[str, Any]) -> Any:
    """The same request for both engines. Function names without dots, which OpenAI's rules exclude."""
    from ayllu.chat.messages import Message, ToolDefinition
    from ayllu.engine.parameters import Sampling
    from ayllu.engine.requests import ChatPrompt, GenerateRequest, ToolUse
    from ayllu.engine.tool_parameters import normalised_parameters

    tools = tuple(
        ToolDefinition(
            tool["name"].replace(".", "_"), tool["description"], normalised_parameters(tool["parameters"])
        )
        for tool in case["tools"]
    )
    return GenerateRequest(
        prompt=ChatPrompt(tuple(Message(m["role"], m["content"]) for m in case["messages"])),
        sampling=Sampling(temperature=0, top_p=1),
        max_new_tokens=NEW_TOKENS,
        tool_use=ToolUse(tools, "required", parallel=False),
    )


def tool_call_of(reply: Any) -> Any:
    """The call an answer made, None without one."""
    "".join(reply)
    return reply.tool_calls[0] if reply.tool_calls else None


def schema_request_of(case: dict[str, Any], chat_format: Any) -> Any:
    """The same prompt as tokens, the answer held to the JSON of a call: what llama.cpp does constrain."""
    from ayllu.engine.requests import JsonStructure, TokenPrompt

    request = request_of(case)
    tools = request.tool_use.tools
    prompt = chat_format.render(request.prompt.messages, tools)
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "arguments": tool.parameters},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return replace(
        request,
        prompt=TokenPrompt(tuple(prompt.token_ids)),
        tool_use=None,
        structure=JsonStructure(calls[0] if len(calls) == 1 else {"anyOf": calls}),
    )


def json_call_of(reply: Any) -> Any:
    """The call in an answer that is its JSON; None for one that was cut."""
    from ayllu.chat.messages import ToolCall

    try:
        value = json.loads("".join(reply))
    except ValueError:
        return None
    return ToolCall(value["name"], value["arguments"])


def is_right(call: Any, truth: list[dict[str, Any]]) -> bool:
    """Whether a call is accepted: every argument among its values, where "" allows leaving it out."""
    if call is None:
        return False
    for accepted in truth:
        ((name, arguments),) = accepted.items()
        if call.name != name.replace(".", "_") or set(call.arguments) - set(arguments):
            continue
        if all(
            any(same(call.arguments[key], value) for value in values)
            if key in call.arguments
            else "" in values
            for key, values in arguments.items()
        ):
            return True
    return False


def same(found: Any, value: Any) -> bool:
    """Equal as BFCL sees it: strings without case, spaces and punctuation, lists and objects by parts."""
    if isinstance(found, str) and isinstance(value, str):
        return plain(found) == plain(value)
    if isinstance(found, list) and isinstance(value, list):
        return len(found) == len(value) and all(map(same, found, value))
    if isinstance(found, dict) and isinstance(value, dict):
        return set(found) <= set(value) and all(
            any(same(found[key], one) for one in (part if isinstance(part, list) else [part]))
            if key in found
            else isinstance(part, list) and "" in part
            for key, part in value.items()
        )
    return (type(found) is not bool and type(value) is not bool and found == value) or found is value


def plain(text: str) -> str:
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')


def answer_all(
    engine: Any,
    cases: list[dict[str, Any]],
    together: int,
    request: Callable[[dict[str, Any]], Any] = request_of,
    call_of: Callable[[Any], Any] = tool_call_of,
) -> dict[str, Any]:
    """Ask `engine` all cases, some at a time: which are right, which failed and how long it took."""
    from ayllu.engine.reply import Reply
    from ayllu.errors import AylluError

    results: dict[str, dict[str, Any]] = {}
    waiting = iter(cases)
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                case = next(waiting, None)
            if case is None:
                return
            call, error = None, ""
            try:
                call = call_of(Reply(engine.submit(request(case))))
            except AylluError as failure:
                error = str(failure)
            results[case["id"]] = {
                "right": is_right(call, case["truth"]),
                "call": None if call is None else {"name": call.name, "arguments": call.arguments},
                **({"error": error} if error else {}),
            }
            print(".", end="", flush=True)

    begin = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(together)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print()
    return {
        "right": sum(result["right"] for result in results.values()),
        "without_a_call": sum(result["call"] is None for result in results.values()),
        "seconds": round(time.perf_counter() - begin, 1),
        "cases": {case["id"]: results[case["id"]] for case in cases},
    }


@contextmanager
def llama_cpp(model: Path) -> Iterator[Any]:
    """llama.cpp's server with this file, spoken to by the remote engine."""
    from ayllu.engine.remote.endpoint import RemoteEndpoint
    from ayllu.engine.remote.engine import RemoteEngine

    process = subprocess.Popen(
        [sys.executable, "-c", PEER, str(model)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        address = next(line for line in process.stdout if line.startswith("listening on "))
        engine = RemoteEngine(
            RemoteEndpoint(base_url=address.removeprefix("listening on ").strip(), model=model.stem,
                           dialect="llama.cpp", read_timeout_s=3600)
        )  # fmt: skip
        try:
            yield engine
        finally:
            engine.close()
    finally:
        process.kill()
        process.communicate()


def main() -> None:
    from ayllu.engine.model_files import open_model_files
    from ayllu.engine.native import open_engine
    from ayllu.engine.options import EngineOptions
    from ayllu.settings import load_settings
    from ayllu.weights.store import open_store

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--only", choices=("ayllu", "llama.cpp"), help="one of them, into the day's result")
    options = parser.parse_args()
    cases = fetch_cases(options.cases)
    path = open_store(load_settings()).ensure(options.model).path
    report: dict[str, Any] = {
        **heading("tool_calls", "ayllu", "torch", "llguidance", "xllamacpp"),
        "data": WHEEL,
        "model": options.model,
        "count": len(cases),
    }
    file = RESULTS / f"tool_calls-{report['date']}.json"
    if options.only and file.is_file():
        earlier = json.loads(file.read_text("utf-8"))
        if (earlier["model"], earlier["count"]) == (report["model"], report["count"]):
            report |= {name: earlier[name] for name in ("ayllu", "llama.cpp") if name in earlier}
    if options.only in (None, "ayllu"):
        with open_engine(path, EngineOptions(context=4096)) as engine:
            report["ayllu"] = answer_all(engine, cases, 8)
        write_result("tool_calls", report)
    if options.only in (None, "llama.cpp"):
        chat_format = open_model_files(path).chat_format
        with llama_cpp(path) as engine:
            report["llama.cpp"] = answer_all(
                engine, cases, 4, lambda case: schema_request_of(case, chat_format), json_call_of
            )
    for name in ("ayllu", "llama.cpp"):
        if name in report:
            found = report[name]
            print(
                f"{name:<10} {found['right']} of {len(cases)} right, {found['without_a_call']} without a call"
            )
    print(f"written to {write_result('tool_calls', report)}")


if __name__ == "__main__":
    main()
