"""One image file: its grey or colour values, or the classes of a mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.errors import DataError
from common.tasks.losses import OUTSIDE

AS_STORED = 0  # channels as the file has them
SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".gif", ".bmp", ".ppm"}
WIDE_MODES = ("I;16", "I;16B", "I;16L", "I", "F")  # grey with more than 8 bits
LOSSY = {".jpg", ".jpeg"}
BANDS = {"red": "R", "green": "G", "blue": "B"}


def read_image(path: Path, channels: int, colour: str = "luminance") -> NDArray[Any]:
    """Pixels of one file, shape (channels, height, width), in the file's number type.

    Args:
      path: Of an image file.
      channels: 1 (grey), 3 (colour) or ``AS_STORED``. Grey with more than 8 bits stays grey.
      colour: Which value of a colour file is its grey value: luminance, red, green or blue.

    Raises:
      DataError: The file cannot be read as an image.
    """
    with _opened(path) as image:
        if image.mode in WIDE_MODES:
            wide = np.array(image)[None]  # converting would clip to 8 bits
            return wide.astype(wide.dtype.newbyteorder("="))
        grey = channels == 1 or (channels == AS_STORED and image.mode in ("1", "L", "LA"))
        if grey and colour in BANDS and image.mode not in ("1", "L", "LA"):
            return np.array(image.convert("RGB").getchannel(BANDS[colour]))[None]
        pixels = np.array(image.convert("L" if grey else "RGB"))
    return pixels[None] if grey else np.moveaxis(pixels, -1, 0)


def read_mask(path: Path, valid: Path | None, num_classes: int) -> NDArray[np.uint8]:
    """Classes of every pixel, shape (height, width); ``OUTSIDE`` where ``valid`` is 0.

    With two classes every value but 0 is the second: such masks hold 1 or 255. Otherwise a pixel's
    value is its class.

    Raises:
      DataError: A file cannot be read; or the two differ in size.
    """
    values = _plain_values(path, as_grey=num_classes == 2)  # noqa: PLR2004
    if num_classes == 2:  # noqa: PLR2004
        mask: NDArray[np.uint8] = (values != 0).astype(np.uint8)
    elif values.max(initial=0) >= OUTSIDE:
        raise DataError(f"{path.name}: a mask's values are classes, below {num_classes}")
    else:
        mask = values.astype(np.uint8)
    if valid is None:
        return mask
    return cut_to_valid(mask, _plain_values(valid, as_grey=True) != 0, valid.name)


def cut_to_valid(
    mask: NDArray[np.uint8], inside: NDArray[np.bool_], name: str
) -> NDArray[np.uint8]:
    """A mask that is ``OUTSIDE`` beyond the valid region, which has a name in messages.

    Raises:
      DataError: The two differ in size.
    """
    if inside.shape != mask.shape:
        raise DataError(f"{name}: the valid region and the mask differ in size")
    mask[~inside] = OUTSIDE
    return mask


def _plain_values(path: Path, *, as_grey: bool) -> NDArray[Any]:
    """One whole number per pixel.

    Of a file with a palette that is its brightness with ``as_grey``, since black is the background
    whatever its index; else the index, which is the class.
    """
    if path.suffix.lower() in LOSSY:
        raise DataError(f"{path.name}: JPEG blurs the classes of a mask; save it as PNG or TIFF")
    with _opened(path) as image:
        plain = image.mode == "LA" or (image.mode == "P" and as_grey)
        values = np.asarray(image.convert("L") if plain else image)
    if values.ndim == 3 and (values[..., :1] == values[..., :3]).all():  # noqa: PLR2004
        values = values[..., 0]  # grey, saved as colour
    if values.ndim != 2 or values.min(initial=0) < 0:  # noqa: PLR2004
        raise DataError(f"{path.name}: a mask holds one class per pixel; this file has colours")
    if values.dtype.kind == "f" and not (values == np.trunc(values)).all():
        raise DataError(f"{path.name}: a mask holds classes; this file has fractions")
    return values


def _opened(path: Path) -> Image.Image:
    """The whole image in memory; its file is closed."""
    try:
        with Image.open(path) as image:
            if (num_pages := getattr(image, "n_frames", 1)) > 1:
                raise DataError(f"{path.name}: {num_pages} pages; save each as a file of its own")
            image.load()
            return image.copy()
    except FileNotFoundError:
        raise DataError(f"{path.name}: there is no such file in {path.parent}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path.name}: not a readable image ({error})") from None
