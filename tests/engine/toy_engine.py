"""Native engines whose process runs the toy core: real processes, sockets and signals, no weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from ayllu.chat.tokenizer import load_tokenizer
from ayllu.engine.events import Event, TextDelta
from ayllu.engine.native import NativeEngine, open_engine
from ayllu.engine.options import EngineOptions
from ayllu.engine.requests import GenerateRequest, TextPrompt
from ayllu.engine.supervisor import RestartPolicy
from ayllu.weights.hf_save import save_folder
from tests.chat.small_vocabularies import write_model_folder
from tests.model.tiny import tiny_llama
from tests.weights.small_checkpoints import random_checkpoint

TOY_WORKER = (sys.executable, "-P", str(Path(__file__).with_name("toy_core.py")))

PATIENT = RestartPolicy(max_crashes=1_000_000, first_delay_s=0.01, longest_delay_s=0.01)
"""For tests of anything but crash loops."""


@cache
def _model_files() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="ayllu-toy-"))
    tokenizer = load_tokenizer(write_model_folder(folder / "vocabulary"))
    config = dataclasses.replace(tiny_llama(), vocab_size=tokenizer.vocab_size)
    save_folder(random_checkpoint(config, seed=4), folder / "model")
    config_json = (folder / "model" / "config.json").read_bytes()
    write_model_folder(folder / "model")
    (folder / "model" / "config.json").write_bytes(config_json)
    return folder / "model"


def toy_folder(folder: Path, **settings: Any) -> Path:
    """A model folder that the front can open, with the toy's settings in it."""
    if not folder.exists():
        shutil.copytree(_model_files(), folder)
    tokenizer = load_tokenizer(folder)
    settings = {"vocab_size": tokenizer.vocab_size} | settings
    (folder / "toy.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def open_toy(
    folder: Path, options: EngineOptions | None = None, policy: RestartPolicy = PATIENT, **more: Any
) -> NativeEngine:
    return open_engine(folder, options, worker_command=TOY_WORKER, restart_policy=policy, **more)


def ask(new_tokens: int = 3, **more: Any) -> GenerateRequest:
    return GenerateRequest(prompt=TextPrompt("hello"), max_new_tokens=new_tokens, **more)


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def words(count: int) -> str:
    """What the toy answers."""
    return "".join(f"w{number} " for number in range(count))


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """For what must come, however slow the machine is."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


def running(process_id: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text("ascii").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
