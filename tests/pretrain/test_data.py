"""Views and batches: the same whatever the workers, processes or restarts; bad pictures counted, never fatal alone."""

import io

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from launch.data.bad_pictures import BadPictures
from launch.data.crops import random_crop
from launch.data.order import BatchPlan
from launch.data.pictures import PillowPicture
from launch.data.reading import open_bytes
from launch.data.sources import open_source
from launch.run.randomness import generator
from pretrain.data import DataConfig, View, Views, build_loader, native_size
from pretrain.mae.objective import MAE
from pretrain.masking import MaskConfig
from pretrain.stages import Stage
from vim_backbone import UserError


def view(**changes):
    return View((32, 48), (4, 6), DataConfig(**({"workers": 0} | changes)), MAE().draw)


def one_stage(steps, batch, accumulation=1, world=1, rank=0):
    """Stages of a run that has one."""
    return [Stage(range(steps), (32, 48), BatchPlan(batch, accumulation, world, rank))]


def folder_source(folder):
    return open_source(str(folder), split="train", column=None, streaming=False)


def draw(source, *, workers=0, start=0, stop=4, batch=6, accumulation=1, world=1, rank=0):
    loader = build_loader(
        source, view(workers=workers), 3, one_stage(stop, batch, accumulation, world, rank), start * accumulation
    )
    return [b for b in loader if b is not None]


def same(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.extras, b.extras) and a.names == b.names


def test_workers_and_restarts_change_nothing(picture_folder):
    source = folder_source(picture_folder)
    whole = draw(source)
    assert len(whole) == 4
    assert whole[0].images.shape == (6, 3, 32, 48)
    assert whole[0].images.dtype == torch.uint8
    assert all(same(a, b) for a, b in zip(whole, draw(source, workers=2), strict=True))
    assert all(same(a, b) for a, b in zip(whole[2:], draw(source, workers=1, start=2), strict=True))


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (1, 3), (3, 2)])
def test_processes_and_accumulation_split_the_same_batches(picture_folder, world, accumulation):
    source = folder_source(picture_folder)
    whole = draw(source)
    parts = [draw(source, world=world, accumulation=accumulation, rank=rank) for rank in range(world)]
    for step in range(4):
        pieces = [parts[rank][step * accumulation + a] for a in range(accumulation) for rank in range(world)]
        assert torch.equal(torch.cat([p.images for p in pieces]), whole[step].images)
        assert torch.equal(torch.cat([p.extras for p in pieces]), whole[step].extras)


@given(width=st.integers(1, 3000), height=st.integers(1, 3000), key=st.integers(0, 10**6))
def test_crops_lie_inside_and_are_neither_thin_nor_tiny(width, height, key):
    left, upper, right, lower = random_crop(width, height, 0.2, generator(key))
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height
    if 0.75 <= width / height <= 4 / 3 and min(width, height) > 50:
        assert 0.2 * 0.95 <= (right - left) * (lower - upper) / (width * height) <= 1.0
        assert 0.70 <= (right - left) / (lower - upper) <= 1.43


@pytest.mark.parametrize("resize", ["pillow", "torch"])
def test_reduced_jpeg_decoding_gives_the_same_view(photo, resize):
    """A large JPEG is decoded at a fraction of its size; the view must look as if it had not been."""
    smooth = photo(64, 64).resize((1024, 1024), Image.Resampling.BICUBIC)
    jpeg = io.BytesIO()
    smooth.save(jpeg, "jpeg", quality=95)
    for key in range(5):
        content = jpeg.getvalue()
        reduced = view(resize=resize).draw(PillowPicture(Image.open(io.BytesIO(content))), generator(key))[0].float()
        whole = view().draw(PillowPicture(Image.open(io.BytesIO(content)).convert("RGB")), generator(key))[0].float()
        assert (reduced - whole).abs().mean().item() < 2.0


def test_a_resizer_changes_no_crop_and_no_value_much(photo):
    png = io.BytesIO()
    photo(150, 200).resize((300, 225), Image.Resampling.BICUBIC).save(png, "png")
    for key in range(8):
        first, second = (
            view(resize=by, min_scale=0.1).draw(open_bytes(png.getvalue()), generator(key))[0].int()
            for by in ("pillow", "torch")
        )
        inside = (first - second).abs()[:, 2:-2, 2:-2]  # at the edge Pillow sees what lies outside of the crop
        assert inside.max() <= 1


@pytest.fixture
def spoiled_folder(picture_folder, photo):
    """Ten good pictures, four that cannot be used, and odd ones that can."""
    (picture_folder / "empty.jpg").write_bytes(b"")
    (picture_folder / "text.png").write_bytes(b"no picture at all")
    photo(400, 400).save(picture_folder / "cut.jpg")
    (picture_folder / "cut.jpg").write_bytes((picture_folder / "cut.jpg").read_bytes()[:2000])
    Image.new("1", (3000, 3000)).save(picture_folder / "huge.png")
    photo().convert("L").save(picture_folder / "grey.png")
    photo().convert("CMYK").save(picture_folder / "cmyk.jpg")
    Image.fromarray(np.full((40, 40), 30000, np.uint16)).save(picture_folder / "deep16.png")
    photo().save(picture_folder / "moving.gif", save_all=True, append_images=[photo(shift=1)])
    return picture_folder


BAD = {"empty.jpg", "text.png", "cut.jpg", "huge.png"}


