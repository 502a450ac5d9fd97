"""Engines on tiny random models, and a way to run requests to their end.

``engine_runs`` and ``guard_oracle`` lie beside the tests that import them.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from steerserve.config import EngineConfig
from steerserve.engine.engine import Engine
from steerserve.models.loading import LoadedModel, load_model
from steerserve.sae.model import SAE
from steerserve.steering.catalog import Catalog
from steerserve.steering.monitor_plan import MonitorPlanFile
from steerserve.steering.monitors import NO_MONITORS, bind_monitors
from steerserve.steering.pack_files import save_pack
from steerserve.steering.packs import (
    ConceptPack,
    DetectorCard,
    ModelRef,
    PackCard,
    PackTensors,
    PolicyAction,
    SAERef,
)
from steerserve.types import (
    FinishReason,
    GenerateRequest,
    GuardEvent,
    Op,
    Phase,
    Receipt,
    Site,
    StepOutput,
    Stream,
    TokenLogprobs,
)

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("engine_runs", "guard_oracle")

SITE = Site(1, Stream.RESID_POST)
D_SAE = 12
SAE_SHA = "a" * 64


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For every test here."""


LoadTiny = Callable[..., LoadedModel]


@pytest.fixture
def load_tiny(tiny_model_dir: Callable[[str], Path]) -> LoadTiny:
    """A fresh copy of the tiny model of a family."""

    def load(family: str = "llama", dtype: torch.dtype = torch.float32) -> LoadedModel:
        return load_model(str(tiny_model_dir(family)), dtype)

    return load


def tiny_sae(d_model: int, site: Site = SITE) -> SAE:
    """Random features of which about half are active at a position; feature 0 never is."""
    generator = torch.Generator().manual_seed(1)
    W_dec = torch.randn(D_SAE, d_model, generator=generator)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    threshold = torch.zeros(D_SAE)
    threshold[0] = 1e6
    return SAE(
        name="tiny-sae",
        site=site,
        W_enc=W_dec.T.contiguous(),
        b_enc=0.1 * torch.randn(D_SAE, generator=generator),
        W_dec=W_dec,
        b_dec=0.1 * torch.randn(d_model, generator=generator),
        threshold=threshold,
        max_activation=torch.full((D_SAE,), 4.0),
        sha256=SAE_SHA,
    )


@pytest.fixture
def sae() -> SAE:
    """The one that ``make_engine`` serves with the tiny Llama."""
    return tiny_sae(32)


MakePack = Callable[..., ConceptPack]


@pytest.fixture
def make_pack(tmp_path: Path) -> MakePack:
    """Save and load a pack of some features of ``tiny_sae``, as a policy."""

    def make(
        model: LoadedModel,
        features: tuple[int, ...] = (3, 4),
        name: str = "mood",
        op: Op = Op.CLAMP,
        always: bool = False,
        value: float = 0.0,
        phase: Phase = Phase.ALL,
        weight: tuple[float, ...] | None = None,
    ) -> ConceptPack:
        W_enc, b_enc, threshold, max_norm, W_dec = (rows.numpy() for rows in tiny_sae(model.d_model).rows(features))
        ones = np.ones(len(features), dtype=np.float32)
        card = PackCard(
            name=name,
            version="1",
            description="test",
            model=ModelRef(name=model.name, fingerprint=model.fingerprint),
            saes={str(SITE): SAERef(name="tiny-sae", sha256=SAE_SHA)},
            sites=[str(SITE)],
            policy=PolicyAction(op=op, always=always, phase=phase),
            detector=DetectorCard(kind="features", site=str(SITE), threshold=0.0),
        )
        tensors = PackTensors(
            site=np.zeros(len(features), dtype=np.int64),
            W_enc=W_enc,
            b_enc=b_enc,
            threshold=threshold,
            max_norm=max_norm,
            W_dec=W_dec,
            edited=np.ones(len(features), dtype=bool),
            value=value * ones,
            weight=ones if weight is None else np.array(weight, dtype=np.float32),
            max_activation=4 * ones,
            feature_ids=np.array(features, dtype=np.int64),
        )
        return save_pack(card, tensors, tmp_path / name)

    return make


MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    """Engines that serve ``tiny_sae`` and the given packs; further keyword arguments go to ``EngineConfig``.

    An engine owns its model: a second one for the same model closes the first.
    """
    engines: list[Engine] = []

    def close(of_these: Iterable[Engine]) -> None:
        for engine in list(of_these):
            engine.close()
            engines.remove(engine)

    def make(
        model: LoadedModel,
        packs: Iterable[ConceptPack] = (),
        max_norm: float = math.inf,
        sae: SAE | None = None,
        clock: Callable[[], float] = time.monotonic,
        monitor_plan: MonitorPlanFile | None = None,
        **config: object,
    ) -> Engine:
        close(engine for engine in engines if engine.model is model)
        sae = replace(sae or tiny_sae(model.d_model), max_norm=max_norm)
        catalog = Catalog(model, {"tiny-sae": sae}, {pack.name: pack for pack in packs})
        values = {"max_num_seqs": 4, "max_model_len": 128, "bank_capacity": 32, "dtype": "float32"} | config
        monitors = NO_MONITORS if monitor_plan is None else bind_monitors(monitor_plan, catalog)
        engines.append(Engine(model, catalog, EngineConfig.model_validate(values), clock, monitors))
        return engines[-1]

    yield make
    close(engines)


@dataclass
class Response:
    """All outputs of one request, joined."""

    outputs: list[StepOutput] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]

    @property
    def text(self) -> str:
        return "".join(output.text for output in self.outputs)

    @property
    def scores(self) -> np.ndarray:
        """``[positions, interventions]``; asserts that positions are consecutive from 0."""
        lines = [line for output in self.outputs for line in output.scores]
        assert [line.position for line in lines] == list(range(len(lines)))
        return np.stack([line.scores for line in lines])

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.outputs[-1].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        return [entry for output in self.outputs for entry in output.logprobs]

    @property
    def guard_events(self) -> tuple[GuardEvent, ...]:
        assert all(output.guard_events == () for output in self.outputs[:-1])
        return self.outputs[-1].guard_events

    @property
    def error(self) -> Exception | None:
        return self.outputs[-1].error

    @property
    def receipt(self) -> Receipt:
        receipt = self.outputs[-1].receipt
        assert receipt is not None
        return receipt


Run = Callable[..., dict[str, Response]]


@pytest.fixture
def run() -> Run:
    """Run requests to their end; ``arrivals[i]`` is the step at which request i joins (default 0)."""

    def run_all(
        engine: Engine, requests: list[GenerateRequest], arrivals: list[int] | None = None
    ) -> dict[str, Response]:
        responses: dict[str, Response] = {}
        todo = sorted(zip(arrivals or [0] * len(requests), requests, strict=True), key=lambda item: item[0])
        step = 0
        while todo or engine.has_unfinished():
            while todo and todo[0][0] <= step:
                engine.add_request(todo.pop(0)[1])
            for output in engine.step():
                responses.setdefault(output.request_id, Response()).outputs.append(output)
            step += 1
        assert engine.num_running == engine.num_waiting == 0
        return responses

    return run_all
