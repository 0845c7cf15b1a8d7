"""A request in the front: what was asked becomes what the core computes, and its events become public ones.

Before: rendered, tokenised, images cut, limits checked, grammar compiled once to see that it can be. After:
tool calls found in the text, structured answers validated. Whatever goes wrong in here is one request's
failure and says at which stage it happened. Needs no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ayllu.chat.images import ImageConfig
from ayllu.chat.messages import ImagePart, Message, Part, ToolCall
from ayllu.engine.events import AnswerFinished, Event, TextDelta, ToolCallMade
from ayllu.engine.model_files import EncoderFiles, ModelFiles, image_config_for
from ayllu.engine.parameters import require_range
from ayllu.engine.prepared import CoreFacts, GrammarSpec, PreparedEmbedding, PreparedImage, PreparedRequest
from ayllu.engine.requests import (
    ChatPrompt,
    EmbedRequest,
    GenerateRequest,
    InfillPrompt,
    JsonStructure,
    PromptInput,
    TextPrompt,
    TokenPrompt,
    ToolUse,
)
from ayllu.errors import (
    AylluError,
    ContextOverflowError,
    RequestFailedError,
    UnsupportedError,
    UsageError,
    clip,
)

if TYPE_CHECKING:
    from ayllu.chat import toolcalls
    from ayllu.chat.infill import InfillFormat
    from ayllu.chat.toolcalls import ToolCallParser
    from ayllu.engine.grammar_check import GrammarChecker
    from ayllu.engine.image_cutter import ImageCutter

MAX_ID_CHARACTERS = 200


@dataclass(frozen=True)
class Prepared:
    """A request both ways: what goes to the core, and what makes public events of the core's."""

    request: PreparedRequest
    public: PublicEvents


