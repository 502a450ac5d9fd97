"""``steerserve analyse monitors``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from steerserve.circuits.commands.monitor_plan import read_all, require_plan
from steerserve.circuits.commands.options import (
    MetricOption,
    OutOption,
    TaskArgument,
    metric_of,
    prompts_of,
    require_out,
    write,
)
from steerserve.circuits.edge_attribution import attribute_edges
from steerserve.circuits.monitoring.choice import (
    CircuitHeads,
    Head,
    HeadCount,
    attributed_heads,
    choose_heads,
    count_heads,
)
from steerserve.circuits.monitoring.examples import MAX_PER_KIND, Examples, LabelledTexts
from steerserve.circuits.monitoring.pictures import draw_trial
from steerserve.circuits.monitoring.plans import entries_of_probe, plan_of
from steerserve.circuits.monitoring.probes import Fitting, given_probe
from steerserve.circuits.monitoring.reads import head_sites, read_texts
from steerserve.circuits.monitoring.trial import Outcome, readings_of, run_trial
from steerserve.circuits.prompts import Split
from steerserve.circuits.slicing import slice_model
from steerserve.errors import IncompatibleError, InvalidRequestError
from steerserve.lab.commands.options import ModelOption, TextsOption, console
from steerserve.lab.lexicon import PROFANITY, Lexicon
from steerserve.models.loading import LoadedModel, load_model
from steerserve.models.pull import resolve_model
from steerserve.steering.catalog import Catalog
from steerserve.steering.monitor_plan import save_monitor_plan
from steerserve.types import FloatArray, Site, Stream

STEPS = 5
"""Of EAP-IG."""
NUM_PAIRS = 16


def monitors_command(
    task: TaskArgument,
    circuit: Annotated[list[Path], typer.Option(help="Circuit of the behaviour, from `discover`; repeatable.")],
    texts: TextsOption,
    positive_label: Annotated[list[str], typer.Option(help="Label of texts that show the behaviour; repeatable.")],
    control: Annotated[list[Path], typer.Option(help="Circuit of another behaviour; repeatable.")] = [],  # noqa: B006
    heads: Annotated[list[int], typer.Option(help="Heads to read; repeatable, the verdict is on the first.")] = [9],  # noqa: B006
    words: Annotated[Path, typer.Option(help="JSON word list. [built in: profanity]", show_default=False)] = PROFANITY,
    layer: Annotated[list[int], typer.Option(help="Residual stream to read for reference; repeatable.")] = [],  # noqa: B006
    concept: Annotated[
        str | None, typer.Option(help="Concept pack, whose detector is a probe, to read for reference.")
    ] = None,
    max_per_kind: Annotated[int, typer.Option(min=1, help="Texts of either kind, of each split.")] = MAX_PER_KIND,
    metric: MetricOption = None,
    activations: Annotated[Path, typer.Option(help="Directory for activations, several GB, and probes; kept.")] = Path(
        "reads"
    ),
    monitor_plan: Annotated[Path | None, typer.Option(help="Write the winner as a monitor plan.")] = None,
    behaviour: Annotated[str, typer.Option(help="What the plan says that it watches.")] = "",
    out: OutOption = Path("monitors.json"),
    model: ModelOption = "smollm2-135m-instruct",
) -> None:
    """Compare the heads that circuits name with others, and with residual streams, as monitors of a behaviour.

    Prompt pairs of TASK rank the heads by EAP-IG. The protocol is in docs/circuits.md.
    """
    require_out(out)
    if monitor_plan is not None:
        require_plan(monitor_plan)
    circuits, controls = [CircuitHeads.read(path) for path in circuit], [CircuitHeads.read(path) for path in control]
    counts = count_heads(circuits, controls)
    named = [_named(counts, count) for count in heads]
    loaded = load_model(resolve_model(model), torch.float32)
    chosen = LabelledTexts.choose(read_all(texts), positive_label, max_per_kind)
    others = [Site(each, Stream.RESID_POST) for each in layer]
    given = None if concept is None else _detector(loaded, concept)
    ranked = _by_eap_ig(loaded, task, metric_of(task, metric))
    residual = {Site(loaded.n_layers // 2, Stream.RESID_POST), *others, *([] if given is None else [given[0]])}
    reads = read_texts(loaded, chosen.texts, [*head_sites(loaded), *sorted(residual)], activations)
    questions = {
        "text": Examples.of_texts(reads, chosen),
        "ahead": Examples.ahead(loaded, reads, chosen, Lexicon.load(words)),
    }
    outcomes: dict[str, Outcome] = {}
    for of_circuit in named:
        readings = readings_of(of_circuit, ranked, loaded.n_layers, loaded.n_heads, loaded.d_head, others)
        for name, examples in questions.items():
            probes = {} if given is None else {f"{concept} pack": given_probe(reads, *given, examples)}
            title = f"{name}, {len(of_circuit)} heads"
            outcomes[title] = run_trial(Fitting(reads, examples, loaded.d_head, activations), readings, probes)
            console.print(_table(title, outcomes[title].to_json()))
    first = next(iter(outcomes.values()))
    trials = {title: outcome.to_json() for title, outcome in outcomes.items()}
    result: dict[str, Any] = {
        "model": loaded.name,
        "model_fingerprint": loaded.fingerprint,
        "circuits": {each.name: each.sha256 for each in circuits},
        "controls": {each.name: each.sha256 for each in controls},
        "positive_labels": sorted(positive_label),
        "winner": first.unbeaten[0],
        "trials": trials,
    }
    write(result, draw_trial(trials, f"monitors: {', '.join(sorted(positive_label))}"), out)
    if monitor_plan is not None:
        _save_plan(loaded, first, counts, circuits, result, behaviour, monitor_plan)


def _named(counts: Sequence[HeadCount], count: int) -> list[Head]:
    """The heads of the circuits that are compared.

    Raises:
        InvalidRequestError: the circuits have not as many.
    """
    named = choose_heads(counts, count)
    if not 0 < count == len(named):
        raise InvalidRequestError("--heads", count, f"1 to {len(named)}, as many as half of the circuits have")
    return [each.head for each in named]


def _by_eap_ig(model: LoadedModel, task: str, metric: str) -> list[Head]:
    """All heads, the one with the largest sum of |score| over its edges first."""
    sliced = slice_model(model)
    pairs = prompts_of(model, task, NUM_PAIRS, 0, Split.DISCOVERY)
    return attributed_heads(attribute_edges(sliced, sliced.graph(split=False, kv="grouped"), pairs, metric, STEPS))


def _detector(model: LoadedModel, concept: str) -> tuple[Site, FloatArray, float]:
    """Site, direction and bias of a pack's probe.

    Raises:
        IncompatibleError: its detector is no probe.
    """
    (pack,) = Catalog.load(model, packs=[concept]).packs.values()
    if pack.card.detector.kind != "probe":
        raise IncompatibleError("--concept", concept, "a concept whose detector is a probe")
    rows = pack.at(pack.detector_site)
    return pack.detector_site, rows.weight @ rows.W_enc, float(rows.weight @ rows.b_enc)


def _save_plan(
    model: LoadedModel,
    first: Outcome,
    counts: Sequence[HeadCount],
    circuits: Sequence[CircuitHeads],
    result: dict[str, Any],
    behaviour: str,
    path: Path,
) -> None:
    """The winner, with its figures."""
    name = first.unbeaten[0]
    figures = first.to_json()["readings"][name]
    protocol = {"reading": name, "positive_labels": result["positive_labels"], **figures}
    plan, vectors = plan_of(
        path.stem,
        behaviour or path.stem,
        model,
        [entries_of_probe(first.probes[name], counts, model.d_head)],
        circuits,
        0,
        shlex.join(["steerserve", *sys.argv[1:]]),
        protocol,
    )
    save_monitor_plan(plan, vectors, path)
    console.print(f"{name}: {path}")


def _table(title: str, trial: dict[str, Any]) -> Table:
    table = Table("reads", "AUROC", "detected at 1 %", "AUROC of the circuit less this", title=title)
    for name, figures in trial["readings"].items():
        difference = trial["circuit_less"][name]
        ahead = f"; above {difference['auroc']['exceeds']} of {difference['auroc']['of']}"
        table.add_row(
            name,
            _shown(figures["auroc"]),
            _shown(figures["detection"]),
            _shown(difference["auroc"]) + (ahead if "each" in figures else "") if name != "circuit" else "",
        )
    return table


def _shown(interval: dict[str, float]) -> str:
    return f"{interval['value']:.3f} [{interval['low']:.3f} – {interval['high']:.3f}]"
