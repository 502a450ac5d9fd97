"""What is said of features, against the same computed in full and by hand."""

from __future__ import annotations

import base64
import copy
import gzip
import json
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from steerserve.errors import AssetError, InvalidRequestError
from steerserve.lab.commands.features import parse_features
from steerserve.lab.features import effects, report
from steerserve.lab.features.effects import clamping_effects, output_scores
from steerserve.lab.features.lens import LogitLens
from steerserve.lab.features.neighbours import correlated, nearest
from steerserve.lab.features.probe import probing
from steerserve.lab.features.scan import AFTER, BEFORE, LOWEST_BIN, LargestByKey, Scan, scan
from steerserve.lab.features.source import Block, HarvestSource, TextSource
from steerserve.lab.manifest import Manifest
from steerserve.models.hooks import transformed
from steerserve.models.loading import LoadedModel, load_model
from steerserve.sae.model import SAE

LENGTH = 16
ALL = torch.arange(48)


@pytest.fixture
def source(tiny: LoadedModel, random_sae: SAE, sentences: list[str]) -> TextSource:
    return TextSource(tiny, random_sae.site, sentences, LENGTH, 100_000)


@pytest.fixture
def seen(source: TextSource, random_sae: SAE) -> Scan:
    sparse = replace(random_sae, threshold=random_sae.threshold + 3)
    return scan(replace(sparse, max_norm=100.0), source, ALL)


def in_full(source: TextSource, sae: SAE) -> torch.Tensor:
    """``[C·T, d_sae]`` activations of all contexts, 0 at first positions."""
    blocks = list(source.blocks(10_000))
    f = torch.zeros(source.contexts.numel(), sae.d_sae)
    f[blocks[0].rows] = sae.encode(blocks[0].x)
    return f


