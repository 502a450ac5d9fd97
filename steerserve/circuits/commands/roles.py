"""``steerserve analyse roles``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from steerserve.circuits.commands.options import (
    NumPromptsOption,
    OutOption,
    SeedOption,
    SplitOption,
    TaskArgument,
    prompts_of,
    require_out,
    write,
)
from steerserve.circuits.head_roles import HeadRoles, head_roles
from steerserve.circuits.plots import heat_maps
from steerserve.circuits.prompts import Split
from steerserve.errors import AssetError
from steerserve.lab.commands.options import ModelOption, console
from steerserve.models.loading import load_model
from steerserve.models.pull import resolve_model

SHOWN = 5
NOTABLE = 0.1
"""More attention than an even head pays."""
_HEAD = re.compile(r"a(\d+)\.h(\d+)")


def roles_command(
    task: TaskArgument,
    circuit: Annotated[Path | None, typer.Option(help="A circuit of `discover`: show its heads alone.")] = None,
    num_prompts: NumPromptsOption = 100,
    seed: SeedOption = 0,
    split: SplitOption = Split.DISCOVERY,
    out: OutOption = Path("roles.json"),
    model: ModelOption = "smollm2-135m-instruct",
) -> None:
    """Show where heads look: at the token before, at earlier occurrences, at what followed them, at the answers."""
    require_out(out)
    heads = None if circuit is None else _heads_of(circuit)
    loaded = load_model(resolve_model(model), torch.float32)
    roles = head_roles(loaded, prompts_of(loaded, task, num_prompts, seed, split))
    console.print(_of_roles(roles) if heads is None else _of_heads(roles, heads))
    panels = {f"{role}": values.tolist() for role, values in roles.attention.items()}
    write(roles.to_dict(), heat_maps(panels, "head", f"attention on {roles.task}"), out)


def _of_roles(roles: HeadRoles) -> Table:
    table = Table("role", "evenly", "heads that look there most, and how much of their attention")
    for role in roles.attention:
        shown = ", ".join(f"L{layer}H{head} {value:.2f}" for layer, head, value in roles.strongest(role, SHOWN))
        table.add_row(str(role), f"{roles.uniform[role]:.2f}", shown)
    return table


def _of_heads(roles: HeadRoles, heads: list[tuple[int, int]]) -> Table:
    table = Table("head", *(str(role) for role in roles.attention))
    for layer, head in heads:
        above = {role: float(of[layer, head]) - roles.uniform[role] for role, of in roles.attention.items()}
        most = max(above, key=lambda role: above[role])
        cells = {role: f"{float(of[layer, head]):.2f}" for role, of in roles.attention.items()}
        if above[most] > NOTABLE:
            cells[most] = f"[bold]{cells[most]}[/bold]"
        table.add_row(f"L{layer}H{head}", *cells.values())
    return table


def _heads_of(circuit: Path) -> list[tuple[int, int]]:
    """Heads that an edge of the circuit leaves, in model order."""
    try:
        edges = json.loads(circuit.read_text(encoding="utf-8"))["edges"]
        kept = [name for name, edge in edges.items() if edge["in_graph"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AssetError(f"{circuit}: not a circuit that `steerserve discover` wrote: {error}") from error
    found = {match.groups() for name in kept if (match := _HEAD.match(name))}
    return sorted((int(layer), int(head)) for layer, head in found)
