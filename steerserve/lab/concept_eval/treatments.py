"""What one arm of an evaluation does to the model, in the terms of a request: nothing is measured but what serves."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from steerserve.models.loading import LoadedModel
from steerserve.steering.catalog import Catalog
from steerserve.steering.compiler import compile_plan
from steerserve.steering.packs import ConceptPack
from steerserve.steering.plan import Plan
from steerserve.types import GenerateRequest, Intervention, SamplingParams, SteeringSpec


@dataclass(frozen=True, eq=False)
class Treatment:
    """Steering, a bias on logits, and an instruction.

    Attributes:
        catalog: what ``steering`` and ``policies`` may name.
        prefix: an instruction's tokens before a text, in the place of its BOS token if there is one.
        opening: how a prompt in the chat template begins, and how it does with the instruction, which then has its
            place in the dialogue and not before it; None where prompts are plain text.
    """

    catalog: Catalog
    steering: SteeringSpec = SteeringSpec()
    policies: tuple[str, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    prefix: tuple[int, ...] = ()
    opening: tuple[str, str] | None = None

    @classmethod
    def none(cls, model: LoadedModel) -> Treatment:
        """The model as it is."""
        return cls(Catalog(model, {}, {}))

    @classmethod
    def policy(cls, model: LoadedModel, pack: ConceptPack, strength: float = 1.0) -> Treatment:
        """A pack's policy, its edits multiplied by ``strength``: x' = x + strength · Σ (f' − f) W_dec."""
        return cls(Catalog(model, {}, {pack.name: scaled(pack, strength)}), policies=(pack.name,))

    @classmethod
    def interventions(cls, model: LoadedModel, *interventions: Intervention) -> Treatment:
        """A request's own interventions."""
        return cls(Catalog(model, {}, {}), SteeringSpec(interventions))

    @cached_property
    def plan(self) -> Plan:
        """Compiled, as for a request."""
        return compile_plan(self.steering, self.policies, self.catalog)

    @cached_property
    def key(self) -> str:
        """SHA-256 of all of it; equal keys do the same."""
        terms: tuple[object, ...] = (self.plan.hash, sorted(self.logit_bias.items()), self.prefix)
        if self.opening is not None:
            terms += self.opening
        return hashlib.sha256(repr(terms).encode()).hexdigest()

    def request(self, request_id: str, prompt: Sequence[int], sampling: SamplingParams) -> GenerateRequest:
        """One that is so treated; ``prompt`` holds the instruction."""
        return GenerateRequest(
            request_id,
            tuple(prompt),
            replace(sampling, logit_bias=self.logit_bias),
            self.steering,
            self.policies,
        )


def scaled(pack: ConceptPack, strength: float) -> ConceptPack:
    """The pack with edits of ``strength`` times the size. Its hash is of what it does, not of what its card says."""
    tensors = replace(pack.tensors, W_dec=(strength * pack.tensors.W_dec).astype(pack.tensors.W_dec.dtype))
    digest = hashlib.sha256(repr((pack.card.sites, pack.card.policy, pack.card.detector)).encode())
    for array in vars(tensors).values():
        digest.update(array.tobytes())
    return ConceptPack(pack.card, tensors, digest.hexdigest())