@pytest.mark.parametrize("k", [1, 5, 40])
def test_the_largest_are_those_of_a_full_sort(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(6, LENGTH, 7, generator=generator).relu()
    f[..., 3] = 0
    kept = LargestByKey(7, k)
    for first, part in zip((0, 2, 5), f.split([2, 3, 1]), strict=True):
        row, feature = (part.flatten(0, 1) > 0).nonzero(as_tuple=True)
        kept.add(part, first, row, feature, part.flatten(0, 1)[row, feature])
    best = f.flatten(0, 1).topk(k, dim=0)
    torch.testing.assert_close(kept.firings.value, best.values.T, rtol=0, atol=0)
    fires = best.values.T > 0
    assert torch.equal(kept.firings.position[fires], best.indices.T[fires])
    assert (kept.firings.position[~fires] == -1).all() or k == 1
    for feature in range(7):
        for place in range(int(fires[feature].sum())):
            context, at = divmod(int(kept.firings.position[feature, place]), LENGTH)
            window = torch.zeros(BEFORE + 1 + AFTER)
            for offset in range(-BEFORE, AFTER + 1):
                if 0 <= at + offset < LENGTH:
                    window[offset + BEFORE] = f[context, at + offset, feature]
            torch.testing.assert_close(kept.firings.window[feature, place].float(), window, rtol=1e-3, atol=1e-3)


def test_counts_against_all_activations(source: TextSource, random_sae: SAE) -> None:
    chosen = torch.tensor([3, 7, 40])
    result = scan(random_sae, source, chosen)
    f = in_full(source, random_sae)[:, chosen]
    assert result.num_positions == source.contexts.numel() * (LENGTH - 1) // LENGTH
    assert torch.equal(result.fired, (f > 0).sum(0))
    assert (result.fired > 10).all()
    torch.testing.assert_close(result.total, f.double().sum(0))
    torch.testing.assert_close(result.largest, f.amax(0))
    torch.testing.assert_close(result.top.value[:, 0], f.amax(0))
    assert torch.equal(result.histogram.sum(1), result.fired)
    for column, counts in zip(f.T, result.histogram, strict=True):
        bins = np.bincount(np.floor(4 * np.log2(column[column > 0].numpy())).astype(int) - LOWEST_BIN, minlength=160)
        assert counts.tolist() == bins.tolist()
    sampled = result.sample.position[0]
    assert len(set(sampled[sampled >= 0].tolist())) == min(64, int(result.fired[0]))
    assert torch.equal(result.sample.value[0], f.flatten()[sampled * 3].where(sampled >= 0, torch.zeros(64)))


def test_bands_are_quarters_of_the_sample() -> None:
    descending = torch.arange(100, 0, -1)
    assert report.band(descending, 0.75, 1.0).tolist() == list(range(100, 75, -1))
    assert [len(report.band(torch.arange(10), low, high)) for low, high in report.BANDS] == [2, 3, 3, 2]
    assert torch.equal(torch.cat([report.band(descending, *each) for each in report.BANDS]), descending)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_the_lens_is_the_gradient_of_the_final_norm_and_unembedding(tiny_model_dir, family: str) -> None:
    """At a residual without mean and of unit RMS, along a direction at a right angle to it, the norm is its gain."""
    model = load_model(str(tiny_model_dir(family)), torch.float32)
    norm = next(
        module
        for name, module in model.model.base_model.named_modules()
        if name in ("norm", "ln_f", "final_layer_norm")
    )
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(2, 32, generator=generator).double()
    x -= x.mean()
    x -= (x @ (w - w.mean())) / (w - w.mean()).square().sum() * (w - w.mean())
    x /= x.square().mean().sqrt()
    exact = copy.deepcopy(norm).double()
    W_U = model.model.get_output_embeddings().weight.double()
    with torch.no_grad():
        logits = (exact(x + 0.01 * w) - exact(x - 0.01 * w)).double() / 0.02 @ W_U.T
    logits -= logits.mean()
    top, bottom = LogitLens(model).extremes(w.float()[None], 5)
    torch.testing.assert_close(top.logits[0].double(), logits.topk(5).values, rtol=1e-3, atol=1e-3)
    assert top.ids[0].tolist() == logits.topk(5).indices.tolist()
    assert bottom.ids[0].tolist() == logits.topk(5, largest=False).indices.tolist()


def test_neighbours_against_numpy(seen: Scan, random_sae: SAE) -> None:
    matrix = seen.activations.toarray()
    assert matrix.shape == (seen.num_positions, 48)
    with np.errstate(invalid="ignore"):
        expected = np.nan_to_num(np.corrcoef(matrix.T))
    np.fill_diagonal(expected, -np.inf)
    found = correlated(seen.activations, ALL, 3)
    np.testing.assert_allclose(found.likeness.numpy(), -np.sort(-expected, axis=1)[:, :3], atol=1e-9)
    cosine = (random_sae.W_dec @ random_sae.W_dec.T).fill_diagonal_(-torch.inf)
    close = nearest(random_sae.W_dec, torch.tensor([5, 9]), 4)
    assert torch.equal(close.ids, cosine[[5, 9]].topk(4).indices)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_probes_against_whole_forward_passes_in_float64(tiny_model_dir, random_sae: SAE, family: str) -> None:
    model = load_model(str(tiny_model_dir(family)), torch.float32)
    exact = replace(model, model=copy.deepcopy(model.model).double())
    tokens = torch.randint(0, 250, (24,), generator=torch.Generator().manual_seed(1))
    positions, edits = torch.tensor([3, 23, 3, 12]), torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    with probing(model, random_sae, 24, 8) as prober:
        clean = prober.run(tokens)
        probed = prober.probe(positions, edits)
    with torch.inference_mode():
        plain = exact.model(tokens[None]).logits[0].log_softmax(-1)
        torch.testing.assert_close(clean.log_probs.double(), plain, rtol=0, atol=1e-3)
        for position, edit, found in zip(positions.tolist(), edits, probed, strict=True):
            shift = torch.zeros(1, 24, 32, dtype=torch.float64)
            shift[0, position] = edit.double()
            with transformed(exact, {random_sae.site: lambda x, shift=shift: x + shift}):
                expected = exact.model(tokens[None]).logits[0, position].log_softmax(-1)
            assert (expected - plain[position]).abs().max() > 0.05
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)


