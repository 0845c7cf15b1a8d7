"""`ayllu batch` as people use it: run, interrupted, killed, run again; on a terminal and in a pipe."""

from __future__ import annotations

import base64
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from ayllu.cli import opening
from ayllu.cli.main import main
from tests.engine.scripted_engine import ScriptedEngine
from tests.engine.test_batch_file import request, write

ROOT = Path(__file__).parent.parent.parent
MODEL = "smollm2-135m-instruct"

# `ayllu` with a scripted engine that notes what is asked of it, and never answers more than HOLD requests.
SCRIPTED = """
import itertools, os, signal, sys, time, types
from pathlib import Path
from tests.engine.scripted_engine import ScriptedEngine, prompt_text, shout
from ayllu.cli import opening

# What runs the tests may itself have been started with Ctrl-C ignored, which children inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
started = itertools.count(1)

def script(asked):
    with open(os.environ["ASKED"], "a") as file:
        file.write(prompt_text(asked) + "\\n")
    time.sleep(float(os.environ["PAUSE"]) if next(started) <= int(os.environ["HOLD"]) else 3600)
    return shout(asked)

native = types.ModuleType("ayllu.engine.native")
native.open_engine = lambda path, options, progress, name: ScriptedEngine(script, slots=2)
sys.modules["ayllu.engine.native"] = native
opening.find_or_pull = lambda *_: types.SimpleNamespace(name="tiny", path=Path("tiny"))
sys.argv = ["ayllu", *sys.argv[1:]]
from ayllu.cli.main import main
main()
"""


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def ids(path: Path) -> list[str]:
    return [record["custom_id"] for record in records(path)]


