"""Whole runs: interrupted in every way, they end in the same bytes; what they leave behind; sweeps of them."""

from __future__ import annotations

import csv
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from steerserve.errors import AssetError, InvalidRequestError, SteerserveError
from steerserve.lab.commands.sweep import sweep_command
from steerserve.lab.commands.train import train_command
from steerserve.lab.store import ActivationStore
from steerserve.lab.training.checkpoint import CHECKPOINT, load_checkpoint
from steerserve.lab.training.held_out import held_out_figures
from steerserve.lab.training.metrics import Metrics, read_metrics
from steerserve.lab.training.run import RunOptions, run
from steerserve.lab.training.settings import CONFIGS, train_config
from steerserve.lab.training.sweep import grid_configs, load_run, parse_grid
from steerserve.sae.registry import load_sae
from steerserve.types import Site, Stream

SITE = Site(1, Stream.RESID_POST)
STEPS = 12
SETTINGS: dict[str, Any] = {"d_sae": 24, "batch_size": 32, "steps": STEPS, "warmup_steps": 3, "dead_after_rows": 40}
OPTIONS = RunOptions(checkpoint_every=5, log_every=2)


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def harvest(write_store) -> Path:
    """170 rows: an epoch is 5 batches, so that a run goes through more than two."""
    rows = torch.randn(170, 16, generator=torch.Generator().manual_seed(0)) + 1
    return write_store(list(rows.split([50, 70, 50])))


def store_of(harvest: Path, **options: Any) -> ActivationStore:
    return ActivationStore(harvest, SITE, **({"seed": 0, "shards_in_buffer": 2} | options))


def weights(directory: Path) -> bytes:
    return (directory / "sae_weights.safetensors").read_bytes()


def killed_at(step: int) -> Any:
    def report(metrics: Metrics) -> None:
        if metrics.step >= step:
            raise KilledError

    return report


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_resumed_run_ends_in_the_same_bytes(harvest: Path, tmp_path: Path, architecture: str) -> None:
    settings = SETTINGS | ({"k": 3} if "k" in CONFIGS[architecture].model_fields else {"sparsity_warmup_steps": 8})
    config = train_config(architecture, settings)
    run(store_of(harvest), config, tmp_path / "whole" / "sae", OPTIONS)
    out = tmp_path / "cut" / "sae"
    for step, checkpoint in ((4, None), (8, 5), (12, 10)):  # the first time before any checkpoint
        with pytest.raises(KilledError):
            run(store_of(harvest), config, out, OPTIONS, killed_at(step))
        assert (out / CHECKPOINT).exists() == (checkpoint is not None)
        assert not (out / "cfg.json").exists()
    seen: list[int] = []
    run(store_of(harvest), config, out, OPTIONS, lambda metrics: seen.append(metrics.step))
    assert seen == [12]  # it went on behind step 10
    assert weights(out) == weights(tmp_path / "whole" / "sae")
    assert not (out / CHECKPOINT).exists()
    whole, cut = (read_metrics(directory) for directory in (tmp_path / "whole" / "sae", out))
    assert [line.step for line in cut] == [2, 4, 6, 8, 10, 12]
    for one, other in zip(whole, cut, strict=True):
        assert one.__dict__ | {"rows_per_second": 0} == other.__dict__ | {"rows_per_second": 0}
    assert "<svg" in (out / "training.svg").read_text()


