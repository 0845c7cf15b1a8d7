"""Hugging Face's `tokenizer.json` and the small files beside it.

Only the text half of the file is given to the `tokenizers` library: added tokens, the post-processor and
anything that could reach a special token stay out, and ayllu handles those itself. No class named in a
config is ever imported. Every size is bounded, every failure names the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from ayllu.chat import wordpiece_vocabulary as wordpiece
from ayllu.chat.bpe_vocabulary import ByteLevelVocabulary, SentencePieceVocabulary, byte_of_token
from ayllu.chat.vocabulary import (
    SpacePrefix,
    SpecialToken,
    TokenizerParts,
    Vocabulary,
    end_of_turn_ids,
    library_errors,
)
from ayllu.errors import ModelFileError, UnsupportedError
from ayllu.folder_files import member_path
from ayllu.json_file import read_json_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Encoder

# Llama 4's file, the largest of the known families, is 28 MB.
MAX_FILE_BYTES = 64 << 20
MAX_CONFIG_BYTES = 4 << 20

# The largest known files have 580,000 merges of three values each, and as many commas in their texts again.
MAX_FILE_VALUES = 4_000_000

# Ids beyond this are no vocabulary's: the largest known has 262,144.
MAX_TOKEN_ID = 1 << 22

_NORMALIZERS = frozenset({"Sequence", "NFC", "NFD", "NFKC", "NFKD", "Replace", "Prepend"})
_PRE_TOKENIZERS = frozenset({"Sequence", "ByteLevel", "Split", "Digits", "Metaspace", "Punctuation"})

JsonObject = dict[str, Any]


def parts_from_json(file: Path) -> TokenizerParts:
    """Tokenizer parts of a `tokenizer.json`, with what the config files in its folder add.

    BOS, EOS and stop ids come from `tokenizer_config.json`, `generation_config.json` and `config.json`
    where these exist; those of a WordPiece file are the tokens it puts around a text, [CLS] and [SEP].
    Raises `ModelFileError` for damaged files, `UnsupportedError` for kinds other than BPE and WordPiece.
    """
    root = read_json_object(file, max_bytes=MAX_FILE_BYTES, max_values=MAX_FILE_VALUES)
    model = _object(root, "model", file)
    kind = model.get("type", "BPE")
    if kind not in ("BPE", "WordPiece"):
        raise UnsupportedError(
            f"{file}: vocabulary of type '{kind}'.", "Only BPE and WordPiece are supported."
        )
    specials = _specials(root, file)
    texts = _texts(model, specials, file)
    if kind == "WordPiece":
        return _wordpiece_parts(root, model, specials, texts, file)
    vocabulary = _vocabulary(root, model, specials, texts, file)
    configs = _Configs(file.parent, {special.name: special.id for special in specials})
    bos_id = configs.bos_id()
    return TokenizerParts(
        vocabulary=vocabulary,
        specials=specials,
        bos_id=bos_id,
        eos_id=configs.eos_id(),
        stop_ids=configs.stop_ids(),
        add_bos=bos_id is not None and configs.add_bos(_template_starts_with_special(root)),
        source=str(file),
        embedding_rows=configs.embedding_rows(),
    )


def _wordpiece_parts(
    root: JsonObject,
    model: JsonObject,
    specials: tuple[SpecialToken, ...],
    texts: list[str | None],
    file: Path,
) -> TokenizerParts:
    by_name = {special.name: special.id for special in specials}
    encoder = _encoder(
        _components(root, "normalizer", "normalizers", wordpiece.NORMALIZERS, file),
        _components(root, "pre_tokenizer", "pretokenizers", wordpiece.PRE_TOKENIZERS, file),
        file,
    )
    encoder.model = wordpiece.wordpiece_model(model, by_name, file)
    first, last = wordpiece.enclosing_ids(root.get("post_processor"), by_name)
    return TokenizerParts(
        vocabulary=wordpiece.WordPieceVocabulary(
            encoder, texts, wordpiece.continuing_prefix(model, file), str(file)
        ),
        specials=specials,
        bos_id=first,
        eos_id=last,
        stop_ids=frozenset() if last is None else frozenset((last,)),
        add_bos=first is not None,
        source=str(file),
        embedding_rows=_Configs(file.parent, by_name).embedding_rows(),
    )


def _object(parent: Mapping[str, Any], key: str, file: Path) -> JsonObject:
    value = parent.get(key)
    if not isinstance(value, dict):
        raise ModelFileError(file, "missing or no object", field=key, got=type(value).__name__)
    return cast("JsonObject", value)


def _is_id(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_TOKEN_ID


def _specials(root: JsonObject, file: Path) -> tuple[SpecialToken, ...]:
    entries = root.get("added_tokens") or []
    if not isinstance(entries, list):
        raise ModelFileError(file, "no array", field="added_tokens")
    by_name: dict[str, SpecialToken] = {}
    names_by_id: dict[int, str] = {}
    for place, entry in enumerate(entries):
        field = f"added_tokens[{place}]"
        if not isinstance(entry, dict):
            raise ModelFileError(file, "no object", field=field)
        name, token = entry.get("content"), entry.get("id")
        if not isinstance(name, str) or not name or not _is_id(token):
            raise ModelFileError(file, "no text with an id", field=field, got=f"{name!r}, {token!r}")
        if name in by_name or token in names_by_id:
            raise ModelFileError(file, "a token or id appears twice", field=field, got=name)
        names_by_id[token] = name
        by_name[name] = SpecialToken(
            name,
            token,
            control=entry.get("special") is True,
            strip_left=entry.get("lstrip") is True,
            strip_right=entry.get("rstrip") is True,
        )
    return tuple(by_name.values())


def _texts(model: JsonObject, specials: tuple[SpecialToken, ...], file: Path) -> list[str | None]:
    """Token text by id, with the special tokens taken out of `model`'s vocabulary as well."""
    vocab = _object(model, "vocab", file)
    wrong = next((token for token, place in vocab.items() if not _is_id(place)), None)
    if wrong is not None:
        raise ModelFileError(file, "no token id", field=f"model.vocab[{wrong!r}]", got=vocab[wrong])
    special_ids = {special.id for special in specials}
    for special in specials:
        vocab.pop(special.name, None)
    vocab.pop("", None)
    highest = max(max(vocab.values(), default=-1), max(special_ids, default=-1))
    if highest < 0:
        raise ModelFileError(file, "no tokens", field="model.vocab")
    if highest > 16 * (len(vocab) + len(special_ids)) + 65_536:
        raise ModelFileError(
            file, "token ids far beyond the number of tokens", field="model.vocab", got=highest
        )
    texts: list[str | None] = [None] * (highest + 1)
    for token, place in vocab.items():
        if texts[place] is not None or place in special_ids:
            raise ModelFileError(file, f"id {place} belongs to two tokens", field="model.vocab", got=token)
        texts[place] = token
    return texts


