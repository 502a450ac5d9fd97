"""From an SAE and labelled texts to a concept pack with a measured card.

The three splits have one job each: features are chosen and clamps fitted on *train*, the strength of
the clamps on *validation*, and every figure of the card comes from *test*. Lemmas of the lexicon's
``held_out`` part are kept out of the first two, so the card shows how far the guard generalises.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import Progress
from sklearn.metrics import roc_auc_score

from steerserve.errors import AssetError
from steerserve.lab.activations import activations_of, ordinary_rows
from steerserve.lab.corpus import Split, read_documents
from steerserve.lab.effects import Completions, FitConfig, attribute, fit_clamps, tokenize
from steerserve.lab.guard_evaluation import (
    MAX_TOKENS,
    Comparison,
    Measured,
    benign_tokens,
    compare,
    continue_prompts,
    harmful_mask,
    measure,
    position_scores,
    seeds_for,
)
from steerserve.lab.lexicon import Lexicon
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE
from steerserve.steering.catalog import Catalog
from steerserve.steering.packs import (
    ConceptPack,
    ModelRef,
    PackCard,
    PackTensors,
    PolicyAction,
    SAERef,
    load_pack,
    save_pack,
)
from steerserve.types import Op

EXCERPT_CHARS = 300
MAX_PROMPT_TOKENS = 128
MAX_SCREENINGS = 4
MAX_PERPLEXITY_RATIO = 1.15
"""What both perplexity ratios must stay below on validation, with the worse end of their interval."""


@dataclass(frozen=True)
class ConceptConfig:
    """How a pack is made.

    Attributes:
        num_features: features by effect on the concept's words.
        attribution_texts: harmful texts used to rank features.
        margins: tried in this order: how far below the fitted values, in multiples of each feature's
            maximum activation, the clamps are set; validation takes the first that keeps perplexity.
        validation_prompts, validation_seeds: continuations on which margins are compared; too few, and
            noise picks the margin.
    """

    num_features: int = 48
    attribution_texts: int = 1500
    fit_steps: int = 100
    margins: tuple[float, ...] = (0.2, 0.15, 0.1, 0.05, 0.0)
    validation_prompts: int = 100
    validation_seeds: int = 5


@dataclass(frozen=True, eq=False)
class Corpus:
    """Texts of one split: ``harmful`` hold a listed word, ``benign`` none."""

    harmful: list[str]
    benign: list[str]

    @classmethod
    def read(cls, harmful: Sequence[Path], benign: Sequence[Path], split: Split, harm: Lexicon) -> Corpus:
        """Texts of ``split``; on train and validation, none with a held-out lemma.

        Benign texts are cut to an excerpt, so that both kinds have the length of a message.

        Raises:
            AssetError: files that cannot be read, or no text of one kind.
        """
        listed, held_out = Lexicon.profanity(), Lexicon.profanity("held_out")
        excluded = held_out if split is not Split.TEST else Lexicon(frozenset())
        labelled = [document.text for document in read_documents(harmful, split)]
        general = [document.text[:EXCERPT_CHARS] for document in read_documents(benign, split)]
        corpus = cls(
            harmful=[text for text in labelled if harm.matches(text) and not excluded.matches(text)],
            benign=[text for text in general + labelled if text.strip() and not listed.matches(text)],
        )
        for kind, texts in vars(corpus).items():
            if not texts:
                raise AssetError(f"the files hold no {kind} text of the {split} split")
        return corpus


@dataclass(frozen=True, eq=False)
class ChosenFeatures:
    """Features by falling effect: ``ids``, ``effect[k]``, ``max_activation[k]`` on harmful texts."""

    ids: list[int]
    effect: torch.Tensor
    max_activation: torch.Tensor


def choose_features(
    model: LoadedModel, sae: SAE, corpus: Corpus, completions: Completions, config: ConceptConfig
) -> ChosenFeatures:
    """The features with the largest mean effect on log P(completing a listed word)."""
    texts = corpus.harmful[: config.attribution_texts]
    effect = attribute(model, sae, texts, completions)
    top = effect.topk(config.num_features)
    largest = torch.zeros(config.num_features)
    for start in range(0, len(texts), 32):
        largest = torch.maximum(largest, _activations(model, sae, texts[start : start + 32], top.indices).amax(0))
    return ChosenFeatures(top.indices.tolist(), top.values, largest.clamp(min=1e-3))


def build_pack(
    model: LoadedModel,
    sae: SAE,
    features: ChosenFeatures,
    value: torch.Tensor,
    benign: Sequence[str],
    card: PackCard,
    directory: Path,
) -> ConceptPack:
    """Write a pack whose score is Σ f / max_activation and whose threshold 1 % of ``benign`` texts exceed."""
    W_enc, b_enc, threshold, max_norm, W_dec = (rows.numpy() for rows in sae.rows(features.ids))
    weight = 1 / features.max_activation
    tensors = PackTensors(
        W_enc=W_enc,
        b_enc=b_enc,
        threshold=threshold,
        max_norm=max_norm,
        W_dec=W_dec,
        value=value.numpy(),
        weight=weight.numpy(),
        max_activation=features.max_activation.numpy(),
        feature_ids=np.array(features.ids, dtype=np.int64),
    )
    draft = save_pack(card, tensors, directory)
    threshold_score = float(np.quantile(text_scores(model, draft, benign), 0.99))
    return save_pack(card.model_copy(update={"score_threshold": threshold_score}), tensors, directory)


def text_scores(model: LoadedModel, pack: ConceptPack, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """Largest concept score over the positions of each text, ``[n]``."""
    scores: list[float] = []
    for start in range(0, len(texts), 32):
        batch = tokenize(model, texts[start : start + 32])
        x = activations_of(model, batch.tokens, (pack.site,))[pack.site]
        scores += position_scores(pack, x).masked_fill(~batch.real, 0.0).amax(1).tolist()
    return np.array(scores, dtype=np.float32)


@torch.inference_mode()
def _activations(model: LoadedModel, sae: SAE, texts: Sequence[str], index: torch.Tensor) -> torch.Tensor:
    batch = tokenize(model, texts)
    x = activations_of(model, batch.tokens, (sae.site,))[sae.site].float()
    return sae.encode(x[ordinary_rows(x) & batch.real])[:, index]


def draw_prompts(model: LoadedModel, texts: Sequence[str], count: int) -> list[str]:
    """Prompts that draw the concept: pairs of harmful texts, a line each, after which the model went on in kind.

    Candidates are continued, unguarded, with seeds used nowhere else. There may be fewer than ``count``.

    Raises:
        AssetError: no candidate draws it.
    """
    pairs = [f"{a}\n{b}\n" for a, b in zip(texts, [*texts[1:], *texts[:1]], strict=True)]
    pairs = [pair for pair in pairs if len(model.tokenizer(pair).input_ids) <= MAX_PROMPT_TOKENS]
    chosen: list[str] = []
    catalog = Catalog.load(model)
    for screening in range(MAX_SCREENINGS):
        for start in range(0, len(pairs), 256):
            part = [pair for pair in pairs[start : start + 256] if pair not in chosen]
            if not part:
                continue
            continuations = continue_prompts(model, catalog, part, [screening], ())
            drawn = harmful_mask(part, continuations)
            chosen += [part[c.prompt] for c, hit in zip(continuations, drawn, strict=True) if hit]
            if len(chosen) >= count:
                return chosen[:count]
    if not chosen:
        raise AssetError("no prompt made of the harmful texts makes the unguarded model write a listed word")
    return chosen


def make_concept(
    model: LoadedModel,
    sae: SAE,
    name: str,
    harmful: Sequence[Path],
    benign: Sequence[Path],
    config: ConceptConfig,
    directory: Path,
    console: Console,
) -> ConceptPack:
    """Choose features, fit and calibrate clamps, write the pack to ``directory``; its card has no evaluation yet."""
    for parameter in model.model.parameters():
        parameter.requires_grad_(False)
    selection = Lexicon.profanity("selection")
    train = Corpus.read(harmful, benign, Split.TRAIN, selection)
    completions = Completions.learn(model, train.harmful + train.benign, selection)
    features = choose_features(model, sae, train, completions, config)
    console.print(f"features, largest effect first: {features.ids}")
    fitted = _fit(model, sae, features, train, completions, FitConfig(steps=config.fit_steps))
    card = _draft_card(model, sae, name)
    validation = Corpus.read(harmful, benign, Split.VALIDATION, selection)
    trial = Trial.draw(model, validation, config.validation_prompts, config.validation_seeds)
    for margin in config.margins:
        value = fitted - margin * features.max_activation
        pack = build_pack(model, sae, features, value, validation.benign, card, directory)
        result = trial.compare(model, pack, directory)
        console.print(f"margin {margin}: {describe(result)}")
        if max(result.continuation_perplexity_ratio.high, result.benign_perplexity_ratio) <= MAX_PERPLEXITY_RATIO:
            break
    else:
        console.print(f"no margin keeps both perplexities below ×{MAX_PERPLEXITY_RATIO}; the last one is kept")
    data = {"margin": margin, "config": asdict(config), "harmful": len(train.harmful), "benign": len(train.benign)}
    return save_pack(pack.card.model_copy(update={"data": data}), pack.tensors, directory)


def measure_concept(
    model: LoadedModel,
    directory: Path,
    harmful: Sequence[Path],
    benign: Sequence[Path],
    num_prompts: int,
    num_seeds: int,
) -> ConceptPack:
    """Measure a pack on the test split, held-out lemmas included, and put the figures into its card.

    Raises:
        AssetError: no pack, or one whose policy is not a plain clamp.
        IncompatibleError: a pack made on another model.
    """
    pack = load_pack(directory)
    pack.check_model(model)
    if pack.card.policy != PolicyAction(op=Op.CLAMP):
        raise AssetError(f"{directory}: only packs whose policy is a clamp of all tokens can be measured")
    corpus = Corpus.read(harmful, benign, Split.TEST, Lexicon.profanity())
    trial = Trial.draw(model, corpus, num_prompts, num_seeds)
    evaluation = {
        "protocol": {"split": str(Split.TEST), **trial.protocol()},
        "steering": asdict(trial.compare(model, pack, directory)),
        "detection": _detection(model, pack, corpus),
    }
    return save_pack(pack.card.model_copy(update={"evaluation": evaluation}), pack.tensors, directory)


@dataclass(frozen=True, eq=False)
class Trial:
    """Prompts and seeds of one split, with what the unguarded model makes of them."""

    prompts: list[str]
    seeds: list[int]
    benign: torch.Tensor
    unguarded: Measured

    @classmethod
    def draw(cls, model: LoadedModel, corpus: Corpus, num_prompts: int, num_seeds: int) -> Trial:
        """Draw prompts from ``corpus``, then seeds, then run the unguarded arm."""
        prompts = draw_prompts(model, corpus.harmful, num_prompts)
        seeds = seeds_for(prompts, num_seeds)
        benign = benign_tokens(model, corpus.benign, 2 * num_prompts)
        continuations = continue_prompts(model, Catalog.load(model), prompts, seeds, ())
        return cls(prompts, seeds, benign, measure(model, prompts, continuations, benign, None))

    def compare(self, model: LoadedModel, pack: ConceptPack, directory: Path) -> Comparison:
        """The guarded arm, served from the pack on disk, against the unguarded one."""
        catalog = Catalog.load(model, packs=[str(directory)])
        continuations = continue_prompts(model, catalog, self.prompts, self.seeds, (pack.name,))
        return compare(self.unguarded, measure(model, self.prompts, continuations, self.benign, pack))

    def protocol(self) -> dict[str, Any]:
        """How the figures were taken."""
        return {
            "prompts": len(self.prompts),
            "prompts_sha256": hashlib.sha256("\0".join(self.prompts).encode()).hexdigest(),
            "seeds": self.seeds,
            "max_tokens": MAX_TOKENS,
            "temperature": 1.0,
            "benign_tokens": self.benign.numel(),
            "interval": "95 %, paired bootstrap over prompts",
        }


def describe(result: Comparison) -> str:
    """One line of the figures that matter."""
    return (
        f"harm {result.unguarded.harm_rate:.1%} → {result.guarded.harm_rate:.1%} "
        f"(−{result.reduction.value:.1%}, {result.reduction.low:.1%} to {result.reduction.high:.1%}), "
        f"classifier {result.unguarded.classifier_rate:.1%} → {result.guarded.classifier_rate:.1%}, "
        f"perplexity of continuations ×{result.continuation_perplexity_ratio.value:.3f}, "
        f"of benign text ×{result.benign_perplexity_ratio:.3f}"
    )


def _detection(model: LoadedModel, pack: ConceptPack, corpus: Corpus) -> dict[str, Any]:
    """How well the pack's score tells harmful texts from benign ones, alone and at the pack's threshold."""
    harmful, benign = text_scores(model, pack, corpus.harmful), text_scores(model, pack, corpus.benign)
    labels = np.arange(len(harmful) + len(benign)) < len(harmful)
    return {
        "harmful_texts": len(harmful),
        "benign_texts": len(benign),
        "auroc": float(roc_auc_score(labels, np.concatenate([harmful, benign]))),
        "true_positive_rate": float((harmful > pack.card.score_threshold).mean()),
        "false_positive_rate": float((benign > pack.card.score_threshold).mean()),
    }


def _fit(
    model: LoadedModel,
    sae: SAE,
    features: ChosenFeatures,
    train: Corpus,
    completions: Completions,
    config: FitConfig,
) -> torch.Tensor:
    with Progress() as progress:
        task = progress.add_task("fit", total=config.steps)

        def report(step: int, completing: float, kl: float) -> None:
            progress.update(task, completed=step, description=f"fit  P(word) {completing:.3f}  KL {kl:.4f}")

        return fit_clamps(
            model,
            sae,
            features.ids,
            features.max_activation,
            train.harmful,
            train.benign,
            completions,
            config,
            report,
        )


def _draft_card(model: LoadedModel, sae: SAE, name: str) -> PackCard:
    return PackCard(
        name=name,
        version="1",
        description=f"SAE features that make the model write {name}, clamped where they are active.",
        model=ModelRef(name=model.name, fingerprint=model.fingerprint),
        sae=SAERef(name=sae.name, sha256=sae.sha256),
        site=str(sae.site),
        policy=PolicyAction(op=Op.CLAMP),
        score_threshold=0.0,
    )
