"""Features of all pictures of a folder, as one file: `python -m vim_backbone.embed BACKBONE FOLDER OUT`.

It needs what the library needs and no more; `launch.embed`, in a clone, does the same for other sources and formats, in
several processes, and draws what it computed.
"""

import os
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

from PIL import Image
from torch import Tensor

from vim_backbone.embedding.job import Job, parser_of
from vim_backbone.embedding.parts import Parts
from vim_backbone.embedding.work import Progress
from vim_backbone.errors import UserError, escaped, require
from vim_backbone.images import suffixes
from vim_backbone.listing import files_ending
from vim_backbone.transform import ARRAYS, Transform

IS_PICTURE = "it is one of the pictures; choose another name"
MOST_THREADS = 16
LINE_SECONDS = 5.0
"""Between lines on the progress."""


class FolderPictures:
    """Picture files below a folder, at any depth; of a backbone of bands .npy files."""

    def __init__(self, folder: Path, transform: Transform) -> None:
        """Raises UserError where there are none."""
        endings = {ARRAYS} if transform.preprocessing.bands is not None else suffixes() | {ARRAYS}
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder: give a folder of pictures")
        self.root, self.transform = os.path.join(folder, ""), transform
        self.left_out = Counter[str]()
        """Other files, by their ends."""
        self.paths = files_ending(folder, endings, self.left_out)
        if not self.paths:
            raise UserError(f"no pictures below {folder}: it has no file ending in {', '.join(sorted(endings))}")

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Path below the folder."""
        return escaped(self.paths[index].removeprefix(self.root).replace(os.sep, "/"))

    def read(self, index: int) -> Tensor:
        """The backbone's input (1, c, h, w)."""
        return self.transform.read(self.paths[index])


class Lines:
    """The progress, a line now and then."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.before = total, done
        self.began = self.last = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        """Say so many pictures are done, where a line is due."""
        now, (done, bad) = time.monotonic(), progress
        if now - self.last < LINE_SECONDS and done < self.total:
            return
        self.last = now
        rate = max(done - self.before, 1) / max(now - self.began, 1e-9)
        left = timedelta(seconds=round((self.total - done) / rate))
        words = [f"pictures {done}/{self.total}", f"{rate:.1f} a second", f"{bad} bad" * bool(bad)]
        say("  ".join(filter(None, [*words, f"about {left} left" * (done < self.total)])))


def same_file(path: str, out: Path) -> bool:
    """Whether a path leads to the output that is there."""
    return os.path.basename(path) == out.name and out.exists() and out.samefile(path)


def say(line: str) -> None:
    """A line beside the result."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - command line


def number_of_threads(workers: int | None) -> int:
    """As asked for, else of the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return workers or min(MOST_THREADS, cores)


def embed(argv: list[str] | None = None) -> Path:
    """Embed, name bad pictures, and return the file that was written. Raises UserError."""
    parser = parser_of("python -m vim_backbone.embed", __doc__, "a folder of pictures, at any depth")
    arguments = parser.parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("this command is one process: several take their shares with launch.embed, in a clone")
    Image.MAX_IMAGE_PIXELS = None  # --max_megapixels is the limit
    job = Job.of(arguments)
    pictures = FolderPictures(Path(arguments.source).expanduser(), job.transform)
    parts = Parts(arguments.out, len(pictures))
    require(not any(same_file(path, arguments.out) for path in pictures.paths), "out", str(arguments.out), IS_PICTURE)
    job.start(parts, job.settings(pictures))
    if pictures.left_out:
        ends = ", ".join(f"{count} {end or 'without an ending'}" for end, count in pictures.left_out.most_common(5))
        say(f"left out, for their endings: {ends}")
    progress = Lines(len(pictures), parts.pictures_done())
    job.compute(pictures, parts, number_of_threads(arguments.workers), say, progress)
    job.write(pictures, parts, say)
    parts.remove()
    return arguments.out


def main(argv: list[str] | None = None) -> int:
    """Command line; prints the file, or one line on an error and returns 2."""
    try:
        print(embed(argv))  # noqa: T201 - the command's result
    except UserError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("stopped: --resume goes on")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
