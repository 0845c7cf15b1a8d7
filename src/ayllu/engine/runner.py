"""Computes steps: packed pieces of many sequences go through the decoder once. It decides nothing.

The contract a faster runner has to keep: `forward` writes the keys and values of the pieces' tokens into
cache slots and returns their hidden states; `logits` turns some of them into numbers on the host.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as AbstractSequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ayllu.engine.adapters import AdapterSet
from ayllu.engine.cuda_graphs import RecordedDecoding, recorded_decoding
from ayllu.engine.image_places import image_places
from ayllu.engine.paged_memory import PagedMemory, PagedPiece, attend_for
from ayllu.engine.prepared import PreparedImage
from ayllu.engine.step_runner import RunnerPiece
from ayllu.model.decoder import Decoder

TILES_TOGETHER = 4
"""Image tiles that pass the vision tower at once: bounds its memory."""


class Runner:
    """One decoder with its cache memory, adapters and image features. Not for use by two threads.

    decoding: what replays steps of single tokens (None: what suits the device, which is nothing on a CPU).
    """

    def __init__(
        self,
        decoder: Decoder,
        memory: PagedMemory,
        adapters: AdapterSet,
        *,
        image_cache_bytes: int,
        decoding: RecordedDecoding | None = None,
    ) -> None:
        self.decoder = decoder
        self.memory = memory
        self.adapters = adapters
        self._features = FeatureCache(decoder, image_cache_bytes)
        self._decoding = decoding or recorded_decoding(decoder, memory)

    @torch.inference_mode()
    def forward(self, pieces: AbstractSequence[RunnerPiece]) -> list[Tensor]:
        """Hidden states [rows, D] of each piece."""
        if self._decoding is not None and self._decoding.takes(pieces):
            return self._decoding.forward(pieces)
        device = self.memory.device
        ids = torch.tensor([token for piece in pieces for token in piece.tokens], device=device)
        embedded = self.decoder.embed(ids)
        row = 0
        segments: list[tuple[int, int, str | None]] = []
        positions: list[int] = []
        for piece in pieces:
            if piece.images:
                self._place_images(embedded[row : row + piece.rows], piece)
            segments.append((row, row + piece.rows, piece.adapter))
            positions.extend(range(piece.start, piece.start + piece.rows))
            row += piece.rows
        attend = attend_for(
            self.memory,
            [
                PagedPiece(
                    piece.start,
                    piece.start + piece.rows,
                    tuple(np.array(table, np.int64) for table in piece.tables),
                )
                for piece in pieces
            ],
        )
        with self.adapters.applied(segments):
            hidden: Tensor = self.decoder(embedded, torch.tensor(positions, device=device), attend)
        return list(hidden.split([piece.rows for piece in pieces]))

    @torch.inference_mode()
    def logits(self, rows: AbstractSequence[tuple[Tensor, int]]) -> NDArray[np.float32]:
        """Next-token logits [len(rows), vocab_size] of rows of pieces' hidden states."""
        chosen = torch.stack([hidden[row] for hidden, row in rows])
        array: NDArray[np.float32] = self.decoder.logits(chosen).cpu().numpy()
        return array

    def summed(self, hidden: Tensor) -> NDArray[np.float64]:
        """The sum [D] of a piece's hidden states."""
        array: NDArray[np.float64] = hidden.double().sum(0).cpu().numpy()
        return array

    def is_fatal(self, error: Exception) -> bool:
        """A GPU that has met an error answers every later call with it."""
        kind = getattr(torch, "AcceleratorError", ())  # unknown to torch before 2.8
        return isinstance(error, kind) and not isinstance(error, torch.OutOfMemoryError)

    def _place_images(self, embedded: Tensor, piece: RunnerPiece) -> None:
        """Put image rows where this piece has patch tokens (spec 6.3)."""
        assert self.decoder.config.vision is not None
        for image, rows, places in image_places(piece, self.decoder.config.vision):
            found = self._features.rows(image)[rows.start : rows.stop]
            embedded[torch.tensor(places, device=embedded.device)] = found.to(embedded.dtype)


class FeatureCache:
    """Rows of images by the SHA-256 of their pixels, least recently used dropped first."""

    def __init__(self, decoder: Decoder, most_bytes: int) -> None:
        self._decoder = decoder
        self._most_bytes = most_bytes
        self._rows: OrderedDict[str, Tensor] = OrderedDict()
        self.nbytes = 0
        self.computed = 0

    def rows(self, image: PreparedImage) -> Tensor:
        """Rows [tiles * tokens_per_tile, D] of an image, computed if they are not remembered."""
        if image.digest in self._rows:
            self._rows.move_to_end(image.digest)
            return self._rows[image.digest]
        device = self._decoder.norm.weight.device
        tiles = torch.from_numpy(image.pixels).split(TILES_TOGETHER)
        rows = torch.cat([self._decoder.image_rows(part.to(device)) for part in tiles])
        self.computed += 1
        self._rows[image.digest] = rows
        self.nbytes += rows.nbytes
        # The newest stays whatever its size: the prompt that is being read needs it again for its next piece.
        while self.nbytes > self._most_bytes and len(self._rows) > 1:
            self.nbytes -= self._rows.popitem(last=False)[1].nbytes
        return rows
