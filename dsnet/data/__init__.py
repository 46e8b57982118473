"""Images in: files to normalised tensors."""

from .images import ImageError, list_images, load_image, preprocess

__all__ = ["ImageError", "list_images", "load_image", "preprocess"]