def _components(
    root: JsonObject, key: str, list_key: str, known: frozenset[str], file: Path
) -> list[JsonObject]:
    """The steps of a normalizer or pre-tokenizer, sequences laid flat; unknown kinds are refused."""
    top = root.get(key)
    steps: list[JsonObject] = []
    waiting = [] if top is None else [top]
    while waiting:
        step = waiting.pop(0)
        if not isinstance(step, dict):
            raise ModelFileError(file, "no object", field=key, got=type(step).__name__)
        kind = step.get("type")
        if kind not in known:
            raise UnsupportedError(f"{file}: {key} of type '{kind}'.", f"Known: {', '.join(sorted(known))}.")
        if kind != "Sequence":
            steps.append(step)
            continue
        inner = step.get(list_key)
        if not isinstance(inner, list):
            raise ModelFileError(file, "no array", field=f"{key}.{list_key}")
        waiting[:0] = inner
    return steps


def _vocabulary(
    root: JsonObject,
    model: JsonObject,
    specials: tuple[SpecialToken, ...],
    texts: list[str | None],
    file: Path,
) -> Vocabulary:
    normalizers = _components(root, "normalizer", "normalizers", _NORMALIZERS, file)
    pre_tokenizers = _components(root, "pre_tokenizer", "pretokenizers", _PRE_TOKENIZERS, file)
    byte_level = [step for step in pre_tokenizers if step["type"] == "ByteLevel"]
    if any(step.get("add_prefix_space", True) is not False for step in byte_level):
        raise UnsupportedError(f"{file}: ByteLevel with add_prefix_space.", "Only false is supported.")
    prefix, always = _take_space_prefix(normalizers, pre_tokenizers)
    encoder = _encoder(normalizers, pre_tokenizers, file)
    encoder.model = _bpe(model, specials, file)
    vocab: dict[str, int] = model["vocab"]
    if byte_level:
        return ByteLevelVocabulary(encoder, texts, vocab, str(file))
    bytes_by_id: dict[int, int] = {}
    if model.get("byte_fallback") is True:
        found = ((place, byte_of_token(token)) for token, place in vocab.items())
        bytes_by_id = {place: byte for place, byte in found if byte is not None}
    return SentencePieceVocabulary(encoder, texts, bytes_by_id, prefix, str(file), always_prefix=always)


def _encoder(normalizers: list[JsonObject], pre_tokenizers: list[JsonObject], file: Path) -> Encoder:
    """The library's encoder with these steps, and no vocabulary yet."""
    from tokenizers import Tokenizer as Encoder

    shell = {
        "version": "1.0",
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers} if pre_tokenizers else None,
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    with library_errors(file, "normalizer and pre_tokenizer"):
        return Encoder.from_str(json.dumps(shell))


