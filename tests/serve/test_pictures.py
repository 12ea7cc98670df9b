"""Pictures as a stranger may send them: read as a viewer shows them, or refused with a reason; never anything else."""

from __future__ import annotations

import io
import pickle
import struct
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from foldwise.data.competition import load_dataset
from foldwise.data.readers import ImageSpec, decode
from foldwise.errors import Fault, FoldwiseError
from foldwise.serve.pictures import Limits, PictureError, read_picture, to_form

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
RNG = np.random.default_rng(0)
# Smooth, so that what loses detail stays close.
GRADIENT = np.stack(
    [np.add.outer(np.arange(40) * 3, np.arange(60) * 2), np.tile(np.arange(60) * 4, (40, 1)), np.full((40, 60), 90)], 2
).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read(raw: bytes, **limits: int) -> NDArray[np.uint8]:
    return read_picture(raw, where="face.jpg", limits=Limits(**limits))


def refused(raw: bytes, status: int, **limits: int) -> str:
    with pytest.raises(PictureError) as caught:
        read(raw, **limits)
    assert caught.value.status == status, str(caught.value)
    assert str(caught.value).startswith("face.jpg: ")
    assert "\n  fix: " in str(caught.value)
    return str(caught.value).splitlines()[0].removeprefix("face.jpg: ")


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_a_long_run_of_fill_bytes_is_walked_in_one_go() -> None:
    # Quadratic, it would take a day.
    refused(b"\xff\xd8" + b"\xff" * 4_000_000 + b"\x00", 422)
    whole = saved(Image.fromarray(GRADIENT), "JPEG")
    filled = whole[:2] + b"\xff" * 9 + whole[2:]
    np.testing.assert_array_equal(read(filled), read(whole))


def test_many_pictures_behind_one_another_are_walked_in_one_go() -> None:
    first = saved(Image.fromarray(GRADIENT), "JPEG")
    named = first[:2] + b"\xff\xe2\x00\x06MPF\x00" + first[2:]
    tiny = b"\xff\xd8\xff\xc0\x00\x0b\x08\x00\x01\x00\x01\x01\x01\x11\x00\xff\xda\x00\x02\xff\xd9"
    with suppress(PictureError):
        read(named + tiny * 100_000)


@pytest.mark.parametrize("size", [(100_000, 1), (1, 100_000)])
def test_a_line_of_pixels_is_refused_which_would_be_scaled_to_a_bomb(size: tuple[int, int]) -> None:
    says = refused(saved(Image.new("L", size), "PNG"), 422)
    assert says == f"has {size[0]:,} x {size[1]:,} pixels, which is too thin to be scaled"


def bomb(side: int) -> bytes:
    """A PNG of `side` x `side` black pixels that is some kilobytes small."""
    packer = zlib.compressobj(9)
    row = bytes(1 + side // 8 + 1)
    content = b"".join(packer.compress(row) for _ in range(200)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (png_chunk(b"IHDR", header), png_chunk(b"IDAT", content), png_chunk(b"IEND", b""))
    )


@pytest.mark.parametrize("kind", FORMATS)
def test_every_kind_is_read_as_pillow_reads_it(kind: str) -> None:
    raw = saved(Image.fromarray(GRADIENT), kind)
    pixels = read(raw)
    assert (pixels.shape, pixels.dtype) == ((40, 60, 3), np.uint8)
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")))


@pytest.mark.parametrize(
    "options", [{"progressive": True}, {"subsampling": 2, "quality": 30}, {"restart_marker_rows": 1}]
)
def test_jpegs_of_all_sorts(options: dict[str, object]) -> None:
    raw = saved(Image.fromarray(GRADIENT), "JPEG", **options)
    np.testing.assert_array_equal(read(raw), np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")))


@pytest.mark.parametrize("kind", FORMATS)
def test_one_pixel(kind: str) -> None:
    assert read(saved(Image.new("RGB", (1, 1), (255, 255, 255)), kind)).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    image = Image.fromarray(GRADIENT)
    exif = image.getexif()
    exif[0x0112] = orientation
    raw = saved(image, kind, exif=exif.tobytes())
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(raw)))
    np.testing.assert_array_equal(read(raw), np.asarray(expected.convert("RGB")))


def test_an_orientation_that_cannot_be_read_is_none() -> None:
    for exif in (
        b"II*\0\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0\x05\0",
        b"MM",
        b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0",
    ):
        raw = saved(Image.fromarray(GRADIENT), "PNG")
        at = raw.index(b"IDAT") - 4
        assert read(raw[:at] + png_chunk(b"eXIf", exif) + raw[at:]).shape == (40, 60, 3)


