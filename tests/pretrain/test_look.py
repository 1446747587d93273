"""The page on what a run would read: its views are those of a run, and it names what is wrong."""

import io

import datasets
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from launch.data.order import BatchPlan
from launch.data.sources import open_source
from launch.run.cli import parse
from pretrain.config import PretrainConfig
from pretrain.data import View, Views, build_loader
from pretrain.look import main
from pretrain.look_page import draw_page
from pretrain.stages import Stage
from pretrain.survey import EPOCHS, Looked, Survey, survey
from tests.pretrain.test_bands import made, scenes  # noqa: F401 - a fixture
from vim_backbone import UserError
from vim_backbone.preprocessing import to_model, to_pixels

FIELDS = ["--data.workers=0", "--model.img_size=32", "--seed=3"]


def configured(source, *argv):
    config = parse(PretrainConfig, [f"--data.source={source}", *FIELDS, *argv], "test", "")
    architecture = config.architecture()
    view = View(architecture.img_size, architecture.grid(*architecture.img_size), config.data, config.method.draw)
    data = config.data
    return config, view, open_source(data.source, split="train", column=None, streaming=data.streaming)


def surveyed(source, *argv, pictures=100):
    config, view, opened = configured(source, *argv)
    return survey(opened, view, config.seed, pictures)


@pytest.mark.parametrize("sizes", ["fixed", "native"])
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_views_and_masks_are_those_of_the_first_batch(picture_folder, tmp_path, sizes, streaming):
    source = str(picture_folder)
    if streaming == "true":
        rows = [{"image": {"bytes": path.read_bytes(), "path": None}} for path in sorted(picture_folder.rglob("*.*"))]
        features = datasets.Features({"image": datasets.Image(decode=False)})
        source = str(tmp_path / "rows.parquet")
        datasets.Dataset.from_list(rows, features=features).cast_column("image", datasets.Image()).to_parquet(source)
    argv = [f"--data.sizes={sizes}", f"--data.streaming={streaming}"]
    config, view, opened = configured(source, *argv)
    batch = next(iter(build_loader(opened, view, config.seed, [Stage(range(1), view.img_size, BatchPlan(8, 1, 1, 0))])))
    on_page = surveyed(source, *argv).on_page
    assert len(on_page) == 8
    for each, image, extra, name in zip(on_page, batch.images, batch.extras, batch.names, strict=True):
        assert name.endswith(each.name)
        read = to_pixels(to_model(image, torch.device("cpu")))
        assert torch.equal(each.pixels, read)
        assert torch.equal(each.cuts[0].extra, extra)
        assert tuple(image.shape[1:]) == each.cuts[0].size
    assert {len(each.cuts) for each in on_page} == {1 if streaming == "true" else EPOCHS}


def test_the_crops_drawn_are_those_of_the_epochs(picture_folder):
    config, view, opened = configured(picture_folder, "--data.flip=false")
    names = [opened.name(index) for index in range(len(opened))]
    each = surveyed(picture_folder, "--data.flip=false").on_page[0]
    sample = Views(opened, view, config.seed)[2, names.index(each.name)]
    with opened.open(names.index(each.name)) as picture:
        assert torch.equal(view.read(picture, each.cuts[2]), sample.image)


def test_sizes_kinds_values_and_bad_pictures_are_named(picture_folder):
    for path in sorted(picture_folder.rglob("*.*"))[2:]:
        path.unlink()
    values = np.arange(48 * 64 * 4, dtype=np.uint16).reshape(48, 64, 4)
    for name in ("a", "b"):
        tifffile.imwrite(picture_folder / f"{name}.tif", values, photometric="minisblack", extrasamples=[0] * 3)
    (picture_folder / "broken.png").write_bytes(b"no picture")
    (picture_folder / "notes.txt").write_text("x")
    seen = surveyed(picture_folder)
    by_name = {each.name: each for each in seen.looked}
    assert len(by_name) == seen.total == 5
    assert by_name["a.tif"].size == (48, 64)
    assert by_name["a.tif"].kind == "4 bands of uint16"
    held = by_name["a.tif"].values
    assert held.dtype == np.uint16
    assert (held[:, 0] == [0, 1, 2, 3]).all()
    assert by_name["a.tif"].pixels is None
    assert by_name["a.tif"].bands.shape == (4, 48, 64)
    assert seen.notes == ["1 files are left out for their ending: 1 .txt"]
    first, second = seen.problems()
    assert "a.tif" in first
    assert "b.tif" in first
    assert "4 bands of uint16" in first
    assert second.startswith("broken.png: ")
    assert [bool(each.problem) for each in seen.on_page] == [False, False, True, True]


