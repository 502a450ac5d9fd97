"""``steerserve lab``: from text to a trained SAE and a measured concept pack."""

from __future__ import annotations

import typer

from steerserve.lab.commands.compare import overlap_command
from steerserve.lab.commands.concept import card_command, concept_command
from steerserve.lab.commands.evaluate import eval_command
from steerserve.lab.commands.export import export_command
from steerserve.lab.commands.harvest import harvest_command
from steerserve.lab.commands.sweep import sweep_command
from steerserve.lab.commands.train import train_command

app = typer.Typer(help="Collect activations, train and evaluate SAEs, build concept packs.", no_args_is_help=True)
app.command("harvest")(harvest_command)
app.command("export")(export_command)
app.command("train")(train_command)
app.command("sweep")(sweep_command)
app.command("eval")(eval_command)
app.command("overlap")(overlap_command)
app.command("concept")(concept_command)
app.command("card")(card_command)
