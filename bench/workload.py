"""What the benches serve: SmolLM2 in bfloat16, and plans that differ in every row."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.nn import functional as F

from steerserve import FeatureTarget, Intervention, Op, SamplingParams, Site, SteeringSpec
from steerserve.models.loading import LoadedModel, load_model
from steerserve.models.pull import pull
from steerserve.sae.model import SAE
from steerserve.types import GenerateRequest

MODEL = "smollm2-135m-instruct"
D_MODEL, VOCAB_SIZE = 576, 49152


def load() -> LoadedModel:
    return load_model(str(pull(MODEL)), torch.bfloat16)


def same_weights(loaded: LoadedModel) -> LoadedModel:
    """Another model over the same tensors, to be hooked by itself; where weights lie must not decide a comparison."""
    tensors = (*loaded.model.parameters(), *loaded.model.buffers())
    return replace(loaded, model=copy.deepcopy(loaded.model, {id(tensor): tensor for tensor in tensors}))


def random_sae(site: Site, d_sae: int) -> SAE:
    """Named after its site; half of its features fire on any token, more than in a trained SAE."""
    generator = torch.Generator().manual_seed(site.layer)
    W_dec = F.normalize(torch.randn(d_sae, D_MODEL, generator=generator))
    zero = torch.zeros(d_sae)
    return SAE(str(site), site, W_dec.T.contiguous(), zero, W_dec, torch.zeros(D_MODEL), threshold=zero.clone())


def features_of_row(sae: SAE, row: int, num_features: int) -> list[FeatureTarget]:
    """Features that no other row has."""
    return [FeatureTarget(sae.name, row * num_features + i) for i in range(num_features)]


def small_edits(targets: Sequence[FeatureTarget]) -> list[Intervention]:
    """Each feature scaled by little: the text stays text, the work is done."""
    return [Intervention(target, Op.SCALE, 0.99) for target in targets]


def random_prompt(generator: random.Random, num_tokens: int) -> tuple[int, ...]:
    """Speed does not depend on what a prompt says; the first ids of the vocabulary are special tokens."""
    return tuple(generator.randrange(100, VOCAB_SIZE) for _ in range(num_tokens))


def greedy_request(
    request_id: str, prompt: tuple[int, ...], num_tokens: int, interventions: Sequence[Intervention] = ()
) -> GenerateRequest:
    """Exactly ``num_tokens`` tokens, whatever they are."""
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    return GenerateRequest(request_id, prompt, sampling, SteeringSpec(tuple(interventions)))
