"""From the bytes of a picture that a stranger may have made to its pixels, and on to the form that a model takes.

The file is walked through here, without being decoded; a decoder sees only what makes up the pixels, within the limits.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from foldwise.data.readers import ImageSpec, decode
from foldwise.errors import Fault, FoldwiseError

# Scans of one JPEG; encoders write 10 or so, and each costs a pass over all pixels.
_SCANS = 100
# Bytes that some writers leave after the end of a picture.
_PADDING = b"\0\t\n\r "
_PADDED = re.compile(rb"[\0\t\n\r ]*+")
# A longer side over a shorter one: scaled to fill a square, a line of pixels becomes a bomb.
_THIN = 100
_READ = "JPEG, PNG, WebP, BMP or GIF"
_CONVERT = f"save it as {_READ}"
_ANEW = "save it anew, in a program that opens it"

# What other files begin with, and what they are called.
_OTHERS = (
    (b"%PDF", "a PDF"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"8BPS", "a Photoshop file"),
    (b"\0\0\x01\0", "an icon"),
    (b"\xff\x0a", "a JPEG XL picture"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL picture"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 picture"),
    (b"\x1a\x45\xdf\xa3", "a video"),
)
_BRANDS = {b"avif": "an AVIF picture", b"heic": "a HEIC picture", b"heix": "a HEIC picture", b"mif1": "a HEIC picture"}

# Without a repeat of \xff: over a long run of fill bytes that would take the square of their number, holding the GIL.
_JPEG_MARKER = re.compile(rb"\xff([^\x00\xff])", re.DOTALL)
_JPEG_AFTER_SCAN = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])", re.DOTALL)
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# JFIF and Adobe say how colours are coded; the other application segments say nothing of the pixels.
_JPEG_DROPPED = (frozenset(range(0xE1, 0xF0)) - {0xEE}) | {0xFE}
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})


@dataclass(frozen=True)
class Limits:
    """What one picture may take.

    Attributes:
        bytes: Of the file.
        pixels: Width times height.
    """

    bytes: int = 10 * 2**20
    pixels: int = 25_000_000


class PictureError(FoldwiseError):
    """A picture that is not taken, with its place and its mend.

    Attributes:
        status: Of an HTTP answer. 413: too many bytes or pixels; 415: no picture of a kind that is read; 422: damaged,
            cut short, animated, or followed by something else.
        fault: Where, what and the mend.
    """

    def __init__(self, status: int, fault: Fault) -> None:
        self.status = status
        self.fault = fault
        super().__init__(str(fault))

    def __reduce__(self) -> tuple[type[Self], tuple[int, Fault]]:
        """Pickle by its parts, since an exception's own way would pass the whole message."""
        return type(self), (self.status, self.fault)


def read_picture(raw: bytes, *, where: str, limits: Limits = Limits()) -> NDArray[np.uint8]:
    """Read a picture as a viewer shows it.

    JPEG, PNG, WebP, BMP and GIF. The EXIF orientation is applied, what is transparent lies on white, 16 bits a channel
    lose the lower 8, CMYK and palettes become RGB, colour profiles are not applied. Comments, profiles, thumbnails and
    previews never reach a decoder. Several pictures in one JPEG (as phones write for depth or brightness) are well: the
    first one counts.

    Args:
        raw: The file's bytes.
        where: How messages name the file.
        limits: Checked by what the file's header says before anything is decoded.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        PictureError: If it is too large, no such picture, animated, damaged, cut short, or followed by other data.
    """
    if len(raw) > limits.bytes:
        what = f"has {len(raw):,} bytes, but {limits.bytes:,} are allowed"
        raise PictureError(413, Fault(where, what, "make it smaller, or save it as JPEG"))
    parse = next((parse for begins, parse in _PARSERS if begins.match(raw)), None)
    if parse is None:
        what = f"is {_named(raw)}, but no picture that is read here"
        raise PictureError(415, Fault(where, what, f"give a {_READ}" if not raw else _CONVERT))
    try:
        found = parse(raw)
    except _DamagedError as error:
        raise PictureError(422, Fault(where, str(error), error.fix)) from None
    except (IndexError, struct.error):
        raise PictureError(422, Fault(where, "is cut short", "fetch it again")) from None
    if found.width * found.height > limits.pixels:
        what = f"has {found.width:,} x {found.height:,} pixels, but {limits.pixels:,} in all are allowed"
        raise PictureError(413, Fault(where, what, "scale it down"))
    if max(found.width, found.height) > _THIN * max(1, min(found.width, found.height)):
        what = f"has {found.width:,} x {found.height:,} pixels, which is too thin to be scaled"
        raise PictureError(422, Fault(where, what, "cut out what matters"))
    if rest := len(raw[found.end :].lstrip(_PADDING)):
        what = f"goes on for {rest:,} bytes after the end of the picture"
        raise PictureError(422, Fault(where, what, _ANEW))
    try:
        pixels = _decoded(found)
    # Decoders fail in many ways on what was made to break them: OSError, SyntaxError, struct.error, KeyError, ...
    except Exception as error:
        words = str(error).lower()
        what = "is cut short" if "truncated" in words else f"cannot be decoded ({error})"
        raise PictureError(422, Fault(where, what, "fetch it again; it is damaged")) from None
    return np.ascontiguousarray(_TURNS[_orientation(found.exif)](pixels))


