"""SAELens' ``cfg.json``, of version 6 and before, checked and in one form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerserve.errors import AssetError
from steerserve.sae.formats.files import integer, read_json

TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
ARCHITECTURES = ("standard", "jumprelu", "topk", "gated", *TRANSCODERS)
NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale", "expected_average_only_in")

_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
_METADATA_ONCE_FLAT = (
    "model_name", "hook_name", "hook_name_out", "hook_head_index", "hf_hook_name", "context_size", "dataset_path",
    "prepend_bos", "model_from_pretrained_kwargs",
)  # fmt: skip


@dataclass(frozen=True)
class SAELensConfig:
    """What the tensors mean.

    Attributes:
        normalisation: one of ``NORMALISATIONS``.
        k: of ``topk``, else None.
        rescale_acts_by_decoder_norm: a ``topk`` SAE ranks pre · |W_dec|, and that is its f.
        metadata: hook names, model, and whatever else stands there.
    """

    architecture: str
    d_in: int
    d_sae: int
    d_out: int
    apply_b_dec_to_input: bool
    normalisation: str
    k: int | None
    rescale_acts_by_decoder_norm: bool
    metadata: dict[str, Any]

    @property
    def transcodes(self) -> bool:
        """Whether the output belongs to ``metadata.hook_name_out``."""
        return self.architecture in TRANSCODERS

    @property
    def is_centred(self) -> bool:
        """Whether TransformerLens took the mean off the model's activations, which its other processing leaves alone.

        Only models whose norms subtract the mean are processed so: that the output lacks it, they do not notice.
        """
        return bool((self.metadata.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights"))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that the weight file must hold."""
        d_in, d_sae, d_out = self.d_in, self.d_sae, self.d_out
        shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
        if self.architecture == "gated":
            return shapes | dict.fromkeys(("b_gate", "b_mag", "r_mag"), (d_sae,))
        shapes["b_enc"] = (d_sae,)
        if "jumprelu" in self.architecture:
            shapes["threshold"] = (d_sae,)
        if "skip" in self.architecture:
            shapes["W_skip"] = (d_out, d_in)
        return shapes


def read_config(path: Path) -> SAELensConfig:
    """Read ``cfg.json``.

    Raises:
        AssetError: not such a file, or equations that ``SAE`` does not compute; nothing is approximated.
    """
    raw = {_RENAMED.get(key, key): value for key, value in read_json(path).items()}
    metadata = raw.get("metadata", {key: raw[key] for key in _METADATA_ONCE_FLAT if key in raw})
    if not isinstance(metadata, dict):
        raise AssetError(f"{path}: metadata is {metadata!r}, expected a JSON object")
    if "hook_name" in raw:
        metadata = {"hook_name": raw["hook_name"]} | metadata
    architecture, k = _architecture(path, raw)
    d_in = integer(path, raw, "d_in")
    transcodes = architecture in TRANSCODERS
    _check_shape_of_activations(path, raw, metadata)
    return SAELensConfig(
        architecture=architecture,
        d_in=d_in,
        d_sae=integer(path, raw, "d_sae"),
        d_out=integer(path, raw, "d_out") if transcodes else d_in,
        apply_b_dec_to_input=not transcodes and bool(raw.get("apply_b_dec_to_input", True)),
        normalisation=_normalisation(path, raw, transcodes),
        k=k,
        rescale_acts_by_decoder_norm=bool(raw.get("rescale_acts_by_decoder_norm", False)),
        metadata=metadata,
    )


def _architecture(path: Path, raw: Mapping[str, Any]) -> tuple[str, int | None]:
    """The architecture and the k of TopK, which before version 6 was an activation function of ``standard``."""
    architecture = raw.get("architecture", "standard")
    activation = raw.get("activation_fn", "relu")
    if architecture == "standard" and activation == "topk":
        architecture = "topk"
        raw = {**raw, **(raw.get("activation_fn_kwargs") or {})}
    elif activation not in ("relu", "topk"):
        raise AssetError(f"{path}: activation function {activation!r} is not supported (supported: relu, topk)")
    if architecture not in ARCHITECTURES:
        hint = "; save it with save_inference_model" if "batchtopk" in str(architecture) else ""
        raise AssetError(
            f"{path}: architecture {architecture!r} is not supported (supported: {', '.join(ARCHITECTURES)}){hint}"
        )
    return architecture, integer(path, raw, "k") if architecture == "topk" else None


def _normalisation(path: Path, raw: Mapping[str, Any], transcodes: bool) -> str:
    value = raw.get("normalize_activations")
    if value is None or isinstance(value, bool):
        value = "expected_average_only_in" if value else "none"
    if value not in NORMALISATIONS or (transcodes and value == "expected_average_only_in"):
        supported = [name for name in NORMALISATIONS if not transcodes or name != "expected_average_only_in"]
        raise AssetError(
            f"{path}: normalize_activations={value!r} is not supported for this architecture "
            f"(supported: {', '.join(supported)})"
        )
    return str(value)


def _check_shape_of_activations(path: Path, raw: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    if raw.get("reshape_activations", "none") not in (None, "none"):
        raise AssetError(f"{path}: reshape_activations={raw['reshape_activations']!r} is not supported")
    if (head := metadata.get("hook_head_index", raw.get("hook_head_index"))) is not None:
        raise AssetError(f"{path}: the SAE reads head {head} alone, which is not supported")
