"""``steerserve lab eval`` and ``lab overlap``: what they write, and what they refuse."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from steerserve import cli
from steerserve.lab.corpus import Split
from steerserve.models.loading import load_model
from steerserve.sae.formats.saelens import save_sae
from steerserve.sae.model import SAE
from steerserve.sae.registry import load_sae
from steerserve.types import Site, Stream

VOID = {"meta", "br", "link", "img", "input"}


def lab(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["lab", *map(str, arguments)])


def check_page(path: Path) -> str:
    """Well-formed HTML that needs nothing from elsewhere; returns its text in one line."""
    page = path.read_text()
    assert re.findall(r"https?://|src=|url\((?!#)|@import", page) == []
    assert "NaN" not in page
    open_tags: list[str] = []
    texts: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in VOID:
                open_tags.append(tag)

        def handle_startendtag(self, tag: str, attrs: object) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

        def handle_data(self, data: str) -> None:
            texts.append(data)

    Parser().feed(page)
    assert open_tags == []
    return " ".join("".join(texts).split())


@pytest.fixture
def model(tiny_model_dir: Callable[[str], Path]) -> Path:
    return tiny_model_dir("llama")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Twelve texts of each of two labels in every split; a third of those called "q" have the letter Q."""
    rng, left = random.Random(0), {(split, label): 12 for split in Split for label in ("q", "plain")}
    lines = []
    while any(left.values()):
        letters = rng.choices("abcdefg hijklmno", k=40)
        label = "plain"
        if rng.random() < 0.5:
            letters[rng.randrange(1, 40)], label = "Q", "q"
        text = "".join(letters).strip()
        if left[Split.of(text), label]:
            left[Split.of(text), label] -= 1
            lines.append(json.dumps({"text": text, "label": label}))
    path = tmp_path / "labelled.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def harvest(write_store: Callable[[list[torch.Tensor]], Path], model: Path) -> Path:
    directory = write_store([torch.randn(600, 32, generator=torch.Generator().manual_seed(0))])
    change_manifest(directory, model_fingerprint=load_model(str(model), torch.float32).fingerprint)
    return directory


def change_manifest(harvest: Path, **changes: Any) -> None:
    path = harvest / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def sae_dir(random_sae: SAE, tmp_path: Path) -> Path:
    save_sae(random_sae, tmp_path / "my-sae")
    return tmp_path / "my-sae"


@pytest.fixture
def evaluate(model: Path, texts: Path, harvest: Path) -> Callable[..., Result]:
    def evaluate(sae: Path, *options: str | Path) -> Result:
        given = ("--texts", texts, "--activations", harvest, "--model", model, "--held-out-tokens", "600")
        return lab("eval", sae, *given, "--density-tokens", "500", "--neurons", "20", *options)

    return evaluate


def test_eval_writes_figures_statistics_and_a_page(
    evaluate: Callable[..., Result], sae_dir: Path, model: Path, texts: Path
) -> None:
    (sae_dir / "evaluation.json").write_text(json.dumps({"training": {"k": 4}}))
    result = evaluate(sae_dir, "--labelled", texts, "--pooling", "max")
    assert result.exit_code == 0, result.output
    record = json.loads((sae_dir / "evaluation.json").read_text())
    assert record["training"] == {"k": 4}  # what others wrote stays
    figures = record["evaluation"]
    assert figures["held_out_tokens"] == 592
    assert figures["density_tokens"] == 500
    assert figures["model"]["fingerprint"] == load_model(str(model), torch.float32).fingerprint
    assert figures["sae"].items() >= {"site": "blocks.1.hook_resid_post", "d_sae": 48, "by_kernel": True}.items()
    assert "command" in figures
    (task,) = figures["probing"]["tasks"]
    assert task["texts"] == {"train": 24, "validation": 24, "test": 24}
    populations = {units["name"]: units for units in figures["polysemanticity"]["populations"]}
    assert populations["MLP neurons"]["measured"] == 20

    sae = load_sae(sae_dir)
    assert sae.max_activation is not None
    density = load_file(sae_dir / "feature_density.safetensors")["density"]
    assert torch.equal(density > 0, sae.max_activation > 0)
    assert figures["dead_share"] == pytest.approx((density == 0).double().mean())

    page = check_page(sae_dir / "evaluation.html")
    for shown in (
        "Evaluation of my-sae",
        f"{figures['l0']:.4g}",
        "against the rest",
        "MLP neurons",
        figures["sae"]["sha256"],
        figures["model"]["fingerprint"],
        figures["command"],
    ):
        assert shown in page
    for name in ("fvu", "ce_recovered", "SAE features", "random positions"):
        assert name in result.output


def test_what_was_not_asked_for_is_not_on_the_page(evaluate: Callable[..., Result], sae_dir: Path) -> None:
    assert evaluate(sae_dir, "--neurons", "0").exit_code == 0
    page = check_page(sae_dir / "evaluation.html")
    assert "Sparse probing" not in page
    assert "Polysemanticity" not in page
    assert (
        json.loads((sae_dir / "evaluation.json").read_text())["evaluation"]
        .keys()
        .isdisjoint({"probing", "polysemanticity"})
    )


def test_what_cannot_be_compared_is_left_out_with_its_reason(evaluate: Callable[..., Result], sae_dir: Path) -> None:
    result = evaluate(sae_dir, "--held-out-tokens", "128")
    assert result.exit_code == 0, result.output
    reason = "polysemanticity left out: polysemanticity needs 10 held-out contexts, and there are 8"
    assert reason in " ".join(result.output.split())


