"""Photographs, read from files."""

from __future__ import annotations

import warnings
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Union

import torch
from torch import Tensor

from ce_plugin.errors import FileError, expected
from ce_plugin.networks.guard import state_guard

if TYPE_CHECKING:
    from PIL.Image import Image

FilePath = Union[str, "PathLike[str]"]


def read_image(path: FilePath) -> Tensor:
    """Read one image as 8-bit RGB, turned upright.

    The EXIF orientation is applied; grayscale and palette images become RGB; transparent pixels are blended with white;
    16-bit images are scaled to 8 bits; of an animation the first frame is read.

    Args:
        path: a file in any format that Pillow reads (JPEG, PNG, WebP, TIFF, BMP, GIF ...).

    Returns:
        (3, H, W), uint8, values 0 to 255.

    Raises:
        FileError: the file does not exist, is a directory, is not an image, or is truncated.

    Example:
        >>> import tempfile, pathlib
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "red.png")
        ...     Image.new("RGB", (4, 2), "red").save(file)
        ...     read_image(file)[:, 0, 0]
        tensor([255,   0,   0], dtype=torch.uint8)
    """
    from torchvision.transforms.v2 import functional as transform

    file = Path(path)
    if not file.exists():
        raise FileError(expected("image", "an existing file", repr(str(file)), "Check the spelling and the folder."))
    if file.is_dir():
        raise FileError(
            expected("image", "a picture file", f"the folder {str(file)!r}", f"Name its files: {file / '*.jpg'}")
        )
    pixels: Tensor = transform.pil_to_tensor(_decode(file))
    return pixels


def _decode(file: Path) -> Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # No warning for large photographs; one that would exhaust memory still raises DecompressionBombError.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as opened:
                opened.load()
                return _to_rgb(ImageOps.exif_transpose(opened))
    except UnidentifiedImageError as error:
        hint = "Convert it to JPEG or PNG, or leave it out."
        raise FileError(expected("image", "a picture in a known format", repr(str(file)), hint)) from error
    except PermissionError as error:
        raise FileError(expected("image", "a readable file", repr(str(file)), "Check its permissions.")) from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        # Pillow's decoders report damage with all of these (PNG: SyntaxError; TIFF, WebP: ValueError, EOFError).
        hint = "The file is truncated or damaged: fetch it again, or leave it out."
        raise FileError(expected("image", "a complete picture", f"{str(file)!r} ({error})", hint)) from error


def _to_rgb(image: Image) -> Image:
    from PIL import Image as Pillow

    if image.mode.startswith("I") or image.mode == "F":
        import numpy as np

        # Pillow's own conversion clips 16-bit values at 255, which turns most images white.
        values = np.asarray(image, dtype=np.float64)
        top = 1.0 if image.mode == "F" and values.max(initial=0.0) <= 1.0 else 65535.0
        return Pillow.fromarray(np.clip(values / top * 255.0, 0, 255).round().astype(np.uint8)).convert("RGB")
    if "A" in image.mode or "transparency" in image.info:
        shown = image.convert("RGBA")
        white = Pillow.new("RGBA", shown.size, "white")
        return Pillow.alpha_composite(white, shown).convert("RGB")
    return image.convert("RGB")


def sample_photographs() -> dict[str, Tensor]:
    """The two photographs that come with scikit-learn: a daisy and a Chinese palace.

    Returns:
        ``{"flower.jpg": (3, 427, 640), "china.jpg": (3, 427, 640)}``, uint8.

    Example:
        >>> {name: tuple(image.shape) for name, image in sample_photographs().items()}
        {'flower.jpg': (3, 427, 640), 'china.jpg': (3, 427, 640)}
    """
    with state_guard():  # its first import moves the global random state
        from sklearn.datasets import load_sample_image

    return {
        name: torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1) for name in ("flower.jpg", "china.jpg")
    }
