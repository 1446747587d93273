"""The benchmark of learning goes on with what is not there yet, and its table has every case of the folder."""

import pytest

from benchmarks import learning
from benchmarks.learning_page import draw, print_table, summary
from launch.run.metrics import read_rows
from vim_backbone.files import append_lines, json_line

SMALL = ["--data=cifar10", "--folder=nowhere", "--nets=vim", "--tune", "5:3", "all:3"]


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """What is trained or evaluated, each with a score of its own; the third ends the command once."""
    made, broken = [], []

    def classify(self, folder, *how):
        if len(made) == 2 and not broken:
            broken.append(True)
            raise RuntimeError("the machine is gone")
        made.append((self.objective, self.seed, folder.name, how))
        return len(made) / 10

    monkeypatch.setattr(learning.Case, "classify", classify)
    monkeypatch.setattr(
        learning.Case, "pretrained", lambda self: ({0 if self.objective == "scratch" else 7: tmp_path / "at"}, 1.5)
    )
    return made


def test_a_command_goes_on_with_what_is_not_there(calls, tmp_path, capsys):
    options = learning.parse_options([*SMALL, f"--work={tmp_path}", "--objectives", "mae", "scratch", "--seeds", "0"])
    assert [failure and failure[:20] for failure in learning.run_cases(options)] == ["vim mae 0 failed: th", None]
    assert list(learning.run_cases(options)) == [None, None]
    assert len(calls) == len(set(calls)) == 6  # linear, knn and two budgets, and of scratch the budgets
    rows = [row for name in ("vim-mae-0", "vim-scratch-0") for row in read_rows(tmp_path / name / "rows.jsonl")]
    assert [(row["objective"], row["what"], row["labels"], row["step"]) for row in rows] == [
        ("mae", "linear", 0, 7), ("mae", "knn", 0, 7), ("mae", "pretrained", 5, 7), ("mae", "pretrained", -1, 7),
        ("", "scratch", 5, 0), ("", "scratch", -1, 0),
    ]  # fmt: skip
    assert sorted(row["top1"] for row in rows) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_other_settings_have_a_folder_of_their_own(calls, tmp_path):
    argv = [*SMALL, f"--work={tmp_path}", "--objectives", "mae", "--seeds", "0"]
    calls += [None, None, None]
    list(learning.run_cases(learning.parse_options(argv)))
    more = [*argv, "--pretrain-with", "mae.gap_aware=true"]
    with pytest.raises(SystemExit, match=r"was made with pretrain_with \[\]: take another --label or --work"):
        list(learning.run_cases(learning.parse_options(more)))
    list(learning.run_cases(learning.parse_options([*more, "--label=gap"])))
    assert {row["label"] for row in read_rows(tmp_path / "vim-mae-gap-0/rows.jsonl")} == {"gap"}


def test_the_table_has_mean_deviation_and_cost(tmp_path, capsys):
    about = dict.fromkeys(("run", "device", "versions", "date"), "words")
    rows = [
        {"seed": seed, "net": "vim", "objective": objective, "label": label, "what": what, "labels": labels,
         "step": step, "top1": top1 + seed / 10, "pretraining_minutes": 2.0, "minutes": 1.0 + seed}
        for seed in (0, 1)
        for objective, label, what, labels, step, top1 in (
            ("mae", "", "linear", 0, 1, 0.3), ("mae", "", "linear", 0, 9, 0.5), ("mae", "gap", "linear", 0, 9, 0.6),
            ("", "", "scratch", 5, 0, 0.2),
        )
    ]  # fmt: skip
    last = summary(rows)[-1]
    assert (last["mean"], last["seeds"], last["minutes"]) == (pytest.approx(0.25), 2, 3.5)
    assert last["deviation"] == pytest.approx(0.1 / 2**0.5)
    print_table(rows, about)
    assert "| vim | mae | gap | linear | frozen | 9 | 0.650 | 0.071 | 2 | 3.50 |" in capsys.readouterr().out
    draw(tmp_path / "learning.png", rows, about)
    assert (tmp_path / "learning.png").stat().st_size > 1000


def test_equal_time_gives_each_objective_its_own_steps(tmp_path):
    argv = [*SMALL, f"--work={tmp_path}", "--seconds=60", "--objectives", "mae", "nepa"]
    options = learning.parse_options(argv)
    for objective, seconds in (("mae", "0.05"), ("nepa", "0.2")):
        (tmp_path / f"seconds-vim-{objective}.json").write_text(seconds)
    assert [learning.Case("vim", each, 0, options).steps() for each in ("mae", "nepa")] == [1200, 300]


def test_seconds_of_training_leave_out_what_a_restart_took(tmp_path):
    rows = [{"step": 10, "images_per_second": 100.0}, {"step": 20, "images_per_second": 50.0}, {"step": 20, "knn": 0.5}]
    append_lines(tmp_path / "metrics.jsonl", "".join(map(json_line, rows)))
    assert list(learning.seconds_of(read_rows(tmp_path / "metrics.jsonl"), 20)) == [2.0, 4.0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--data=cifar10"], "needs --folder"),
        (["--nets", "pooled", "--objectives", "nepa"], "does not learn by nepa or ar"),
        (["--objectives", "distill"], "go together"),
        (["--steps=1", "--seconds=1"], "not both"),
        (["--measure"], "goes with --seconds"),
        (["--publish"], "timm does not know the ViT"),
    ],
)
def test_options_that_do_not_fit(argv, words, capsys):
    with pytest.raises(SystemExit):
        learning.parse_options(argv)
    assert words in capsys.readouterr().err