def test_sixteen_bits_lose_the_lower_eight() -> None:
    deep = (np.arange(256 * 256, dtype=np.uint32)).reshape(256, 256).astype(np.uint16)
    raw = saved(Image.fromarray(deep), "PNG")
    np.testing.assert_array_equal(read(raw), np.repeat((deep >> 8).astype(np.uint8)[:, :, None], 3, axis=2))


def test_cmyk_becomes_rgb() -> None:
    pixels = read(saved(Image.new("CMYK", (20, 10), (0, 255, 255, 0)), "JPEG", quality=100))
    assert pixels.shape == (10, 20, 3)
    assert np.abs(pixels[5, 5].astype(int) - [255, 0, 0]).max() <= 4


def test_what_is_transparent_lies_on_white() -> None:
    layered = np.dstack([GRADIENT, np.tile(np.linspace(0, 255, 60).astype(np.uint8), (40, 1))])
    pixels = read(saved(Image.fromarray(layered), "PNG"))
    assert (pixels[:, 0] == 255).all()
    np.testing.assert_array_equal(pixels[:, -1], GRADIENT[:, -1])
    white = Image.new("RGBA", (60, 40), (255, 255, 255, 255))
    expected = np.asarray(Image.alpha_composite(white, Image.fromarray(layered)).convert("RGB")).astype(int)
    assert np.abs(pixels - expected).max() <= 1


def test_a_palette_with_transparent_entries() -> None:
    image = Image.new("P", (4, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1, 0, 1])
    for raw in (saved(image, "PNG", transparency=b"\x00\xff"), saved(image, "GIF", transparency=0)):
        assert read(raw).tolist() == [[[255] * 3, [200, 100, 50], [255] * 3, [200, 100, 50]]]


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (b"", "is empty"),
        (b"hello", "is text that begins with 'hello'"),
        (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "is an SVG"),
        (b"  <svg onload='alert(1)'/>", "is an SVG"),
        (b"%PDF-1.7\n%\xe2\xe3", "is a PDF"),
        (b"<!DOCTYPE html><script>", "is an HTML page"),
        (b"PK\x03\x04\x14\0", "is a ZIP archive"),
        (b"II*\0\x08\0\0\0", "is a TIFF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "is a HEIC picture"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "is a video"),
        (b"\xde\xad\xbe\xef" * 4, "is 16 bytes that begin with b'\\xde\\xad\\xbe\\xef"),
    ],
)
def test_what_is_no_picture_is_called_by_its_name(raw: bytes, named: str) -> None:
    assert refused(raw, 415).startswith(named)


def test_a_golden_message() -> None:
    with pytest.raises(PictureError) as caught:
        read_picture(b"%PDF-1.7", where="cv.pdf")
    assert str(caught.value) == (
        "cv.pdf: is a PDF, but no picture that is read here\n  fix: save it as JPEG, PNG, WebP, BMP or GIF"
    )
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.status, again.fault, str(again)) == (415, caught.value.fault, str(caught.value))


def test_limits_are_held_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = bomb(50_000)
    assert len(raw) < 10_000
    huge = [raw, *(with_size(saved(Image.fromarray(GRADIENT), kind), kind) for kind in ("JPEG", "WEBP", "GIF"))]
    monkeypatch.setattr(Image, "open", lambda *_args, **_named: pytest.fail("a decoder was asked"))
    tracemalloc.start()
    try:
        assert refused(raw, 413) == "has 50,000 x 50,000 pixels, but 25,000,000 in all are allowed"
        for other in huge[1:]:
            refused(other, 413)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert refused(b"\xff" * 11, 413, bytes=10) == "has 11 bytes, but 10 are allowed"
    assert refused(saved(Image.fromarray(GRADIENT), "PNG"), 413, pixels=2399).startswith("has 60 x 40 pixels")


def with_size(raw: bytes, kind: str) -> bytes:
    """A picture of 40 x 60 that says it has 16,000 x 16,000 pixels."""
    if kind == "JPEG":
        at = raw.index(b"\xff\xc0") + 5
        return raw[:at] + struct.pack(">HH", 16_000, 16_000) + raw[at + 4 :]
    at = raw.index(b"\x9d\x01\x2a") + 3 if kind == "WEBP" else 6
    return raw[:at] + struct.pack("<HH", 16_000, 16_000) + raw[at + 4 :]


def test_the_size_that_is_told_is_the_size_that_is_decoded() -> None:
    pixels = read(saved(Image.fromarray(GRADIENT), "PNG"), pixels=2400)
    assert pixels.shape[:2] == (40, 60)
    # A canvas that says less than the picture on it holds.
    lossless = saved(Image.fromarray(np.dstack([GRADIENT, GRADIENT[:, :, :1]])), "WEBP")
    at = lossless.index(b"VP8X") + 12
    assert "two sizes" in refused(lossless[:at] + b"\1\0\0\1\0\0" + lossless[at + 6 :], 422)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 1.0])
