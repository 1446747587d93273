"""DICOM by pydicom: the stored values of one frame, grey or RGB; white is high, whatever the file says."""

from pathlib import Path
from typing import IO, Any

import numpy as np

from launch.data.images import BadPictureError, check_megapixels
from launch.data.pictures import Box, Picture, whole_box

PREFIX = b"DICM"
"""After 128 bytes."""


class DicomPicture(Picture):
    """One frame. Rescale slope and intercept, and the windows of a viewer, are left alone."""

    def __init__(self, file: str | Path | IO[bytes]) -> None:
        try:
            import pydicom
        except ImportError as error:
            raise BadPictureError("DICOM is read by pydicom: pip install pydicom") from error
        self.source: Any = file
        header: Any = pydicom.dcmread(file, stop_before_pixels=True)
        if "Rows" not in header:
            raise BadPictureError("it is DICOM without pixels")
        frames, colours = int(header.get("NumberOfFrames") or 1), str(header.PhotometricInterpretation)
        self.size, self.bands = (int(header.Rows), int(header.Columns)), int(header.SamplesPerPixel)
        bits, signed = int(header.BitsAllocated), int(header.PixelRepresentation)
        if frames != 1 or self.bands not in (1, 3) or bits not in (8, 16, 32) or colours == "PALETTE COLOR":
            raise BadPictureError(
                f"it is DICOM of {frames} frames in {colours} of {bits} bits, and one in grey or RGB of 8, 16 or 32 is "
                "read: save its pixels as TIFF or .npy, with pydicom"
            )
        self.dtype = np.dtype(f"{'i' if signed else 'u'}{bits // 8}")
        self.inverse = (-1 if signed else 2 ** int(header.BitsStored) - 1) if colours == "MONOCHROME1" else None
        """Lowest and highest value together, where white is low."""
        padding = header.get("PixelPaddingValue")
        self.nodata = None if padding is None else float(padding if self.inverse is None else self.inverse - padding)
        require_decoder(header.file_meta.TransferSyntaxUID)

    def values(
        self, max_megapixels: float, box: Box | None = None, size: tuple[int, int] | None = None
    ) -> tuple[np.ndarray, Box]:
        """The whole picture."""
        del size  # it is stored at one resolution
        from pydicom.pixels.utils import pixel_array

        check_megapixels(*self.size, max_megapixels)
        pixels = np.atleast_3d(pixel_array(self.source))
        if self.inverse is not None:
            pixels = (self.inverse - pixels.astype(np.int64)).astype(self.dtype)
        return np.moveaxis(pixels, -1, 0), box or whole_box(*self.size)


def require_decoder(syntax: Any) -> None:
    """Raise BadPictureError for a compression that nothing installed decodes."""
    from pydicom.pixels.decoders.base import get_decoder

    try:
        missing = syntax.is_compressed and not get_decoder(syntax).is_available
    except NotImplementedError as error:
        raise BadPictureError(f"it is DICOM compressed by {syntax.name}, which pydicom does not read") from error
    if missing:
        raise BadPictureError(f"it is DICOM compressed by {syntax.name}: pip install 'pylibjpeg[all]'")
