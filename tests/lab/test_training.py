"""Training: planted dictionaries are found by every objective, and what is exported keeps its promises."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from steerserve.errors import AssetError, InvalidRequestError
from steerserve.lab.manifest import Manifest
from steerserve.lab.store import ActivationStore
from steerserve.lab.training.held_out import HeldOutFigures, held_out_figures
from steerserve.lab.training.settings import CONFIGS, train_config
from steerserve.lab.training.trainer import Trainer, TrainStats
from steerserve.sae.model import SAE
from steerserve.types import Site, Stream

SITE, OUT_SITE = Site(1, Stream.RESID_POST), Site(1, Stream.MLP_OUT)
D, NUM_DIRECTIONS, NUM_ACTIVE, NUM_ROWS = 64, 24, 3, 12_000
COMMON = {"d_sae": 64, "batch_size": 256, "dead_after_rows": 5000, "warmup_steps": 20}
LONG = COMMON | {"steps": 400, "learning_rate": 5e-3}
SHORT = COMMON | {"steps": 20}
PENALTY = {"sparsity_warmup_steps": 100}
SETTINGS: dict[str, dict[str, Any]] = {
    "batchtopk": {"k": NUM_ACTIVE, "threshold_decay": 0.98},
    "topk": {"k": NUM_ACTIVE},
    "matryoshka": {"k": NUM_ACTIVE, "threshold_decay": 0.98, "prefix_shares": (0.5, 1)},
    "jumprelu": {"target_l0": NUM_ACTIVE} | PENALTY,
    "gated": {"l1": 4.0} | PENALTY,
    "relu": {"l1": 1.0} | PENALTY,
    "tied": {"l1": 1.0} | PENALTY,
}
FIELDS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
architectures = pytest.mark.parametrize("architecture", CONFIGS)


def directions(seed: int = 1) -> torch.Tensor:
    return F.normalize(torch.randn(NUM_DIRECTIONS, D, generator=torch.Generator().manual_seed(seed)), dim=1)


def sparse_rows(count: int = NUM_ROWS, scale: float = 1.0, seed: int = 1) -> torch.Tensor:
    """``NUM_ACTIVE`` of the directions on average, each at a strength of 1 to 2, about an offset.

    Rows of another ``seed`` have other directions and offset, and the same strengths.
    """
    generator = torch.Generator().manual_seed(2)
    on = torch.rand(count, NUM_DIRECTIONS, generator=generator) < NUM_ACTIVE / NUM_DIRECTIONS
    strength = 1 + torch.rand(count, NUM_DIRECTIONS, generator=generator)
    offset = 0.5 * torch.randn(D, generator=torch.Generator().manual_seed(seed + 100))
    return (scale * (on * strength @ directions(seed) + offset)).bfloat16().float()


MakeStore = Callable[..., ActivationStore]


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    """A store of three shards with the rows of one site, and those of another if there are any."""

    def make_store(x: torch.Tensor, y: torch.Tensor | None = None, **options: Any) -> ActivationStore:
        directory = Path(tempfile.mkdtemp(dir=tmp_path))
        sites = {str(SITE): x} | ({} if y is None else {str(OUT_SITE): y})
        manifest = Manifest("tiny", "f" * 64, list(sites), D, context_length=16, num_rows=len(x))
        parts = {site: rows.bfloat16().tensor_split(3) for site, rows in sites.items()}
        for number in range(3):
            manifest.shards.append(f"shard_{number:05d}.safetensors")
            shard = {site: rows[number].contiguous() for site, rows in parts.items()}
            save_file(shard, directory / manifest.shards[-1])
        manifest.save(directory)
        out_site = None if y is None else OUT_SITE
        return ActivationStore(directory, SITE, **({"seed": 0, "out_site": out_site} | options))

    return make_store


def trained(store: ActivationStore, architecture: str, **settings: Any) -> Trainer:
    trainer = Trainer(store, train_config(architecture, SETTINGS[architecture] | settings))
    while trainer.num_steps < trainer.config.steps:
        trainer.step()
    return trainer


def recovery(sae: SAE, truth: torch.Tensor) -> torch.Tensor:
    """Largest cosine of each true direction with a decoder row."""
    return (truth @ F.normalize(sae.W_dec, dim=1).T).amax(1)


@architectures
def test_a_planted_dictionary_is_found(make_store: MakeStore, architecture: str) -> None:
    store = make_store(sparse_rows(), held_out_rows=2000)
    sae = trained(store, architecture, **LONG).export("toy")
    figures = held_out_figures(sae, store.held_out())
    assert recovery(sae, directions()).min() > 0.9
    if architecture in ("batchtopk", "matryoshka", "jumprelu"):  # the others shrink, or have exactly k a row
        assert figures.fvu < 0.01
    if architecture in ("relu", "tied", "gated"):
        assert NUM_ACTIVE / 2 < figures.l0 < 3 * NUM_ACTIVE
    else:
        assert figures.l0 == pytest.approx(NUM_ACTIVE, rel=0.05)


def test_what_a_run_reports(make_store: MakeStore) -> None:
    store = make_store(sparse_rows())
    trainer = Trainer(store, train_config("batchtopk", SETTINGS["batchtopk"] | LONG))
    stats: list[TrainStats] = []
    for _ in range(400):
        stats.append(trainer.stats(*trainer.step()))
    sae = trainer.export("toy")
    assert [line.step for line in stats] == list(range(1, 401))
    assert stats[0].fvu > 0.5
    assert stats[-1].fvu < 0.01
    assert stats[-1].l0 == NUM_ACTIVE  # exactly k · n activations of a batch survive
    assert stats[-1].threshold == pytest.approx(sae.threshold[0].item())
    assert stats[0].learning_rate == pytest.approx(5e-3 / 20)
    assert stats[200].learning_rate == 5e-3
    assert stats[-1].learning_rate == pytest.approx(5e-3 / 100)
    # 24 features explain everything: the other 40 are rightly dead, and those that never fire again are counted.
    assert stats[-1].dead_share == pytest.approx(40 / 64, abs=0.1)


def test_a_transcoder_finds_what_is_written(make_store: MakeStore) -> None:
    store = make_store(sparse_rows(), sparse_rows(scale=3.0, seed=7), held_out_rows=2000)
    sae = trained(store, "batchtopk", **COMMON, steps=700, learning_rate=3e-3).export("toy")
    assert (sae.site, sae.out_site, sae.apply_b_dec_to_input) == (SITE, OUT_SITE, False)
    assert recovery(sae, directions(7)).min() > 0.95
    figures = held_out_figures(sae, store.held_out())
    assert figures.fvu < 0.01
    assert figures.l0 == pytest.approx(NUM_ACTIVE, rel=0.05)


def test_a_skip_connection_takes_what_is_linear(make_store: MakeStore) -> None:
    x = sparse_rows()
    mixing = torch.randn(D, D, generator=torch.Generator().manual_seed(3)) / 8
    settings = LONG | {"k": 1, "steps": 200}

    def fvu(skip: bool) -> tuple[HeldOutFigures, SAE]:
        store = make_store(x, 5 * x @ mixing, held_out_rows=2000)
        sae = trained(store, "batchtopk", **settings, skip=skip).export("toy")
        return held_out_figures(sae, store.held_out()), sae

    (with_skip, sae), (without, plain) = fvu(True), fvu(False)
    assert plain.W_skip is None
    assert sae.W_skip is not None
    assert with_skip.fvu < 0.02
    assert without.fvu > 0.2


@architectures
def test_the_exported_sae(make_store: MakeStore, architecture: str) -> None:
    rows = sparse_rows(3000)
    trainer = trained(make_store(rows), architecture, **SHORT)
    sae = trainer.export("toy")
    assert (sae.name, sae.site, sae.out_site, sae.d_in, sae.d_sae) == ("toy", SITE, SITE, D, 64)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    assert (sae.threshold >= 0).all()
    assert sae.k == (NUM_ACTIVE if architecture == "topk" else None)
    assert sae.max_norm == pytest.approx(8 * rows.norm(dim=1).median().item(), rel=0.1)
    assert sae.metadata == {"model_name": "tiny", "context_size": 16, "model_fingerprint": "f" * 64}
    assert not any(getattr(sae, name).requires_grad for name in FIELDS)
    assert torch.equal(sae.W_enc, sae.W_dec.T) == (architecture == "tied")
    assert len(sae.threshold.unique()) == 1 or architecture in ("jumprelu", "gated")


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "gated", "relu", "tied"])
def test_the_export_computes_what_was_trained(make_store: MakeStore, architecture: str) -> None:
    """In units of the activations and without b_dec's detour; but for bfloat16 products of the training."""
    rows = sparse_rows(3000, scale=50.0)
    trainer = trained(make_store(rows), architecture, **COMMON, steps=60, learning_rate=5e-3)
    scale = D**0.5 / rows.norm(dim=1).mean()
    with torch.no_grad():
        forward = trainer.objective(rows * scale, rows * scale, 0)
    sae = trainer.export("toy")
    f = sae.encode(rows)
    differs = (f > 0) != (forward.f > 0)
    assert differs.float().mean() < 0.01
    torch.testing.assert_close(f[~differs], forward.f[~differs] / scale, rtol=0.03, atol=2.0)
    assert (f > 0).any()
    residual = rows - sae.reconstruct(rows)
    assert residual.norm() == pytest.approx((forward.residual / scale).norm().item(), rel=0.03)


