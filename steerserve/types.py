"""Plain data shared by every layer: sites, steering specs, sampling, receipts.

Nothing here knows a model, a kernel or a wire format. Everything is immutable. Range checks that
need no loaded model live in ``__post_init__`` and raise ``InvalidRequestError``; names are resolved
against what is loaded by ``steerserve.steering.plan``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from steerserve.errors import InvalidRequestError

FloatArray = npt.NDArray[np.float32]


def _require(valid: bool, field: str, value: object, expected: str) -> None:
    if not valid:
        raise InvalidRequestError(field, value, expected)


class Stream(StrEnum):
    """Which activation of a layer. TransformerLens meaning: ``*_out`` is what is added to the residual.

    Members stand in the order in which a layer computes them.
    """

    RESID_PRE = "resid_pre"
    ATTN_OUT = "attn_out"
    MLP_OUT = "mlp_out"
    RESID_POST = "resid_post"


_SITE_PATTERNS = (
    re.compile(r"blocks\.(?P<layer>\d+)\.hook_(?P<stream>\w+)"),
    re.compile(r"(?:model\.layers|transformer\.h|gpt_neox\.layers)\.(?P<layer>\d+)"),
)


@dataclass(frozen=True)
class Site:
    """A place in the model where an activation is read or edited.

    ``str(site)`` is the TransformerLens name, the one canonical form.
    """

    layer: int
    stream: Stream

    @classmethod
    def parse(cls, name: str, field: str = "site") -> Site:
        """Read a TransformerLens hook name or a Hugging Face layer path (meaning its output).

        Raises:
            InvalidRequestError: the name has neither form.
        """
        for pattern in _SITE_PATTERNS:
            match = pattern.fullmatch(name)
            if match is None:
                continue
            stream = match.groupdict().get("stream", Stream.RESID_POST)
            if stream in set(Stream):
                return cls(int(match["layer"]), Stream(stream))
        streams = ", ".join(Stream)
        raise InvalidRequestError(
            field, name, f"'blocks.<layer>.hook_<stream>' with stream one of {streams}, or 'model.layers.<layer>'"
        )

    def __lt__(self, other: Site) -> bool:
        """The forward pass reaches this site earlier."""
        return self._depth < other._depth

    @property
    def _depth(self) -> tuple[int, int]:
        return self.layer, list(Stream).index(self.stream)

    def __str__(self) -> str:
        return f"blocks.{self.layer}.hook_{self.stream}"


class Op(StrEnum):
    """What happens to a feature's activation f (or a direction's projection p)."""

    CLAMP = "clamp"
    """f' = v where f > 0 (everywhere with ``always``)."""
    CLIP = "clip"
    """f' = min(f, v); on a direction: cap the projection at v."""
    BLOCK = "block"
    """f' = 0; on a direction: project it out."""
    SCALE = "scale"
    """f' = v·f."""
    ADD = "add"
    """f' = f + v, everywhere; on a direction: x' = x + v·u, u the unit vector."""
    MONITOR = "monitor"
    """f' = f: read, never edit."""


class Unit(StrEnum):
    """Unit of an intervention's value."""

    RAW = "raw"
    """The SAE's own activation units; for a direction, units of the residual stream."""
    MAX_ACTIVATION = "max_activation"
    """Multiples of the feature's recorded maximum activation (written ``2.0x``)."""


class Phase(StrEnum):
    """Which positions an intervention covers.

    The first generated token is sampled at the last *prompt* position; ``GENERATED`` therefore
    leaves it unsteered. Guards use ``ALL``.
    """

    ALL = "all"
    PROMPT = "prompt"
    GENERATED = "generated"


@dataclass(frozen=True)
class FeatureTarget:
    """One dimension of a loaded SAE."""

    sae: str
    feature: int


@dataclass(frozen=True)
class ConceptTarget:
    """All features of a loaded concept pack."""

    concept: str


@dataclass(frozen=True, eq=False)
class DirectionTarget:
    """The caller's own vector ``[d]`` at a site; its length is ignored, only its direction counts."""

    site: Site
    vector: FloatArray


Target = FeatureTarget | ConceptTarget | DirectionTarget


