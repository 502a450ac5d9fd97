"""Plain data shared by every layer: sites, steering specs, sampling, receipts.

Nothing here knows a model, a kernel or a wire format. Everything is immutable. Range checks that
need no loaded model live in ``__post_init__`` and raise ``InvalidRequestError``; names are resolved
against what is loaded by ``steerserve.steering.plan``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
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

    Members stand in the order in which a layer computes them. ``attn_z`` is what the output projection of attention
    reads: the heads side by side, ``[heads · d_head]``. ``mlp_in`` is what the MLP reads, behind its norm; it is the
    input of transcoders.
    """

    RESID_PRE = "resid_pre"
    ATTN_Z = "attn_z"
    ATTN_OUT = "attn_out"
    MLP_IN = "mlp_in"
    MLP_OUT = "mlp_out"
    RESID_POST = "resid_post"


_STREAMS_INSIDE = {"attn.hook_z": Stream.ATTN_Z, "mlp.hook_in": Stream.MLP_IN}
"""Those that TransformerLens names by the module they are in."""

_SITE_PATTERNS = (
    re.compile(r"blocks\.(?P<layer>\d+)\.hook_(?P<stream>resid_pre|attn_out|mlp_out|resid_post)"),
    re.compile(r"blocks\.(?P<layer>\d+)\.(?P<stream>attn\.hook_z|mlp\.hook_in)"),
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
            if match is not None:
                stream = match.groupdict().get("stream", Stream.RESID_POST)
                return cls(int(match["layer"]), _STREAMS_INSIDE.get(stream) or Stream(stream))
        streams = ", ".join(stream for stream in Stream if stream not in _STREAMS_INSIDE.values())
        inside = ", ".join(f"'blocks.<layer>.{hook}'" for hook in _STREAMS_INSIDE)
        expected = f"'blocks.<layer>.hook_<stream>' with stream one of {streams}, {inside}"
        raise InvalidRequestError(field, name, f"{expected}, or 'model.layers.<layer>'")

    def __lt__(self, other: Site) -> bool:
        """The forward pass reaches this site earlier."""
        return self._depth < other._depth

    @property
    def _depth(self) -> tuple[int, int]:
        return self.layer, list(Stream).index(self.stream)

    def __str__(self) -> str:
        inside = {stream: hook for hook, stream in _STREAMS_INSIDE.items()}
        return f"blocks.{self.layer}.{inside.get(self.stream, f'hook_{self.stream}')}"


class Op(StrEnum):
    """What happens to a feature's activation f (or a direction's projection p, or every value of a head's output)."""

    CLAMP = "clamp"
    """f' = v where f > 0 (everywhere with ``always``)."""
    CLIP = "clip"
    """f' = min(f, v); on a direction: cap the projection at v."""
    BLOCK = "block"
    """f' = 0; on a direction: project it out."""
    SCALE = "scale"
    """f' = v·f; with ``BLOCK`` the only one for heads."""
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
    leaves it unsteered. Policies use ``ALL``.
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
    """A loaded concept pack: an edit changes the rows that its policy edits, a reading reads its detector."""

    concept: str


_HEAD_PATTERN = re.compile(r"L(?P<layer>\d{1,4})H(?P<head>\d{1,4})")


@dataclass(frozen=True)
class HeadTarget:
    """What one query head of one layer puts out, ``[d_head]``; only scaled or blocked, and never read as a whole.

    ``str(head)`` is the name in pictures of circuits, e.g. ``L12H5``.
    """

    layer: int
    head: int

    @classmethod
    def parse(cls, name: str, field: str = "head") -> HeadTarget:
        """Read ``L<layer>H<head>``.

        Raises:
            InvalidRequestError: the name has another form.
        """
        match = _HEAD_PATTERN.fullmatch(name)
        if match is None:
            raise InvalidRequestError(field, name, "'L<layer>H<head>', both counted from 0, such as L12H5")
        return cls(int(match["layer"]), int(match["head"]))

    @property
    def site(self) -> Site:
        """Where it is edited."""
        return Site(self.layer, Stream.ATTN_Z)

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"


@dataclass(frozen=True, eq=False)
class DirectionTarget:
    """The caller's own vector at a site; its length is ignored, only its direction counts.

    Attributes:
        vector: as wide as the site. With a head, ``[d_head]`` is a direction of that head's output; ``[d_model]`` is
            one of the residual stream, and what the head writes along it is read: z · (W_O u), ahead of any norm
            behind attention. A vector that is both is taken as the former.
        head: at ``attn_z``, the head that the vector is of; None: all of the site.
    """

    site: Site
    vector: FloatArray
    head: int | None = None


Target = FeatureTarget | ConceptTarget | DirectionTarget | HeadTarget


@dataclass(frozen=True)
class Gate:
    """Condition of an edit: it applies at the positions where the target's score exceeds ``threshold``.

    A feature's score is its activation, a concept's the weighted sum of its features', a direction's the
    projection; a head alone has none. It must be read at or before the site that is edited.
    """

    target: Target
    threshold: float


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
    gate: Gate | None = None


class GuardAction(StrEnum):
    """What follows when a guard's score exceeds its threshold."""

    FLAG = "flag"
    """A ``GuardEvent`` says so; the response goes on."""
    REWIND = "rewind"
    """The last tokens are taken back and generated again under stronger edits."""
    REDACT = "redact"
    """The word that the token belongs to is not shown; the response goes on."""
    BLOCK = "block"
    """The response ends; what was not yet released never is."""


REDACTED_TEXT = "█"
"""Stands for each word that a guard redacted."""
REDACTED_TOKEN_ID = 2**32 - 1
"""Stands for each of its tokens; no model has such a token."""

MAX_REWIND_TOKENS = 64
MAX_REWIND_RETRIES = 4


@dataclass(frozen=True)
class Rewind:
    """How a guard takes tokens back.

    Attributes:
        num_tokens: how many, counted back from the one it fired on; never the prompt, nor what was released,
            which soon after another rewind may be more.
        edits: at least one; in force from the position at which the first of the tokens is drawn again to the end
            of the response. Their values are multiplied by the number of the retry; an edit of a feature takes the
            place of the request's own.
        max_retries: how often in one response.
        otherwise: what follows when the guard fires once more, or in the prompt; not ``REWIND``. Nothing of the prompt
            is redacted: there a ``REDACT`` flags.
    """

    num_tokens: int
    edits: tuple[Intervention, ...]
    max_retries: int = 1
    otherwise: GuardAction = GuardAction.BLOCK

    def __post_init__(self) -> None:
        expected = f"an integer from 1 to {MAX_REWIND_TOKENS}"
        _require(1 <= self.num_tokens <= MAX_REWIND_TOKENS, "rewind.num_tokens", self.num_tokens, expected)
        expected = f"an integer from 1 to {MAX_REWIND_RETRIES}"
        _require(1 <= self.max_retries <= MAX_REWIND_RETRIES, "rewind.max_retries", self.max_retries, expected)
        valid = self.otherwise is not GuardAction.REWIND
        _require(valid, "rewind.otherwise", str(self.otherwise), "flag, redact or block")


@dataclass(frozen=True)
class Guard:
    """A detector that reads every position in its phase, and what follows when its score exceeds ``threshold``.

    A token of a guarded response is released only after it has been read itself, the last one included, and
    can no longer be taken back. The score is what a ``Gate`` reads, behind the request's own edits at its site.

    Attributes:
        rewind: required by ``GuardAction.REWIND``, refused by the others.
        fail_open: a score that is not finite is passed over; otherwise it ends the request.
    """

    target: Target
    threshold: float
    action: GuardAction
    rewind: Rewind | None = None
    phase: Phase = Phase.ALL
    fail_open: bool = False

    def __post_init__(self) -> None:
        valid = (self.rewind is not None) is (self.action is GuardAction.REWIND)
        _require(valid, "guard.rewind", self.rewind, f"{'none' if self.rewind else 'a rewind'} with {self.action}")


@dataclass(frozen=True)
class SteeringSpec:
    """What one request asks for; all interventions at one site see the same unedited activation."""

    interventions: tuple[Intervention, ...] = ()
    guards: tuple[Guard, ...] = ()


MAX_STOP_STRINGS = 64
MAX_STOP_STRING_LENGTH = 1024
MAX_LOGPROBS = 20
MAX_RESPONSES = 64
REPETITION_PENALTY_RANGE = (0.01, 100.0)
"""No logit that a model gives leaves float32 when it is multiplied or divided by these."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn and where the response ends; names and meanings are vLLM's. Temperature 0 is greedy.

    The logits are edited (bias, then repetition, frequency and presence penalties), divided by the
    temperature, and cut by ``min_p``, ``top_k`` and ``top_p`` in this order. The edits count for greedy
    requests too.
    """

    max_tokens: int = 64
    """0: nothing is drawn, the prompt is only read; not on the wire."""
    n: int = 1
    """Responses to draw; they share the prompt's computation. Response i uses ``seed`` + i."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    seed: int | None = None
    """None: drawn by the engine and reported nowhere; set it to reproduce a response."""
    ignore_eos: bool = False
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one's probability."""
    repetition_penalty: float = 1.0
    """Tokens of prompt and response: a positive logit is divided by it, a negative one multiplied."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit once for each time it is in the response."""
    presence_penalty: float = 0.0
    """Taken off a token's logit if it is in the response."""
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    """Token id → what to add to its logit."""
    stop: tuple[str, ...] = ()
    """Strings that end the response; of those complete at the same character, the longest counts."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the response, besides the model's own end-of-sequence tokens."""
    include_stop_str_in_output: bool = False
    """The text ends with the stop string, or the text of the token, that ended it."""
    logprobs: int | None = None
    """Report this many of the most likely tokens with each generated one; 0: that one alone; None: nothing."""

    def __post_init__(self) -> None:
        # Not ">= 0": who asks for none has another call for that.
        _require(self.max_tokens >= 0, "sampling.max_tokens", self.max_tokens, "an integer >= 1")
        _require(1 <= self.n <= MAX_RESPONSES, "sampling.n", self.n, f"an integer in [1, {MAX_RESPONSES}]")
        _require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            "sampling.temperature",
            self.temperature,
            "a finite number >= 0 (0 is greedy)",
        )
        _require(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "a number in (0, 1]")
        _require(self.top_k >= 0, "sampling.top_k", self.top_k, "an integer >= 0 (0: no limit)")
        _require(self.seed is None or self.seed >= 0, "sampling.seed", self.seed, "an integer >= 0, or none")
        _require(0 <= self.min_p <= 1, "sampling.min_p", self.min_p, "a number in [0, 1]")
        _require(
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
            "sampling.logprobs",
            self.logprobs,
            f"an integer in [0, {MAX_LOGPROBS}], or none",
        )
        self._check_logit_edits()
        self._check_stops()

    def _check_logit_edits(self) -> None:
        low, high = REPETITION_PENALTY_RANGE
        expected = f"a number in [{low}, {high}] (1 is none)"
        penalty = self.repetition_penalty
        _require(low <= penalty <= high, "sampling.repetition_penalty", penalty, expected)
        for name in ("frequency_penalty", "presence_penalty"):
            penalty = getattr(self, name)
            _require(-2 <= penalty <= 2, f"sampling.{name}", penalty, "a number in [-2, 2]")
        for token_id, bias in self.logit_bias.items():
            _require(-100 <= bias <= 100, f"sampling.logit_bias[{token_id}]", bias, "a number in [-100, 100]")

    def _check_stops(self) -> None:
        expected = f"at most {MAX_STOP_STRINGS} strings"
        _require(len(self.stop) <= MAX_STOP_STRINGS, "sampling.stop", f"{len(self.stop)} strings", expected)
        expected = f"1 to {MAX_STOP_STRING_LENGTH} characters"
        for i, text in enumerate(self.stop):
            _require(1 <= len(text) <= MAX_STOP_STRING_LENGTH, f"sampling.stop[{i}]", text, expected)


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
        return_activations: report the score of each intervention, and of the server's monitors, at every position.
    """

    request_id: str
    prompt: Prompt
    sampling: SamplingParams = SamplingParams()
    steering: SteeringSpec = SteeringSpec()
    policies: tuple[str, ...] = ()
    return_activations: bool = False
    priority: int = 0
    """Lower is served first; equals in order of arrival."""
    timeout_s: float | None = None
    """Ends the request with DEADLINE_EXCEEDED this long after it was added, wherever it stands."""
    cache_salt: str = ""
    """Only requests with equal salts share cached prefixes."""

    @property
    def is_reading(self) -> bool:
        """Nothing is generated: the response ends, empty, once the prompt has been read."""
        return self.sampling.max_tokens == 0


class FinishReason(StrEnum):
    """Why a response ended."""

    STOP = "stop"
    """The model produced its end-of-sequence token, a stop token or a stop string."""
    LENGTH = "length"
    """``max_tokens`` were produced."""
    ABORT = "abort"
    """The client went away or asked to stop."""
    BLOCKED = "blocked"
    """A guard ended it."""


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
        overridden_by: sources of the policies that edit the same concept or features behind this edit of the request:
            what they decide is what the model computes on with.
    """

    source: str
    label: str
    site: Site
    tokens_in_scope: int
    tokens_covered: int
    tokens_edited: int
    mean_relative_edit: float
    max_activation: float
    overridden_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class MonitorReceipt:
    """What one entry of the server's monitor plan read in one response.

    Attributes:
        source: ``monitor:<plan>``.
        label: the entry's name.
        tokens_in_scope: positions that were computed.
        tokens_covered: positions at which the kernel reported having read it.
        max_score, mean_score: over the positions it read; 0 if there are none.
    """

    source: str
    label: str
    site: Site
    tokens_in_scope: int
    tokens_covered: int
    max_score: float
    mean_score: float


