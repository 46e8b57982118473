"""Image files to network inputs; Pillow reads them and is imported on first use."""

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""What counts as an image in a folder, in either case."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""What is decoded, by content. Not all that Pillow knows: some formats run other programs."""

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Of ImageNet's red, green and blue, in units of the full range."""


class ImageError(ValueError):
    """A file or folder that yields no image; the message begins with its name."""

    def __init__(self, path: str | os.PathLike, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def list_images(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """Files to read: a folder stands for the images below it, anything else for itself.

    Folders are searched recursively for :data:`SUFFIXES` without following links to folders;
    each folder's images come sorted, and the order of ``paths`` is kept.

    Raises:
        ImageError: for a folder that cannot be read or holds no image.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        files += _images_below(path) if path.is_dir() else [path]
    return files


def load_image(path: str | os.PathLike) -> "Image":
    """The first frame of an image file, upright, in RGB with 8 bits.

    The EXIF orientation is applied, transparency is composited on white, 16-bit greyscale is
    rounded to 8 bits, and greyscale, palette, bilevel and CMYK images are converted.

    Raises:
        ImageError: for a file that is missing, damaged, truncated, of none of :data:`FORMATS`, or
            larger than ``PIL.Image.MAX_IMAGE_PIXELS``, whose pixels are then never decoded.
        ImportError: without Pillow.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError(
            "reading images needs Pillow: pip install 'dsnet-kernels[images]'"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Decoders of damaged files raise nearly every type there is.
        raise ImageError(path, _reason(error)) from error


def preprocess(image: "Image", size: int = 224) -> Tensor:
    """The evaluation recipe: resize, centre crop, normalise.

    The shorter side becomes round(size·248/224) by antialiased bicubic interpolation; the centre is
    cut out, scaled to [0, 1], and :data:`MEAN` and :data:`STD` are applied.

    Args:
        image: in RGB, as from :func:`load_image`.
        size: of the crop.

    Returns:
        (3, size, size) in float32.

    Raises:
        ValueError: for another mode or a size below 1.
    """
    from PIL import Image

    if image.mode != "RGB":
        raise ValueError(f"image: expected mode RGB, got {image.mode}")
    if size < 1:
        raise ValueError(f"size: expected at least 1, got {size}")
    shorter = round(size * 248 / 224)
    box: list[tuple[float, float]] = []
    for length in image.size:
        resized = shorter * length // min(image.size)
        start = round((resized - size) / 2)
        box.append((start * length / resized, (start + size) * length / resized))
    (left, right), (top, bottom) = box
    # Only the crop is computed, so a very long image takes no more memory than another.
    crop = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
    pixels = torch.frombuffer(bytearray(crop.tobytes()), dtype=torch.uint8)
    x = pixels.view(size, size, 3).permute(2, 0, 1).float() / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def _images_below(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise ImageError(error.filename, _reason(error)) from error

    files = [
        Path(parent, name)
        for parent, _, names in os.walk(folder, onerror=refuse)
        for name in names
        if name.lower().endswith(SUFFIXES)
    ]
    if not files:
        raise ImageError(folder, f"no images in this folder ({' '.join(SUFFIXES)})")
    return sorted(files)


def _to_rgb(image: "Image") -> "Image":
    from PIL import Image

    if image.mode.startswith("I;16"):
        # A 16-bit colour key has no counterpart in 8 bits: such an image is taken as opaque.
        image.info.pop("transparency", None)
        image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range, expected 8 or 16 bits")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return f"not readable as any of {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
