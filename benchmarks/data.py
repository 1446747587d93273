"""How fast pictures are read: loaders of pretraining and the three tasks beside decoding alone and timm's loader.

`python -m benchmarks.data` makes JPEG, PNG, WebP and TIFF pictures of 0.2 to 20 megapixels out of photographs and
prints for each reader images a second, and images and megapixels a second of a core's time (of all processes, so that
a busy machine counts less), beside decoding alone. The first batches, at least 40, are not counted. `--out DIR` adds a
CSV and a plot, `--plot CSV PNG` draws a table measured before.

`--step 37 --batch 256 --workers 2 4 8 14` measures waiting: the share of the time that a consumer whose steps take
37 ms waits for the next batch, with so many workers, and the cores that would have to read for it not to wait.

"decode" decodes whole pictures, "draft" what pretraining has to: a JPEG at the scale that holds the crop; "torch" is
`data.resize`.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import matplotlib.pyplot as plt
import psutil
import torch
from matplotlib.ticker import LogLocator
from PIL import Image
from timm.data.dataset_factory import create_dataset
from timm.data.loader import create_loader
from timm.data.readers import add_img_extensions
from torch.utils.data import Dataset

from benchmarks.machine import clock, read_csv, versions, write_csv
from benchmarks.pictures import FORMATS, instances, write_maps, write_pictures
from finetune.batches import training_batches
from finetune.classification.config import AugmentConfig
from finetune.classification.data import ClassSamples
from finetune.classification.transforms import mend_posterize, training_transform
from finetune.detection.config import JitterConfig
from finetune.detection.data import CocoSplit, TrainPictures
from finetune.segmentation.config import CropConfig, SegmentationData
from finetune.segmentation.data import Pairs, TrainCrops
from launch.data.crops import random_crop
from launch.data.folders import ImageFiles
from launch.data.images import open_picture
from launch.data.labelled import Labelled
from launch.data.loading import loader_of, number_of_workers
from launch.data.order import BatchPlan, StepSampler
from launch.data.resize import Resizer
from launch.run.randomness import generator
from pretrain.data import DataConfig, View, build_loader
from pretrain.mae.objective import MAE
from pretrain.stages import Stage
from vim_backbone.preprocessing import RGB

AHEAD = 4
"""Batches that a worker reads ahead in the readers that are made here."""
CLASSES = 8


class Case(NamedTuple):
    """What is read, and by how many."""

    kind: str
    megapixels: float
    paths: list[Path]
    folder: Path
    batch: int
    batches: int
    """How many a reader must be able to give."""
    workers: int


class Decoded(Dataset[int]):
    """Pictures that are decoded and thrown away."""

    def __init__(self, paths: list[Path], pixels: int | None) -> None:
        """With `pixels`, a JPEG at the scale that pretraining takes for its crops to views of this side."""
        self.paths = paths
        self.pixels = pixels

    def __getitem__(self, item: tuple[int, int]) -> int:
        with open_picture(self.paths[item[1]]) as image:
            if self.pixels:
                left, upper, right, lower = random_crop(*image.size, DataConfig().min_scale, generator(0, *item))
                surplus = min(right - left, lower - upper) / self.pixels
                if surplus >= 2:
                    image.draft("RGB", (int(image.width / surplus), int(image.height / surplus)))
            image.load()
        return item[1]


def decoding(case: Case, pixels: int | None) -> Iterable[Any]:
    """Decoding alone, in the processes of the product's loader."""
    sampler = StepSampler(len(case.paths), 0, BatchPlan(case.batch, 1, 1, 0), 0, case.batches)
    return loader_of(Decoded(case.paths, pixels), len, 0, case.workers, AHEAD, batch_sampler=sampler)