@dataclass(frozen=True)
class Receipt:
    """Proof of what ran for one response.

    Attributes:
        plan_hash: SHA-256 of the compiled plan, the server's monitors included; empty where nothing is edited or read.
        model_fingerprint: hash of the served weights.
        packs: ``name@version`` → SHA-256 of the pack file, for every pack the plan uses.
        steered: true only if every intervention had positions in its scope and was covered at each; the edits of
            rewinds count once there was one.
        num_rewinds, num_rewound_tokens: how often guards took tokens back, and how many; the counts of the
            interventions include what ran on these.
        num_cached_tokens: prompt positions taken from the prefix cache; the counts include what ran on them then.
        num_redacted_tokens: tokens that the client got ``REDACTED_TOKEN_ID`` for.
        monitors: what the server's monitor plan read, entry by entry; they change nothing, and nothing depends on them.
    """

    plan_hash: str
    model_fingerprint: str
    policies: tuple[str, ...]
    packs: dict[str, str]
    interventions: tuple[InterventionReceipt, ...]
    steered: bool
    num_rewinds: int = 0
    num_rewound_tokens: int = 0
    num_cached_tokens: int = 0
    num_redacted_tokens: int = 0
    monitors: tuple[MonitorReceipt, ...] = ()


@dataclass(frozen=True)
class GuardEvent:
    """A guard that fired, or could not read.

    Attributes:
        guard: its place in ``SteeringSpec.guards``, or that of the rule in its policy.
        action: what followed; a rewind that was not possible is what the guard says instead.
        position: the token it fired on, counted from the first prompt token.
        score: not finite where the guard could not read and failed open.
        source: whose it is: ``request`` or ``policy:<name>@<version>``.
        label: the guard in words, or the name of the policy's rule.
    """

    guard: int
    action: GuardAction
    position: int
    score: float
    source: str = "request"
    label: str = ""


