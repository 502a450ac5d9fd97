"""What ``concept eval`` writes, and when it writes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from steerserve import cli
from steerserve.lab.concept_eval import page
from steerserve.lab.concept_eval.card import EvaluationCard, Verdict
from steerserve.lab.concept_eval.run import Evaluation
from steerserve.steering.pack_files import save_pack
from steerserve.steering.packs import ConceptPack


def test_a_trial_run_leaves_the_pack_as_it_is(
    make_pack: Callable[..., ConceptPack],
    tiny_model_dir: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = EvaluationCard({}, [Verdict("effect", True, "It works.")], [], [], {})
    monkeypatch.setattr(Evaluation, "run", lambda self: (card, {}))
    monkeypatch.setattr(page, "render_card", lambda pack: "page")
    directory = tmp_path / "mood"
    save_pack(make_pack().card, make_pack().tensors, directory)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    command = ["concept", "eval", directory, "--positive", "p.txt", "--negative", "n.txt"]
    command += ["--model", tiny_model_dir("llama"), "--second-judge", ""]

    result = CliRunner().invoke(cli.app, [*map(str, command), "--quick"])
    assert result.exit_code == 0, result.output
    assert "It works." in result.output
    assert f"nothing was written to {directory}" in result.output.replace("\n", "")
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before

    result = CliRunner().invoke(cli.app, list(map(str, command)))
    assert result.exit_code == 0, result.output
    assert "nothing was written" not in result.output
    assert json.loads((directory / "card.json").read_text())["evaluation"]["verdicts"][0]["text"] == "It works."
    assert (directory / "card.html").read_text() == "page"
