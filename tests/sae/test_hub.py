"""Loading from the hub, with a function that stands in for the download."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError

from steerserve.errors import AssetError
from steerserve.sae.registry import load_sae, load_sae_from_hub

GOLDEN = Path(__file__).parent / "golden"


class Hub:
    """One repository; ``download`` copies what the patterns select, as ``snapshot_download`` does."""

    def __init__(self, root: Path) -> None:
        self.repository = root / "repository"
        self.cache = root / "models--org--saes" / "snapshots" / "abc"

    def put(self, case: str, folder: str) -> None:
        shutil.copytree(GOLDEN / case, self.repository / folder, dirs_exist_ok=True)

    def download(self, repository: str, *, allow_patterns: list[str], ignore_patterns: list[str] | None) -> str:
        assert repository == "org/saes"
        for file in sorted(path for path in self.repository.rglob("*") if path.is_file()):
            name = str(file.relative_to(self.repository))
            wanted = any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
            if wanted and not any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns or ()):
                (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, self.cache / name)
        return str(self.cache)


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    hub = Hub(tmp_path)
    hub.put("sae_lens/gated", "blocks.1/width_24")
    hub.put("sae_lens/topk", "blocks.1/width_48")
    hub.put("sparsify/topk", ".")  # in layers.10
    (hub.repository / "config.json").write_text('{"model": "tiny/model"}')
    return hub


def test_one_folder_of_a_repository(hub: Hub) -> None:
    sae = load_sae_from_hub("org/saes", "blocks.1/width_24", download=hub.download)
    assert sae.name == "width_24"
    assert torch.equal(sae.W_enc, load_sae(GOLDEN / "sae_lens/gated").W_enc)
    assert not (hub.cache / "blocks.1/width_48").exists()  # the other SAEs are not fetched


def test_site_and_model_come_from_the_names_in_the_repository(hub: Hub) -> None:
    sae = load_sae_from_hub("org/saes", "layers.10", download=hub.download)
    assert (str(sae.site), sae.metadata["model_name"]) == ("blocks.10.hook_resid_post", "tiny/model")


def test_an_sae_at_the_root(hub: Hub) -> None:
    hub.put("sae_lens/standard", ".")
    assert str(load_sae_from_hub("org/saes", ".", download=hub.download).site) == "blocks.1.hook_resid_post"
    assert not (hub.cache / "blocks.1").exists()


def test_what_is_not_there(hub: Hub) -> None:
    with pytest.raises(AssetError, match=r"the hub's repository 'org/saes' has no 'blocks\.2'"):
        load_sae_from_hub("org/saes", "blocks.2", download=hub.download)
    with pytest.raises(AssetError, match="holds no SAE of a known format"):
        load_sae_from_hub("org/saes", "blocks.1", download=hub.download)

    def unreachable(*_: Any, **__: Any) -> str:
        raise OSError("no network")

    with pytest.raises(AssetError, match="the hub's repository 'org/none' cannot be read: no network"):
        load_sae_from_hub("org/none", ".", download=unreachable)
    assert issubclass(RepositoryNotFoundError, OSError)  # what the hub says of a wrong name is one of these
