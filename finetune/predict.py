"""Use a fine-tuned model: `python -m finetune.predict RUN PICTURES... [--out FOLDER]`; JSON and pictures come out."""

if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while all is imported ends this without a traceback

import argparse
import csv
import io
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from finetune.model_folder import read_description, read_weights
from finetune.pixels import pixels_of
from finetune.registry import TASKS
from finetune.task import MAX_MEGAPIXELS, Drawing, Prediction, Predictor
from launch.data.folders import files_below
from launch.data.reading import open_file
from launch.run.cli import run
from launch.run.progress import ProgressReport, user_console
from vim_backbone.errors import UserError, escaped, nearest, require
from vim_backbone.files import write_text
from vim_backbone.images import reason
from vim_backbone.pretrained import check_names, device_of

ROWS = "predictions.jsonl"
DRAWINGS = 200
"""Pictures that are drawn, where nothing else is asked for."""
MAX_STEM = 200
"""Bytes of a picture's name that the names of what is written for it take up: of 255, some are added to it."""


def load_predictor(run_folder: Path, device: torch.device) -> Predictor:
    """The trained model of a run. Raises UserError naming the file or tensor that is missing or does not fit."""
    description = read_description(run_folder)
    task = description["task"]
    if task not in TASKS:
        raise UserError(f"{run_folder} holds a model of the task {task!r}, which is unknown; {nearest(task, TASKS)}")
    predictor = TASKS[task].predictor(description, device)
    path, tensors = read_weights(run_folder)
    check_names(predictor.model.state_dict(), tensors, path)
    predictor.model.load_state_dict(tensors)
    return predictor


def picture_files(paths: list[Path]) -> list[Path]:
    """The files, and those below the folders. Raises UserError for pictures that are not there."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist: give pictures, or folders of them")
        files += map(Path, files_below(path)) if path.is_dir() else [path]
    return files


@torch.inference_mode()
def predict(
    predictor: Predictor, files: list[Path], out: Path, batch_size: int, resume: bool = False, drawings: int = DRAWINGS
) -> Iterator[Prediction]:
    """Predict on picture files; give each prediction when it is in predictions.jsonl, with its picture drawn.

    Those that cannot be read have an "error" in place of a prediction. All are in predictions.json at the end, and as a
    table in predictions.csv.

    Args:
        resume: keep what predictions.jsonl has of these files.
        drawings: pictures that are drawn, the first so many.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = {row["file"]: row for row in read_rows(out / ROWS)} if resume else {}
    rows = {str(file): rows[str(file)] for file in files if str(file) in rows}
    write_text(out / ROWS, "".join(json.dumps(row) + "\n" for row in rows.values()))
    left = [(number, file) for number, file in enumerate(files) if str(file) not in rows]
    for batch in (left[start : start + batch_size] for start in range(0, len(left), batch_size)):
        predictions = predict_batch(predictor, batch, out, drawings)
        with open(out / ROWS, "a", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in predictions)
        rows |= {row["file"]: row for row in predictions}
        yield from predictions
    predictions = [rows[str(file)] for file in files]
    write_text(out / "predictions.json", json.dumps(predictions, indent=1) + "\n")
    write_text(out / "predictions.csv", table_of(predictor, predictions))


def table_of(predictor: Predictor, predictions: list[Prediction]) -> str:
    """Predictions as CSV: the file, what the task says of it, an error in place of that."""
    text = io.StringIO()
    table = csv.DictWriter(text, ["file", *predictor.columns(), "error"], lineterminator="\n")
    table.writeheader()
    for row in predictions:
        lines = [{"error": row["error"]}] if "error" in row else predictor.in_rows(row)
        table.writerows({"file": escaped(row["file"])} | line for line in lines)
    return text.getvalue()


def predict_batch(
    predictor: Predictor, batch: Sequence[tuple[int, Path]], out: Path, most: int = DRAWINGS
) -> list[Prediction]:
    """A row for each of the numbered files, of which those below `most` are drawn."""
    rows, images, drawings, readable = [], [], [], []
    for number, file in batch:
        row: Prediction = {"file": str(file)}
        rows.append(row)
        drawing = Drawing(out / f"{number:05d}_{shortened(file.stem)}.png", number < most)
        try:
            with open_file(file) as picture:
                if picture.windowed and math.prod(picture.size) > MAX_MEGAPIXELS * 1e6:
                    row.update(predictor.predict_huge(picture, drawing))
                    row |= {"drawing": drawing.path.name} if drawing.enabled else {}
                    continue
                images.append(pixels_of(picture, predictor.preprocessing, MAX_MEGAPIXELS))
        except Exception as error:  # a decoder may raise anything on damaged data
            row["error"] = reason(error)
            continue
        row |= {"drawing": drawing.path.name} if drawing.enabled else {}
        drawings.append(drawing)
        readable.append(row)
    for row, prediction in zip(readable, predictor.predict(images, drawings) if images else [], strict=True):
        row.update(prediction)
    return rows


def read_rows(path: Path) -> list[Prediction]:
    """The rows of an earlier predictions.jsonl, but half of one; none where there is no such file."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # from a process that was killed while it wrote
        if isinstance(row, dict) and isinstance(row.get("file"), str):
            rows.append(row)
    return rows


def shortened(stem: str) -> str:
    """A name to write files by: printable, and of MAX_STEM bytes at most."""
    return escaped(stem).encode()[:MAX_STEM].decode(errors="ignore")


def main(argv: list[str]) -> None:
    """Predict, print a line for each picture, and the folder last."""
    parser = argparse.ArgumentParser("finetune.predict", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a fine-tuning run, such as runs/classification")
    parser.add_argument("pictures", type=Path, nargs="+", help="picture files, or folders of them")
    parser.add_argument("--out", type=Path, help="where predictions go; RUN/predictions when not given")
    parser.add_argument("--batch_size", type=int, default=8, help="pictures of one forward pass")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--resume", action="store_true", help="keep what an earlier command left in predictions.jsonl")
    parser.add_argument("--drawings", type=int, default=DRAWINGS, help="pictures that are drawn, the first so many")
    arguments = parser.parse_args(argv)
    require(arguments.drawings >= 0, "--drawings", arguments.drawings, "it cannot be negative")
    require(arguments.batch_size >= 1, "--batch_size", arguments.batch_size, "it must be at least 1")
    files = picture_files(arguments.pictures)
    predictor = load_predictor(arguments.run, device_of(arguments.device))
    out = arguments.out or arguments.run / "predictions"
    predictions = predict(predictor, files, out, arguments.batch_size, arguments.resume, arguments.drawings)
    done = before = (
        sum(str(file) in {row["file"] for row in read_rows(out / ROWS)} for file in files) if arguments.resume else 0
    )
    with ProgressReport(user_console(), "pictures", len(files), done) as report:
        for row in predictions:
            words = f"not read, {row['error']}" if "error" in row else predictor.in_words(row)
            print(f"{escaped(row['file'])}: {words}", flush=True)  # noqa: T201 - the command's result
            done += 1
            whole_batch = (done - before) % arguments.batch_size == 0
            if whole_batch or done == len(files):
                report.update(done, report.rate())
    print(out)  # noqa: T201


if __name__ == "__main__":
    sys.exit(run(main))
