"""Maps of segmentation: read by their values, whatever these are and however a file holds them; doubts are said."""

import os
import struct
import tempfile
import zlib
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.segmentation.config import SegmentationData
from finetune.segmentation.data import class_names, open_pairs
from vim_backbone import UserError
from vim_backbone.images import reason

MORE = int(os.environ.get("FUZZ", "0"))
"""Examples of each fuzzer, in place of a number for CI."""


def masks(folder, values, kind="png", mode=None, **options):
    """A picture and a map of these values, (h, w), for each split; returns the map of training."""
    picture = Image.fromarray(values)
    for split in ("validation", "training"):
        for place in ("images", "annotations"):
            (folder / place / split).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", picture.size).save(folder / "images" / split / "0.png")
        path = folder / "annotations" / split / f"0.{kind}"
        (picture.convert(mode) if mode else picture).save(path, **options)
    return path


def read_maps(folder, split="training", **options):
    data = SegmentationData(source=str(folder), **options)
    pairs, notes = open_pairs(data, split, class_names(data))
    return pairs.labels(0).tolist(), notes


def test_masks_of_0_and_255(tmp_path):
    masks(tmp_path, np.array([[0, 255], [255, 255]], np.uint8))
    with pytest.raises(
        UserError, match=r"values 0 and 255 alone, and 255 counts for nothing: set data.values \[0, 255\]"
    ):
        read_maps(tmp_path, num_classes=2, zero_is_ignored=False)
    with pytest.raises(UserError, match=r"no pixel of the maps in .* counts, all have the values \[0, 255\]"):
        read_maps(tmp_path, num_classes=2)
    assert read_maps(tmp_path, values=[0, 255]) == ([[0, 1], [1, 1]], [])
    assert read_maps(tmp_path, values=[255, 0])[0] == [[1, 0], [0, 0]]
    masks(tmp_path, np.array([[0, 255], [128, 255]], np.uint8))
    with pytest.raises(UserError, match=r"has label 128: it must be \[0, 255\], or ignored; see .* data.values"):
        read_maps(tmp_path, values=[0, 255])


