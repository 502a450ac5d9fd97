"""``steerserve concept build``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from steerserve.errors import InvalidRequestError
from steerserve.lab.commands.options import ModelDtype, ModelDtypeOption, ModelOption, SortByOption, console, sae_for
from steerserve.models.loading import LoadedModel, load_model
from steerserve.models.pull import resolve_model
from steerserve.steering.packs import check_site
from steerserve.types import Site


class Action(StrEnum):
    """What the policy does about the concept."""

    SUPPRESS = "suppress"
    AMPLIFY = "amplify"


class Method(StrEnum):
    """What the policy edits."""

    FEATURES = "features"
    DIFF_MEANS = "diff-means"


def build_command(
    name: Annotated[str, typer.Argument(help="Name of the concept and of the pack.")],
    positive: Annotated[list[Path], typer.Option(help="Texts that show the concept; repeatable.")],
    negative: Annotated[list[Path], typer.Option(help="Texts that do not; may be the same file; repeatable.")],
    out: Annotated[Path, typer.Option(help="Directory for the pack.")],
    sae: Annotated[list[Path] | None, typer.Option(help="SAE directory, one a site; repeatable.")] = None,
    candidates: Annotated[
        list[Path] | None,
        typer.Option(help="Features of an --sae to choose from, as `analyse features` lists them; repeatable."),
    ] = None,
    site: Annotated[list[str] | None, typer.Option(help="For diff-means: where directions are; repeatable.")] = None,
    detector_site: Annotated[
        list[str] | None,
        typer.Option(help="Where the detector's probe may read, if not where the policy edits; repeatable."),
    ] = None,
    positive_label: Annotated[list[str] | None, typer.Option(help="Only texts so labelled count; repeatable.")] = None,
    negative_label: Annotated[list[str] | None, typer.Option(help="The same for --negative.")] = None,
    sort_by: SortByOption = "",
    words: Annotated[
        str, typer.Option(help="The concept's words: 'learned', 'profanity' (built in), or a JSON word list.")
    ] = "learned",
    judge: Annotated[
        str, typer.Option(help="Judge of validation, as for `concept eval`; empty: the concept's words.")
    ] = "",
    action: Annotated[Action, typer.Option(help="Write the concept less, or more.")] = Action.SUPPRESS,
    method: Annotated[Method, typer.Option(help="SAE features, or differences of means.")] = Method.FEATURES,
    chat: Annotated[bool, typer.Option(help="Texts are user's turns, put into the chat template.")] = False,
    budget_kl: Annotated[
        float | None, typer.Option(min=0.0, help="KL on negative texts, nats a token. [0.1 to suppress, else 0.5]")
    ] = None,
    features: Annotated[int, typer.Option(min=1, help="Features to edit, over all sites.")] = 128,
    directions: Annotated[int, typer.Option(min=0, help="Capped directions fitted beside them; none to amplify.")] = 8,
    fit_steps: Annotated[int, typer.Option(min=1, help="Steps of the fit.")] = 110,
    prompts: Annotated[int, typer.Option(min=1, help="Validation prompts.")] = 100,
    seeds: Annotated[int, typer.Option(min=1, help="Continuations of each.")] = 5,
    model: ModelOption = "smollm2-135m-instruct",
    dtype: ModelDtypeOption = ModelDtype.BFLOAT16,
) -> None:
    """Build a concept pack: rows chosen by effect, operands fitted, a detector calibrated. Next: `concept eval`."""
    from steerserve.lab.concept_build.build import BuildConfig, build_from_direction, build_from_features
    from steerserve.lab.concept_build.concept import Concept
    from steerserve.lab.concept_build.fitting import FitConfig
    from steerserve.lab.concept_build.selection import SelectionConfig
    from steerserve.lab.concept_build.shortlists import read_shortlists
    from steerserve.lab.concept_build.strength import Budget
    from steerserve.lab.concept_eval.judges import judge as judge_named
    from steerserve.lab.concept_eval.texts import Labels
    from steerserve.lab.concept_eval.trial import Direction
    from steerserve.lab.lexicon import PROFANITY

    if method is Method.FEATURES and (not sae or site):
        raise InvalidRequestError("method", str(method), "--sae, one or several, and no --site")
    if method is Method.DIFF_MEANS and candidates:
        raise InvalidRequestError("candidates", str(candidates[0]), "--method features")
    if method is Method.DIFF_MEANS and (not site or sae):
        raise InvalidRequestError("method", str(method), "--site, one or several, and no --sae")
    direction = Direction(action.value)
    concept = Concept(
        name=name,
        direction=direction,
        positive=positive,
        negative=negative,
        budget=Budget.of(direction, budget_kl),
        labels=Labels(
            frozenset(positive_label or []), frozenset(negative_label or []), judge_named(sort_by) if sort_by else None
        ),
        words=None if words == "learned" else PROFANITY if words == "profanity" else Path(words),
        judge=judge_named(judge) if judge else None,
        chat=chat,
    )
    loaded = load_model(resolve_model(model), dtype.torch)
    saes = [sae_for(loaded, path) for path in sae or []]
    config = BuildConfig(
        SelectionConfig(num_features=features, shortlists=read_shortlists(candidates or [], saes)),
        FitConfig(steps=fit_steps),
        directions=directions,
        detector_sites=_sites(detector_site, "detector_site", loaded),
        validation_prompts=prompts,
        validation_seeds=seeds,
    )
    if method is Method.FEATURES:
        build_from_features(loaded, saes, concept, config, out, console)
    else:
        build_from_direction(loaded, _sites(site, "site", loaded), concept, config, out, console)


def _sites(names: list[str] | None, field: str, model: LoadedModel) -> tuple[Site, ...]:
    sites = tuple(Site.parse(name, f"{field}[{index}]") for index, name in enumerate(names or []))
    for index, site in enumerate(sites):
        check_site(site, f"{field}[{index}]", model)
    return sites
