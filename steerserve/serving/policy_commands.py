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
from steerserve.steering.catalog import ASSETS
from steerserve.steering.packs import ConceptPack
from steerserve.steering.policies import Policy, policy_of
from steerserve.steering.policy_set import BUILT_IN, PolicySet, policy_files
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
    """Read texts as the server would, and show where the policy acts: a confusion table for each of its rules."""
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
    if as_json:
        typer.echo(json.dumps(policy_trial.as_json(found, lines, readings), indent=1))
        return
    _show(found, lines, [reading.error for reading in readings if reading.error])


def _show(policy: Policy, lines: Sequence[Confusion], errors: Sequence[str]) -> None:
    table = Table("rule", title=f"{policy.tag}", title_justify="left")
    for heading in ("TP", "FP", "FN", "TN", "precision", "recall", "FPR"):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in lines:
        counts = (line.true_positives, line.false_positives, line.false_negatives, line.true_negatives)
        rates = (line.precision, line.recall, line.false_positive_rate)
        table.add_row(line.rule, *map(str, counts), *("–" if rate is None else f"{rate:.1%}" for rate in rates))
    Console().print(table)
    if errors:
        typer.echo(f"{len(errors)} texts could not be read, the first: {errors[0]}", err=True)


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