def test_a_transcoder_is_evaluated_where_it_writes(
    evaluate: Callable[..., Result], random_sae: SAE, tmp_path: Path
) -> None:
    sae = replace(random_sae, transcodes_to=Site(2, Stream.MLP_OUT), apply_b_dec_to_input=False)
    save_sae(sae, tmp_path / "transcoder")
    result = evaluate(tmp_path / "transcoder")
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "transcoder" / "evaluation.json").read_text())["evaluation"]
    assert figures["sae"]["out_site"] == "blocks.2.hook_mlp_out"
    assert not figures["sae"]["by_kernel"]
    assert figures["polysemanticity"]["mlp_layer"] == 2
    assert "that reconstruct blocks.2.hook_mlp_out" in check_page(tmp_path / "transcoder" / "evaluation.html")


@pytest.mark.parametrize(
    ("labels", "found"),
    [(("same", "same"), "'same': 24"), (("", ""), "'': 24")],
    ids=["one class", "no labels"],
)
def test_labels_without_a_contrast_end_in_one_line(
    evaluate: Callable[..., Result], sae_dir: Path, texts: Path, labels: tuple[str, str], found: str
) -> None:
    one = texts.with_name("one.jsonl")
    one.write_text(texts.read_text().replace('"q"', f'"{labels[0]}"').replace('"plain"', f'"{labels[1]}"'))
    result = evaluate(sae_dir, "--labelled", one)
    assert result.exit_code == 2
    assert "probing needs a label with at least 5 texts" in result.output
    assert found in result.output
    assert not (sae_dir / "evaluation.html").exists()


def test_overlap_of_two_seeds(sae_dir: Path, harvest: Path, random_sae: SAE) -> None:
    """Half the features are the same, in another order."""
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    tensors = {name: getattr(random_sae, name)[order].clone() for name in ("W_dec", "b_enc", "threshold")}
    tensors["W_dec"][:24] = torch.nn.functional.normalize(torch.randn(24, 32), dim=1)
    other = sae_dir.with_name("other")
    save_sae(replace(random_sae, W_enc=random_sae.W_enc[:, order], **tensors), other)
    result = lab("overlap", sae_dir, other, "--activations", harvest, "--tokens", "500")
    assert result.exit_code == 0, result.output
    record = json.loads((sae_dir / "evaluation.json").read_text())["overlap"]
    assert record["shared_share"] >= 0.5
    assert record["correlation_tokens"] == 500
    assert record["mean_correlation_shared"] > 0.95
    assert [sae["name"] for sae in record["saes"]] == ["my-sae", "other"]
    page = check_page(sae_dir / "overlap.html")
    assert "Overlap of my-sae and other" in page
    assert f"{100 * record['shared_share']:.1f}" in page
    assert "mean_correlation_shared" in result.output
    assert lab("overlap", sae_dir, other).exit_code == 0  # without activations, by the weights alone
    assert "correlation_tokens" not in json.loads((sae_dir / "evaluation.json").read_text())["overlap"]


def test_overlap_refuses_what_is_no_sae(sae_dir: Path, tmp_path: Path) -> None:
    result = lab("overlap", sae_dir, tmp_path / "nothing")
    assert result.exit_code == 2
    assert "nothing" in result.output


@pytest.mark.parametrize("command", ["eval", "features", "overlap"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_fingerprint": "b" * 64}, f"model_fingerprint: got '{'b' * 64}', expected"),
        ({"d_model": 16}, "d_model: got 16, expected 32, the d_in of my-sae"),
    ],
)
def test_a_harvest_of_another_model_is_refused(
    random_sae: SAE,
    harvest: Path,
    tmp_path: Path,
    model: Path,
    texts: Path,
    command: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    fingerprint = load_model(str(model), torch.float32).fingerprint
    directory = tmp_path / "my-sae"
    save_sae(replace(random_sae, metadata={"model_fingerprint": fingerprint}), directory)
    change_manifest(harvest, **changes)
    options: dict[str, list[str | Path]] = {
        "eval": ["--texts", texts, "--model", model],
        "features": ["--model", model, "--out", tmp_path / "page.html"],
        "overlap": [directory],
    }
    result = lab(command, directory, *options[command], "--activations", harvest)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert sorted(path.name for path in directory.iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_an_sae_without_a_fingerprint_is_checked_by_the_model(
    evaluate: Callable[..., Result], sae_dir: Path, harvest: Path
) -> None:
    change_manifest(harvest, model_fingerprint="b" * 64)
    result = evaluate(sae_dir)
    assert result.exit_code == 2
    assert "model_fingerprint" in result.output


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_record_is_named_before_the_work(
    evaluate: Callable[..., Result], sae_dir: Path, content: str
) -> None:
    (sae_dir / "evaluation.json").write_text(content)
    for result in (evaluate(sae_dir), lab("overlap", sae_dir, sae_dir)):
        assert result.exit_code == 2
        assert "evaluation.json" in result.output
    assert (sae_dir / "evaluation.json").read_text() == content
    assert not (sae_dir / "max_activation.safetensors").exists()


def test_overlap_says_that_sites_differ(sae_dir: Path, random_sae: SAE) -> None:
    other = sae_dir.with_name("other")
    save_sae(replace(random_sae, site=Site(2, Stream.MLP_OUT)), other)
    output = " ".join(lab("overlap", sae_dir, other).output.split())
    assert "my-sae is at blocks.1.hook_resid_post and other is at blocks.2.hook_mlp_out" in output
    assert "other sites" not in lab("overlap", sae_dir, sae_dir).output