def test_a_resumed_transcoder_ends_in_the_same_bytes(tmp_path: Path, write_store) -> None:
    from safetensors.torch import load_file, save_file

    from steerserve.lab.manifest import Manifest

    directory = write_store([torch.randn(90, 16, generator=torch.Generator().manual_seed(number)) for number in (0, 1)])
    out_site = Site(1, Stream.MLP_OUT)
    for path in directory.glob("shard*"):
        tensors = load_file(path)
        save_file(tensors | {str(out_site): tensors[str(SITE)].flip(1).contiguous()}, path)
    manifest = Manifest.load(directory)
    manifest.sites.append(str(out_site))
    manifest.save(directory)
    config = train_config("batchtopk", SETTINGS | {"k": 3, "skip": True})
    run(store_of(directory, out_site=out_site), config, tmp_path / "whole" / "sae", OPTIONS)
    with pytest.raises(KilledError):
        run(store_of(directory, out_site=out_site), config, tmp_path / "sae", OPTIONS, killed_at(8))
    run(store_of(directory, out_site=out_site), config, tmp_path / "sae", OPTIONS)
    assert weights(tmp_path / "sae") == weights(tmp_path / "whole" / "sae")
    loaded = load_sae(tmp_path / "sae")
    assert (loaded.site, loaded.out_site) == (SITE, out_site)
    assert loaded.W_skip is not None


def test_a_process_that_is_killed_goes_on(harvest: Path, tmp_path: Path) -> None:
    """kill -9 at whatever it does; then the same command again."""
    script = "import typer; from steerserve.lab.commands.train import train_command as train; typer.run(train)"
    settings = ["--steps", "200", "--d-sae", "64", "--k", "3", "--batch-size", "32", "--checkpoint-every", "5"]
    options = ["--activations", harvest, "--site", SITE, *settings]
    out, whole = tmp_path / "cut" / "sae", tmp_path / "whole" / "sae"
    command = [sys.executable, "-c", script, *map(str, options), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (out / CHECKPOINT).exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "cfg.json").exists()
    assert (out / CHECKPOINT).exists()
    for directory in (out, whole):
        assert invoke(train_command, *options, "--out", directory).exit_code == 0
    assert weights(out) == weights(whole)
    assert json.loads((out / "evaluation.json").read_text())["training"]["architecture"] == "batchtopk"


def test_a_full_disk_leaves_the_last_checkpoint(harvest: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    config, out = train_config("batchtopk", SETTINGS | {"k": 3}), tmp_path / "sae"
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk(metrics: Metrics) -> None:
        if metrics.step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))

    try:
        with pytest.raises(AssetError, match=r"checkpoint of step 10 cannot be written: .*the one before is intact"):
            run(store_of(harvest), config, out, OPTIONS, fill_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert {path.name for path in out.iterdir()} == {CHECKPOINT, "metrics.csv"}
    run(store_of(harvest), config, out, OPTIONS)
    run(store_of(harvest), config, tmp_path / "whole" / "sae", OPTIONS)
    assert weights(out) == weights(tmp_path / "whole" / "sae")


def test_a_checkpoint_of_other_settings_is_refused(harvest: Path, tmp_path: Path) -> None:
    settings = SETTINGS | {"k": 3}
    with pytest.raises(KilledError):
        run(store_of(harvest), train_config("batchtopk", settings), tmp_path, OPTIONS, killed_at(6))
    before = (tmp_path / CHECKPOINT).read_bytes()
    for architecture, more, message in (
        ("batchtopk", {"k": 4}, "is of a run with k 3, not 4; remove it, or choose another directory"),
        ("topk", {}, "is of a run with architecture batchtopk, not topk"),
    ):
        with pytest.raises(AssetError, match=message):
            run(store_of(harvest), train_config(architecture, settings | more), tmp_path, OPTIONS)
    with pytest.raises(AssetError, match="is of a run with held_out_rows 0, not 10"):
        run(store_of(harvest, held_out_rows=10), train_config("batchtopk", settings), tmp_path, OPTIONS)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path, {}) is None
    (tmp_path / CHECKPOINT).write_bytes(b"not a checkpoint")
    with pytest.raises(AssetError, match=r"cannot be read as a checkpoint: .*; remove it to start anew"):
        load_checkpoint(tmp_path, {})


