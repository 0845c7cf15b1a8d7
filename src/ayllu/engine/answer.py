"""One answer while it is being made: draws its tokens, turns them into text, and knows when it is over.

Sampler, grammar, detokeniser and stop strings of one answer meet here, and nothing of any other answer does.
Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ayllu.chat.detokenizer import StreamDecoder
from ayllu.chat.tokenizer import Tokenizer
from ayllu.engine.events import AnswerFinished, Event, FinishReason, PromptScored, TextDelta, TokenLogprob
from ayllu.engine.prepared import PreparedRequest
from ayllu.engine.sampling import Sampler, logprobs_of
from ayllu.engine.sequence import Sequence
from ayllu.engine.stop_strings import StopStrings


class Grammar(Protocol):
    """What an answer asks of a compiled grammar (`ayllu.engine.grammar.TokenGrammar` is one)."""

    def mask_logits(self, logits: NDArray[np.float32]) -> None: ...
    def accept(self, token: int) -> None: ...
    @property
    def must_stop(self) -> bool: ...


class Answer:
    """The `index`-th answer to a request. `finished` is None while it goes on."""

    def __init__(
        self,
        request: PreparedRequest,
        index: int,
        sequence: Sequence,
        tokenizer: Tokenizer,
        grammar: Grammar | None,
    ) -> None:
        self.request = request
        self.index = index
        self.sequence = sequence
        self.finished: FinishReason | None = None
        self.tokens: list[int] = []
        self._tokenizer = tokenizer
        self._sampler = Sampler(request.sampling, index)
        self._grammar = grammar
        self._decoder = StreamDecoder(
            tokenizer, skip_specials=request.skip_specials, continuation=request.continuation
        )
        self._stops = StopStrings(request.stop)
        self._unsent_tokens: list[int] = []
        self._unsent_logprobs: list[TokenLogprob] = []

    def draw(self, logits: NDArray[np.float32]) -> int:
        """The next token from logits [vocab_size]. Raises what `Sampler.next_token` and the grammar raise."""
        mask = None if self._grammar is None else self._grammar.mask_logits
        token = self._sampler.next_token(logits, self.request.token_ids, self.tokens, mask)
        if self.request.logprobs is not None and token not in self.request.stop_ids:
            self._unsent_logprobs.append(token_logprob(self._tokenizer, logits, token, self.request.logprobs))
        return token

    def take(self, token: int) -> list[Event]:
        """Make a drawn token part of the answer; what there is to say, the end of the answer included."""
        if token in self.request.stop_ids:
            return self.finish("stop")
        if self._grammar is not None:
            self._grammar.accept(token)
        self.tokens.append(token)
        self.sequence.tokens.append(token)
        self._unsent_tokens.append(token)
        text, stop = self._stops.push(self._decoder.push(token))
        if stop is not None:
            return self._end("stop", text, stop)
        if self._grammar is not None and self._grammar.must_stop:
            return self.finish("stop", text)
        if len(self.tokens) >= self.request.max_new_tokens:
            return self.finish("length", text)
        return self._say(text) if text else []

    def finish(self, reason: FinishReason, text: str = "") -> list[Event]:
        """End the answer: what was held back is said, unless it turns out to be a stop string."""
        more, _ = self._stops.push(self._decoder.finish())
        # That a stop string is complete may show only now, when a longer one can no longer become of it.
        text += more + self._stops.finish()
        stop = self._stops.matched
        return self._end(reason if stop is None else "stop", text, stop)

    def _end(self, reason: FinishReason, text: str, stop: str | None) -> list[Event]:
        self.finished = reason
        said = self._say(text) if text or self._unsent_tokens else []
        return [*said, AnswerFinished(self.index, reason, len(self.tokens), stop)]

    def _say(self, text: str) -> list[Event]:
        event = TextDelta(self.index, text, tuple(self._unsent_tokens), tuple(self._unsent_logprobs))
        self._unsent_tokens, self._unsent_logprobs = [], []
        return [event]


def joined(events: AbstractSequence[Event]) -> list[Event]:
    """The events of one answer in one step, its text in one piece: each event travels on its own."""
    said: list[Event] = []
    for event in events:
        last = said[-1] if said else None
        if isinstance(event, TextDelta) and isinstance(last, TextDelta):
            said[-1] = TextDelta(
                event.index,
                last.text + event.text,
                last.token_ids + event.token_ids,
                last.logprobs + event.logprobs,
            )
        else:
            said.append(event)
    return said


def token_logprob(
    tokenizer: Tokenizer, logits: NDArray[np.float32], token: int, alternatives: int
) -> TokenLogprob:
    """A token's log-probability under raw logits [vocab_size], with the likeliest others."""
    chosen, others = logprobs_of(logits, token, alternatives)
    return TokenLogprob(
        _bytes(tokenizer, token),
        chosen,
        token,
        tuple(TokenLogprob(_bytes(tokenizer, other), value, other) for other, value in others),
    )


def _bytes(tokenizer: Tokenizer, token: int) -> bytes:
    return tokenizer.token_bytes(token) if token < tokenizer.embedding_rows else b""


class PromptScores:
    """Log-probabilities of a prompt's tokens, collected while its pieces are computed."""

    def __init__(self, request: PreparedRequest, tokenizer: Tokenizer) -> None:
        assert request.prompt_logprobs is not None
        self._tokens = request.token_ids
        self._alternatives = request.prompt_logprobs
        self._tokenizer = tokenizer
        self._logprobs: list[TokenLogprob | None] = [None] * len(request.token_ids)

    def rows_needed(self, start: int, stop: int) -> AbstractSequence[int]:
        """Positions of a piece [start, stop) whose logits tell of a next token of the prompt."""
        return range(start, min(stop, len(self._tokens) - 1))

    def add(self, position: int, logits: NDArray[np.float32]) -> None:
        """The logits [vocab_size] at `position` say how likely the token after it was."""
        token = self._tokens[position + 1]
        self._logprobs[position + 1] = token_logprob(self._tokenizer, logits, token, self._alternatives)

    def event(self) -> PromptScored:
        """All of them."""
        first = self._tokens[0]
        shown = b"" if self._tokenizer.is_control(first) else _bytes(self._tokenizer, first)
        return PromptScored(tuple(self._tokens), tuple(self._logprobs), shown)
