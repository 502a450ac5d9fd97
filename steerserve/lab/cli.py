"""``steerserve lab`` and ``steerserve concept``: from text to a trained SAE, and on to a measured concept pack."""

from __future__ import annotations

import typer

from steerserve.lab.commands.compare import overlap_command
from steerserve.lab.commands.concept_build import build_command
from steerserve.lab.commands.concept_eval import eval_pack_command
from steerserve.lab.commands.evaluate import eval_command
from steerserve.lab.commands.export import export_command
from steerserve.lab.commands.features import features_command
from steerserve.lab.commands.harvest import harvest_command
from steerserve.lab.commands.inspect import inspect_command
from steerserve.lab.commands.sweep import sweep_command
from steerserve.lab.commands.train import train_command

app = typer.Typer(
    help="Harvest activations; train, evaluate and interpret SAEs.", no_args_is_help=True, add_completion=False
)
app.command("harvest")(harvest_command)
app.command("export")(export_command)
app.command("train")(train_command)
app.command("sweep")(sweep_command)
app.command("eval")(eval_command)
app.command("overlap")(overlap_command)
app.command("features")(features_command)
app.command("inspect")(inspect_command)

concept_app = typer.Typer(
    help="Build concept packs, and measure what they do.", no_args_is_help=True, add_completion=False
)
concept_app.command("build")(build_command)
concept_app.command("eval")(eval_pack_command)