@dataclass(frozen=True)
class Intervention:
    """One edit (or reading) a request asks for.

    ``value`` is required by clamp, clip, scale and add, and refused by block and monitor.
    ``always`` is for clamp alone: set f' = v also where the feature is not active.
    """

    target: Target
    op: Op
    value: float | None = None
    unit: Unit = Unit.RAW
    always: bool = False
    phase: Phase = Phase.ALL


@dataclass(frozen=True)
class SteeringSpec:
    """What one request asks for; all interventions at one site see the same unedited activation."""

    interventions: tuple[Intervention, ...] = ()


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. Temperature 0 is greedy."""

    max_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    seed: int | None = None
    """None: drawn by the engine and reported nowhere; set it to reproduce a response."""
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 1, "sampling.max_tokens", self.max_tokens, "an integer >= 1")
        _require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            "sampling.temperature",
            self.temperature,
            "a finite number >= 0 (0 is greedy)",
        )
        _require(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "a number in (0, 1]")
        _require(self.top_k >= 0, "sampling.top_k", self.top_k, "an integer >= 0 (0: no limit)")
        _require(self.seed is None or self.seed >= 0, "sampling.seed", self.seed, "an integer >= 0, or none")


@dataclass(frozen=True)
class Message:
    """One chat turn, rendered through the model's own chat template."""

    role: str
    content: str


Prompt = str | tuple[int, ...] | tuple[Message, ...]


@dataclass(frozen=True)
class GenerateRequest:
    """A request as the engine takes it.

    Attributes:
        prompt: text, token ids, or chat messages.
        steering: the request's own interventions, applied first.
        policies: names of server-side policies, applied last, on the edited activation.
        return_activations: report each intervention's score at every position.
    """

    request_id: str
    prompt: Prompt
    sampling: SamplingParams = SamplingParams()
    steering: SteeringSpec = SteeringSpec()
    policies: tuple[str, ...] = ()
    return_activations: bool = False


class FinishReason(StrEnum):
    """Why a response ended."""

    STOP = "stop"
    """The model produced its end-of-sequence token."""
    LENGTH = "length"
    """``max_tokens`` were produced."""
    ABORT = "abort"
    """The client went away or asked to stop."""


@dataclass(frozen=True)
class InterventionReceipt:
    """What one intervention did, counted by the kernel, not by the request.

    Attributes:
        source: ``request`` or ``policy:<name>@<version>``.
        label: the intervention in words, e.g. ``concept profanity: clamp``.
        tokens_in_scope: positions the intervention had to cover.
        tokens_covered: positions at which the kernel reported having evaluated it.
        tokens_edited: positions at which it asked for a change (f' ≠ f).
        mean_relative_edit: mean of |x' − x| / |x| over the edited positions, before rounding to the model's
            dtype; 0 if none.
        max_activation: largest score read in scope.
    """

    source: str
    label: str
    site: Site
    tokens_in_scope: int
    tokens_covered: int
    tokens_edited: int
    mean_relative_edit: float
    max_activation: float


@dataclass(frozen=True)
class Receipt:
    """Proof of what ran for one response.

    Attributes:
        plan_hash: SHA-256 of the compiled plan; empty for an unsteered request.
        model_fingerprint: hash of the served weights.
        packs: ``name@version`` → SHA-256 of the pack file, for every pack the plan uses.
        steered: true only if every intervention had positions in its scope and was covered at each.
    """

    plan_hash: str
    model_fingerprint: str
    policies: tuple[str, ...]
    packs: dict[str, str]
    interventions: tuple[InterventionReceipt, ...]
    steered: bool


@dataclass(frozen=True)
class PositionScores:
    """Scores of every intervention of the plan at one position (prompt positions included).

    ``scores[i]`` belongs to ``receipt.interventions[i]``; NaN where it was out of scope.
    """

    position: int
    scores: FloatArray


@dataclass(frozen=True)
class StepOutput:
    """What one engine step produced for one request; the last one carries the receipt."""

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    scores: tuple[PositionScores, ...] = ()
    finish_reason: FinishReason | None = None
    num_prompt_tokens: int = 0
    receipt: Receipt | None = None
    error: Exception | None = field(default=None, compare=False)
