"""Find out in which format an SAE is stored, and load it, from a path or from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from steerserve.errors import AssetError
from steerserve.sae.formats import (
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    openai,
    saelens,
    sparsify,
)
from steerserve.sae.formats.files import NormGain, Source
from steerserve.sae.model import SAE
from steerserve.types import Site

READERS: dict[str, tuple[str, Callable[[Source], SAE]]] = {
    "SAELens": (saelens.WEIGHTS, saelens.read),
    "Gemma Scope": (gemma_scope.WEIGHTS, gemma_scope.read),
    "Gemma Scope 2": (gemma_scope_2.WEIGHTS, gemma_scope_2.read),
    "Llama Scope": (llama_scope.WEIGHTS, llama_scope.read),
    "dictionary_learning": (dictionary_learning.WEIGHTS, dictionary_learning.read),
    "sparsify": (sparsify.WEIGHTS, sparsify.read),
    "OpenAI": ("*.pt", openai.read),
}
"""By format: the weight file that it is known by, and its reader."""

Download = Callable[..., str]
"""``huggingface_hub.snapshot_download``, or what stands in for it."""


def load_sae(
    path: Path,
    *,
    site: Site | None = None,
    norm_scaling_factor: float | None = None,
    norm_gain: NormGain | None = None,
    origin: str | None = None,
) -> SAE:
    """Load an SAE of any format as fp32, named after its directory or file.

    Args:
        path: the SAE's directory, or its weight file.
        site: where it reads, for a format whose files do not say and if its path does not either.
        norm_scaling_factor: √d / mean |x|, if it was trained on activations so scaled and the files lack the scale.
        norm_gain: by layer, the gain ``[d_in]`` of the norm before the MLP, if it reads that norm's output without it.
        origin: what to read names from in place of ``path``.

    Raises:
        AssetError: no SAE of a known format, files that are damaged or could run code, a missing tensor, scale or site,
            or equations that ``SAE`` does not compute. Nothing is approximated.
    """
    format_name, root = format_of(path)
    absolute = root.absolute()
    source = Source(
        path=root,
        name=absolute.stem if root.is_file() else absolute.name,
        origin=origin or absolute.as_posix(),
        site=site,
        norm_scaling_factor=norm_scaling_factor,
        norm_gain=norm_gain,
    )
    sae = READERS[format_name][1](source)
    if sae.k is not None and not 1 <= sae.k <= sae.d_sae:
        raise AssetError(f"{root}: k is {sae.k}, expected 1 to {sae.d_sae}, the number of features")
    return sae


def load_sae_from_hub(
    repository: str,
    folder: str,
    *,
    site: Site | None = None,
    norm_scaling_factor: float | None = None,
    norm_gain: NormGain | None = None,
    download: Download | None = None,
) -> SAE:
    """Load the SAE in ``folder`` of the hub's ``repository``, ``"."`` for its root; see ``load_sae``.

    Only that folder is fetched, and the repository's own ``config.json``, which names the model in some formats.

    Raises:
        AssetError: also if there is no such repository or folder, or the hub cannot be reached.
    """
    path = download_from_hub(repository, folder, download)
    return load_sae(
        path,
        site=site,
        norm_scaling_factor=norm_scaling_factor,
        norm_gain=norm_gain,
        origin=f"{repository}/{folder}".removesuffix("/."),
    )


def download_from_hub(repository: str, folder: str, download: Download | None = None) -> Path:
    """The local path of ``folder`` of a repository; see ``load_sae_from_hub``."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    folder = folder.strip("/")
    patterns = ["*"] if folder in ("", ".") else [f"{folder}/*", folder, "config.json"]
    ignored = ["*/*"] if folder in ("", ".") else None
    try:
        root = Path((download or snapshot_download)(repository, allow_patterns=patterns, ignore_patterns=ignored))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise AssetError(f"the hub's repository {repository!r} cannot be read: {error}") from error
    if not (root / folder).exists():
        raise AssetError(f"the hub's repository {repository!r} has no {folder!r}")
    return root / folder


def format_of(path: Path) -> tuple[str, Path]:
    """The format's name, and the directory (or for OpenAI's, the file) that its reader takes.

    Raises:
        AssetError: nothing there, or no weight file of a known format.
    """
    if not path.exists():
        raise AssetError(f"SAE {path} does not exist")
    if path.is_file() and path.suffix == ".pt" and path.name != dictionary_learning.WEIGHTS:
        return "OpenAI", path
    directory = path.parent if path.is_file() else path
    if directory.name == "checkpoints" and (directory.parent / llama_scope.CONFIG).is_file():
        directory = directory.parent
    for name, (weights, _) in READERS.items():
        if name != "OpenAI" and (directory / weights).is_file():
            return name, directory
    single = sorted(directory.glob("*.pt"))
    if len(single) == 1:
        return "OpenAI", single[0]
    known = ", ".join(f"{weights} ({name})" for name, (weights, _) in READERS.items())
    raise AssetError(f"{path} holds no SAE of a known format; expected one of {known}")
