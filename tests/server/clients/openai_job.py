"""The official openai client against the server: chat, completions, embeddings, Responses, files, errors."""

from __future__ import annotations

import asyncio
import base64
import math
import struct
import time
from typing import Any, Literal

import openai
from checks import (
    BASE_URL,
    EMBEDDING_MODEL,
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
    data_url,
    equal,
    fits_weather,
    png,
    report,
)
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

client = OpenAI(base_url=f"{BASE_URL}/v1", api_key=KEY, max_retries=0, timeout=300)
MESSAGES: Any = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
ANSWER: Any = {
    "model": MODEL,
    "instructions": SYSTEM,
    "input": QUESTION,
    "temperature": 0,
    "max_output_tokens": 24,
}
GREEDY: Any = {"model": MODEL, "temperature": 0, "max_tokens": 24}
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The temperature in a city.",
            "parameters": WEATHER_SCHEMA,
        },
    },
    {
        "type": "function",
        "function": {
            "name": "get_time",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Paris", "Lima"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
]


class Person(BaseModel):
    name: Literal["Ada", "Alan", "Grace"]
    age: int


# Models


@check
def models_are_listed_and_retrieved() -> None:
    ids = [model.id for model in client.models.list()]
    for name in (MODEL, EMBEDDING_MODEL, VISION_MODEL):
        assert name in ids, (name, ids)
    equal(client.models.retrieve(MODEL).id, MODEL)


# Chat


@check
def chat_answers() -> None:
    made = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    assert "Paris" in (made.choices[0].message.content or ""), made
    equal(made.object, "chat.completion")
    equal(made.choices[0].message.role, "assistant")
    assert made.choices[0].finish_reason in ("stop", "length")
    assert made.usage is not None and made.usage.prompt_tokens > 0
    equal(made.usage.total_tokens, made.usage.prompt_tokens + made.usage.completion_tokens)


@check
def chat_streams_the_same_answer_and_counts_it() -> None:
    whole = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    text, ids, reasons, usage = "", set(), [], []
    stream = client.chat.completions.create(
        messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    for chunk in stream:
        ids.add((chunk.id, chunk.created, chunk.object))
        if chunk.usage is not None:
            usage.append(chunk.usage)
            equal(chunk.choices, [], "choices of the usage chunk")
            continue
        text += chunk.choices[0].delta.content or ""
        if chunk.choices[0].finish_reason:
            reasons.append(chunk.choices[0].finish_reason)
    equal(text, whole.choices[0].message.content)
    equal(reasons, [whole.choices[0].finish_reason])
    equal(len(ids), 1, "ids")
    assert len(usage) == 1 and whole.usage is not None
    equal(usage[0].completion_tokens, whole.usage.completion_tokens)
    equal(usage[0].prompt_tokens, whole.usage.prompt_tokens)


@check
def chat_stream_helper_puts_the_answer_together() -> None:
    whole = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    with client.chat.completions.stream(messages=MESSAGES, **GREEDY) as stream:
        for _ in stream:
            pass
        made = stream.get_final_completion()
    equal(made.choices[0].message.content, whole.choices[0].message.content)


@check
def required_tool_is_called_and_streams_the_same() -> None:
    asked: Any = {
        **GREEDY,
        "max_tokens": 100,
        "messages": [{"role": "user", "content": WEATHER}],
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    whole = client.chat.completions.create(**asked)
    equal(whole.choices[0].finish_reason, "tool_calls")
    (call,) = whole.choices[0].message.tool_calls or []
    if call.function.name == "get_weather":
        fits_weather(call.function.arguments)
    name, arguments, call_ids, reason = "", "", [], None
    for chunk in client.chat.completions.create(stream=True, **asked):
        for delta in chunk.choices[0].delta.tool_calls or []:
            equal(delta.index, 0)
            if delta.id:
                call_ids.append(delta.id)
            name += (delta.function and delta.function.name) or ""
            arguments += (delta.function and delta.function.arguments) or ""
        reason = chunk.choices[0].finish_reason or reason
    equal((name, arguments), (call.function.name, call.function.arguments))
    equal(len(call_ids), 1, "ids of calls")
    equal(reason, "tool_calls")


@check
def named_tool_is_called() -> None:
    made = client.chat.completions.create(
        messages=[{"role": "user", "content": WEATHER}],
        tools=TOOLS,
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        **{**GREEDY, "max_tokens": 100},
    )
    for call in made.choices[0].message.tool_calls or []:
        equal(call.function.name, "get_weather")
        fits_weather(call.function.arguments)
    assert made.choices[0].message.tool_calls


@check
def parallel_tools_have_ids_and_places_of_their_own() -> None:
    asked: Any = {
        **GREEDY,
        "max_tokens": 200,
        "messages": [{"role": "user", "content": "Weather and time in Paris and in Lima, please."}],
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": True,
    }
    whole = client.chat.completions.create(**asked)
    calls = whole.choices[0].message.tool_calls or []
    assert calls, whole
    equal(len({call.id for call in calls}), len(calls), "ids of calls")
    places: dict[int, list[str]] = {}
    for chunk in client.chat.completions.create(stream=True, **asked):
        for delta in chunk.choices[0].delta.tool_calls or []:
            said = places.setdefault(delta.index, ["", ""])
            said[0] += (delta.function and delta.function.name) or ""
            said[1] += (delta.function and delta.function.arguments) or ""
    equal(
        [tuple(places[place]) for place in sorted(places)],
        [(call.function.name, call.function.arguments) for call in calls],
    )
    equal(sorted(places), list(range(len(calls))), "places")


@check
def a_tools_result_goes_back() -> None:
    asked: list[Any] = [{"role": "user", "content": WEATHER}]
    first = client.chat.completions.create(
        messages=asked,
        tools=TOOLS[:1],
        tool_choice="required",
        parallel_tool_calls=False,
        **{**GREEDY, "max_tokens": 100},
    )
    message = first.choices[0].message
    assert message.tool_calls
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "21 degrees"}
    second = client.chat.completions.create(
        messages=[*asked, message, result], tools=TOOLS[:1], tool_choice="none", **GREEDY
    )
    assert second.choices[0].message.content


@check
def json_schema_is_parsed_into_a_class() -> None:
    made = client.chat.completions.parse(
        messages=[{"role": "user", "content": "Describe Ada, 36 years old."}],
        response_format=Person,
        **{**GREEDY, "max_tokens": 100},
    )
    assert isinstance(made.choices[0].message.parsed, Person)


@check
def json_schema_and_json_object_are_kept() -> None:
    import json

    formats: list[Any] = [
        {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON_SCHEMA, "strict": True}},
        {"type": "json_object"},
    ]
    for wanted in formats:
        made = client.chat.completions.create(
            messages=[{"role": "user", "content": 'Say {"a": 1} in JSON.'}],
            response_format=wanted,
            **{**GREEDY, "max_tokens": 200},
        )
        if made.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(made.choices[0].message.content or ""), dict)
        else:
            equal(wanted["type"], "json_object", "an answer that was cut")