def pretraining(case: Case, pixels: int, resize: Resizer = "pillow") -> Iterable[Any]:
    """Views of masked pretraining."""
    data = DataConfig(workers=case.workers, max_bad_share=0.0, resize=resize)
    view = View((pixels, pixels), (pixels // 16, pixels // 16), data, MAE().draw)
    stage = Stage(range(case.batches), view.img_size, BatchPlan(case.batch, 1, 1, 0))
    return build_loader(ImageFiles(case.paths), view, 0, [stage])


def finetuning(case: Case, samples: Any) -> Iterable[Any]:
    """Training batches of a task."""
    return training_batches(samples, 0, BatchPlan(case.batch, 1, 1, 0), 0, case.batches, case.workers)


def classification(case: Case, pixels: int) -> Iterable[Any]:
    """DeiT's augmentation."""
    labelled = Labelled(ImageFiles(case.paths), [i % 2 for i in range(len(case.paths))], ["a", "b"])
    transform = training_transform((pixels, pixels), AugmentConfig())
    return finetuning(case, ClassSamples(labelled, transform, RGB, DataConfig().max_megapixels))


def segmentation(case: Case, pixels: int) -> Iterable[Any]:
    """Crops with maps."""
    maps = write_maps(case.folder, case.megapixels, len(case.paths), CLASSES)
    data = SegmentationData(source=str(case.folder), num_classes=CLASSES, zero_is_ignored=False)
    return finetuning(case, TrainCrops(Pairs(case.paths, maps, data, CLASSES), (pixels, pixels), CropConfig()))


def detection(case: Case, pixels: int) -> Iterable[Any]:
    """Jittered pictures with boxes and masks."""
    images, annotations = [], {}
    for number, path in enumerate(case.paths):
        with Image.open(path) as image:
            width, height = image.size
        images.append({"id": number, "file_name": str(path), "width": width, "height": height})
        annotations[number] = instances(width, height, number)
    split = CocoSplit(images, annotations, [{"id": 1, "name": "ellipse"}])
    return finetuning(case, TrainPictures(split, (pixels, pixels), JitterConfig(), masks=True))


def timm_loader(case: Case, pixels: int, **augmentation: Any) -> Iterable[Any]:
    """uint8 batches of timm's loader, before they are brought to a device."""
    add_img_extensions([f".{kind}" for kind in FORMATS])
    dataset: Any = create_dataset("", root=str(case.paths[0].parents[1]))
    samples = dataset.reader.samples
    dataset.reader.samples = samples * -(-case.batch * case.batches // len(samples))  # one long epoch
    loader: Any = create_loader(
        dataset, (3, pixels, pixels), case.batch, is_training=True, interpolation="bicubic", num_workers=case.workers,
        device=torch.device("cpu"), pin_memory=torch.cuda.is_available(), **augmentation,
    )  # fmt: skip
    mend_posterize(dataset.transform)
    return loader.loader


def timm_plain(case: Case, pixels: int) -> Iterable[Any]:
    """Crops and mirror images as pretraining has them."""
    return timm_loader(case, pixels, scale=(DataConfig().min_scale, 1.0), color_jitter=0.0)


def timm_augmented(case: Case, pixels: int) -> Iterable[Any]:
    """DeiT's augmentation, all but the erasing, which timm does on the device."""
    augment = AugmentConfig()
    return timm_loader(case, pixels, scale=(augment.min_scale, 1.0), auto_augment=augment.auto_augment)


READERS: dict[str, tuple[int, Callable[[Case, int], Iterable[Any]]]] = {
    "decode": (0, lambda case, pixels: decoding(case, None)),  # noqa: ARG005
    "draft": (224, decoding),
    "pretraining": (224, pretraining),
    "pretraining, torch": (224, partial(pretraining, resize="torch")),
    "timm": (224, timm_plain),
    "classification": (224, classification),
    "timm, augmented": (224, timm_augmented),
    "segmentation": (512, segmentation),
    "detection": (1024, detection),
}
"""Name -> side of the views in pixels, and what gives batches of them."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--megapixels", type=float, nargs="+", default=[0.2, 1.0, 4.0, 20.0])
    parser.add_argument("--pixels", type=int, help="side of the views of every reader")
    parser.add_argument("--workers", type=int, nargs="+", default=[number_of_workers(None)])
    parser.add_argument("--steps", type=int, default=300, help="batches that are measured")
    parser.add_argument("--skip", type=int, default=40, help="batches before them, and all that can be read ahead")
    parser.add_argument("--batch", type=int, help="pictures; without it 16 a megapixel, from 1 to 64")
    parser.add_argument("--step", type=float, help="ms of the consumer's step: measures waiting")
    parser.add_argument("--files", type=int, help="of each case; without it 100 megapixels of them, from 4 to 64")
    parser.add_argument("--seconds", type=float, help="start no case after so many")
    parser.add_argument("--pictures", type=Path, help="folder in which the pictures stay for the next time")
    parser.add_argument("--out", type=Path, help="folder for data.csv and data.png, or waiting.csv and waiting.png")
    parser.add_argument("--plot", type=Path, nargs=2, metavar=("CSV", "PNG"), help="only draw a table measured before")
    return parser.parse_args()


class Consumed(NamedTuple):
    """What a consumer met."""

    seconds: float
    waited: float
    cpu_seconds: float
    """Of this process and of those that it started."""


def consume(batches: Iterable[Any], skip: int, steps: int, step_seconds: float = 0.0) -> Consumed:
    """Take `steps` batches after the first `skip`, each for a step of so many seconds, in which nothing is computed."""
    iterator: Iterator[Any] = iter(batches)
    begun, spent, waited = 0.0, 0.0, 0.0
    for number in range(skip + steps):
        if number == skip:
            begun, spent, waited = time.perf_counter(), cpu_seconds(), 0.0
        asked = time.perf_counter()
        next(iterator)
        waited += time.perf_counter() - asked
        time.sleep(step_seconds)
    return Consumed(time.perf_counter() - begun, waited, cpu_seconds() - spent)


def cpu_seconds() -> float:
    """Of this process and its children."""
    children = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(times.user + times.system for times in children)


def measure(reader: str, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """A row of the table."""
    pixels, batches_of = READERS[reader]
    pixels = options.pixels or pixels if pixels else 0
    skip = max(options.skip, (AHEAD + 1) * case.workers)
    case = case._replace(batches=skip + options.steps + (AHEAD + 1) * case.workers)
    step = (options.step or 0.0) / 1e3
    took = consume(batches_of(case, pixels), skip, options.steps, step)
    images = options.steps * case.batch
    row: dict[str, Any] = {
        "format": case.kind, "megapixels": case.megapixels,
        "KB a file": sum(path.stat().st_size for path in case.paths) / len(case.paths) / 1e3,
        "reader": reader, "pixels": pixels or "", "batch": case.batch, "workers": case.workers,
        "images/s": images / took.seconds,
    }  # fmt: skip
    if step:
        needed = took.cpu_seconds / images * case.batch / step
        row |= {"step ms": options.step, "waiting": took.waited / took.seconds, "cores needed": needed}
    else:
        a_core = images / took.cpu_seconds
        row |= {"images/s a core": a_core, "megapixels/s a core": a_core * case.megapixels}
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}


def beside_decoding(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one case with the time of a core that each picture takes, in that of decoding alone."""
    floor = next((row["images/s a core"] for row in rows if row["reader"] == "decode"), None)
    return [row | {"time / decode": float(f"{floor / row['images/s a core']:.3g}") if floor else ""} for row in rows]


def plot(table: Path, picture: Path) -> None:
    """Megapixels a second of a core by size, or waiting by workers: a panel a format, a line a reader (and size)."""
    rows = read_csv(table)
    waits = "waiting" in rows[0]
    x, y = ("workers", "waiting") if waits else ("megapixels", "megapixels/s a core")
    kinds = list(dict.fromkeys(row["format"] for row in rows))
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(4.5 + 2.8 * len(kinds), 4), layout="constrained", sharey=True, squeeze=False
    )
    ticks = sorted({float(row[x]) for row in rows})
    colours: dict[str, str] = {}
    for axis, kind in zip(axes[0], kinds, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in (row for row in rows if row["format"] == kind):
            name = f"{row['reader']}, {row['megapixels']} MP" if waits else row["reader"]
            lines.setdefault(name, []).append((float(row[x]), float(row[y])))
        for name, points in lines.items():
            style = "o--" if name.startswith(("decode", "draft")) else "o-"
            colour = colours.setdefault(name, f"C{len(colours)}")
            axis.plot(*zip(*sorted(points), strict=True), style, color=colour, markersize=3, label=name)
        axis.set_title(kind, fontsize=9)
        axis.set_xlabel(x)
        axis.grid(alpha=0.3)
        if waits:
            axis.set_ylim(0, 1)
        else:
            axis.set(xscale="log", yscale="log")
            axis.minorticks_off()
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[0][0].set_ylabel(f"share of the time waiting, steps of {rows[0]['step ms']} ms" if waits else y)
    shown = {str(line.get_label()): line for axis in axes[0] for line in axis.lines}
    figure.legend(list(shown.values()), list(shown), loc="outside right center", fontsize=7)
    figure.suptitle(f"{rows[0]['run']}\n{rows[0]['device']}", fontsize=8)
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def print_rows(rows: list[dict[str, Any]], head: bool) -> None:
    """As Markdown."""
    if head:
        print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |", flush=True)


def main() -> None:
    """Measure and print."""
    options = parse()
    if options.plot:
        plot(*options.plot)
        return
    name = "waiting" if options.step else "data"
    about = {
        "run": f"{name}, {options.steps} batches after {options.skip} or all that can be read ahead",
        "device": f"{clock('cpu')}, {joblib.cpu_count()} cores",
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(*about.values(), sep="\n", end="\n\n")
    rows: list[dict[str, Any]] = []
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.pictures or Path(temporary)
        for megapixels in options.megapixels:
            count = options.files or min(64, max(4, round(100 / megapixels)))
            batch = options.batch or min(64, max(1, round(16 / megapixels)))
            for kind in options.formats:
                if options.seconds and time.perf_counter() - begun > options.seconds:
                    print(f"{kind}, {megapixels:g} megapixels: not measured, {options.seconds:.0f} seconds are over")
                    continue
                paths = write_pictures(folder, kind, megapixels, count)
                for workers in options.workers:
                    case = Case(kind, megapixels, paths, folder, batch, 0, workers)
                    readers = [r for r in options.readers if kind == "jpeg" or r != "draft"]
                    found = [measure(reader, case, options) for reader in readers]
                    found = found if options.step else beside_decoding(found)
                    print_rows(found, head=not rows)
                    rows += found
                    if options.out:  # after each case, for whoever stops it
                        write_csv(options.out / f"{name}.csv", rows, about)
                        plot(options.out / f"{name}.csv", options.out / f"{name}.png")


if __name__ == "__main__":
    main()
