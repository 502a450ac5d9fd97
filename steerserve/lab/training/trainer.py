"""One optimiser step after another, on the rows of a store.

Nothing is drawn at random after the first weights but the order of the rows, and that follows from the seed and the
number of steps taken: weights, optimiser, running averages and that number are the whole state of a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from steerserve.errors import InvalidRequestError
from steerserve.lab.activations import MASSIVE_NORM_RATIO
from steerserve.lab.store import ActivationStore, Pair
from steerserve.lab.training.gated import Gated
from steerserve.lab.training.jumprelu import JumpReLU
from steerserve.lab.training.objective import Forward, Objective
from steerserve.lab.training.relu import ReLU, Tied
from steerserve.lab.training.settings import TrainConfig
from steerserve.lab.training.topk import BatchTopK, Matryoshka, TopK
from steerserve.sae.model import SAE

OBJECTIVES: dict[str, type[Objective[Any]]] = {
    "batchtopk": BatchTopK,
    "topk": TopK,
    "matryoshka": Matryoshka,
    "jumprelu": JumpReLU,
    "gated": Gated,
    "relu": ReLU,
    "tied": Tied,
}

NO_TRANSCODERS = {
    "tied": "a transcoder reads one site and writes another",
    "topk": "no format has transcoders with TopK; batchtopk is the closest",
}


@dataclass(frozen=True)
class TrainStats:
    """Progress of a run, as measured on the last batch.

    Attributes:
        step: steps taken.
        l0: mean number of active features per row.
        dead_share: share of features that have not fired for ``dead_after_rows`` rows.
        threshold: mean over features, in units of the activations.
    """

    step: int
    loss: float
    fvu: float
    l0: float
    dead_share: float
    threshold: float
    learning_rate: float


class Trainer:
    """A run in memory.

    Attributes:
        num_steps: steps taken.

    Raises:
        InvalidRequestError: the settings do not fit the store.
        AssetError: as ``ActivationStore.stream``.
    """

    def __init__(self, store: ActivationStore, config: TrainConfig) -> None:
        self.store = store
        self.config = config
        self.num_steps = 0
        self._transcodes = store.out_site != store.site
        self._check()
        self._batches = store.stream(config.batch_size)
        x, target = next(self._batches)
        norms, target_norms = x.norm(dim=-1), target.norm(dim=-1)
        self._max_norm = MASSIVE_NORM_RATIO * norms.median().item()
        self._scale = x.shape[1] ** 0.5 / norms.mean()
        self._target_scale = target.shape[1] ** 0.5 / target_norms.mean()
        generator = torch.Generator().manual_seed(config.seed)
        make = OBJECTIVES[config.architecture]
        self.objective = make(config, x * self._scale, target * self._target_scale, self._transcodes, generator)
        self._optimizer = torch.optim.Adam(self.objective.parameters(), betas=(0.9, 0.99), fused=True)

    def _check(self) -> None:
        if self._transcodes and (reason := NO_TRANSCODERS.get(self.config.architecture)):
            raise InvalidRequestError("architecture", self.config.architecture, f"another one: {reason}")
        if self.config.skip and not self._transcodes:
            raise InvalidRequestError("skip", True, "a second site: from a site to itself it explains everything")

    def step(self) -> tuple[Forward, torch.Tensor]:
        """Take one step; the batch it was taken on, and its loss.

        Raises:
            InvalidRequestError: the loss is not finite; the weights are those of the step before.
            AssetError: a shard is damaged.
        """
        x, target = self._next_batch()
        forward: Forward = self.objective(x, target, self.num_steps)
        loss = self.objective.loss(forward)
        self._require_finite(loss)
        self._optimizer.zero_grad()
        loss.backward()
        self.objective.keep_decoder_gradient_tangent()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.num_steps, self.config)
        self._optimizer.step()
        self.objective.project()
        self.num_steps += 1
        return forward, loss.detach()

    def _next_batch(self) -> Pair:
        x, target = next(self._batches)
        scaled = x * self._scale
        return scaled, (target * self._target_scale if self._transcodes else scaled)

    def _require_finite(self, *tensors: torch.Tensor) -> None:
        if not all(tensor.isfinite().all() for tensor in tensors):
            expected = f"a smaller one: after {self.num_steps} steps the loss or the weights are not finite"
            raise InvalidRequestError("learning_rate", self.config.learning_rate, expected)

    @torch.no_grad()
    def stats(self, forward: Forward, loss: torch.Tensor) -> TrainStats:
        """What ``step`` returned, as figures."""
        return TrainStats(
            step=self.num_steps,
            loss=loss.item(),
            fvu=forward.fvu.item(),
            l0=(forward.f > 0).sum(1).float().mean().item(),
            dead_share=self.objective.dead().float().mean().item(),
            threshold=(self.objective.thresholded().threshold.mean() / self._target_scale).item(),
            learning_rate=learning_rate(self.num_steps - 1, self.config),
        )

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that ``restore`` needs beside ``num_steps``; shares memory with the run.

        Raises:
            InvalidRequestError: a weight is not finite.
        """
        self._require_finite(*self.objective.parameters())
        tensors = {f"objective.{name}": tensor for name, tensor in self.objective.state_dict().items()}
        for name, parameter in self.objective.named_parameters():
            for key, tensor in self._optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = tensor
        return tensors

    def restore(self, state: dict[str, torch.Tensor], num_steps: int) -> None:
        """Go on from ``state`` as though the run had never ended."""
        parts: dict[str, dict[str, torch.Tensor]] = {"objective": {}, "optimizer": {}}
        for name, tensor in state.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self.objective.load_state_dict(parts["objective"])
        parameters = dict(self.objective.named_parameters())
        for name, tensor in parts["optimizer"].items():
            parameter, _, key = name.rpartition(".")
            self._optimizer.state[parameters[parameter]][key] = tensor
        self.num_steps = num_steps
        self._batches = self.store.stream(self.config.batch_size, skip=1 + num_steps)

    @torch.no_grad()
    def export(self, name: str) -> SAE:
        """The SAE in units of the activations; f is in those of the output site, since decoder rows have unit norm."""
        encoder, scale = self.objective.thresholded(), self._target_scale
        from_site = self._scale / scale  # 1 unless a transcoder's two sites have different scales
        skip = self.objective.W_skip
        manifest = self.store.manifest
        return SAE(
            name=name,
            site=self.store.site,
            W_enc=encoder.W_enc * from_site,
            b_enc=encoder.b_enc / scale,
            W_dec=self.objective.W_dec.detach().clone(),
            b_dec=self.objective.b_dec.detach() / scale,
            threshold=encoder.threshold / scale,
            apply_b_dec_to_input=not self._transcodes,
            max_norm=self._max_norm,
            metadata={
                "model_name": manifest.model_name,
                "context_size": manifest.context_length,
                "model_fingerprint": manifest.model_fingerprint,
            },
            k=self.objective.features_per_token,
            W_skip=None if skip is None else skip.detach() * from_site,
            transcodes_to=self.store.out_site if self._transcodes else None,
        )


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rises, stays, and falls to 0."""
    remaining = (config.steps - step) / (config.decay_fraction * config.steps)
    return config.learning_rate * min(1.0, (step + 1) / config.warmup_steps, max(remaining, 0.0))
