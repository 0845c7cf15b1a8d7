"""Image tiling against the released processors' own functions, a slow re-derivation, and hostile bytes."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import subprocess
import sys
import zlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ayllu.chat import images
from ayllu.chat.images import ImageConfig, best_canvas, canvas_candidates, resized_size, tile_image
from ayllu.errors import ImageError, UsageError

DEFAULT = ImageConfig()

# Runs apart: it has to pretend that torchvision exists, which no other test may see.
REFERENCE = """
import importlib, importlib.machinery, json, sys, types
import torch, transformers
for name in ["torchvision", "torchvision.transforms", "torchvision.transforms.v2",
             "torchvision.transforms.v2.functional"]:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    sys.modules[name] = module
sys.modules["torchvision.transforms.v2"].functional = sys.modules["torchvision.transforms.v2.functional"]
llama4 = importlib.import_module("transformers.models.llama4.image_processing_llama4")
side = type("Side", (), {"height": 336, "width": 336})()
resolutions = llama4.find_supported_resolutions(16, side)
table = torch.tensor(resolutions)
def one(size, largest):
    canvas = llama4.get_best_fit(size, table, resize_to_max_canvas=largest).tolist()
    bound = canvas if largest else [min(max(s, 336), c) for s, c in zip(size, canvas)]
    return canvas, llama4.get_max_res_without_distortion(tuple(size), tuple(bound))
