"""``steerserve analyse`` and ``discover``: what a model does with pairs of prompts, and which parts of it do it."""

from __future__ import annotations

import typer

from steerserve.circuits.commands.discover import discover_command
from steerserve.circuits.commands.edges import edges_command
from steerserve.circuits.commands.faithfulness import faithfulness_command
from steerserve.circuits.commands.features import features_command
from steerserve.circuits.commands.geometry import geometry_command
from steerserve.circuits.commands.lens import lens_command
from steerserve.circuits.commands.monitors import monitors_command
from steerserve.circuits.commands.pairs import pairs_command
from steerserve.circuits.commands.patch import patch_command
from steerserve.circuits.commands.probe import probe_command
from steerserve.circuits.commands.roles import roles_command
from steerserve.circuits.commands.stability import stability_command

app = typer.Typer(
    help="Patch, probe and read a model's activations on prompts in pairs.", no_args_is_help=True, add_completion=False
)
app.command("pairs")(pairs_command)
app.command("patch")(patch_command)
app.command("lens")(lens_command)
app.command("probe")(probe_command)
app.command("geometry")(geometry_command)
app.command("features")(features_command)
app.command("roles")(roles_command)
app.command("edges")(edges_command)
app.command("faithfulness")(faithfulness_command)
app.command("stability")(stability_command)
app.command("monitors")(monitors_command)

discover_app = typer.Typer(add_completion=False)
discover_app.command()(discover_command)
