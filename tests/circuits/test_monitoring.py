"""From circuits to a monitor plan: which heads are chosen, what is read of them, and how readings are compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from steerserve.circuits import cli
from steerserve.circuits.forward import head_outputs
from steerserve.circuits.monitoring import probes, trial
from steerserve.circuits.monitoring import reads as reads_module
from steerserve.circuits.monitoring.choice import CircuitHeads, Head, choose_heads, count_heads
from steerserve.circuits.monitoring.examples import Examples, LabelledTexts, Use
from steerserve.circuits.monitoring.plans import entries_of_probe
from steerserve.circuits.monitoring.probes import Fitting, Reading, fit_reading
from steerserve.circuits.monitoring.reads import Reads, head_sites, read_texts
from steerserve.circuits.monitoring.trial import (
    Resampled,
    draw_heads,
    draw_same_layers,
    readings_of,
    run_trial,
)
from steerserve.circuits.prompts import Split as PairSplit
from steerserve.errors import AssetError, IncompatibleError, InvalidRequestError
from steerserve.lab.corpus import Document
from steerserve.lab.corpus import Split as TextSplit
from steerserve.lab.lexicon import Lexicon
from steerserve.models.loading import load_model
from steerserve.steering import monitors as monitors_module
from steerserve.steering.catalog import ASSETS, Catalog
from steerserve.steering.monitor_plan import load_monitor_plan
from steerserve.steering.monitors import bind_monitors, read_monitors
from steerserve.steering.pack_files import load_pack
from steerserve.types import Site, Stream

LAYERS, HEADS, D_HEAD = 4, 3, 5


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two in place of 20."""
    monkeypatch.setattr(trial, "NUM_RANDOM", 2)


def circuit_file(path: Path, edges: Mapping[str, float], dead: tuple[str, ...] = (), **fields: object) -> Path:
    """A circuit with the ``edges``, all kept."""
    sources = {name.partition("->")[0] for name in edges}
    content = {
        "cfg": {"model": "m", "model_fingerprint": "f" * 64, "threshold": 0.1, "order": "later_first"},
        "nodes": {source: {"in_graph": source not in dead} for source in sources},
        "edges": {name: {"score": score, "in_graph": True, "test": 0} for name, score in edges.items()},
        "complete": True,
    }
    path.write_text(json.dumps({**content, **fields}))
    return path


def test_frequency_specificity_and_effect_are_those_of_the_documentation(tmp_path) -> None:
    one = circuit_file(tmp_path / "one.json", {"a0.h1->m0": 1.0, "a0.h1->logits": 2.0, "a1.h0->logits": 0.5})
    two = circuit_file(tmp_path / "two.json", {"a0.h1->logits": 4.0, "m0->logits": 9.0})
    other = circuit_file(tmp_path / "other.json", {"a1.h0->logits": 1.0})
    counts = count_heads([CircuitHeads.read(one), CircuitHeads.read(two)], [CircuitHeads.read(other)])
    found = [(str(each.head), each.frequency, each.specificity, each.effect) for each in counts]
    assert found == [
        ("L0H1", 1.0, pytest.approx((2.5 / 3) / (0.5 / 2)), 3.5),
        ("L1H0", 0.5, pytest.approx((1.5 / 3) / (1.5 / 2)), 0.25),
    ]
    assert [each.head for each in choose_heads(counts, 9)] == [Head(0, 1), Head(1, 0)]
    assert [each.head for each in choose_heads(counts, 1)] == [Head(0, 1)]
    assert [each.head for each in choose_heads(counts, 9, min_frequency=0.6)] == [Head(0, 1)]
    assert [each.head for each in choose_heads(counts, 9, min_specificity=1.0)] == [Head(0, 1)]
    with pytest.raises(InvalidRequestError, match="thresholds"):
        choose_heads(counts, 9, min_specificity=50.0)


def test_a_head_on_no_path_to_the_logits_is_in_no_circuit(tmp_path) -> None:
    path = circuit_file(tmp_path / "c.json", {"a0.h1->m0": 5.0, "a1.h0->logits": 1.0}, dead=("a0.h1",))
    assert CircuitHeads.read(path).effect == {Head(1, 0): 1.0}


