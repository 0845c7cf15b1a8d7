"""The official anthropic client against the server: messages, streams, tools, images, counts, errors."""

from __future__ import annotations

import base64
from typing import Any

import anthropic
from anthropic import Anthropic
from checks import (
    BASE_URL,
    KEY,
    LIMITED_KEY,
    MODEL,
    PERSON_SCHEMA,
    QUESTION,
    SYSTEM,
    VISION_MODEL,
    WEATHER,
    WEATHER_SCHEMA,
    check,
    equal,
    fits_person,
    fits_weather,
    png,
    report,
)

client = Anthropic(base_url=BASE_URL, api_key=KEY, max_retries=0, timeout=300)
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
# The client knows no temperature any more; the API does.
GREEDY: Any = {"model": MODEL, "extra_body": {"temperature": 0}, "max_tokens": 24}
TOOLS: Any = [
    {"name": "get_weather", "description": "The temperature in a city.", "input_schema": WEATHER_SCHEMA}
]


@check
def message_is_answered() -> None:
    made = client.messages.create(messages=MESSAGES, system=SYSTEM, **GREEDY)
    equal((made.type, made.role), ("message", "assistant"))
    assert made.content[0].type == "text" and "Paris" in made.content[0].text, made
    assert made.stop_reason in ("end_turn", "max_tokens")
    assert made.usage.input_tokens > 0 and made.usage.output_tokens > 0
    assert made.id.startswith("msg_") and made._request_id


@check
def system_and_parts_of_text_are_read() -> None:
    made = client.messages.create(
        system=[{"type": "text", "text": "You are a poet."}],
        messages=[{"role": "user", "content": [{"type": "text", "text": "Who are you?"}]}],
        **GREEDY,
    )
    plain = client.messages.create(
        system="You are a poet.", messages=[{"role": "user", "content": "Who are you?"}], **GREEDY
    )
    assert made.content and plain.content
    equal(made.content[0].to_dict(), plain.content[0].to_dict())


@check
def stream_has_named_events_and_says_the_same() -> None:
    whole = client.messages.create(messages=MESSAGES, system=SYSTEM, **GREEDY)
    kinds, text = [], ""
    for event in client.messages.create(messages=MESSAGES, system=SYSTEM, stream=True, **GREEDY):
        kinds.append(event.type)
        if event.type == "content_block_delta" and event.delta.type == "text_delta":
            text += event.delta.text
        elif event.type == "message_delta":
            equal(event.delta.stop_reason, whole.stop_reason)
            equal(event.usage.output_tokens, whole.usage.output_tokens)
    equal(text, whole.content[0].text)  # type: ignore[union-attr]
    equal((kinds[0], kinds[-1]), ("message_start", "message_stop"))
    for kind in ("content_block_start", "content_block_stop", "message_delta"):
        equal(kinds.count(kind), 1, kind)


@check
def stream_helper_puts_the_message_together() -> None:
    whole = client.messages.create(messages=MESSAGES, system=SYSTEM, **GREEDY)
    with client.messages.stream(messages=MESSAGES, system=SYSTEM, **GREEDY) as stream:
        text = "".join(stream.text_stream)
        made = stream.get_final_message()
    equal(text, whole.content[0].text)  # type: ignore[union-attr]
    equal(made.content[0].text, text)  # type: ignore[union-attr]
    equal(made.usage.output_tokens, whole.usage.output_tokens)
    equal(made.usage.input_tokens, whole.usage.input_tokens)


@check
def tool_is_used_and_its_result_goes_back() -> None:
    asked: list[Any] = [{"role": "user", "content": WEATHER}]
    more: Any = {**GREEDY, "max_tokens": 100, "tools": TOOLS}
    choice: Any = {"type": "any", "disable_parallel_tool_use": True}
    made = client.messages.create(messages=asked, tool_choice=choice, **more)
    equal(made.stop_reason, "tool_use")
    (use,) = [block for block in made.content if block.type == "tool_use"]
    fits_weather(use.input)  # type: ignore[arg-type]
    with client.messages.stream(messages=asked, tool_choice=choice, **more) as stream:
        streamed = [block for block in stream.get_final_message().content if block.type == "tool_use"]
    equal([(block.name, block.input) for block in streamed], [(use.name, use.input)])
    result = {
        "type": "tool_result",
        "tool_use_id": use.id,
        "content": [{"type": "text", "text": "21 degrees"}],
    }
    second = client.messages.create(
        messages=[
            *asked,
            {"role": "assistant", "content": made.content},
            {"role": "user", "content": [result]},
        ],
        tool_choice={"type": "none"},
        **more,
    )
    assert second.content[0].type == "text" and second.content[0].text


