"""Tiny models in true float64, and prompts for them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from steerserve.circuits.prompts import PromptPairs
from steerserve.models.loading import LoadedModel, load_model

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("acdc_oracle", "hand_built")


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For every test here."""


@pytest.fixture
def load_exact(tiny_model_dir, monkeypatch) -> Callable[..., LoadedModel]:
    """The first layers of a tiny model, in float64 throughout: ``transformers`` takes norms and softmaxes in float32.

    Its norms have gains, and its biases are not zero.
    """
    softmax = F.softmax

    def load(family: str, num_layers: int = 2) -> LoadedModel:
        loaded = load_model(str(tiny_model_dir(family)), torch.float64)
        layers = loaded.model.get_submodule(loaded.adapter.layers_path)
        del layers[num_layers:]
        loaded.model.config.num_hidden_layers = num_layers
        loaded = replace(loaded, n_layers=num_layers)
        monkeypatch.setattr(nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))
        generator = torch.Generator().manual_seed(1)
        for module in loaded.model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                monkeypatch.setattr(type(module), "forward", _rms_norm)
        with torch.no_grad():
            for name, parameter in loaded.model.named_parameters():
                if name.endswith("bias") or "norm" in name or ".ln_" in name:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        return loaded

    return load


def _rms_norm(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    gain = self.weight + 1 if type(self).__name__.startswith("Gemma") else self.weight
    eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * gain


@pytest.fixture
def make_pairs() -> Callable[..., PromptPairs]:
    """Random pairs that differ at some positions, the first and the last not among them; of different lengths."""

    def make(num: int = 3, length: int = 10, seed: int = 0) -> PromptPairs:
        generator = torch.Generator().manual_seed(seed)
        clean = torch.randint(1, 256, (num, length), generator=generator)
        corrupted = clean.clone()
        changed = [2, 4, 5]
        corrupted[:, changed] = torch.randint(1, 256, (num, len(changed)), generator=generator)
        last = torch.full((num,), length - 1)
        last[0] = length - 3
        real = torch.arange(length) <= last[:, None]
        answers = tuple((int(t),) for t in torch.randint(1, 128, (num,), generator=generator))
        wrong = tuple((t + 100,) for (t,) in answers)
        return PromptPairs("random", clean * real, corrupted * real, last, answers, wrong, ())

    return make
