"""`ayllu chat` as people use it: in a pipe, with mistakes, and on a real pseudo-terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

AYLLU = [sys.executable, "-m", "ayllu"]
MODEL = "smollm2-135m-instruct"


def _ayllu(*arguments: str, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*AYLLU, *arguments],
        input=stdin,
        capture_output=True,
        env=os.environ | environment,
        timeout=300,
        check=False,
    )


def _one_line_error(result: subprocess.CompletedProcess[bytes], code: int) -> str:
    error = result.stderr.decode()
    assert result.returncode == code, error
    assert "Traceback" not in error
    assert error.count("\n") == 1
    return error


def test_a_pipe_is_answered_once(smollm2_gguf: Path) -> None:
    result = _ayllu(
        "chat", MODEL, "--temperature", "0", "--max-tokens", "12", stdin=b"What is the capital of Japan?\n"
    )
    assert result.returncode == 0, result.stderr
    assert "Tokyo" in result.stdout.decode()


def test_a_prompt_goes_before_what_is_piped_and_json_holds_the_answer(smollm2_gguf: Path) -> None:
    text = "The meeting moved from Monday to Thursday.".encode("utf-16")
    result = _ayllu(
        "chat", str(smollm2_gguf), "-p", "Summarise this.", "--json", "--timing", "--temperature", "0",
        "--max-tokens", "8", stdin=text,
    )  # fmt: skip
    answer = json.loads(result.stdout)
    assert answer["usage"]["completion_tokens"] <= 8
    assert answer["finish_reason"] in ("stop", "length")
    assert answer["text"]
    assert "utf-16" in result.stderr.decode()
    timing = answer["timing"]
    assert 0 < timing["loaded_s"] < timing["first_token_s"]
    assert timing["load_peak_bytes"] <= 1.15 * timing["weight_bytes"]


def test_timing_is_told_after_the_answer(smollm2_gguf: Path) -> None:
    result = _ayllu("chat", MODEL, "-p", "Say hello.", "--timing", "--max-tokens", "4")
    error = result.stderr.decode()
    assert all(word in error for word in ("loaded", "first token", "prompt", "answer", "memory"))


def test_the_same_seed_gives_the_same_answer(smollm2_gguf: Path) -> None:
    options = (
        "chat",
        MODEL,
        "-p",
        "Tell me a story.",
        "--seed",
        "7",
        "--temperature",
        "1",
        "--max-tokens",
        "16",
    )
    assert _ayllu(*options).stdout == _ayllu(*options).stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("chat", "smolm2-135m-instruct", "-p", "x"), 3, "Did you mean smollm2-135m-instruct"),
        (("chat", "no/such/file.gguf", "-p", "x"), 3, "no/such/file.gguf"),
        (("chat", MODEL), 2, "nothing to answer"),
        (("chat", MODEL, "-p", "x", "--temperature", "-1"), 2, "temperature"),
        (("chat", MODEL, "-p", "x", "--device", "tpu"), 2, "device"),
        (("chat", MODEL, "-p", "x", "--dtype", "int3"), 2, "precision"),
        (("chat", MODEL, "-p", "x", "--context", "999999"), 2, "1 to 8192"),
        (("chat", MODEL, "-p", "word " * 400, "--context", "64"), 5, "context holds 64"),
        (("chat", MODEL, "-p", "x", "--image", "nothing.png"), 12, "nothing.png"),
        (("show", "preset:scoot"), 2, "Did you mean scout"),
    ],
)
def test_wrong_usage_is_one_line_with_its_exit_code(smollm2_gguf: Path, arguments, code, says) -> None:
    assert says in _one_line_error(_ayllu(*arguments), code)


def test_nothing_is_fetched_unless_asked_for(tmp_path: Path) -> None:
    error = _one_line_error(_ayllu("chat", "-p", "x", AYLLU_STORE=str(tmp_path / "empty")), 3)
    assert "ayllu pull qwen2.5-coder-1.5b-instruct" in error


def test_an_unknown_setting_in_the_environment_is_named() -> None:
    assert "Did you mean store" in _one_line_error(_ayllu("list", AYLLU_STOR="x"), 2)


def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, smollm2_gguf: Path) -> None:
    damaged = tmp_path / "model.gguf"
    damaged.write_bytes(smollm2_gguf.read_bytes()[: 1 << 20])
    error = _one_line_error(_ayllu("chat", str(damaged), "-p", "x"), 7)
    assert "model.gguf" in error


def test_help_does_not_import_torch_or_any_reader() -> None:
    code = (
        "import sys; sys.argv = ['ayllu', '--help']\n"
        "from ayllu.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'tokenizers', 'huggingface_hub', 'pydantic', 'rich', 'jinja2', 'PIL'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


READY = "\x1b[?2004h"
"""What the prompt sends when it begins to read keys (and to tell pasted text from typed)."""


class Terminal:
    """`ayllu` on a pseudo-terminal: type keys, wait for text."""

    def __init__(self, *arguments: str, state: Path) -> None:
        self.process_id, self.descriptor = pty.fork()
        if self.process_id == 0:
            # What runs the tests may have been started with Ctrl-C ignored, which children inherit.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.environ |= {"TERM": "xterm", "COLUMNS": "100", "LINES": "40", "XDG_STATE_HOME": str(state)}
            os.execv(sys.executable, [*AYLLU, *arguments])
        self.shown = ""

    def wait_for(self, text: str, seconds: float = 120) -> str:
        """Everything shown up to and including `text`; what follows stays for the next wait."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < end, f"{text!r} did not appear in: {self.shown[-2000:]!r}"
            if select.select([self.descriptor], [], [], 0.2)[0]:
                try:
                    self.shown += os.read(self.descriptor, 65536).decode("utf-8", "replace")
                except OSError:
                    raise AssertionError(f"ended without {text!r}: {self.shown[-2000:]!r}") from None
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def type(self, keys: str) -> None:
        os.write(self.descriptor, keys.encode())

    def exit_code(self, seconds: float = 60) -> int:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if select.select([self.descriptor], [], [], 0.2)[0]:
                with contextlib.suppress(OSError):
                    self.shown += os.read(self.descriptor, 65536).decode("utf-8", "replace")
            done, status = os.waitpid(self.process_id, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
        raise AssertionError(f"still running: {self.shown[-2000:]!r}")

    def enter(self, line: str) -> None:
        """Type a line once the prompt reads keys: what comes earlier can be lost between two modes."""
        self.wait_for(READY)
        self.type(line + "\r")

    def kill(self) -> None:
        try:
            os.kill(self.process_id, signal.SIGKILL)
            os.waitpid(self.process_id, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self.descriptor)


@pytest.fixture
def terminal(smollm2_gguf: Path, tmp_path: Path):
    opened = Terminal("chat", MODEL, "--temperature", "0", "--max-tokens", "400", state=tmp_path)
    yield opened
    opened.kill()


def test_a_conversation_on_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    terminal.wait_for("/help lists the commands.")
    terminal.enter("/hlep")
    terminal.wait_for("Did you mean /help?")
    terminal.enter("/set max_tokens 12")
    terminal.wait_for("max_tokens = 12")
    terminal.enter("\x1b[200~What is the capital\nof Japan?\x1b[201~")
    terminal.wait_for("Tokyo")
    saved = tmp_path / "talk.json"
    terminal.enter(f"/save {saved}")
    terminal.wait_for("Saved 2 messages")
    turns = json.loads(saved.read_text("utf-8"))["messages"]
    assert turns[0] == {"role": "user", "content": "What is the capital\nof Japan?"}
    terminal.enter("日本の首都は？")
    terminal.enter("/model")
    terminal.wait_for("context: ")
    terminal.enter("/new")
    terminal.wait_for("A new conversation.")
    terminal.enter("/exit")
    assert terminal.exit_code() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Terminal) -> None:
    terminal.wait_for("/help lists the commands.")
    terminal.enter("Write a very long story about one ship.")
    # Not in the question, which the terminal echoes: so the answer is under way.
    terminal.wait_for(" the ")
    terminal.type("\x03")
    terminal.wait_for("(stopped)")
    terminal.enter("/set max_tokens 10")
    terminal.wait_for("max_tokens = 10")
    terminal.enter("What is the capital of Japan?")
    terminal.wait_for("Tokyo")
    terminal.wait_for(READY)
    terminal.type("\x04")
    assert terminal.exit_code() == 0
