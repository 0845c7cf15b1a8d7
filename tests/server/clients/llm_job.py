"""simonw's `llm` against the server: its command line with our models configured, and its tool loop."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from checks import (
    BASE_URL,
    EMBEDDING_MODEL,
    KEY,
    MODEL,
    PERSON_SCHEMA,
    QUESTION,
    SYSTEM,
    VISION_MODEL,
    check,
    equal,
    fits_person,
    png,
    report,
)
from click.testing import CliRunner
from llm.cli import cli

_FOLDER = tempfile.TemporaryDirectory(prefix="llm-user-")
HOME = Path(_FOLDER.name)
os.environ["LLM_USER_PATH"] = _FOLDER.name
MODELS = f"""\
- model_id: here
  model_name: {MODEL}
  api_base: "{BASE_URL}/v1"
  api_key_name: here
  supports_schema: true
  supports_tools: true
- model_id: here-responses
  model_name: {MODEL}
  api_base: "{BASE_URL}/v1"
  api_key_name: here
  responses: true
  supports_schema: true
- model_id: here-completion
  model_name: {MODEL}
  api_base: "{BASE_URL}/v1"
  api_key_name: here
  completion: true
- model_id: here-vision
  model_name: {VISION_MODEL}
  api_base: "{BASE_URL}/v1"
  api_key_name: here
  vision: true
"""
GREEDY = ("-o", "temperature", "0", "-o", "max_tokens", "24")


def llm(*arguments: str, code: int = 0) -> str:
    """What the command prints."""
    done = CliRunner().invoke(cli, arguments)
    equal(done.exit_code, code, f"llm {' '.join(arguments)} said {done.output[-500:]!r} and ended with")
    return done.stdout if code == 0 else done.stderr


@check
def prompt_is_answered_and_streams_the_same() -> None:
    whole = llm("-m", "here", "--no-stream", *GREEDY, "-s", SYSTEM, QUESTION)
    assert "Paris" in whole, whole
    equal(llm("-m", "here", *GREEDY, "-s", SYSTEM, QUESTION).strip(), whole.strip())


@check
def conversation_goes_on() -> None:
    llm("-m", "here", *GREEDY, "My name is Ada.")
    assert llm("-c", *GREEDY, "What is my name?").strip()
    logged = json.loads(llm("logs", "list", "-n", "1", "--json"))
    assert logged[0]["input_tokens"] > 0 and logged[0]["output_tokens"] > 0, logged


@check
def system_prompt_is_sent() -> None:
    assert llm("-m", "here", *GREEDY, "-s", "You are a poet.", "Who are you?").strip()


@check
def schema_is_kept() -> None:
    said = llm(
        *("-m", "here", "-o", "temperature", "0", "-o", "max_tokens", "100"),
        *("--schema", json.dumps(PERSON_SCHEMA), "Describe Ada, 36 years old."),
    )
    fits_person(json.loads(said))


@check
def tools_are_offered() -> None:
    assert llm("-m", "here", *GREEDY, "-T", "llm_version", "Hello!").strip()


@check
def text_is_completed() -> None:
    assert "Paris" in llm("-m", "here-completion", *GREEDY, "The capital of France is")


@check
def responses_are_answered() -> None:
    assert "Paris" in llm("-m", "here-responses", *GREEDY, "-s", SYSTEM, QUESTION)
    assert "Paris" in llm("-m", "here-responses", "--no-stream", *GREEDY, "-s", SYSTEM, QUESTION)


@check
def picture_is_attached() -> None:
    file = HOME / "red.png"
    file.write_bytes(png(255, 0, 0))
    arguments = ("-m", "here-vision", "-o", "temperature", "0", "-o", "max_tokens", "4", "what?")
    llm(*arguments, "-a", str(file))
    seen = json.loads(llm("logs", "list", "-n", "1", "--json"))[0]["input_tokens"]
    llm(*arguments)
    assert seen > json.loads(llm("logs", "list", "-n", "1", "--json"))[0]["input_tokens"]


@check
def models_of_an_endpoint_are_listed() -> None:
    assert MODEL in llm("openai", "endpoint", f"{BASE_URL}/v1", "--models", "--key", KEY).split()


@check
def wrong_key_is_told() -> None:
    said = llm("openai", "endpoint", f"{BASE_URL}/v1", "-m", MODEL, "--key", "nonsense", "Hi", code=1)
    assert "401" in said or "not valid" in said, said


@check
def tool_loop_runs_to_the_end() -> None:
    """The command cannot force a tool, and a small model would not call one by itself; so by the library."""
    import llm as library
    from llm.default_plugins.openai_models import Chat

    class Forced(Chat):
        """Must call a tool as long as there is no result of one."""

        def build_kwargs(self, prompt: Any, stream: bool) -> dict[str, Any]:
            made: dict[str, Any] = super().build_kwargs(prompt, stream)
            made["tool_choice"] = "none" if prompt.tool_results else "required"
            return made

    model = Forced(
        model_id="forced", model_name=MODEL, api_base=f"{BASE_URL}/v1", supports_tools=True, vision=False
    )
    for stream in (True, False):
        called: list[int] = []

        def double(number: int, called: list[int] = called) -> str:
            called.append(number)
            return str(number * 2)

        tool = library.Tool(
            name="double",
            description="Twice a number.",
            input_schema={
                "type": "object",
                "properties": {"number": {"type": "integer", "minimum": 0, "maximum": 9}},
                "required": ["number"],
                "additionalProperties": False,
            },
            implementation=lambda number, double=double: double(number),
        )
        chain = model.conversation().chain(
            "What is twice 4?",
            tools=[tool],
            stream=stream,
            key=KEY,
            options={"temperature": 0, "max_tokens": 100},
        )
        assert chain.text().strip()
        assert called and all(0 <= number <= 9 for number in called), called


@check
def texts_are_embedded() -> None:
    from llm.default_plugins.openai_models import OpenAIEmbeddingModel

    os.environ["OPENAI_BASE_URL"] = f"{BASE_URL}/v1"
    os.environ["OPENAI_API_KEY"] = KEY
    model = OpenAIEmbeddingModel("here", EMBEDDING_MODEL)
    equal(len(model.embed("a cat")), 384)
    equal([len(vector) for vector in model.embed_multi(["a cat", "a dog"])], [384, 384])


if __name__ == "__main__":
    (HOME / "extra-openai-models.yaml").write_text(MODELS, encoding="utf-8")
    (HOME / "keys.json").write_text(json.dumps({"here": KEY}), encoding="utf-8")
    report("llm")
