"""What the core asks of a request before it takes it: tokens the model knows, that fit, with their images.

The front asks the same earlier, where it can be told better; this is the engine's own door. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from ayllu.engine.prepared import PreparedRequest
from ayllu.errors import ContextOverflowError, UsageError
from ayllu.model.config import VisionConfig


def require_tokens(tokens: Sequence[int], new_tokens: int, context: int, vocab_size: int) -> None:
    """Raises UsageError for no tokens or unknown ones, ContextOverflowError for too many."""
    if not tokens:
        raise UsageError("The prompt is empty.", "Give at least one token.")
    if len(tokens) + new_tokens > context:
        raise ContextOverflowError(
            f"The conversation has {len(tokens)} tokens; the context holds {context}.",
            "Start a new conversation (/new), shorten the input, or raise --context.",
        )
    outside = next((token for token in tokens if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise UsageError(
            f"Token {outside} is not in the vocabulary of {vocab_size}.", "Use this model's tokenizer."
        )


def image_rows(request: PreparedRequest, vision: VisionConfig | None) -> list[int]:
    """Rows of each image. Raises UsageError unless they are as many as the prompt's patch tokens."""
    if not request.images:
        return []
    if vision is None:
        raise UsageError("This model reads no images.", "Choose a model with a vision tower.")
    tile = (vision.num_channels, vision.image_size, vision.image_size)
    for image in request.images:
        if image.pixels.shape[1:] != tile:
            raise UsageError(
                f"An image has tiles of {image.pixels.shape[1:]} numbers; this model reads {tile}.",
                "Cut the image with this model's chat format.",
            )
    rows = [image.pixels.shape[0] * vision.tokens_per_tile for image in request.images]
    patches = request.token_ids.count(vision.patch_token_id)
    if sum(rows) != patches:
        raise UsageError(
            f"The prompt has {patches} image patch tokens but {sum(rows)} image rows.",
            "Render the prompt and its images together.",
        )
    return rows
