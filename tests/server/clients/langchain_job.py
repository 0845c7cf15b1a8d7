"""LangChain's OpenAI client against the server: chat, streams, tools, structured output, images, vectors."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from checks import (
    BASE_URL,
    EMBEDDING_MODEL,
    KEY,
    MODEL,
    QUESTION,
    SYSTEM,
    VISION_MODEL,
    WEATHER,
    check,
    data_url,
    equal,
    fits_weather,
    png,
    report,
)
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel

SERVER: Any = {"base_url": f"{BASE_URL}/v1", "api_key": KEY, "max_retries": 0}


def model(**more: Any) -> ChatOpenAI:
    return ChatOpenAI(**{"model": MODEL, "temperature": 0, "max_tokens": 24, **SERVER, **more})


class Person(BaseModel):
    """A person."""

    name: Literal["Ada", "Alan", "Grace"]
    age: int


@tool
def get_weather(city: Literal["Paris", "Lima", "Tokyo"], unit: Literal["C", "F"]) -> str:
    """The temperature in a city."""
    return f"21 degrees {unit} in {city}"


@check
def chat_answers_and_streams_the_same() -> None:
    whole = model().invoke([SystemMessage(SYSTEM), HumanMessage(QUESTION)])
    assert "Paris" in whole.content, whole
    assert whole.usage_metadata is not None and whole.usage_metadata["input_tokens"] > 0
    chunks = list(model(stream_usage=True).stream([SystemMessage(SYSTEM), HumanMessage(QUESTION)]))
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk  # type: ignore[assignment]
    equal(total.content, whole.content)
    assert total.usage_metadata is not None
    equal(total.usage_metadata["output_tokens"], whole.usage_metadata["output_tokens"])


@check
def several_are_asked_at_once() -> None:
    questions = [QUESTION, "What is the capital of Italy?", "What is the capital of Japan?"]
    asked: list[Any] = [[SystemMessage(SYSTEM), HumanMessage(question)] for question in questions]
    together = asyncio.run(model().abatch(asked))
    equal([answer.content for answer in together], [model().invoke(one).content for one in asked])


@check
def tools_are_called_and_their_results_go_back() -> None:
    for named in ("get_weather", "required"):
        bound = model(max_tokens=100).bind_tools([get_weather], tool_choice=named, parallel_tool_calls=False)
        asked: list[Any] = [HumanMessage(WEATHER)]
        made = bound.invoke(asked)
        assert isinstance(made, AIMessage)
        (call,) = made.tool_calls
        fits_weather(call["args"])
        total: Any = None
        for chunk in bound.stream(asked):
            total = chunk if total is None else total + chunk
        equal([(one["name"], one["args"]) for one in total.tool_calls], [(call["name"], call["args"])])
        result = get_weather.invoke(call)
        assert isinstance(result, ToolMessage)
        second = model().bind_tools([get_weather], tool_choice="none").invoke([*asked, made, result])
        assert second.content


@check
def structured_output_fits_its_class() -> None:
    methods: tuple[Any, ...] = ("json_schema", "function_calling")
    for method in methods:
        structured = model(max_tokens=100).with_structured_output(Person, method=method)
        found = structured.invoke("Describe Ada, 36 years old.")
        assert isinstance(found, Person), (method, found)


@check
def pictures_are_seen() -> None:
    content: list[Any] = [
        {"type": "text", "text": "what?"},
        {"type": "image_url", "image_url": {"url": data_url(png(255, 0, 0))}},
    ]
    asked = model(model=VISION_MODEL, max_tokens=4)
    counts = [
        (asked.invoke([HumanMessage(parts)]).usage_metadata or {})["input_tokens"]
        for parts in (content, content[:1])
    ]
    assert counts[0] > counts[1], counts


@check
def logprobs_are_read() -> None:
    made = model(logprobs=True, top_logprobs=2).invoke(QUESTION)
    assert made.response_metadata["logprobs"]["content"][0]["top_logprobs"]


@check
def responses_answer_stream_and_call_tools() -> None:
    asked = model(use_responses_api=True)
    messages: list[Any] = [SystemMessage(SYSTEM), HumanMessage(QUESTION)]
    whole = asked.invoke(messages)
    assert "Paris" in whole.text, whole
    total: Any = None
    for chunk in asked.stream(messages):
        total = chunk if total is None else total + chunk
    equal(total.text, whole.text)
    bound = model(use_responses_api=True, max_tokens=100).bind_tools([get_weather], tool_choice="get_weather")
    made = bound.invoke(WEATHER)
    assert isinstance(made, AIMessage) and made.tool_calls
    fits_weather(made.tool_calls[0]["args"])


@check
def text_is_completed() -> None:
    completes = OpenAI(model=MODEL, temperature=0, max_tokens=6, **SERVER)
    whole = completes.invoke("The capital of France is")
    assert "Paris" in whole, whole
    equal("".join(completes.stream("The capital of France is")), whole)


@check
def texts_are_embedded() -> None:
    embeds = OpenAIEmbeddings(model=EMBEDDING_MODEL, check_embedding_ctx_length=False, **SERVER)
    equal(len(embeds.embed_query("a cat")), 384)
    equal([len(vector) for vector in embeds.embed_documents(["a cat", "a dog"])], [384, 384])


if __name__ == "__main__":
    report("langchain")
