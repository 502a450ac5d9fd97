"""A harvest in the formats of other tools: one HDF5 file, or a directory of npy files that numpy maps into memory.

Both are written shard by shard, and appear under their names only when complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steerserve.errors import AssetError, InvalidRequestError
from steerserve.lab.manifest import Manifest, open_shard
from steerserve.sae.formats.whole import written_whole
from steerserve.types import Site

ROW_DTYPES = {"float32": torch.float32, "float16": torch.float16}
"""What rows can be exported in; numpy and HDF5 have no bfloat16."""

ROWS_PER_CHUNK = 1024


def export_hdf5(directory: Path, out: Path, sites: tuple[Site, ...], dtype: str = "float32") -> None:
    """Write the file ``out``: per site a chunked dataset ``[n, d]``, ``tokens``, ``context`` and ``position`` ``[n]``.

    The manifest's fields are the file's attributes; a list is one JSON string.

    Raises:
        AssetError: no harvest, a damaged shard, a row beyond float16, ``out`` exists or cannot be written.
        InvalidRequestError: an unknown dtype.
    """
    import h5py

    export = _Export(directory, out, sites, dtype)
    try:
        with written_whole(out) as partial, h5py.File(partial, "w") as file:
            for name, shape, kind in export.arrays:
                chunk = (max(1, min(ROWS_PER_CHUNK, shape[0])), *shape[1:])
                file.create_dataset(name, shape, kind, chunks=chunk)
            for start, rows in export.shards():
                for name, values in rows.items():
                    file[name][start : start + len(values)] = values
            for name, value in export.attributes.items():
                file.attrs[name] = value if isinstance(value, str | int) else json.dumps(value)
    except (OSError, RuntimeError) as error:
        raise AssetError(f"{out} could not be written, nothing of it is left: {error}") from error


def export_npy(directory: Path, out: Path, sites: tuple[Site, ...], dtype: str = "float32") -> None:
    """Write the directory ``out``: an npy file per array that ``export_hdf5`` names, and ``manifest.json``.

    Raises:
        AssetError, InvalidRequestError: as ``export_hdf5``.
    """
    export = _Export(directory, out, sites, dtype)
    partial = out.with_name(f"{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with ExitStack() as stack:
            files = {}
            for name, shape, kind in export.arrays:
                files[name] = stack.enter_context((partial / f"{name}.npy").open("wb"))
                header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(files[name], header)
            for _, rows in export.shards():
                for name, values in rows.items():
                    files[name].write(np.ascontiguousarray(values).data)
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        (partial / "manifest.json").write_text(json.dumps(export.attributes, indent=1))
        partial.replace(out)
    except OSError as error:
        raise AssetError(f"{out} could not be written, nothing of it is left: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Export:
    """What both formats hold.

    Attributes:
        attributes: the manifest, with the sites and the dtype of the export.
        arrays: name, shape and dtype of each array.
    """

    def __init__(self, directory: Path, out: Path, sites: tuple[Site, ...], dtype: str) -> None:
        if dtype not in ROW_DTYPES:
            raise InvalidRequestError("dtype", dtype, f"one of {', '.join(ROW_DTYPES)}")
        if out.exists():
            raise AssetError(f"{out} exists already; an export replaces nothing")
        self._directory = directory
        self._manifest = manifest = Manifest.load(directory)
        self._sites = [str(site) for site in sites] or manifest.sites
        self._dtype = dtype
        for site in self._sites:
            if site not in manifest.sites:
                raise AssetError(f"{directory} holds {', '.join(manifest.sites)}, not {site}")
        if not manifest.shards:
            raise AssetError(f"{directory} holds no complete shard yet")
        self.attributes: dict[str, Any] = asdict(manifest) | {"sites": self._sites, "dtype": dtype}
        for of_shards in ("shards", "records"):
            del self.attributes[of_shards]
        _, first = next(self.shards())
        self.arrays = [(name, (manifest.num_rows, *values.shape[1:]), values.dtype) for name, values in first.items()]

    def shards(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Index of the first row, and the arrays, of one shard after the other."""
        start = 0
        for name in self._manifest.shards:
            with open_shard(self._directory, name) as file:
                found = [key for key in ("tokens", "context", "position") if key in file.keys()]  # noqa: SIM118
                rows = {key: file.get_tensor(key).numpy() for key in found}
                for site in self._sites:
                    rows[site] = self._converted(name, site, file.get_tensor(site))
            yield start, rows
            start += len(rows["tokens"])

    def _converted(self, shard: str, site: str, rows: torch.Tensor) -> Any:
        rows = rows.to(ROW_DTYPES[self._dtype])
        if self._dtype == "float16" and not rows.isfinite().all():
            path = self._directory / shard
            raise AssetError(f"{path}: {site} has values beyond the range of float16; export as float32")
        return rows.numpy()
