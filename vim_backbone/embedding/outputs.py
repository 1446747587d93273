"""Parts of features as one file: parquet, npy or safetensors by its ending."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vim_backbone.embedding.features import Selection
from vim_backbone.embedding.parts import Parts
from vim_backbone.errors import UserError
from vim_backbone.files import write_atomically, write_tensors, write_text

Named = Callable[[int], str]
"""Index of a picture -> its name."""


def check_output(out: Path, selection: Selection, fixed: bool) -> None:
    """Raise UserError, before work starts, for a file that cannot hold what is wanted."""
    if out.suffix not in WRITERS:
        raise UserError(f"{out} ends in {out.suffix!r}: it must end in {', '.join(WRITERS)}")
    if out.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise UserError(f"{out}: parquet is written by pyarrow: pip install pyarrow, or take .npy or .safetensors")
    several = selection.vectors + selection.maps
    if out.suffix == ".npy" and len(several) != 1:
        raise UserError(f"{out} holds one array, wanted are {', '.join(several)}: take .parquet or .safetensors")
    if out.suffix == ".npy" and selection.maps and not fixed:
        raise UserError(f"{out} holds one array, patches of native sizes differ: set --size, or take .parquet")


def write_parquet(out: Path, parts: Parts, selection: Selection, name: Named) -> None:
    """A row a picture: `name`, `index`, a list of d floats for each vector; rows, columns and flat lists of patches."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def table(tensors: dict[str, Tensor]) -> pa.Table:
        columns: dict[str, Any] = {
            "name": [name(index) for index in tensors["index"].tolist()],
            "index": tensors["index"].numpy(),
        }
        for each in selection.vectors:
            columns[each] = pa.FixedSizeListArray.from_arrays(tensors[each].flatten().numpy(), tensors[each].shape[1])
        if selection.maps:
            columns |= {"rows": tensors["grid"][:, 0].numpy(), "columns": tensors["grid"][:, 1].numpy()}
            ends = tensors["grid"].prod(1).cumsum(0).numpy()
            for each in selection.maps:
                starts = np.concatenate([[0], ends]) * tensors[each].shape[1]
                columns[each] = pa.LargeListArray.from_arrays(starts, tensors[each].flatten().numpy())
        return pa.table(columns)

    def write(aside: Path) -> None:
        tables = (
            table(tensors) for tensors, _ in parts.read(selection.vectors + selection.maps) if len(tensors["index"])
        )
        first = next(tables)
        with pq.ParquetWriter(aside, first.schema) as writer:
            writer.write_table(first)
            for more in tables:
                writer.write_table(more)

    write_atomically(out, write)


def write_npy(out: Path, parts: Parts, selection: Selection, name: Named) -> None:
    """An array (pictures, d), or of patches (pictures, rows, columns, d); the names are in `OUT.names.txt`."""
    (feature,) = selection.vectors + selection.maps
    arrays, indices = [], []
    for tensors, _ in parts.read([feature]):
        if len(tensors["index"]):
            shape = (-1, *tensors["grid"][0].tolist()) if selection.maps else (-1,)
            arrays.append(tensors[feature].unflatten(0, shape).numpy())
            indices += tensors["index"].tolist()

    def write(aside: Path) -> None:
        with open(aside, "wb") as file:
            np.save(file, np.concatenate(arrays), allow_pickle=False)

    write_names(out, indices, name)
    write_atomically(out, write)


def write_safetensors(out: Path, parts: Parts, selection: Selection, name: Named) -> None:
    """A tensor (pictures, d) for each vector; of patches (all patches, d), rows, columns in `grid` (pictures, 2).

    The names are in `OUT.names.txt`.
    """
    gathered: dict[str, list[Tensor]] = {}
    for tensors, _ in parts.read(selection.vectors + selection.maps):
        if len(tensors["index"]):
            for each, tensor in tensors.items():
                gathered.setdefault(each, []).append(tensor)
    whole = {each: torch.cat(tensors) for each, tensors in gathered.items()}
    write_names(out, whole["index"].tolist(), name)
    write_tensors(out, whole)


def write_names(out: Path, indices: list[int], name: Named) -> None:
    """A line a row."""
    write_text(out.with_name(f"{out.name}.names.txt"), "".join(f"{name(index)}\n" for index in indices))


WRITERS = {".parquet": write_parquet, ".npy": write_npy, ".safetensors": write_safetensors}
"""End of the output's name -> what writes it."""
