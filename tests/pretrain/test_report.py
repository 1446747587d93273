"""The page on runs: what it holds, what it leaves out, and that nothing in a run's folder breaks it."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from finetune.registry import TASKS
from launch.run.config import field_types, write_config
from launch.run.metrics import read_rows
from pretrain.charts import INK, Curve, chart, thinned
from pretrain.config import PretrainConfig
from pretrain.report import MOST_PICTURES, main, read_run, spread
from vim_backbone import UserError


class Page(HTMLParser):
    """Tags with their attributes, and text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data.strip())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def rows_to(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run_of(folder, steps=5, pictures=(2, 4), **fields):
    folder.mkdir(parents=True)
    write_config(PretrainConfig(name=folder.name, **fields), folder / "config.yaml")
    rows_to(
        folder / "metrics.jsonl",
        [{"step": s, "loss": 2.0 / s, "lr": 1e-3, "grad_norm": None, "new_metric": s} for s in range(1, steps + 1)],
    )
    rows_to(folder / "log.jsonl", [{"time": "2026-01-01T00:00:00+00:00", "step": 0, "line": "begun", "start": True}])
    (folder / "reconstructions").mkdir()
    for step in pictures:
        Image.fromarray(np.full((8, 8, 3), step, np.uint8)).save(folder / f"reconstructions/step-{step:08d}.png")
    return folder


def test_a_page_holds_all_of_a_run_and_needs_no_network(tmp_path, capsys):
    folder = run_of(tmp_path / "first", batch_size=7)
    main([str(folder)])
    assert capsys.readouterr().out == f"{folder}/report.html\n"
    page = Page(folder / "report.html")
    pictures = page.all("img")
    assert [picture["data-step"] for picture in pictures] == ["2", "4"]
    assert ["hidden" in picture for picture in pictures] == [True, False]  # the last is shown
    drawn = [drawing["aria-label"] for drawing in page.all("svg")]
    assert drawn == ["loss over the steps", "learning rate over the steps", "new_metric over the steps"]
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "batch_size" in page.texts
    assert "begun" in page.texts
    assert "seed" not in page.texts  # as in a run without fields


def test_what_was_evaluated_stands_beside_what_was_trained(tmp_path):
    folders = [run_of(tmp_path / name) for name in ("watched", "alone")]
    rows = [{"step": s, "held_out_loss": 3.0 - s, "linear": s / 5, "knn": 0.25, "rank_me": 7.0, "eval_seconds": 1.5}
            for s in (0, 2)]  # fmt: skip
    with open(folders[0] / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    (folders[0] / "features").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folders[0] / "features/step-00000004.png")
    main([*map(str, folders), f"--out={tmp_path / 'both.html'}"])
    page = Page(tmp_path / "both.html")
    drawn = [drawing["aria-label"].removesuffix(" over the steps") for drawing in page.all("svg")]
    assert drawn == ["loss (dashed: held out)", "linear probe (dashed: nearest neighbours), top-1",
                     "RankMe, the effective rank of features", "learning rate", "new_metric"]  # fmt: skip
    facts = [text for text in page.texts if text]
    assert [facts[facts.index(name) + 1] for name in ("held-out loss (last)", "linear probe (last)")] == [
        "1.0000",
        "40.0%",
    ]
    assert facts[facts.index("evaluations") + 1] == "2, 3.0 s"
    assert "bad steps" in facts
    assert [each["aria-label"].split()[-1] for each in page.all("input")] == [
        "reconstructions",
        "features",
        "reconstructions",
    ]
    main([str(folders[1])])
    assert "evaluations" not in Page(folders[1] / "report.html").texts


def test_runs_side_by_side_with_the_fields_in_which_they_differ(tmp_path):
    folders = [run_of(tmp_path / "one", seed=1, batch_size=7), run_of(tmp_path / "two", seed=2, batch_size=7)]
    main([*map(str, folders), f"--out={tmp_path / 'both.html'}"])
    page = Page(tmp_path / "both.html")
    assert "seed" in page.texts
    assert "batch_size" not in page.texts
    assert len(page.all("input")) == 2


def test_what_stands_in_a_run_is_text_and_no_markup(tmp_path):
    folder = run_of(tmp_path / "<b>run")
    rows_to(folder / "log.jsonl", [{"time": "", "step": 3, "line": "<script>alert(1)</script>"}])
    rows_to(folder / "bad_steps.jsonl", [{"step": 3, "action": "<i>skip", "samples": []}])
    main([str(folder)])
    page = Page(folder / "report.html")
    assert "<script>alert(1)</script>" in page.texts
    assert len(page.all("script")) == 1
    assert not page.all("i")
    assert not page.all("b")


@pytest.mark.parametrize("name", ["metrics.jsonl", "log.jsonl", "bad_steps.jsonl"])
@pytest.mark.parametrize("content", [b"", b'{"step": 1, "lo', b"\xff\xfe\x00", b'[1]\n{"step": "x"}\n', None])
def test_a_run_that_is_young_or_damaged_has_a_page(name, content, tmp_path):
    folder = run_of(tmp_path / "run", pictures=(2,))
    (folder / "reconstructions/step-00000002.png").write_bytes(b"half")
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_bytes(content)
    main([str(folder)])
    assert not Page(folder / "report.html").all("img")


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match=r"is no run's folder \(it has no config.yaml\)"):
        main([str(tmp_path)])
    (tmp_path / "config.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="holds no fields"):
        main([str(tmp_path)])


def test_pictures_are_spread_over_the_steps(tmp_path):
    folder = run_of(tmp_path / "run", pictures=range(1, 101))
    steps = [step for step, _ in spread(read_run(folder).pictures["reconstructions"])]
    assert len(steps) == MOST_PICTURES
    assert steps[0] == 1
    assert steps[-1] == 100
    assert np.diff(steps).max() - np.diff(steps).min() <= 1


def test_curves_have_the_colours_of_the_page_and_the_means_of_many_steps():
    drawing = chart("loss", [Curve(list(range(5000)), [1.0, 3.0] * 2500, [10])])
    assert INK not in drawing
    assert "currentColor" in drawing
    assert re.match(r'<svg role="img" aria-label="loss over the steps"[^>]* viewBox=', drawing)
    steps, values = thinned(Curve(list(range(5000)), [1.0, 3.0] * 2500, []))
    assert len(steps) == 500
    assert (values == 2.0).all()
    assert steps.mean() == np.arange(5000).mean()


def test_rows_are_read_while_they_are_written(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    path.write_text('{"step": 1}\n{"step": 2, "loss"')
    assert read_rows(path) == [{"step": 1}]


def test_the_commands_of_a_page_are_read_by_the_programs(tmp_path):
    folder = run_of(tmp_path / "run")
    (folder / "backbone").mkdir()
    (folder / "backbone/config.json").write_text("{}")
    main([str(folder)])
    page = Page(folder / "report.html")
    lines = [line for text in page.texts for line in text.splitlines() if line.startswith("python -m launch ")]
    assert [line.split()[3] for line in lines] == ["pretrain/main.py", "pretrain/main.py", "finetune/main.py"]
    fields = {*field_types(PretrainConfig), *field_types(TASKS["classification"].config_class), "config"}
    assert {word[2:] for line in lines for word in line.split() if word.startswith("--")} <= fields