def to_form(picture: NDArray[np.uint8], form: ImageSpec) -> NDArray[np.uint8]:
    """Bring a picture to the form that a competition's images have.

    Conversion and resizing are those of `data.readers.decode`, so that a training image's own file gives its training
    pixels to the bit, as long as it has no EXIF orientation and nothing transparent: those `decode` does not heed.
    Where the form's `fit` is `exact`, another size is scaled to fill it, and the middle kept (`crop`): borders are
    something that no model of such a competition has ever seen.

    Args:
        picture: (H, W) or (H, W, 1) gray or (H, W, 3) RGB, uint8.
        form: Of the competition.

    Returns:
        (form.height, form.width, form.channels) uint8.

    Raises:
        FoldwiseError: If it is no such array.
    """
    if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or picture.shape[2:] not in ((), (1,), (3,)):
        raise FoldwiseError(
            f"a picture must be (H, W), (H, W, 1) or (H, W, 3) of uint8, but got {picture.shape} of {picture.dtype}\n"
            "  fix: RGB or gray, 0 to 255"
        )
    if 0 in picture.shape:
        raise FoldwiseError(f"a picture must have pixels, but got {picture.shape}\n  fix: leave it out")
    if picture.shape[2:] == (1,):
        picture = picture[:, :, 0]
    wanted = form.model_copy(update={"convert": True, "fit": "crop" if form.fit == "exact" else form.fit})
    height, width = picture.shape[:2]
    # A header and the pixels as they are: the cheapest way to hand pixels to the one decoder.
    head = f"P{5 if picture.ndim == 2 else 6} {width} {height} 255\n".encode()
    return decode(head + np.ascontiguousarray(picture).tobytes(), wanted, "picture")


@dataclass(frozen=True)
class _Found:
    """What a walk through a file found.

    Attributes:
        kind: As Pillow calls the format.
        width: px, before it is turned.
        height: px.
        body: The file without what has nothing to do with its pixels.
        end: Where the picture ends in the file.
        exif: The EXIF block, empty where there is none.
    """

    kind: str
    width: int
    height: int
    body: bytes
    end: int
    exif: bytes = b""


class _DamagedError(Exception):
    def __init__(self, what: str, fix: str = "fetch it again; it is damaged") -> None:
        self.fix = fix
        super().__init__(what)


def _animated(frames: str = "") -> _DamagedError:
    return _DamagedError(f"is animated{frames}", "give one of its frames")


def _jpeg(raw: bytes) -> _Found:
    body, frame, exif, several, end = _jpeg_segments(raw, 0)
    while several and raw.startswith(b"\xff\xd8\xff", start := _past_padding(raw, end)):
        end = _jpeg_segments(raw, start)[-1]
    height, width = frame
    return _Found("JPEG", width, height, body, end, exif)


def _past_padding(raw: bytes, at: int) -> int:
    found = _PADDED.match(raw, at)
    return at if found is None else found.end()