def test_bands_are_drawn_as_the_model_has_them(scenes):  # noqa: F811
    seen = surveyed(scenes, f"--data.statistics={made(scenes)}", "--data.bands=[3,1]")
    assert not seen.bad
    each = seen.on_page[0]
    assert each.pixels.shape == (2, 32, 32)
    assert each.whole.shape[0] == 3
    assert 0.2 < each.pixels.mean() < 0.8
    assert each.values.shape[0] == 4
    assert (each.values > 0).all()  # nodata is left out


def changed(path):
    """Share of the page that is not white, which a page of pictures has and one of text has not."""
    pixels = np.asarray(Image.open(path).convert("L"))
    return float((pixels < 250).mean())


@pytest.mark.parametrize("argv", [[], ["--data.sizes=native"], ["--mask.kind=block"]])
def test_the_page(picture_folder, tmp_path, argv, capsys):
    page = tmp_path / "page.png"
    (picture_folder / "cost $a $b.png").write_bytes(b"")
    main([str(picture_folder), *FIELDS, *argv, f"--page={page}"])
    assert capsys.readouterr().out.strip() == str(page)
    with Image.open(page) as image:
        assert image.width == 1600
        height = image.height
    assert changed(page) > 0.3
    if "--data.sizes=native" in argv:
        main([str(picture_folder), *FIELDS, f"--page={page}"])
        assert Image.open(page).height < height  # without the row of the packing


def test_a_page_of_bands_is_drawn_with_and_without_statistics(scenes, tmp_path, capsys):  # noqa: F811
    page = tmp_path / "page.png"
    main([str(scenes), *FIELDS, f"--page={page}"])
    assert "ends at its start: 6 of 6 pictures cannot be what is meant" in capsys.readouterr().err
    refused = changed(page)
    main([str(scenes), *FIELDS, f"--page={page}", f"--data.statistics={made(scenes)}"])
    assert "cannot" not in capsys.readouterr().err
    assert changed(page) > refused > 0.1


def test_pictures_too_large_to_be_read_whole_are_drawn_as_frames(tmp_path):
    folder = tmp_path / "large"
    folder.mkdir()
    tifffile.imwrite(folder / "a.tif", np.full((1500, 3000), 7, np.uint16), tile=(64, 64))
    argv = ["--data.max_megapixels=0.5", "--data.crop_megapixels=0.05", "--data.range=type"]
    seen = surveyed(folder, *argv)
    (each,) = seen.on_page
    assert each.whole is None
    assert each.problem == ""
    assert (each.values == 7).all()
    config, view, _ = configured(folder, *argv)
    draw_page(seen, view, config, tmp_path / "page.png")
    assert changed(tmp_path / "page.png") > 0.03


def test_mistakes_are_one_line(tmp_path, picture_folder):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/x.png").write_bytes(b"nothing")
    (tmp_path / "torn").mkdir()
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "jpeg")
    (tmp_path / "torn/x.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    for argv, line in {
        (str(tmp_path / "bad"),): "no picture can be read, such as x.png",
        (str(tmp_path / "torn"),): "no picture can be read, such as x.jpg: image file is truncated",
        (str(picture_folder), "--page=page.jpg"): "page is 'page.jpg': its name must end in .png",
        (str(picture_folder), "--pictures=0"): "pictures is 0: it must be at least 1",
        (str(picture_folder), f"--page={tmp_path}/no/page.png"): "cannot write",
        (str(picture_folder), "--data.bands=[0,1]"): "their mean and deviation are not known",
        (str(picture_folder), "--nothing=1"): "no such field: nothing",
    }.items():
        with pytest.raises(UserError, match=line.replace("[", r"\[")) as error:
            main([*argv, *FIELDS])
        assert "\n" not in str(error.value)


def test_reasons_are_grouped():
    looked = [Looked(str(number), problem="torn") for number in range(6)] + [Looked("x", problem="empty")]
    assert Survey(looked, 7, []).problems() == ["0, 1, 2, 3 and 2 others: torn", "x: empty"]
