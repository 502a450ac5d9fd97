"""Where each model family keeps its sites.

Stream names have TransformerLens meaning: ``attn_out`` and ``mlp_out`` are what is added to the
residual, so in Gemma they are read after the post-norms. Sites are hooked at the decoder layers:
Hugging Face's ``hidden_states[-1]`` is taken after the final norm and is no layer's output.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from steerserve.errors import IncompatibleError
from steerserve.types import Site, Stream

STEERABLE = tuple(stream for stream in Stream if stream is not Stream.MLP_IN)
"""Streams whose sites the server edits; the lab also reads ``mlp_in``, for transcoders."""


@dataclass(frozen=True)
class HookPoint:
    """A module and which side of it carries the activation.

    ``input`` is the first positional argument; ``output`` is the result, or its first element where
    the module returns a tuple.
    """

    module: nn.Module
    side: Literal["input", "output"]


@dataclass(frozen=True)
class FamilyAdapter:
    """The module names of one family.

    Attributes:
        layers_path: the ``ModuleList`` of decoder layers, from the causal language model.
        final_norm: the norm before the unembedding, from the causal language model.
        attention: module of a layer that computes attention.
        out_proj: module of a layer that maps the outputs of the heads, side by side, to the residual's width.
        attn_out, mlp_out: module of a layer whose output is added to the residual.
        mlp: module of a layer that is its MLP.
    """

    layers_path: str
    final_norm: str
    attention: str
    out_proj: str
    attn_out: str
    mlp_out: str
    mlp: str = "mlp"

    def layers(self, model: PreTrainedModel) -> list[nn.Module]:
        """Decoder layers in model order."""
        layers = model.get_submodule(self.layers_path)
        assert isinstance(layers, nn.ModuleList)
        return list(layers)

    def first_layers(self, model: PreTrainedModel, num_layers: int) -> nn.Module:
        """The decoder as it is up to its ``num_layers``-th layer, and nothing behind that; all it holds is the model's.

        Called like the decoder; no norm comes before its last hidden state.
        """
        path, _, layers = self.layers_path.rpartition(".")
        decoder = copy.copy(model.get_submodule(path))
        decoder._modules = dict(decoder._modules)
        setattr(decoder, layers, nn.ModuleList(self.layers(model)[:num_layers]))
        setattr(decoder, self.final_norm.rpartition(".")[2], nn.Identity())
        return decoder

    def attention_layers(self, model: PreTrainedModel) -> list[nn.Module]:
        """The attention module of every layer, in model order."""
        return [layer.get_submodule(self.attention) for layer in self.layers(model)]

    def out_projections(self, model: PreTrainedModel) -> list[nn.Module]:
        """The output projection of every layer's attention: its input is ``[B, T, heads · head_dim]``."""
        return [layer.get_submodule(self.out_proj) for layer in self.layers(model)]

    def out_weight(self, model: PreTrainedModel, layer: int) -> Tensor:
        """``[heads · head_dim, d_model]``: what the output projection makes of the heads, side by side; a view."""
        projection = self.out_projections(model)[layer]
        weight = projection.get_parameter("weight").detach()
        return weight if isinstance(projection, Conv1D) else weight.T  # Conv1D keeps it that way round

    def hook_point(self, model: PreTrainedModel, site: Site) -> HookPoint:
        """The module that carries ``site``; the layer must exist."""
        layer = self.layers(model)[site.layer]
        match site.stream:
            case Stream.RESID_PRE:
                return HookPoint(layer, "input")
            case Stream.RESID_POST:
                return HookPoint(layer, "output")
            case Stream.ATTN_Z:
                return HookPoint(layer.get_submodule(self.out_proj), "input")
            case Stream.ATTN_OUT:
                return HookPoint(layer.get_submodule(self.attn_out), "output")
            case Stream.MLP_IN:
                return HookPoint(layer.get_submodule(self.mlp), "input")
            case Stream.MLP_OUT:
                return HookPoint(layer.get_submodule(self.mlp_out), "output")

    def sites(self, model: PreTrainedModel) -> list[Site]:
        """Every site of the model that can be steered, in the order the forward pass reaches them."""
        return [Site(layer, stream) for layer in range(len(self.layers(model))) for stream in STEERABLE]


_LLAMA = FamilyAdapter(
    "model.layers",
    "model.norm",
    attention="self_attn",
    out_proj="self_attn.o_proj",
    attn_out="self_attn",
    mlp_out="mlp",
)
_GEMMA = FamilyAdapter(
    "model.layers",
    "model.norm",
    attention="self_attn",
    out_proj="self_attn.o_proj",
    attn_out="post_attention_layernorm",
    mlp_out="post_feedforward_layernorm",
)
_GPT2 = FamilyAdapter(
    "transformer.h",
    "transformer.ln_f",
    attention="attn",
    out_proj="attn.c_proj",
    attn_out="attn",
    mlp_out="mlp",
)
_NEOX = FamilyAdapter(
    "gpt_neox.layers",
    "gpt_neox.final_layer_norm",
    attention="attention",
    out_proj="attention.dense",
    attn_out="attention",
    mlp_out="mlp",
)

FAMILIES = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
}
"""Adapters by the ``model_type`` of the model's config."""


def adapter_for(model_type: str) -> FamilyAdapter:
    """The adapter of a family.

    Raises:
        IncompatibleError: the family is not supported.
    """
    adapter = FAMILIES.get(model_type)
    if adapter is None:
        raise IncompatibleError("model.model_type", model_type, f"one of {', '.join(sorted(FAMILIES))}")
    return adapter
