"""``steerserve sae``: what an SAE of any format is, convert it to SAELens' format, check that it is what it says."""

from __future__ import annotations

import shutil
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from torch import nn

from steerserve.errors import AssetError, IncompatibleError
from steerserve.lab.commands.options import ModelOption, TextsOption, console
from steerserve.lab.corpus import Split, read_documents
from steerserve.lab.evaluation.fidelity import held_out_contexts, measure_fidelity
from steerserve.lab.verification import Declared, implausible
from steerserve.models.loading import LoadedModel, load_model
from steerserve.models.pull import resolve_model
from steerserve.sae.formats.files import NormGain
from steerserve.sae.formats.saelens import save_sae
from steerserve.sae.model import SAE
from steerserve.sae.registry import download_from_hub, format_of, load_sae
from steerserve.steering.catalog import check_sae
from steerserve.types import Site

CONTEXT_LENGTH = 128
NUM_PROBES = 256

app = typer.Typer(help="Inspect, convert and verify SAEs of any format.", no_args_is_help=True, add_completion=False)

PathArgument = Annotated[str, typer.Argument(metavar="PATH", help="SAE directory or weight file; with --repo, in it.")]
RepoOption = Annotated[str | None, typer.Option(help="Repository on the Hugging Face hub, as org/name.")]
SiteOption = Annotated[str | None, typer.Option(help="Where the SAE reads, if neither files nor path say.")]
ScaleOption = Annotated[
    float | None, typer.Option(help="√d / mean |x|, for an SAE trained on activations so scaled whose files lack it.")
]
GainModelOption = Annotated[
    str | None, typer.Option("--model", help="Whose norm's gain is folded, for an SAE that reads ln2.hook_normalized.")
]


class Dtype(StrEnum):
    """Of the matrices in a written file."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


TOLERANCE = {Dtype.FLOAT32: 1e-5, Dtype.FLOAT16: 1e-2, Dtype.BFLOAT16: 5e-2}
"""Largest |output − output of the converted| / |output|: some times the error of rounding the matrices."""


@app.command()
def inspect(
    path: PathArgument,
    repo: RepoOption = None,
    site: SiteOption = None,
    norm_scaling_factor: ScaleOption = None,
    model: GainModelOption = None,
) -> None:
    """Show what an SAE is: its format, equations, shapes, site and scales."""
    gain = norm_gain(load_model(resolve_model(model), torch.float32)) if model else None
    name, root, sae = _load(path, repo, site, norm_scaling_factor, gain)
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")  # a hash is of use only as a whole
    for row in _description(name, root, sae):
        table.add_row(*row)
    console.print(table)


@app.command()
def convert(
    path: PathArgument,
    out: Annotated[Path, typer.Argument(help="Directory to write, in SAELens format; must not exist.")],
    repo: RepoOption = None,
    site: SiteOption = None,
    norm_scaling_factor: ScaleOption = None,
    model: GainModelOption = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the matrices.")] = Dtype.FLOAT32,
) -> None:
    """Write an SAE in SAELens format, read it again, and compare what the two compute."""
    if out.exists():
        raise AssetError(f"{out} exists already")
    gain = norm_gain(load_model(resolve_model(model), torch.float32)) if model else None
    _, _, sae = _load(path, repo, site, norm_scaling_factor, gain)
    partial = out.with_name(out.name + ".partial")
    try:
        save_sae(sae, partial, getattr(torch, dtype.value))
        error, agreement = _difference(sae, load_sae(partial))
        if not error <= TOLERANCE[dtype]:
            raise AssetError(f"{out} is not written: in {dtype}, outputs differ by {error:.1e} of their size")
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    console.print(
        f"{out}: outputs differ by {error:.1e} of their size, {agreement:.3%} of the active features are the same"
    )


@app.command()
def verify(
    path: PathArgument,
    texts: TextsOption,
    repo: RepoOption = None,
    site: SiteOption = None,
    norm_scaling_factor: ScaleOption = None,
    model: ModelOption = "smollm2-135m-instruct",
    tokens: Annotated[int, typer.Option(min=CONTEXT_LENGTH, help="Most tokens to read.")] = 20_000,
) -> None:
    """Run the model on texts and compare the SAE's figures with declared ones; refuse it if they cannot be right."""
    loaded = load_model(resolve_model(model), torch.float32)
    _, root, sae = _load(path, repo, site, norm_scaling_factor, norm_gain(loaded))
    check_sae(sae, loaded)
    sample = [document.text for split in Split for document in read_documents(texts, split)]
    figures = measure_fidelity(loaded, sae, held_out_contexts(loaded, sample, CONTEXT_LENGTH, tokens))
    declared = Declared.of(sae, root if root.is_dir() else root.parent)
    table = Table("figure", "measured", "declared")
    table.add_row("L0", f"{figures.l0:.2f}", _or_none(declared.l0))
    table.add_row("FVU", f"{figures.fvu:.4f}", _or_none(declared.fvu))
    table.add_row("ΔCE, nats per token", f"{figures.delta_ce:.4f}", "")
    table.add_row("tokens", f"{figures.held_out_tokens:,}", "")
    console.print(table)
    if reasons := implausible(sae, figures.l0, figures.fvu, declared):
        raise AssetError(f"{sae.name} is not what it says on {loaded.name} at {sae.site}: " + "; ".join(reasons))


