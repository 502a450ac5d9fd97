"""Features that another analysis names as candidates for a pack: lists that ``steerserve analyse features`` writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from steerserve.errors import AssetError, IncompatibleError
from steerserve.sae.model import SAE

Shortlists = Mapping[str, tuple[int, ...]]
"""By the SHA-256 of an SAE, its features in the order in which they were listed."""


def read_shortlists(paths: Sequence[Path], saes: Sequence[SAE]) -> Shortlists:
    """The features of lists of ``saes``; of several lists of one SAE, those of all.

    Raises:
        AssetError: a file is no such list, or names a feature that the SAE does not have.
        IncompatibleError: it is the list of another SAE.
    """
    known = {sae.sha256: sae for sae in saes}
    found: dict[str, tuple[int, ...]] = {}
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            sha256, features = str(content["sae_sha256"]), [int(each["id"]) for each in content["features"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AssetError(f"{path}: not a list that `steerserve analyse features` wrote: {error!r}") from error
        if sha256 not in known:
            expected = f"a list of {' or '.join(sae.name for sae in saes)}, as it is"
            raise IncompatibleError(f"--candidates {path}", f"features of {content.get('sae')}", expected)
        d_sae = known[sha256].d_sae
        if strange := [feature for feature in features if not 0 <= feature < d_sae]:
            raise AssetError(f"{path}: feature {strange[0]}, where {known[sha256].name} has 0 to {d_sae - 1}")
        found[sha256] = tuple(dict.fromkeys((*found.get(sha256, ()), *features)))
    return found
