"""Pictures of any bands and depth, read whole or by window: the values that were written, or one line."""

import io

import numpy as np
import pytest
import tifffile
from PIL import Image

import launch.data.reading
from launch.data.images import ORIENTATION, BadPictureError
from launch.data.reading import block_means, open_bytes, open_file, read_pixels, resized
from launch.data.sources import open_source, what_was_left_out
from vim_backbone.images import reason
from vim_backbone.preprocessing import RGB, Preprocessing

SHAPE = (300, 420)


def scene(bands=4, dtype=np.uint16, shape=SHAPE):
    """A smooth picture whose bands all differ, over a tenth of the range of 16 bits."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    waves = [3000 + 2500 * np.sin(x / (9 + 3 * k)) * np.cos(y / (7 + 2 * k)) for k in range(bands)]
    values = np.stack(waves)
    return (values / 24 if np.dtype(dtype).itemsize == 1 else values).astype(dtype)


def chosen(*bands, dtype="uint16", **more):
    more = {"range": ((0.0,) * len(bands), (6000.0,) * len(bands))} | more if "float" in dtype else more
    return Preprocessing(mean=(0.5,) * len(bands), std=(0.25,) * len(bands), bands=bands, dtype=dtype, **more)


def planes(path, values):
    tifffile.imwrite(path, values, tile=(64, 64), planarconfig="separate", photometric="minisblack", compression="zlib")


def samples(path, values):
    extra = [0] * (len(values) - 1)
    tifffile.imwrite(path, np.moveaxis(values, 0, -1), tile=(64, 64), photometric="minisblack", extrasamples=extra)


def pages_in_strips(path, values):
    tifffile.imwrite(path, values, photometric="minisblack", rowsperstrip=32, compression="lzw")


def ome(path, values):
    tifffile.imwrite(path, values, photometric="minisblack", tile=(64, 64), ome=True, metadata={"axes": "CYX"})


def imagej(path, values):
    tifffile.imwrite(path, values, photometric="minisblack", imagej=True, metadata={"axes": "CYX"})


def big(path, values):
    tifffile.imwrite(
        path, values, photometric="minisblack", bigtiff=True, byteorder=">", predictor=True, compression="zstd"
    )


@pytest.mark.parametrize("write", [planes, samples, pages_in_strips, ome, imagej, big])
def test_tiffs_give_the_values_that_were_written_whole_and_by_window(tmp_path, write):
    values = scene()
    write(tmp_path / "scene.tif", values)
    for opened in (open_file(tmp_path / "scene.tif"), open_bytes((tmp_path / "scene.tif").read_bytes())):
        with opened as picture:
            assert (picture.size, picture.bands, picture.dtype) == (SHAPE, 4, np.uint16)
            whole, near = picture.values(1)
            assert np.array_equal(whole, values)
            assert near == (0, 0, SHAPE[1], SHAPE[0])
            part, (left, top, right, bottom) = picture.values(1, (70, 33, 140, 290))
            assert np.array_equal(
                part[:, round(top) : round(bottom), round(left) : round(right)], values[:, 33:290, 70:140]
            )
            assert part.shape[1] * part.shape[2] < 257 * 70 * 1.2
            swapped = read_pixels(picture, chosen(3, 1), 1)
            assert np.array_equal(swapped.numpy(), values[[3, 1]])


@pytest.mark.parametrize("name", ["colours.png", "colours.tif", "tiled.tif", "colours.npy"])
def test_a_box_of_colours(tmp_path, photo, name):
    colours = np.asarray(photo(90, 120))
    Image.fromarray(colours).save(tmp_path / "colours.png")
    Image.fromarray(colours).save(tmp_path / "colours.tif")
    tifffile.imwrite(tmp_path / "tiled.tif", colours, photometric="rgb", tile=(32, 32))
    np.save(tmp_path / "colours.npy", colours)
    with open_file(tmp_path / name) as picture:
        part = read_pixels(picture, RGB, 1, (30, 40, 70, 85)).numpy()
    assert np.array_equal(part, np.moveaxis(colours[40:85, 30:70], -1, 0))


@pytest.mark.parametrize("axes", ["bhw", "hwb", "hw"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float64])
def test_arrays(tmp_path, axes, dtype):
    values = scene(1 if axes == "hw" else 5, dtype)
    np.save(tmp_path / "scene.npy", {"bhw": values, "hwb": np.moveaxis(values, 0, -1), "hw": values[0]}[axes])
    with open_file(tmp_path / "scene.npy") as picture:
        assert (picture.size, picture.bands, picture.dtype) == (SHAPE, len(values), dtype)
        assert np.array_equal(picture.values(1)[0], values)
        pixels = read_pixels(picture, chosen(0, dtype=np.dtype(dtype).name), 1).numpy()
    assert pixels.dtype == (dtype if np.dtype(dtype).kind == "u" else np.float32)
    assert np.allclose(pixels[0], values[0])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_window_gives_the_view_that_the_whole_picture_gives(tmp_path, dtype):
    values = scene(4, dtype)
    planes(tmp_path / "scene.tif", values)
    box, size = (41.0, 22.0, 341.0, 262.0), (48, 60)
    want = [
        np.asarray(Image.fromarray(band.astype(np.float32)).resize(size[::-1], Image.Resampling.BICUBIC, box=box))
        for band in values
    ]
    with open_file(tmp_path / "scene.tif") as picture:
        view = read_pixels(picture, chosen(0, 1, 2, 3, dtype=np.dtype(dtype).name), 1, box, size).numpy()
    assert view.dtype == dtype
    error = np.abs(view.astype(float) - np.stack(want)) / (values.max() / 255.0)
    assert error.max() < 4, "of 255 levels; the box filter before the bicubic one makes a difference"
    assert error.mean() < 0.7


@pytest.mark.parametrize("size", [(48, 60), (240, 300), (500, 400)])
def test_a_window_has_all_that_the_filter_needs(tmp_path, size):
    values, box = scene(4), (41.0, 22.0, 341.0, 262.0)
    planes(tmp_path / "scene.tif", values)
    with open_file(tmp_path / "scene.tif") as picture:
        view = read_pixels(picture, chosen(0, 1, 2, 3), 1, box, size).numpy()
    assert np.array_equal(view, resized(values, size, box))


def test_overshoot_of_16_bits_is_cut_and_fractions_are_rounded():
    step = np.zeros((1, 40, 40), np.uint16)
    step[:, :, 20:] = 65535
    sharp = resized(step, (40, 93), (0, 0, 40, 40))
    assert (sharp[0, :, :40] == 0).all()
    assert (sharp[0, :, 60:] == 65535).all()
    values = scene(1)
    whole, exact = (resized(each, (70, 90), (0, 0, 420, 300)) for each in (values, values.astype(np.float32)))
    assert np.abs(whole - exact).max() <= 0.5


@pytest.mark.parametrize(("down", "across"), [(1, 1), (2, 1), (1, 3), (3, 4)])
def test_means_of_blocks(down, across):
    band = np.random.default_rng(0).integers(0, 65535, (13, 17), dtype=np.uint16)
    padded = np.pad(band.astype(np.float64), ((0, -13 % down), (0, -17 % across)), mode="edge")
    blocks = padded.reshape(padded.shape[0] // down, down, padded.shape[1] // across, across)
    assert np.allclose(block_means(band, down, across), blocks.mean((1, 3)))


def pyramid(path, colours, **options):
    with tifffile.TiffWriter(path) as file:
        file.write(colours, tile=(64, 64), photometric="rgb", subifds=2, **options)
        for step in (2, 4):
            reduced = np.asarray(Image.fromarray(colours).reduce(step))
            file.write(reduced, tile=(64, 64), photometric="rgb", subfiletype=1, **options)


@pytest.mark.parametrize("compression", [None, "jpeg"])
def test_of_a_pyramid_the_coarsest_level_that_holds_the_detail_is_read(tmp_path, photo, compression):
    colours = np.asarray(photo(64, 64).resize((4096, 2048), Image.Resampling.BICUBIC))
    pyramid(tmp_path / "slide.tif", colours, compression=compression)
    with open_file(tmp_path / "slide.tif") as picture:
        assert picture.size == (2048, 4096)
        for box, size, scale in (((0, 0, 4096, 2048), (512, 1024), 4), ((0, 0, 1000, 1000), (400, 400), 2),
                                 ((100, 100, 200, 200), (64, 64), 1)):  # fmt: skip
            part, near = picture.values(9, box, size)
            width = (box[2] - box[0]) / scale
            assert near[2] - near[0] == pytest.approx(width)
            assert part.shape[2] <= width + 40
            view = read_pixels(picture, RGB, 9, box, size).float()
            want = np.asarray(Image.fromarray(colours).resize(size[::-1], Image.Resampling.BICUBIC, box=box))
            assert np.abs(view.numpy() - np.moveaxis(want, -1, 0)).mean() < 2.5


def test_a_crop_of_a_huge_file_takes_no_more_than_its_own_tiles(tmp_path):
    with open(tmp_path / "huge.npy", "wb") as file:  # 10 gigapixels, sparse: nothing could read it whole
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (100_000, 100_000)}
        )
        file.truncate(file.tell() + 10**10)
    with open_file(tmp_path / "huge.npy") as picture:
        view = read_pixels(picture, RGB, 2, (50_000, 50_000, 51_000, 51_000), (224, 224))
        assert view.shape == (3, 224, 224)
        with pytest.raises(BadPictureError, match=r"10000 megapixels, over max_megapixels 2"):
            read_pixels(picture, RGB, 2)


def test_a_closed_tiff_keeps_nothing_of_its_header(tmp_path):
    """Objects of tifffile hold each other: a slide's offsets of tiles, megabytes, would wait for the collector."""
    planes(tmp_path / "scene.tif", scene())
    with open_file(tmp_path / "scene.tif") as picture:
        picture.values(1)
        header = picture.key
        assert len(header.dataoffsets) == 4 * 5 * 7
    assert not vars(header)


