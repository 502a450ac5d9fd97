"""What heads put out on labelled texts, kept on disk: one forward pass, from which every choice of heads is read.

A directory holds one ``.npy`` of ``[positions, width]`` float16 for each site, and ``texts.json``, which says of what.
Positions are the first ``MAX_TOKENS`` tokens of a text but for the very first, an attention sink.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track

from steerserve.errors import AssetError
from steerserve.lab.activations import activations_of, ordinary_rows
from steerserve.lab.tokens import bos_of, tokenize
from steerserve.models.loading import LoadedModel
from steerserve.sae.formats.whole import written_whole
from steerserve.steering.packs import width_of
from steerserve.types import Site, Stream

MAX_TOKENS = 48
BATCH_SIZE = 32
INDEX = "texts.json"


@dataclass(frozen=True, eq=False)
class Reads:
    """Activations of texts.

    Attributes:
        values: by site ``[N, width]`` float16, mapped from disk.
        text: ``[N]`` which text each position is of.
        position: ``[N]`` number of the token in its text.
        ordinary: ``[N]`` no residual stream that was read has a massive activation there.
    """

    values: dict[Site, npt.NDArray[np.float16]]
    text: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    ordinary: npt.NDArray[np.bool_]


def head_sites(model: LoadedModel) -> list[Site]:
    """Where the outputs of all heads are."""
    return [Site(layer, Stream.ATTN_Z) for layer in range(model.n_layers)]


def read_texts(model: LoadedModel, texts: Sequence[str], sites: Sequence[Site], directory: Path) -> Reads:
    """Activations at ``sites``; computed unless ``directory`` has them of the same texts and weights.

    Raises:
        AssetError: the directory cannot be written, or an activation is beyond the range of float16.
    """
    key = {
        "model_fingerprint": model.fingerprint,
        "sites": [str(site) for site in sites],
        "max_tokens": MAX_TOKENS,
        "texts_sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
    }
    index = directory / INDEX
    try:
        if not (index.exists() and json.loads(index.read_text("utf-8")) == key):
            directory.mkdir(parents=True, exist_ok=True)
            index.unlink(missing_ok=True)
            _compute(model, texts, sites, directory)
            with written_whole(index) as partial:
                partial.write_text(json.dumps(key), encoding="utf-8")
        text, position, ordinary = (np.load(_file(directory, name)) for name in ("text", "position", "ordinary"))
        mapped = {site: np.load(_file(directory, str(site)), mmap_mode="r") for site in sites}
        return Reads({site: rows[: len(text)] for site, rows in mapped.items()}, text, position, ordinary)
    except (OSError, ValueError) as error:
        raise AssetError(f"{directory} cannot hold activations: {error}") from error


def _file(directory: Path, name: str) -> Path:
    return directory / f"{name}.npy"


@torch.inference_mode()
def _compute(model: LoadedModel, texts: Sequence[str], sites: Sequence[Site], directory: Path) -> None:
    """Texts of like length are run together; rows are in the order of the passes."""
    lengths = [len(ids) for ids in model.tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids]
    order = sorted(range(len(texts)), key=lengths.__getitem__)
    total, num_bos = sum(min(length, MAX_TOKENS) for length in lengths), len(bos_of(model))
    files: dict[Site, Any] = {
        site: np.lib.format.open_memmap(
            _file(directory, str(site)), "w+", dtype=np.float16, shape=(total, width_of(model, site))
        )
        for site in sites
    }
    text, position = np.full(total, -1, np.int32), np.zeros(total, np.int32)
    ordinary = np.zeros(total, bool)
    done = 0
    for start in track(range(0, len(order), BATCH_SIZE), "activations"):
        rows = order[start : start + BATCH_SIZE]
        batch = tokenize(model, [texts[row] for row in rows], MAX_TOKENS)
        x = activations_of(model, batch.tokens, tuple(sites))
        keep = batch.text.clone()
        keep[:, 0] = False
        normal = keep.clone()
        for site in sites:
            if site.stream is not Stream.ATTN_Z:
                normal &= ordinary_rows(x[site], batch.real)
        end = done + int(keep.sum())
        for site in sites:
            files[site][done:end] = x[site][keep].half().numpy()
            if not np.isfinite(files[site][done:end][normal[keep].numpy()]).all():
                raise AssetError(f"{site} has values beyond the range of float16")
        row, column = keep.nonzero(as_tuple=True)
        text[done:end] = np.array(rows)[row.numpy()]
        position[done:end] = column.numpy() - num_bos
        ordinary[done:end] = normal[keep].numpy()
        done = end
    columns: dict[str, npt.NDArray[Any]] = {"text": text, "position": position, "ordinary": ordinary}
    for name, values in columns.items():
        np.save(_file(directory, name), values[:done])
    for file in files.values():
        file.flush()