def _jpeg_segments(raw: bytes, start: int) -> tuple[bytes, tuple[int, int], bytes, bool, int]:
    """The JPEG at `start`: what makes up its pixels, height and width, EXIF, whether it names others, and its end."""
    kept, frame, exif, several, scans, at = [raw[start : start + 2]], None, b"", False, 0, start + 2
    after = _JPEG_MARKER
    while True:
        found = after.search(raw, at)
        if found is None:
            raise _DamagedError("is cut short", "fetch it again")
        if after is _JPEG_AFTER_SCAN:
            kept.append(raw[at : found.start()])
        marker, at = found[1][0], found.end()
        after = _JPEG_MARKER
        if marker == 0xD9:
            break
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            continue
        (length,) = struct.unpack_from(">H", raw, at)
        segment = raw[at : at + length]
        if length < 2 or len(segment) < length:
            raise _DamagedError("is cut short", "fetch it again")
        at += length
        if marker in _JPEG_FRAMES:
            if frame is not None:
                raise _DamagedError("holds two frames")
            frame = struct.unpack_from(">HH", segment, 3)
        elif marker == 0xE1 and segment[2:8] == b"Exif\0\0":
            exif = exif or segment[8:]
        several = several or (marker == 0xE2 and segment[2:6] == b"MPF\0")
        if marker not in _JPEG_DROPPED:
            kept.append(bytes([0xFF, marker]) + segment)
        if marker == 0xDA:
            scans += 1
            if scans > _SCANS:
                raise _DamagedError(f"has more than {_SCANS} scans", _ANEW)
            after = _JPEG_AFTER_SCAN
    if frame is None or not scans:
        raise _DamagedError("holds no picture")
    if 0 in frame:
        raise _DamagedError("does not say how large it is")
    return b"".join([*kept, b"\xff\xd9"]), frame, exif, several, at


def _png(raw: bytes) -> _Found:
    kept, exif, at = [_PNG], b"", len(_PNG)
    size: tuple[int, int] | None = None
    while True:
        length, kind = struct.unpack_from(">I4s", raw, at)
        chunk = raw[at : at + 12 + length]
        if len(chunk) < 12 + length:
            raise _DamagedError("is cut short", "fetch it again")
        at += len(chunk)
        if size is None:
            if kind != b"IHDR":
                raise _DamagedError(f"begins with {kind!r}, where IHDR must be")
            size = struct.unpack_from(">II", chunk, 8)
        if kind == b"acTL" and length >= 4 and (frames := struct.unpack_from(">I", chunk, 8)[0]) > 1:
            raise _animated(f" ({frames:,} frames)")
        if kind == b"eXIf":
            exif = chunk[8:-4]
        if kind in _PNG_KEPT:
            if zlib.crc32(chunk[4:-4]) != struct.unpack(">I", chunk[-4:])[0]:
                raise _DamagedError(f"is damaged: the checksum of a chunk {kind.decode()} is wrong", "fetch it again")
            kept.append(chunk)
        if kind == b"IEND":
            return _Found("PNG", *size, b"".join(kept), at, exif)


def _webp(raw: bytes) -> _Found:
    (length,) = struct.unpack_from("<I", raw, 4)
    end = 8 + length + length % 2
    # Some writers leave out the last byte, which only pads.
    if 8 + length > len(raw):
        raise _DamagedError("is cut short", "fetch it again")
    sizes, exif = [], b""
    for kind, chunk in _webp_chunks(raw[12 : 8 + length]):
        if kind in (b"ANIM", b"ANMF") or (kind == b"VP8X" and chunk[0] & 2):
            raise _animated()
        if kind == b"VP8X":
            low_width, high_width, low_height, high_height = struct.unpack_from("<HBHB", chunk, 4)
            sizes.append((1 + low_width + (high_width << 16), 1 + low_height + (high_height << 16)))
        elif kind == b"VP8 ":
            width, height = struct.unpack_from("<HH", chunk, 6)
            sizes.append((width & 0x3FFF, height & 0x3FFF))
        elif kind == b"VP8L":
            (bits,) = struct.unpack_from("<I", chunk, 1)
            sizes.append((1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)))
        elif kind == b"EXIF":
            exif = chunk.removeprefix(b"Exif\0\0")
    # An extended file says its size twice.
    if not sizes or len(set(sizes)) > 1:
        raise _DamagedError("does not say how large it is" if not sizes else f"says two sizes, {sizes[0]}, {sizes[1]}")
    return _Found("WEBP", *sizes[0], raw[:end], end, exif)


def _webp_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at < len(content):
        kind, length = struct.unpack_from("<4sI", content, at)
        chunk = content[at + 8 : at + 8 + length]
        if len(chunk) < length:
            raise _DamagedError("is cut short", "fetch it again")
        yield kind, chunk
        at += 8 + length + length % 2