class Here:
    """`ayllu` in this process, with a scripted engine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine = ScriptedEngine()
        self.asked_for: list[object] = []
        self.options: object = None
        self._patch = monkeypatch

        def open_engine(path: Path, options: object, progress: object, name: str) -> ScriptedEngine:
            self.options = options
            return self.engine

        native = types.ModuleType("ayllu.engine.native")
        native.open_engine = open_engine
        monkeypatch.setitem(sys.modules, "ayllu.engine.native", native)

        def find(model: str | None, pull: bool, settings: object) -> object:
            self.asked_for.append(model)
            return types.SimpleNamespace(name=model or "tiny", path=Path("tiny"))

        monkeypatch.setattr(opening, "find_or_pull", find)

    def ayllu(self, *arguments: object) -> int:
        self._patch.setattr(sys, "argv", ["ayllu", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        code = caught.value.code
        return code if isinstance(code, int) else 0


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    return Here(monkeypatch)


def test_a_batch_is_answered_beside_its_requests(
    here: Here, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", request("a", "hi"), request("b", "ho"))
    assert here.ayllu("batch", source) == 0
    assert sorted(ids(tmp_path / "in.output.jsonl")) == ["a", "b"]
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("2 requests answered. 4 tokens read, 4 written in ")
    assert shown.err.count("\n") == 1
    assert here.engine.closed


def test_running_again_computes_nothing_again(
    here: Here, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", request("a"))
    assert here.ayllu("batch", source, "--output", tmp_path / "out.jsonl") == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    capsys.readouterr()
    here.asked_for.clear()
    assert here.ayllu("batch", source, "-o", tmp_path / "out.jsonl") == 0
    assert "1 request, all answered already" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert here.asked_for == [], "the model was opened for nothing"


def test_more_requests_can_be_added(here: Here, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.jsonl", request("a"))
    here.ayllu("batch", source)
    write(source, request("a"), request("b"))
    here.engine = ScriptedEngine()
    assert here.ayllu("batch", source) == 0
    assert "1 request answered; 1 had their answers already." in capsys.readouterr().err
    assert ids(tmp_path / "in.output.jsonl") == ["a", "b"]


def test_errors_in_lines_show_in_the_exit_code(
    here: Here, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", b"oops\n", request("b"))
    assert here.ayllu("batch", source) == 1
    assert "2 requests answered, 1 of them with an error" in capsys.readouterr().err
    statuses = {record["custom_id"]: record["response"]["status_code"] for record in records(
        tmp_path / "in.output.jsonl"
    )}  # fmt: skip
    assert statuses == {None: 400, "b": 200}


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("none.jsonl",), 2, "cannot be read"),
        (("twice.jsonl",), 2, "Lines 1 and 2"),
        (("bad.jsonl", "--strict"), 2, "Line 1 of bad.jsonl"),
        (("good.jsonl", "-o", "good.jsonl"), 2, "the input itself"),
        (("good.jsonl", "--adapter", "x"), 2, "NAME=FOLDER"),
        (("good.jsonl", "--remote-model", "x"), 2, "--remote-model needs --endpoint"),
        (("good.jsonl", "--dialect", "vllm"), 2, "--dialect needs --endpoint"),
        (("good.jsonl", "--endpoint", "https://x", "--context", "9"), 2, "--context has no meaning"),
        (("good.jsonl", "--endpoint", "https://x"), 2, "--remote-model NAME"),
        (("good.jsonl", "--endpoint", "ftp://x", "--remote-model", "m"), 2, "http"),
        (("good.jsonl", "--endpoint", "https://x", "--remote-model", "m", "--dialect", "vlm"), 2, "vllm"),
        (("good.jsonl", "--dtype", "float32", "--device", "cpu", "-o", "no/out.jsonl"), 2, "no folder"),
    ],
)
def test_wrong_usage_is_one_line_with_its_exit_code(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, arguments, code: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "good.jsonl", request("a"))
    write(tmp_path / "twice.jsonl", request("a"), request("a"))
    write(tmp_path / "bad.jsonl", b"oops\n")
    assert here.ayllu("batch", *arguments) == code
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_an_answered_request_that_changed_is_refused_unless_forced(
    here: Here, tmp_path: Path, capsys
) -> None:
    source = write(tmp_path / "in.jsonl", request("a", "hi"))
    here.ayllu("batch", source)
    write(source, request("a", "something else"), request("b"))
    here.engine = ScriptedEngine()
    assert here.ayllu("batch", source) == 2
    assert "--force" in capsys.readouterr().err
    assert here.ayllu("batch", source, "--force") == 0
    assert ids(tmp_path / "in.output.jsonl") == ["a", "b"]


def _for(model: str | None) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "x"}]}
    return body if model is None else {**body, "model": model}


@pytest.mark.parametrize(
    ("models", "arguments", "opened", "failed"),
    [
        (["m1", "m1", None], (), "m1", 0),
        ([None, None], (), None, 0),
        (["m1", "m2"], (), None, 2),
        (["m1", "m2"], ("--model", "m2"), "m2", 1),
        (["m1", "lora"], ("--adapter", "lora=."), "m1", 0),
    ],
)
def test_which_model_is_opened(here: Here, tmp_path: Path, models, arguments, opened, failed: int) -> None:
    lines = [request(f"r{number}", body=_for(model)) for number, model in enumerate(models)]
    source = write(tmp_path / "in.jsonl", *lines)
    here.ayllu("batch", source, *arguments)
    assert here.asked_for == [opened]
    answers = records(tmp_path / "in.output.jsonl")
    assert sum(record["response"]["status_code"] == 404 for record in answers) == failed


def test_adapters_are_loaded_first(here: Here, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", request("a", body=_for("lora")))
    assert here.ayllu("batch", source, "--adapter", f"lora={tmp_path}") == 0
    assert here.engine.loaded == {"lora": tmp_path}


def test_options_reach_the_engine(here: Here, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", request("a"))
    arguments = ("--slots", 3, "--context", 99, "--deterministic", "--device", "cpu", "--dtype", "float32")
    assert here.ayllu("batch", source, *arguments) == 0
    options = here.options
    assert (options.slots, options.context, options.deterministic) == (3, 99, True)
    assert (options.device, options.dtype) == ("cpu", "float32")


def test_a_server_is_reached_with_the_key_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ayllu.engine.remote import engine as remote

    given = []

    class Remote(ScriptedEngine):
        def __init__(self, endpoint: remote.RemoteEndpoint) -> None:
            given.append(endpoint)
            super().__init__()

    monkeypatch.setattr(remote, "RemoteEngine", Remote)
    monkeypatch.setenv("AYLLU_API_KEY", "sk-secret")
    source = write(tmp_path / "in.jsonl", request("a", body=_for("big")))
    monkeypatch.setattr(
        sys, "argv", ["ayllu", "batch", str(source), "--endpoint", "https://gpu", "--dialect", "vllm"]
    )
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code in (None, 0)
    (endpoint,) = given
    assert (endpoint.model, endpoint.dialect, endpoint.api_key) == ("big", "vllm", "sk-secret")
    assert "sk-secret" not in repr(endpoint)


def _start(
    source: Path, folder: Path, pause: float = 0.0, hold: int = 10_000, **streams: Any
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPTED, "batch", str(source), "-o", str(folder / "out.jsonl")],
        cwd=ROOT,
        env=os.environ | {"ASKED": str(folder / "asked"), "PAUSE": str(pause), "HOLD": str(hold)},
        **streams,
    )


def _wait_for_lines(process: subprocess.Popen[bytes], path: Path, count: int) -> None:
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < count):
        time.sleep(0.005)


def test_a_killed_batch_goes_on_where_it_was(tmp_path: Path) -> None:
    names = [f"r{number}" for number in range(40)]
    source = write(tmp_path / "in.jsonl", *(request(name, name) for name in names))
    target = tmp_path / "out.jsonl"
    for lines in (5, 12, 25):
        before = target.read_bytes().count(b"\n") if target.exists() else 0
        process = _start(source, tmp_path, hold=lines - before + 2)
        _wait_for_lines(process, target, lines)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert lines <= target.read_bytes().count(b"\n") < len(names)
    # As if the last kill had come in mid-write.
    target.write_bytes(target.read_bytes()[:-7])
    assert _start(source, tmp_path).wait() == 0
    assert sorted(ids(target)) == sorted(names)
    asked = (tmp_path / "asked").read_text().splitlines()
    # A kill loses what was begun and not written: four at most here, two held and two that were let through.
    assert set(asked) == set(names)
    assert len(asked) <= len(names) + 3 * 4 + 1


def test_ctrl_c_stops_and_says_how_to_go_on(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", *(request(f"r{number}") for number in range(200)))
    process = _start(source, tmp_path, hold=7, stderr=subprocess.PIPE)
    _wait_for_lines(process, tmp_path / "out.jsonl", 5)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130
    text = error.decode()
    assert "Traceback" not in text
    assert text.startswith("Stopped: ") and " of 200 requests answered." in text
    assert "The same command goes on from here." in text
    answered = len(records(tmp_path / "out.jsonl"))
    # The signal may come between an answer and its being counted.
    assert any(f"Stopped: {count} of 200" in text for count in (answered, answered - 1))
    assert _start(source, tmp_path).wait() == 0
    assert len(set(ids(tmp_path / "out.jsonl"))) == 200


def test_a_terminal_shows_the_plan_and_what_is_going_on(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", *(request(f"r{number}") for number in range(30)))
    ours, theirs = pty.openpty()
    process = _start(source, tmp_path, 0.02, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert process.wait() == 0
    text = shown.decode()
    assert "device: cpu" in text
    assert "/30" in text and "0 failed" in text and "tokens/s" in text
    assert "30 requests answered." in text


def test_a_batch_through_a_real_model(smollm2_gguf: Path, tmp_path: Path) -> None:
    question = {"role": "user", "content": "What is the capital of Japan?"}
    chat = {"model": MODEL, "messages": [question], "temperature": 0, "max_tokens": 12}
    lines = [
        request("chat", body={**chat, "logprobs": True, "top_logprobs": 2}),
        request("again", body=chat),
        request(
            "completion",
            url="/v1/completions",
            body={
                "prompt": ["The capital of France is", "The capital of Italy is"], "temperature": 0,
                "max_tokens": 3, "echo": True, "logprobs": 1,
            },
        ),
        request("json", body={**chat, "response_format": {"type": "json_object"}, "max_tokens": 40}),
        request("long", body={**chat, "messages": [{"role": "user", "content": "word " * 400}]}),
        request("field", body={**chat, "temprature": 0}),
    ]  # fmt: skip
    source = write(tmp_path / "in.jsonl", *lines)
    result = subprocess.run(
        [sys.executable, "-m", "ayllu", "batch", str(source), "--context", "256", "--slots", "4"],
        capture_output=True,
        check=False,
    )
    assert result.returncode == 1, result.stderr.decode()
    answers = {record["custom_id"]: record["response"] for record in records(tmp_path / "in.output.jsonl")}
    assert sorted(answers) == ["again", "chat", "completion", "field", "json", "long"]
    first = answers["chat"]["body"]["choices"][0]
    assert "Tokyo" in first["message"]["content"]
    assert len(first["logprobs"]["content"][0]["top_logprobs"]) == 2
    assert answers["again"]["body"]["choices"][0]["message"] == first["message"]
    for choice, prompt in zip(answers["completion"]["body"]["choices"], ("France", "Italy"), strict=True):
        assert choice["text"].startswith(f"The capital of {prompt} is")
        logprobs = choice["logprobs"]
        assert logprobs["token_logprobs"][0] is None
        assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
        assert "".join(logprobs["tokens"]) == choice["text"]
    assert answers["long"]["status_code"] == 400
    assert answers["long"]["body"]["error"]["code"] == "context_length_exceeded"
    assert answers["field"]["body"]["error"]["param"] == "temprature"
    if answers["json"]["body"]["choices"][0]["finish_reason"] == "stop":
        assert isinstance(json.loads(answers["json"]["body"]["choices"][0]["message"]["content"]), dict)


def test_a_batch_of_embeddings_through_a_real_model(minilm_folder: Path, tmp_path: Path) -> None:
    texts = ["A llama grazes.", "Alpacas eat grass.", "The stock market fell."]
    source = write(
        tmp_path / "in.jsonl",
        request("floats", url="/v1/embeddings", body={"input": texts}),
        request("base64", url="/v1/embeddings", body={"input": texts, "encoding_format": "base64"}),
        request("chat"),
    )
    result = subprocess.run(
        [sys.executable, "-m", "ayllu", "batch", str(source), "--model", str(minilm_folder)],
        capture_output=True,
        check=False,
    )
    assert result.returncode == 1, result.stderr.decode()
    answers = {record["custom_id"]: record["response"] for record in records(tmp_path / "in.output.jsonl")}
    vectors = [item["embedding"] for item in answers["floats"]["body"]["data"]]
    animals, markets = (sum(a * b for a, b in zip(vectors[0], vectors[n], strict=True)) for n in (1, 2))
    assert animals > markets + 0.2
    for item, vector in zip(answers["base64"]["body"]["data"], vectors, strict=True):
        packed = base64.b64decode(item["embedding"])
        assert struct.unpack(f"<{len(vector)}f", packed) == pytest.approx(vector)
    assert answers["chat"]["status_code"] == 400
