"""Photographs, read from files."""

from __future__ import annotations

import io
import os
import struct
import warnings
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Union

import torch
from torch import Tensor

from ce_plugin.errors import CEPluginWarning, FileError, expected
from ce_plugin.files import existing_file, path_of, printable
from ce_plugin.networks.guard import state_guard

if TYPE_CHECKING:
    from PIL.Image import Image

FilePath = Union[str, "PathLike[str]"]


def read_image(path: FilePath) -> Tensor:
    """Read one image as 8-bit RGB, turned upright.

    The EXIF orientation is applied; grayscale and palette images become RGB; transparent pixels are blended with white;
    16-bit images are scaled to 8 bits; of an animation the first frame is read.

    Floating-point images are taken to range from 0 to 1 where all values are in it. Else they, and 32-bit integers, are
    taken to range from 0 to 255, or to 65535 where a value is larger, and a warning says so.

    Args:
        path: a file in any format that Pillow reads (JPEG, PNG, WebP, TIFF, BMP, GIF ...), of at most
            ``PIL.Image.MAX_IMAGE_PIXELS`` pixels.

    Returns:
        (3, H, W), uint8, values 0 to 255.

    Raises:
        ArgumentError: ``path`` is no file name.
        FileError: the file does not exist, is a directory, a pipe or a device, is not an image, is truncated, has too
            many pixels, or has values of an unknown range: not finite, below 0 or above 65535.

    Warns:
        CEPluginWarning: the range of the values was taken from themselves.

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

    file = path_of(path, "image")
    if os.path.isdir(file):  # where Path.is_dir raises, the next check says why
        raise FileError(
            expected("image", "a picture file", f"the folder {str(file)!r}", f"Name its files: {file / '*.jpg'}")
        )
    found = existing_file(file, "image")
    pixels: Tensor = transform.pil_to_tensor(_decode(found, found))
    return pixels


def decode_image(content: bytes, name: str) -> Tensor:
    """One image from the bytes of its file; as :func:`read_image`.

    Args:
        content: of the file.
        name: for messages.
    """
    from torchvision.transforms.v2 import functional as transform

    pixels: Tensor = transform.pil_to_tensor(_decode(io.BytesIO(content), Path(name)))
    return pixels


def to_eight_bits(picture: Image, name: str) -> Image:
    """One of Pillow's images as 8-bit RGB; as :func:`read_image`."""
    if picture.mode == "F" or picture.mode.startswith("I"):
        return _to_eight_bits(picture, Path(name), sixteen=picture.mode.startswith("I;16"))
    return _to_rgb(picture, Path(name))


def _decode(source: Path | io.BytesIO, file: Path) -> Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(source) as opened:
            # Above the limit for which Pillow warns, it is an error here. The warning stays, because filters
            # of warnings are those of all threads; where they make it an exception, that is the same error.
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and opened.width * opened.height > limit:
                raise _too_large(file, f"{opened.width} x {opened.height}")
            opened.load()
            picture = ImageOps.exif_transpose(opened)
            file_format = opened.format
    except FileError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(file, str(error).partition(",")[0]) from error
    except UnidentifiedImageError as error:
        hint = "Convert it to JPEG or PNG, or leave it out."
        raise FileError(expected("image", "a picture in a known format", repr(str(file)), hint)) from error
    except PermissionError as error:
        raise FileError(expected("image", "a readable file", repr(str(file)), "Check its permissions.")) from error
    except (
        *(OSError, SyntaxError, ValueError, EOFError, MemoryError),
        *(RuntimeError, LookupError, TypeError, ArithmeticError, struct.error),
    ) as error:
        # Pillow's decoders report damage with all of these (PNG: SyntaxError; TIFF: ValueError; AVIF: RuntimeError).
        hint = "The file is truncated or damaged: fetch it again, or leave it out."
        raise FileError(expected("image", "a complete picture", f"{str(file)!r} ({error})", hint)) from error
    if picture.mode == "F" or picture.mode.startswith("I"):
        return _to_eight_bits(picture, file, sixteen=picture.mode.startswith("I;16") or file_format in ("PNG", "PPM"))
    return _to_rgb(picture, file)


def _too_large(file: Path, size: str) -> FileError:
    from PIL import Image

    hint = "Make it smaller: networks see a few hundred pixels of a side. Or raise PIL.Image.MAX_IMAGE_PIXELS."
    wanted = f"a picture of at most {Image.MAX_IMAGE_PIXELS} pixels"
    return FileError(expected("image", wanted, f"{str(file)!r} ({size})", hint))


def _to_eight_bits(image: Image, file: Path, *, sixteen: bool) -> Image:
    """Gray values of more than 8 bits as 8-bit RGB. Pillow's own conversion clips them at 255."""
    import numpy as np
    from PIL import Image as Pillow

    values = np.asarray(image, dtype=np.float64)
    low, high = float(values.min(initial=np.inf)), float(values.max(initial=-np.inf))
    if not (low >= 0 and high <= 65535):  # or NaN
        hint = "Scale it and save it with 8 or 16 bits."
        came = f"{str(file)!r}, whose values range from {low:g} to {high:g}"
        raise FileError(expected("image", "a picture of finite values from 0 to 1, 255 or 65535", came, hint))
    top = (
        65535.0
        if sixteen
        else next(top for top in (1.0, 255.0, 65535.0) if high <= top and (top > 1 or _is_float(image)))
    )
    if not sixteen and top > 1:
        kind = "floating-point numbers" if _is_float(image) else "32-bit integers"
        warnings.warn(
            f"{printable(file)} holds {kind} from {low:g} to {high:g}, which are taken as values of 0 (black) to "
            f"{top:g} (white). Save it with 8 or 16 bits to leave no doubt.",
            CEPluginWarning,
            stacklevel=4,
        )
    return Pillow.fromarray((values / top * 255.0).round().astype(np.uint8)).convert("RGB")


def _is_float(image: Image) -> bool:
    return image.mode == "F"


def _to_rgb(image: Image, file: Path) -> Image:
    from PIL import Image as Pillow

    try:
        if "A" in image.mode or "transparency" in image.info:
            shown = image.convert("RGBA")
            white = Pillow.new("RGBA", shown.size, "white")
            return Pillow.alpha_composite(white, shown).convert("RGB")
        return image.convert("RGB")
    except (ValueError, OSError) as error:
        hint = "Convert it to RGB."
        wanted = "a picture in colours or gray values that can be shown"
        raise FileError(expected("image", wanted, f"{str(file)!r} of mode {image.mode}", hint)) from error


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
