"""A tiny random model, harvests made of given rows, and texts."""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing

from steerserve.lab.manifest import Manifest
from steerserve.models.loading import LoadedModel, load_model
from steerserve.sae.model import SAE
from steerserve.types import Site, Stream

SITE = Site(1, Stream.RESID_POST)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For every test here."""


@pytest.fixture(scope="session")
def tiny(tiny_model_dir: Callable[[str], Path]) -> LoadedModel:
    """A float32 llama of width 32 and 3 layers whose tokens are bytes; to be left unchanged."""
    return load_model(str(tiny_model_dir("llama")), torch.float32)


@pytest.fixture(scope="session")
def with_bos(tiny: LoadedModel) -> LoadedModel:
    """The same with a tokenizer that begins every text with a BOS token, 257, as Gemma's does."""
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 257)])
    return replace(tiny, tokenizer=tokenizer)


@pytest.fixture
def with_massive_x(tiny_model_dir: Callable[[str], Path], token_id: TokenId) -> LoadedModel:
    """The same, but the residual stream of every letter X has a huge norm."""
    model = load_model(str(tiny_model_dir("llama")), torch.float32)
    with torch.no_grad():
        model.model.get_input_embeddings().weight[token_id("X")] *= 1000
    return model


TokenId = Callable[[str], int]


@pytest.fixture(scope="session")
def token_id(tiny: LoadedModel) -> TokenId:
    """The token of a single character."""

    def token_id(character: str) -> int:
        (token,) = tiny.tokenizer(character).input_ids
        return int(token)

    return token_id


WriteStore = Callable[[list[torch.Tensor]], Path]


@pytest.fixture
def write_store(tmp_path: Path) -> WriteStore:
    """A harvest on disk whose shards hold the given rows ``[n, d]``, rounded to bfloat16."""

    def write(shards: list[torch.Tensor]) -> Path:
        directory = Path(tempfile.mkdtemp(dir=tmp_path))
        manifest = Manifest("tiny", "f" * 64, [str(SITE)], shards[0].shape[1], context_length=16)
        for number, rows in enumerate(shards):
            file = f"shard_{number:05d}.safetensors"
            tokens = torch.zeros(len(rows), dtype=torch.int32)
            save_file({"tokens": tokens, str(SITE): rows.bfloat16().contiguous()}, directory / file)
            manifest.shards.append(file)
            manifest.num_rows += len(rows)
        manifest.save(directory)
        return directory

    return write


@pytest.fixture
def random_sae() -> SAE:
    """48 features over width 32: unit decoder rows, tied encoder, thresholds that some activations pass."""
    generator = torch.Generator().manual_seed(1)
    W_dec = torch.randn(48, 32, generator=generator)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    return SAE(
        name="random",
        site=SITE,
        W_enc=W_dec.T.contiguous(),
        b_enc=0.1 * torch.randn(48, generator=generator),
        W_dec=W_dec,
        b_dec=0.1 * torch.randn(32, generator=generator),
        threshold=0.5 * torch.rand(48, generator=generator),
        sha256="a" * 64,
    )


@pytest.fixture
def lossless_sae() -> SAE:
    """x = relu(x) − relu(−x), width 32: every coordinate is two features, of which one is active."""
    eye, zeros = torch.eye(32), torch.zeros(64)
    W_dec = torch.cat([eye, -eye])
    return SAE("lossless", SITE, W_dec.T.contiguous(), zeros, W_dec, torch.zeros(32), zeros)


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """Fifty texts of six words, all different."""
    rng = random.Random(0)
    words = ["river", "stone", "cloud", "small", "green", "walks", "sings", "under", "seven", "quiet"]
    return [f"{number} " + " ".join(rng.choices(words, k=6)) + "." for number in range(50)]
