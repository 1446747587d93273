"""DICOM: stored values by pydicom, white always high, and what is not read in a line."""

import io
import sys

import numpy as np
import pydicom
import pytest
from pydicom.uid import (
    MPEG4HP41,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    SecondaryCaptureImageStorage,
)

from launch.data.images import BadPictureError
from launch.data.reading import SUFFIXES, open_bytes, open_file, read_pixels
from vim_backbone.images import reason
from vim_backbone.preprocessing import RGB, Preprocessing


def dicom(values, colours="MONOCHROME2", stored=12, syntax=ExplicitVRLittleEndian, **more):
    """A file of values (h, w) or (h, w, 3)."""
    made = pydicom.Dataset()
    made.file_meta = pydicom.dataset.FileMetaDataset()
    made.file_meta.TransferSyntaxUID = syntax
    made.SOPClassUID, made.SOPInstanceUID = SecondaryCaptureImageStorage, "1.2.3"
    made.Rows, made.Columns = values.shape[:2]
    made.SamplesPerPixel = values.shape[2] if values.ndim == 3 else 1
    made.BitsAllocated, made.BitsStored, made.HighBit = values.itemsize * 8, stored, stored - 1
    made.PixelRepresentation, made.PhotometricInterpretation = int(values.dtype.kind == "i"), colours
    if values.ndim == 3:
        made.PlanarConfiguration = 0
    for name, value in more.items():
        setattr(made, name, value)
    compressed = syntax.is_compressed
    made.PixelData = pydicom.encaps.encapsulate([b"\0\0"]) if compressed else values.tobytes()
    made["PixelData"].VR = "OB" if compressed or values.itemsize == 1 else "OW"
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, made, enforce_file_format=True)
    return buffer.getvalue()


GREY = np.arange(20 * 30, dtype=np.uint16).reshape(20, 30)


def one_band(dtype):
    return Preprocessing(mean=(0.5,), std=(0.5,), bands=(0,), dtype=dtype)


@pytest.mark.parametrize(("dtype", "stored"), [("uint16", 12), ("int16", 16), ("uint8", 8)])
def test_stored_values_are_read_and_white_is_high(tmp_path, dtype, stored):
    values = GREY.astype(dtype) - (300 if dtype == "int16" else 0)
    for colours, rescale in (("MONOCHROME2", {}), ("MONOCHROME2", {"RescaleSlope": 2, "RescaleIntercept": -1024}),
                             ("MONOCHROME1", {})):  # fmt: skip
        (tmp_path / "a.dcm").write_bytes(dicom(values, colours, stored, **rescale))
        with open_file(tmp_path / "a.dcm") as picture:
            assert (picture.size, picture.bands, picture.dtype) == ((20, 30), 1, np.dtype(dtype))
            read = read_pixels(picture, one_band(dtype), 1, (5, 2, 25, 12)).numpy()[0]
        part = values[2:12, 5:25].astype(int)
        inverse = -1 - part if dtype == "int16" else 2**stored - 1 - part
        assert np.array_equal(read, inverse if colours == "MONOCHROME1" else part)
    assert ".dcm" in SUFFIXES


def test_colours_and_padding():
    colours = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    with open_bytes(dicom(colours, "RGB", 8)) as picture:
        assert np.array_equal(read_pixels(picture, RGB, 1).numpy(), np.moveaxis(colours, -1, 0))
    with open_bytes(dicom(GREY, "MONOCHROME1", PixelPaddingValue=7)) as picture:
        assert picture.nodata == 4095 - 7
        values = picture.values(1)[0]
        assert np.array_equal(picture.missing(values, None), GREY == 7)


def refused(content):
    with pytest.raises(BadPictureError) as error, open_bytes(content) as picture:
        read_pixels(picture, RGB, 1)
    return reason(error.value)


def test_what_is_not_read_is_a_line(monkeypatch):
    plain = dicom(GREY)
    assert "would be almost black: set data.range" in refused(plain)
    assert refused(dicom(GREY, NumberOfFrames=3)).startswith("it is DICOM of 3 frames in MONOCHROME2 of 16 bits")
    assert "PALETTE COLOR" in refused(dicom(GREY, "PALETTE COLOR"))
    assert "which pydicom does not read" in refused(dicom(GREY, syntax=MPEG4HP41))
    monkeypatch.setattr(pydicom.pixels.decoders.base.Decoder, "is_available", False)
    for syntax in (JPEGLSLossless, JPEG2000Lossless):
        line = refused(dicom(GREY, syntax=syntax))
        assert line == f"it is DICOM compressed by {syntax.name}: pip install 'pylibjpeg[all]'"
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert refused(plain) == "DICOM is read by pydicom: pip install pydicom"