@check
def logprobs_belong_to_the_text() -> None:
    made = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=3, **GREEDY)
    assert made.choices[0].logprobs is not None
    tokens = made.choices[0].logprobs.content or []
    equal("".join(token.token for token in tokens), made.choices[0].message.content)
    for token in tokens:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        equal(bytes(token.bytes or []).decode(), token.token)
        assert token.logprob == max(other.logprob for other in token.top_logprobs)
    streamed: list[str] = []
    for chunk in client.chat.completions.create(messages=MESSAGES, logprobs=True, stream=True, **GREEDY):
        scores = chunk.choices[0].logprobs
        streamed += [token.token for token in (scores and scores.content) or []]
    equal(streamed, [token.token for token in tokens])


@check
def several_answers_and_the_same_seed() -> None:
    asked: Any = {"model": MODEL, "messages": MESSAGES, "n": 2, "seed": 5, "temperature": 1, "max_tokens": 12}
    first, second = (client.chat.completions.create(**asked) for _ in range(2))
    equal([choice.index for choice in first.choices], [0, 1])
    texts = [choice.message.content for choice in first.choices]
    equal([choice.message.content for choice in second.choices], texts)
    said = ["", ""]
    for chunk in client.chat.completions.create(stream=True, **asked):
        for choice in chunk.choices:
            said[choice.index] += choice.delta.content or ""
    equal(said, texts)