@pytest.mark.parametrize("value", range(1, 9))
def test_orientation_of_a_tiff(tmp_path, photo, value):
    exif = Image.Exif()
    exif[ORIENTATION] = value
    photo().save(tmp_path / "turned.tif", exif=exif)
    with open_file(tmp_path / "turned.tif") as picture:
        want = read_pixels(picture, RGB, 1).numpy()  # by Pillow
        got = read_pixels(picture, chosen(0, 1, 2, dtype="uint8"), 1).numpy()
        assert picture.size == want.shape[1:]
        assert np.array_equal(got, want)


def saved(values, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **({"photometric": "minisblack"} | options))
    return buffer.getvalue()


def tag(text):
    return {"extratags": [(42113, "s", 0, text, True)]}


def refused(content, preprocessing=RGB):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - as the readers take it
        read_pixels(open_bytes(content), preprocessing, 1)
    line = reason(caught.value)
    assert len(line.splitlines()) == 1
    return line


def test_what_cannot_be_meant_is_refused_in_a_line():
    four = scene(4, np.uint8)
    with_nir = saved(np.moveaxis(four, 0, -1), photometric="rgb", extrasamples=[0])
    assert "holds 4 bands of uint8, and RGB takes 1 or 3" in refused(with_nir)
    five = saved(np.moveaxis(scene(5, np.uint8), 0, -1), photometric="rgb", extrasamples=[0, 2])
    assert "5 bands of uint8, one of them alpha" in refused(five)
    assert "holds 10 bands" in refused(saved(scene(10, np.uint8)))
    assert "3 pages of uint8" in refused(saved(scene(3, np.uint8)))
    twelve = scene(1)[0] // 2
    assert "end at 27" in refused(saved(twelve))
    assert "4.2 % of their range, and would be almost black: set data.range" in refused(saved(twelve))
    assert "band 4 is wanted" in refused(saved(four), chosen(4, dtype="uint8"))
    assert "holds 4 bands of uint8, the other pictures uint16" in refused(saved(four), chosen(0))
    holes = scene(2, np.float32)
    holes[:, :30] = np.nan
    assert "10.00% of its values are NaN or infinite: set data.nodata nan" in refused(
        saved(holes), chosen(0, 1, dtype="float32")
    )
    assert "nodata is 'none', which is no number" in refused(saved(four, **tag("none")), chosen(0, dtype="uint8"))