class VerdictKind(StrEnum):
    """What was decided about a response; members stand in the order of their weight."""

    ALLOW = "allow"
    """A policy ran on every token in its scope, and changed nothing."""
    MODIFIED = "modified"
    """A policy ran on every token in its scope, and edited some."""
    FLAGGED = "flagged"
    """A guard fired; the response went on."""
    REWOUND = "rewound"
    """A guard took tokens back."""
    REDACTED = "redacted"
    """A guard kept words from the client."""
    UNPROVEN = "unproven"
    """The counters do not prove that it ran on every token in its scope, or it had none."""
    BLOCKED = "blocked"
    """A guard ended the response."""


@dataclass(frozen=True)
class Verdict:
    """What one policy, or one guard of the request itself, decided about a response.

    Attributes:
        source: ``request`` or ``policy:<name>@<version>``.
        rule: the rule, guard or edit in words; empty for a policy as a whole.
        positions: the tokens it is about, counted from the first prompt token; empty for edits.
        scores: one for each position, against ``threshold``.
    """

    kind: VerdictKind
    source: str
    rule: str = ""
    positions: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    threshold: float | None = None


def overall_verdict(verdicts: Iterable[Verdict]) -> VerdictKind:
    """The gravest; ``ALLOW`` if there are none: nothing was to judge the response."""
    return max((verdict.kind for verdict in verdicts), key=list(VerdictKind).index, default=VerdictKind.ALLOW)