@check
def a_stop_string_ends_the_answer_and_is_not_in_it() -> None:
    made = client.chat.completions.create(messages=MESSAGES, stop=[" of"], **GREEDY)
    equal(made.choices[0].finish_reason, "stop")
    assert " of" not in (made.choices[0].message.content or "")


@check
def max_completion_tokens_is_a_limit() -> None:
    made = client.chat.completions.create(
        model=MODEL, temperature=0, messages=MESSAGES, max_completion_tokens=3
    )
    equal(made.choices[0].finish_reason, "length")
    assert made.usage is not None
    equal(made.usage.completion_tokens, 3)


@check
def many_at_once_get_what_one_alone_gets() -> None:
    """And a reader who leaves early takes nothing from the others."""
    prompts: list[Any] = [[{"role": "user", "content": f"Count from {start}."}] for start in range(8)]

    async def together() -> list[str | None]:
        async with AsyncOpenAI(base_url=f"{BASE_URL}/v1", api_key=KEY, max_retries=0) as many:
            left = await many.chat.completions.create(
                model=MODEL, messages=MESSAGES, stream=True, max_tokens=1000, extra_body={"ignore_eos": True}
            )
            async for _ in left:
                break
            await left.close()
            made = await asyncio.gather(
                *(many.chat.completions.create(messages=messages, **GREEDY) for messages in prompts)
            )
        return [one.choices[0].message.content for one in made]

    alone = [client.chat.completions.create(messages=messages, **GREEDY) for messages in prompts]
    equal(asyncio.run(together()), [one.choices[0].message.content for one in alone])


# Text completions


@check
def completion_echoes_and_scores_its_prompt() -> None:
    made = client.completions.create(
        model=MODEL, prompt="The capital of France is", echo=True, logprobs=2, max_tokens=4, temperature=0
    )
    choice = made.choices[0]
    assert choice.text.startswith("The capital of France is") and "Paris" in choice.text
    scores = choice.logprobs
    assert scores is not None and scores.tokens and scores.token_logprobs and scores.text_offset
    equal("".join(scores.tokens), choice.text)
    assert scores.token_logprobs[0] is None and all(one <= 0 for one in scores.token_logprobs[1:])
    for token, offset in zip(scores.tokens, scores.text_offset, strict=True):
        assert choice.text[offset:].startswith(token)