def _bmp(raw: bytes) -> _Found:
    offset, header = struct.unpack_from("<II", raw, 10)
    compression = 0
    if header == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", raw, 18)
    else:
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", raw, 18)
    height = abs(height)
    if width <= 0 or height == 0:
        raise _DamagedError("does not say how large it is")
    if compression not in (0, 3, 6):
        raise _DamagedError(f"is a BMP with the compression {compression}, which is not read", _CONVERT)
    end = offset + (width * bits + 31) // 32 * 4 * height
    if end > len(raw):
        raise _DamagedError("is cut short", "fetch it again")
    return _Found("BMP", width, height, raw[:end], end)


def _gif(raw: bytes) -> _Found:
    width, height, flags = struct.unpack_from("<HHB", raw, 6)
    at, frames = 13 + _gif_palette(flags), 0
    while raw[at] != 0x3B:
        if raw[at] == 0x2C:
            left, top, across, down, flags = struct.unpack_from("<HHHHB", raw, at + 1)
            width, height, frames = max(width, left + across), max(height, top + down), frames + 1
            at += 11 + _gif_palette(flags)
        elif raw[at] == 0x21:
            at += 2
        else:
            raise _DamagedError(f"is damaged at byte {at:,}", "fetch it again")
        while raw[at]:
            at += 1 + raw[at]
        at += 1
    if frames > 1:
        raise _animated(f" ({frames:,} frames)")
    if not frames or 0 in (width, height):
        raise _DamagedError("holds no picture")
    return _Found("GIF", width, height, raw[: at + 1], at + 1)


def _gif_palette(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


_PARSERS: tuple[tuple[re.Pattern[bytes], Callable[[bytes], _Found]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), _jpeg),
    (re.compile(re.escape(_PNG)), _png),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), _webp),
    (re.compile(rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL), _bmp),
    (re.compile(rb"GIF8[79]a"), _gif),
)


def _named(raw: bytes) -> str:
    """What a file is that is no picture."""
    if not raw:
        return "empty"
    for begins, name in _OTHERS:
        if raw.startswith(begins):
            return name
    if raw[4:8] == b"ftyp":
        return _BRANDS.get(raw[8:12], "a video")
    head = raw[:4096].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith((b"<svg", b"<?xml")) and b"<svg" in head:
        return "an SVG"
    if head.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    try:
        raw[:4096].decode("ascii")
    except UnicodeDecodeError:
        return f"{len(raw):,} bytes that begin with {raw[:8]!r}"
    return f"text that begins with {raw[:20].decode('ascii')!r}"


def _decoded(found: _Found) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 as stored, not turned."""
    with Image.open(io.BytesIO(found.body), formats=(found.kind,)) as image:
        # The limits were held against what the walk found; a decoder that reads another size is not asked for it.
        if image.size != (found.width, found.height):
            raise ValueError(f"two sizes: {image.size} and {(found.width, found.height)}")
        image.load()
        if image.mode.startswith("I;16"):
            deep = np.asarray(image).astype(np.uint16)
            return np.repeat((deep >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
        if image.has_transparency_data:
            pixels = np.asarray(image.convert("RGBA"))
            laid = np.empty((*pixels.shape[:2], 3), np.uint8)
            # In bands: 16 bits for all of a large picture would take half a gigabyte.
            rows = max(1, 2**20 // pixels.shape[1])
            for top in range(0, len(pixels), rows):
                band = pixels[top : top + rows].astype(np.uint16)
                alpha = band[:, :, 3:]
                laid[top : top + rows] = (band[:, :, :3] * alpha + 255 * (255 - alpha) + 127) // 255
            return laid
        return np.asarray(image.convert("RGB"))


def _orientation(exif: bytes) -> int:
    """The EXIF tag 0x0112, 1 to 8; 1 where there is none, or what is there cannot be read."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (at,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, at)
        for entry in range(min(count, 512)):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", exif, at + 2 + 12 * entry)
            if (tag, kind) == (0x0112, 3):
                return value if value in _TURNS else 1
    except struct.error:
        pass
    return 1


def _transverse(pixels: NDArray[Any]) -> NDArray[Any]:
    return pixels[::-1, ::-1].swapaxes(0, 1)


_TURNS: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],
    7: _transverse,
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
}
