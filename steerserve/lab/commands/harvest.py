"""``steerserve lab harvest``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from steerserve.errors import InvalidRequestError
from steerserve.lab.commands.options import ModelOption, console
from steerserve.lab.corpus import HubDataset, Source, Split, TextFile, TextStream
from steerserve.lab.harvest import HarvestConfig, Report, harvest
from steerserve.lab.manifest import DTYPES
from steerserve.models.loading import load_model
from steerserve.models.pull import resolve_model
from steerserve.types import Site


def harvest_command(
    site: Annotated[list[str], typer.Option(help="Site to keep, e.g. blocks.20.hook_resid_post; repeatable.")],
    out: Annotated[Path, typer.Option(help="Directory for the activations; a repeated run continues there.")],
    texts: Annotated[
        list[Path] | None, typer.Option(help=".jsonl[.gz], or .txt[.gz] with a text per line; repeatable.")
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="Hugging Face dataset, ORG/NAME[:CONFIG] or a directory; repeatable.")
    ] = None,
    split: Annotated[str, typer.Option(help="Which split of each --dataset.")] = "train",
    text_field: Annotated[str, typer.Option(help="Field of a JSON line or dataset that holds the text.")] = "text",
    model: ModelOption = "smollm2-135m-instruct",
    context_length: Annotated[int, typer.Option(help="Tokens of one forward context.")] = 128,
    max_tokens: Annotated[int, typer.Option(min=0, help="0: all texts.")] = 0,
    dtype: Annotated[
        str, typer.Option(help=f"{', '.join(DTYPES)}: of the rows; the model runs in float32 for the last two.")
    ] = "bfloat16",
) -> None:
    """Run the training part of texts through the model and keep the activations of every SITE.

    After an interruption, the same command continues where it stopped.
    """
    sources: list[Source] = [TextFile(path, text_field) for path in texts or ()]
    sources += [HubDataset(name, split, text_field) for name in dataset or ()]
    if not sources:
        raise InvalidRequestError("--texts", None, "at least one --texts or --dataset")
    sites = tuple(Site.parse(name) for name in site)
    loaded = load_model(resolve_model(model), torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    corpus = TextStream(sources, Split.TRAIN)
    config = HarvestConfig(sites, context_length, max_tokens=max_tokens, dtype=dtype)
    try:
        with _bar(corpus, max_tokens) as report:
            manifest = harvest(loaded, corpus, out, config, report)
    except KeyboardInterrupt:
        console.print(f"Stopped. The same command continues behind the last complete shard in {out}.")
        raise
    console.print(f"{manifest.num_tokens:,} tokens, {manifest.num_rows:,} rows kept in {len(manifest.shards)} shards")


class _TokensPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} tokens/s")


@contextmanager
def _bar(corpus: TextStream, max_tokens: int) -> Iterator[Report]:
    """A progress bar; without ``max_tokens`` its end follows from the tokens in the share of the files read so far."""
    count = TextColumn("{task.completed:,.0f} tokens")
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), count)
    with Progress(*columns, _TokensPerSecond(), TimeRemainingColumn(elapsed_when_finished=True)) as progress:
        task: dict[str, TaskID] = {}

        def report(activity: str, num_tokens: int, num_tokens_read: int) -> None:
            if activity not in task:
                task[activity] = progress.add_task(activity, total=None, completed=num_tokens)
            share = corpus.share_done if activity == "harvesting" else None
            ends = [max_tokens] if max_tokens else []
            ends += [round(num_tokens_read / share)] if share else []
            progress.update(task[activity], completed=num_tokens, total=min(ends, default=None))

        yield report
