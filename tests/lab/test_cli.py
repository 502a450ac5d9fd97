"""``steerserve lab`` from a file of texts to an evaluated SAE and a measured pack, on a tiny model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from steerserve import cli
from steerserve.lab.corpus import Split
from steerserve.lab.manifest import Manifest
from steerserve.models.loading import load_model
from steerserve.sae.registry import load_sae
from steerserve.types import Site, Stream

SITE = "blocks.1.hook_resid_post"
TRAIN_OPTIONS = ("--d-sae", "64", "--k", "4", "--steps", "6")


def lab(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["lab", *map(str, arguments)])


@pytest.fixture
def model(tiny_model_dir: Callable[[str], Path]) -> Path:
    return tiny_model_dir("llama")


@pytest.fixture
def texts(tmp_path: Path, sentences: list[str]) -> Path:
    """40 lines of 100 characters or so, one at least in the test split."""
    lines = [" ".join([one, other, one[::-1]]) for one, other in zip(sentences[:40], sentences[10:], strict=False)]
    assert any(Split.of(line) is Split.TEST for line in lines)
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.fixture
def harvested(model: Path, texts: Path, tmp_path: Path) -> Path:
    out = tmp_path / "activations"
    result = lab("harvest", "--texts", texts, "--site", SITE, "--out", out, "--model", model, "--context-length", "32")
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def trained(harvested: Path, tmp_path: Path) -> Path:
    out = tmp_path / "my-sae"
    result = lab("train", "--activations", harvested, "--site", SITE, "--out", out, *TRAIN_OPTIONS)
    assert result.exit_code == 0, result.output
    return out


def test_from_texts_to_an_evaluated_sae(model: Path, texts: Path, harvested: Path, trained: Path) -> None:
    manifest = Manifest.load(harvested)
    assert (manifest.model_name, manifest.sites, manifest.context_length) == ("tiny-llama", [SITE], 32)
    assert manifest.num_rows == manifest.num_tokens // 32 * 31
    before = load_sae(trained)
    assert (before.name, before.site, before.d_sae) == ("my-sae", Site(1, Stream.RESID_POST), 64)
    assert before.metadata["model_fingerprint"] == load_model(str(model), torch.float32).fingerprint
    assert before.max_activation is None

    result = lab("eval", trained, "--texts", texts, "--activations", harvested, "--model", model)
    assert result.exit_code == 0, result.output
    sae, record = load_sae(trained), json.loads((trained / "evaluation.json").read_text())
    assert sae.sha256 == before.sha256  # measuring an SAE does not change it
    assert sae.max_activation is not None
    assert sae.max_activation.shape == (64,)
    assert record["training"].items() >= {"d_sae": 64, "k": 4, "steps": 6, "seed": 0}.items()
    figures = record["evaluation"]
    assert figures["delta_ce"] == pytest.approx(figures["ce_spliced"] - figures["ce_clean"])
    assert figures["density_tokens"] == manifest.num_rows
    assert figures["held_out_tokens"] >= 32
    assert figures["held_out_tokens"] % 32 == 0
    assert all("command" in part for part in record.values())
    for name in ("l0", "fvu", "ce_recovered", "dead_share"):
        assert name in result.output


def test_training_again_gives_the_same_files(harvested: Path, trained: Path, tmp_path: Path) -> None:
    assert (
        lab("train", "--activations", harvested, "--site", SITE, "--out", tmp_path / "b", *TRAIN_OPTIONS).exit_code == 0
    )
    for file in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "b" / file).read_bytes() == (trained / file).read_bytes()


def test_harvesting_again_changes_nothing(model: Path, texts: Path, harvested: Path) -> None:
    before = {path.name: path.read_bytes() for path in harvested.iterdir()}
    options = ("--site", SITE, "--out", harvested, "--model", model, "--context-length", "32")
    assert lab("harvest", "--texts", texts, *options).exit_code == 0
    assert {path.name: path.read_bytes() for path in harvested.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["harvest", "--texts", "{texts}", "--site", "layer 3", "--out", "x"], "site: got 'layer 3', expected"),
        (["harvest", "--texts", "{texts}", "--site", "blocks.7.hook_mlp_out", "--out", "x"], "a layer below 3"),
        (["harvest", "--texts", "no.jsonl", "--site", SITE, "--out", "x"], "no.jsonl does not exist"),
        (["train", "--activations", "nothing", "--site", SITE, "--out", "x"], "nothing holds no harvest"),
        (["eval", "nothing", "--texts", "{texts}", "--activations", "x"], "nothing does not exist"),
        (["features", "nothing", "--texts", "{texts}"], "nothing does not exist"),
        (["inspect", "hello", "--sae", "nothing"], "nothing does not exist"),
        (
            ["inspect", "hello", "--sae", "nothing", "--html", "no/x.html"],
            "--html: got 'no/x.html', expected a file",
        ),
        (
            ["features", "nothing", "--texts", "{texts}", "--out", "no/x.html"],
            "--out: got 'no/x.html', expected",
        ),
    ],
)
def test_mistakes_end_in_one_line(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [argument.format(texts=texts) for argument in arguments]
    result = lab(*given, *([] if given[0] == "train" else ["--model", model]))
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "x").exists()


def test_training_settings_that_cannot_be(harvested: Path, tmp_path: Path) -> None:
    options = ("--activations", harvested, "--out", tmp_path / "x")
    for more, message in (
        (("--site", SITE, "--d-sae", "4", "--k", "5"), "k: got 5, expected at most d_sae, 4"),
        (("--site", "blocks.2.hook_resid_post"), f"holds {SITE}, not blocks.2.hook_resid_post"),
    ):
        result = lab("train", *options, *more)
        assert result.exit_code == 2
        assert message in result.output.replace("\n", "")


def test_an_sae_of_another_model_is_refused(
    tiny_model_dir: Callable[[str], Path], texts: Path, harvested: Path, trained: Path, tmp_path: Path
) -> None:
    other = tiny_model_dir("qwen3")  # of the same width
    files = ("--positive", texts, "--negative", texts)
    for command in (
        ("lab", "eval", trained, "--texts", texts, "--activations", harvested),
        ("lab", "inspect", "river", "--sae", trained),
        ("concept", "build", "mood", "--sae", trained, *files, "--out", tmp_path / "mood"),
    ):
        result = CliRunner().invoke(cli.app, [*map(str, command), "--model", str(other)])
        assert result.exit_code == 2
        assert "sae.metadata.model_fingerprint" in result.output
    assert not (tmp_path / "mood").exists()


def test_a_pack_that_cannot_be_read_is_not_measured(texts: Path, model: Path) -> None:
    files = ["--positive", str(texts), "--negative", str(texts), "--model", str(model)]
    result = CliRunner().invoke(cli.app, ["concept", "eval", "nothing", *files])
    assert result.exit_code == 2
    assert "concept pack nothing: cannot read" in result.output


def test_features_and_inspect_show_the_same_sae(
    model: Path, texts: Path, harvested: Path, trained: Path, tmp_path: Path
) -> None:
    page = tmp_path / "features.html"
    result = lab("features", trained, "--activations", harvested, "--model", model, "--out", page)
    assert result.exit_code == 0, result.output
    features = json.loads(page.with_suffix(".json").read_text())["features"]
    assert len(features) == 64
    assert page.read_text().startswith("<!doctype html>")

    result = lab("inspect", "river stone", "--sae", trained, "--model", model, "--replace", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["readings"][0]["site"] == SITE


def test_a_missing_package_is_named(harvested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    result = lab("export", harvested, tmp_path / "rows.h5", "--format", "hdf5")
    assert result.exit_code == 2
    assert "h5py is not installed; the lab needs: pip install 'steerserve[lab]'" in result.output
