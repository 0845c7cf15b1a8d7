"""Real clients, unchanged, against a real server with real models: each runs its scripted job.

The jobs are in `clients/`, and so are the pins of the environment that they run in; the first test here makes
it. The text model is SmolLM2, the embedding model MiniLM, and what sees is a Llama 4 of random numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.test_native_process import llama4_folder
from tests.server.clients.environment import clients_python, run_job
from tests.server.live_server import PLENTY, LiveServer, served_process

TEXT, EMBEDDING = "smollm2-135m-instruct", "all-minilm-l6-v2"


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: Path, minilm_folder: Path
) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("server")
    vision = llama4_folder(folder / "sees")
    with served_process(folder, [TEXT, EMBEDDING, vision], settings=PLENTY) as running:
        yield running


def run(server: LiveServer, job: str, home: Path, **more: str) -> None:
    told = run_job(
        job,
        home,
        {
            "BASE_URL": server.url,
            "KEY": server.key,
            "MODEL": TEXT,
            "EMBEDDING_MODEL": EMBEDDING,
            "VISION_MODEL": "model",
            "LIMITED_KEY": server.new_key(limits={"requests_per_minute": 2}),
            **more,
        },
    )
    failures = "\n\n".join(f"--- {name}\n{why}" for name, why in told["failed"].items())
    assert not told["failed"], failures
    assert told["passed"]


def test_the_clients_environment_can_be_made() -> None:
    assert clients_python().exists()


@pytest.mark.parametrize("job", ["openai", "anthropic", "llm", "litellm", "langchain", "lm_eval"])
def test_client_works_unchanged(server: LiveServer, job: str, tmp_path: Path) -> None:
    run(server, job, tmp_path)


def test_two_thousand_made_up_requests_never_break_the_server(tmp_path: Path) -> None:
    vision = llama4_folder(tmp_path / "sees")
    with served_process(tmp_path, [vision], settings=PLENTY) as running:
        run(running, "schemathesis", tmp_path / "home", CASES="2000")
