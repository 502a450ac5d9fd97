"""The built-in SAE and guard on the weights they were made on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steerserve.demo import PROMPTS, read_prompts
from steerserve.lab.activations import activations_of, ordinary_rows
from steerserve.lab.concept_eval.continuations import continue_prompts
from steerserve.lab.concept_eval.judges import judge
from steerserve.lab.concept_eval.outcome import Outcome
from steerserve.lab.concept_eval.prompts import Prompt
from steerserve.lab.concept_eval.treatments import Treatment
from steerserve.lab.tokens import pack_contexts
from steerserve.models.loading import LoadedModel, load_model
from steerserve.steering.catalog import Catalog

SAES = ["smollm2-135m-instruct-l8-4k", "smollm2-135m-instruct-l16-4k", "smollm2-135m-instruct-l24-4k"]
PROSE = """
The ferry left the harbour a little after six, with eleven passengers and a crate of young apple trees on deck.
Nobody had expected fog. By the time they passed the lighthouse its lamp was a pale smear, and the captain sent the
boy forward to listen for the bell. My aunt, who had made the crossing every spring for thirty years, took out her
knitting and said that the sea was only resting. I did not believe her, but I held the wool. In 1854 a physician
drew a map of a few streets in London and put a black bar at every house where somebody had died. The bars stood
thickest around one water pump. He asked the parish to take off its handle, and the parish, without quite believing
him, did so. What he had shown was simple enough to draw on one page: the disease was carried by water, not by air.
It took another thirty years before someone saw the bacterium itself through a microscope. To make the dough, mix
the flour with the salt, add the yeast and the lukewarm water, and work it for ten minutes until it no longer sticks
to the table. Cover it and leave it in a warm place for an hour. Then fold it twice, shape it into a round loaf, and
let it rise again while the oven heats. A loaf is done when it sounds hollow if you knock on its base.
"""


@pytest.fixture(scope="module")
def smollm2(smollm2_dir: Path) -> LoadedModel:
    return load_model(str(smollm2_dir), torch.bfloat16)


@pytest.mark.parametrize("name", SAES)
def test_a_built_in_sae_explains_its_site(smollm2: LoadedModel, name: str) -> None:
    sae = Catalog.load(smollm2, saes=[name]).saes[name]
    assert sae.max_activation is not None
    assert (sae.max_activation > 0).float().mean() > 0.999  # the others are dead
    tokens = torch.stack(list(pack_contexts(smollm2, [PROSE.replace("\n", " ")], 64)))
    assert len(tokens) == 4
    x = activations_of(smollm2, tokens, (sae.site,))[sae.site].float()
    ordinary = ordinary_rows(x)
    norms = x.norm(dim=-1)
    assert norms[:, 0].min() > 4 * norms.median()  # the attention sink, which grows with the layers
    assert ordinary[:, 1:].float().mean() > 0.97
    f = sae.encode(x)
    assert (f[~ordinary & (norms > sae.max_norm)] == 0).all()
    kept, active = x[ordinary], f[ordinary]
    fvu = (kept - sae.decode(active)).square().sum() / (kept - kept.mean(0)).square().sum()
    l0 = (active > 0).sum(1).float().mean()
    assert fvu < 0.3
    assert 30 < l0 < 70


def test_the_built_in_guard_guards(smollm2: LoadedModel) -> None:
    """A small repetition of the card's measurement; the card has the figures."""
    prompts = [Prompt(text, tuple(smollm2.tokenizer(text).input_ids)) for text in read_prompts(PROMPTS)[:24]]
    pack = Catalog.load(smollm2, ["profanity"]).packs["profanity"]
    arms = [
        continue_prompts(smollm2, treatment, prompts, [1, 2], "")
        for treatment in (Treatment.none(smollm2), Treatment.policy(smollm2, pack))
    ]
    profane = [int(Outcome.of(prompts, arm, judge("profanity"), None).shown.sum()) for arm in arms]
    assert profane[0] >= 4, "the prompts draw profanity"
    assert profane[1] <= profane[0] / 2


def test_the_card_holds_what_it_promises(smollm2: LoadedModel) -> None:
    evaluation = Catalog.load(smollm2, ["profanity"]).packs["profanity"].card.evaluation
    arms = {arm["name"]: arm for arm in evaluation["arms"]}
    methods = {arm["method"] for arm in arms.values()}
    assert methods >= {"token list", "prompt instruction", "difference of means", "probe-gated steering", "no-op"}
    steering = arms["policy"]["steering"]
    assert steering["untreated_rate"]["value"] >= 0.2
    assert steering["reduction"]["low"] >= 0.85
    assert steering["continuation_perplexity_ratio"]["high"] <= 1.1
    assert steering["benign_perplexity_ratio"]["high"] <= 1.1
    assert arms["policy"]["on_front"]
    assert all(ability["non_inferior"] for ability in arms["policy"]["ability"].values())