@check
def completion_takes_several_prompts_and_streams() -> None:
    prompts = ["One, two, three,", "Red, green,"]
    asked: Any = {"model": MODEL, "prompt": prompts, "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(**asked)
    equal([choice.index for choice in whole.choices], [0, 1])
    said = ["", ""]
    for chunk in client.completions.create(stream=True, **asked):
        for choice in chunk.choices:
            said[choice.index] += choice.text
    equal(said, [choice.text for choice in whole.choices])


# Embeddings


@check
def embeddings_come_in_base64_and_as_numbers() -> None:
    texts = ["a cat", "a kitten", "stock prices"]
    packed = client.embeddings.create(model=EMBEDDING_MODEL, input=texts)  # the client asks for base64
    plain = client.embeddings.create(model=EMBEDDING_MODEL, input=texts, encoding_format="float")
    raw = client.embeddings.with_raw_response.create(
        model=EMBEDDING_MODEL, input=texts[0], encoding_format="base64"
    )
    code = raw.http_response.json()["data"][0]["embedding"]
    first = plain.data[0].embedding
    equal(len(first), 384)
    for near, far in zip(packed.data, plain.data, strict=True):
        assert all(abs(a - b) < 1e-6 for a, b in zip(near.embedding, far.embedding, strict=True))
    unpacked = struct.unpack("<384f", base64.b64decode(code))
    assert all(abs(a - b) < 1e-5 for a, b in zip(unpacked, first, strict=True))

    def nearness(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    cat, kitten, stocks = (one.embedding for one in plain.data)
    assert nearness(cat, kitten) > nearness(cat, stocks)
    equal([one.index for one in plain.data], [0, 1, 2])


@check
def embeddings_have_the_dimensions_asked_for() -> None:
    made = client.embeddings.create(
        model=EMBEDDING_MODEL, input="a cat", dimensions=64, encoding_format="float"
    )
    equal(len(made.data[0].embedding), 64)
    assert abs(math.hypot(*made.data[0].embedding) - 1) < 1e-3


@check
def a_generating_model_embeds_too() -> None:
    made = client.embeddings.create(model=MODEL, input="a cat")
    assert len(made.data[0].embedding) > 64


# Responses


@check
def response_is_created_retrieved_listed_and_deleted() -> None:
    made = client.responses.create(**ANSWER)
    equal(made.status, "completed" if made.incomplete_details is None else "incomplete")
    assert "Paris" in made.output_text, made
    assert made.usage is not None and made.usage.output_tokens > 0
    again = client.responses.retrieve(made.id)
    equal(again.output_text, made.output_text)
    items = client.responses.input_items.list(made.id)
    assert QUESTION in str(items.data[0].to_dict())
    client.responses.delete(made.id)
    try:
        client.responses.retrieve(made.id)
    except openai.NotFoundError:
        return
    raise AssertionError("a deleted response is still there")


@check
def response_streams_numbered_events() -> None:
    whole = client.responses.create(**ANSWER)
    numbers, kinds, text = [], [], ""
    final = None
    for event in client.responses.create(stream=True, **ANSWER):
        numbers.append(event.sequence_number)
        kinds.append(event.type)
        if event.type == "response.output_text.delta":
            text += event.delta
        elif event.type in ("response.completed", "response.incomplete"):
            final = event.response
    equal(numbers, list(range(len(numbers))), "sequence numbers")
    equal(kinds[:2], ["response.created", "response.in_progress"])
    for kind in (
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ):
        equal(kinds.count(kind), 1, kind)
    assert final is not None
    equal(text, whole.output_text)
    equal(final.output_text, text)


@check
def response_stream_helper_works() -> None:
    with client.responses.stream(**ANSWER) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert "Paris" in final.output_text


@check
def response_is_parsed_into_a_class() -> None:
    made = client.responses.parse(
        model=MODEL, input="Describe Ada, 36 years old.", text_format=Person, temperature=0
    )
    assert isinstance(made.output_parsed, Person)


@check
def response_calls_a_tool_and_takes_its_result() -> None:
    tool: Any = {"type": "function", "name": "get_weather", "parameters": WEATHER_SCHEMA, "strict": True}
    asked: Any = {
        "model": MODEL,
        "input": WEATHER,
        "tools": [tool],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_output_tokens": 100,
    }
    made = client.responses.create(**asked)
    (call,) = [item for item in made.output if item.type == "function_call"]
    fits_weather(call.arguments)
    arguments = ""
    for event in client.responses.create(stream=True, **asked):
        if event.type == "response.function_call_arguments.delta":
            arguments += event.delta
        elif event.type == "response.function_call_arguments.done":
            equal(event.arguments, call.arguments)
    equal(arguments, call.arguments)
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees"}
    second = client.responses.create(
        model=MODEL,
        previous_response_id=made.id,
        input=[result],
        temperature=0,
        max_output_tokens=24,
    )
    assert second.output_text


@check
def response_remembers_the_one_before() -> None:
    first = client.responses.create(model=MODEL, input="My name is Ada.", temperature=0, max_output_tokens=16)
    asked: Any = {"model": MODEL, "input": "What is my name?", "temperature": 0, "max_output_tokens": 16}
    with_memory = client.responses.create(previous_response_id=first.id, **asked)
    without = client.responses.create(**asked)
    equal(with_memory.previous_response_id, first.id)
    assert with_memory.usage is not None and without.usage is not None
    assert with_memory.usage.input_tokens > without.usage.input_tokens


@check
def response_that_is_not_stored_is_gone() -> None:
    made = client.responses.create(store=False, **ANSWER)
    try:
        client.responses.retrieve(made.id)
    except openai.NotFoundError:
        return
    raise AssertionError("a response that was not to be stored is there")


@check
def response_in_the_background_ends_by_itself() -> None:
    made = client.responses.create(background=True, **ANSWER)
    assert made.status in ("queued", "in_progress"), made.status
    until = time.monotonic() + 120
    while made.status in ("queued", "in_progress") and time.monotonic() < until:
        time.sleep(0.05)
        made = client.responses.retrieve(made.id)
    assert made.status in ("completed", "incomplete") and "Paris" in made.output_text, made


@check
def response_stream_resumes_where_it_broke_off() -> None:
    asked: Any = {"model": MODEL, "input": "Count to fifty.", "temperature": 0, "max_output_tokens": 60}
    stream = client.responses.create(background=True, stream=True, **asked)
    seen = []
    for event in stream:
        seen.append(event)
        if len(seen) == 6:
            break
    stream.close()
    response_id = seen[0].response.id  # type: ignore[union-attr]
    resumed = client.responses.retrieve(response_id, stream=True, starting_after=seen[-1].sequence_number)
    seen += list(resumed)
    equal([event.sequence_number for event in seen], list(range(len(seen))), "sequence numbers")
    text = "".join(event.delta for event in seen if event.type == "response.output_text.delta")
    equal(text, client.responses.retrieve(response_id).output_text)
    assert seen[-1].type in ("response.completed", "response.incomplete"), seen[-1]


@check
def response_is_cancelled() -> None:
    made = client.responses.create(
        model=MODEL, input="Count to ten thousand.", temperature=0, max_output_tokens=2000, background=True
    )
    equal(client.responses.cancel(made.id).status, "cancelled")
    equal(client.responses.retrieve(made.id).status, "cancelled")


# Files and images


@check
def files_are_uploaded_listed_read_and_deleted() -> None:
    data = b"\x00\xffsome bytes\r\n" * 1000
    made = client.files.create(file=("notes.bin", data), purpose="user_data")
    equal((made.bytes, made.filename, made.purpose), (len(data), "notes.bin", "user_data"))
    assert made.id in [one.id for one in client.files.list(purpose="user_data")]
    equal(client.files.retrieve(made.id).bytes, len(data))
    equal(client.files.content(made.id).read(), data)
    assert client.files.delete(made.id).deleted
    try:
        client.files.retrieve(made.id)
    except openai.NotFoundError:
        return
    raise AssertionError("a deleted file is still there")


@check
def files_come_in_pages() -> None:
    made = [client.files.create(file=(f"{n}.txt", b"x"), purpose="user_data").id for n in range(5)]
    pages = list(client.files.list(purpose="user_data", limit=2).iter_pages())
    listed = [one.id for page in pages for one in page.data]
    equal([one for one in listed if one in made], made[::-1], "newest first")
    assert len(pages) >= 3 and all(len(page.data) <= 2 for page in pages)
    for file_id in made:
        client.files.delete(file_id)


def _looked_at(url: str) -> Any:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
    made = client.chat.completions.create(
        model=VISION_MODEL,
        messages=[{"role": "user", "content": content}],  # type: ignore[misc, list-item]
        temperature=0,
        max_tokens=4,
        logprobs=True,
    )
    scores = made.choices[0].logprobs
    assert scores is not None and scores.content and made.usage is not None
    return made.usage.prompt_tokens, [(token.bytes, token.logprob) for token in scores.content]


@check
def images_are_seen_by_data_url_and_by_stored_file() -> None:
    red, blue = png(255, 0, 0), png(0, 0, 255)
    stored = client.files.create(file=("red.png", red), purpose="vision")
    seen = _looked_at(data_url(red))
    equal(_looked_at(data_url(red)), seen, "the same picture again")
    equal(_looked_at(stored.id), seen, "the stored picture")
    assert _looked_at(data_url(blue)) != seen, "another picture changes nothing"
    client.files.delete(stored.id)


@check
def images_are_seen_by_responses() -> None:
    stored = client.files.create(file=("red.png", png(255, 0, 0)), purpose="vision")
    texts = []
    parts: list[Any] = [
        {"type": "input_image", "image_url": data_url(png(255, 0, 0)), "detail": "auto"},
        {"type": "input_image", "file_id": stored.id, "detail": "auto"},
    ]
    for part in parts:
        made = client.responses.create(
            model=VISION_MODEL,
            input=[{"role": "user", "content": [part, {"type": "input_text", "text": "what?"}]}],
            temperature=0,
            max_output_tokens=4,
        )
        assert made.usage is not None
        texts.append((made.output_text, made.usage.input_tokens))
    equal(texts[0], texts[1], "the stored picture")
    client.files.delete(stored.id)


# Errors


def _refused(kind: type[openai.APIStatusError], call: Any) -> Any:
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


@check
def bad_requests_name_the_field() -> None:
    error = _refused(
        openai.BadRequestError,
        lambda: client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=1000),
    )
    equal((error.param, error.type), ("temperature", "invalid_request_error"))
    error = _refused(
        openai.BadRequestError,
        lambda: client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body={"temprature": 1}),
    )
    assert error.param == "temprature" and "temperature" in error.message
    error = _refused(
        openai.BadRequestError,
        lambda: client.chat.completions.create(model=MODEL, messages=[{"role": "nobody", "content": ""}]),  # type: ignore[list-item, misc]
    )
    equal(error.param, "messages.0.role")
    error = _refused(
        openai.BadRequestError,
        lambda: client.responses.create(model=MODEL, input=QUESTION, temperature=1000),
    )
    equal(error.param, "temperature")
    error = _refused(
        openai.BadRequestError,
        lambda: client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "word " * 20_000}]
        ),
    )
    equal(error.code, "context_length_exceeded")
    error = _refused(openai.BadRequestError, lambda: _looked_at("https://example.com/cat.png"))
    assert error.param and error.param.startswith("messages.0.content.0.image_url"), error.param
    error = _refused(
        openai.BadRequestError,
        lambda: client.chat.completions.create(
            model=MODEL,
            messages=[
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": data_url(png(0, 0, 0))}}],
                }
            ],
        ),
    )