def _take_space_prefix(
    normalizers: list[JsonObject], pre_tokenizers: list[JsonObject]
) -> tuple[SpacePrefix, bool]:
    """Take the leading-space rule out of the steps; where it applies, and whether to text with a space too.

    Text reaches the library in runs between special tokens, so it cannot know where the sequence begins.
    """
    prefix: SpacePrefix = "none"
    always = False
    for step in [*normalizers]:
        if step["type"] == "Prepend" and step.get("prepend") in ("▁", " "):
            normalizers.remove(step)
            prefix, always = "each", True
    for step in pre_tokenizers:
        if step["type"] == "Metaspace":
            scheme = step.pop("prepend_scheme", "always")
            if step.pop("add_prefix_space", True) is not False and scheme in ("always", "first"):
                prefix = "each" if scheme == "always" else "first"
            step["prepend_scheme"] = "never"
    return prefix, always


def _bpe(model: JsonObject, specials: tuple[SpecialToken, ...], file: Path) -> Any:
    """The merge model, free of special tokens and of an unknown token that text could turn into."""
    from tokenizers import models

    merges = model.get("merges")
    if not isinstance(merges, list):
        raise ModelFileError(file, "missing or no array", field="model.merges")
    pairs = list(_pairs(merges, file))
    names = {special.name for special in specials}
    byte_tokens = (
        {t for t in model["vocab"] if byte_of_token(t) is not None} if model.get("byte_fallback") else set()
    )
    out_of_reach = names | byte_tokens
    pairs = [pair for pair in pairs if pair[0] + pair[1] not in out_of_reach and names.isdisjoint(pair)]
    options = {
        "ignore_merges": model.get("ignore_merges") is True,
        "byte_fallback": model.get("byte_fallback") is True,
    }
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UnsupportedError(
                f"{file}: model.{key} is set.", "Only byte-level and SentencePiece BPE work."
            )
    with library_errors(file, "model"):
        return models.BPE(vocab=model["vocab"], merges=pairs, **options)


def _pairs(merges: list[Any], file: Path) -> Iterator[tuple[str, str]]:
    for place, merge in enumerate(merges):
        pair = merge.split(" ", 1) if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(half, str) for half in pair):
            raise ModelFileError(file, "no pair of tokens", field=f"model.merges[{place}]", got=merge)
        yield pair[0], pair[1]


def _template_starts_with_special(root: JsonObject) -> bool:
    """Whether the file's post-processor puts a special token before a single text: then BOS is wanted."""
    top = root.get("post_processor")
    steps = top.get("processors", [top]) if isinstance(top, dict) else []
    for step in steps if isinstance(steps, list) else []:
        if isinstance(step, dict) and step.get("type") == "TemplateProcessing":
            single = step.get("single")
            first = single[0] if isinstance(single, list) and single else None
            return isinstance(first, dict) and "SpecialToken" in first
    return False


class _Configs:
    """What the files beside `tokenizer.json` say about BOS, EOS, stop ids and the embedding."""

    def __init__(self, folder: Path, specials: Mapping[str, int]) -> None:
        self._specials = specials
        self._folder = folder
        self._tokenizer = self._read("tokenizer_config.json")
        self._generation = self._read("generation_config.json")
        self._model = self._read("config.json")
        text_config = self._model.get("text_config")
        self._text_model: JsonObject = text_config if isinstance(text_config, dict) else self._model

    def bos_id(self) -> int | None:
        named = self._named("bos_token")
        return named if named is not None else next(iter(self._listed("bos_token_id")), None)

    def eos_id(self) -> int | None:
        named = self._named("eos_token")
        return named if named is not None else next(iter(self._listed("eos_token_id")), None)

    def stop_ids(self) -> frozenset[int]:
        eos_id = self.eos_id()
        stated = frozenset(self._listed("eos_token_id")) | end_of_turn_ids(self._specials)
        return stated if eos_id is None else stated | {eos_id}

    def add_bos(self, default: bool) -> bool:
        value = self._tokenizer.get("add_bos_token")
        return value if isinstance(value, bool) else default

    def embedding_rows(self) -> int | None:
        rows = self._text_model.get("vocab_size")
        return rows if _is_id(rows) else None

    def _read(self, name: str) -> JsonObject:
        if not (self._folder / name).is_file():
            return {}
        return read_json_object(member_path(self._folder, name), max_bytes=MAX_CONFIG_BYTES)

    def _named(self, key: str) -> int | None:
        value = self._tokenizer.get(key)
        name = value.get("content") if isinstance(value, dict) else value
        return self._specials.get(name) if isinstance(name, str) else None

    def _listed(self, key: str) -> list[int]:
        """Ids under `key`, a number or a list, in the generation config, then the model's."""
        ids: list[int] = []
        sources = {"generation_config.json": self._generation, "config.json": self._text_model}
        for name, config in sources.items():
            value = config.get(key)
            for token in value if isinstance(value, list) else [] if value is None else [value]:
                if not _is_id(token):
                    raise ModelFileError(self._folder / name, "no token id", field=key, got=token)
                ids.append(token)
        return ids
