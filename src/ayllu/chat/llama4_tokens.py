"""The 2,048 special tokens of Llama 4, which follow the merge ranks (200,000 in Meta's vocabulary).

Order and names are those of Meta's reference tokenizer; each group's reserved numbering has the gaps that the
real one has. The offsets below are from the first special id.
"""

from __future__ import annotations

SPECIAL_COUNT = 2048


def _reserved(group: str, first: int, last: int) -> list[str]:
    return [f"<|{group}reserved_special_token_{number}|>" for number in range(first, last + 1)]


def _names() -> tuple[str, ...]:
    document = ["begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix"]
    turns = ["header_start", "header_end", "eom", "eot", "step"]
    thinking = ["reasoning_thinking_start", "reasoning_thinking_end"]
    names = [f"<|{name}|>" for name in document + turns]
    names += _reserved("text_post_train_", 0, 5)
    names += ["<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>"]
    names += _reserved("text_post_train_", 8, 68)
    names += ["<|image_start|>", "<|image_end|>", *_reserved("vision_", 0, 1)]
    names += ["<|tile_x_separator|>", "<|tile_y_separator|>", *_reserved("vision_", 2, 5)]
    names += ["<|image|>", *_reserved("vision_", 6, 6), "<|patch|>", *_reserved("vision_", 7, 1047)]
    names += [*_reserved("reasoning_", 0, 7), *(f"<|{name}|>" for name in thinking)]
    return (*names, *_reserved("", 0, SPECIAL_COUNT - len(names) - 1))


SPECIAL_NAMES = _names()

BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
STOP_NAMES = (END_OF_TEXT, "<|eom|>", "<|eot|>")