def test_a_picture_that_is_cut_short(kind: str, share: float) -> None:
    noise = Image.fromarray(RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    raw = saved(noise, kind)
    assert refused(raw[: min(int(len(raw) * share), len(raw) - 2)], 422).startswith("is cut short")


def test_a_damaged_chunk() -> None:
    raw = bytearray(saved(Image.fromarray(GRADIENT), "PNG"))
    raw[raw.index(b"IDAT") + 20] ^= 1
    assert refused(bytes(raw), 422) == "is damaged: the checksum of a chunk IDAT is wrong"


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animations_are_refused(kind: str) -> None:
    frames = [Image.fromarray(np.roll(GRADIENT, shift, 0)) for shift in (0, 5, 9)]
    told = refused(saved(frames[0], kind, save_all=True, append_images=frames[1:]), 422)
    assert told.startswith("is animated")
    assert ("(3 frames)" in told) == (kind != "WEBP")


TRAILERS = {
    "zip": b"PK\x03\x04" + bytes(30),
    "html": b"<html><script>alert(1)</script></html>",
    "js": b"*/=1;alert(1)",
    "php": b"<?php system($_GET[0]); ?>",
    "one more": b"x",
}


@pytest.mark.parametrize("trailer", TRAILERS)
@pytest.mark.parametrize("kind", FORMATS)
def test_what_goes_on_after_the_picture_is_refused(kind: str, trailer: str) -> None:
    raw = saved(Image.fromarray(GRADIENT), kind)
    end = f"goes on for {len(TRAILERS[trailer])} bytes after the end of the picture"
    assert refused(raw + TRAILERS[trailer], 422) == end
    # What some writers pad with is not counted.
    np.testing.assert_array_equal(read(raw + b"\0\0\r\n"), read(raw))


def test_a_gif_that_is_a_script() -> None:
    refused(b"GIF89a/*" + bytes(40) + b"*/=1;alert(document.domain)//;", 422)


def test_phones_write_several_pictures_into_one_jpeg() -> None:
    first, second = (Image.fromarray(np.roll(GRADIENT, shift, 0)) for shift in (0, 7))
    raw = saved(first, "MPO", save_all=True, append_images=[second])
    assert raw.count(b"\xff\xd8\xff") == 2
    np.testing.assert_array_equal(read(raw), read(saved(first, "JPEG")))
    assert refused(raw + TRAILERS["zip"], 422).startswith("goes on for 34 bytes")
    # Without the segment that names the second picture it is something else that follows.
    single = saved(first, "JPEG")
    refused(single + saved(second, "JPEG"), 422)


def test_what_says_nothing_of_the_pixels_never_reaches_a_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = b"SECRET" * 10
    jpeg = saved(Image.fromarray(GRADIENT), "JPEG", comment=secret, icc_profile=secret)
    png = saved(Image.fromarray(GRADIENT), "PNG", icc_profile=secret)
    at = png.index(b"IDAT") - 4
    png = png[:at] + png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(5_000_000))) + png[at:]
    seen = []
    before = Image.open
    monkeypatch.setattr(Image, "open", lambda file, **named: seen.append(file.getvalue()) or before(file, **named))
    for raw, plain in ((jpeg, SAMPLES["jpeg"]), (png, SAMPLES["png"])):
        np.testing.assert_array_equal(read(raw), np.asarray(before(io.BytesIO(plain)).convert("RGB")))
    assert secret in jpeg
    assert not any(secret in body or b"zTXt" in body for body in seen)


def test_too_many_scans_are_refused() -> None:
    raw = saved(Image.fromarray(GRADIENT), "JPEG", progressive=True)
    start = raw.rindex(b"\xff\xda")
    assert refused(raw[:-2] + raw[start:-2] * 200 + b"\xff\xd9", 422) == "has more than 100 scans"


SAMPLES = {
    "jpeg": saved(Image.fromarray(GRADIENT), "JPEG"),
    "progressive": saved(Image.fromarray(GRADIENT), "JPEG", progressive=True),
    "png": saved(Image.fromarray(GRADIENT), "PNG"),
    "palette": saved(Image.fromarray(GRADIENT).quantize(16), "PNG", transparency=b"\x00\x80"),
    "webp": saved(Image.fromarray(GRADIENT), "WEBP"),
    "lossless": saved(Image.fromarray(np.dstack([GRADIENT, GRADIENT[:, :, :1]])), "WEBP", lossless=True),
    "bmp": saved(Image.fromarray(GRADIENT), "BMP"),
    "gif": saved(Image.fromarray(GRADIENT), "GIF"),
}
HEADS = [
    b"",
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"RIFF\x40\0\0\0WEBP",
    b"BM" + bytes(12) + b"\x28\0\0\0",
    b"GIF89a",
]


