"""Everything below the network works without torch, and says what is missing when torch is needed."""

from __future__ import annotations

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


def test_chat_names_the_extra_that_brings_torch(smollm2_gguf: Path) -> None:
    code = "sys.argv = ['ayllu', 'chat', sys.argv[1], '-p', 'x']\nfrom ayllu.cli.main import main\nmain()\n"
    result = _run(code, str(smollm2_gguf))
    assert result.returncode == 6
    assert "pip install 'ayllu[torch]'" in result.stderr
    assert result.stderr.count("\n") == 1
