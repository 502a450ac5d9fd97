"""Random models of every family, and flat batches for a runner."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from steerserve.config import EngineConfig
from steerserve.engine.runner import ModelRunner
from steerserve.models.families import adapter_for
from steerserve.models.loading import LoadedModel

COMMON = {
    "vocab_size": 260, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": None, "initializer_range": 0.3,
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 8,
}  # fmt: skip
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama, odd sizes": (
        "llama",
        {
            "hidden_size": 36,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 10,
            "intermediate_size": 37,
        },
    ),
    "llama, scaled rope and biases": ("llama", {"rope_parameters": LLAMA3_ROPE, "attention_bias": True}),
    "qwen2, sliding": ("qwen2", SLIDING | {"use_sliding_window": True}),
    "qwen3, sliding": ("qwen3", SLIDING | {"use_sliding_window": True}),
    "gemma2": (
        "gemma2",
        SLIDING | {"query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": ("gemma3_text", SLIDING | {"query_pre_attn_scalar": 20}),
    "gpt2": ("gpt2", {}),
    "gpt2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2, unscaled": ("gpt2", {"scale_attn_weights": False, "initializer_range": 0.1}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5}),
    "gpt_neox, in sequence": ("gpt_neox", {"use_parallel_residual": False}),
}
ONE_PER_FAMILY = sorted({family: name for name, (family, _) in reversed(VARIANTS.items())}.values())

LENGTHS = (37, 5, 21)
"""Of the sequences of most tests: longer than the windows and than several blocks, and shorter than one."""


def random_model(variant: str, dtype: torch.dtype = torch.float32, **changes: object) -> LoadedModel:
    family, special = VARIANTS[variant]
    values = COMMON | special | changes
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(values if family not in ("gpt2", "gpt_neox") else _without_gqa(values)))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()
    return LoadedModel(
        model=model,
        tokenizer=PreTrainedTokenizerFast.__new__(PreTrainedTokenizerFast),  # not used
        adapter=adapter_for(family),
        name=variant,
        fingerprint="",
        d_model=config.hidden_size,
        n_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        max_context=config.max_position_embeddings,
        eos_token_ids=frozenset(),
    )


def _without_gqa(values: dict[str, Any]) -> dict[str, Any]:
    absent = ("num_key_value_heads", "head_dim")
    return {name: value for name, value in values.items() if name not in absent}


def random_sequences(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(length)] for length in lengths]


def give_blocks(runner: ModelRunner, num_rows: int, seed: int = 0) -> None:
    """Every row enough blocks of the cache, in random order."""
    num_blocks, block_size = runner.kv_store.blocks.shape[2], runner.kv_store.blocks.shape[4]
    blocks = random.Random(seed).sample(range(num_blocks), num_blocks)
    per_row = 64 // block_size
    for row in range(num_rows):
        runner.set_blocks(row, 0, blocks[row * per_row : (row + 1) * per_row])


def feed(
    runner: ModelRunner, sequences: dict[int, list[int]], max_chunk: int, seed: int = 0
) -> dict[int, torch.Tensor]:
    """Feed each row its sequence in random chunks, interleaved in random order; logits ``[length, vocab]`` a row."""
    rng = random.Random(seed)
    fed = dict.fromkeys(sequences, 0)
    read: dict[int, list[torch.Tensor]] = {row: [] for row in sequences}
    while unfinished := [row for row in sequences if fed[row] < len(sequences[row])]:
        tokens, positions, rows = [], [], []
        for row in rng.sample(unfinished, rng.randint(1, len(unfinished))):
            start = fed[row]
            chunk = sequences[row][start : start + rng.randint(1, max_chunk)]
            fed[row] += len(chunk)
            tokens += chunk
            positions += range(start, fed[row])
            rows += [row] * len(chunk)
        logits = runner.forward(tokens, positions, rows, range(len(tokens)))
        for row, line in zip(rows, logits, strict=True):
            read[row].append(line)
    return {row: torch.stack(lines) for row, lines in read.items()}


def reference_logits(model: PreTrainedModel, sequence: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([sequence])).logits[0].float()


def small_config(**changes: object) -> EngineConfig:
    values = {
        "max_num_seqs": 4, "max_model_len": 64, "max_num_batched_tokens": 48, "block_size": 8, "max_step_entries": 256,
    }  # fmt: skip
    return EngineConfig.model_validate(values | changes)