def norm_gain(model: LoadedModel) -> NormGain:
    """By layer, the gain ``[d_model]`` of the RMSNorm before the MLP, for ``load_sae``."""

    @torch.inference_mode()
    def gain(layer: int) -> torch.Tensor:
        if layer >= model.n_layers:
            raise IncompatibleError("sae.layer", layer, f"below {model.n_layers}, as {model.name} has")
        modules = dict(model.adapter.layers(model.model)[layer].named_children())
        norm = modules.get("pre_feedforward_layernorm", modules.get("post_attention_layernorm"))
        if norm is None or isinstance(norm, nn.LayerNorm):
            raise IncompatibleError("model", model.name, "one with an RMSNorm before the MLP")
        # Equal entries leave an RMSNorm as its gain; large ones, without its epsilon.
        large = torch.full((model.d_model,), 1e3, dtype=model.model.dtype)
        return norm(large).float().clone()  # type: ignore[no-any-return]

    return gain


def _load(
    path: str, repo: str | None, site: str | None, norm_scaling_factor: float | None, gain: NormGain | None
) -> tuple[str, Path, SAE]:
    """The format's name, the local directory or file, and the SAE."""
    local = download_from_hub(repo, path) if repo else Path(path)
    name, root = format_of(local)
    sae = load_sae(
        root,
        site=Site.parse(site, "--site") if site else None,
        norm_scaling_factor=norm_scaling_factor,
        norm_gain=gain,
        origin=f"{repo}/{path}" if repo else None,
    )
    return name, root, sae


def _description(format_name: str, root: Path, sae: SAE) -> list[tuple[str, str]]:
    kind = f"TopK, k = {sae.k}" if sae.k is not None else "JumpReLU" if (sae.threshold > 0).any() else "ReLU"
    tensors = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.threshold, sae.W_skip]
    parameters = sum(tensor.numel() for tensor in tensors if tensor is not None)
    reason = sae.why_not_steerable()
    return [
        ("SAE", sae.name),
        ("format", f"{format_name}: {root}"),
        ("SHA-256", sae.sha256),
        ("model", str(sae.metadata.get("model_name", "not said"))),
        ("activation", kind),
        ("shapes", f"{sae.d_in} → {sae.d_sae:,} features → {sae.d_out}; {parameters:,} parameters"),
        ("reads", str(sae.site) + (", b_dec subtracted" if sae.apply_b_dec_to_input else "")),
        ("writes", str(sae.out_site) + (", with a skip connection" if sae.W_skip is not None else "")),
        ("run-time normalisation", str(sae.normalisation)),
        ("threshold", _spread(sae.threshold)),
        ("|W_dec| of a feature", _spread(sae.W_dec.norm(dim=1))),
        ("largest |x|", f"{sae.max_norm:.4g}"),
        ("largest activations", "not recorded" if sae.max_activation is None else _spread(sae.max_activation)),
        ("declared L0", _or_none(Declared.of(sae, root if root.is_dir() else root.parent).l0)),
        ("steering", f"not possible: {sae.name} {reason}" if reason else "possible"),
    ]


def _spread(values: torch.Tensor) -> str:
    low, middle, high = (value.item() for value in (values.min(), values.median(), values.max()))
    return f"{low:.4g} … {high:.4g}, median {middle:.4g}"


def _or_none(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _difference(sae: SAE, other: SAE) -> tuple[float, float]:
    """Relative difference of the outputs, and the share of ``sae``'s active features that are active in ``other``.

    On inputs each of which makes one feature fire, spread over all features.
    """
    features = torch.linspace(0, sae.d_sae - 1, min(NUM_PROBES, sae.d_sae)).long()
    directions = sae.W_enc.T[features]
    pre = (sae.threshold + 1 - sae.encoder_bias())[features]
    x = directions * (pre / directions.square().sum(1).clamp(min=1e-12))[:, None]
    f, out, again = sae.encode(x), sae.reconstruct(x), other.reconstruct(x)
    active = f > 0
    error = ((out - again).norm() / out.norm()).item()
    return error, (active & (other.encode(x) > 0)).sum().item() / max(active.sum().item(), 1)