def test_bad_pictures_are_replaced_and_named(spoiled_folder):
    source = folder_source(spoiled_folder)
    views = Views(source, view(max_megapixels=5), seed=0)
    samples = [views[0, i] for i in range(len(source))]
    assert all(s.image is not None for s in samples)
    reasons = dict(entry for s in samples for entry in s.bad)
    assert reasons.keys() == BAD
    assert "truncated" in reasons["cut.jpg"]
    assert "9 megapixels" in reasons["huge.png"]
    assert "empty file" in reasons["empty.jpg"]
    assert {"grey.png", "cmyk.jpg", "deep16.png", "moving.gif"} <= {s.name for s in samples}


def test_the_share_of_bad_pictures_decides(spoiled_folder, tmp_path):
    source = folder_source(spoiled_folder)
    loader = build_loader(source, view(max_megapixels=5), 3, one_stage(2, 18))
    batches = [b for b in loader if b is not None]
    counted = BadPictures(tmp_path / "bad.txt", len(source), 0.5)
    lines = [line for b in batches for line in counted.add(b)]
    assert len(lines) == 4  # each is said once, though met in both epochs
    assert {line.split("\t")[0] for line in (tmp_path / "bad.txt").read_text().splitlines()} == BAD
    with pytest.raises(UserError, match=r"of 18 pictures cannot be used, over data\.max_bad_share 0\.1"):
        BadPictures(tmp_path / "strict.txt", len(source), 0.1).add(batches[0])


def test_a_folder_of_nothing_but_bad_pictures(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"x")
    batch = draw(folder_source(tmp_path), batch=2, stop=1)[0]
    assert batch.images is None
    with pytest.raises(UserError, match="3 pictures in a row cannot be used, the last"):
        BadPictures(tmp_path / "bad.txt", 3, 1.0).add(batch)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_goes_on_where_it_was(tmp_path, picture_folder, workers, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    cells = [{"bytes": p.read_bytes(), "path": None} for p in sorted(picture_folder.rglob("*.*"))]
    cells[4] = {"bytes": b"broken", "path": None}
    features = datasets.Features({"image": datasets.Image()})
    for part in range(2):
        rows = {"image": cells[part * 5 : part * 5 + 5]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"part-{part}.parquet")

    def stream(start, stop, known_bad=()):
        source = open_source(str(tmp_path / "part-*.parquet"), split="train", column=None, streaming=True)
        loader = build_loader(source, view(workers=workers), 3, one_stage(stop, 3), start, known_bad)
        return [b for _, b in zip(range(stop), loader, strict=False)]

    whole = stream(0, 8)
    known_bad = [name for b in whole[:5] for name, _ in b.bad]
    assert known_bad
    resumed = stream(5, 8, known_bad)
    assert resumed[:5] == [None] * 5
    assert all(same(a, b) for a, b in zip(whole[5:], resumed[5:], strict=True))


def test_one_file_serves_several_processes_and_workers(tmp_path, picture_folder, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    cells = [{"bytes": p.read_bytes(), "path": None} for p in sorted(picture_folder.rglob("*.*"))]
    rows, features = {"image": [*cells, *cells[:2]]}, datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "one.parquet")
    source = open_source(str(tmp_path / "one.parquet"), split="train", column=None, streaming=True)
    names = []
    for rank in range(2):
        loader = build_loader(source, view(workers=2), 3, one_stage(4, 6, 1, 2, rank))
        names += [name for _, batch in zip(range(4), loader, strict=False) for name in batch.names]
    assert sorted(names) == sorted(
        f"rank {rank} worker {worker} epoch {epoch} row {row}"
        for rank in range(2)
        for worker in range(2)
        for epoch in range(2)
        for row in range(3)
    )


@given(st.tuples(st.floats(1, 5000), st.floats(1, 5000)), st.sampled_from([(4, 6), (1, 2), (20, 20)]))
def test_native_sizes(crop, grid):
    side = 8
    height, width = native_size(crop, (grid[0] * side, grid[1] * side), grid)
    assert (height % side, width % side) == (0, 0)
    assert 2 <= height // side * (width // side) <= grid[0] * grid[1]
    assert height <= max(crop[0] + side, 2 * side)  # never scaled up, but for whole patches
    assert width <= max(crop[1] + side, 2 * side)


def test_native_views_keep_the_shape_of_the_crop(picture_folder):
    """A crop of 400 x 100 gives as many patches as one of 200 x 200, in its own shape."""
    assert native_size((100, 400), (64, 64), (8, 8)) == (32, 128)
    assert native_size((200, 200), (64, 64), (8, 8)) == (64, 64)
    assert native_size((17, 30), (64, 64), (8, 8)) == (16, 32)
    source = folder_source(picture_folder)
    loaded = list(build_loader(source, view(sizes="native"), 3, one_stage(4, 6)))
    again = list(build_loader(source, view(sizes="native", workers=2), 3, one_stage(4, 6), 1))
    for batch, same_batch in zip(loaded[1:], again, strict=True):
        assert all(map(torch.equal, batch.images, same_batch.images))
        assert all(map(torch.equal, batch.extras, same_batch.extras))
    shapes = {tuple(image.shape) for batch in loaded for image in batch.images}
    assert len(shapes) > 3
    assert all(h * w <= 32 * 48 for _, h, w in shapes)
    for image, mask in zip(loaded[0].images, loaded[0].extras, strict=True):
        assert len(mask) == image.shape[1] * image.shape[2] // 64
        assert mask.sum() == MaskConfig().num_masked(len(mask))
