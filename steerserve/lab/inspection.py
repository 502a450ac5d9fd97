"""One prompt through the model and its SAEs: what fires on each token, and what replacing a layer's output costs.

A replacement puts x̂ for x at an SAE's output site, at every ordinary position; the first position and massive
activations are passed through, for no SAE is made for them (see ``activations``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from steerserve.errors import AssetError, InvalidRequestError
from steerserve.lab.activations import ordinary_rows
from steerserve.lab.features.lens import LogitLens, token_texts
from steerserve.models.hooks import transformed
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE
from steerserve.types import Site

LABEL_TOKENS = 3


@dataclass(frozen=True)
class ActiveFeature:
    """A feature that fires on a token; ``share`` is its activation over its largest known one, if one is known."""

    id: int
    activation: float
    label: str
    share: float | None


@dataclass(frozen=True)
class TokenReading:
    """What an SAE makes of one token: its strongest features, how many fire, and |x − x̂|² / |x|².

    Where the SAE is not defined there are none and ``error`` is None.
    """

    features: tuple[ActiveFeature, ...]
    num_active: int
    error: float | None


@dataclass(frozen=True)
class SAEReading:
    """One SAE on the prompt, a reading for each token."""

    sae: str
    site: str
    out_site: str
    tokens: tuple[TokenReading, ...]


@dataclass(frozen=True)
class Prediction:
    """The most likely next tokens with their probabilities, and how likely the prompt's own next token was.

    Attributes:
        kl: KL(clean ‖ this) in nats; 0 for the clean run.
        actual: log-probability of the prompt's next token; None after the last.
    """

    top: tuple[tuple[str, float], ...]
    actual: float | None
    kl: float


@dataclass(frozen=True)
class Replacement:
    """The predictions after every token when the outputs of ``saes`` stand in for the model's own; none: clean."""

    saes: tuple[str, ...]
    predictions: tuple[Prediction, ...]


