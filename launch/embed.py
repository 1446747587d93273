"""Features of all pictures of a source: `python -m launch.embed BACKBONE SOURCE OUT`; parquet, npy or safetensors.

The work is that of `vim_backbone.embed`; here are the sources and formats of launch, several processes, and pictures to
look at. `python -m launch [OPTIONS] launch/embed.py ...` starts a process for each GPU.
"""

if not __package__:  # started as a file: import from this checkout, never from the folder of this file
    import sys
    from pathlib import Path

    _ROOT = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(_ROOT), str(_ROOT / "kernels")]

if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while all is imported ends this without a traceback

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from launch.data.first_look import look_at_first
from launch.data.loading import number_of_workers
from launch.data.reading import read_pixels
from launch.data.sources import ImageSource, open_source, what_was_left_out
from launch.data.streams import Stream
from launch.embedding.pages import draw_components, draw_neighbours, nearest_neighbours, thumbnail
from launch.embedding.processes import Processes
from launch.run.cli import leave, run
from launch.run.progress import ProgressReport, user_console
from vim_backbone import Transform, VisionMamba
from vim_backbone.embedding.features import Selection, compute
from vim_backbone.embedding.job import Job, parser_of
from vim_backbone.embedding.parts import Parts
from vim_backbone.embedding.work import Progress
from vim_backbone.errors import UserError, require


class Reader:
    """Pictures of a source as a backbone's input."""

    def __init__(self, source: ImageSource, transform: Transform) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """As the source has it."""
        return self.source.name(index)

    def read(self, index: int) -> Tensor:
        """(1, c, h, w). Raises anything that a decoder raises."""
        transform = self.transform
        with self.source.open(index) as picture:
            return transform.from_values(read_pixels(picture, transform.preprocessing, transform.max_megapixels))

    def look(self, index: int) -> Tensor:
        """The picture to look at, small."""
        return thumbnail(self.read(index), self.transform.preprocessing)


def draw(folder: Path, model: VisionMamba, pictures: Reader, parts: Parts, samples: int) -> None:
    """Write components.png and neighbours.png of some pictures, spread over the source."""
    indices, pooled = [], []
    for tensors, _ in parts.read(["pooled"]):
        indices += tensors["index"].tolist()
        pooled += [tensors["pooled"]] if len(tensors["index"]) else []
    count = min(samples, len(indices))
    rows = [place * len(indices) // count for place in range(count)]
    chosen = [indices[row] for row in rows]
    images = [pictures.read(index).to(model.pos_embed.device) for index in chosen]
    maps = [compute(model, [image[0]], Selection(("patches",)))[0]["patches"] for image in images]
    names = [pictures.name(index) for index in chosen]
    folder.mkdir(parents=True, exist_ok=True)
    small = [thumbnail(image, pictures.transform.preprocessing) for image in images]
    draw_components(folder / "components.png", small, maps, names)
    if len(indices) > 1:
        cosines, neighbours = nearest_neighbours(torch.cat(pooled), rows)
        places = torch.tensor(indices)[neighbours]
        draw_neighbours(folder / "neighbours.png", chosen, cosines, places, pictures.look, pictures.name)


def arguments_of(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError for a number out of range."""
    sources = "a folder of pictures, .parquet, .arrow, .tar or .zip files, hf:NAME, or photos"
    parser = parser_of("launch.embed", __doc__, sources)
    parser.add_argument("--split", default="train", help="split of a data set")
    parser.add_argument("--column", help="image column of a data set; the first one when not given")
    parser.add_argument(
        "--pictures", type=int, default=0, metavar="N", help="draw components and neighbours of N samples"
    )
    arguments = parser.parse_args(argv)
    require(arguments.pictures >= 0, "--pictures", arguments.pictures, "it cannot be negative")
    return arguments


def main(argv: list[str]) -> None:
    """Embed, name bad pictures, and print the file last."""
    arguments = arguments_of(argv)
    processes = Processes()
    first = processes.share.rank == 0
    console = user_console()
    arguments.device = processes.device(arguments.device)
    job = Job.of(arguments)
    source = open_source(arguments.source, split=arguments.split, column=arguments.column, streaming=False)
    assert not isinstance(source, Stream)
    look_at_first(source, job.transform.preprocessing, arguments.max_megapixels)
    pictures = Reader(source, job.transform)
    parts = Parts(arguments.out, len(source))
    settings = job.settings(pictures, split=arguments.split, column=arguments.column)

    def start() -> str:
        job.start(parts, settings)
        return json.dumps(settings)

    if processes.on_first(start) != json.dumps(settings):
        raise UserError(f"{arguments.source} or {arguments.backbone} is not the same for all processes: try again")

    def say(line: str) -> None:
        console.print(line, markup=False)

    for line in what_was_left_out(source) if first else []:
        say(line)
    with ProgressReport(user_console(quiet=not first), "pictures", len(source), parts.pictures_done()) as report:

        def show(progress: Progress) -> None:
            bad = f"{progress.bad} bad" if progress.bad else ""
            report.update(progress.done, "  ".join(filter(None, [report.rate(), bad])))

        job.compute(pictures, parts, number_of_workers(arguments.workers), say, show, processes.share)
        processes.wait()
        if first and processes.share.processes > 1:  # what the others did last
            show(Progress(parts.pictures_done(), len(parts.bad())))

    def finish() -> None:
        job.write(pictures, parts, say)
        if arguments.pictures:
            folder = arguments.out.with_name(f"{arguments.out.stem}_pictures")
            draw(folder, job.model, pictures, parts, arguments.pictures)
        parts.remove()

    processes.on_first(finish)
    if first:
        print(arguments.out)  # noqa: T201 - the command's result


if __name__ == "__main__":
    leave(run(main))
