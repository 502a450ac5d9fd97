"""Exports hold the harvest's rows, and what fails leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from steerserve.errors import AssetError, InvalidRequestError
from steerserve.lab import harvest as harvesting
from steerserve.lab.export import export_hdf5, export_npy
from steerserve.lab.harvest import HarvestConfig, harvest
from steerserve.lab.manifest import Manifest
from steerserve.models.loading import LoadedModel
from steerserve.types import Site, Stream

SITES = (Site(0, Stream.RESID_PRE), Site(1, Stream.MLP_IN))
Export = Callable[..., None]


@pytest.fixture
def harvested(tiny: LoadedModel, tmp_path: Path, sentences: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Several shards of two sites."""
    monkeypatch.setattr(harvesting, "TOKENS_PER_SHARD", 16 * 20)
    manifest = harvest(tiny, sentences, tmp_path / "activations", HarvestConfig(SITES, context_length=16))
    assert len(manifest.shards) > 2
    return tmp_path / "activations"


def rows_of(directory: Path, name: str) -> torch.Tensor:
    return torch.cat([load_file(directory / shard)[name] for shard in Manifest.load(directory).shards])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_hdf5_holds_the_rows_and_the_manifest(harvested: Path, tmp_path: Path, dtype: str) -> None:
    export_hdf5(harvested, tmp_path / "a.h5", (), dtype)
    with h5py.File(tmp_path / "a.h5") as file:
        assert file.keys() == {"tokens", "context", "position", *map(str, SITES)}
        for site in SITES:
            assert file[str(site)].dtype == dtype
            assert file[str(site)].chunks is not None
            expected = rows_of(harvested, str(site)).to(getattr(torch, dtype))
            assert np.array_equal(file[str(site)][:], expected.numpy())
        for name in ("tokens", "context", "position"):
            assert np.array_equal(file[name][:], rows_of(harvested, name).numpy())
        manifest = Manifest.load(harvested)
        assert file.attrs["model_fingerprint"] == manifest.model_fingerprint
        assert file.attrs["num_rows"] == manifest.num_rows
        assert json.loads(file.attrs["sites"]) == [str(site) for site in SITES]
        assert file.attrs["dtype"] == dtype


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_npy_maps_the_rows_into_memory(harvested: Path, tmp_path: Path, dtype: str) -> None:
    export_npy(harvested, tmp_path / "a", SITES[1:], dtype)
    names = {"tokens", "context", "position", str(SITES[1])}
    assert {path.name for path in (tmp_path / "a").iterdir()} == {f"{name}.npy" for name in names} | {"manifest.json"}
    for name in names:
        mapped = np.load(tmp_path / "a" / f"{name}.npy", mmap_mode="r")
        expected = rows_of(harvested, name)
        assert np.array_equal(mapped, (expected.to(getattr(torch, dtype)) if "." in name else expected).numpy())
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["sites"] == [str(SITES[1])]


@pytest.fixture(params=[export_hdf5, export_npy])
def export(request: pytest.FixtureRequest) -> Export:
    return request.param


def test_old_harvests_have_no_positions_and_can_be_exported(export: Export, write_store, tmp_path: Path) -> None:
    rows = torch.randn(7, 8).bfloat16()
    directory = write_store([rows[:4], rows[4:]])
    export(directory, tmp_path / "a", ())
    if export is export_npy:
        assert np.array_equal(np.load(tmp_path / "a" / "blocks.1.hook_resid_post.npy"), rows.float().numpy())
    else:
        with h5py.File(tmp_path / "a") as file:
            assert np.array_equal(file["blocks.1.hook_resid_post"][:], rows.float().numpy())


def test_what_is_refused_leaves_nothing(export: Export, harvested: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    with pytest.raises(AssetError, match=r"holds blocks\.0.*, not blocks\.2\.hook_resid_post"):
        export(harvested, out, (Site(2, Stream.RESID_POST),))
    with pytest.raises(InvalidRequestError, match="dtype: got 'int8', expected one of float32, float16"):
        export(harvested, out, (), "int8")
    with pytest.raises(AssetError, match="holds no harvest"):
        export(tmp_path / "nowhere", out, ())
    with pytest.raises(AssetError, match="could not be written, nothing of it is left"):
        export(harvested, harvested / "manifest.json" / "a", ())
    assert not out.exists()
    out.write_text("mine")
    with pytest.raises(AssetError, match="exists already"):
        export(harvested, out, ())
    assert out.read_text() == "mine"


def test_a_fault_in_a_later_shard_is_named_and_leaves_nothing(export: Export, harvested: Path, tmp_path: Path) -> None:
    out, second = tmp_path / "a", harvested / Manifest.load(harvested).shards[1]
    tensors = load_file(second)
    tensors[str(SITES[0])][3, 2] = 1e6
    save_file(tensors, second)
    with pytest.raises(AssetError, match=r"shard_00001\.safetensors: blocks\.0\.hook_resid_pre has values beyond"):
        export(harvested, out, (), "float16")
    second.write_bytes(second.read_bytes()[:-100])
    with pytest.raises(AssetError, match=r"shard_00001\.safetensors is damaged"):
        export(harvested, out, ())
    second.unlink()
    with pytest.raises(AssetError, match=r"shard_00001\.safetensors is missing"):
        export(harvested, out, ())
    assert {path.name for path in tmp_path.iterdir()} == {"activations"}