@check
def named_tool_is_used() -> None:
    made = client.messages.create(
        messages=[{"role": "user", "content": WEATHER}],
        tools=TOOLS,
        tool_choice={"type": "tool", "name": "get_weather"},
        **{**GREEDY, "max_tokens": 100},
    )
    uses = [block for block in made.content if block.type == "tool_use"]
    assert uses and all(block.name == "get_weather" for block in uses)


@check
def output_keeps_a_schema() -> None:
    import json

    wanted: Any = {"format": {"type": "json_schema", "schema": PERSON_SCHEMA}}
    made = client.messages.create(
        messages=[{"role": "user", "content": "Describe Ada, 36 years old."}],
        output_config=wanted,
        **{**GREEDY, "max_tokens": 100},
    )
    fits_person(json.loads(made.content[0].text))  # type: ignore[union-attr]


@check
def stop_sequence_is_told() -> None:
    made = client.messages.create(messages=MESSAGES, system=SYSTEM, stop_sequences=[" of"], **GREEDY)
    equal((made.stop_reason, made.stop_sequence), ("stop_sequence", " of"))
    assert " of" not in made.content[0].text  # type: ignore[union-attr]


@check
def picture_is_seen() -> None:
    def seen(image: bytes) -> Any:
        source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(image).decode()}
        made = client.messages.create(
            model=VISION_MODEL,
            extra_body={"temperature": 0},
            max_tokens=4,
            messages=[
                {
                    "role": "user",
                    "content": [{"type": "image", "source": source}, {"type": "text", "text": "what?"}],  # type: ignore[list-item, misc]
                }
            ],
        )
        read = made.usage.input_tokens + (made.usage.cache_read_input_tokens or 0)
        return read, [block.to_dict() for block in made.content]

    with_picture = seen(png(255, 0, 0))
    equal(seen(png(255, 0, 0)), with_picture, "the same picture again")
    without = client.messages.count_tokens(
        model=VISION_MODEL, messages=[{"role": "user", "content": [{"type": "text", "text": "what?"}]}]
    )
    assert with_picture[0] > without.input_tokens


@check
def tokens_are_counted_as_they_are_read() -> None:
    for more in ({}, {"system": "Be brief."}, {"tools": TOOLS}):
        counted = client.messages.count_tokens(model=MODEL, messages=MESSAGES, **more)  # type: ignore[arg-type]
        made = client.messages.create(messages=MESSAGES, **GREEDY, **more)
        read = made.usage.input_tokens + (made.usage.cache_read_input_tokens or 0)
        equal(counted.input_tokens, read, f"tokens with {[*more]}")


def _refused(kind: type[anthropic.APIStatusError], call: Any) -> Any:
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


@check
def errors_have_their_kinds() -> None:
    error = _refused(
        anthropic.BadRequestError,
        lambda: client.messages.create(
            model=MODEL, max_tokens=4, messages=MESSAGES, extra_body={"temperature": 1000}
        ),
    )
    equal(error.body["type"], "error")
    equal(error.body["error"]["type"], "invalid_request_error")
    assert "temperature" in error.body["error"]["message"]
    _refused(
        anthropic.BadRequestError,
        lambda: client.messages.create(
            model=MODEL, max_tokens=4, messages=MESSAGES, extra_body={"nonsense": 1}
        ),
    )
    error = _refused(
        anthropic.NotFoundError,
        lambda: client.messages.create(model="no-such-model", max_tokens=4, messages=MESSAGES),
    )
    equal(error.body["error"]["type"], "not_found_error")
    other = Anthropic(base_url=BASE_URL, api_key="ay-" + "x" * 43, max_retries=0)
    error = _refused(
        anthropic.AuthenticationError,
        lambda: other.messages.create(model=MODEL, max_tokens=4, messages=MESSAGES),
    )
    equal(error.body["error"]["type"], "authentication_error")


@check
def bearer_tokens_are_keys_too() -> None:
    other = Anthropic(base_url=BASE_URL, auth_token=KEY, api_key=None, max_retries=0)
    assert other.messages.create(messages=MESSAGES, system=SYSTEM, **GREEDY).content


@check
def too_many_requests_say_when_to_come_back() -> None:
    other = Anthropic(base_url=BASE_URL, api_key=LIMITED_KEY, max_retries=0)

    def many() -> None:
        for _ in range(20):
            other.messages.create(model=MODEL, max_tokens=1, messages=MESSAGES)

    error = _refused(anthropic.RateLimitError, many)
    assert int(error.response.headers["retry-after"]) >= 1
    equal(error.body["error"]["type"], "rate_limit_error")


if __name__ == "__main__":
    report("anthropic")
