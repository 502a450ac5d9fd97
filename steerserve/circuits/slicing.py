"""Cut the weights of a loaded model by head, for every supported family."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steerserve.circuits.sliced import Layer, Norm, Projection, Rope, SlicedModel
from steerserve.errors import IncompatibleError
from steerserve.models.loading import LoadedModel


def slice_model(loaded: LoadedModel) -> SlicedModel:
    """The model as functions of its receivers' inputs; it shares the MLPs, embeddings and norms.

    Raises:
        IncompatibleError: its dtype resolves too little for runs of circuits to be compared.
    """
    model: Any = loaded.model
    if model.dtype not in (torch.float32, torch.float64):
        raise IncompatibleError("model.dtype", str(model.dtype), "float32 or float64, to compare runs of circuits")
    config, decoder = model.config, model.base_model
    slice_layer = {"gpt2": _gpt2_layer, "gpt_neox": _neox_layer}.get(config.model_type, _llama_layer)
    ropes = _ropes(decoder)
    return SlicedModel(
        name=loaded.name,
        fingerprint=loaded.fingerprint,
        token_embedding=model.get_input_embeddings(),
        position_embedding=getattr(decoder, "wpe", None),
        layers=tuple(slice_layer(layer, ropes) for layer in loaded.adapter.layers(model)),
        final_norm=_norm(model.get_submodule(loaded.adapter.final_norm)),
        unembed=model.get_output_embeddings(),
        logit_softcap=getattr(config, "final_logit_softcapping", None),
        parallel=bool(getattr(config, "use_parallel_residual", False)),
        d_mlp=getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size,
    )


def _llama_layer(layer: Any, ropes: dict[str | None, Rope]) -> Layer:
    """Llama, Qwen 2 and 3; and Gemma 2 and 3, which norm what a block adds too, and name their norms otherwise."""
    attention, d_head = layer.self_attn, layer.self_attn.head_dim
    has_post_norms = hasattr(layer, "pre_feedforward_layernorm")
    return Layer(
        attn_norm=_norm(layer.input_layernorm),
        q=_projection(attention.q_proj, d_head, getattr(attention, "q_norm", None)),
        k=_projection(attention.k_proj, d_head, getattr(attention, "k_norm", None)),
        v=_projection(attention.v_proj, d_head),
        W_O=attention.o_proj.weight.detach().T.unflatten(0, (-1, d_head)).contiguous(),
        b_O=_detached(attention.o_proj.bias),
        scaling=attention.scaling,
        softcap=getattr(attention, "attn_logit_softcapping", None),
        window=getattr(attention, "sliding_window", None),
        rope=ropes.get(getattr(attention, "layer_type", None)) or ropes[None],
        post_attn_norm=_norm(layer.post_attention_layernorm) if has_post_norms else None,
        mlp_norm=_norm(layer.pre_feedforward_layernorm if has_post_norms else layer.post_attention_layernorm),
        mlp_module=layer.mlp,
        post_mlp_norm=_norm(layer.post_feedforward_layernorm) if has_post_norms else None,
    )


def _gpt2_layer(layer: Any, ropes: dict[str | None, Rope]) -> Layer:
    """Conv1D keeps its weight ``[inputs, outputs]``, the transpose of a Linear's."""
    attention, d_head = layer.attn, layer.attn.head_dim
    weights = (_by_head(W.T, d_head) for W in attention.c_attn.weight.detach().chunk(3, -1))
    q, k, v = map(Projection, weights, attention.c_attn.bias.detach().view(3, -1, d_head))
    return Layer(
        attn_norm=_norm(layer.ln_1),
        q=q,
        k=k,
        v=v,
        W_O=attention.c_proj.weight.detach().unflatten(0, (-1, d_head)),
        b_O=_detached(attention.c_proj.bias),
        scaling=attention.scaling,
        softcap=None,
        window=None,
        rope=None,
        post_attn_norm=None,
        mlp_norm=_norm(layer.ln_2),
        mlp_module=layer.mlp,
        post_mlp_norm=None,
    )


def _neox_layer(layer: Any, ropes: dict[str | None, Rope]) -> Layer:
    """One matrix holds query, key and value of head 0, then of head 1, and so on."""
    attention, d_head = layer.attention, layer.attention.head_size
    packed = attention.query_key_value
    weights = packed.weight.detach().unflatten(0, (-1, 3, d_head)).unbind(1)
    biases = [None] * 3 if packed.bias is None else packed.bias.detach().view(-1, 3, d_head).unbind(1)
    q, k, v = (Projection(W.mT.contiguous(), b) for W, b in zip(weights, biases, strict=True))
    return Layer(
        attn_norm=_norm(layer.input_layernorm),
        q=q,
        k=k,
        v=v,
        W_O=attention.dense.weight.detach().T.unflatten(0, (-1, d_head)).contiguous(),
        b_O=_detached(attention.dense.bias),
        scaling=attention.scaling,
        softcap=None,
        window=None,
        rope=ropes[None],
        post_attn_norm=None,
        mlp_norm=_norm(layer.post_attention_layernorm),
        mlp_module=layer.mlp,
        post_mlp_norm=None,
    )


def _ropes(decoder: Any) -> dict[str | None, Rope]:
    """The model's own rotary tables: under None, or by layer type where local layers turn faster (Gemma 3)."""
    rotary, example = getattr(decoder, "rotary_emb", None), next(decoder.parameters())
    if rotary is None:
        return {}
    if not hasattr(rotary, "layer_types"):
        return {None: partial(rotary, example)}
    return {kind: partial(rotary, example, layer_type=kind) for kind in rotary.layer_types}


def _projection(linear: Any, d_head: int, norm: Any = None) -> Projection:
    bias = None if linear.bias is None else linear.bias.detach().view(-1, d_head)
    return Projection(_by_head(linear.weight.detach(), d_head), bias, None if norm is None else _norm(norm))


def _by_head(weight: Tensor, d_head: int) -> Tensor:
    """``[heads · d_head, d_model]`` to ``[heads, d_model, d_head]``."""
    return weight.reshape(-1, d_head, weight.shape[-1]).mT.contiguous()


def _norm(module: Any) -> Norm:
    """Gemma's gains are offsets from 1."""
    centered = isinstance(module, nn.LayerNorm)
    gain: Tensor = module.weight.detach() + (1.0 if type(module).__name__.startswith("Gemma") else 0.0)
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return Norm(gain, module.bias.detach() if centered else None, eps, centered)


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()