@pytest.mark.parametrize("content", ["", "[]", '{"cfg": {}}', '{"cfg": {}, "complete": true, "nodes": {}, "edges": 3}'])
def test_other_files_are_refused(tmp_path, content) -> None:
    path = tmp_path / "c.json"
    path.write_text(content)
    with pytest.raises(AssetError, match=r"c\.json: not a circuit"):
        CircuitHeads.read(path)


def test_a_search_that_was_cut_off_and_other_weights_are_refused(tmp_path) -> None:
    with pytest.raises(AssetError, match="cut off"):
        CircuitHeads.read(circuit_file(tmp_path / "c.json", {"a0.h0->logits": 1.0}, complete=False))
    mine = CircuitHeads.read(circuit_file(tmp_path / "mine.json", {"a0.h0->logits": 1.0}))
    cfg = {"model": "other", "model_fingerprint": "0" * 64}
    other = CircuitHeads.read(circuit_file(tmp_path / "other.json", {"a0.h0->logits": 1.0}, cfg=cfg))
    with pytest.raises(IncompatibleError, match=r"other\.json, of other"):
        count_heads([mine], [other])


@given(st.text())
def test_no_text_for_testing_gives_a_prompt_pair(text: str) -> None:
    gives_pairs = TextSplit.of(text) is TextSplit.TRAIN and PairSplit.of(text) is PairSplit.DISCOVERY
    assert (Use.of(text) is Use.FIT) == gives_pairs


def test_either_kind_has_as_many_texts_in_every_split() -> None:
    documents = [Document(f"text {i}", "bad" if i % 4 else "good") for i in range(400)]
    chosen = LabelledTexts.choose(documents, {"bad"}, 40)
    assert len(set(chosen.texts)) == len(chosen.texts)
    for use in Use:
        kinds = [bool(label) for label, each in zip(chosen.label, chosen.use, strict=True) if each is use]
        assert 0 < sum(kinds) == len(kinds) / 2 <= 40
    assert chosen.texts == LabelledTexts.choose(documents[::-1], {"bad"}, 40).texts
    with pytest.raises(InvalidRequestError, match="texts"):
        LabelledTexts.choose(documents, {"no such label"}, 40)


