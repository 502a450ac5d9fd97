"""What every test may use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from steerserve.models.pull import pull


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot run."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct as a local Hugging Face directory, from the user's cache; fetched by the first run."""
    return pull("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def gemma3_dir() -> Path:
    """Gemma 3 270M likewise: 240 MB, so that the tests that use it are marked slow."""
    return pull("gemma3-270m")


TINY_COMMON = {
    "vocab_size": 260, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": None, "initializer_range": 0.3,
    "tie_word_embeddings": False,
}  # fmt: skip
TINY_LLAMA = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
TINY_GEMMA = {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": TINY_LLAMA,
    "qwen2": TINY_LLAMA,
    "qwen3": TINY_LLAMA | {"head_dim": 8},
    "gemma2": TINY_LLAMA | TINY_GEMMA | {"num_hidden_layers": 4, "query_pre_attn_scalar": 16},
    "gemma3_text": TINY_LLAMA | TINY_GEMMA | {"num_hidden_layers": 4},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256},
    "gpt_neox": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 256,
    },
}  # fmt: skip
"""A random model of each family, small enough to run in milliseconds; its tokens are the 256 bytes."""


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a random float32 model of a ``model_type``, made on first use."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            directory = tmp_path_factory.mktemp("models") / f"tiny-{family}"
            torch.manual_seed(0)
            config = AutoConfig.for_model(family, **(TINY_COMMON | TINY_CONFIGS[family]))
            AutoModelForCausalLM.from_config(config).save_pretrained(directory)
            _byte_tokenizer().save_pretrained(directory)
            made[family] = directory
        return made[family]

    return make


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)} | {"<eos>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny matrices are slower on many threads, and the machine may be busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
