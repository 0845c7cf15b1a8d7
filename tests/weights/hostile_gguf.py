"""Malformed GGUF files by class, built byte by byte so that no writer can quietly repair them.

A `Draft` is a small valid model; each class breaks one thing in it, its random source choosing the details.
The classes follow llama.cpp's `test-gguf`, Ollama's malformed-metadata cases and the known parser bugs.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
MODEL_WIDTH, MODEL_FORWARD, MODEL_TOKENS = 64, 96, 32


def text(value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def array(element: int, count: int, payload: bytes) -> bytes:
    return struct.pack("<IQ", element, count) + payload


@dataclass
class Pair:
    key: bytes
    kind: int
    payload: bytes

    def build(self) -> bytes:
        return text(self.key) + struct.pack("<I", self.kind) + self.payload


@dataclass
class Entry:
    """A tensor's place in the header. `shape` is row-major; `offset` None: right after the one before."""

    name: bytes
    shape: list[int]
    kind: int = 0
    offset: int | None = None
    dimensions: int | None = None

    @property
    def nbytes(self) -> int:
        elements, size = {0: (1, 4), 1: (1, 2), 8: (32, 34), 12: (256, 144), 20: (32, 18)}.get(
            self.kind, (1, 4)
        )
        count = 1
        for length in self.shape:
            count *= length
        return count // elements * size


