"""``steerserve concept eval``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from steerserve.lab.commands.options import ModelDtype, ModelDtypeOption, ModelOption, SortByOption, console, sae_for
from steerserve.steering.packs import SAERef

BUILT_IN_SAES = Path(__file__).parents[2] / "assets" / "saes"
HARD_NEGATIVES = Path(__file__).parents[2] / "assets" / "hard_negatives.jsonl"
MARKS = {True: "[green]✓[/green]", False: "[red]✗[/red]", None: " "}


def eval_pack_command(
    pack: Annotated[Path, typer.Argument(help="Pack directory; card.json and card.html are rewritten.")],
    positive: Annotated[list[Path], typer.Option(help="Texts that show the concept; repeatable.")],
    negative: Annotated[list[Path], typer.Option(help="Texts that do not; repeatable.")],
    positive_label: Annotated[list[str], typer.Option(help="Only texts so labelled count; repeatable.")] = [],  # noqa: B006
    negative_label: Annotated[list[str], typer.Option(help="The same for --negative.")] = [],  # noqa: B006
    sort_by: SortByOption = "",
    model: ModelOption = "smollm2-135m-instruct",
    dtype: ModelDtypeOption = ModelDtype.BFLOAT16,
    amplify: Annotated[bool, typer.Option("--amplify", help="The pack is to write the concept more often.")] = False,
    judge: Annotated[str, typer.Option(help="Primary judge; see docs/lab.md for all.")] = "profanity",
    second_judge: Annotated[str, typer.Option(help="A classifier beside it; '' for none.")] = "alt-profanity-check",
    chat: Annotated[bool, typer.Option("--chat", help="Prompts are user turns, not pairs of texts.")] = False,
    instruction: Annotated[str, typer.Option(help="What the prompt instruction says; made from the name if ''.")] = "",
    hard_negatives: Annotated[Path | None, typer.Option(help="Benign sentences on which the pack may fire.")] = None,
    sae: Annotated[list[Path], typer.Option(help="SAEs of the pack, unless built in; repeatable.")] = [],  # noqa: B006
    prompts: Annotated[int, typer.Option(min=1, help="Chosen before the seeds are drawn.")] = 200,
    seeds: Annotated[int, typer.Option(min=1, help="Continuations per prompt.")] = 5,
    ladder: Annotated[
        list[float], typer.Option(min=0.01, help="Budgets, in multiples of the pack's own benign KL; repeatable.")
    ] = [0.5, 1.0, 2.0],  # noqa: B006
    target: Annotated[float, typer.Option(min=0, max=1, help="Reduction, or with --amplify rate, to reach.")] = 0.9,
    quick: Annotated[
        bool, typer.Option("--quick", help="A trial run on small samples; the pack's files stay as they are.")
    ] = False,
    work: Annotated[Path | None, typer.Option(help="Finished arms are kept here; default: PACK.arms.")] = None,
    write_outputs: Annotated[
        Path | None, typer.Option(help="Write 100 shuffled outputs here, to be read blind.")
    ] = None,
) -> None:
    """Measure a pack beside all simpler methods at equal cost, and write the card: figures, intervals, verdicts."""
    from steerserve.lab.concept_eval.card import Target
    from steerserve.lab.concept_eval.continuations import Arms
    from steerserve.lab.concept_eval.judges import judge as judge_of
    from steerserve.lab.concept_eval.page import render_card
    from steerserve.lab.concept_eval.reading import write_blind
    from steerserve.lab.concept_eval.run import QUICK, Evaluation, EvaluationConfig, Texts
    from steerserve.lab.concept_eval.texts import Labels
    from steerserve.lab.concept_eval.trial import Direction, Setting
    from steerserve.models.loading import load_model
    from steerserve.models.pull import resolve_model
    from steerserve.steering.pack_files import load_pack, save_pack

    loaded = load_model(resolve_model(model), dtype.torch)
    concept = load_pack(pack)
    concept.check_model(loaded)
    direction = Direction.AMPLIFY if amplify else Direction.SUPPRESS
    if hard_negatives is None and judge == "profanity":
        hard_negatives = HARD_NEGATIVES
    evaluation = Evaluation(
        model=loaded,
        pack=concept,
        saes={sae.site: sae for sae in (sae_for(loaded, path) for path in _saes(concept.card.saes.values(), sae))},
        texts=Texts(
            tuple(positive),
            tuple(negative),
            Labels(frozenset(positive_label), frozenset(negative_label), judge_of(sort_by) if sort_by else None),
            hard_negatives,
        ),
        setting=Setting(
            direction,
            judge_of(judge),
            judge_of(second_judge) if second_judge else None,
            chat,
            Arms(work or pack.with_name(f"{pack.name}.arms")),
        ),
        instruction=instruction or _instruction(concept.name, amplify),
        target=Target(target),
        config=QUICK if quick else EvaluationConfig(num_prompts=prompts, num_seeds=seeds, ladder=tuple(sorted(ladder))),
        console=console,
    )
    card, outcomes = evaluation.run()
    if not quick:
        figures = {"command": shlex.join(["steerserve", *sys.argv[1:]]), **card.to_dict()}
        measured = save_pack(concept.card.model_copy(update={"evaluation": figures}), concept.tensors, pack)
        (pack / "card.html").write_text(render_card(measured), encoding="utf-8")
    for verdict in card.verdicts:
        console.print(f"{MARKS[verdict.holds]} {verdict.text}", highlight=False)
    if quick:
        console.print(f"figures of a trial run mean nothing: nothing was written to {pack}", highlight=False)
    if write_outputs is not None:
        write_blind(write_outputs, outcomes["untreated"], outcomes["policy"])


def _saes(named: Iterable[SAERef], given: Sequence[Path]) -> list[Path]:
    """The directories given, or the built-in ones of these names, as far as there are any."""
    return list(given) or [BUILT_IN_SAES / ref.name for ref in named if (BUILT_IN_SAES / ref.name).is_dir()]


def _instruction(name: str, amplify: bool) -> str:
    return f"Write about {name} as much as you can." if amplify else f"Write politely, without any {name}."