def test_weights_that_are_not_finite_are_not_kept(harvest: Path, tmp_path: Path) -> None:
    config = train_config("relu", SETTINGS | {"learning_rate": 1e30, "steps": 50})
    with pytest.raises(InvalidRequestError, match=r"learning_rate: got 1e\+30, .*not finite"):
        run(store_of(harvest), config, tmp_path, RunOptions(checkpoint_every=1))
    for state in [found[0] for found in [load_checkpoint(tmp_path, {})] if found]:
        assert all(tensor.isfinite().all() for name, tensor in state.items() if name.startswith("objective."))


def test_tensorboard_events(harvest: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = train_config("batchtopk", SETTINGS | {"k": 3})
    run(store_of(harvest), config, tmp_path, RunOptions(checkpoint_every=5, log_every=2, tensorboard=True))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= {"loss", "fvu", "l0", "dead_share", "threshold", "rows_per_second"}
    recorded = [(event.step, event.value) for event in events.Scalars("fvu")]
    assert recorded == [(line.step, pytest.approx(line.fvu)) for line in read_metrics(tmp_path)]


def test_held_out_figures_by_hand(lossless_sae, random_sae) -> None:
    rows = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    figures = held_out_figures(lossless_sae, (rows, rows))
    assert figures.l0 == 32
    assert figures.fvu < 1e-12
    figures = held_out_figures(random_sae, (rows, rows))
    f = random_sae.encode(rows)
    assert figures.l0 == pytest.approx((f > 0).sum(1).float().mean().item())
    assert figures.dead_share == pytest.approx(((f > 0).sum(0) == 0).float().mean().item())
    expected = (rows - random_sae.decode(f)).square().sum() / (rows - rows.mean(0)).square().sum()
    assert figures.fvu == pytest.approx(expected.item(), rel=1e-5)


def invoke(command: Any, *arguments: object) -> Any:
    import typer

    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_sweep(harvest: Path, tmp_path: Path) -> None:
    grid = ["d_sae=24", "batch_size=32", "steps=6", "k=4"]
    options = [
        *("--activations", harvest, "--site", SITE, "--out", tmp_path / "sweep", "--held-out-rows", 20),
        *(part for axis in grid for part in ("--grid", axis)),
    ]
    assert invoke(sweep_command, *options, "--grid", "architecture=batchtopk,jumprelu", "--seeds", "0,1").exit_code == 0
    with (tmp_path / "sweep" / "summary.csv").open() as file:
        lines = {line["name"]: line for line in csv.DictReader(file)}
    assert len(lines) == 4
    name = "jumprelu-d_sae24-batch_size32-steps6-k4-seed1"
    assert lines[name].items() >= {"target_l0": "4.0", "seed": "1", "num_rows": "20", "k": ""}.items()
    directory = tmp_path / "sweep" / name
    store = store_of(harvest, held_out_rows=20)
    finished = load_run(directory)
    assert finished is not None
    figures = held_out_figures(load_sae(directory), store.held_out())
    assert finished.figures.l0 == pytest.approx(figures.l0, rel=0.05)  # weights are saved in float16
    assert finished.figures.fvu == pytest.approx(figures.fvu, rel=0.01)
    assert "<svg" in (tmp_path / "sweep" / "pareto.svg").read_text()

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").glob("*/*")}
    result = invoke(sweep_command, *options, "--grid", "architecture=batchtopk,topk")
    assert result.exit_code == 0
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").glob("*/*")}
    assert after.items() >= before.items()
    assert len({path.parent for path in after}) == 5
    assert "topk-d_sae24" in result.output

    result = invoke(sweep_command, *options, "--grid", "architecture=batchtopk", "--held-out-rows", "30")
    assert isinstance(result.exception, AssetError)
    assert "held_out_rows 20, not 30" in str(result.exception)


@pytest.mark.parametrize("axes", [["k"], ["=3"], ["k=1,,2"], ["k=1,1"], ["k=1", "k=2"]])
def test_grids_that_are_refused(axes: list[str]) -> None:
    with pytest.raises(InvalidRequestError, match=r"grid: got .*expected NAME=VALUE"):
        parse_grid(axes)


def test_points_of_a_grid() -> None:
    configs = grid_configs(parse_grid(["learning-rate=1e-3,2e-3", "architecture=topk", "k=4"]))
    assert list(configs) == ["topk-learning_rate1e-3-k4", "topk-learning_rate2e-3-k4"]
    with pytest.raises(InvalidRequestError, match="architecture: got 'vanilla'"):
        grid_configs({"architecture": ["vanilla"]})
    with pytest.raises(InvalidRequestError, match="k: got '4', expected none: relu takes"):
        grid_configs({"architecture": ["relu"], "k": ["4"]})


def test_a_damaged_record_of_a_run_is_refused(tmp_path: Path) -> None:
    assert load_run(tmp_path) is None
    (tmp_path / "figures.json").write_text('{"settings": {}}')
    with pytest.raises(AssetError, match="is damaged"):
        load_run(tmp_path)


def test_the_command_takes_what_the_objective_has(harvest: Path, tmp_path: Path) -> None:
    places = ("--activations", harvest, "--site", SITE, "--steps", 4, "--d-sae", 24, "--batch-size", 32)
    result = invoke(train_command, *places, "--out", tmp_path / "a", "--architecture", "jumprelu", "--target-l0", 3)
    assert result.exit_code == 0, result.output
    assert load_sae(tmp_path / "a").threshold.unique().numel() > 1
    result = invoke(train_command, *places, "--out", tmp_path / "b", "--architecture", "relu", "--k", 3)
    assert isinstance(result.exception, SteerserveError)
    assert "k: got 3, expected none: relu takes" in str(result.exception)
    assert not (tmp_path / "b").exists()


def test_a_finished_run_is_left_as_it_is(harvest: Path, tmp_path: Path) -> None:
    options = ("--activations", harvest, "--site", SITE, "--steps", 4, "--d-sae", 24, "--batch-size", 32)
    out = tmp_path / "sae"
    assert invoke(train_command, *options, "--k", 3, "--out", out).exit_code == 0
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    result = invoke(train_command, *options, "--k", 3, "--out", out)
    assert result.exit_code == 0
    assert "nothing to do" in " ".join(result.output.split())
    result = invoke(train_command, *options, "--k", 4, "--out", out)
    assert isinstance(result.exception, AssetError)
    assert f"{out} is of a run with k 3, not 4; remove it" in str(result.exception)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()} == before
    (out / "evaluation.json").unlink()
    result = invoke(train_command, *options, "--k", 3, "--out", out)
    assert isinstance(result.exception, AssetError)
    assert f"{out} holds an SAE without a record of its training" in str(result.exception)


