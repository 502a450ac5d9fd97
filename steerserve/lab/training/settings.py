"""Settings of a training run: frozen, checked once, and only those that its objective reads."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from steerserve.errors import InvalidRequestError


class TrainConfig(BaseModel):
    """What every objective has. Make one with ``train_config``.

    Objectives are trained on x · √d / mean |x|, so that settings carry over between sites. *Training units* are of
    that scale; it is folded into the weights of the SAE that comes out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    architecture: str
    """Name of the objective."""

    d_sae: int = Field(default=4608, ge=1)
    """Number of features."""

    steps: int = Field(default=6000, ge=1)
    """Optimiser steps of ``batch_size`` rows each; the harvest is repeated as often as needed."""

    batch_size: int = Field(default=2048, ge=2)
    """Rows of a step."""

    learning_rate: float = Field(default=6e-4, gt=0)
    """Of Adam, between warm-up and decay."""

    warmup_steps: int = Field(default=200, ge=1)
    """Steps in which the learning rate rises from 0."""

    decay_fraction: float = Field(default=0.25, gt=0, le=1)
    """Share of the steps, the last ones, in which the learning rate falls to 0."""

    dead_after_rows: int = Field(default=400_000, ge=0)
    """A feature that has not fired for more rows than that is dead."""

    skip: bool = False
    """Whether a transcoder has a linear connection from its input to its output beside its features."""

    seed: int = Field(default=0, ge=0)
    """Of the first weights, and of the order of the rows."""


class SparsityConfig(TrainConfig):
    """Of objectives that are made sparse by a penalty."""

    sparsity_warmup_steps: int = Field(default=1000, ge=1)
    """Steps in which the penalty rises from 0: at full strength it would kill features before they mean anything."""


class ReLUConfig(SparsityConfig):
    """ReLU with an L1 penalty."""

    architecture: Literal["relu", "tied"] = "relu"

    l1: float = Field(default=2.0, ge=0)
    """Weight of Σ f against |x − x̂|², in training units, as in SAELens."""


class GatedConfig(SparsityConfig):
    """Gated SAE."""

    architecture: Literal["gated"] = "gated"

    l1: float = Field(default=2.0, ge=0)
    """Weight of Σ relu(gate) against |x − x̂|², in training units, as in SAELens."""


class JumpReLUConfig(SparsityConfig):
    """JumpReLU with a penalty on L0."""

    architecture: Literal["jumprelu"] = "jumprelu"

    target_l0: float = Field(default=48.0, gt=0)
    """Mean number of active features per token that the penalty pulls to."""

    sparsity_coefficient: float = Field(default=1.0, ge=0)
    """Weight of (L0 / target − 1)² against the fraction of variance unexplained."""

    bandwidth: float = Field(default=1.0, gt=0)
    """Width of the window about a threshold in which activations move it, in training units of activation."""


class TopKConfig(TrainConfig):
    """Objectives that keep a number of activations, whose dead features have a loss of their own."""

    architecture: Literal["topk", "batchtopk", "matryoshka"] = "topk"

    k: int = Field(default=48, ge=1)
    """Active features per token: of each for TopK, on average for the others."""

    aux_coefficient: float = Field(default=1 / 32, ge=0)
    """Weight of the dead features' loss against the fraction of variance unexplained."""

    @field_validator("k")
    @classmethod
    def _no_more_than_there_are(cls, value: int, info: ValidationInfo) -> int:
        if value > info.data.get("d_sae", value):
            raise ValueError(f"at most d_sae, {info.data['d_sae']}")
        return value


class BatchTopKConfig(TopKConfig):
    """BatchTopK."""

    architecture: Literal["batchtopk", "matryoshka"] = "batchtopk"

    threshold_decay: float = Field(default=0.999, ge=0, lt=1)
    """Of the running average of each batch's smallest survivor, which becomes the threshold; less in a short run."""


class MatryoshkaConfig(BatchTopKConfig):
    """BatchTopK over nested prefixes of the features."""

    architecture: Literal["matryoshka"] = "matryoshka"

    prefix_shares: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    """Prefixes that must each reconstruct by themselves, as rising shares of all features; the last is 1."""

    @field_validator("prefix_shares")
    @classmethod
    def _nested(cls, value: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        sizes = [round(share * info.data.get("d_sae", 0)) for share in (0.0, *value)]
        if not value or value[-1] != 1 or any(left >= right for left, right in pairwise(sizes)):
            raise ValueError(
                "rising shares of d_sae, each of a feature at least more than the one before, that end at 1"
            )
        return value


CONFIGS: dict[str, type[TrainConfig]] = {
    "batchtopk": BatchTopKConfig,
    "topk": TopKConfig,
    "matryoshka": MatryoshkaConfig,
    "jumprelu": JumpReLUConfig,
    "gated": GatedConfig,
    "relu": ReLUConfig,
    "tied": ReLUConfig,
}
"""By architecture, the default first."""


def train_config(architecture: str, settings: Mapping[str, object]) -> TrainConfig:
    """The configuration of ``architecture`` with ``settings``, whose values may be text.

    Raises:
        InvalidRequestError: no such architecture, a setting it does not have, or a value it cannot have.
    """
    if architecture not in CONFIGS:
        raise InvalidRequestError("architecture", architecture, f"one of {', '.join(CONFIGS)}")
    config = CONFIGS[architecture]
    try:
        return config.model_validate({"architecture": architecture, **settings})
    except ValidationError as error:
        problem = error.errors()[0]
        field = str(problem["loc"][0])
        if problem["type"] == "extra_forbidden":
            known = ", ".join(name for name in config.model_fields if name != "architecture")
            raise InvalidRequestError(field, problem["input"], f"none: {architecture} takes {known}") from None
        expected = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        raise InvalidRequestError(field, problem["input"], expected) from None