NO_SCORES: FloatArray = np.zeros(0, dtype=np.float32)
NO_SCORES.flags.writeable = False


@dataclass(frozen=True)
class PositionScores:
    """Scores of every intervention of the plan at one position (prompt positions included).

    ``scores[i]`` belongs to ``receipt.interventions[i]``; NaN where it was out of scope. ``monitors[i]`` belongs to
    ``receipt.monitors[i]``.
    """

    position: int
    scores: FloatArray
    monitors: FloatArray = field(default_factory=lambda: NO_SCORES)


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities where one token was generated.

    They are the (steered) model's own: before bias, penalties, temperature and cuts.

    Attributes:
        logprob: the generated token's.
        rank: 1 plus the number of tokens that were more likely than it; 0 if it was redacted, with nothing else told.
        top: the most likely tokens and their log-probabilities, descending.
    """

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class ScoredToken:
    """The score at one token, the characters ``[start, end)`` of the text."""

    start: int
    end: int
    score: float


@dataclass(frozen=True)
class ConceptScore:
    """How much one text shows one concept.

    Attributes:
        threshold: the card's.
        tokens: every token, in order.
    """

    concept: str
    threshold: float
    tokens: tuple[ScoredToken, ...]

    @property
    def largest(self) -> ScoredToken | None:
        """The token with the largest score; None for a text without tokens."""
        return max(self.tokens, key=lambda token: token.score, default=None)

    @property
    def flagged(self) -> bool:
        """The largest score exceeds the threshold."""
        return self.largest is not None and self.largest.score > self.threshold


@dataclass(frozen=True)
class TextVerdict:
    """What a rule of a policy would do about a text, were it an answer of the model that the policy guards.

    Attributes:
        kind: ``ALLOW`` of a policy none of whose rules acts, else ``FLAGGED``, ``REDACTED`` or ``BLOCKED``.
        policy: ``name@version``.
        rule: what the policy calls it; empty for a policy as a whole.
        threshold: the score above which it acts.
        tokens: those at which it acts.
    """

    kind: VerdictKind
    policy: str
    rule: str = ""
    threshold: float | None = None
    tokens: tuple[ScoredToken, ...] = ()


@dataclass(frozen=True)
class TextScores:
    """What was read in a text that another model wrote.

    Attributes:
        concepts: by name.
        receipts: proof that the kernel read every token; one for each part of the text that was read by itself.
    """

    concepts: Mapping[str, ConceptScore]
    verdicts: tuple[TextVerdict, ...]
    receipts: tuple[Receipt, ...]

    @property
    def flagged(self) -> bool:
        """One of the concepts is."""
        return any(score.flagged for score in self.concepts.values())

    @property
    def acted_on(self) -> bool:
        """A rule of a policy would have done something."""
        return any(verdict.kind is not VerdictKind.ALLOW for verdict in self.verdicts)


StopReason = str | int
"""The stop string, or the id of the stop token, that ended a response."""


@dataclass(frozen=True)
class StepOutput:
    """What one engine step produced for one request; the last one carries the receipt.

    Attributes:
        text: what became final; it can lag behind the tokens, as a character can span tokens, and what
            may become a stop string is held back.
        token_ids: ``REDACTED_TOKEN_ID`` for each token of a word that was redacted.
        logprobs: one entry for each of ``token_ids``, if the request asked for them; a redacted one has rank 0.
        stop_reason: what ended the response; None unless a stop string or a token of ``stop_token_ids`` did.
    """

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    scores: tuple[PositionScores, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: StopReason | None = None
    num_prompt_tokens: int = 0
    receipt: Receipt | None = None
    guard_events: tuple[GuardEvent, ...] = ()
    """All of the response's, in its last output."""
    verdicts: tuple[Verdict, ...] = ()
    """On the whole response, in its last output; ``overall_verdict`` sums them up."""
    index: int = 0
    """Which of the request's ``sampling.n`` responses."""
    error: Exception | None = field(default=None, compare=False)
