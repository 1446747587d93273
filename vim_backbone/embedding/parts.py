"""Features of the pictures that are done, in parts on disk: what a killed command leaves, another goes on with.

Several processes share the parts of one folder; each writes its own.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vim_backbone.errors import UserError
from vim_backbone.files import read_json, remove, write_json, write_tensors

SETTINGS = "settings.json"
BAD = "bad"
FEWEST, MOST = 16, 256
"""Pictures of a part: what a killed process loses at most."""
AIM = 64
"""Parts of a small source, so that several processes have something to share."""


class Parts:
    """A folder of parts beside the output; part k has the pictures from k * size on, with those that are bad."""

    def __init__(self, out: Path, total: int) -> None:
        """Args: the output's file, pictures of the source."""
        self.folder = out.with_name(f"{out.name}.parts")
        self.total, self.size = total, min(MOST, max(FEWEST, -(-total // AIM)))
        self.count = -(-total // self.size)

    def start(self, settings: dict[str, Any], out: Path, resume: bool, overwrite: bool) -> None:
        """Make the folder, or go on with one. Raises UserError where work would be lost, or settings are others."""
        if out.is_dir():
            raise UserError(f"{out} is a folder: give a file")
        if overwrite:
            remove(self.folder)
        file = self.folder / SETTINGS
        if out.exists() and not overwrite and not (resume and file.exists()):
            raise UserError(f"{out} exists: choose another name, or --overwrite")
        if file.exists():
            before = read_json(file)
            if not isinstance(before, dict):
                raise UserError(f"{file} is damaged: --overwrite begins anew")
            if not resume:
                raise UserError(f"{self.folder} has parts of an earlier command: --resume goes on, or --overwrite")
            changed = [name for name in settings if before.get(name) != json.loads(json.dumps(settings[name]))]
            if changed:
                raise UserError(f"{self.folder} was made with other {', '.join(changed)}: --overwrite begins anew")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {self.folder}: {error.strerror}") from error
        write_json(file, settings)

    def done(self) -> list[int]:
        """Parts that are there."""
        there = {path.name for path in self.folder.iterdir()}
        return [part for part in range(self.count) if self.path(part).name in there]

    def missing(self, rank: int, processes: int) -> list[int]:
        """Parts that are not there, of those of one of so many processes: one in so many."""
        return [part for part in range(rank, self.count, processes) if not self.path(part).exists()]

    def pictures_done(self) -> int:
        """Pictures of the parts that are there."""
        return sum(len(self.indices(part)) for part in self.done())

    def path(self, part: int) -> Path:
        """Its file."""
        return self.folder / f"part-{part:06d}.safetensors"

    def indices(self, part: int) -> range:
        """Its pictures."""
        return range(part * self.size, min(self.total, (part + 1) * self.size))

    def write(self, part: int, features: dict[int, dict[str, Tensor]], bad: dict[int, str]) -> None:
        """Keep the features of pictures, by index, and why others are bad."""
        order = sorted(features)
        tensors = {"index": torch.tensor(order, dtype=torch.int64)}
        for name in features[order[0]] if order else ():
            values = [features[index][name] for index in order]
            if values[0].dim() == 1:
                tensors[name] = torch.stack(values)
            else:
                tensors["grid"] = torch.tensor([value.shape[:2] for value in values])
                tensors[name] = torch.cat([value.flatten(0, 1) for value in values])
        write_tensors(self.path(part), tensors, {BAD: json.dumps(bad)})

    def bad(self) -> dict[int, str]:
        """Of the parts that are there the pictures that are bad, with the reason."""
        return {index: why for _, some in self.read([], self.done()) for index, why in some.items()}

    def read(
        self, names: list[str], parts: Iterable[int] | None = None
    ) -> Iterator[tuple[dict[str, Tensor], dict[int, str]]]:
        """Of each part the tensors of these names, with "index" and "grid" where there is one, and its bad pictures.

        `parts`: all when None. Raises UserError for a part that is damaged.
        """
        for part in range(self.count) if parts is None else parts:
            try:
                with safe_open(self.path(part), "pt") as file:
                    there = set(file.keys()) & {"index", "grid", *names}
                    bad = json.loads(file.metadata()[BAD])
                    tensors = {name: file.get_tensor(name) for name in there}
            except (OSError, SafetensorError, ValueError, KeyError) as error:
                raise UserError(f"{self.path(part)} is damaged ({error}): delete it, and --resume") from error
            yield tensors, {int(index): why for index, why in bad.items()}

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
