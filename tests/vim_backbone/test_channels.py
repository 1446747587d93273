"""Channels as tokens against a loop over places and channels, packed as alone, in its folder, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch

from vim_backbone import UserError, VimConfig, VisionMamba, from_pretrained
from vim_backbone.preprocessing import Preprocessing

CONFIG = VimConfig(
    d_model=16, depth=2, img_size=(16, 24), patch_size=8, in_chans=5, num_classes=3, channels="tokens",
    channel_sets=((4, 0, 1), (2,)), position="sincos",
)  # fmt: skip
POOLED = {"scan": "pooled", "class_token": "none", "global_pool": "avg"}
LAYOUTS = ({}, {"class_token": "first", "num_registers": 2}, {"class_token": "none", "global_pool": "avg"}, POOLED)


def model(**changes):
    torch.manual_seed(0)
    made = VisionMamba(VimConfig.from_dict(CONFIG.to_dict() | changes)).double().eval()
    with torch.no_grad():
        made.patch_embed.proj.bias.normal_()
    return made


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("number", "held"), [(5, (0, 1, 2, 3, 4)), (3, (4, 0, 1)), (1, (2,))])
def test_tokens_are_those_of_a_loop_over_places_and_channels(number, held):
    made, image = model(), draw(1, number, 16, 24)
    kernel, bias = made.patch_embed.proj.weight[:, 0], made.patch_embed.proj.bias
    positions = made.position_layout.split(made.pos_embed)[1][0]
    want = []
    for row in range(2):
        for column in range(3):
            for place, channel in enumerate(held):
                patch = image[0, place, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
                token = (kernel * patch).sum((1, 2)) + bias
                want.append(token + positions[3 * row + column] + made.channel_embed[0, channel])
    close(made.embed(image)[0], torch.stack(want))
    planes = image.flatten(0, 1)[:, None]
    close(made.patch_embed.as_product(planes), made.patch_embed.project(planes))
    assert made.lengths(list(image)) == [6 * number]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_channel_is_the_model_of_one_channel(layout):
    made = model(**layout, channel_sets=None, in_chans=1)
    plain = VisionMamba(VimConfig.from_dict(made.config.to_dict() | {"channels": "mixed", "channel_sets": None}))
    state = made.state_dict()
    embedding = state.pop("channel_embed")[0, 0]
    state["patch_embed.proj.bias"] = state["patch_embed.proj.bias"] + embedding
    plain.double().eval().load_state_dict(state)
    image = draw(2, 1, 32, 24)
    close(made(image), plain(image))
    maps = [each.forward_intermediates(image, [0], intermediates_only=True)[0] for each in (made, plain)]
    close(*maps)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_of_other_channels_and_sizes_in_one_row_are_as_alone(layout):
    made = model(**layout)
    images = [draw(3, 16, 24), draw(5, 8, 8), draw(1, 24, 16), draw(5, 16, 24)]
    tokens = made.forward_features(images)
    special = made.num_prefix_tokens
    assert [len(each) - special for each in tokens] == [18, 5, 6, 30]
    for got, image in zip(tokens, images, strict=True):
        close(got, made.forward_features(image[None])[0])
    close(made(images), torch.cat([made(image[None]) for image in images]))
    (maps,) = made.forward_intermediates(images, [1], norm=True, intermediates_only=True)
    for got, each, image in zip(maps, tokens, images, strict=True):
        c, rows, columns = len(image), image.shape[1] // 8, image.shape[2] // 8
        places = [each[special + c * k : special + c * k + c].mean(0) for k in range(rows * columns)]
        close(got, torch.stack(places, 1).view(16, rows, columns))


@pytest.mark.parametrize("packed", [False, True])
def test_a_pooled_line_is_all_channels_of_a_row_or_column(packed):
    """Of visible tokens too; the mean is over all tokens of the line."""
    made = model(**POOLED)
    if packed:
        images, numbers, visible = [draw(3, 16, 24), draw(1, 24, 8)], (3, 1), [0, 1, 2, 12, 13, 14, 18, 20]
        grids = [(2, 3), (3, 1)]
        indices = torch.tensor([visible])
    else:
        images, numbers, grids = draw(1, 3, 16, 24), (3,), [(2, 3)]
        visible = [3, 4, 5, 9, 10, 11, 12, 13, 14]
        indices = torch.tensor([visible])
    every = [
        (picture, row, column)
        for picture, ((rows, columns), c) in enumerate(zip(grids, numbers, strict=True))
        for row in range(rows)
        for column in range(columns)
        for _ in range(c)
    ]
    for by, lines in enumerate(made.lines(images, indices)):
        wanted = sorted({(picture, place[by]) for picture, *place in every})
        order = range(len(visible)) if lines.order is None else lines.order.tolist()
        got = [(every[visible[k]][0], every[visible[k]][1 + by]) for k in order]
        assert [wanted[k] for k in lines.line_of.tolist()] == got == sorted(got)
        places = [every[visible[k]] + (visible[k],) for k in order]
        assert places == sorted(places, key=lambda each: (each[0], each[1 + by], each[2 - by], each[3]))
        for (picture, number), weight in zip(wanted, lines.weights.tolist(), strict=True):
            whole = sum((of, *place)[0] == picture and place[by] == number for of, *place in every)
            assert weight == pytest.approx(1 / whole)


def test_the_folder_says_which_channels_pictures_may_have(tmp_path):
    made = model().float()
    values = {"mean": (0.5,) * 5, "std": (0.2,) * 5}
    folder = made.save_pretrained(tmp_path / "tokens", **values)
    again = from_pretrained(folder)
    assert again.config == CONFIG
    assert "a picture has 1 or 3 or 5 of them" in (folder / "README.md").read_text()
    image = draw(1, 3, 16, 24).float()
    assert torch.equal(again(image), made(image))
    other = from_pretrained(folder, channel_sets=[[0, 1, 4]])
    close(other.embed(image[:, [1, 2, 0]]).view(1, 6, 3, 16)[:, :, [2, 0, 1]], made.embed(image).view(1, 6, 3, 16))
    few = from_pretrained(folder, chosen_channels=[4, 0, 1])
    assert (few.config.in_chans, few.config.channel_sets) == (3, None)
    close(few(image), made(image))
    for options, line in (
        (
            {"channels": "mixed", "channel_sets": None},
            "has channels 'tokens', which cannot become 'mixed': pretrain with",
        ),
        ({"in_chans": 4, "channel_sets": None}, "in_chans is 4: .* has embeddings of 5 channels, choose of them with"),
        ({"chosen_channels": [5]}, r"chosen_channels has \[5\]: give different numbers of \[0, 1, 2, 3, 4\]"),
    ):
        with pytest.raises(UserError, match=line):
            from_pretrained(folder, **options)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"in_chans": 6}))
    with pytest.raises(UserError, match=r"channel_embed is \(1, 5, 16\), config.json wants \(1, 6, 16\)"):
        from_pretrained(folder)


def test_mixed_channels_stay_as_they_are(tmp_path):
    plain = VisionMamba(VimConfig(d_model=16, depth=1, img_size=16, patch_size=8, num_classes=0))
    folder = plain.save_pretrained(tmp_path / "mixed")
    assert not {"channels", "channel_sets"} & json.loads((folder / "config.json").read_text()).keys()
    assert "channel_embed" not in plain.state_dict()
    with pytest.raises(UserError, match="has channels 'mixed', which cannot become 'tokens': pretrain with"):
        from_pretrained(folder, channels="tokens")
    with pytest.raises(UserError, match="has channels 'mixed', of which none can be chosen"):
        from_pretrained(folder, chosen_channels=[0])


@pytest.mark.parametrize(("change", "line"), [
    ({"channels": "token"}, "channels is 'token': choose from mixed, tokens"),
    ({"channels": "mixed"}, "pictures have 1 or 3 of 5 bands, and channels is 'mixed', which takes all: pretrain with"),
    ({"channel_sets": [[0], [1]]}, r"channel_sets is \[\[0\], \[1\]\]: two sets have the same length"),
    ({"channel_sets": [[0, 5]]}, r"channel_sets has \[0, 5\]: give different numbers of \[0, 1, 2, 3, 4\]"),
    ({"channel_sets": [[0, 0]]}, r"channel_sets has \[0, 0\]: give different numbers"),
    ({"channel_sets": [[]]}, r"channel_sets has \[\]: give different numbers"),
    ({"channel_sets": [0, 1]}, r"channel_sets is \[0, 1\]: it must be a list of lists of channels"),
])  # fmt: skip
def test_refused_configs(change, line):
    with pytest.raises(UserError, match=line):
        VimConfig.from_dict(CONFIG.to_dict() | change)


def test_a_picture_of_another_number_of_channels():
    with pytest.raises(UserError, match="pictures have 4 channels, the backbone wants 1 or 3 or 5"):
        model()(draw(1, 4, 16, 24))


SETS = Preprocessing(
    mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), bands=(7, 2, 4), dtype="float32",
    range=((0.0, 0.0, 0.0), (1.0, 2.0, 4.0)), sets=((2, 4, 5), (4, 2, 7, 9, 11)),
)  # fmt: skip


def test_a_file_gives_its_bands_in_the_order_of_the_model():
    """The order in which a file stores its bands changes nothing."""
    SETS.check()
    assert SETS.channel_sets == ((1, 2),)
    assert Preprocessing.from_dict(SETS.to_dict()) == SETS
    values = {band: torch.rand(6, 4).numpy() for band in (2, 4, 5, 7, 9, 11)}
    for held, order in (((2, 4, 5), (2, 4)), ((4, 2, 7, 9, 11), (7, 2, 4))):
        got = SETS.model_input(torch.tensor([values[band].tolist() for band in held]).numpy())[0]
        for plane, band in zip(got, order, strict=True):
            k = SETS.bands.index(band)
            want = (torch.from_numpy(values[band]) / SETS.range[1][k] - SETS.mean[k]) / SETS.std[k]
            torch.testing.assert_close(plane, want)
    with pytest.raises(UserError, match="it holds 4 bands, and files of 3 or 5 are known"):
        SETS.of_file(4)
    few = replace(SETS.of_file(5), bands=(7,), mean=(0.1,), std=(1.0,), range=((0.0,), (1.0,)), sets=SETS.sets)
    assert few.channel_sets is None
    with pytest.raises(UserError, match=r"it holds the bands \[2, 4, 5\], none of \[7\]"):
        few.of_file(3)


@pytest.mark.parametrize(("change", "line"), [
    ({"sets": [[2, 4], [4, 2, 7], [7, 9, 11]]}, "two sets have the same length"),
    ({"sets": [[2, 4]]}, "bands has 7, which no file of the sets"),
    ({"sets": [[2, 9], [4, 7, 9]], "bands": [7, 2, 7]}, r"bands are \[7, 2, 7\]: of files with different bands, name"),
    ({"sets": [[2, 7, 9], [4, 2, 9, 11]]}, r"of the bands \[7, 2, 4\], what files hold is \[\[0, 1\], \[1, 2\]\]: two"),
    ({"sets": [[2, -4, 7, 4]]}, "both are numbers of bands, counted from 0"),
    ({"sets": [[2.5]]}, "make no sense"),
    ({"sets": 5}, "make no sense"),
])  # fmt: skip
def test_sets_that_make_no_sense(change, line):
    with pytest.raises(UserError, match=line):
        Preprocessing.from_dict(SETS.to_dict() | change)