def read_or_refused(raw: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with suppress(PictureError):
            pixels = read(raw, pixels=10_000)
            assert (pixels.dtype, pixels.shape[2]) == (np.uint8, 3)
            assert pixels.shape[0] * pixels.shape[1] <= 10_000


@settings(max_examples=100)
@given(head=st.sampled_from(HEADS), rest=st.binary(max_size=200))
@example(head=b"GIF89a", rest=b"")
def test_random_bytes_are_read_or_refused(head: bytes, rest: bytes) -> None:
    read_or_refused(head + rest)


@settings(max_examples=250)
@given(
    name=st.sampled_from(sorted(SAMPLES)),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6),
    early=st.booleans(),
)
def test_damaged_pictures_are_read_or_refused(name: str, flips: list[tuple[int, int]], early: bool) -> None:
    raw = bytearray(SAMPLES[name])
    for place, value in flips:
        # Headers decide most, and are short.
        raw[place % min(len(raw), 60 if early else len(raw))] = value
    if name in ("png", "palette"):
        raw = bytearray(resealed(bytes(raw)))
    read_or_refused(bytes(raw))


def resealed(raw: bytes) -> bytes:
    """A PNG with the checksums that its chunks should have, so that decoders see what was changed."""
    at, parts = 8, [raw[:8]]
    while at + 12 <= len(raw):
        (length,) = struct.unpack_from(">I", raw, at)
        if at + 12 + length > len(raw):
            break
        parts.append(png_chunk(raw[at + 4 : at + 8], raw[at + 8 : at + 8 + length]))
        at += 12 + length
    return b"".join(parts) + raw[at:]


# To a competition's form ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["letterbox", "crop", "squash"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
@pytest.mark.parametrize("size", [(48, 48), (31, 70), (200, 90)])
def test_the_form_is_that_of_training(fit: str, channels: int, mode: str, size: tuple[int, int]) -> None:
    image = Image.fromarray(RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)
    raw = saved(image, "PNG")
    form = ImageSpec(height=48, width=48, channels=channels, fit=fit, convert=True)
    np.testing.assert_array_equal(to_form(read(raw), form), decode(raw, form, "image"))


def test_training_images_give_their_training_pixels(demo_root: Path) -> None:
    data = load_dataset(demo_root, "demo")
    files = sorted((demo_root / "inputs" / "demo" / "images").iterdir())
    row = {data.competition.files.file_of(image): row for row, image in enumerate(data.ids.tolist())}
    for file in files:
        pixels = to_form(read_picture(file.read_bytes(), where=file.name), data.competition.image)
        np.testing.assert_array_equal(pixels, data.images[row[file.name]])


def test_where_another_size_is_a_fault_in_training_the_middle_is_kept() -> None:
    exact = ImageSpec(height=48, width=48, channels=1, fit="exact")
    crop = exact.model_copy(update={"fit": "crop"})
    picture = RNG.integers(0, 256, (90, 200, 3), dtype=np.uint8)
    np.testing.assert_array_equal(to_form(picture, exact), to_form(picture, crop))
    picture[:, 56:-56] = 0  # what is left of it is black, so the rest was cut off
    assert not to_form(picture, exact)[:, 2:-2].any()


@pytest.mark.parametrize(
    "shaped", [lambda gray: gray, lambda gray: gray[:, :, None], lambda gray: gray[:, ::-1][:, ::-1]]
)
def test_gray_arrays_are_taken_in_any_layout(shaped: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> None:
    gray = RNG.integers(0, 256, (48, 48), dtype=np.uint8)
    form = ImageSpec(height=48, width=48, channels=3)
    np.testing.assert_array_equal(to_form(shaped(gray), form), np.repeat(gray[:, :, None], 3, axis=2))


@pytest.mark.parametrize(
    "wrong", [np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4), np.float32), np.zeros((0, 4), np.uint8)]
)
def test_other_arrays_are_refused(wrong: NDArray[np.generic]) -> None:
    with pytest.raises(FoldwiseError, match="a picture must"):
        to_form(wrong, ImageSpec(height=48, width=48, channels=1))


def test_the_fault_says_where() -> None:
    with pytest.raises(PictureError) as caught:
        read_picture(b"", where="empty.png")
    assert caught.value.fault == Fault(
        "empty.png", "is empty, but no picture that is read here", "give a JPEG, PNG, WebP, BMP or GIF"
    )
