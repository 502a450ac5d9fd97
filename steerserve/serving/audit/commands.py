"""``steerserve audit``: make keys, and verify a log."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from steerserve.errors import InvalidRequestError
from steerserve.serving.audit.files import log_files
from steerserve.serving.audit.keys import AuditKey, create_keys, load_public_key
from steerserve.serving.audit.verify import verify_log

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The log of all exchanges: make its keys, and find out whether anybody changed it.",
)
key_app = typer.Typer(no_args_is_help=True, help="The keys of the log.")
app.add_typer(key_app, name="key")


@key_app.command("create")
def key_create(directory: Annotated[Path, typer.Argument(help="Where to write them; made if need be.")]) -> None:
    """Write three new keys: of the MACs, for signing heads, and its public half."""
    mac, signing, public = create_keys(directory)
    print(f"{mac}\tthe server's alone; verifies every record")
    print(f"{signing}\tthe server's alone; signs heads")
    print(f"{public}\tfor anyone; verifies heads")


@app.command()
def verify(
    log: Annotated[Path, typer.Argument(help="Directory of the log.")],
    heads: Annotated[Path | None, typer.Option(help="File of exported heads; needs --public-key.")] = None,
    public_key: Annotated[Path | None, typer.Option(help="heads.pub: verifies the heads.")] = None,
    key: Annotated[
        list[Path] | None, typer.Option(help="audit.key: verifies each record by itself. Repeatable.")
    ] = None,
) -> None:
    """Find any edit, reorder, insertion or cut up to the last exported head, and say how far that reaches.

    The exit code is 0 if nothing was found, 1 if the log or the heads were changed, 2 if they cannot be checked.
    """
    if (heads is None) is not (public_key is None):
        raise InvalidRequestError("--heads", str(heads), "both --heads and --public-key, or neither")
    if heads is None and not key:
        raise InvalidRequestError("--key", None, "--heads with --public-key, or --key, or all of them")
    total = sum(path.stat().st_size for path in log_files(log))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("verifying", total=total)
        report = verify_log(
            log,
            [AuditKey.load(path) for path in key or ()],
            heads,
            None if public_key is None else load_public_key(public_key),
            lambda num_bytes: progress.advance(task, num_bytes),
        )
    for problem in report.problems:
        print(f"CHANGED  {problem}")
    if report.num_problems > len(report.problems):
        print(f"CHANGED  and {report.num_problems - len(report.problems):,} more")
    if report.unfinished_bytes:
        print(f"the last {report.unfinished_bytes:,} bytes are an unfinished line: being written, or left by a crash")
    verdict = "sound" if report.is_sound else "NOT SOUND"
    print(f"{verdict}: {report.num_records:,} records; {report.guarantee()}")
    raise typer.Exit(int(not report.is_sound))
