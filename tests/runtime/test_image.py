import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reroute.errors import UserError
from reroute.manifest import ImageProcessing
from reroute.runtime.image import crop, open_image, preprocess

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = [
    (192, 192),
    (640, 480),
    (333, 500),
    (1200, 90),
    (7, 5),
    (3, 40),
    (191, 193),
    (1, 1),
    (100, 100),
    (337, 336),
]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def processing(edge: int, height: int, width: int) -> ImageProcessing:
    return ImageProcessing(
        shortest_edge=edge,
        crop_height=height,
        crop_width=width,
        resample=3,
        rescale_factor=1 / 255,
        mean=MEAN,
        std=STD,
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("edge", "crop_size"), [(192, (192, 192)), (60, (96, 80)), (50, (33, 47))], ids=str)
def test_equals_transformers(size: tuple[int, int], edge: int, crop_size: tuple[int, int]) -> None:
    pytest.importorskip("transformers")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    reference = CLIPImageProcessorPil(
        size={"shortest_edge": edge},
        crop_size={"height": crop_size[0], "width": crop_size[1]},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    image = picture(*size)
    expected = np.asarray(reference(image)["pixel_values"][0])
    ours = preprocess(open_image(image), processing(edge, *crop_size))
    assert ours.dtype == np.float32
    assert ours.shape == (3, *crop_size)
    assert ours.flags["C_CONTIGUOUS"]
    np.testing.assert_allclose(ours, expected, atol=1e-6, rtol=0)


def test_crop_is_what_is_normalised() -> None:
    image = picture(90, 60)
    shown = crop(image, processing(40, 40, 40))
    assert shown.size == (40, 40)
    pixels = (np.asarray(shown) / 255 - np.asarray(MEAN)) / np.asarray(STD)
    np.testing.assert_allclose(preprocess(image, processing(40, 40, 40)).transpose(1, 2, 0), pixels, atol=1e-5)


def test_path_pillow_and_array_are_the_same(tmp_path: Path) -> None:
    image = picture(20, 10)
    image.save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), image, np.asarray(image)):
        opened = open_image(source)
        assert opened.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(opened), np.asarray(image))


def test_exif_orientation(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10), "red")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (10, 20)


def test_transparency_is_laid_on_white() -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert open_image(image).getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("LA", (4, 4), (0, 128))
    assert open_image(half).getpixel((0, 0)) == pytest.approx((127, 127, 127), abs=1)


def test_palette_with_transparency() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    assert open_image(image).getpixel((0, 0)) == (200, 100, 50)
    image.info["transparency"] = 1
    assert open_image(image).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes_become_rgb(mode: str) -> None:
    opened = open_image(Image.new(mode, (3, 2)))
    assert opened.mode == "RGB"
    assert opened.size == (3, 2)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_16_bit_grey_keeps_its_upper_byte(dtype: type) -> None:
    image = Image.fromarray(np.asarray([[0, 255, 256, 65535, 40000]], dtype=dtype))
    assert np.asarray(open_image(image))[0, :, 0].tolist() == [0, 0, 1, 255, 156]


def test_grey_and_rgba_arrays() -> None:
    assert open_image(np.full((2, 3), 7, np.uint8)).getpixel((0, 0)) == (7, 7, 7)
    assert open_image(np.zeros((2, 3, 4), np.uint8)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 3, 3), np.float32), np.zeros((3, 4, 5), np.uint8), np.zeros(4, np.uint8)],
    ids=["float", "channels first", "flat"],
)
def test_other_arrays_are_refused_with_both(array: np.ndarray) -> None:
    with pytest.raises(UserError, match=rf"{array.dtype} and shape"):
        open_image(array)


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(UserError, match="floating"):
        open_image(Image.new("F", (3, 3)))


def test_not_an_image(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"notes\.txt is not an image"):
        open_image(tmp_path / "notes.txt")
    with pytest.raises(UserError, match="no image"):
        open_image(tmp_path / "missing.png")
    with pytest.raises(UserError, match="cannot read"):
        open_image(tmp_path)
    with pytest.raises(UserError, match="cannot be a int"):
        open_image(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_a_cut_file_is_damaged(tmp_path: Path, form: str) -> None:
    buffer = io.BytesIO()
    picture(200, 200).save(buffer, form)
    (tmp_path / "cut").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(UserError, match=r"cut is damaged|not an image|cannot read"):
        open_image(tmp_path / "cut")


def png_of(width: int, height: int) -> bytes:
    """A PNG header that claims a size; there are no pixels behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(8001, 8000), (10000, 9500), (60000, 60000)])
def test_too_large_is_refused_before_decoding(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "big.png").write_bytes(png_of(*size))
    with pytest.raises(UserError, match=r"big.png is too large.*64 million"):
        open_image(tmp_path / "big.png")


@pytest.mark.parametrize("size", [(101, 1), (2, 500)])
def test_extreme_aspect_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="more than 100 times"):
        open_image(picture(*size))
    (tmp_path / "thin.png").write_bytes(png_of(*size))
    with pytest.raises(UserError, match=r"thin\.png"):
        open_image(tmp_path / "thin.png")


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3)])
def test_empty_is_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match="empty"):
        open_image(np.zeros(shape, np.uint8))


def test_the_callers_image_is_left_as_it_was() -> None:
    image = Image.new("RGBA", (4, 4), (1, 2, 3, 4))
    before = image.tobytes()
    open_image(image)
    assert image.tobytes() == before
    assert image.mode == "RGBA"