def test_sixteen_bits_as_colours_of_eight():
    twelve = scene(1)[0] // 2
    want = twelve * (255 / 4095)
    ranged = Preprocessing(range=((0.0,), (4095.0,)))
    for content in (saved(twelve), png(twelve)):
        view = read_pixels(open_bytes(content), ranged, 1).numpy()
        assert np.abs(view - want).max() <= 0.51
        dark = read_pixels(open_bytes(content), Preprocessing(range="type"), 1).numpy()
        assert np.abs(dark - twelve / 257.0).max() <= 0.51
    colours = np.moveaxis(scene(3) // 2, 0, -1)
    tiff = read_pixels(open_bytes(saved(colours, photometric="rgb")), ranged, 1).numpy()
    assert np.abs(tiff - np.moveaxis(colours, -1, 0) * (255 / 4095)).max() <= 0.51
    assert "almost black" in refused(saved(colours, photometric="rgb"))


def png(values):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "png")
    return buffer.getvalue()


def test_colours_of_16_bits_in_png(tmp_path):
    imagecodecs = pytest.importorskip("imagecodecs", reason="writes and reads PNG of 16-bit colours")
    colours = np.moveaxis(scene(3) // 2, 0, -1).copy()
    content = imagecodecs.png_encode(colours)
    assert "almost black" in refused(content)
    view = read_pixels(open_bytes(content), Preprocessing(range=((0.0,), (4095.0,))), 1).numpy()
    assert np.abs(view - np.moveaxis(colours, -1, 0) * (255 / 4095)).max() <= 0.51
    assert np.array_equal(read_pixels(open_bytes(content), chosen(0, 1, 2), 1).numpy(), np.moveaxis(colours, -1, 0))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_nodata_becomes_the_mean(dtype):
    values = scene(2, dtype)
    values[:, :100, :100] = 7
    values[0, 200, 200] = 7  # one band of a pixel that holds something
    span = ((0.0, 0.0), (200.0, 100.0))
    settings = chosen(0, 1, dtype=np.dtype(dtype).name, range=span)
    for content, preprocessing in ((saved(values, **tag("7")), settings), (saved(values), chosen(
        0, 1, dtype=np.dtype(dtype).name, range=span, nodata=7.0))):  # fmt: skip
        pixels = read_pixels(open_bytes(content), preprocessing, 1).numpy()
        assert (pixels[0, :100, :100] == 100).all()
        assert (pixels[1, :100, :100] == 50).all()
        assert pixels[0, 200, 200] == 7
    unset = read_pixels(open_bytes(saved(values, **tag("-9999"))), settings, 1).numpy()  # no value of whole numbers
    assert (unset[:, :100, :100] == 7).all()


def test_nodata_in_rgb_gets_the_mean_colour(photo):
    colours = np.asarray(photo()).copy()
    colours[:10] = 0
    view = read_pixels(open_bytes(saved(colours, photometric="rgb", **tag("0"))), RGB, 1).numpy()
    assert (view[:, :10] == np.array([124, 116, 104])[:, None, None]).all()
    assert np.array_equal(view[:, 10:], np.moveaxis(colours[10:], -1, 0))


def test_nan_as_nodata_and_values_far_beyond_the_range():
    values = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (2, 64, 1))
    values[0, :8], values[1, 0, 0], values[0, 40, 40] = np.nan, np.inf, 3e38
    settings = chosen(0, 1, dtype="float32", range=((0.0, 0.0), (1.0, 1.0)), nodata=float("nan"))
    view = read_pixels(open_bytes(saved(values)), settings, 1).numpy()
    assert (view[0, :8] == 0.5).all()
    assert view[1, 0, 0] == 0.5
    assert view[0, 40, 40] == 2.0, "one width of the range above it, or the loss would be infinite"
    assert np.allclose(view[1, 1:], values[1, 1:])