@settings(deadline=None, max_examples=25)  # the first call imports scikit-learn
@given(st.integers(0, 10_000))
def test_figures_are_those_of_scikit_learn(seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    label = np.arange(250) < 50
    scores = np.round(rng.normal(size=250) + label, 1)  # with ties
    measured = Resampled(label, draws=3).measure(scores)
    assert measured.auroc[0] == pytest.approx(metrics.roc_auc_score(label, scores))
    fpr, tpr, _ = metrics.roc_curve(label, scores, drop_intermediate=False)
    assert measured.detection[0] == pytest.approx(tpr[fpr <= 0.01].max())
    assert len(measured.auroc) == len(measured.detection) == 4


def test_a_resample_is_the_figure_of_the_texts_drawn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    label, scores = np.arange(40) < 15, np.random.default_rng(1).normal(size=40)
    drawn = np.random.default_rng(0).multinomial(40, np.full(40, 1 / 40), size=2)
    measured = Resampled(label, draws=2).measure(scores)
    for draw, auroc in zip(drawn, measured.auroc[1:], strict=True):
        rows = np.repeat(np.arange(40), draw)
        assert auroc == pytest.approx(metrics.roc_auc_score(label[rows], scores[rows]))


def test_random_heads() -> None:
    for heads in draw_heads(LAYERS, HEADS, 5, 20):
        assert len(set(heads)) == 5
        assert all(0 <= head.layer < LAYERS and 0 <= head.head < HEADS for head in heads)
    like = (Head(1, 0), Head(3, 0), Head(3, 2))
    for heads in draw_same_layers(like, HEADS, 20):
        assert [head.layer for head in heads] == [1, 3, 3]
        assert len(set(heads)) == 3
        assert heads[0] != Head(1, 0)
        assert Head(3, 1) in heads  # the one that is not of the circuit comes first


def planted(signal: Head, num_texts: int = 400) -> tuple[Reads, Examples]:
    """Texts of six positions; in positive ones the signal head puts out something else at one of them."""
    rng = np.random.default_rng(0)
    text = np.repeat(np.arange(num_texts), 6).astype(np.int32)
    label = np.arange(num_texts) % 2 == 0
    values = {
        Site(layer, Stream.ATTN_Z): rng.normal(size=(len(text), HEADS * D_HEAD)).astype(np.float16)
        for layer in range(LAYERS)
    }
    values[Site(2, Stream.RESID_POST)] = rng.normal(size=(len(text), HEADS * D_HEAD)).astype(np.float16)
    rows = np.flatnonzero(label[text] & (np.arange(len(text)) % 6 == 3))
    values[Site(signal.layer, Stream.ATTN_Z)][rows, signal.head * D_HEAD] += 6
    position = (np.arange(len(text)) % 6).astype(np.int32)
    reads = Reads(values, text, position, np.ones(len(text), bool))
    use = np.array([Use.FIT, Use.TUNE, Use.TEST])[np.arange(num_texts) // 2 % 3]
    texts = LabelledTexts(tuple(map(str, range(num_texts))), label, tuple(use))
    return reads, Examples.of_texts(reads, texts)


def test_the_probe_of_the_right_heads_wins(few_draws) -> None:
    reads, examples = planted(Head(2, 1))
    circuit, others = [Head(0, 0), Head(2, 1)], [Head(1, 2), Head(3, 0)]
    outcome = run_trial(Fitting(reads, examples, D_HEAD), readings_of(circuit, others, LAYERS, HEADS, D_HEAD, []), {})
    result = outcome.to_json()
    assert result["readings"]["circuit"]["auroc"]["low"] > 0.9
    assert result["readings"]["EAP-IG"]["auroc"]["high"] < 0.75
    assert result["circuit_less"]["middle layer"]["auroc"]["low"] > 0
    assert result["unbeaten"] == ["circuit"]
    assert result["examples"]["test"]["positive"] == examples.test.sum() / 2
    assert len(result["readings"]["random heads"]["each"]["auroc"]) == 2
    assert outcome.readings["middle layer"][0].components == 2 * D_HEAD


def test_readings_without_a_signal_are_all_unbeaten_and_the_fewest_sites_come_first(few_draws) -> None:
    reads, examples = planted(Head(0, 2))
    readings = readings_of([Head(1, 1), Head(2, 1)], [Head(3, 0), Head(2, 0)], LAYERS, HEADS, D_HEAD, [])
    assert run_trial(Fitting(reads, examples, D_HEAD), readings, {}).unbeaten[0] == "middle layer"


def test_what_was_fitted_is_not_fitted_again(tmp_path, monkeypatch) -> None:
    reads, examples = planted(Head(2, 1), num_texts=60)
    fitting, reading = Fitting(reads, examples, D_HEAD, tmp_path), Reading((Head(2, 1),))
    first = fitting.fit(reading)
    monkeypatch.setattr(probes, "fit_reading", None)
    again = fitting.fit(reading)
    np.testing.assert_array_equal(again.weight, first.weight)
    np.testing.assert_array_equal(again.scores, first.scores)
    assert (again.bias, again.threshold, again.reading) == (first.bias, first.threshold, reading)
    with pytest.raises(TypeError):
        fitting.fit(Reading((Head(2, 0),)))


@pytest.mark.parametrize(
    "reading",
    [Reading((Head(2, 1), Head(0, 0))), Reading(sites=(Site(2, Stream.RESID_POST),), components=4)],
    ids=["heads", "components"],
)
def test_the_entries_of_a_plan_add_up_to_the_probe(reading) -> None:
    reads, examples = planted(Head(2, 1))
    probe = fit_reading(reads, reading, examples, D_HEAD)
    made = entries_of_probe(probe, [], D_HEAD)
    combined = made.protocol["combined"]
    score = np.full(len(reads.text), combined["bias"])
    for entry in made.entries:
        vector = made.vectors[entry.reading.vector].astype(np.float64)
        if entry.reading.kind == "head":
            head = Head(*map(int, entry.name[1:].split("H")))
            x = reads.values[Site(head.layer, Stream.ATTN_Z)][:, head.head * D_HEAD : (head.head + 1) * D_HEAD]
        else:
            x = reads.values[Site.parse(entry.reading.site)]
        score += combined["scales"][entry.name] * (x.astype(np.float64) @ (vector / np.linalg.norm(vector)))
    highest = score.reshape(-1, 6).max(1)
    np.testing.assert_allclose(highest, probe.scores, atol=1e-3)
    quiet = highest[examples.tune & ~examples.label]
    assert (quiet > combined["threshold"] + 1e-3).mean() <= 0.01


@pytest.fixture
def model_dir(tiny_model_dir: Callable[[str], Path]) -> Path:
    return tiny_model_dir("llama")


def test_reads_are_what_the_model_computes_and_are_computed_once(model_dir, tmp_path, monkeypatch) -> None:
    model = load_model(str(model_dir), torch.float32)
    texts, sites = ["abcdef", "xy", "q", "abcd"], [*head_sites(model), Site(1, Stream.RESID_POST)]
    reads = read_texts(model, texts, sites, tmp_path / "reads")
    for i, text in enumerate(texts):
        rows = np.flatnonzero(reads.text == i)
        assert reads.position[rows].tolist() == list(range(1, len(text)))
        z = head_outputs(model, model.tokenizer(text, return_tensors="pt").input_ids)
        for site in head_sites(model):
            np.testing.assert_allclose(reads.values[site][rows], z[site.layer][0, 1:].flatten(1), atol=2e-3)
    monkeypatch.setattr(reads_module, "activations_of", None)
    again = read_texts(model, texts, sites, tmp_path / "reads")
    assert (again.text == reads.text).all()
    with pytest.raises(TypeError):
        read_texts(model, texts[::-1], sites, tmp_path / "reads")


def test_ahead_asks_just_before_the_first_listed_word(model_dir, tmp_path) -> None:
    model = load_model(str(model_dir), torch.float32)
    texts = ["ab damn you damn", "damn it all", "a quiet afternoon", "ab darn you"]
    chosen = LabelledTexts(tuple(texts), np.array([True, True, False, False]), (Use.FIT,) * 4)
    reads = read_texts(model, texts, [Site(1, Stream.RESID_POST)], tmp_path / "reads")
    examples = Examples.ahead(model, reads, chosen, Lexicon(frozenset({"damn"})))
    asked = {int(t): int(reads.position[p]) for p, t in zip(examples.positions, examples.text, strict=True)}
    assert asked == {0: 2, 2: 2, 3: 2}  # one token a letter: the space before the word
    assert examples.fit.tolist() == [True, False, True, True]
    with pytest.raises(InvalidRequestError, match="words"):
        Examples.ahead(model, reads, chosen, Lexicon(frozenset({"nowhere"})))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "letters.jsonl"
    rows = [
        {"clean": f"{i:02}axxx", "corrupted": f"{i:02}byyx", "correct": ["a"], "wrong": ["b", "c"]} for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    rows = [
        {"text": f"{i} so {'damn' if i % 2 else 'kind'} of you {i * i}", "label": "bad" if i % 2 else "good"}
        for i in range(300)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def invoke(app, *arguments: object):
    outcome = CliRunner().invoke(app, [str(each) for each in arguments])
    assert outcome.exit_code == 0, (outcome.output, outcome.exception)
    return outcome


DISCOVER = ("--prompts", 4, "--held-out", 0, "--threshold", 1e-4, "--threshold", 1e-3, "--metric", "log_odds")


def test_discover_writes_a_plan_that_a_server_takes(model_dir, pairs, labelled, tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    model = load_model(str(model_dir), torch.float32)
    search = ("--model", model_dir, "--watch", 3, *DISCOVER)
    invoke(cli.discover_app, pairs, "--out", tmp_path / "other", *search, "--order", "earlier_first")
    search = (pairs, "--out", tmp_path / "c", *search, "--circuit", tmp_path / "other" / "circuit-0.001.json")
    invoke(cli.discover_app, *search, "--bootstraps", 1, "--monitor-plan", tmp_path / "means.json")
    plan = load_monitor_plan(tmp_path / "means.json").plan
    assert (plan.provenance.bootstraps, plan.provenance.thresholds) == (1, (1e-4, 1e-3))
    assert plan.provenance.orders == ("earlier_first", "later_first")
    assert len(plan.provenance.circuits) == 5
    assert {entry.frequency for entry in plan.entries} <= {0.6, 0.8, 1.0}
    assert all(entry.specificity is None for entry in plan.entries)
    assert plan.protocol["mean_scores"].keys() == {entry.name for entry in plan.entries}
    fitted = ("--texts", labelled, "--positive-label", "bad", "--control", tmp_path / "c" / "circuit-0.001.json")
    invoke(cli.discover_app, *search, *fitted, "--monitor-plan", tmp_path / "probe.json")
    for name in ("means", "probe"):
        file = load_monitor_plan(tmp_path / f"{name}.json")
        monitors = bind_monitors(file, Catalog.load(model))
        assert len(monitors.edits) == len(file.plan.entries) <= 3
        assert all(entry.reading.kind == "head" for entry in file.plan.entries)
    assert all(entry.specificity is not None for entry in file.plan.entries)
    assert file.plan.protocol["combined"]["scales"].keys() == {entry.name for entry in file.plan.entries}
    monkeypatch.setattr(monitors_module, "BUILT_IN_PLANS", tmp_path)
    assert read_monitors(Path("means"), Catalog.load(model)).plan == plan
    with pytest.raises(AssetError, match=r"'median' is neither a file nor a built-in one: means, probe"):
        read_monitors(Path("median"), Catalog.load(model))


@pytest.mark.parametrize("path", sorted(monitors_module.BUILT_IN_PLANS.glob("*.json")), ids=lambda path: path.stem)
def test_built_in_plans_are_of_the_weights_that_built_in_packs_are_of(path) -> None:
    plan, pack = load_monitor_plan(path).plan, load_pack(ASSETS / "packs" / "profanity")
    assert plan.model == pack.card.model
    assert plan.name == path.stem


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (("--monitor-plan", "plan.txt"), "--monitor-plan"),
        (("--monitor-plan", "plan.json", "--positive-label", "bad"), "--positive-label"),
        (("--bootstraps", 1, "--ablation", "zero"), "--bootstraps"),
    ],
)
def test_what_cannot_become_a_plan_is_refused_before_the_search(model_dir, pairs, tmp_path, options, field) -> None:
    arguments = (pairs, "--out", tmp_path / "c", *DISCOVER, "--model", model_dir, *options)
    outcome = CliRunner().invoke(cli.discover_app, [str(each) for each in arguments])
    assert isinstance(outcome.exception, InvalidRequestError)
    assert outcome.exception.field == field
    assert not (tmp_path / "c").exists()


def test_analyse_monitors_from_circuit_and_texts_to_table_picture_and_plan(
    model_dir, pairs, labelled, tmp_path, few_draws
) -> None:
    pytest.importorskip("matplotlib")
    invoke(cli.discover_app, pairs, "--out", tmp_path / "c", *DISCOVER, "--model", model_dir)
    out, plan = tmp_path / "monitors.json", tmp_path / "winner.json"
    words = tmp_path / "words.json"
    words.write_text(json.dumps({"selection": {"damn": ["damn"]}}))
    options = {
        "--circuit": tmp_path / "c" / "circuit-0.0001.json",
        "--texts": labelled,
        "--positive-label": "bad",
        "--words": words,
        "--heads": 2,
        "--layer": 2,
        "--activations": tmp_path / "reads",
        "--monitor-plan": plan,
        "--out": out,
        "--model": model_dir,
    }
    invoke(cli.app, "monitors", pairs, *(part for option in options.items() for part in option))
    result = json.loads(out.read_text())
    assert list(result["trials"]) == ["text, 2 heads", "ahead, 2 heads"]
    for each in result["trials"].values():
        assert set(each["readings"]) >= {"circuit", "random heads", "random heads, same layers", "EAP-IG", "layer 2"}
    assert result["trials"]["text, 2 heads"]["readings"]["middle layer"]["auroc"]["value"] > 0.8
    assert out.with_suffix(".svg").read_text().lstrip().startswith("<?xml")
    file = load_monitor_plan(plan)
    assert file.plan.protocol["reading"] == result["winner"] == result["trials"]["text, 2 heads"]["unbeaten"][0]
    bind_monitors(file, Catalog.load(load_model(str(model_dir), torch.float32)))
