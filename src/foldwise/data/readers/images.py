"""From an image file's bytes to pixels of the competition's form, and from pixels back to a file.

Nothing is trusted: whatever does not decode whole, or is of another form, is a located fault.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from pydantic import Field

from foldwise.errors import DataError, Fault
from foldwise.spec.model import Section

# Part of the cache's key: raise it when `decode` gives other pixels for the same bytes.
DECODER_VERSION = 1

# Formats that Pillow decodes by itself; others (EPS) start programs.
SUFFIX_OF = {
    "BMP": ".bmp",
    "GIF": ".gif",
    "JPEG": ".jpg",
    "PNG": ".png",
    "PPM": ".ppm",
    "TIFF": ".tif",
    "WEBP": ".webp",
}
FORMATS = tuple(SUFFIX_OF)
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

# Modes of 8 bits a channel; Pillow cuts off what 16 bits hold beyond them.
CONVERTIBLE = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})


class ImageSpec(Section):
    """What every image is brought to when it is decoded."""

    height: int = Field(ge=1, le=4096, description="px")
    width: int = Field(ge=1, le=4096, description="px")
    channels: Literal[1, 3] = Field(description="1: gray, 3: RGB.")
    fit: Literal["exact", "letterbox", "crop", "squash"] = Field(
        "exact",
        description="exact: another size is a fault; letterbox: scaled to fit, black borders; crop: scaled to fill, "
        "centre kept; squash: scaled to both sides, shape lost.",
    )
    convert: bool = Field(
        False,
        description="true: colour becomes gray, or gray colour, as `channels` says; false: RGB for gray is a fault.",
    )


def header_of(raw: bytes) -> tuple[int, int, str] | None:
    """Height and width, px, and Pillow's mode of an image, from its header alone; None where it is no image."""
    try:
        with _strict(), Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            return image.height, image.width, image.mode
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None


def suffix_of(raw: bytes) -> str:
    """The suffix that a file of these bytes has by custom, e.g. `.jpg`; that of PNG where they are no image."""
    try:
        with _strict(), Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            return SUFFIX_OF[image.format or "PNG"]
    except (OSError, ValueError, SyntaxError, KeyError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return ".png"


def png_of(pixels: npt.NDArray[np.uint8]) -> bytes:
    """(H, W) gray pixels as a PNG, which loses nothing."""
    buffer = io.BytesIO()
    # Such images are small and barely shrink further; the first level is several times quicker than the default.
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def decode(raw: bytes, spec: ImageSpec, where: str) -> npt.NDArray[np.uint8]:
    """Decode one image.

    Args:
        raw: The file's bytes.
        spec: Size, channels and fit.
        where: How messages name the file.

    Returns:
        (H, W, C) uint8, 0-255.

    Raises:
        DataError: If it is no image, is cut short, or is not of the size or the channels expected.
    """
    try:
        with _strict(), Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            if spec.fit == "exact" and image.size != (spec.width, spec.height):
                what = (
                    f"is {image.height}x{image.width} px (height x width), but {spec.height}x{spec.width} is expected"
                )
                fix = "replace it, or set `image.fit` in competition.yaml to letterbox, crop or squash"
                raise DataError([Fault(where, what, fix)])
            image.load()
            _check_channels(image, spec, where)
            # A JPEG without an end marker decodes, with what is missing in gray.
            if image.format == "JPEG" and raw.rfind(b"\xff\xd9") < raw.rfind(b"\xff\xda"):
                raise OSError("image file is truncated")
            pixels = np.asarray(_fitted(image.convert("L" if spec.channels == 1 else "RGB"), spec))
    except UnidentifiedImageError:
        what = f"is no image: {len(raw):,} bytes starting with {raw[:8]!r}" if raw else "is no image: 0 bytes"
        raise DataError([Fault(where, what, "replace or remove the file")]) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError([Fault(where, f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels", "scale it down")]) from None
    except (OSError, ValueError, SyntaxError) as error:
        what = "is truncated" if "truncated" in str(error).lower() else f"cannot be decoded: {error}"
        raise DataError([Fault(where, what, "fetch the hand-out again; it is damaged")]) from None
    return pixels.reshape(spec.height, spec.width, spec.channels)


@contextmanager
def _strict() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _check_channels(image: Image.Image, spec: ImageSpec, where: str) -> None:
    if image.mode == "L" or (spec.channels == 3 and image.mode in ("RGB", "P")):
        return
    if spec.convert:
        if image.mode not in CONVERTIBLE:
            what = f"has the mode {image.mode}, which does not fit 8 bits a channel"
            raise DataError([Fault(where, what, "convert it to gray or RGB of 8 bits")])
        return
    automatic = "`image.convert: true` in competition.yaml does it"
    if spec.channels == 3:
        what = f"has the mode {image.mode}, but RGB is expected"
        raise DataError([Fault(where, what, f"convert it to RGB; {automatic}")])
    bands = np.asarray(image.convert("RGB"))
    if image.mode == "RGB" and (bands == bands[..., :1]).all():
        fix = f"convert it to gray, which loses nothing as its three channels are equal; {automatic}"
    else:
        fix = f"convert it to gray ({automatic}), or set `image.channels` to 3"
    raise DataError([Fault(where, f"has the mode {image.mode}, but gray (L) is expected", fix)])


def _fitted(image: Image.Image, spec: ImageSpec) -> Image.Image:
    if image.size == (spec.width, spec.height):
        return image
    if spec.fit == "squash":
        return image.resize((spec.width, spec.height), Image.Resampling.BICUBIC)
    ratios = spec.width / image.width, spec.height / image.height
    scale = min(ratios) if spec.fit == "letterbox" else max(ratios)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    scaled = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - spec.width) // 2, (size[1] - spec.height) // 2
    # A crop box beyond the image is filled with black.
    return scaled.crop((left, top, left + spec.width, top + spec.height))
