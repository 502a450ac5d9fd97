"""A pack of several sites through the engine: every site is edited by the formula, and the receipt names each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_steering import activations, assert_close, recording_all, request, steer

from steerserve.models.loading import LoadedModel
from steerserve.steering.pack_files import save_pack
from steerserve.steering.packs import ConceptPack, DetectorCard, ModelRef, PackCard, PackTensors, PolicyAction
from steerserve.types import ConceptTarget, DirectionTarget, Guard, GuardAction, Intervention, Op, Site, SteeringSpec

EARLY, LATE = Site.parse("blocks.0.hook_resid_post"), Site.parse("blocks.1.hook_mlp_out")
ROWS = {EARLY: [0, 1, 2], LATE: [3, 4]}
EDITED, PROBE = [0, 1, 3, 4], 2


@pytest.fixture
def make_wide(tmp_path):
    """Two clamped features at each site, and a probe at the first, which the policy does not edit."""

    def make(model: LoadedModel) -> ConceptPack:
        rng = np.random.default_rng(3)
        W_enc, W_dec = rng.standard_normal((2, 5, model.d_model)).astype(np.float32)
        ones = np.ones(5, dtype=np.float32)
        is_probe = np.arange(5) == PROBE
        card = PackCard(
            name="wide",
            version="1",
            description="test",
            model=ModelRef(name=model.name, fingerprint=model.fingerprint),
            sites=[str(EARLY), str(LATE)],
            policy=PolicyAction(op=Op.CLAMP),
            detector=DetectorCard(kind="probe", site=str(EARLY), threshold=0.0),
        )
        tensors = PackTensors(
            site=np.array([0, 0, 0, 1, 1]),
            W_enc=W_enc,
            b_enc=np.array([0.1, -0.1, 0.75, 0.0, 0.2], dtype=np.float32),
            threshold=np.where(is_probe, -np.inf, 0.0).astype(np.float32),
            max_norm=np.inf * ones,
            W_dec=W_dec,
            edited=~is_probe,
            value=np.array([-0.5, 0.25, 0.0, -1.0, 0.125], dtype=np.float32),
            weight=is_probe.astype(np.float32),
            max_activation=ones,
            feature_ids=np.full(5, -1),
        )
        return save_pack(card, tensors, tmp_path / "wide")

    return make


def rows_at(pack: ConceptPack, rows: list[int]) -> list[np.ndarray]:
    """W_enc, b_enc, threshold, max_norm ``[1]``, W_dec of some rows in float64."""
    t = pack.tensors
    columns = [t.W_enc, t.b_enc, t.threshold, t.max_norm, t.W_dec]
    return [column[rows].astype(np.float64) for column in columns]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_policy_follows_the_formula_at_each_of_its_sites(dtype, load_tiny, make_wide, make_engine, run) -> None:
    model = load_tiny(dtype=dtype)
    pack = make_wide(model)
    with recording_all(model, [EARLY, LATE], lambda: make_engine(model, [pack])) as (recorders, engine):
        response = run(engine, [request("r", policies=("wide",))])["r"]
    for site, recorder in zip((EARLY, LATE), recorders, strict=True):
        x, changed = recorder.row()
        chosen = [row for row in ROWS[site] if row in EDITED]
        rows, value = rows_at(pack, chosen), pack.tensors.value[chosen].astype(np.float64)
        f = activations(x, rows)
        assert ((f > 0).any(axis=0) & (f == 0).any(axis=0)).all(), "each feature edits some positions and not others"
        edit = np.where(f > 0, value - f, 0.0)
        assert_close(changed, x + edit @ rows[4], x, dtype)
    early, late = response.receipt.interventions
    assert (early.site, early.label) == (EARLY, f"concept wide at {EARLY}: clamp")
    assert (late.site, late.label) == (LATE, f"concept wide at {LATE}: clamp")
    assert early.source == late.source == "policy:wide@1"
    for entry in (early, late):
        assert entry.tokens_covered == entry.tokens_in_scope == len(x)
        assert 0 < entry.tokens_edited <= len(x)
    assert response.receipt.steered


def test_the_score_of_a_concept_is_its_probes_with_its_bias(load_tiny, make_wide, make_engine, run) -> None:
    """Whoever reads it: a monitor before the policies, a guard behind them."""
    model = load_tiny()
    pack = make_wide(model)
    target = ConceptTarget("wide")
    flag = Guard(target, -1e6, GuardAction.FLAG)
    asked = SteeringSpec((Intervention(target, Op.MONITOR),), (flag,))
    with recording_all(model, [EARLY], lambda: make_engine(model, [pack])) as ((recorder,), engine):
        response = run(engine, [request("r", asked, return_activations=True)])["r"]
    x, _ = recorder.row()
    expected = x @ pack.tensors.W_enc[PROBE].astype(np.float64) + 0.75
    assert (expected < 0).any()
    np.testing.assert_allclose(response.scores, np.stack([expected, expected], axis=1), rtol=1e-4, atol=1e-4)
    assert response.guard_events[0].score == pytest.approx(response.scores[response.guard_events[0].position, 1])


def test_no_request_takes_back_what_a_policy_did(load_tiny, make_wide, make_engine, run) -> None:
    """The policy edits what the request left, at the last site that a request may edit beside it."""
    model = load_tiny()
    pack = make_wide(model)
    vector = np.random.default_rng(0).standard_normal(model.d_model).astype(np.float32)
    away = steer(Intervention(DirectionTarget(EARLY, vector), Op.ADD, 2.0))
    with recording_all(model, [EARLY], lambda: make_engine(model, [pack])) as ((recorder,), engine):
        run(engine, [request("r", away, policies=("wide",))])
    x, changed = recorder.row()
    x = x + 2.0 * vector / np.linalg.norm(vector.astype(np.float64))
    rows, value = rows_at(pack, [0, 1]), pack.tensors.value[:2].astype(np.float64)
    f = activations(x, rows)
    np.testing.assert_allclose(changed, x + np.where(f > 0, value - f, 0.0) @ rows[4], rtol=1e-4, atol=1e-4)
