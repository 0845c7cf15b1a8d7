"""Images to Llama 4 tiles: choose a canvas of up to 16 tiles, resize, pad, cut, normalise.

Exactly the preprocessing of the released models: canvas choice, resize bounds, padding, global tile.
Whatever the bytes hold, the cost is bounded: the format, the encoded size, the pixel count and the number of
frames are checked before anything is decoded, and every failure is an `ImageError`.
"""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ayllu.errors import ImageError, UsageError

if TYPE_CHECKING:
    from PIL import Image

MAX_IMAGE_BYTES = 20_000_000
MAX_IMAGE_PIXELS = 40_000_000
MAX_IMAGE_FRAMES = 64
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


@dataclass(frozen=True)
class ImageConfig:
    """How a vision tower wants its images; the defaults are those of Scout and Maverick.

    `tile_size` and `patch_size` are pixels. `downsample` is the number of patches that pixel shuffle joins
    into one token. `largest_canvas` enlarges an image as far as its canvas allows instead of as little as
    possible (`resize_to_max_canvas` in the published processors).
    """

    tile_size: int = 336
    patch_size: int = 14
    downsample: int = 4
    max_tiles: int = 16
    largest_canvas: bool = False

    def __post_init__(self) -> None:
        if min(self.tile_size, self.patch_size, self.downsample, self.max_tiles) < 1:
            raise UsageError("An image setting is below 1.", "Use the values of the model's configuration.")

    @property
    def tokens_per_tile(self) -> int:
        """Token rows that one tile becomes (144 in the released models)."""
        return (self.tile_size // self.patch_size) ** 2 // self.downsample


@dataclass(frozen=True, eq=False)
class TiledImage:
    """One image, ready for the vision tower.

    `pixels` is float32 [tiles, 3, tile_size, tile_size] in -1..1: `rows` x `columns` tiles row by row and,
    when there is more than one, a last tile that shows the whole image.
    """

    pixels: npt.NDArray[np.float32]
    rows: int
    columns: int


@dataclass(frozen=True, eq=False)
class CutImage:
    """An image cut into tiles, before its numbers are scaled: `tiles` is uint8 [tiles, tile_size, tile_size,
    3], in the order of `TiledImage`."""

    tiles: npt.NDArray[np.uint8]
    rows: int
    columns: int

    def normalised(self) -> TiledImage:
        """The tiles as the vision tower wants them."""
        pixels = self.tiles.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - np.float32(1)
        return TiledImage(np.ascontiguousarray(pixels), self.rows, self.columns)


def tile_image(data: bytes | Image.Image, config: ImageConfig | None = None) -> TiledImage:
    """The tiles of an encoded image (or of an open Pillow image). Raises `ImageError`.

    The first frame of an animation counts. EXIF orientation is applied, so that a photograph reaches the
    model the way a person sees it (the published Llama 4 loaders do the same). Transparent pixels are
    composited on white.
    """
    return cut_image(data, config).normalised()


def cut_image(data: bytes | Image.Image, config: ImageConfig | None = None) -> CutImage:
    """The tiles as bytes, a quarter of what they are as numbers; see `tile_image`. Raises `ImageError`."""
    # Imported where it is used: conversations without images need not wait for it.
    from PIL import Image

    config = config or ImageConfig()
    image = _open(data) if isinstance(data, bytes) else data
    _check_size(image.width, image.height)
    if isinstance(data, bytes) and _frames(image, data) > MAX_IMAGE_FRAMES:
        raise ImageError(
            f"The image has more than {MAX_IMAGE_FRAMES} frames.", "Send the one that matters as PNG or JPEG."
        )
    try:
        image = _upright_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds, none of which may leave this room
        raise _unreadable() from error
    size = (image.height, image.width)
    rows, columns = best_canvas(size, config)
    height, width = resized_size(size, (rows, columns), config)
    canvas = np.zeros((rows * config.tile_size, columns * config.tile_size, 3), dtype=np.uint8)
    canvas[:height, :width] = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    tiles = canvas.reshape(rows, config.tile_size, columns, config.tile_size, 3).swapaxes(1, 2)
    tiles = tiles.reshape(-1, config.tile_size, config.tile_size, 3)
    if rows * columns > 1:
        # The whole image squeezed into one tile, aspect ratio ignored: what the reference code does.
        whole = image.resize((config.tile_size, config.tile_size), Image.Resampling.BILINEAR)
        tiles = np.concatenate([tiles, np.asarray(whole)[None]])
    return CutImage(np.ascontiguousarray(tiles), rows, columns)


def canvas_candidates(max_tiles: int) -> list[tuple[int, int]]:
    """Every (rows, columns) of at most `max_tiles` tiles; 50 of them for 16.

    Grouped by aspect ratio in the order of first appearance, largest first: ties are settled by this order.
    """
    by_ratio: dict[float, list[tuple[int, int]]] = {}
    for count in range(max_tiles, 0, -1):
        for rows in range(1, count + 1):
            if count % rows == 0:
                columns = count // rows
                by_ratio.setdefault(rows / columns, []).append((rows, columns))
    return [shape for shapes in by_ratio.values() for shape in shapes]


def best_canvas(size: tuple[int, int], config: ImageConfig) -> tuple[int, int]:
    """(rows, columns) for an image of (height, width): the least enlargement, else the least reduction.

    Equal scales go to the smallest area. Scales are compared in float32, as the reference does: in float64
    images that differ by a pixel in tens of thousands would tie differently.
    """
    shapes = np.array(canvas_candidates(config.max_tiles))
    scales = (shapes * config.tile_size).astype(np.float32) / np.array(size, dtype=np.float32)
    scale = scales.min(axis=1)
    enlarging = scale[scale >= 1]
    if enlarging.size:
        chosen = enlarging.max() if config.largest_canvas else enlarging.min()
    else:
        chosen = scale.max()
    fitting = shapes[scale == chosen]
    rows, columns = fitting[fitting.prod(axis=1).argmin()]
    return int(rows), int(columns)


def resized_size(size: tuple[int, int], canvas: tuple[int, int], config: ImageConfig) -> tuple[int, int]:
    """(height, width) in pixels of the image on its canvas of (rows, columns) tiles, aspect ratio kept.

    Without `largest_canvas` a side grows to one tile at most.
    """
    bounds = [tiles * config.tile_size for tiles in canvas]
    if not config.largest_canvas:
        bounds = [min(max(side, config.tile_size), bound) for side, bound in zip(size, bounds, strict=True)]
    height, width = size
    scale_height, scale_width = bounds[0] / height, bounds[1] / width
    if scale_width < scale_height:
        fitted = (min(math.floor(height * scale_width), bounds[0]), bounds[1])
    else:
        fitted = (bounds[0], min(math.floor(width * scale_height), bounds[1]))
    return max(fitted[0], 1), max(fitted[1], 1)


def _open(data: bytes) -> Image.Image:
    from PIL import Image

    if len(data) > MAX_IMAGE_BYTES:
        raise ImageError(
            f"The image has {len(data):,} bytes; at most {MAX_IMAGE_BYTES:,} are allowed.",
            "Save it smaller or as JPEG.",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise _too_many_pixels() from error
    except Exception as error:  # see tile_image
        raise _unreadable() from error


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise _unreadable()
    if width * height > MAX_IMAGE_PIXELS:
        raise _too_many_pixels()


def _frames(image: Image.Image, data: bytes) -> int:
    """How many frames the image has, at least up to one more than are allowed. Nothing is decoded."""
    if image.format == "GIF":
        return _gif_frames(data)
    # The other formats state the number ahead of the frames.
    frames: int = getattr(image, "n_frames", 1)
    return frames


def _gif_frames(data: bytes) -> int:
    """Frames of a GIF, found by going from block to block. One that is cut off is the decoder's to refuse."""
    frames = 0
    try:
        place = 13 + _gif_colours(data[10])
        while frames <= MAX_IMAGE_FRAMES and data[place] in (0x21, 0x2C):
            if data[place] == 0x21:
                place += 2
            else:
                frames += 1
                place += 11 + _gif_colours(data[place + 9])
            while data[place]:
                place += data[place] + 1
            place += 1
    except IndexError:
        pass
    return frames


def _gif_colours(flags: int) -> int:
    """Bytes of the colour table that these flags announce."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _upright_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image, ImageOps

    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # Pillow would clip 16-bit grey to white instead of scaling it.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    layers = image.convert("RGBA")
    white = Image.new("RGBA", layers.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, layers).convert("RGB")


def _unreadable() -> ImageError:
    return ImageError("The image cannot be decoded.", f"Send a whole {', '.join(FORMATS)} file.")


def _too_many_pixels() -> ImageError:
    return ImageError(
        f"The image has more than {MAX_IMAGE_PIXELS // 1_000_000} million pixels.", "Scale it down first."
    )