@dataclass
class Draft:
    magic: bytes = b"GGUF"
    version: int = 3
    pairs: list[Pair] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    alignment: int = 32
    tensor_count: int | None = None
    key_count: int | None = None
    missing_data: int = 0

    def put(self, key: str, kind: int, payload: bytes) -> None:
        """Set `key`, in its old place if it was there."""
        self.pairs = [Pair(key.encode(), kind, payload) if p.key == key.encode() else p for p in self.pairs]
        if not any(pair.key == key.encode() for pair in self.pairs):
            self.pairs.append(Pair(key.encode(), kind, payload))

    def drop(self, key: str) -> None:
        self.pairs = [pair for pair in self.pairs if pair.key != key.encode()]

    def header(self) -> bytes:
        tensor_count = len(self.entries) if self.tensor_count is None else self.tensor_count
        key_count = len(self.pairs) if self.key_count is None else self.key_count
        out = self.magic + struct.pack("<IQQ", self.version, tensor_count, key_count)
        out += b"".join(pair.build() for pair in self.pairs)
        offset = 0
        for entry in self.entries:
            at = offset if entry.offset is None else entry.offset
            sizes = entry.shape[::-1]
            count = len(sizes) if entry.dimensions is None else entry.dimensions
            out += text(entry.name) + struct.pack(f"<I{len(sizes)}Q", count, *sizes)
            out += struct.pack("<IQ", entry.kind, at % 2**64)
            offset += -(-entry.nbytes // self.alignment) * self.alignment
        return out

    def build(self) -> bytes:
        header = self.header()
        out = header.ljust(-(-len(header) // self.alignment) * self.alignment, b"\0")
        data = b"".join(
            bytes(-(-entry.nbytes // self.alignment) * self.alignment)
            for entry in self.entries
            if entry.nbytes < 1 << 20
        )
        return out + data[: len(data) - self.missing_data]


def valid_model(architecture: str = "llama") -> Draft:
    """A two-layer model that opens: F32 and Q8_0 tensors, a vocabulary, tied embeddings."""
    draft = Draft()
    put = draft.put
    put("general.architecture", STRING, text(architecture))
    for key, value in {
        "block_count": 2,
        "context_length": 128,
        "embedding_length": MODEL_WIDTH,
        "feed_forward_length": MODEL_FORWARD,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "vocab_size": MODEL_TOKENS,
    }.items():
        put(f"{architecture}.{key}", U32, struct.pack("<I", value))
    put(f"{architecture}.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", 1e-5))
    put(f"{architecture}.rope.freq_base", F32, struct.pack("<f", 10000.0))
    put("tokenizer.ggml.model", STRING, text("gpt2"))
    tokens = b"".join(text(f"token{number}") for number in range(MODEL_TOKENS))
    put("tokenizer.ggml.tokens", ARRAY, array(STRING, MODEL_TOKENS, tokens))
    put("tokenizer.ggml.token_type", ARRAY, array(I32, MODEL_TOKENS, struct.pack("<i", 1) * MODEL_TOKENS))
    put("tokenizer.ggml.add_bos_token", BOOL, b"\1")
    matrices = {
        "attn_q": [MODEL_WIDTH, MODEL_WIDTH],
        "attn_k": [MODEL_WIDTH // 2, MODEL_WIDTH],
        "attn_v": [MODEL_WIDTH // 2, MODEL_WIDTH],
        "attn_output": [MODEL_WIDTH, MODEL_WIDTH],
        "ffn_gate": [MODEL_FORWARD, MODEL_WIDTH],
        "ffn_up": [MODEL_FORWARD, MODEL_WIDTH],
        "ffn_down": [MODEL_WIDTH, MODEL_FORWARD],
    }
    draft.entries.append(Entry(b"token_embd.weight", [MODEL_TOKENS, MODEL_WIDTH], 8))
    for layer in range(2):
        for name in ("attn_norm", "ffn_norm"):
            draft.entries.append(Entry(f"blk.{layer}.{name}.weight".encode(), [MODEL_WIDTH]))
        for name, shape in matrices.items():
            draft.entries.append(Entry(f"blk.{layer}.{name}.weight".encode(), list(shape), 8))
    draft.entries.append(Entry(b"output_norm.weight", [MODEL_WIDTH]))
    return draft


Break = Callable[[Draft, Random], None]


def _count_fields() -> dict[str, Break]:
    def counts(attribute: str, low: int, high: int) -> Break:
        return lambda draft, rng: setattr(draft, attribute, rng.randrange(low, high))

    def short(draft: Draft, rng: Random) -> None:
        draft.magic = b"GGUF"[: rng.randrange(0, 4)]
        draft.pairs, draft.entries = [], []
        draft.version, draft.tensor_count, draft.key_count = 3, 0, 0

    def magic(draft: Draft, rng: Random) -> None:
        draft.magic = rng.choice([b"FUGG", b"GGML", b"ggjt", b"PK\3\4", b"GGUG", b"\0\0\0\0"])

    def version(*choices: int) -> Break:
        return lambda draft, rng: setattr(draft, "version", rng.choice(choices))

    return {
        "bad magic": magic,
        "magic cut short": short,
        "version 0": version(0),
        "version 1": version(1),
        "future version": version(4, 5, 100, 0xFFFF),
        "big-endian version": version(2 << 24, 3 << 24),
        "tensor count -1": counts("tensor_count", 2**64 - 1, 2**64),
        "tensor count absurd": counts("tensor_count", 2**31, 2**63),
        "tensor count beyond the entries": counts("tensor_count", 22, 400),
        "key count -1": counts("key_count", 2**64 - 1, 2**64),
        "key count absurd": counts("key_count", 2**31, 2**63),
        "key count beyond the pairs": counts("key_count", 16, 200),
        "key count short of the pairs": counts("key_count", 0, 14),
    }


def _pair_breaks() -> dict[str, Break]:
    def raw_first(make: Callable[[Random], bytes]) -> Break:
        """A first pair whose bytes are given: everything after it shifts."""

        def apply(draft: Draft, rng: Random) -> None:
            class Raw(Pair):
                def build(self) -> bytes:
                    return self.payload

            draft.pairs.insert(rng.randrange(len(draft.pairs)), Raw(b"", 0, make(rng)))

        return apply

    def pair(key: str, kind: int, payload: bytes) -> Break:
        return lambda draft, rng: draft.pairs.insert(
            rng.randrange(len(draft.pairs)), Pair(key.encode(), kind, payload)
        )

    def duplicate(draft: Draft, rng: Random) -> None:
        draft.pairs.insert(rng.randrange(len(draft.pairs)), rng.choice(draft.pairs))

    def key_type(draft: Draft, rng: Random) -> None:
        rng.choice(draft.pairs).kind = rng.choice([13, 14, 99, 2**31, 2**32 - 1])

    def element_type(draft: Draft, rng: Random) -> None:
        pair("x", ARRAY, array(rng.choice([13, 50, 2**32 - 1]), rng.randrange(4), b"\0" * 16))(draft, rng)

    def length(element: int) -> Break:
        def apply(draft: Draft, rng: Random) -> None:
            count = rng.choice([2**64 - 1, 2**63, 2**61, 2**40, 2**32, 1 << 20])
            pair("x", ARRAY, array(element, count, b"\0" * 64))(draft, rng)

        return apply

    def bad_text(draft: Draft, rng: Random) -> None:
        broken = rng.choice([b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80", b"abc\x80", b"\xf8\x88\x80\x80\x80"])
        draft.pairs.insert(rng.randrange(len(draft.pairs)), Pair(b"x", STRING, text(broken)))

    def bad_key(draft: Draft, rng: Random) -> None:
        draft.pairs.insert(
            rng.randrange(len(draft.pairs)), Pair(rng.choice([b"\xff", b"a\xc0\xaf"]), U8, b"\0")
        )

    def bad_element(draft: Draft, rng: Random) -> None:
        payload = text("good") * rng.randrange(5) + text(b"\xff\xff") + text("good")
        count = payload.count(b"good") + 1
        pair("x", ARRAY, array(STRING, count, payload))(draft, rng)

    def element_too_long(draft: Draft, rng: Random) -> None:
        payload = text("good") * rng.randrange(5)
        count = payload.count(b"good") + 1
        lying = payload + struct.pack("<Q", rng.choice([2**64 - 1, 2**63, 2**40, 10**6]))
        pair("x", ARRAY, array(STRING, count, lying))(draft, rng)

    return {
        "key size -1": raw_first(lambda rng: struct.pack("<Q", 2**64 - 1)),
        "key size absurd": raw_first(lambda rng: struct.pack("<Q", rng.randrange(2**20, 2**63)) + b"key"),
        "key longer than any": pair("k" * 65_536, U8, b"\0"),
        "empty key": pair("", U8, b"\0"),
        "duplicate key": duplicate,
        "unknown value type": key_type,
        "string size -1": pair("x", STRING, struct.pack("<Q", 2**64 - 1)),
        "string oversized": raw_first(
            lambda rng: text("x") + struct.pack("<IQ", STRING, rng.randrange(2**22, 2**50))
        ),
        "string not UTF-8": bad_text,
        "key not UTF-8": bad_key,
        "truth value 2": pair("x", BOOL, b"\2"),
        "array of unknown elements": element_type,
        "array of arrays": pair("x", ARRAY, array(ARRAY, 1, array(U8, 1, b"\0"))),
        "array of truth values with a 7": pair("x", ARRAY, array(BOOL, 3, b"\0\1\7")),
        "string array longer than the file": length(STRING),
        "byte array longer than the file": length(U8),
        "double array longer than the file": length(F64),
        "string element not UTF-8": bad_element,
        "string element runs out of the file": element_too_long,
    }


def _alignment_breaks() -> dict[str, Break]:
    def alignment(kind: int, code: str, *values: float) -> Break:
        return lambda draft, rng: draft.put(
            "general.alignment", kind, struct.pack(f"<{code}", rng.choice(values))
        )

    def inconsistent(draft: Draft, rng: Random) -> None:
        # The header promises coarser steps than the offsets keep.
        draft.put("general.alignment", U32, struct.pack("<I", rng.choice([1024, 4096, 65536])))

    return {
        "alignment 0": alignment(U32, "I", 0),
        "alignment no power of two": alignment(U32, "I", 3, 12, 33, 1000, 2**32 - 1),
        "alignment beyond bounds": alignment(U32, "I", 2**21, 2**30, 2**31),
        "alignment as U64": alignment(U64, "Q", 32, 64),
        "alignment as I32": alignment(I32, "i", 32, -32),
        "alignment as float": alignment(F32, "f", 32.0),
        "alignment as text": lambda draft, rng: draft.put("general.alignment", STRING, text("32")),
        "alignment as array": lambda draft, rng: draft.put(
            "general.alignment", ARRAY, array(U32, 1, struct.pack("<I", 32))
        ),
        "offsets against the alignment": inconsistent,
    }


def _tensor_breaks() -> dict[str, Break]:
    def entry(change: Callable[[Entry, Random], None]) -> Break:
        def apply(draft: Draft, rng: Random) -> None:
            chosen = rng.choice(draft.entries)
            offset = 0
            for other in draft.entries:
                # Fixing the places first keeps the other tensors where they were.
                other.offset = offset
                offset += -(-other.nbytes // 32) * 32
            size = offset
            change(chosen, rng)
            draft.entries.append(Entry(b"pad", [1], 0, offset=size))
            draft.entries.pop()

        return apply

    def set_to(attribute: str, *values: object) -> Break:
        return entry(lambda chosen, rng: setattr(chosen, attribute, rng.choice(values)))

    def size(*values: int) -> Break:
        def change(chosen: Entry, rng: Random) -> None:
            chosen.shape[rng.randrange(len(chosen.shape))] = rng.choice(values)

        return entry(change)

    def duplicate(draft: Draft, rng: Random) -> None:
        first, second = rng.sample(draft.entries, 2)
        second.name = first.name

    def overlap(draft: Draft, rng: Random) -> None:
        first, second = rng.sample(range(len(draft.entries)), 2)
        offsets = []
        offset = 0
        for other in draft.entries:
            offsets.append(offset)
            offset += -(-other.nbytes // 32) * 32
        draft.entries[second].offset = offsets[first]

    def several_dimensions(draft: Draft, rng: Random) -> None:
        chosen = rng.choice(draft.entries)
        chosen.shape = [rng.choice([2**16, 2**21, 2**32 - 1, 2**62]) for _ in range(rng.randrange(2, 5))]

    return {
        "tensor name empty": set_to("name", b""),
        "tensor name too long": set_to("name", b"n" * 65, b"n" * 100, b"n" * 5000),
        "tensor name not UTF-8": set_to("name", b"\xff.weight", b"blk\xc3"),
        "tensor name twice": duplicate,
        "0 dimensions": set_to("dimensions", 0),
        "too many dimensions": set_to("dimensions", 5, 6, 64, 2**16, 2**32 - 1),
        "more dimensions than sizes": set_to("dimensions", 3, 4),
        "size 0": size(0),
        "size -1": size(2**64 - 1),
        "size huge": size(2**63, 2**62, 2**48, 2**31),
        "elements overflow": several_dimensions,
        "bytes beyond the file": size(10**7, 10**8 + 32),
        "rows that do not fill blocks": lambda draft, rng: draft.entries[0].shape.__setitem__(
            1, rng.choice([1, 31, 33, 63])
        ),
        "unknown tensor type": set_to("kind", 4, 5, 31, 36, 42, 77, 2**31, 2**32 - 1),
        "offset misaligned": set_to("offset", 1, 7, 16, 33, 2**40 + 1),
        "offset -1": set_to("offset", 2**64 - 1, 2**64 - 32),
        "offset beyond the file": set_to("offset", 2**63, 2**40, 2**20),
        "tensors overlap": overlap,
        "not enough data": lambda draft, rng: setattr(
            draft, "missing_data", rng.choice([32, 288, 512, 4096])
        ),
        "no data at all": lambda draft, rng: setattr(draft, "missing_data", 10**9),
    }


def _model_breaks() -> dict[str, Break]:
    """Well-formed containers that do not describe a model."""

    def number(key: str, *values: int) -> Break:
        return lambda draft, rng: draft.put(key, U32, struct.pack("<I", rng.choice(values)))

    def mistyped(*keys: str) -> Break:
        def apply(draft: Draft, rng: Random) -> None:
            kind, payload = rng.choice(
                [
                    (STRING, text("2")),
                    (F32, struct.pack("<f", 2.0)),
                    (BOOL, b"\1"),
                    (I32, struct.pack("<i", -2)),
                    (I64, struct.pack("<q", -(2**62))),
                    (U64, struct.pack("<Q", 2**63)),
                    (ARRAY, array(STRING, 1, text("2"))),
                    (ARRAY, array(U32, 0, b"")),
                    (ARRAY, array(U32, 2, struct.pack("<II", 2, 3))),
                    (ARRAY, array(F32, 2, struct.pack("<ff", 2, 2))),
                ]
            )
            draft.put(rng.choice(keys), kind, payload)

        return apply

    def real(key: str, *values: float) -> Break:
        return lambda draft, rng: draft.put(key, F32, struct.pack("<f", rng.choice(values)))

    def missing(*keys: str) -> Break:
        return lambda draft, rng: draft.drop(rng.choice(keys))

    def tensor_missing(draft: Draft, rng: Random) -> None:
        draft.entries.pop(rng.randrange(len(draft.entries)))

    def wrong_shape(draft: Draft, rng: Random) -> None:
        rng.choice([entry for entry in draft.entries if entry.kind == 8]).shape = [rng.choice([3, 5, 7]), 32]

    def stray(draft: Draft, rng: Random) -> None:
        name = rng.choice(
            [b"evil", b"blk.0.attn_q.weight.weight", b"blk.-1.attn_q.weight", b"v.blk.0.attn_q.weight"]
        )
        draft.entries.append(Entry(name, [4]))

    def layer_out_of_range(draft: Draft, rng: Random) -> None:
        number = rng.choice([2, 3, 513, 10**9, 10**30])
        draft.entries.append(Entry(f"blk.{number}.attn_norm.weight".encode(), [MODEL_WIDTH]))

    def tokens(kind: int, payload: bytes) -> Break:
        return lambda draft, rng: draft.put("tokenizer.ggml.tokens", kind, payload)

    def rope_factors(shape: list[int], kind: int) -> Break:
        return lambda draft, rng: draft.entries.append(Entry(b"rope_freqs.weight", shape, kind))

    sizes = [f"llama.{key}" for key in ("block_count", "embedding_length", "attention.head_count")]
    others = [f"llama.{key}" for key in ("context_length", "feed_forward_length", "attention.head_count_kv")]
    return {
        "no architecture": missing("general.architecture"),
        "architecture as number": number("general.architecture", 1),
        "unknown architecture": lambda draft, rng: draft.put(
            "general.architecture",
            STRING,
            text(rng.choice(["bert", "", "LLAMA", "llama\0", "../llama", "x" * 999])),
        ),
        "sizes mistyped": mistyped(*sizes),
        "further sizes mistyped": mistyped(*others),
        "a size is missing": missing(*sizes, "llama.context_length", "llama.feed_forward_length"),
        "block_count absurd": number("llama.block_count", 0, 1025, 100_000, 2**31, 2**32 - 1),
        "block_count beyond the tensors": number("llama.block_count", 3, 4, 512, 513, 1024),
        "block_count short of the tensors": number("llama.block_count", 1),
        "head_count 0": number("llama.attention.head_count", 0),
        "head_count does not divide": number("llama.attention.head_count", 3, 7, 63),
        "head_count_kv 0": number("llama.attention.head_count_kv", 0),
        "head_count_kv impossible": number("llama.attention.head_count_kv", 3, 5, 64),
        "embedding_length absurd": number("llama.embedding_length", 0, 63, 2**21, 2**32 - 1),
        "context_length absurd": number("llama.context_length", 0, 2**32 - 1),
        "epsilon impossible": real(
            "llama.attention.layer_norm_rms_epsilon", 0.0, -1e-5, 2.0, float("nan"), float("inf")
        ),
        "epsilon as text": lambda draft, rng: draft.put(
            "llama.attention.layer_norm_rms_epsilon", STRING, text("1e-5")
        ),
        "rope base impossible": real("llama.rope.freq_base", 0.0, -1.0, float("nan"), float("-inf")),
        "rope turns a part of the head": number("llama.rope.dimension_count", 2, 8, 32),
        "rope scaling unknown": lambda draft, rng: draft.put(
            "llama.rope.scaling.type", STRING, text(rng.choice(["yarn", "longrope", "su", "\0", "x" * 500]))
        ),
        "rope scaling as number": number("llama.rope.scaling.type", 1),
        "rope scaling factor impossible": lambda draft, rng: (
            draft.put("llama.rope.scaling.type", STRING, text("linear")),
            draft.put(
                "llama.rope.scaling.factor", F32, struct.pack("<f", rng.choice([0.0, -2.0, float("nan")]))
            ),
        )[0],
        "rope factors are zero": rope_factors([8], 0),
        "rope factors too few": rope_factors([4], 0),
        "rope factors too many": rope_factors([64, 64], 0),
        "rope factors in another format": rope_factors([64], 8),
        "key_length contradicts": number("llama.attention.key_length", 1, 3, 32, 2**20),
        "value_length contradicts": number("llama.attention.value_length", 8, 32),
        "vocab_size beyond the embedding": number("llama.vocab_size", 33, 2**31, 2**32 - 1),
        "more tokens than embeddings": tokens(ARRAY, array(STRING, 33, text("t") * 33)),
        "tokens are numbers": tokens(ARRAY, array(U32, 32, bytes(128))),
        "tokens are one text": tokens(STRING, text("all of them")),
        "experts in llama": number("llama.expert_count", 1, 8, 2**31),
        "arithmetic nobody knows": lambda draft, rng: draft.put(
            f"llama.{rng.choice(['attention.scale', 'logit_scale', 'attn_logit_softcapping'])}",
            F32,
            struct.pack("<f", 2.0),
        ),
        "sliding window": number("llama.attention.sliding_window", 1, 64, 127),
        "part of a split model": number("split.count", 2, 50),
        "own layer list too short": lambda draft, rng: draft.put(
            "ayllu.layers.rotates", ARRAY, array(BOOL, 1, b"\1")
        ),
        "own layer list mistyped": lambda draft, rng: draft.put(
            "ayllu.layers.rotates", ARRAY, array(STRING, 2, text("1") * 2)
        ),
        "tensor in a format that is not read": lambda draft, rng: setattr(draft.entries[0], "kind", 20),
        "tensor missing": tensor_missing,
        "tensor of the wrong shape": wrong_shape,
        "tensor nobody asked for": stray,
        "tensor of a layer that is not there": layer_out_of_range,
    }


BREAKS: dict[str, Break] = (
    _count_fields() | _pair_breaks() | _alignment_breaks() | _tensor_breaks() | _model_breaks()
)

CONTAINER_IS_SOUND = frozenset(_model_breaks())
"""Classes whose container reads well; only opening them as a model fails."""

SEEDS = range(4)


def hostile_file(name: str, seed: int) -> bytes:
    draft = valid_model()
    BREAKS[name](draft, Random(f"{name}/{seed}"))
    return draft.build()


def _with_pair(kind: int, payload: bytes) -> bytes:
    draft = valid_model()
    draft.pairs.insert(1, Pair(b"x", kind, payload))
    return draft.build()


def _strings(count: int, value: str) -> Callable[[], bytes]:
    return lambda: _with_pair(ARRAY, array(STRING, count, text(value) * count))


def _many_keys() -> bytes:
    return Draft(pairs=[Pair(f"k{number}".encode(), U8, b"\0") for number in range(40_000)]).build()


def _most_keys() -> bytes:
    pairs = [Pair(f"k{number}".encode(), STRING, text(f"value {number}")) for number in range(32_768)]
    return Draft(pairs=pairs).build()


def _many_tensors() -> bytes:
    return Draft(entries=[Entry(f"t{number}".encode(), [1]) for number in range(40_000)]).build()


def _most_tensors() -> bytes:
    return Draft(entries=[Entry(f"t{number}".encode(), [1]) for number in range(32_768)]).build()


# One letter of four bytes makes Python hold the whole text at four bytes a letter.
_WIDE = "a" * 1_000_000 + "😀"

AMPLIFIERS: dict[str, Callable[[], bytes]] = {
    "short strings": _strings(800_000, "Ġt"),
    "two-letter strings": _strings(900_000, "ab"),
    "empty strings": _strings(900_000, ""),
    "millions of strings": _strings(1_300_000, ""),
    "strings of four bytes a letter": _strings(24, _WIDE),
    "one string of four bytes a letter": lambda: _with_pair(STRING, text(_WIDE * 8)),
    "too many keys": _many_keys,
    "as many keys as allowed": _most_keys,
    "too many tensors": _many_tensors,
    "as many tensors as allowed": _most_tensors,
}
"""Files of a few MiB that would take far more memory or time if they were believed."""
