"""Answers that follow a grammar: what is asked becomes a grammar, and the grammar a mask over the vocabulary.

`grammar_of` runs where requests are prepared and only writes text. `GrammarCompiler` lives beside the model:
it compiles that text with the model's vocabulary and hands out one `TokenGrammar` per answer.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import llguidance
import numpy as np
from numpy.typing import NDArray

from ayllu.chat.tokenizer import Tokenizer
from ayllu.chat.vocabulary import valid_unicode
from ayllu.engine.grammar_ebnf import ebnf_to_lark
from ayllu.engine.grammar_errors import compile_error
from ayllu.engine.grammar_lark import check_lark
from ayllu.engine.grammar_reader import read_schema
from ayllu.engine.grammar_text import LarkWriter, embedded_grammar, literal
from ayllu.engine.grammar_vocabulary import COMPILING_STACK_BYTES, LIMITS, GrammarVocabulary
from ayllu.engine.grammar_writer import SchemaWriter
from ayllu.engine.json_schema import ends_in_escape, unsupported_in_pattern
from ayllu.engine.prepared import GrammarSpec
from ayllu.engine.requests import (
    ChoiceStructure,
    GrammarStructure,
    JsonStructure,
    RegexStructure,
    Structure,
)
from ayllu.errors import GrammarError, RequestFailedError, UnsupportedError, clip

MAX_CACHED_BYTES = 64 << 20
MAX_CACHED_GRAMMARS = 256
COMPILING_THREADS = 2

_BYTES_PER_GRAMMAR = 256 << 10
_BYTES_PER_CHARACTER = 400
"""What a compiled grammar takes, estimated from its text. Measured: 10 to 90; 355 for one long literal."""

_BYTES_PER_SECOND = 200 << 20
_MAX_GROWTH_BYTES = 16 << 20
"""All uses of a compiled grammar share the states of its lexer, which grow while masks are computed: by up to
280 MiB per second (measured) until LIMITS ends it. A grammar that has grown so far is compiled anew."""

_ALLOWED_SPECIAL = re.compile(r"<\[(\d{1,9})\]>", re.ASCII)


def grammar_of(structure: Structure) -> GrammarSpec:
    """The grammar of what an answer must look like, not compiled yet.

    JSON is written compactly: one space at most behind commas and colons and no other white space, because a
    small model that may write white space may never stop. Raises GrammarError (wrong or too large) and
    UnsupportedError (right, but more than a grammar can keep), naming the place.
    """
    match structure:
        case JsonStructure(schema=schema):
            tree = read_schema(schema)
            writer = LarkWriter()
            return GrammarSpec(writer.source(SchemaWriter(writer, tree).value(tree.root)))
        case ChoiceStructure(choices=choices):
            return GrammarSpec(_choice(choices))
        case RegexStructure(pattern=pattern):
            return GrammarSpec(_regex(pattern))
        case GrammarStructure(source=source, syntax=syntax):
            _require_text(source, "grammar")
            if syntax == "ebnf":
                source = ebnf_to_lark(source)
            else:
                check_lark(source)
            return GrammarSpec(embedded_grammar(source))


def _choice(choices: Iterable[str]) -> str:
    for choice in choices:
        _require_text(choice, "choice")
    writer = LarkWriter()
    return writer.source(writer.terminal(" | ".join(literal(choice) for choice in dict.fromkeys(choices))))


def _regex(pattern: str) -> str:
    _require_text(pattern, "pattern")
    shown = clip(repr(pattern), 60)
    if ends_in_escape(pattern):
        raise GrammarError(f"The pattern {shown} ends in the middle of an escape.", "Write two backslashes.")
    if found := unsupported_in_pattern(pattern):
        raise UnsupportedError(f"The pattern {shown} uses {found}.", "Write the pattern without it.")
    return embedded_grammar(f"start: /{llguidance.regex_to_lark(pattern, use_ascii='')}/")


def _require_text(text: str, what: str) -> None:
    if valid_unicode(text) != text:
        raise GrammarError(f"The {what} holds a lone surrogate, which no text can contain.", "Remove it.")


class GrammarCompiler:
    """Compiles grammars for one vocabulary and remembers the latest.

    `stop_ids` are allowed exactly where an answer is complete. Every method may be called from any thread.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_ids: Iterable[int],
        *,
        max_bytes: int = MAX_CACHED_BYTES,
        max_grammars: int = MAX_CACHED_GRAMMARS,
    ) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(stop_ids)
        self._max_bytes = max_bytes
        self._max_grammars = max_grammars
        self._cache: OrderedDict[str, _Compiled] = OrderedDict()
        self._lock = threading.Lock()
        self._making_vocabulary = threading.Lock()
        self._masks: _Masks | None = None
        self._threads: ThreadPoolExecutor | None = None

    def compile(self, spec: GrammarSpec, count: int = 1) -> Future[list[TokenGrammar]]:
        """Compile in a thread of its own; `count` grammars come out, each for one answer.

        The result raises GrammarError or UnsupportedError.
        """
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(COMPILING_THREADS, thread_name_prefix="grammar")
            before = threading.stack_size(COMPILING_STACK_BYTES)
            try:
                return self._threads.submit(self.compiled, spec, count)
            finally:
                threading.stack_size(before)

    def compiled(self, spec: GrammarSpec, count: int = 1) -> list[TokenGrammar]:
        """As `compile`, in this thread."""
        masks = self._vocabulary_masks()
        key = hashlib.sha256(spec.source.encode()).hexdigest()
        with self._lock:
            grammar = self._cache.get(key)
            if grammar is not None and grammar.worn_out:
                del self._cache[key]
                grammar = None
            elif grammar is not None:
                self._cache.move_to_end(key)
        if grammar is None:
            size = _BYTES_PER_GRAMMAR + _BYTES_PER_CHARACTER * len(spec.source)
            grammar = _Compiled(compiled_matcher(masks.library, spec), masks.keep(spec), size)
        with self._lock:
            self._cache[key] = grammar
            self._shrink()
        return [TokenGrammar(grammar, masks) for _ in range(count)]

    @property
    def cached_bytes(self) -> int:
        """Memory of what is remembered, as estimated."""
        with self._lock:
            return sum(grammar.bytes for grammar in self._cache.values())

    @property
    def cached_grammars(self) -> int:
        return len(self._cache)

    def close(self) -> None:
        """End the threads. Idempotent."""
        with self._lock:
            threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(cancel_futures=True)

    def _shrink(self) -> None:
        """Forget what has not been used for longest, until the rest is within the limits."""
        total = sum(grammar.bytes for grammar in self._cache.values())
        while total > self._max_bytes or len(self._cache) > self._max_grammars:
            _, grammar = self._cache.popitem(last=False)
            total -= grammar.bytes

    def _vocabulary_masks(self) -> _Masks:
        with self._making_vocabulary:
            if self._masks is None:
                vocabulary = GrammarVocabulary.of(self._tokenizer, self._stop_ids)
                self._masks = _Masks(vocabulary, vocabulary.library_tokenizer(self._tokenizer.encode))
            return self._masks