class Preparation:
    """Prepares requests to a model that answers. Every method may be called from any thread.

    A request that cannot be met raises what it should learn: UsageError, ContextOverflowError, ImageError,
    TemplateError, GrammarError or UnsupportedError; RequestFailedError where ayllu itself is at fault.
    """

    def __init__(self, files: ModelFiles, facts: CoreFacts) -> None:
        self._files = files
        self._facts = facts
        self._checker: GrammarChecker | None = None
        self._cutter: ImageCutter | None = None
        self._making = threading.Lock()

    def prepare(self, request: GenerateRequest) -> Prepared:
        """Everything the core needs for `request`."""
        tools = _offered(request.tool_use)
        with _stage("checked"):
            _require_unicode(request)
            self._require_tokens_known("logit_bias", request.sampling.logit_bias)
        with _stage("rendered as a prompt"):
            token_ids, images = self._prompt(request.prompt, tools)
            if not token_ids:
                raise UsageError("The prompt is empty.", "Give at least one token.")
        with _stage("fitted into the context"):
            room = self._room(len(token_ids), request)
        with _stage("given a grammar"):
            grammar = self._grammar(request, tools)
        asked = request.max_new_tokens
        prepared = PreparedRequest(
            id=request.id,
            token_ids=token_ids,
            max_new_tokens=room if asked is None else min(asked, room),
            sampling=request.sampling,
            images=images,
            stop_ids=frozenset() if request.ignore_stop_tokens else self._stop_ids(request.prompt),
            stop=request.stop,
            n=request.n,
            logprobs=request.logprobs,
            prompt_logprobs=request.prompt_logprobs,
            grammar=grammar,
            adapter=request.adapter,
            priority=request.priority,
            tenant=request.tenant,
            # The markers around calls are control tokens in some families, and the parser looks for them.
            skip_specials=tools is None,
            continuation=not isinstance(request.prompt, ChatPrompt),
        )
        return Prepared(prepared, PublicEvents(request, tools, self._parser_for(tools)))

    def prepare_embedding(self, request: EmbedRequest) -> PreparedEmbedding:
        """The inputs as token lists."""
        with _stage("tokenised"):
            _require_unicode(request)
            inputs = [
                self._text_ids(item) if isinstance(item, str) else list(item) for item in request.inputs
            ]
            for tokens in inputs:
                if not tokens:
                    raise UsageError("An input has no tokens.", "Give at least one token.")
                if len(tokens) > self._facts.context:
                    raise ContextOverflowError(
                        f"An input has {len(tokens)} tokens; the context holds {self._facts.context}.",
                        "Cut the text into pieces, or raise --context.",
                    )
                self._require_tokens_known("an input", tokens)
        return PreparedEmbedding(
            id=request.id, inputs=inputs, normalise=request.normalise, tenant=request.tenant
        )

    def token_ids(
        self,
        prompt: PromptInput,
        tool_use: ToolUse | None = None,
        *,
        add_special_tokens: bool = True,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """See `TokenCounter.token_ids`."""
        with _stage("rendered as a prompt"):
            if isinstance(prompt, TextPrompt) and not add_special_tokens:
                return self._files.tokenizer.encode(prompt.text)
            return self._prompt(prompt, _offered(tool_use), add_generation_prompt=add_generation_prompt)[0]

    def close(self) -> None:
        """End what was started for checks. Idempotent."""
        with self._making:
            checker, self._checker = self._checker, None
            cutter, self._cutter = self._cutter, None
        for helper in (checker, cutter):
            if helper is not None:
                helper.close()

    def _prompt(
        self, prompt: PromptInput, tools: ToolUse | None, *, add_generation_prompt: bool = True
    ) -> tuple[list[int], tuple[PreparedImage, ...]]:
        images: tuple[PreparedImage, ...] = ()
        match prompt:
            case ChatPrompt(messages):
                rendered = self._files.chat_format.render(
                    self._with_tiles(messages),
                    () if tools is None else tools.tools,
                    add_generation_prompt=add_generation_prompt,
                )
                images = tuple(PreparedImage.of(image.pixels) for image in rendered.images)
                token_ids = rendered.token_ids
            case TextPrompt(text):
                token_ids = self._text_ids(text)
            case TokenPrompt(given):
                token_ids = list(given)
            case InfillPrompt(prefix, suffix):
                token_ids = self._infill().render(prefix, suffix)
        self._require_tokens_known("the prompt", token_ids)
        return token_ids, images

    def _with_tiles(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages, their images cut into tiles by processes that do nothing else."""
        if not any(isinstance(part, ImagePart) for turn in messages for part in turn.parts):
            return messages
        if not self._facts.reads_images:
            raise UsageError("This model reads no images.", "Choose a model with a vision tower.")
        config = image_config_for(self._files.checkpoint.config) or ImageConfig()
        made, patches = [], 0
        for turn in messages:
            parts: list[Part] = []
            for part in turn.parts:
                if isinstance(part, ImagePart):
                    tiled = self._image_cutter().tiles(part.data, config)
                    patches += len(tiled.pixels) * config.tokens_per_tile
                    # Many small images make much of little: what cannot fit is not cut to the end first.
                    if patches > self._facts.context:
                        raise ContextOverflowError(
                            f"The images alone have more tokens than the context of {self._facts.context}.",
                            "Send fewer or smaller images, or raise --context.",
                        )
                    part = dataclasses.replace(part, tiled=tiled)
                parts.append(part)
            made.append(dataclasses.replace(turn, content=tuple(parts)))
        return made

    def _image_cutter(self) -> ImageCutter:
        # Imported here: most requests carry no image.
        from ayllu.engine.image_cutter import ImageCutter

        with self._making:
            if self._cutter is None:
                self._cutter = ImageCutter()
            return self._cutter

    def _infill(self) -> InfillFormat:
        from ayllu.chat.infill import infill_format_for

        found = infill_format_for(self._files.tokenizer, self._files.checkpoint.metadata)
        if found is None:
            raise UnsupportedError(
                "This model cannot fill gaps: its vocabulary has no fill-in-the-middle tokens.",
                "Leave suffix out, or use a model that has them, such as Qwen 2.5 Coder.",
            )
        return found

    def _stop_ids(self, prompt: PromptInput) -> frozenset[int]:
        own = self._files.stop_ids
        return own | self._infill().stop_ids if isinstance(prompt, InfillPrompt) else own

    def _text_ids(self, text: str) -> list[int]:
        tokenizer = self._files.tokenizer
        ids = tokenizer.encode(text)
        return [tokenizer.bos_id, *ids] if tokenizer.add_bos and tokenizer.bos_id is not None else ids

    def _room(self, prompt_tokens: int, request: GenerateRequest) -> int:
        """Tokens that an answer may have. Scoring alone (max_new_tokens 0) needs no room for one."""
        context = self._facts.context
        if prompt_tokens > context or (prompt_tokens == context and request.max_new_tokens != 0):
            what = "conversation" if isinstance(request.prompt, ChatPrompt) else "prompt"
            raise ContextOverflowError(
                f"The {what} has {prompt_tokens} tokens; the context holds {context}.",
                "Start a new conversation (/new), shorten the input, or raise --context.",
            )
        return context - prompt_tokens

    def _require_tokens_known(self, where: str, token_ids: Iterable[int]) -> None:
        size = self._facts.vocab_size
        outside = next((token for token in token_ids if not 0 <= token < size), None)
        if outside is not None:
            raise UsageError(
                f"Token {outside} in {where} is not in the vocabulary of {size}.",
                "Use this model's tokenizer.",
            )

    def _grammar(self, request: GenerateRequest, tools: ToolUse | None) -> GrammarSpec | None:
        # Imported here: most requests need no grammar, and the libraries behind take time to load.
        if request.structure is not None:
            from ayllu.engine.grammar import grammar_of

            grammar: GrammarSpec | None = grammar_of(request.structure)
        elif tools is not None:
            from ayllu.engine.tool_grammar import tool_grammar

            grammar = tool_grammar(self._files.chat_format, tools, self._files.tokenizer)
        else:
            return None
        if grammar is not None:
            self._grammar_checker().check(grammar)
        return grammar

    def _grammar_checker(self) -> GrammarChecker:
        from ayllu.engine.grammar_check import GrammarChecker

        with self._making:
            if self._checker is None:
                self._checker = GrammarChecker(self._files.tokenizer, self._files.stop_ids)
            return self._checker

    def _parser_for(self, tools: ToolUse | None) -> Callable[[], ToolCallParser] | None:
        if tools is None:
            return None
        return partial(self._files.chat_format.tool_call_parser, tools.tools)


def _offered(tool_use: ToolUse | None) -> ToolUse | None:
    """The tools that the model is shown."""
    return None if tool_use is None or tool_use.choice == "none" else tool_use


class EncoderPreparation:
    """Prepares requests to a model that makes vectors and does not answer."""

    def __init__(self, files: EncoderFiles) -> None:
        self._files = files

    def prepare(self, request: GenerateRequest) -> Prepared:
        """Raises UsageError."""
        raise UsageError(
            f"{self._files.path.name} makes vectors of texts; it does not answer.",
            "Choose a model that generates.",
        )

    def prepare_embedding(self, request: EmbedRequest) -> PreparedEmbedding:
        """The inputs as token lists. Raises UsageError or ContextOverflowError."""
        tokenizer = self._files.tokenizer
        with _stage("tokenised"):
            _require_unicode(request)
            inputs = [tokenizer.encode(i) if isinstance(i, str) else list(i) for i in request.inputs]
            for tokens in inputs:
                tokenizer.require_valid(tokens)
        return PreparedEmbedding(
            id=request.id, inputs=inputs, normalise=request.normalise, tenant=request.tenant
        )

    def token_ids(
        self,
        prompt: PromptInput,
        tool_use: ToolUse | None = None,
        *,
        add_special_tokens: bool = True,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """See `TokenCounter.token_ids`. Raises UsageError for a conversation."""
        tokenizer = self._files.tokenizer
        if isinstance(prompt, TextPrompt):
            with _stage("tokenised"):
                return (tokenizer if add_special_tokens else tokenizer.tokenizer).encode(prompt.text)
        if isinstance(prompt, TokenPrompt):
            return list(prompt.token_ids)
        raise UsageError(
            f"{self._files.path.name} makes vectors of texts; it reads no conversation.",
            "Give a text, or choose a model that generates.",
        )

    def close(self) -> None:
        """Nothing was started."""


class PublicEvents:
    """Makes public events of the core's, for one request. For one thread."""

    def __init__(
        self,
        request: GenerateRequest,
        tools: ToolUse | None = None,
        new_parser: Callable[[], ToolCallParser] | None = None,
    ) -> None:
        self._request = request
        self._parallel = tools is None or tools.parallel
        self._new_parser = new_parser
        self._schema = request.structure if isinstance(request.structure, JsonStructure) else None
        self._answers: dict[int, _PublicAnswer] = {}

    def of(self, event: Event) -> list[Event]:
        """What `event` becomes. Raises RequestFailedError for an answer that is not what was promised."""
        with _stage("answered, because its answer could not be read"):
            if isinstance(event, TextDelta):
                return self._answer(event.index).said(event)
            if isinstance(event, AnswerFinished):
                return self._answer(event.index).finished(event)
            return [event]

    def _answer(self, index: int) -> _PublicAnswer:
        if index not in self._answers:
            parser = None if self._new_parser is None else self._new_parser()
            self._answers[index] = _PublicAnswer(
                f"{self._request.id}/{index}", parser, self._schema, parallel=self._parallel
            )
        return self._answers[index]


class _PublicAnswer:
    """One answer: its text through the tool-call parser, or collected to be validated."""

    def __init__(
        self, key: str, parser: ToolCallParser | None, schema: JsonStructure | None, *, parallel: bool
    ) -> None:
        self._key = key
        self._parser = parser
        self._schema = schema
        self._parallel = parallel
        self._text: list[str] = []
        self._calls = 0

    def said(self, delta: TextDelta) -> list[Event]:
        if self._schema is not None:
            self._text.append(delta.text)
        if self._parser is None:
            return [delta]
        return self._parsed(delta.index, self._parser.push(delta.text), delta)

    def finished(self, end: AnswerFinished) -> list[Event]:
        events = [] if self._parser is None else self._parsed(end.index, self._parser.finish())
        if self._schema is not None and end.reason == "stop" and end.stop is None:
            self._validate(self._schema)
        if self._calls and end.reason == "stop":
            end = dataclasses.replace(end, reason="tool_calls")
        return [*events, end]

    def _parsed(
        self, index: int, found: Sequence[toolcalls.Event], delta: TextDelta | None = None
    ) -> list[Event]:
        """Parsed events as ours; the tokens of `delta`, whose text may be held back, come with the first."""
        from ayllu.chat import toolcalls

        said: list[Event] = []
        if delta is not None and delta.token_ids:
            said.append(dataclasses.replace(delta, text=""))
        for event in found:
            if isinstance(event, toolcalls.ToolCallReady):
                # Without leave to make several calls, what follows the first one is none of the answer.
                if self._calls == 0 or self._parallel:
                    said.append(ToolCallMade(index, self._calls, self._with_id(event.call)))
                    self._calls += 1
            elif said and isinstance(last := said[-1], TextDelta):
                said[-1] = dataclasses.replace(last, text=last.text + event.text)
            else:
                said.append(TextDelta(index, event.text))
        return said

    def _with_id(self, call: ToolCall) -> ToolCall:
        """The call under an id that no other has. One that the model wrote is no such id: it may repeat."""
        number = hashlib.sha256(f"{self._key}/{self._calls}".encode()).hexdigest()
        return dataclasses.replace(call, id=f"call_{number[:24]}")

    def _validate(self, structure: JsonStructure) -> None:
        from ayllu.engine.json_schema import validate_json

        validate_json(structure.schema, "".join(self._text))


@contextmanager
def _stage(what: str) -> Iterator[None]:
    """Whatever nobody expected at a stage of one request is that request's failure, and names the stage."""
    try:
        yield
    except AylluError:
        raise
    except Exception as error:
        raise RequestFailedError(
            f"The request could not be {what}: {type(error).__name__}: {clip(error)}.",
            "This is an error in ayllu: please report it.",
        ) from error


def _require_unicode(request: GenerateRequest | EmbedRequest) -> None:
    """Names go to another process as UTF-8, which half a character (a lone surrogate) is not."""
    require_range("characters of the id", len(request.id), 1, MAX_ID_CHARACTERS)
    names = {"id": request.id, "tenant": request.tenant}
    if isinstance(request, GenerateRequest):
        names |= {"adapter": request.adapter or "", "stop string": "".join(request.stop)}
    for name, text in names.items():
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UsageError(f"The {name} holds half a character.", "Send valid Unicode text.")
