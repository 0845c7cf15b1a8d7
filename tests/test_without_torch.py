"""Everything below the network works without torch, and says what is missing when torch is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BLOCKED = "import sys; sys.modules['torch'] = None\n"


def _run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCKED + code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_readers_tokenizers_formats_and_presets_work(smollm2_gguf: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "from ayllu.weights.checkpoint import open_checkpoint\n"
        "from ayllu.chat.tokenizer import tokenizer_from_gguf\n"
        "from ayllu.chat.formats import chat_format_for\n"
        "from ayllu.chat.messages import Message\n"
        "from ayllu.model.presets import PRESETS\n"
        "from ayllu.model.parameters import parameter_shapes\n"
        "import ayllu.weights.gguf_export, ayllu.weights.hf_save, ayllu.weights.store, ayllu.chat.toolcalls\n"
        "import ayllu.chat.images, ayllu.model.rope_frequencies, ayllu.engine.model_files\n"
        "checkpoint = open_checkpoint(Path(sys.argv[1]))\n"
        "tokenizer = tokenizer_from_gguf(checkpoint.metadata, checkpoint.path)\n"
        "form = chat_format_for(tokenizer, checkpoint.metadata['tokenizer.chat_template'], 'llama')\n"
        "print(len(form.render([Message('user', 'hello')]).token_ids))\n"
        "print(checkpoint.tensors['norm.weight'].decode().shape)\n"
        "print(sum(len(parameter_shapes(make())) > 0 for make in PRESETS.values()))\n"
    )
    result = _run(code, str(smollm2_gguf))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["31", "(576,)", "7"]


def _program(code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As `_run`, where the processes that it starts have no torch either."""
    (folder / "torch.py").write_text("raise ImportError('no torch here')\n", encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_gguf_model_answers(smollm2_gguf: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.argv = ['ayllu', 'chat', sys.argv[1], '-p', 'x', '--max-tokens', '3']\n"
        "from ayllu.cli.start import main\n"
        "main()\n"
    )
    result = _program(code, tmp_path, str(smollm2_gguf))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_a_model_that_needs_torch_names_the_extra_that_brings_it(minilm_folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from ayllu.cli.main import report\n"
        "from ayllu.engine.native import open_engine\n"
        "from ayllu.errors import MissingExtraError\n"
        "try: open_engine(Path(sys.argv[1]))\n"
        "except MissingExtraError as error: sys.exit(report(error))\n"
    )
    result = _program(code, tmp_path, str(minilm_folder))
    assert result.returncode == 6
    assert "pip install 'ayllu[torch]'" in result.stderr
    assert result.stderr.count("\n") == 1


UNUSED = (
    "torch", "pydantic", "PIL", "llguidance", "jsonschema_rs", "httpx2", "huggingface_hub", "rich",
    "prompt_toolkit", "tiktoken", "filelock", "asyncio", "transformers",
)  # fmt: skip
"""What an answer to a text needs nothing of: each would be 10 to 2,000 ms before its first token."""


def test_neither_process_of_an_engine_loads_what_an_answer_does_not_need(smollm2_gguf: Path) -> None:
    code = (
        "import sys\n"
        "import ayllu.engine.open_core\n"
        "from ayllu.engine.model_files import open_model_files\n"
        "print(*sys.modules)\n"
        "import ayllu.cli.main, ayllu.cli.opening, ayllu.engine.native, ayllu.settings\n"
        "from pathlib import Path\n"
        "from ayllu.chat.messages import user_message\n"
        "from ayllu.weights.installed import find_installed\n"
        "files = open_model_files(Path(sys.argv[1]))\n"
        "files.chat_format.render([user_message('hello')])\n"
        "print(*sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(smollm2_gguf)], capture_output=True, text=True, check=True
    )
    worker, front = ({name.partition(".")[0] for name in line.split()} for line in result.stdout.splitlines())
    assert worker.isdisjoint((*UNUSED, "tokenizers", "jinja2", "typer"))
    assert front.isdisjoint(UNUSED)


def test_the_server_is_imported_without_torch_and_without_its_extras() -> None:
    """`make run` installs neither; what needs them names the extra when it is asked for."""
    extras = ("psycopg", "joserfc", "opentelemetry.sdk")
    code = "".join(f"sys.modules[{name!r}] = None\n" for name in extras)
    done = _run(code + "import ayllu.server.serve, ayllu.cli.serve\nprint('served')\n")
    assert done.stdout == "served\n", done.stderr