def test_clamping_against_two_forward_passes_in_float64(tiny: LoadedModel, random_sae: SAE, seen: Scan) -> None:
    measured = clamping_effects(tiny, random_sae, seen)
    places = effects.choose_positions(seen)
    exact = replace(tiny, model=copy.deepcopy(tiny.model).double())
    index = int((seen.fired > 4).nonzero()[0])
    expected: dict[str, list[float]] = {"zero": [], "max": []}
    for context, pairs in places.items():
        for feature, position in pairs:
            if feature != index:
                continue
            tokens = seen.contexts[context].long()[None]

            def clamp(value: float, x: torch.Tensor, position: int = position) -> torch.Tensor:
                f = random_sae.encode(x[0, position].float())[index]
                x = x.clone()
                x[0, position] += (value - f.double()) * random_sae.W_dec[index].double()
                return x

            with torch.inference_mode():
                before = exact.model(tokens).logits[0, position].log_softmax(-1)
                for name, value in (("zero", 0.0), ("max", seen.largest[index].item())):
                    with transformed(exact, {random_sae.site: lambda x, value=value: clamp(value, x)}):
                        after = exact.model(tokens).logits[0, position].log_softmax(-1)
                    expected[name].append((before.exp() * (before - after)).sum().item())
    assert len(expected["zero"]) == min(effects.MAX_POSITIONS, int(seen.fired[index]))
    assert max(expected["zero"]) > 1e-3
    for effect, name in zip(measured[index], ("zero", "max"), strict=True):
        assert effect.kl == pytest.approx(expected[name], rel=1e-2, abs=1e-5)
    dead = int((seen.fired == 0).nonzero()[0]) if (seen.fired == 0).any() else None
    assert dead is None or measured[dead][0].kl == []


def test_output_scores_by_hand(tiny: LoadedModel, random_sae: SAE) -> None:
    lens, _ = LogitLens(tiny).extremes(random_sae.W_dec, effects.LENS_TOKENS)
    scores = output_scores(tiny, random_sae, ALL, lens)
    tokens = torch.tensor([tiny.tokenizer(effects.NEUTRAL_PROMPT).input_ids])
    for feature in (0, 17, 47):

        def amplify(x: torch.Tensor, feature: int = feature) -> torch.Tensor:
            x = x.clone()
            x[0, -1] += 10 * random_sae.encode(x[0, -1]).max() * random_sae.W_dec[feature]
            return x

        with torch.inference_mode(), transformed(tiny, {random_sae.site: amplify}):
            p = tiny.model(tokens).logits[0, -1].softmax(-1)
        ranks = p.argsort(descending=True).argsort()[lens.ids[feature]]
        expected = (1 - ranks.min() / len(p)) * p[lens.ids[feature]].max()
        assert scores[feature].item() == pytest.approx(expected.item(), rel=1e-3)
    assert scores.std() > 1e-3


