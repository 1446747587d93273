"""Pictures of every kind become the same input; odd sizes are padded or refused with what to do."""

import numpy as np
import pytest
import torch
from PIL import Image

from vim_backbone import Preprocessing, UserError, create_model, load


@pytest.fixture
def folder(tmp_path):
    return create_model("vim_tiny", d_model=32, depth=2, img_size=32, num_classes=4).save_pretrained(tmp_path / "vim")


def normalised(image):
    """The closed form, (c, h, w)."""
    pixels = np.asarray(image, np.float64) / 255
    return torch.from_numpy(((pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).transpose(2, 0, 1)).float()


def test_a_picture_in_every_form(folder, photo, tmp_path):
    model, transform = load(folder)
    image = photo(40, 50)
    image.save(tmp_path / "photo.png")
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    want = torch.zeros(1, 3, 48, 64)
    want[0, :, :40, :50] = normalised(image)
    forms = [tmp_path / "photo.png", str(tmp_path / "photo.png"), image, array, tensor, array / 255, tensor / 255]
    for form in forms:
        torch.testing.assert_close(transform(form), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(transform(tensor[None].expand(2, -1, -1, -1)), want.expand(2, -1, -1, -1))
    grey = image.convert("L")
    torch.testing.assert_close(transform(np.asarray(grey)), transform(grey))
    with torch.no_grad():
        features = model(transform([image, photo(20, 90), tmp_path / "photo.png"]))
        torch.testing.assert_close(features[2:], model(want))
        assert features.shape == (3, 32)
        levels = model.forward_intermediates(transform([image, photo(20, 90)]), intermediates_only=True)
    assert [[m.shape for m in level] for level in levels] == [[(32, 3, 4), (32, 2, 6)]] * 2


def test_sizes(folder, photo):
    assert load(folder, size=64)[1](photo(40, 50)).shape == (1, 3, 64, 64)
    assert load(folder, size=(32, 50))[1](photo(400, 500)).shape == (1, 3, 32, 64)
    model, transform = load(folder, pad=False)
    with pytest.raises(
        UserError, match=r"image height is 40 pixels: .* the transform of vim_backbone.load pads pictures"
    ):
        model(transform(photo(40, 64)))
    for wrong in (0, (32,), (32, 1.5)):
        with pytest.raises(UserError, match=r"size is .*: give a side, or \(height, width\), in pixels"):
            load(folder, size=wrong)
    resized = load(folder, size=16)[1](photo(32, 32))[0]
    want = normalised(photo(32, 32).resize((16, 16), Image.Resampling.BICUBIC))
    torch.testing.assert_close(resized, want, atol=2 / 255 / 0.22, rtol=0)


def test_an_overlapping_stride(tmp_path, photo):
    made = create_model("vim_tiny", d_model=32, depth=1, img_size=32, stride=8, num_classes=0)
    model, transform = load(made.save_pretrained(tmp_path / "vim"))
    assert transform(photo(3, 33)).shape == (1, 3, 16, 40)
    assert model(transform(photo(3, 33))).shape == (1, 32)


def test_what_is_no_picture(folder, tmp_path):
    transform = load(folder)[1]
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    for wrong, words in (
        (tmp_path / "nothing.png", "cannot read the picture .*nothing.png"),
        (tmp_path / "broken.jpg", "cannot read the picture .*broken.jpg"),
        (tmp_path / "objects.npy", "cannot read the picture .*objects.npy"),
        (7, "int is no picture: give a file"),
        (torch.rand(4, 8, 8), r"the picture has shape \(4, 8, 8\): give \(h, w, 3\)"),
        (torch.rand(3, 8, 8) * 255, r"holds torch.float32 of .*: give uint8, or floats in \[0, 1\]"),
        (np.zeros((8, 8, 3), bool), "holds torch.bool of 0 to 0: give uint8"),
        (np.full((8, 8, 3), None), "the picture is an array of object: give uint8"),
        (np.zeros((8, 8, 3), np.int64), "holds torch.int64 of 0 to 0: give uint8"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            transform(wrong)
        assert "\n" not in str(caught.value)


def test_what_the_model_refuses(folder):
    model = load(folder)[0]
    for wrong, words in (
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "pictures are torch.uint8: the model takes normalised floats"),
        (torch.rand(3, 32, 32), r"pictures have shape \(3, 32, 32\), .* add it as images\[None\]"),
        (torch.rand(1, 32, 32, 3), r"pictures have 32 channels, .* wants 3: channels come first"),
        (torch.rand(32, 32), r"pictures have shape \(32, 32\), they must be \(batch, channels, h, w\)"),
        ([torch.zeros(3, 32, 32, dtype=torch.uint8)], "pictures are torch.uint8"),
        ([torch.rand(32, 32, 3)], "wants 3: channels come first"),
        ([torch.rand(3, 32, 33)], "image width is 33 pixels: .*pads pictures"),
    ):
        for call in (model, model.forward_features, model.forward_intermediates):
            with pytest.raises(UserError, match=words):
                call(wrong)


def test_bands(tmp_path):
    preprocessing = Preprocessing(
        mean=(0.5, 0.25), std=(0.5, 0.5), bands=(3, 0), dtype="uint16", range=((0.0, 0.0), (1000.0, 2000.0)), nodata=0.0
    )
    model = create_model("vim_tiny", d_model=32, depth=1, img_size=32, num_classes=0, in_chans=2)
    folder = model.save_pretrained(tmp_path / "vim", preprocessing=preprocessing)
    transform = load(folder)[1]
    values = np.random.default_rng(0).integers(1, 1000, (4, 20, 16), np.uint16)
    values[:, 2, 3] = 0
    want = torch.from_numpy((values[[3, 0]] / [[[1000.0]], [[2000.0]]] - [[[0.5]], [[0.25]]]) / 0.5).float()
    want[:, 2, 3] = 0
    np.save(tmp_path / "values.npy", values)
    for form in (values, values.transpose(1, 2, 0), torch.from_numpy(values), tmp_path / "values.npy"):
        torch.testing.assert_close(transform(form)[0, :, :20], want, atol=2e-3, rtol=0)
    (tmp_path / "values.tif").touch()
    with pytest.raises(UserError, match=r"takes bands \[3, 0\] of files; read them with tifffile or rasterio"):
        transform(tmp_path / "values.tif")
    with pytest.raises(UserError, match=r"it must be .* of uint16, with 4 bands or more"):
        transform(values.astype(np.uint8))
    with pytest.raises(UserError, match="takes 3 channels, its preprocessing describes 2"):
        load(folder, in_chans=3)


def test_a_list_holds_pictures_and_no_batches(folder):
    _, transform = load(folder)
    with pytest.raises(UserError, match=r"the picture has shape \(8, 3, 32, 32\)"):
        transform([torch.rand(8, 3, 32, 32)])
    with pytest.raises(UserError, match="list is no picture"):
        transform([[torch.rand(3, 32, 32)]])


def test_sixteen_bits_are_the_same_from_a_file_and_from_pillow(folder, tmp_path):
    wide = Preprocessing(range=((0.0,), (4095.0,)))
    create_model("vim_tiny", d_model=32, depth=1, img_size=32).save_pretrained(tmp_path / "wide", preprocessing=wide)
    _, transform = load(tmp_path / "wide")
    Image.fromarray(np.full((32, 32), 4095, np.uint16)).save(tmp_path / "white.png")
    with Image.open(tmp_path / "white.png") as image:
        torch.testing.assert_close(transform(image), transform(tmp_path / "white.png"))
        torch.testing.assert_close(transform(image)[0], normalised(np.full((32, 32, 3), 255.0)))


def test_channels_that_no_transform_can_make(folder, tmp_path):
    made = create_model("vim_tiny", d_model=32, depth=1, img_size=32, in_chans=4)
    made.save_pretrained(tmp_path / "four", mean=(0.5,) * 4, std=(0.2,) * 4)
    with pytest.raises(UserError, match="does not say which bands the backbone's 4 channels are"):
        load(tmp_path / "four")
    with pytest.raises(UserError, match="load takes no chosen_channels"):
        load(folder, chosen_channels=[0])


def test_bfloat16_weights_take_what_the_transform_gives(folder, photo):
    model, transform = load(folder)
    with torch.no_grad():
        exact = model(transform(photo(32, 32)))
        torch.testing.assert_close(model.bfloat16()(transform(photo(32, 32))).float(), exact, rtol=0.1, atol=0.05)
