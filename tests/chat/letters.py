"""A tokenizer of single characters: ids are code points, special tokens lie beyond them.

Rendered prompts can be read back exactly, so tests of chat formats compare text instead of merged ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

FIRST_SPECIAL = 0x110000

LLAMA4_SPECIALS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eom|>",
    "<|eot|>",
    "<|step|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|finetune_right_pad|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
    "<|image|>",
    "<|patch|>",
]
CHATML_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>"]


class Letters:
    """Implements `TextEncoder`; `bos` and `eos` are names of specials."""

    def __init__(self, specials: Sequence[str], bos: str | None = None, eos: str | None = None) -> None:
        self.specials = {name: FIRST_SPECIAL + number for number, name in enumerate(specials)}
        self.bos_id = self.specials[bos] if bos else None
        self.eos_id = self.specials[eos] if eos else None
        self.stop_ids = frozenset() if self.eos_id is None else frozenset({self.eos_id})
        longest_first = sorted(specials, key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode_segments(self, segments: Iterable[tuple[str, bool]]) -> list[int]:
        ids: list[int] = []
        for text, trusted in segments:
            for piece in self._pattern.split(text) if trusted else [text]:
                if trusted and piece in self.specials:
                    ids.append(self.specials[piece])
                else:
                    ids += map(ord, piece)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        names = list(self.specials)
        return "".join(chr(i) if i < FIRST_SPECIAL else names[i - FIRST_SPECIAL] for i in ids)

    def markers(self, ids: Iterable[int]) -> list[str]:
        """The special tokens among `ids`, in order."""
        names = list(self.specials)
        return [names[i - FIRST_SPECIAL] for i in ids if i >= FIRST_SPECIAL]

    def texts(self, ids: Iterable[int]) -> list[str]:
        """The plain text between special tokens."""
        return "".join(chr(i) if i < FIRST_SPECIAL else "\x00" for i in ids).split("\x00")
