"""``steerserve keys``: make API keys, and check the file that says what they are for."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console
from rich.table import Table

from steerserve.errors import AssetError, PolicyError
from steerserve.serving.access import AccessFile, Key, Quotas, Role, read_access
from steerserve.serving.keys import key_hash, new_key
from steerserve.strict_yaml import parse_yaml

app = typer.Typer(help="Make API keys, and check the access file.", no_args_is_help=True, add_completion=False)


@app.command()
def create(
    id: Annotated[str, typer.Argument(help="Names the key in logs and in the access file.")],
    tenant: Annotated[str, typer.Option(help="Whose key it is.")],
    role: Annotated[list[Role], typer.Option(help="What it is for; repeatable.")] = [Role.USER],  # noqa: B006
    expires: Annotated[datetime | None, typer.Option(help="When it ends, UTC.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="New file for the key, which nobody else may read; left out: standard error.")
    ] = None,
) -> None:
    """Print a new key, once, on standard error, and its entry for the access file on standard output."""
    key = new_key()
    entry: dict[str, object] = {
        "id": id,
        "tenant": tenant,
        "roles": [str(each) for each in role],
        "sha256": key_hash(key),
    }
    if expires is not None:
        entry["expires"] = f"{expires.isoformat()}Z"
    shown = yaml.safe_dump([entry], sort_keys=False)
    tenants = yaml.safe_dump({"format": "steerserve.access/1", "tenants": {tenant: {}}, "keys": [entry]})
    parse_yaml(tenants.encode(), "keys create", AccessFile)
    if out is None:
        typer.echo(f"{key}\nThe key above is shown this once. For the access file, under 'keys':", err=True)
    else:
        _write_secret(out, key)
    typer.echo(shown, nl=False)


@app.command()
def check(file: Annotated[Path, typer.Argument(help="An access file.")]) -> None:
    """Say what is wrong with an access file, or what it allows; exit code 1 if something is wrong."""
    try:
        access = read_access(file)
    except PolicyError as error:
        for problem in error.problems:
            typer.echo(problem, err=True)
        raise typer.Exit(1) from None
    Console().print(_tenants(access), _keys(access.keys))


def _write_secret(path: Path, key: str) -> None:
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"{key}\n")
    except OSError as error:
        raise AssetError(f"{path}: {error.strerror}") from error


def _tenants(access: AccessFile) -> Table:
    table = Table("tenant", "must have", "if none is named", "may name", "steers", "quotas")
    for name, tenant in access.tenants.items():
        policies = tenant.policies
        table.add_row(
            name,
            ", ".join(policies.required) or "–",
            ", ".join(policies.default) or "–",
            "all" if policies.allowed is None else ", ".join(policies.allowed) or "–",
            "yes" if tenant.may_steer else "no",
            _quotas(tenant.quotas),
        )
    return table


def _quotas(quotas: Quotas) -> str:
    limits = quotas.model_dump(exclude_none=True)
    return ", ".join(f"{kind} {limit}" for kind, limit in limits.items()) or "none"


def _keys(keys: tuple[Key, ...]) -> Table:
    table = Table("key", "tenant", "roles", "shown as", "quotas", "expires")
    for key in keys:
        shown = " or ".join(kind for kind in ("sha256", "certificate") if getattr(key, kind) is not None)
        expires = str(key.expires or "never")
        table.add_row(key.id, key.tenant, ", ".join(key.roles), shown, _quotas(key.quotas), expires)
    return table
