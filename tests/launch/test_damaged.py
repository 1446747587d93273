"""Damaged TIFFs and arrays are pictures of the right shape, or refused on one line; never a hang."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.data.reading import open_bytes, read_pixels
from tests.launch.test_pictures import chosen, npy, refused, saved, scene
from vim_backbone.images import reason
from vim_backbone.preprocessing import RGB

MORE = int(os.environ.get("FUZZ", "0"))
"""Examples of each fuzzer, in place of a number for CI."""
SHAPE = (40, 56)
FILES = [
    saved(scene(3, np.uint16, SHAPE)),
    saved(scene(3, np.uint16, SHAPE), tile=(16, 16), compression="zlib", predictor=True),
    saved(scene(3, np.uint16, SHAPE), planarconfig="separate", tile=(16, 16), bigtiff=True),
    saved(np.moveaxis(scene(3, np.uint8, SHAPE), 0, -1), photometric="rgb", tile=(16, 16), compression="jpeg"),
    saved(scene(1, np.uint16, SHAPE)[0] * 10, rowsperstrip=8, compression="lzw"),
    npy(scene(3, np.uint16, SHAPE)),
]


@given(
    st.sampled_from(FILES), st.lists(st.tuples(st.integers(0, 9999), st.integers(0, 255)), max_size=8), st.floats(0, 1)
)
@settings(max_examples=MORE or 150)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_pictures_or_refused_on_one_line(content, changes, kept):
    damaged = bytearray(content)
    for place, value in changes:
        damaged[place % min(len(damaged), 600)] = value
    damaged = bytes(damaged[: len(damaged) - int((1 - kept) * len(damaged)) if kept < 0.5 else None])
    for preprocessing, bands in ((RGB, 3), (chosen(0), 1)):
        try:
            with open_bytes(damaged) as picture:
                view = read_pixels(picture, preprocessing, 1, (1, 2, 9, 12), (20, 16))
        except Exception as error:  # as the readers take it
            line = reason(error)
            assert line
            assert len(line.splitlines()) == 1
        else:
            assert view.shape == (bands, 20, 16)


def test_dicom_is_named():
    assert "it is DICOM without pixels" in refused(b"\0" * 128 + b"DICM")