def compiled_matcher(library: llguidance.LLTokenizer, spec: GrammarSpec) -> llguidance.LLMatcher:
    """The library's matcher at its beginning, its first mask computed.

    Raises GrammarError or UnsupportedError when the grammar is wrong, too complex, or matches nothing.
    """
    matcher = llguidance.LLMatcher(library, spec.source, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise compile_error(matcher.get_error(), spec.source)
    return matcher


class _Compiled:
    """A compiled grammar, shared by the answers that follow it.

    Its matcher stays at the beginning. `mask_seconds` is the time that all masks so far took.
    """

    def __init__(self, matcher: llguidance.LLMatcher, keep: NDArray[np.uint8], size: int) -> None:
        self.matcher = matcher
        self.keep = keep
        self.failed = False
        self.mask_seconds = 0.0
        self._size = size

    @property
    def bytes(self) -> int:
        """The memory it takes, as estimated."""
        return self._size + min(int(self.mask_seconds * _BYTES_PER_SECOND), _MAX_GROWTH_BYTES)

    @property
    def worn_out(self) -> bool:
        """Whether new answers need a fresh one: this one has failed, or may have grown to its limit."""
        return self.failed or self.mask_seconds * _BYTES_PER_SECOND > _MAX_GROWTH_BYTES


class _Masks:
    """What all grammars of one vocabulary share: the library's tokenizer and masks as packed bits."""

    def __init__(self, vocabulary: GrammarVocabulary, library: llguidance.LLTokenizer) -> None:
        self.library = library
        self.size = len(vocabulary.tokens)
        self.stop_ids = frozenset(vocabulary.stop_ids)
        self._control = np.array(sorted(set(vocabulary.control_ids) - self.stop_ids), dtype=np.int64)
        self._width = (library.vocab_size + 31) // 32 * 4
        self._text = self._packed(np.delete(np.arange(self.size), self._control))
        self.stops = self._packed(np.array(vocabulary.stop_ids, dtype=np.int64))
        # Eight bounds for each value of a byte: +inf keeps a logit, -inf forbids it.
        bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
        self._bounds = np.where(bits, np.inf, -np.inf).astype(np.float32)
        self._scratch = threading.local()

    def keep(self, spec: GrammarSpec) -> NDArray[np.uint8]:
        """Bits of the tokens a grammar may allow: text, and control tokens that tool grammars of ours name.

        Grammars of users come as JSON and name none; but the library lets a negated pattern match anything,
        control tokens too.
        """
        if spec.source.startswith("{"):
            return self._text
        named = {int(number) for number in _ALLOWED_SPECIAL.findall(spec.source)}
        return self._text | self._packed(np.array(sorted(named & set(self._control)), dtype=np.int64))

    def apply(self, bits: NDArray[np.uint8], logits: NDArray[np.float32]) -> None:
        """Set logits [rows] to -inf where `bits` has no one, in place. Rows without a token are forbidden."""
        # Looking up eight at once takes 50 microseconds for 200,000 tokens whatever the mask; numpy's boolean
        # indexing up to 800, when allowed and forbidden tokens lie mixed.
        bounds: NDArray[np.float32] | None = getattr(self._scratch, "bounds", None)
        if bounds is None:
            bounds = self._scratch.bounds = np.empty((self._width, 8), dtype=np.float32)
        np.take(self._bounds, bits, axis=0, out=bounds, mode="clip")
        size = min(self.size, logits.size)
        np.minimum(logits[:size], bounds.reshape(-1)[:size], out=logits[:size])
        logits[size:] = -np.inf

    def _packed(self, tokens: NDArray[np.int64]) -> NDArray[np.uint8]:
        bits = np.zeros(self._width * 8, dtype=bool)
        bits[tokens] = True
        return np.packbits(bits, bitorder="little")


class TokenGrammar:
    """One answer's way through a grammar. For one thread at a time."""

    def __init__(self, compiled: _Compiled, masks: _Masks) -> None:
        self._compiled = compiled
        self._matcher = compiled.matcher.deep_copy()
        self._masks = masks
        self._bits: NDArray[np.uint8] | None = None
        self._stopped = False

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return self._masks.stop_ids

    def mask_logits(self, logits: NDArray[np.float32]) -> None:
        """Set what may not come next to -inf, in logits [rows], rows at least as many as there are tokens.

        Stop tokens are allowed exactly where the answer is complete. Raises RequestFailedError where nothing
        may come next, or the library gives up.
        """
        bits = self._allowed()
        if not bits.any() and not self.is_complete:
            raise RequestFailedError(
                "The grammar allows no token of this model here.", "Allow text that the vocabulary can write."
            )
        self._masks.apply(bits, logits)

    def allows(self, token: int) -> bool:
        """Whether `token` may come next."""
        return 0 <= token < self._masks.size and bool(self._allowed()[token >> 3] >> (token & 7) & 1)

    def accept(self, token: int) -> None:
        """Take a token as the next. Raises RequestFailedError for one that is not allowed."""
        if not self.allows(token):
            raise RequestFailedError(f"Token {token} does not follow the grammar.", "Sample from the mask.")
        self._bits = None
        if token in self._masks.stop_ids:
            self._stopped = True
        elif not self._matcher.consume_token(token):
            raise self._failure()

    def roll_back(self, count: int) -> None:
        """Undo the last `count` accepted tokens, none of which may be a stop token."""
        self._bits = None
        if self._stopped or not self._matcher.rollback(count):
            raise RequestFailedError("The grammar cannot go back.", "Start the answer again.")

    @property
    def is_complete(self) -> bool:
        """Whether the answer may end here."""
        return self._stopped or self._matcher.is_accepting()

    @property
    def must_stop(self) -> bool:
        """Whether the answer is complete and nothing can be added. Raises as `mask_logits` does."""
        return self._stopped or (self.is_complete and not (self._allowed() & ~self._masks.stops).any())

    def _allowed(self) -> NDArray[np.uint8]:
        if self._stopped:
            raise RequestFailedError("The answer has ended already.", "Start another one.")
        if self._bits is None:
            # When something fails inside, the library allows the stop tokens and says so only if asked.
            began = time.thread_time()
            data = self._matcher.compute_bitmask()
            self._compiled.mask_seconds += time.thread_time() - began
            if self._matcher.is_error():
                raise self._failure()
            keep = self._compiled.keep
            self._bits = np.frombuffer(data, np.uint8, keep.size) & keep
        return self._bits

    def _failure(self) -> RequestFailedError:
        self._compiled.failed = True
        reason = clip(self._matcher.get_error().partition("\n")[0])
        return RequestFailedError(f"The grammar cannot be followed any further: {reason}.", "Simplify it.")