@pytest.mark.parametrize("cut", ["6,", "6,0.5,-", "6,0.5,0.4,3.0,0.1,1.0,0.001,", "6,0.5,0.4,3.0,0.1,1.0,0.001,9\r"])
def test_a_line_that_was_cut_off_is_measured_again(harvest: Path, tmp_path: Path, cut: str) -> None:
    config = train_config("batchtopk", SETTINGS | {"k": 3})
    with pytest.raises(KilledError):
        run(store_of(harvest), config, tmp_path, OPTIONS, killed_at(6))
    path = tmp_path / "metrics.csv"
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole[:3]) + cut.encode())
    assert [line.step for line in read_metrics(tmp_path)] == [2, 4]
    run(store_of(harvest), config, tmp_path, OPTIONS)
    assert [line.step for line in read_metrics(tmp_path)] == [2, 4, 6, 8, 10, 12]


def test_sweeps_that_train_twice_or_name_seeds_are_refused(harvest: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"grid: got 'batchtopk-k04', .*the same settings"):
        grid_configs(parse_grid(["k=4,04"]))
    options = ("--activations", harvest, "--site", SITE, "--out", tmp_path / "sweep")
    result = invoke(sweep_command, *options, "--grid", "seed=0,1")
    assert isinstance(result.exception, InvalidRequestError)
    assert "use --seeds" in str(result.exception)
