"""What can be asked of an engine, as plain data that checks itself. Needs no torch.

A request says what is wanted and nothing of how: the native engine and a remote server read the same one.
Every list and number has a stated limit, so that a request's cost is known before it is taken.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal

from ayllu.chat.messages import Message, ToolDefinition
from ayllu.engine.parameters import Sampling, require_range
from ayllu.errors import UsageError, clip

MAX_ANSWERS = 64
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000
MAX_LOGPROBS = 20
MAX_PROMPT_CHARACTERS = 64 << 20
MAX_PROMPT_TOKENS = 1 << 24
MAX_TOOLS = 128
MAX_CHOICES = 10_000
MAX_STRUCTURE_CHARACTERS = 1 << 20
MAX_EMBEDDING_INPUTS = 2048
MAX_TENANT_CHARACTERS = 200
LOWEST_PRIORITY, HIGHEST_PRIORITY = -4, 4


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation, rendered by the model's own chat format."""

    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        if not self.messages:
            raise UsageError("The conversation is empty.", "Give at least one message.")
        characters = sum(len(message.text) for message in self.messages)
        require_range("characters of the conversation", characters, 0, MAX_PROMPT_CHARACTERS)


@dataclass(frozen=True)
class TextPrompt:
    """Plain text to continue. Special tokens typed in it stay text; BOS is added where the model wants it."""

    text: str

    def __post_init__(self) -> None:
        require_range("characters of the prompt", len(self.text), 0, MAX_PROMPT_CHARACTERS)


@dataclass(frozen=True)
class TokenPrompt:
    """Token ids to continue, exactly as they are."""

    token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        require_range("tokens of the prompt", len(self.token_ids), 1, MAX_PROMPT_TOKENS)


@dataclass(frozen=True)
class InfillPrompt:
    """Text with a gap, which the answer fills. Special tokens typed in either part stay text."""

    prefix: str
    suffix: str

    def __post_init__(self) -> None:
        characters = len(self.prefix) + len(self.suffix)
        require_range("characters of the prompt", characters, 1, MAX_PROMPT_CHARACTERS)


PromptInput = ChatPrompt | TextPrompt | TokenPrompt | InfillPrompt


@dataclass(frozen=True)
class JsonStructure:
    """The answer is one JSON value of this schema. `{"type": "object"}` is any object."""

    schema: dict[str, Any] | bool


@dataclass(frozen=True)
class RegexStructure:
    """The whole answer matches this regular expression."""

    pattern: str

    def __post_init__(self) -> None:
        require_range("characters of the pattern", len(self.pattern), 1, MAX_STRUCTURE_CHARACTERS)


@dataclass(frozen=True)
class ChoiceStructure:
    """The answer is one of these strings."""

    choices: tuple[str, ...]

    def __post_init__(self) -> None:
        require_range("number of choices", len(self.choices), 1, MAX_CHOICES)
        require_range("characters of the choices", sum(map(len, self.choices)), 1, MAX_STRUCTURE_CHARACTERS)


@dataclass(frozen=True)
class GrammarStructure:
    """The answer follows a grammar: Lark as llguidance reads it, or llama.cpp's EBNF dialect (GBNF)."""

    source: str
    syntax: Literal["lark", "ebnf"] = "lark"

    def __post_init__(self) -> None:
        require_range("characters of the grammar", len(self.source), 1, MAX_STRUCTURE_CHARACTERS)
        if self.syntax not in ("lark", "ebnf"):
            raise UsageError(
                f"There is no grammar syntax {clip(repr(self.syntax))}.", "Use 'lark' or 'ebnf'."
            )


Structure = JsonStructure | RegexStructure | ChoiceStructure | GrammarStructure


@dataclass(frozen=True)
class ToolUse:
    """Functions on offer. choice: 'auto' (the model decides), 'none', 'required' (at least one call), or the
    name of the function that must be called. parallel: whether an answer may hold several calls."""

    tools: tuple[ToolDefinition, ...]
    choice: str = "auto"
    parallel: bool = True

    def __post_init__(self) -> None:
        require_range("number of tools", len(self.tools), 1, MAX_TOOLS)
        names = [tool.name for tool in self.tools]
        if len(set(names)) != len(names):
            raise UsageError("Two tools have the same name.", "Give each tool its own name.")
        if self.choice not in ("auto", "none", "required", *names):
            raise UsageError(
                f"The tool choice {clip(repr(self.choice))} is none of the tools.",
                "Use 'auto', 'none', 'required' or the name of a tool on offer.",
            )


def new_request_id() -> str:
    """An id no other request has."""
    return os.urandom(16).hex()


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """One prompt to be answered `n` times.

    max_new_tokens None means: up to the end of the context. logprobs asks for each token's log-probability
    and that many likeliest alternatives (0: the token alone); prompt_logprobs the same of the prompt. seed,
    in `sampling`, fixes the draws; the i-th of n answers draws from its own stream of that seed. priority:
    higher goes first, but never for ever (see `scheduler`). tenant: who asks; requests of different tenants
    share no cached prompt, and the queue treats tenants alike. adapter: name of a loaded LoRA adapter.
    ignore_stop_tokens: answer up to the limit, for measurements.
    """

    prompt: PromptInput
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structure: Structure | None = None
    tool_use: ToolUse | None = None
    adapter: str | None = None
    priority: int = 0
    tenant: str = ""
    ignore_stop_tokens: bool = False
    id: str = field(default_factory=new_request_id)

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            require_range("max_new_tokens", self.max_new_tokens, 0, MAX_PROMPT_TOKENS)
        require_range("n", self.n, 1, MAX_ANSWERS)
        require_range("number of stop strings", len(self.stop), 0, MAX_STOPS)
        for stop in self.stop:
            require_range("characters of a stop string", len(stop), 1, MAX_STOP_CHARACTERS)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                require_range(name, getattr(self, name), 0, MAX_LOGPROBS)
        require_range("priority", self.priority, LOWEST_PRIORITY, HIGHEST_PRIORITY)
        require_range("characters of the tenant", len(self.tenant), 0, MAX_TENANT_CHARACTERS)
        if self.tool_use is not None and not isinstance(self.prompt, ChatPrompt):
            raise UsageError("Tools need a conversation.", "Give messages instead of a plain prompt.")
        if self.structure is not None and self.tool_use is not None and self.tool_use.choice != "none":
            raise UsageError(
                "A structure and tools exclude each other: one answer cannot be both.",
                "Leave one out, or set tool_choice to 'none'.",
            )
        if self.max_new_tokens == 0 and self.prompt_logprobs is None:
            raise UsageError(
                "max_new_tokens = 0 asks for nothing.", "Ask for a token, or for prompt_logprobs."
            )


@dataclass(frozen=True, kw_only=True)
class EmbedRequest:
    """Texts (or token ids) to be turned into one vector each, of unit length unless normalise is False."""

    inputs: tuple[str | tuple[int, ...], ...]
    normalise: bool = True
    tenant: str = ""
    id: str = field(default_factory=new_request_id)

    def __post_init__(self) -> None:
        require_range("number of inputs", len(self.inputs), 1, MAX_EMBEDDING_INPUTS)
        total = sum(map(len, self.inputs))
        require_range("length of all inputs together", total, 1, MAX_PROMPT_CHARACTERS)
        require_range("characters of the tenant", len(self.tenant), 0, MAX_TENANT_CHARACTERS)