@architectures
def test_units_are_those_of_the_activations(make_store: MakeStore, architecture: str) -> None:
    """Training on activations 64 times as large gives the same SAE in the larger unit, bit for bit."""
    small, large = (
        trained(make_store(sparse_rows(3000, scale)), architecture, **SHORT).export("toy") for scale in (1.0, 64.0)
    )
    for name in ("W_enc", "W_dec"):
        assert torch.equal(getattr(small, name), getattr(large, name))
    for name in ("b_enc", "b_dec", "threshold"):
        assert torch.equal(64 * getattr(small, name), getattr(large, name))
    assert large.max_norm == 64 * small.max_norm


def test_units_of_a_transcoder(make_store: MakeStore) -> None:
    """Each site in its own: doubling what is read halves the encoder, doubling what is written scales the features."""
    x, y = sparse_rows(3000), sparse_rows(3000, seed=7)
    settings = SHORT | {"skip": True}
    plain, more_in, more_out = (
        trained(make_store(a * x, b * y), "jumprelu", **settings).export("toy") for a, b in ((1, 1), (2, 1), (1, 2))
    )
    assert plain.W_skip is not None
    assert torch.equal(more_in.W_enc, plain.W_enc / 2)
    assert torch.equal(more_out.W_enc, plain.W_enc * 2)
    assert torch.equal(more_in.reconstruct(2 * x), plain.reconstruct(x))
    assert torch.equal(more_out.reconstruct(x), 2 * plain.reconstruct(x))