@dataclass(frozen=True)
class Inspection:
    """All of the above of one prompt; ``runs[0]`` is the clean one."""

    model: str
    tokens: tuple[str, ...]
    readings: tuple[SAEReading, ...]
    runs: tuple[Replacement, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


@torch.inference_mode()
def inspect_prompt(
    model: LoadedModel,
    saes: Sequence[SAE],
    prompt: str,
    *,
    replace: bool = False,
    num_features: int = 5,
    num_predictions: int = 5,
    known: Mapping[str, Mapping[int, dict[str, Any]]] | None = None,
) -> Inspection:
    """Run ``prompt``; with ``replace`` once more for each SAE, and for all together if there are several.

    Args:
        known: by the SAE's hash and the feature's id, what ``features.json`` says of it; see ``read_features``.

    Raises:
        InvalidRequestError: the prompt has no tokens, or more than the model can take.
    """
    ids = model.tokenizer(prompt).input_ids
    if not 0 < len(ids) <= model.max_context:
        raise InvalidRequestError("PROMPT", prompt, f"between 1 and {model.max_context} tokens; it has {len(ids)}")
    tokens = torch.tensor([ids])
    captured: dict[Site, torch.Tensor] = {}

    def watch(site: Site, x: torch.Tensor) -> torch.Tensor:
        captured[site] = x.clone()
        return x

    sites = {site for sae in saes for site in (sae.site, sae.out_site)}
    with transformed(model, {site: partial(watch, site) for site in sites}):
        clean = _log_probs(model, tokens)
    lens = LogitLens(model)
    readings = tuple(
        _reading(model, sae, captured, lens, num_features, (known or {}).get(sae.sha256, {})) for sae in saes
    )
    runs = [Replacement((), _predictions(model, tokens, clean, clean, num_predictions))]
    groups = [[sae] for sae in saes] + ([list(saes)] if len(saes) > 1 else []) if replace else []
    for group in groups:
        with transformed(model, _replacing(group)):
            log_probs = _log_probs(model, tokens)
        predictions = _predictions(model, tokens, clean, log_probs, num_predictions)
        runs.append(Replacement(tuple(sae.name for sae in group), predictions))
    return Inspection(model.name, tuple(token_texts(model, ids)), readings, tuple(runs))


def read_features(paths: Sequence[Path]) -> dict[str, dict[int, dict[str, Any]]]:
    """What ``features.json`` files say, by the hash of their SAE and the id of the feature.

    Raises:
        AssetError: a file is missing or is no ``features.json``.
    """
    known: dict[str, dict[int, dict[str, Any]]] = {}
    for path in paths:
        try:
            content = json.loads(path.read_text("utf-8"))
            known[content["sae"]["sha256"]] = {feature["id"]: feature for feature in content["features"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AssetError(f"{path} is no features.json of `steerserve lab features`: {error!r}") from error
    return known


def _log_probs(model: LoadedModel, tokens: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model.model(tokens, use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


def _replacing(saes: Sequence[SAE]) -> dict[Site, Any]:
    """Functions for ``transformed``: those that read come in model order before those that write."""
    read: dict[SAE, torch.Tensor] = {}

    def at(site: Site, x: torch.Tensor) -> torch.Tensor:
        for sae in saes:
            if sae.site == site:
                read[sae] = x
        for sae in saes:
            if sae.out_site == site:
                source = read[sae]
                keep = (ordinary_rows(source) & _inside(sae, source))[..., None]
                x = torch.where(keep, sae.reconstruct(source).to(x.dtype), x)
        return x

    return {site: partial(at, site) for sae in saes for site in (sae.site, sae.out_site)}


def _inside(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    inside: torch.Tensor = x.float().norm(dim=-1) <= sae.max_norm
    return inside


def _reading(
    model: LoadedModel,
    sae: SAE,
    captured: Mapping[Site, torch.Tensor],
    lens: LogitLens,
    num_features: int,
    known: Mapping[int, dict[str, Any]],
) -> SAEReading:
    source, target = captured[sae.site], captured[sae.out_site][0].float()
    defined = (ordinary_rows(source) & _inside(sae, source))[0]
    f = sae.encode(source[0])
    error = (target - sae.reconstruct(source[0])).square().sum(-1) / target.square().sum(-1)
    best = f.topk(min(num_features, sae.d_sae), dim=-1)
    shown = torch.unique(best.indices[defined])
    label = dict(zip(shown.tolist(), _labels(model, lens, sae.W_dec[shown]), strict=True))
    readings = []
    for at, is_defined in enumerate(defined.tolist()):
        pairs = zip(best.indices[at].tolist(), best.values[at].tolist(), strict=True) if is_defined else ()
        features = tuple(
            ActiveFeature(feature, value, label[feature], _share(sae, known, feature, value))
            for feature, value in pairs
            if value > 0
        )
        readings.append(
            TokenReading(features, int((f[at] > 0).sum()), error[at].item())
            if is_defined
            else TokenReading((), 0, None)
        )
    return SAEReading(sae.name, str(sae.site), str(sae.out_site), tuple(readings))


def _share(sae: SAE, known: Mapping[int, dict[str, Any]], feature: int, value: float) -> float | None:
    if feature in known:
        largest = float(known[feature]["max"])
    elif sae.max_activation is not None:
        largest = sae.max_activation[feature].item()
    else:
        return None
    return value / largest if largest > 0 else None


def _labels(model: LoadedModel, lens: LogitLens, directions: torch.Tensor) -> list[str]:
    """The top tokens of each direction by the logit lens, as they are."""
    if not len(directions):
        return []
    ids = (directions.float() @ lens.W.T).topk(LABEL_TOKENS, dim=1).indices
    return [" ".join(text.strip() or repr(text) for text in token_texts(model, row)) for row in ids.tolist()]


def _predictions(
    model: LoadedModel, tokens: torch.Tensor, clean: torch.Tensor, log_probs: torch.Tensor, count: int
) -> tuple[Prediction, ...]:
    kl = (clean.exp() * (clean - log_probs)).sum(-1).clamp(min=0).tolist()
    best = log_probs.topk(count, dim=-1)
    actual = [*log_probs[:-1].gather(1, tokens[0, 1:, None])[:, 0].tolist(), None]
    return tuple(
        Prediction(tuple(zip(token_texts(model, ids), values, strict=True)), actual[at], kl[at])
        for at, (ids, values) in enumerate(zip(best.indices.tolist(), best.values.exp().tolist(), strict=True))
    )
