"""litellm against the server: its openai provider and its anthropic one, asked the same way."""

from __future__ import annotations

import json
import os
from typing import Any

# Read when it is imported: it would fetch a price list.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm
from checks import (
    BASE_URL,
    EMBEDDING_MODEL,
    KEY,
    MODEL,
    PERSON_SCHEMA,
    QUESTION,
    SYSTEM,
    VISION_MODEL,
    WEATHER,
    WEATHER_SCHEMA,
    check,
    data_url,
    equal,
    fits_person,
    fits_weather,
    png,
    report,
)

litellm.telemetry = False
litellm.suppress_debug_info = True

OPENAI: Any = {"model": f"openai/{MODEL}", "api_base": f"{BASE_URL}/v1", "api_key": KEY, "max_retries": 0}
ANTHROPIC: Any = {"model": f"anthropic/{MODEL}", "api_base": BASE_URL, "api_key": KEY, "max_retries": 0}
GREEDY: Any = {"temperature": 0, "max_tokens": 24}
MESSAGES = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": WEATHER_SCHEMA}}]


def _answers_and_streams(provider: Any) -> None:
    whole = litellm.completion(messages=MESSAGES, **provider, **GREEDY)
    text = whole.choices[0].message.content
    assert "Paris" in text, whole
    assert whole.usage.prompt_tokens > 0 and whole.usage.completion_tokens > 0
    chunks = list(
        litellm.completion(
            messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **provider, **GREEDY
        )
    )
    equal("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), text)
    built = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
    equal(built.usage.completion_tokens, whole.usage.completion_tokens)
    equal(built.choices[0].finish_reason, whole.choices[0].finish_reason)


def _calls_a_tool(provider: Any) -> None:
    asked: Any = {
        **provider,
        **GREEDY,
        "max_tokens": 100,
        "messages": [{"role": "user", "content": WEATHER}],
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        "parallel_tool_calls": False,
    }
    whole = litellm.completion(**asked)
    (call,) = whole.choices[0].message.tool_calls
    equal(call.function.name, "get_weather")
    fits_weather(call.function.arguments)
    built = litellm.stream_chunk_builder(list(litellm.completion(stream=True, **asked)))
    (streamed,) = built.choices[0].message.tool_calls
    equal(streamed.function.name, call.function.name)
    equal(json.loads(streamed.function.arguments), json.loads(call.function.arguments))
    result = {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}
    second = litellm.completion(
        **{
            **asked,
            "messages": [*asked["messages"], whole.choices[0].message, result],
            "tool_choice": "none",
        }
    )
    assert second.choices[0].message.content


def _sees(provider: Any) -> None:
    content = [
        {"type": "image_url", "image_url": {"url": data_url(png(255, 0, 0))}},
        {"type": "text", "text": "what?"},
    ]
    counts = [
        litellm.completion(
            messages=[{"role": "user", "content": asked}], temperature=0, max_tokens=4, **provider
        ).usage.prompt_tokens
        for asked in (content, content[1:])
    ]
    assert counts[0] > counts[1], counts


@check
def openai_answers_and_streams() -> None:
    _answers_and_streams(OPENAI)


@check
def openai_calls_a_tool() -> None:
    _calls_a_tool(OPENAI)


@check
def openai_keeps_a_schema() -> None:
    made = litellm.completion(
        messages=[{"role": "user", "content": "Describe Ada, 36 years old."}],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": PERSON_SCHEMA, "strict": True},
        },
        **OPENAI,
        **{**GREEDY, "max_tokens": 100},
    )
    fits_person(json.loads(made.choices[0].message.content))


@check
def openai_sees_a_picture() -> None:
    _sees({**OPENAI, "model": f"openai/{VISION_MODEL}"})


@check
def openai_completes_text() -> None:
    made = litellm.text_completion(
        prompt="The capital of France is",
        **{**OPENAI, "model": f"text-completion-openai/{MODEL}"},
        **GREEDY,
    )
    assert "Paris" in made.choices[0].text


@check
def openai_embeds() -> None:
    made = litellm.embedding(input=["a cat", "a dog"], **{**OPENAI, "model": f"openai/{EMBEDDING_MODEL}"})
    equal([len(one["embedding"]) for one in made.data], [384, 384])


@check
def openai_gives_responses() -> None:
    made = litellm.responses(
        input=QUESTION, instructions=SYSTEM, temperature=0, max_output_tokens=24, **OPENAI
    )
    assert "Paris" in str(made.output)


@check
def openai_errors_have_their_kinds() -> None:
    cases: list[tuple[type[Exception], dict[str, Any]]] = [
        (litellm.AuthenticationError, {"api_key": "nonsense"}),
        (litellm.NotFoundError, {"model": "openai/no-such-model"}),
        (litellm.BadRequestError, {"temperature": 1000}),
    ]
    for kind, change in cases:
        try:
            litellm.completion(messages=MESSAGES, **{**OPENAI, **change})
        except kind:
            continue
        raise AssertionError(f"no {kind.__name__}")


@check
def anthropic_answers_and_streams() -> None:
    _answers_and_streams(ANTHROPIC)


@check
def anthropic_calls_a_tool() -> None:
    _calls_a_tool(ANTHROPIC)


@check
def anthropic_sees_a_picture() -> None:
    _sees({**ANTHROPIC, "model": f"anthropic/{VISION_MODEL}"})


if __name__ == "__main__":
    report("litellm")
