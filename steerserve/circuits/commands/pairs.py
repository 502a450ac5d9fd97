"""``steerserve analyse pairs``."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer

from steerserve.circuits.commands.options import NumPromptsOption
from steerserve.circuits.prompts import Split, write_pairs
from steerserve.circuits.tasks.profanity import find_pairs
from steerserve.lab.commands.options import ModelOption, TextsOption, console, require_writable
from steerserve.lab.corpus import Split as TextSplit
from steerserve.lab.corpus import read_documents
from steerserve.lab.lexicon import PROFANITY, Lexicon
from steerserve.models.loading import load_model
from steerserve.models.pull import resolve_model


def pairs_command(
    texts: TextsOption,
    out: Annotated[Path, typer.Option(help=".jsonl file for the pairs.")],
    controls: Annotated[
        Path | None, typer.Option(help=".jsonl file for the same swaps where profanity does not follow.")
    ] = None,
    words: Annotated[Path, typer.Option(help="JSON word list. [built in: profanity]", show_default=False)] = PROFANITY,
    num_prompts: NumPromptsOption = 200,
    max_texts: Annotated[int, typer.Option(min=1, help="Texts that are read at most.")] = 5000,
    split: Annotated[Split, typer.Option(help="Texts of the split alone.")] = Split.DISCOVERY,
    model: ModelOption = "smollm2-135m-instruct",
) -> None:
    """Search texts for contexts that profanity follows, and swap the words that bring it about for neutral ones."""
    for option, path in (("--out", out), ("--controls", controls)):
        if path is not None:
            require_writable(option, path)
    forms = Lexicon.load(words).forms
    loaded = load_model(resolve_model(model), torch.float32)
    chosen = (each.text for each in read_documents(texts, TextSplit.TRAIN) if Split.of(each.text) is split)
    found = find_pairs(loaded, islice(chosen, max_texts), forms, num_prompts)
    write_pairs(out, found.pairs)
    num_controls = 0 if found.controls is None else len(found.controls)
    if controls is not None and found.controls is not None:
        write_pairs(controls, found.controls)
    console.print(
        f"{len(found.pairs)} pairs and {num_controls} controls; of {found.num_texts} texts, "
        f"{found.num_contexts} have a context that profanity follows"
    )
