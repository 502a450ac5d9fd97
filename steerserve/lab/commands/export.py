"""``steerserve lab export``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from steerserve.lab.commands.options import console
from steerserve.lab.export import export_hdf5, export_npy
from steerserve.types import Site


class Format(StrEnum):
    """File formats of an export."""

    HDF5 = "hdf5"
    NPY = "npy"


def export_command(
    activations: Annotated[Path, typer.Argument(help="Directory written by `lab harvest`.")],
    out: Annotated[Path, typer.Argument(help="File (hdf5) or directory (npy) to make.")],
    format: Annotated[Format, typer.Option(help="hdf5, or npy: a file per site that numpy maps into memory.")],
    site: Annotated[list[str] | None, typer.Option(help="Site to export; all if left out. Repeatable.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or float16, of the rows.")] = "float32",
) -> None:
    """Write a harvest as HDF5 or npy, for other tools."""
    sites = tuple(Site.parse(name) for name in site or ())
    export = export_hdf5 if format is Format.HDF5 else export_npy
    with console.status(f"writing {out}"):
        export(activations, out, sites, dtype)
    console.print(f"wrote {out}")
