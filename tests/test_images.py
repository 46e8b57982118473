"""Image files of every kind to RGB, and RGB to the network's input."""

import io
import pickle
import random
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from dsnet.data import ImageError, list_images, load_image, preprocess

PHOTOS = Path(skimage.data.__file__).parent
MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])

COLOURS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)


def saved(path, pixels, **options):
    """``path`` after writing an array or an image to it."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def loaded(path):
    image = load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def png(width, height, depth, colour_type, rows):
    """A PNG file by hand: Pillow writes neither 16-bit colours nor false sizes."""

    def chunk(kind, data):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


# Reading


@pytest.mark.parametrize("name", ["chelsea.png", "rocket.jpg", "camera.png"])
def test_photo_keeps_its_pixels(name):
    expected = skimage.io.imread(PHOTOS / name)
    if expected.ndim == 2:
        expected = np.stack([expected] * 3, axis=2)
    assert np.array_equal(loaded(PHOTOS / name), expected)


STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}
"""How a camera held in each EXIF orientation stores an upright scene."""


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(
    ("suffix", "options"), [(".png", {}), (".webp", {"lossless": True}), (".tif", {})]
)
def test_exif_orientation_is_applied(tmp_path, orientation, suffix, options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.ascontiguousarray(STORED[orientation](COLOURS))
    turned = saved(tmp_path / f"turned{suffix}", pixels, exif=exif, **options)
    upright = saved(tmp_path / f"upright{suffix}", COLOURS, **options)
    assert np.array_equal(loaded(turned), COLOURS)
    assert torch.equal(preprocess(load_image(turned)), preprocess(load_image(upright)))


def test_exif_orientation_of_a_jpeg_photo(tmp_path):
    photo = load_image(PHOTOS / "chelsea.png").crop((0, 0, 320, 288))
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"quality": 95, "subsampling": 0}
    upright = saved(tmp_path / "upright.jpg", photo, **options)
    stored = photo.transpose(Image.Transpose.ROTATE_90)
    turned = saved(tmp_path / "turned.jpg", stored, exif=exif, **options)
    difference = preprocess(load_image(turned)) - preprocess(load_image(upright))
    assert difference.abs().max() < 0.3


def test_alpha_is_composited_on_white(tmp_path):
    alpha = np.random.default_rng(1).integers(0, 256, (24, 40, 1), dtype=np.uint8)
    path = saved(tmp_path / "x.png", np.concatenate([COLOURS, alpha], axis=2))
    share = alpha / 255
    expected = COLOURS * share + 255 * (1 - share)
    assert np.abs(loaded(path) - expected).max() <= 1
    assert (loaded(path)[alpha[..., 0] == 0] == 255).all()


def test_grey_with_alpha(tmp_path):
    pixels = np.zeros((4, 4, 2), dtype=np.uint8)
    pixels[:2, :, 1] = 255
    path = saved(tmp_path / "x.png", Image.fromarray(pixels, "LA"))
    assert (loaded(path)[:2] == 0).all()
    assert (loaded(path)[2:] == 255).all()


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 255])])
def test_palette_with_transparency(tmp_path, transparency):
    image = Image.new("P", (3, 2))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2, 2, 1, 0])
    path = saved(tmp_path / "x.png", image, transparency=transparency)
    colours = np.array([[10, 20, 30], [255, 255, 255], [70, 80, 90]])
    assert np.array_equal(loaded(path), colours[[[0, 1, 2], [2, 1, 0]]])


def test_colour_key(tmp_path):
    path = saved(tmp_path / "x.png", COLOURS, transparency=tuple(map(int, COLOURS[3, 5])))
    expected = COLOURS.copy()
    expected[3, 5] = 255
    assert np.array_equal(loaded(path), expected)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_grey_is_rounded_to_8_bits(tmp_path, suffix):
    values = np.linspace(0, 65535, 24 * 40).astype(np.uint16).reshape(24, 40)
    path = saved(tmp_path / f"x{suffix}", values)
    expected = np.round(values / 257)
    assert np.array_equal(loaded(path), np.stack([expected] * 3, axis=2))


def test_16_bit_grey_with_a_colour_key_is_opaque(tmp_path):
    values = np.full((2, 2), 40000, dtype=np.uint16)
    path = saved(tmp_path / "x.png", values, transparency=40000)
    assert (loaded(path) == round(40000 / 257)).all()


def test_16_bit_colours(tmp_path):
    values = np.random.default_rng(2).integers(0, 65536, (5, 7, 3))
    rows = [row.astype(">u2").tobytes() for row in values]
    (tmp_path / "x.png").write_bytes(png(7, 5, 16, 2, rows))
    assert np.abs(loaded(tmp_path / "x.png") - values / 257).max() <= 1


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_known_range_are_refused(tmp_path, mode):
    path = saved(tmp_path / "x.tif", Image.new(mode, (4, 4), 7))
    with pytest.raises(ImageError, match=rf"x\.tif: pixels of mode {mode}"):
        load_image(path)


def test_bilevel(tmp_path):
    bits = np.random.default_rng(3).integers(0, 2, (9, 13)).astype(bool)
    path = saved(tmp_path / "x.png", bits)
    assert np.array_equal(loaded(path), np.stack([bits * 255] * 3, axis=2))


def test_cmyk_jpeg(tmp_path):
    photo = load_image(PHOTOS / "rocket.jpg")
    path = saved(tmp_path / "x.jpg", photo.convert("CMYK"), quality=95)
    assert Image.open(path).mode == "CMYK"
    assert np.abs(loaded(path) - np.asarray(photo, dtype=float)).mean() < 3


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "lime", "blue")]
    for name in ("x.gif", "x.webp"):
        options = {} if name == "x.gif" else {"lossless": True}
        path = saved(tmp_path / name, frames[0], save_all=True, append_images=frames[1:], **options)
        assert (loaded(path) == [255, 0, 0]).all()


# Refusing


def jpeg_bytes():
    buffer = io.BytesIO()
    Image.fromarray(COLOURS).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not readable as any of BMP"),
        (b"a shopping list", "not readable as any of BMP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not readable"),
        (jpeg_bytes()[: len(jpeg_bytes()) // 2], "truncated"),
        (png(30000, 30000, 8, 2, []), "exceeds limit"),
        (png(12000, 12000, 8, 2, []), "exceeds limit"),
        (png(40, 24, 8, 2, [b""]), "truncated"),
    ],
    ids=["empty", "text", "postscript", "truncated", "bomb", "smaller bomb", "no data"],
)
def test_damaged_or_foreign_file(tmp_path, recwarn, content, reason):
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=reason) as caught:
        load_image(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert not recwarn


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ImageError, match=r"absent\.png: No such file or directory"):
        load_image(tmp_path / "absent.png")
    with pytest.raises(ImageError, match="Is a directory"):
        load_image(tmp_path)


def test_pixel_limit_is_pillows(tmp_path, monkeypatch):
    path = saved(tmp_path / "x.png", COLOURS)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 40)
    assert load_image(path).size == (40, 24)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 40 - 1)
    with pytest.raises(ImageError, match="exceeds limit of 959 pixels"):
        load_image(path)


def test_error_survives_pickling(tmp_path):
    error = pickle.loads(pickle.dumps(ImageError(tmp_path, "too dark")))
    assert str(error) == f"{tmp_path}: too dark"


def test_without_pillow_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install 'dsnet-kernels\[images\]'"):
        load_image(PHOTOS / "chelsea.png")


def with_valid_checksums(content):
    """A PNG file whose damage lies deeper than its chunks' checksums."""
    content, start = bytearray(content), 8
    while start + 12 <= len(content):
        end = start + 8 + int.from_bytes(content[start : start + 4], "big")
        if end + 4 > len(content):
            break
        content[end : end + 4] = struct.pack(">I", zlib.crc32(content[start + 4 : end]))
        start = end + 4
    return content


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"])
def test_fuzzed_file_is_an_image_or_an_image_error(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1 << 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(COLOURS).save(buffer, kind, exif=exif)
    rng = random.Random(kind)
    path = tmp_path / "x"
    outcomes = {"image": 0, "error": 0}
    for _ in range(150):
        content = bytearray(buffer.getvalue())
        for _ in range(rng.randint(1, 8)):
            # Half of the damage goes to the headers.
            end = len(content) if rng.random() < 0.5 else min(len(content), 64)
            content[rng.randrange(end)] = rng.randrange(256)
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        path.write_bytes(with_valid_checksums(content) if kind == "PNG" else content)
        try:
            image = load_image(path)
        except ImageError:
            outcomes["error"] += 1
        else:
            outcomes["image"] += 1
            assert image.mode == "RGB"
            assert preprocess(image, 32).isfinite().all()
    assert min(outcomes.values()) > 0, outcomes


# Listing


def test_folder_stands_for_the_images_below_it(tmp_path):
    for name in ("b.PNG", "a.jpeg", "notes.txt", "sub/d.webp", "sub/c.tif", "Sub2/e.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [file.relative_to(tmp_path).as_posix() for file in list_images([tmp_path])]
    assert names == ["Sub2/e.gif", "a.jpeg", "b.PNG", "sub/c.tif", "sub/d.webp"]


def test_files_are_kept_in_order_whatever_their_suffix(tmp_path):
    (tmp_path / "folder").mkdir()
    inside = saved(tmp_path / "folder" / "x.png", COLOURS)
    assert list_images(["z.dat", tmp_path / "folder", "absent"]) == [
        Path("z.dat"),
        inside,
        Path("absent"),
    ]


def test_folder_without_images(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ImageError, match="no images in this folder"):
        list_images([tmp_path])


# Preprocessing


@pytest.mark.parametrize("size", [32, 65, 224])
@pytest.mark.parametrize("name", ["chelsea.png", "horse.png", "rocket.jpg"])
def test_preprocess_is_resize_crop_normalise(name, size):
    photo = load_image(PHOTOS / name)
    shorter = {32: 35, 65: 72, 224: 248}[size]
    width, height = (int(shorter * length / min(photo.size)) for length in photo.size)
    resized = np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC))
    top, left = round((height - size) / 2), round((width - size) / 2)
    crop = resized[top : top + size, left : left + size] / 255
    expected = torch.from_numpy(((crop - MEAN) / STD).transpose(2, 0, 1))
    actual = preprocess(photo, size)
    assert actual.shape == (3, size, size)
    assert actual.dtype == torch.float32
    # A pixel at the edge of rounding may fall on its other side: one level in 255, and rarely.
    difference = (actual - expected).abs()
    assert difference.max() < 1.01 / (255 * STD.min())
    assert (difference > 1e-5).double().mean() < 1e-3


def test_preprocess_values():
    image = Image.new("RGB", (50, 40), (255, 0, 51))
    expected = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(MEAN)) / torch.tensor(STD)
    x = preprocess(image, 33).double()
    torch.testing.assert_close(x, expected.view(3, 1, 1).expand_as(x), rtol=0, atol=1e-6)


def test_preprocess_takes_extreme_shapes():
    line = Image.new("RGB", (100_000, 1), "white")
    assert preprocess(line).equal(preprocess(Image.new("RGB", (1, 1), "white")))


@pytest.mark.parametrize(
    ("mode", "size", "message"), [("L", 224, "image: expected mode RGB"), ("RGB", 0, "size: ")]
)
def test_preprocess_errors(mode, size, message):
    with pytest.raises(ValueError, match=message):
        preprocess(Image.new(mode, (40, 40)), size)