def test_tiles_that_are_missing_truncated_or_damaged_are_one_bad_picture(tmp_path):
    values = scene(1)[0]
    tifffile.imwrite(tmp_path / "good.tif", values, tile=(64, 64), photometric="minisblack", compression="zlib")
    content = bytearray((tmp_path / "good.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "good.tif") as file:
        offset, count = file.pages[0].dataoffsets[-1], file.pages[0].databytecounts[-1]
        counts = file.pages[0].tags[325]
        width = {3: 2, 4: 4, 16: 8}[int(counts.dtype)]
        place = counts.valueoffset
    settings = chosen(0)
    assert read_pixels(open_bytes(bytes(content)), settings, 1).shape == (1, *SHAPE)
    empty = bytearray(content)
    empty[place : place + width] = bytes(width)
    assert "tile 0 is empty" in refused(bytes(empty), settings)
    inside = read_pixels(open_bytes(bytes(empty)), settings, 1, (200, 200, 260, 260), (60, 60)).numpy()
    assert np.array_equal(inside[0], values[200:260, 200:260]), "the other tiles are good"
    assert "truncated" in refused(bytes(content[: offset + count // 2]), settings)
    damaged = bytearray(content)
    damaged[offset + 4 : offset + 20] = b"\xff" * 16
    assert refused(bytes(damaged), settings)


def test_sparse_tiles_hold_nodata(tmp_path):
    values = scene(1, np.uint8)[0]
    content = bytearray(saved(values, tile=(64, 64), **tag("0")))
    with tifffile.TiffFile(io.BytesIO(bytes(content))) as file:
        counts = file.pages[0].tags[325]
        content[counts.valueoffset : counts.valueoffset + {3: 2, 4: 4}[int(counts.dtype)]] = b"\0\0\0\0"[
            : {3: 2, 4: 4}[int(counts.dtype)]
        ]
    pixels = read_pixels(open_bytes(bytes(content)), chosen(0, dtype="uint8"), 1).numpy()[0]
    assert (pixels[:64, :64] == 128).all()
    assert np.array_equal(pixels[64:, 64:], values[64:, 64:])


@pytest.mark.parametrize(("kind", "module"), [("HEIF", "pillow_heif"), ("JXL", "pillow_jxl")])
def test_formats_that_plugins_read(photo, kind, module, monkeypatch):
    plugin = pytest.importorskip(module, reason="writes and reads the format")
    if kind == "HEIF":
        plugin.register_heif_opener()
    buffer = io.BytesIO()
    photo(48, 64).save(buffer, kind, quality=95)
    view = read_pixels(open_bytes(buffer.getvalue()), RGB, 1).numpy()
    assert np.abs(np.moveaxis(view, 0, -1).astype(int) - np.asarray(photo(48, 64))).mean() < 12

    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(launch.data.reading, "import_module", absent)
    assert f"{kind} is read with {module.replace('_', '-')}" in refused(buffer.getvalue())


def test_avif_is_read_by_pillow_whatever_brand_it_has_first(photo):
    buffer = io.BytesIO()
    photo(48, 64).save(buffer, "avif", quality=95)
    content = buffer.getvalue()
    assert content[4:12] == b"ftypavif"
    for first in (b"avif", b"mif1"):
        assert read_pixels(open_bytes(content[:8] + first + content[12:]), RGB, 1).shape == (3, 48, 64)


def test_files_left_out_for_their_ending_are_counted(picture_folder):
    for name in ("a.txt", "b.txt", "c.xml", "none"):
        (picture_folder / name).write_text("x")
    source = open_source(str(picture_folder), split="train", column=None, streaming=False)
    assert len(source) == 10
    assert what_was_left_out(source) == ["4 files are left out for their ending: 2 .txt, 1 .xml, 1 without one"]


def npy(array, pickled=False):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=pickled)
    return buffer.getvalue()


def test_arrays_that_are_no_pictures():
    assert "Object arrays cannot be loaded" in refused(npy(np.array([{}, []], object), pickled=True))
    assert "(0, 5) of uint8: no picture" in refused(npy(np.zeros((0, 5), np.uint8)))
    assert "(2, 3, 4, 5) of float64: no picture" in refused(npy(np.zeros((2, 3, 4, 5))))
    assert "of complex128: no picture" in refused(npy(np.zeros((4, 5), complex)))
    assert refused(npy(np.zeros((40, 50), np.uint8))[:-1])
    assert refused(b"\x93NUMPY")
