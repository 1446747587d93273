"""The benchmark of dense tasks: which cases are left, what is pretrained on, and one case of each task."""

import json

import pytest
from matplotlib.figure import Figure
from PIL import Image

from benchmarks import dense, dense_page
from finetune.sample_data import KINDS, Sizes

TINY = ["--steps=1", "--depth=2", "--pretraining=1", "--workers=0", "--readers=0", "--pretrain-with", "batch_size=4",
        "--tune-with", "head.channels=16"]  # fmt: skip


@pytest.fixture
def options(tmp_path, monkeypatch):
    """Of a data set of drawn shapes in the place of the real one."""

    def make(data, *more):
        task = dense.RECIPES[data].task
        KINDS[task][0](tmp_path / data, Sizes(6, 3, 64, 0))
        words = [f"--data={data}", f"--folder={tmp_path / data}", f"--work={tmp_path / 'work'}", *TINY, *more]
        (tmp_path / "work").mkdir(exist_ok=True)
        return dense.parse_options(words)

    return make


@pytest.mark.parametrize(("data", "score"), [("lesions", "mIoU"), ("facades", "mask_AP")])
def test_a_case_is_pretrained_once_and_scored(options, data, score):
    given = options(data, "--sizes", "64", "--nets", "pooled", "vit", "--seeds", "1", "--starts", "own", "scratch")
    rows = [dense.run_case(case, given) for case in dense.cases(given)]
    assert [(row["start"], row["net"]) for row in rows] == [
        ("own", "pooled"), ("scratch", "pooled"), ("own", "vit"), ("scratch", "vit")
    ]  # fmt: skip
    saved = json.loads(
        (given.work / f"{rows[0]['data']}-1-64-own-pooled/evaluations/step-00000001/metrics.json").read_text()
    )
    assert rows[0][score] == saved[score]
    spent = [row["pretraining_seconds"] for row in rows]
    assert spent[1::2] == [0, 0]
    before = (given.work / f"pretrain-{data}-vit.json").read_text()
    assert dense.backbone_of(dense.cases(given)[2], given)[1] == json.loads(before)


def test_cases_come_by_the_lists_and_not_again(options):
    given = options(
        "lesions", "--sizes", "128", "64", "--seeds", "0", "1", "--nets", "vim", "vit", "--starts", "scratch"
    )
    order = [(0, 128, "vim"), (1, 128, "vim"), (0, 128, "vit"), (0, 64, "vim"), (1, 128, "vit"), (1, 64, "vim"),
             (0, 64, "vit"), (1, 64, "vit")]  # fmt: skip
    assert [(case.seed, case.size, case.net) for case in dense.cases(given)] == order
    done = dense.cases(given)[3]
    (given.work / dense.ROWS).write_text(json.dumps(done._asdict() | {"step": 1}) + "\n")
    assert [(case.seed, case.size, case.net) for case in dense.cases(given)] == order[:3] + order[4:]


def test_large_pictures_are_cut_at_three_sizes_and_small_ones_are_not(tmp_path):
    for name, side in (("large", (1200, 1030)), ("small", (640, 640))):
        (tmp_path / name).mkdir()
        Image.new("RGB", side).save(tmp_path / name / "a.jpg")
    assert dense.tiles(tmp_path / "small", tmp_path / "none") == tmp_path / "small"
    cut = sorted(Image.open(path).size for path in dense.tiles(tmp_path / "large", tmp_path / "tiles").iterdir())
    assert cut == sorted([*[(400, 343), (400, 344), (400, 343)] * 3, *[(300, 257), (300, 258)] * 2, (300, 257)])


def test_the_plot_has_a_bar_for_each_group_of_seeds(monkeypatch, tmp_path):
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: saved.append(figure))
    rows = [
        {"data": "lesions", "seed": seed, "size": size, "start": start, "net": "vim", "label": "", "step": 1,
         "mIoU": size / 1000 + seed, "seconds": 1}
        for seed in (0, 1) for size in (100, 200) for start in ("scratch", "own")
    ]  # fmt: skip
    dense_page.draw(tmp_path / "dense.png", rows, "a run")
    assert [bar.get_width() for bar in saved[0].axes[0].patches] == pytest.approx([0.6, 0.6, 0.7, 0.7])
    names = [text.get_text() for text in saved[0].axes[0].get_yticklabels()]
    assert names == ["100 px vim, own", "100 px vim, scratch", "200 px vim, own", "200 px vim, scratch"]


def test_a_score_has_the_deviation_of_its_seeds():
    scores = [{"mIoU": 0.1}, {"mIoU": 0.3}]
    assert dense_page.spread(scores, "mIoU") == "0.200 ± 0.141"  # 0.1 * 2 ** 0.5
    assert dense_page.spread(scores[:1], "mIoU") == "0.100"