def test_maps_in_arrays(tmp_path):
    values = np.array([[1, 2, 0], [2, 2, 1]], np.int64)
    masks(tmp_path, values.astype(np.uint8))
    for split in ("validation", "training"):
        (tmp_path / "annotations" / split / "0.png").unlink()
        np.save(tmp_path / "annotations" / split / "0.npy", values)
    assert read_maps(tmp_path, num_classes=2)[0] == [[0, 1, 255], [1, 1, 0]]
    np.save(tmp_path / "annotations/training/0.npy", values / 2)
    with pytest.raises(UserError, match=r"0\.npy has label 0\.5"):
        read_maps(tmp_path, num_classes=2)
    np.save(tmp_path / "annotations/training/0.npy", np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(UserError, match="has 2 channels: a map has one"):
        read_maps(tmp_path, num_classes=2)


@given(st.data())
@settings(max_examples=MORE or 40)
def test_maps_of_any_values(data):
    values = data.draw(st.lists(st.integers(0, 65535), min_size=2, max_size=9, unique=True))
    pixels = data.draw(st.lists(st.sampled_from(values), min_size=4, max_size=4))
    with tempfile.TemporaryDirectory() as folder:
        masks(Path(folder), np.array(pixels, np.uint16).reshape(2, 2))
        labels, notes = read_maps(Path(folder), values=values)
    assert [values[label] for label in chain.from_iterable(labels)] == pixels
    absent = ", ".join(f"class {k}" for k, value in enumerate(values) if value not in pixels)
    assert notes == ([f"in 1 maps of training no pixel is of {absent}"] if absent else [])


@pytest.mark.parametrize("kind", ["png", "tiff"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_maps_of_few_bits_are_read_by_their_values(tmp_path, bits, kind):
    values = np.arange(16, dtype=np.uint8).reshape(2, 8) % min(2**bits, 16)
    path = masks(tmp_path, values)
    if kind == "tiff":
        path.unlink()
    path.with_suffix(f".{kind}").write_bytes((grey_png if kind == "png" else grey_tiff)(values, bits))
    assert read_maps(tmp_path, num_classes=2 ** min(bits, 4), zero_is_ignored=False) == (values.tolist(), [])


@given(st.sampled_from(["png", "tiff"]), st.lists(st.tuples(st.integers(0, 999), st.integers(0, 255)), max_size=6))
@settings(max_examples=MORE or 60)
@pytest.mark.filterwarnings("ignore")  # Pillow's on damaged metadata
def test_damaged_maps_are_read_or_refused_on_one_line(kind, changes):
    values = np.arange(16, dtype=np.uint8).reshape(2, 8)
    content = bytearray((grey_png if kind == "png" else grey_tiff)(values, 4))
    for place, value in changes:
        content[place % len(content)] = value
    labels, lines = None, [""]
    with tempfile.TemporaryDirectory() as folder:
        path = masks(Path(folder), values)
        path.unlink()
        path.with_suffix(f".{kind}").write_bytes(content)
        try:
            labels, _ = read_maps(Path(folder), num_classes=16, zero_is_ignored=False, max_megapixels=0.1)
        except UserError as error:
            lines = str(error).splitlines()
        except Exception as error:  # one bad picture of a run
            lines = [reason(error)]
    assert len(lines) == 1
    assert labels == values.tolist() or changes


def test_palettes_are_read_by_their_indices(tmp_path):
    values = np.arange(16, dtype=np.uint8).reshape(2, 8) % 4
    palette = Image.fromarray(values, "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    palette.save(masks(tmp_path, values), bits=2)
    assert read_maps(tmp_path, num_classes=4, zero_is_ignored=False) == (values.tolist(), [])


def packed(values, bits):
    """Rows of bytes, levels of so many bits from the left."""
    text = ["".join(f"{level:0{bits}b}" for level in row) for row in values.tolist()]
    return [bytes(int(row[i : i + 8], 2) for i in range(0, len(row), 8)) for row in text]


def grey_png(values, bits):
    """PNG, third edition, 7.2."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in packed(values, bits)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def grey_tiff(values, bits):
    """TIFF 6.0, sections 2 and 4: black is zero, not compressed, one strip."""
    pixels = b"".join(packed(values, bits))
    tags = {256: values.shape[1], 257: values.shape[0], 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: values.shape[0],
            279: len(pixels)}  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, tags[tag]) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + entries + b"\0" * 4


def test_what_maps_hold_is_said(tmp_path):
    masks(tmp_path, np.array([[0, 1, 255, 255], [2, 2, 255, 1]], np.uint8))
    _, notes = read_maps(tmp_path, num_classes=5, zero_is_ignored=False)
    assert notes == ["in 1 maps of training 37.5% of the pixels count for nothing; no pixel is of class 3, class 4"]
    _, notes = read_maps(tmp_path, "validation", num_classes=3)
    assert notes == ["in 1 maps of validation 50.0% of the pixels count for nothing; no pixel is of class 2"]
    _, notes = read_maps(tmp_path, num_classes=30, zero_is_ignored=False)
    assert notes[0].endswith("class 12 and 17 more")


@pytest.mark.parametrize("value", [-1.0, 1.5, float("nan"), float("inf"), 7e4])
def test_what_is_no_label(tmp_path, value):
    masks(tmp_path, np.array([[0, value], [1, 1]], np.float32), "tiff")
    with pytest.raises(UserError, match=rf"0\.tiff has label {value}: it must be 0 \.\. 1, or ignored"):
        read_maps(tmp_path, num_classes=2, zero_is_ignored=False)


def test_names_of_classes_from_an_editor_that_writes_a_byte_order_mark(tmp_path):
    masks(tmp_path, np.array([[0, 1]], np.uint8))
    (tmp_path / "classes.txt").write_bytes("\ufeffroad\r\ncafé\r\n".encode())
    assert class_names(SegmentationData(source=str(tmp_path))) == ["road", "café"]
    with pytest.raises(UserError, match=r"data.values is \[0, 1, 2\], but .*classes.txt names 2 classes"):
        class_names(SegmentationData(source=str(tmp_path), values=[0, 1, 2]))
    (tmp_path / "classes.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=r"cannot read .*classes.txt"):
        class_names(SegmentationData(source=str(tmp_path)))


@pytest.mark.parametrize("values", [[], [3], [1, 1], [-1, 2], [0, 65536]])
def test_values_that_will_not_do(values):
    with pytest.raises(UserError, match=r"data.values is \[.*: give 2 to 254 different numbers"):
        SegmentationData(source="x", values=values)
