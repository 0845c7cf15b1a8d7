"""A stream as people and programs mostly want it: the text of one answer while it comes, then the counts."""

from __future__ import annotations

import time
from collections.abc import Iterator

from ayllu.chat.messages import ToolCall
from ayllu.engine.events import AnswerFinished, Done, FinishReason, Started, TextDelta, ToolCallMade
from ayllu.engine.protocol import Stream


class Reply:
    """The first answer of a stream. Iterate over it for the text; a failed request raises its error there.

    finish_reason is None until the answer has ended.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.new_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.tool_calls: list[ToolCall] = []
        self.started = time.perf_counter()
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None

    def __iter__(self) -> Iterator[str]:
        for event in self.stream.results():
            match event:
                case Started(prompt_tokens, cached_tokens):
                    self.prompt_tokens, self.cached_tokens = prompt_tokens, cached_tokens
                case TextDelta(index=0, text=text):
                    self.last_token_at = time.perf_counter()
                    self.first_token_at = self.first_token_at or self.last_token_at
                    if text:
                        yield text
                case ToolCallMade(index=0, call=call):
                    self.tool_calls.append(call)
                case AnswerFinished(index=0, reason=reason):
                    self.finish_reason = reason
                case Done(prompt_tokens, new_tokens):
                    self.prompt_tokens, self.new_tokens = prompt_tokens, new_tokens

    def stop(self) -> str:
        """Cancel the answer and wait for its end; the text that was still under way."""
        self.stream.cancel()
        return "".join(self)

    @property
    def prefill_seconds(self) -> float | None:
        """From the request to the first token."""
        return None if self.first_token_at is None else self.first_token_at - self.started

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Speed after the first token; None for answers too short to tell."""
        if self.first_token_at is None or self.last_token_at is None or self.new_tokens < 2:
            return None
        return (self.new_tokens - 1) / max(self.last_token_at - self.first_token_at, 1e-9)