@check
def a_refused_stream_is_an_error_of_its_kind() -> None:
    error = _refused(
        openai.BadRequestError,
        lambda: list(
            client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=1000, stream=True)
        ),
    )
    equal(error.param, "temperature")


@check
def a_wrong_key_is_an_authentication_error() -> None:
    for key in ("ay-" + "x" * 43, "nonsense"):
        other = OpenAI(base_url=f"{BASE_URL}/v1", api_key=key, max_retries=0)
        _refused(openai.AuthenticationError, lambda other=other: other.models.list())
        _refused(
            openai.AuthenticationError,
            lambda other=other: other.chat.completions.create(model=MODEL, messages=MESSAGES),
        )


@check
def an_unknown_model_is_not_found() -> None:
    error = _refused(
        openai.NotFoundError,
        lambda: client.chat.completions.create(model="no-such-model", messages=MESSAGES),
    )
    equal((error.code, error.param), ("model_not_found", "model"))
    _refused(openai.NotFoundError, lambda: client.models.retrieve("no-such-model"))


@check
def too_many_requests_say_when_to_come_back() -> None:
    other = OpenAI(base_url=f"{BASE_URL}/v1", api_key=LIMITED_KEY, max_retries=0)

    def many() -> None:
        for _ in range(20):
            other.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1)

    error = _refused(openai.RateLimitError, many)
    assert int(error.response.headers["retry-after"]) >= 1
    equal(error.type, "rate_limit_error")


@check
def every_answer_has_a_request_id() -> None:
    raw = client.models.with_raw_response.list()
    assert raw.headers["x-request-id"]
    raw = client.models.with_raw_response.list(extra_headers={"x-request-id": "mine-1"})
    equal(raw.headers["x-request-id"], "mine-1")


if __name__ == "__main__":
    report("openai")
