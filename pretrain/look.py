"""One page on what a run would read: `python -m pretrain.look SOURCE [--config FILE.yaml] [--field VALUE ...]`."""

import sys
from dataclasses import dataclass
from pathlib import Path

from launch.data.first_look import look_at_first
from launch.data.sources import length_of
from launch.data.statistics import require_statistics
from launch.run.cli import run
from launch.run.progress import ProgressReport, user_console
from pretrain.config import PretrainConfig
from pretrain.data import View, source_field
from pretrain.initial import parse_run
from pretrain.look_page import draw_page
from pretrain.survey import survey
from pretrain.watching.sets import hold_out
from vim_backbone.errors import UserError, require
from vim_backbone.files import explain

DESCRIPTION = "Draw what a run of these fields would read, on one page."


@dataclass(frozen=True, kw_only=True)
class LookConfig(PretrainConfig):
    """The fields of pretraining, and the page."""

    page: str = "look.png"
    """PNG file to write."""
    pictures: int = 100
    """How many pictures are read, the first of the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.pictures >= 1, "pictures", self.pictures, "it must be at least 1")
        require(self.page.lower().endswith(".png"), "page", self.page, "its name must end in .png")


def main(argv: list[str]) -> None:
    """Read the first pictures of the run, draw the page, and print its path last."""
    if argv and not argv[0].startswith("-"):
        argv = [f"--data.{source_field(argv[0])}={argv[0]}", *argv[1:]]
    config = parse_run(LookConfig, argv, "pretrain.look SOURCE", DESCRIPTION)
    data = config.data
    require_statistics(data.preprocessing)
    source, _ = hold_out(data.open(), config.eval.share, config.seed)
    architecture = config.architecture()
    view = View(architecture.img_size, architecture.grid(*architecture.img_size), data, config.method.draw)
    console = user_console()
    total = min(config.pictures, length_of(source) or config.pictures)
    with ProgressReport(console, "pictures", total) as report:
        surveyed = survey(source, view, config.seed, config.pictures, report)
    try:
        look_at_first(source, data.preprocessing, data.max_megapixels, data.max_bad_share)
    except UserError as error:
        surveyed.refusal = f"a run of these fields ends at its start: {error}"
    for line in filter(None, [*surveyed.notes, *surveyed.problems(), surveyed.refusal]):
        console.print(line, markup=False)
    try:
        draw_page(surveyed, view, config, Path(config.page))
    except OSError as error:
        raise UserError(f"cannot write {config.page}: {explain(error)}; set page") from error
    print(config.page)  # noqa: T201 - the command's result


if __name__ == "__main__":
    sys.exit(run(main))