sizes = json.loads(sys.stdin.read())
print(json.dumps({"resolutions": resolutions, "fits": [[one(s, False), one(s, True)] for s in sizes]}))
"""


def some_sizes() -> list[tuple[int, int]]:
    generator = np.random.default_rng(4)
    sides = [1, 2, 13, 335, 336, 337, 500, 671, 672, 673, 1008, 1344, 1500, 2688, 5375, 5376, 5377, 20000]
    fixed = [(height, width) for height in sides for width in sides]
    wild = [tuple(int(side) for side in np.exp(generator.uniform(0, 8.7, 2)) + 1) for _ in range(700)]
    return fixed + [(height, width) for height, width in wild]


@pytest.fixture(scope="module")
def reference() -> dict[str, list]:
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    done = subprocess.run(
        [sys.executable, "-c", REFERENCE],
        input=json.dumps(some_sizes()),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_sixteen_tiles_give_the_fifty_canvases_of_the_reference_in_its_order(reference: dict) -> None:
    candidates = canvas_candidates(16)
    assert len(candidates) == 50
    assert [[336 * rows, 336 * columns] for rows, columns in candidates] == reference["resolutions"]


@pytest.mark.parametrize("largest", [False, True])
def test_canvas_and_size_equal_the_reference_for_many_sizes(reference: dict, largest: bool) -> None:
    config = ImageConfig(largest_canvas=largest)
    for size, fits in zip(some_sizes(), reference["fits"], strict=True):
        canvas, resized = fits[largest]
        ours = best_canvas(size, config)
        assert [336 * tiles for tiles in ours] == canvas, size
        assert list(resized_size(size, ours, config)) == [max(side, 1) for side in resized], size


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 20))
def test_canvas_obeys_the_rule_in_exact_arithmetic(height: int, width: int, max_tiles: int) -> None:
    rows, columns = best_canvas((height, width), ImageConfig(max_tiles=max_tiles))
    every = [(a, b) for a in range(1, 21) for b in range(1, 21) if a * b <= max_tiles]
    scale = {(a, b): min(Fraction(336 * a, height), Fraction(336 * b, width)) for a, b in every}
    enlarging = [value for value in scale.values() if value >= 1]
    wanted = min(enlarging) if enlarging else max(scale.values())
    fitting = [shape for shape in every if scale[shape] == wanted]
    assert (rows, columns) in fitting
    assert rows * columns == min(a * b for a, b in fitting)


def test_an_image_is_never_enlarged_beyond_one_tile() -> None:
    assert best_canvas((100, 50), DEFAULT) == (1, 1)
    assert resized_size((100, 50), (1, 1), DEFAULT) == (336, 168)
    assert resized_size((400, 350), best_canvas((400, 350), DEFAULT), DEFAULT) == (400, 350)


@pytest.mark.parametrize(("width", "height"), [(40, 30), (336, 336), (700, 500), (350, 1200), (5000, 20)])
def test_pixels_equal_a_naive_computation(width: int, height: int) -> None:
    image = picture(width, height)
    tiled = tile_image(encoded(image))
    canvas = best_canvas((height, width), DEFAULT)
    assert (tiled.rows, tiled.columns) == canvas
    new_height, new_width = resized_size((height, width), canvas, DEFAULT)
    resized = np.asarray(image.resize((new_width, new_height), Image.Resampling.BILINEAR), dtype=np.float64)
    count = canvas[0] * canvas[1]
    assert tiled.pixels.shape == (count + (count > 1), 3, 336, 336)
    assert tiled.pixels.dtype == np.float32
    for tile in range(count):
        wanted = np.full((336, 336, 3), -1.0)
        top, left = 336 * (tile // canvas[1]), 336 * (tile % canvas[1])
        part = resized[top : top + 336, left : left + 336]
        wanted[: part.shape[0], : part.shape[1]] = (part / 255 - 0.5) / 0.5
        np.testing.assert_allclose(tiled.pixels[tile], wanted.transpose(2, 0, 1), atol=1e-6)
    if count > 1:
        whole = np.asarray(image.resize((336, 336), Image.Resampling.BILINEAR), dtype=np.float64)
        np.testing.assert_allclose(
            tiled.pixels[-1], ((whole / 255 - 0.5) / 0.5).transpose(2, 0, 1), atol=1e-6
        )


def test_transparent_pixels_become_white() -> None:
    clear = Image.new("RGBA", (336, 336), (0, 0, 0, 0))
    half = Image.new("RGBA", (336, 336), (0, 0, 0, 128))
    grey_and_alpha = Image.new("LA", (336, 336), (0, 0))
    assert tile_image(encoded(clear)).pixels.min() == 1
    assert abs(float(tile_image(encoded(half)).pixels.mean())) < 0.01
    assert tile_image(encoded(grey_and_alpha)).pixels.min() == 1
    palette = Image.new("P", (336, 336), 0)
    palette.putpalette([10, 20, 30])
    assert tile_image(encoded(palette, transparency=0)).pixels.min() == 1


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (336, 336), color) for color in ("white", "black", "black")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert tile_image(data).pixels.min() == 1


def test_exif_orientation_is_applied() -> None:
    image = picture(400, 200)
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90 degrees clockwise to view"
    upright = tile_image(encoded(turned, exif=exif))
    assert (upright.rows, upright.columns) == best_canvas((200, 400), DEFAULT)
    np.testing.assert_array_equal(upright.pixels, tile_image(encoded(image)).pixels)


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    grey = Image.fromarray(np.full((336, 336), 0x8000, dtype=np.uint16))
    assert abs(float(tile_image(encoded(grey)).pixels.mean())) < 0.01


def test_tokens_per_tile_follow_the_patches() -> None:
    assert DEFAULT.tokens_per_tile == 144
    with pytest.raises(UsageError, match="below 1"):
        ImageConfig(max_tiles=0)


def huge_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def gif(frames: int) -> bytes:
    """A small animation, written block by block: Pillow would join frames that are alike."""
    whole = encoded(picture(4, 4).convert("P"), "GIF")
    head = 13 + (3 << ((whole[10] & 7) + 1))
    return whole[:head] + whole[head:-1] * frames + whole[-1:]


def animation(kind: str, frames: int) -> bytes:
    data = io.BytesIO()
    colours = [(number * 97 % 256, number * 61 % 256, number * 31 % 256) for number in range(frames)]
    pictures = [Image.new("RGB", (4, 4), colour) for colour in colours]
    pictures[0].save(data, kind, save_all=True, append_images=pictures[1:])
    return data.getvalue()


PNG = encoded(picture(20, 20))
HOSTILE = {
    "10,000 frames": gif(10_000),
    "65 frames": gif(65),
    "65 frames of WebP": animation("WEBP", 65),
    "65 frames of PNG": animation("PNG", 65),
    "an animation cut off": gif(10)[:40],
    "nothing": b"",
    "text": b"hello",
    "header only": PNG[:20],
    "cut off": PNG[: len(PNG) // 2],
    "41 million pixels": huge_png(41_000, 1000),
    "a bomb by Pillow's own warning": huge_png(10_000, 10_000),
    "a bomb by Pillow's own error": huge_png(60_000, 60_000),
    "no pixels": huge_png(0, 5),
    "too few pixels": huge_png(1000, 1000),
    "vector graphics": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "tiff": encoded(picture(9, 9), "TIFF"),
    "too many bytes": PNG + b"\0" * images.MAX_IMAGE_BYTES,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_an_image_error_without_paths_or_addresses(name: str) -> None:
    with pytest.raises(ImageError) as caught:
        tile_image(HOSTILE[name])
    message = str(caught.value)
    assert "0x" not in message
    assert "/" not in message
    assert "BytesIO" not in message
    assert caught.value.fix


@pytest.mark.parametrize("data", [gif(64), animation("WEBP", 64), animation("PNG", 64), gif(1)])
def test_of_an_animation_the_first_frame_counts(data: bytes) -> None:
    assert tile_image(data).pixels.shape == (1, 3, 336, 336)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_one_pixel_is_an_image(kind: str) -> None:
    """Such a one once brought an inference server down."""
    assert tile_image(encoded(Image.new("RGB", (1, 1), "white"), kind)).pixels.shape == (1, 3, 336, 336)


@settings(deadline=None)
@given(st.binary(max_size=40), st.integers(0, len(PNG)))
def test_damaged_bytes_give_an_image_or_an_image_error(noise: bytes, place: int) -> None:
    with contextlib.suppress(ImageError):
        assert tile_image(PNG[:place] + noise + PNG[place + len(noise) :]).pixels.shape == (1, 3, 336, 336)