def write_harvest(directory: Path, sae: SAE, blocks: Iterable[Block]) -> None:
    """A shard for each block."""
    manifest = Manifest("tiny", "f" * 64, [str(sae.site)], 32, context_length=LENGTH)
    for number, block in enumerate(blocks):
        tensors = {
            "tokens": block.tokens.flatten()[block.rows],
            "input_ids": block.tokens,
            "context": (block.rows // LENGTH + block.first_context).int(),
            "position": (block.rows % LENGTH).short(),
            str(sae.site): block.x,
        }
        manifest.shards.append(f"{number}.safetensors")
        save_file(
            {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, directory / manifest.shards[-1]
        )
    manifest.save(directory)


def test_a_shard_may_have_lost_all_rows_of_its_first_context(
    random_sae: SAE, source: TextSource, tmp_path: Path
) -> None:
    kept = []
    for block in source.blocks(8):
        later = block.rows >= LENGTH
        kept.append(replace(block, rows=block.rows[later], x=block.x[later]))
    write_harvest(tmp_path, random_sae, kept)
    found = list(HarvestSource(tmp_path, random_sae.site, 10_000).blocks(8))
    assert len(found) == len(kept) > 1
    for block, expected in zip(found, kept, strict=True):
        assert block.first_context == expected.first_context
        for name in ("tokens", "rows", "x"):
            assert torch.equal(getattr(block, name), getattr(expected, name))
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(AssetError, match=r"1\.safetensors is missing; repeat the harvest"):
        HarvestSource(tmp_path, random_sae.site, 10_000)


def test_a_harvest_gives_what_its_texts_give(
    tiny: LoadedModel, random_sae: SAE, source: TextSource, tmp_path: Path
) -> None:
    write_harvest(tmp_path, random_sae, source.blocks(20))
    harvest = HarvestSource(tmp_path, random_sae.site, 10_000)
    assert torch.equal(harvest.contexts, source.contexts[: len(harvest.contexts)])
    ours, theirs = scan(random_sae, harvest, ALL), scan(random_sae, source, ALL)
    assert ours.num_positions == theirs.num_positions
    torch.testing.assert_close(ours.top.value, theirs.top.value)
    assert len(HarvestSource(tmp_path, random_sae.site, 3 * LENGTH).contexts) == 3
    with pytest.raises(AssetError, match="holds no context"):
        HarvestSource(tmp_path, random_sae.site, LENGTH - 1)


def findings(model: LoadedModel, sae: SAE, seen: Scan) -> report.Findings:
    top, bottom = LogitLens(model).extremes(sae.W_dec, 20)
    return report.Findings(
        seen, top, bottom, output_scores(model, sae, ALL, top), correlated(seen.activations, ALL, 5),
        nearest(sae.W_dec, ALL, 5), clamping_effects(model, sae, seen),
    )  # fmt: skip


def unpacked(page: str) -> Any:
    match = re.search(r'<script id="packed"[^>]*>([^<]*)</script>', page)
    assert match is not None
    return json.loads(gzip.decompress(base64.b64decode(match[1])))


def test_the_page_and_the_json_hold_the_same(tiny: LoadedModel, random_sae: SAE, seen: Scan, tmp_path: Path) -> None:
    hostile = replace(random_sae, name="</script><img onerror=x>")
    content = report.features_json(tiny, hostile, findings(tiny, hostile, seen))
    report.write(content, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert unpacked(page) == json.loads((tmp_path / "page.json").read_text()) == content
    assert "<img" not in page
    assert not re.search(r"https?:|src=|@import|url\((?!#)", page)
    assert page.count("<script") == page.count("</script>") == 2
    by_id = content["features"][int(seen.fired.argmax())]
    example = by_id["examples"][0]["examples"][0]
    assert example["activations"][example["peak"]] == pytest.approx(by_id["max"], rel=1e-2)
    context, at = divmod(int(seen.top.position[by_id["id"], 0]), LENGTH)
    window = seen.contexts[context, max(at - BEFORE, 0) : at + AFTER + 1]
    assert "".join(content["tokens"][token] for token in example["tokens"]) == tiny.tokenizer.decode(window)
    assert len(example["tokens"]) == len(example["activations"])
    assert by_id["zero"]["positions"] == effects.MAX_POSITIONS
    assert sum(by_id["histogram"]["counts"]) == seen.fired.max()


@pytest.mark.slow
def test_ten_thousand_features_stay_small(tiny: LoadedModel, random_sae: SAE, seen: Scan) -> None:
    content = report.features_json(tiny, random_sae, findings(tiny, random_sae, seen))
    rng = np.random.default_rng(0)
    content["tokens"] = [f"token{number}" for number in range(40_000)]
    many = []
    for number in range(10_000):
        feature = copy.copy(content["features"][number % 48])
        feature["examples"] = [
            {"from": None, "to": None, "examples": [
                {"tokens": rng.integers(0, 40_000, 23).tolist(), "activations": [0] * 14 + [5.5] + [0] * 8, "peak": 14}
            ] * 1}
        ] * 1  # fmt: skip
        many.append(feature | {"id": number})
    content["features"] = many
    page = report.features_page(content)
    assert len(unpacked(page)["features"]) == 10_000
    assert len(page) < 5_000_000  # rows are drawn by the browser: none is in the page
    assert page.count('class="row"') == 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_unpacks_searches_and_opens(tiny: LoadedModel, random_sae: SAE, seen: Scan, tmp_path: Path) -> None:
    content = report.features_json(tiny, random_sae, findings(tiny, random_sae, seen))
    content["tokens"][content["features"][7]["top"][0][0]] = "<i>zebra"
    holding = [
        feature["id"]
        for feature in content["features"]
        if any(content["tokens"][token] == "<i>zebra" for token, _ in feature["top"] + feature["bottom"])
    ]
    report.write(content, tmp_path / "page.html")
    address = f"file://{tmp_path}/page.html#q=zebra&f=7"
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=10000",
        f"--user-data-dir={tmp_path}/u",
    ]
    run = subprocess.run(["chromium", *options, "--dump-dom", address], capture_output=True, text=True, timeout=120)
    assert "Feature 7</h2>" in run.stdout
    assert "&lt;i&gt;zebra" in run.stdout
    found = re.search(r"(\d+) of 48<", run.stdout)
    assert found is not None
    assert len(holding) <= int(found[1]) < 48


@pytest.mark.parametrize(("text", "ids"), [("all", [0, 1, 2, 3]), ("3,1,1", [1, 3])])
def test_feature_lists(text: str, ids: list[int]) -> None:
    assert parse_features(text, 4).tolist() == ids


@pytest.mark.parametrize("text", ["4", "-1", "1;2", "", "1,"])
def test_feature_lists_that_cannot_be(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="numbers from 0 to 3"):
        parse_features(text, 4)
