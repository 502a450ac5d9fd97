"""``steerserve policy``: check, explain and try out policy files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from steerserve.errors import InvalidRequestError, PolicyError
from steerserve.serving.dialling import DEFAULT_TARGET
from steerserve.steering.catalog import ASSETS
from steerserve.steering.packs import ConceptPack
from steerserve.steering.policies import Policy, policy_of
from steerserve.steering.policy_set import BUILT_IN, PolicyChanges, PolicySet, policy_files
from steerserve.steering.policy_words import explain

if TYPE_CHECKING:
    from steerserve.serving.policy_trial import Confusion

app = typer.Typer(help="Check, explain and try out policy files.", no_args_is_help=True, add_completion=False)

PackOption = Annotated[
    list[str] | None, typer.Option("--pack", help="Concept pack: built-in name or directory; default: all built-in.")
]
PolicyArgument = Annotated[str, typer.Argument(help="A policy file, or the name of a built-in policy or a pack.")]


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="A policy file, or a directory of them.")], pack: PackOption = None
) -> None:
    """Say what is wrong with policy files, or nothing but their names; exit code 1 if something is."""
    try:
        policies = PolicySet.read(path, _packs(pack)).policies
    except PolicyError as error:
        for problem in error.problems:
            typer.echo(problem, err=True)
        raise typer.Exit(1) from None
    for policy in policies.values():
        typer.echo(f"{policy.tag}: {len(policy.rules)} rules, good")


@app.command("explain")
def explain_command(policy: PolicyArgument, pack: PackOption = None) -> None:
    """Say in words what a policy reads and edits, what follows, and what requests under it may do."""
    packs = _packs(pack)
    for line in explain(_find(policy, packs), packs):
        typer.echo(line)


@app.command("test")
def try_command(
    policy: PolicyArgument,
    texts: Annotated[Path, typer.Option(help='JSON lines: {"text": ..., "label": whether the policy is to act}.')],
    pack: PackOption = None,
    model: Annotated[str, typer.Option(help="Known name, Hugging Face id or directory.")] = "smollm2-135m-instruct",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="Print every text's reading and the table as JSON.")] = False,
) -> None:
    """Read texts as the server would, and show where the policy acts: a confusion table of its rules.

    Below it, for each rule that reads: what other thresholds would do, the smallest that let it act on no more than 0,
    0.5, 1, 2, 5 and 10 % of the texts on which it is not to act.
    """
    from transformers.utils.logging import disable_progress_bar

    from steerserve.config import EngineConfig, ServerConfig
    from steerserve.serving import policy_trial
    from steerserve.serving.app import load_engine

    disable_progress_bar()
    labelled = policy_trial.read_texts(texts)
    found = _find(policy, _packs(pack))
    if dtype not in ("bfloat16", "float32"):
        raise InvalidRequestError("--dtype", dtype, "bfloat16 or float32")
    config = ServerConfig(model=model, packs=None if pack is None else tuple(pack), saes=())
    engine = load_engine(config, EngineConfig.model_validate({"dtype": dtype}))
    readings = list(policy_trial.try_policy(engine, found, labelled))
    lines = policy_trial.confusions(found, readings)
    in_force = policy_trial.rule_thresholds(found, engine.catalog.packs)
    thresholds = {label: policy_trial.choices(label, value, readings) for label, value in in_force.items()}
    if as_json:
        typer.echo(json.dumps(policy_trial.as_json(found, lines, thresholds, readings), indent=1))
        return
    _show_counts(found.tag, [(line.rule, line) for line in lines], "rule")
    for label, choices in thresholds.items():
        named = [(f"{choice.value:g}{' (now)' if choice.is_in_force else ''}", choice.confusion) for choice in choices]
        _show_counts(f"{label}, with other thresholds", named, "above")
    errors = [reading.error for reading in readings if reading.error]
    if errors:
        typer.echo(f"{len(errors)} texts could not be read, the first: {errors[0]}", err=True)


@app.command()
def reload(
    target: Annotated[
        str, typer.Option(envvar="STEERSERVE_TARGET", help="Server address, host:port: that of --admin-port, if set.")
    ] = DEFAULT_TARGET,
    api_key_file: Annotated[
        str | None, typer.Option(help="File that holds a key with the role 'admin'. [$STEERSERVE_API_KEY_FILE]")
    ] = None,
) -> None:
    """Have a running server read its policy and access files again; exit code 1 if something is wrong with them.

    Says what changed, or why nothing did.
    """
    from steerserve.client import SteerserveClient

    try:
        with SteerserveClient(target, api_key_file=api_key_file) as client:
            answer = client.reload_policies()
    except PolicyError as error:
        typer.echo("nothing has changed:", err=True)
        for problem in error.problems:
            typer.echo(problem, err=True)
        raise typer.Exit(1) from None
    typer.echo(PolicyChanges(tuple(answer.added), tuple(answer.changed), tuple(answer.removed)))


def _show_counts(title: str, lines: Sequence[tuple[str, Confusion]], heading: str) -> None:
    table = Table(heading, title=title, title_justify="left")
    for column in ("TP", "FP", "FN", "TN", "precision", "recall", "FPR"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, line in lines:
        counts = (line.true_positives, line.false_positives, line.false_negatives, line.true_negatives)
        rates = (line.precision, line.recall, line.false_positive_rate)
        table.add_row(name, *map(str, counts), *("–" if rate is None else f"{rate:.1%}" for rate in rates))
    Console().print(table)


def _packs(names: Sequence[str] | None) -> dict[str, ConceptPack]:
    from steerserve.steering.pack_files import load_pack

    if names is None:
        directories = sorted(path.parent for path in ASSETS.glob("packs/*/card.json"))
    else:
        directories = [Path(name) if Path(name).is_dir() else ASSETS / "packs" / name for name in names]
    packs = [load_pack(directory) for directory in directories]
    return {pack.name: pack for pack in packs}


def _find(name: str, packs: Mapping[str, ConceptPack]) -> Policy:
    """The policy that is meant, checked against the packs."""
    if name in packs:
        return policy_of(packs[name])
    built_in = {path.stem: path for path in policy_files(BUILT_IN)}
    path = built_in.get(name, Path(name))
    if not path.is_file():
        known = ", ".join(sorted(built_in.keys() | packs.keys()))
        raise InvalidRequestError("policy", name, f"a file, or one of {known}")
    (policy,) = PolicySet.read(path, packs).policies.values()
    return policy