def test_a_run_follows_from_its_seed(make_store: MakeStore) -> None:
    rows = sparse_rows(3000)
    first, again, other = (
        trained(make_store(rows, seed=seed), "batchtopk", **SHORT, seed=seed).export("toy") for seed in (0, 0, 1)
    )
    for name in FIELDS:
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


@pytest.mark.parametrize("architecture", ["batchtopk", "topk", "matryoshka"])
def test_dead_features_are_trained_by_what_the_live_ones_leave(make_store: MakeStore, architecture: str) -> None:
    rows = sparse_rows(3000)
    settings = SHORT | {"k": 1}  # with 0, whatever did not fire in a batch is dead after it
    with_aux = trained(make_store(rows), architecture, **settings | {"dead_after_rows": 0}).export("toy")
    without = trained(make_store(rows), architecture, **settings | {"dead_after_rows": 10**9}).export("toy")
    assert all(torch.isfinite(getattr(with_aux, name)).all() for name in FIELDS)
    assert not torch.equal(with_aux.W_dec, without.W_dec)


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("batchtopk", {"d_sae": 8, "k": 9}, "k: got 9, expected at most d_sae, 8"),
        ("batchtopk", {"k": "many"}, "k: got 'many', expected a valid integer"),
        ("batchtopk", {"learning_rate": 0}, "learning_rate: got 0, expected greater than 0"),
        ("batchtopk", {"learning_rate": float("inf")}, "learning_rate: got inf, expected a finite number"),
        ("jumprelu", {"k": 4}, "k: got 4, expected none: jumprelu takes d_sae, steps, .*target_l0"),
        ("relu", {"target_l0": 4}, "target_l0: got 4, expected none: relu takes .*l1"),
        ("topk", {"threshold_decay": 0.9}, "threshold_decay: got 0.9, expected none"),
        ("vanilla", {}, "architecture: got 'vanilla', expected one of batchtopk, topk"),
        ("matryoshka", {"prefix_shares": (0.5, 0.25, 1)}, "prefix_shares: got .*rising shares"),
        ("matryoshka", {"prefix_shares": (0.5,)}, "prefix_shares: got .*end at 1"),
    ],
)
def test_settings_that_are_refused(architecture: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        train_config(architecture, settings)


def test_settings_do_not_change() -> None:
    config = train_config("batchtopk", {"k": "8"})
    assert (config.architecture, config.model_dump()["k"]) == ("batchtopk", 8)
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 3  # type: ignore[misc]


def test_settings_that_do_not_fit_the_sites(make_store: MakeStore) -> None:
    rows = sparse_rows(300)
    with pytest.raises(InvalidRequestError, match="skip: got True, expected a second site"):
        Trainer(make_store(rows), train_config("batchtopk", SHORT | {"skip": True}))
    for architecture in ("tied", "topk"):
        with pytest.raises(InvalidRequestError, match=f"architecture: got '{architecture}', expected another one"):
            Trainer(make_store(rows, rows), train_config(architecture, SHORT))


def test_a_harvest_smaller_than_a_batch_is_refused(make_store: MakeStore) -> None:
    """Rather than waiting for ever for the first full batch."""
    with pytest.raises(AssetError, match=r"holds 255 rows, less than one batch \(256\)"):
        trained(make_store(sparse_rows(255)), "batchtopk", **SHORT)


def test_a_loss_that_is_not_finite_ends_the_run(make_store: MakeStore) -> None:
    trainer = Trainer(make_store(sparse_rows(3000)), train_config("relu", SHORT | {"learning_rate": 1e30}))
    with pytest.raises(InvalidRequestError, match=r"learning_rate: got 1e\+30, .* after \d+ steps the loss"):
        for _ in range(20):
            trainer.step()


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"])
def test_a_short_run_has_the_threshold_of_its_last_batches(make_store: MakeStore, architecture: str) -> None:
    """With noise there is no gap between large and small activations: L0 follows the threshold."""
    rows = sparse_rows(6000) + 0.3 * torch.randn(6000, D, generator=torch.Generator().manual_seed(4))
    config = train_config(architecture, LONG | {"k": 6, "steps": 150, "learning_rate": 2e-2})
    assert config.model_dump()["threshold_decay"] == 0.999
    trainer = Trainer(make_store(rows), config)
    while trainer.num_steps < config.steps:
        trainer.step()
    figures = held_out_figures(trainer.export("toy"), (rows, rows))
    assert figures.l0 == pytest.approx(6, rel=0.1)
