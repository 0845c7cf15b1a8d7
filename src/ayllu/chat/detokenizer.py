"""Tokens to text while they are being generated, never showing half a character.

One token may end inside a Japanese character or an emoji; its bytes wait here until the character is whole
or is known to be broken. The pieces together are exactly what decoding everything at once gives.
"""

from __future__ import annotations

import codecs

from ayllu.chat.tokenizer import ByteRenderer, Tokenizer


class StreamDecoder:
    """Decodes one answer, token by token, in constant time each.

    `skip_specials` and `continuation` mean what they mean in `Tokenizer.decode`. For any ids, the pushed
    texts plus `finish()` equal `tokenizer.decode(ids, ...)`; U+FFFD appears as soon as the bytes can no
    longer become a character.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_specials: bool = False, continuation: bool = False
    ) -> None:
        self._renderer = ByteRenderer(tokenizer, skip_specials=skip_specials, continuation=continuation)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that became certain with this id; empty while a character is incomplete.

        Raises `UsageError` for an id outside the tokenizer's `embedding_rows`.
        """
        return self._decoder.decode(self._renderer.push(token))

    def finish(self) -> str:
        """The rest at the end of the stream: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)
