"""Text to tokens and back, one class for every vocabulary.

The rule that makes conversations safe stands here: `encode` knows no special tokens, so a marker typed by a
user stays plain text in every vocabulary; only `encode_trusted` and the trusted parts of `encode_segments`,
which the chat formats write themselves, can name one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from ayllu.chat.vocabulary import SpecialToken, TokenizerParts, valid_unicode
from ayllu.errors import ModelFileError, UnsupportedError, UsageError, did_you_mean
from ayllu.folder_files import member_path


class Tokenizer:
    """A vocabulary with its special tokens.

    Attributes: `vocab_size`, one more than the highest id that has a token; `embedding_rows`, one more than
    the highest id accepted when decoding (a model's table may be larger than its vocabulary); `bos_id` and
    `eos_id`, None where the source names none; `stop_ids`, after which generation ends; `add_bos`, whether
    the source wants a BOS before text that has no template; `specials`, every special token by name.
    """

    def __init__(self, parts: TokenizerParts) -> None:
        self._parts = parts
        self._vocabulary = parts.vocabulary
        self._by_name = {special.name: special for special in parts.specials}
        self._by_id = {special.id: special for special in parts.specials}
        self._bytes_by_id = {
            special.id: special.name.encode("utf-8", "replace") for special in parts.specials
        }
        self._finder = _SpecialFinder(self._by_name)
        self.specials: Mapping[str, int] = MappingProxyType({s.name: s.id for s in parts.specials})
        self.vocab_size = max(parts.vocabulary.size, max(self._by_id, default=-1) + 1)
        self.embedding_rows = max(self.vocab_size, parts.embedding_rows or 0)
        self.bos_id = parts.bos_id
        self.eos_id = parts.eos_id
        self.stop_ids = parts.stop_ids
        self.add_bos = parts.add_bos
        self._check_ids()

    @property
    def parts(self) -> TokenizerParts:
        """What this tokenizer was made from."""
        return self._parts

    def with_embedding_rows(self, rows: int) -> Tokenizer:
        """The same tokenizer for a model whose embedding table has `rows` rows (at least `vocab_size`)."""
        if rows < self.vocab_size:
            problem = f"{self._parts.source}: the vocabulary has {self.vocab_size} ids"
            raise UsageError(
                f"{problem}, the model's embedding only {rows} rows.", "Use the model's own tokenizer."
            )
        return Tokenizer(dataclasses.replace(self._parts, embedding_rows=rows))

    def encode(self, text: str) -> list[int]:
        """Ids of text from outside (users, tools, documents): never a special token, whatever is typed.

        Lone surrogates become U+FFFD first. No BOS is added.
        """
        return self.encode_segments([(text, False)])

    def encode_trusted(self, text: str) -> list[int]:
        """Ids of text that a chat format wrote itself: names of special tokens in it become those tokens.

        The longest name wins where several start at one place. No BOS is added.
        """
        return self.encode_segments([(text, True)])

    def encode_segments(self, segments: Iterable[tuple[str, bool]]) -> list[int]:
        """Ids of a rendered conversation given as (text, trusted) parts, in order.

        Special tokens are recognised inside trusted parts only. Plain text that touches across parts is
        encoded as one run, so the ids equal those of the whole text where nobody typed a marker.
        """
        ids: list[int] = []
        run: list[str] = []
        strip_next = False
        for text, special in self._runs(segments):
            if special is None:
                run.append(text)
                continue
            self._encode_run("".join(run), ids, strip_next, special.strip_left)
            run.clear()
            ids.append(special.id)
            strip_next = special.strip_right
        self._encode_run("".join(run), ids, strip_next, False)
        return ids

    def special_id(self, name: str) -> int:
        """The id of the special token `name`. Raises `UnsupportedError` where the vocabulary has none."""
        if name not in self._by_name:
            hint = did_you_mean(name, self._by_name)
            raise UnsupportedError(
                f"{self._parts.source}: this vocabulary has no special token '{name}'.{hint}",
                "Use a model of the family that has it.",
            )
        return self._by_name[name].id

    def is_special(self, token: int) -> bool:
        """Whether the id is a special token of any kind (control, or text added after training)."""
        return token in self._by_id

    def is_control(self, token: int) -> bool:
        """Whether the id steers the model and is hidden by `skip_specials`."""
        return token in self._by_id and self._by_id[token].control

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one id: a special's name, empty for ids without a token.

        Raises `UsageError` for an id outside [0, embedding_rows).
        """
        if token in self._bytes_by_id:
            return self._bytes_by_id[token]
        if 0 <= token < self._vocabulary.size:
            return self._vocabulary.bytes_of(token)
        if 0 <= token < self.embedding_rows:
            return b""
        raise UsageError(
            f"Token id {token} is outside 0..{self.embedding_rows - 1}.", "Use this model's own ids."
        )

    def decode_bytes(
        self, ids: Iterable[int], *, skip_specials: bool = False, continuation: bool = False
    ) -> bytes:
        """The bytes of `ids` in a row.

        `skip_specials` leaves control tokens out. `continuation` says that the ids go on from earlier text,
        so a leading space is kept where the vocabulary would otherwise take its own away.
        """
        renderer = ByteRenderer(self, skip_specials=skip_specials, continuation=continuation)
        return b"".join([renderer.push(token) for token in ids])

    def decode(self, ids: Iterable[int], *, skip_specials: bool = False, continuation: bool = False) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. See `decode_bytes` for the options."""
        data = self.decode_bytes(ids, skip_specials=skip_specials, continuation=continuation)
        return data.decode("utf-8", "replace")

    @property
    def space_prefix(self) -> str:
        """Where this vocabulary adds a leading space: 'none', 'first' or 'each' (see `Vocabulary`)."""
        return self._vocabulary.space_prefix

    def _runs(self, segments: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, SpecialToken | None]]:
        for text, trusted in segments:
            if trusted:
                yield from self._finder.split(text)
            else:
                yield text, None

    def _encode_run(self, text: str, ids: list[int], strip_left: bool, strip_right: bool) -> None:
        if strip_left:
            text = text.lstrip()
        if strip_right:
            text = text.rstrip()
        if not text:
            return
        prefix = self._vocabulary.space_prefix
        prefix_space = prefix == "each" or (prefix == "first" and not ids)
        ids += self._vocabulary.encode(valid_unicode(text), prefix_space=prefix_space)

    def _check_ids(self) -> None:
        named = {"bos": self.bos_id, "eos": self.eos_id, **{f"stop {i}": i for i in self.stop_ids}}
        for name, token in named.items():
            if token is not None and not 0 <= token < self.embedding_rows:
                limit = f"an id below {self.embedding_rows}"
                raise ModelFileError(
                    self._parts.source, "token id out of range", field=name, expected=limit, got=token
                )


class ByteRenderer:
    """Ids to bytes one at a time: the one place that hides control tokens and takes added spaces away."""

    def __init__(
        self, tokenizer: Tokenizer, *, skip_specials: bool = False, continuation: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_specials = skip_specials
        self._prefix = tokenizer.space_prefix
        self._strip_next = self._prefix != "none" and not continuation

    def push(self, token: int) -> bytes:
        """The bytes this id adds."""
        tokenizer = self._tokenizer
        if tokenizer.is_special(token):
            self._strip_next = self._prefix == "each"
            hidden = self._skip_specials and tokenizer.is_control(token)
            return b"" if hidden else tokenizer.token_bytes(token)
        data = tokenizer.token_bytes(token)
        if self._strip_next and data:
            self._strip_next = False
            return data.removeprefix(b" ")
        return data


class _SpecialFinder:
    """Finds special tokens in trusted text: the earliest, and of those that start together the longest."""

    def __init__(self, by_name: Mapping[str, SpecialToken]) -> None:
        self._by_name = by_name
        self._lengths: dict[str, list[int]] = {}
        for name in by_name:
            lengths = self._lengths.setdefault(name[0], [])
            if len(name) not in lengths:
                lengths.append(len(name))
        for lengths in self._lengths.values():
            lengths.sort(reverse=True)
        first = "".join(re.escape(character) for character in self._lengths)
        self._first = re.compile(f"[{first}]") if first else None

    def split(self, text: str) -> Iterator[tuple[str, SpecialToken | None]]:
        """(text, None) for plain runs and (name, token) for special tokens, in order."""
        start = place = 0
        while self._first is not None and (found := self._first.search(text, place)):
            place = found.start()
            special = self._at(text, place)
            if special is None:
                place += 1
                continue
            if place > start:
                yield text[start:place], None
            yield special.name, special
            start = place = place + len(special.name)
        if start < len(text):
            yield text[start:], None

    def _at(self, text: str, place: int) -> SpecialToken | None:
        for length in self._lengths[text[place]]:
            special = self._by_name.get(text[place : place + length])
            if special is not None:
                return special
        return None


def tokenizer_from_gguf(metadata: Mapping[str, object], file: Path, *, deferred: bool = False) -> Tokenizer:
    """The tokenizer inside a GGUF file's metadata (`file` is only named in errors).

    deferred: what only encoding needs is built by the first text, see `DeferredVocabulary`. Raises
    `ModelFileError` for damaged metadata, `UnsupportedError` for a kind ayllu does not know.
    """
    from ayllu.chat.gguf_vocabulary import parts_from_gguf

    return Tokenizer(parts_from_gguf(metadata, file, deferred=deferred))


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a model folder: `tokenizer.json`, else Llama 4's `tokenizer.model`.

    `path` may also be one of those files. Raises `ModelFileError`, also for links that lead out of the
    folder, or `UnsupportedError`.
    """
    folder = path if path.is_dir() else path.parent
    for_json = path if path.is_file() else folder / "tokenizer.json"
    for_tiktoken = path if path.is_file() else folder / "tokenizer.model"
    if for_json.suffix == ".json" and for_json.is_file():
        from ayllu.chat.tokenizer_json import parts_from_json

        return Tokenizer(parts_from_json(member_path(folder, for_json.name)))
    if for_tiktoken.is_file():
        from ayllu.chat.tiktoken_vocabulary import parts_from_tiktoken

        return Tokenizer(parts_from_tiktoken(member_path(folder, for_tiktoken.name)))
    fix = "Fetch the model again with its tokenizer files, or use its GGUF file."
    raise ModelFileError(path, "no tokenizer.json and no tokenizer.model here", fix=fix)
