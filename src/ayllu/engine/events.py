"""What an engine says while it works on a request: typed events, the same from every engine.

The order for one request: `Started`, perhaps `PromptScored`; for each of the n answers any number of
`TextDelta` and `ToolCallMade` and one `AnswerFinished`, answers interleaved; last `Done` or `Failed`.
`Failed` may come at any time, and nothing comes after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ayllu.chat.messages import ToolCall
from ayllu.errors import AylluError

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its natural-log probability under the model, before any sampling rule.

    `token_bytes` is what it adds to the text, `token_id` None where a remote engine does not tell it, and
    `alternatives` the likeliest tokens at this place, best first.
    """

    token_bytes: bytes
    logprob: float
    token_id: int | None = None
    alternatives: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Started:
    """The first piece of the prompt is being computed. cached_tokens of it were found in the prefix cache."""

    prompt_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class PromptScored:
    """The prompt's tokens with their log-probabilities; the first has none (None), but its text may be told:
    `first_bytes`, empty for a control token."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob | None, ...]
    first_bytes: bytes = b""


@dataclass(frozen=True)
class TextDelta:
    """More text of answer `index`, and the tokens it came with. Text may lag behind its tokens: a character
    that is not whole yet, or what may turn out to be a stop string, is held back."""

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class ToolCallMade:
    """A complete tool call of answer `index`, the `call_index`-th of that answer (from 0)."""

    index: int
    call_index: int
    call: ToolCall


@dataclass(frozen=True)
class AnswerFinished:
    """Answer `index` is complete. stop: the stop string that ended it, if one did."""

    index: int
    reason: FinishReason
    new_tokens: int
    stop: str | None = None


@dataclass(frozen=True)
class Done:
    """All answers are complete. new_tokens counts those of all answers."""

    prompt_tokens: int
    new_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Failed:
    """The request ended with an error; what was said before stays said."""

    error: AylluError


Event = Started | PromptScored | TextDelta | ToolCallMade | AnswerFinished | Done | Failed
TERMINAL = (Done, Failed)
