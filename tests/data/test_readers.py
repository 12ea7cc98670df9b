"""What was handed out is read with every oddity either borne or named with its place."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from foldwise.data.readers import ColumnsSpec, FilesSpec, HandOutError, ImageSpec, decode, header_of, read_table
from foldwise.data.readers.images import png_of, suffix_of
from foldwise.data.readers.table import open_images
from foldwise.errors import DataError, Fault


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def ramp(height: int, width: int) -> np.ndarray:
    return np.linspace(0, 255, height * width).reshape(height, width).astype(np.uint8)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "content",
    [
        b"id,label\n1,a\n2,b\n",
        b"id,label\r\n1,a\r\n2,b\r\n",
        b"\xef\xbb\xbfid,label\n1,a\n2,b",
        b'"id","label"\n\n1,a\n2,"b"\n\n',
    ],
)
def test_harmless_oddities_are_read_alike(content: bytes, here: Path) -> None:
    Path("train.csv").write_bytes(content)
    faults: list[Fault] = []
    table = read_table(Path("train.csv"), ColumnsSpec(), faults, classes=["a", "b"])
    assert faults == []
    assert table is not None
    assert table.csv() == "id,label\n1,a\n2,b\n"
    assert len(table.notes) == (b"\r\n" in content) + content.startswith(b"\xef\xbb\xbf")


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        (None, ["train.csv: there is no such file"]),
        (b"", [
            "train.csv:1: there is no column 'id'; columns: none",
            "train.csv:1: there is no column 'label'; columns: none",
        ]),
        (b"id,lable\n1,a\n", ["train.csv:1: there is no column 'label'; columns: id, lable (did you mean 'lable'?)"]),
        (b"id,label,id\n1,a,1\n", ["train.csv:1: column 'id' is there twice"]),
        (b"id,label\n", ["train.csv: there is no row below the header"]),
        (b"id,label\n1,a\n2\n", ["train.csv:3: expected 2 cells, but got 1"]),
        (b"id,label\n1,\n ,a\n,\n", [
            "train.csv:2: label is blank",
            "train.csv:3: id is blank",
            "train.csv:4: id and label are blank",
        ]),
        (b"id,label\n1,a\n2,b\n1,b\n", ["train.csv:4: id '1' is there twice, first in line 2"]),
        (b"id,label\n1, a\n2,A\n3,z\n", [
            "train.csv:2: unknown label ' a' (did you mean 'a'?)",
            "train.csv:3: unknown label 'A' (did you mean 'a'?)",
            "train.csv:4: unknown label 'z'",
        ]),
        (b"id,label\n1,a\n2,caf\xe9\n", ["train.csv:3: expected UTF-8 text, but got the byte 0xe9"]),
        (b'id,label\n1,"a\n', ["train.csv:2: not CSV: unexpected end of data"]),
    ],
)  # fmt: skip
def test_table_faults_name_their_row(content: bytes | None, messages: list[str], here: Path) -> None:
    if content is not None:
        Path("train.csv").write_bytes(content)
    faults: list[Fault] = []
    read_table(Path("train.csv"), ColumnsSpec(), faults, classes=["a", "b"])
    assert [f"{fault.where}: {fault.what}" for fault in faults] == messages
    assert all(fault.fix for fault in faults)


def test_a_split_column_takes_known_values_only(here: Path) -> None:
    Path("train.csv").write_text("id,label,Usage\n1,a,Training\n2,a,Trainin\n3,a,\n")
    faults: list[Fault] = []
    read_table(Path("train.csv"), ColumnsSpec(), faults, part="Usage", parts=["Training", "Test"])
    assert [f"{fault.where}: {fault.what}" for fault in faults] == [
        "train.csv:3: unknown Usage 'Trainin' (did you mean 'Training'?)",
        "train.csv:4: Usage is blank",
    ]


def test_unpacked_images_are_found_flat_or_one_folder_down(here: Path) -> None:
    for folder in ("flat", "deep/inner"):
        Path(folder).mkdir(parents=True)
        Path(folder, "1.png").write_bytes(b"x")
        Path(folder, ".hidden.png").write_bytes(b"x")
        Path(folder, "readme.txt").write_bytes(b"x")
    for folder, where in (("flat", "flat/1.png"), ("deep", "deep/inner/1.png")):
        faults: list[Fault] = []
        with open_images(Path(folder), "dataset.zip", faults) as images:
            assert images is not None
            assert list(images.files) == ["1.png"]
            assert images.where("1.png") == where
            assert images.read("1.png", faults) == b"x"
            assert len(images.notes) == 1
        assert faults == []


@pytest.mark.parametrize(("fit", "corner", "middle"), [("letterbox", 0, 100), ("crop", 100, 100), ("squash", 100, 100)])
def test_fits_give_the_wanted_shape(fit: str, corner: int, middle: int) -> None:
    spec = ImageSpec(height=8, width=8, channels=3, fit=fit)  # type: ignore[arg-type]
    pixels = decode(encoded(np.full((10, 20, 3), 100, np.uint8)), spec, "x")
    assert pixels.shape == (8, 8, 3)
    assert pixels[0, 0].tolist() == [corner] * 3
    assert pixels[4, 4].tolist() == [middle] * 3


def test_exact_gray_is_taken_as_it_is_and_gray_serves_as_rgb() -> None:
    pixels = ramp(4, 6)
    assert (decode(encoded(pixels), ImageSpec(height=4, width=6, channels=1), "x")[..., 0] == pixels).all()
    assert (decode(encoded(pixels), ImageSpec(height=4, width=6, channels=3), "x") == pixels[..., None]).all()


GRAY = ImageSpec(height=16, width=16, channels=1)
JPEG = encoded(np.random.default_rng(0).integers(0, 255, (16, 16)).astype(np.uint8), "JPEG")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "x: is no image: 0 bytes\n"),
        (b"<html>hello", "x: is no image: 11 bytes starting with b'<html>he'\n"),
        (JPEG[: len(JPEG) // 2], "x: is truncated\n"),
        (JPEG[:-2], "x: is truncated\n"),
        (encoded(ramp(16, 16))[:-30], "x: is truncated\n"),
        (encoded(ramp(15, 17)), "x: is 15x17 px (height x width), but 16x16 is expected\n"),
        (
            encoded(np.stack([ramp(16, 16)] * 3, axis=-1)),
            "x: has the mode RGB, but gray (L) is expected\n"
            "  fix: convert it to gray, which loses nothing as its three channels are equal; "
            "`image.convert: true` in competition.yaml does it\n",
        ),
        (
            encoded(np.stack([ramp(16, 16), ramp(16, 16), ramp(16, 16).T], axis=-1)),
            "x: has the mode RGB, but gray (L) is expected\n"
            "  fix: convert it to gray (`image.convert: true` in competition.yaml does it), "
            "or set `image.channels` to 3\n",
        ),
    ],
)
def test_bad_images_are_named(raw: bytes, message: str) -> None:
    with pytest.raises(DataError) as caught:
        decode(raw, GRAY, "x")
    assert str(caught.value).startswith(message)


def test_a_decompression_bomb_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (200, 100):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match=f"x: has more than {limit} pixels"):
            decode(encoded(ramp(16, 16)), GRAY, "x")
        assert header_of(encoded(ramp(16, 16))) is None


@pytest.mark.parametrize("cut", range(0, len(JPEG), 7))
def test_any_cut_of_an_image_is_a_fault_and_never_a_crash(cut: int) -> None:
    with pytest.raises(DataError):
        decode(JPEG[:cut], GRAY, "x")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "1", "LA", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_colour_is_converted_where_the_description_says_so_and_sixteen_bits_never(channels: int, mode: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(ramp(16, 16)).convert(mode).save(buffer, "TIFF")
    spec = ImageSpec(height=16, width=16, channels=channels, convert=True)  # type: ignore[arg-type]
    if mode == "I;16":
        with pytest.raises(DataError, match="has the mode I;16, which does not fit 8 bits a channel"):
            decode(buffer.getvalue(), spec, "x")
    else:
        pixels = decode(buffer.getvalue(), spec, "x")
        assert pixels.shape == (16, 16, channels)
        tolerance = 255 if mode == "1" else 6
        assert np.abs(pixels[..., 0].astype(int) - ramp(16, 16)).max() <= tolerance


def test_a_png_of_pixels_gives_them_back() -> None:
    raw = png_of(ramp(16, 16))
    assert (decode(raw, GRAY, "x")[..., 0] == ramp(16, 16)).all()
    assert [suffix_of(raw), suffix_of(JPEG), suffix_of(b"<html>")] == [".png", ".jpg", ".png"]


def test_any_image_suffix_fits_a_star() -> None:
    files = FilesSpec(pattern="img_{id}.*")
    assert [files.id_of(name) for name in ("img_7.jpg", "img_7.a.PNG", "img_7.txt", "img_.jpg", "7.jpg")] == [
        "7", "7.a", None, None, None,
    ]  # fmt: skip


@pytest.mark.parametrize("pattern", ["{id}.jpg", "img_{id}.png", "{id}"])
def test_pattern_goes_both_ways(pattern: str) -> None:
    files = FilesSpec(pattern=pattern)
    assert files.id_of(files.file_of("07")) == "07"
    assert files.id_of(files.file_of("")) is None


@pytest.mark.parametrize("pattern", ["x.jpg", "{id}{id}.jpg", "a/{id}.jpg", "{ID}.jpg", "*{id}.jpg", "{id}_*.jpg"])
def test_a_pattern_holds_one_id(pattern: str) -> None:
    with pytest.raises(ValidationError, match="expected a file name with"):
        FilesSpec(pattern=pattern)


def test_many_faults_of_a_kind_are_listed_to_twenty_and_all_counted() -> None:
    faults = [Fault(f"t.csv:{row}", "label is blank", "fill it in") for row in range(25)]
    error = HandOutError([*faults, Fault("zip", "is damaged", "fetch it again")])
    lines = str(error).splitlines()
    assert lines[:2] == ["t.csv:0: label is blank", "t.csv:1: label is blank"]
    assert lines[19:] == [
        "t.csv:19: label is blank",
        "  ... and 5 more like these",
        "  fix: fill it in",
        "zip: is damaged",
        "  fix: fetch it again",
        "26 errors; nothing was written.",
    ]
    assert len(error.faults) == 26
