"""Policy files behind a real server: what clients see of them, and how they are replaced while it runs."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from steerserve import SteerserveClient, cli
from steerserve.config import EngineConfig, PolicyConfig
from steerserve.errors import InvalidRequestError, PolicyError
from steerserve.serving.app import load_engine
from steerserve.serving.policy_files import PolicyFiles
from steerserve.types import REDACTED_TEXT, REDACTED_TOKEN_ID, FinishReason, GuardAction

RULES = {
    "watch": "{concept: mood, action: flag, threshold: -1e9}",
    "hide": "{concept: mood, action: redact, threshold: -1e9, phase: generated}",
    "stop": "{concept: mood, action: block, threshold: -1e9}",
}


def write(directory: Path, name: str, rule: str = "watch", version: str = "1", more: str = "") -> Path:
    path = directory / f"{name}.yaml"
    head = f'format: steerserve.policy/1\nname: {name}\nversion: "{version}"\n'
    path.write_text(f"{head}rules: [{RULES[rule]}]\n{more}")
    return path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "policies"
    path.mkdir()
    write(path, "watch")
    write(path, "hide", "hide", more="limits: {max_tokens: 9}")
    return path


@pytest.fixture
def client(directory, tiny, start_server) -> Iterator[SteerserveClient]:
    config = tiny.config(policies=PolicyConfig(directory=str(directory), watch_s=0.05))
    with start_server(config) as running, SteerserveClient(running.address) as connected:
        yield connected


def test_clients_see_whose_rule_did_what(client, tiny, tokenizer) -> None:
    words = [index for index, token in enumerate(tiny.feature_token) if tokenizer.decode([token]).strip()]
    steer = [f"tiny-sae/{words[0]}=clamp_always:1x"]
    assert list(client.get_model_info().policies) == ["mood@1", "hide@1", "watch@1"]
    reply = client.generate("Hello", policies=["watch"], max_tokens=2, temperature=0)
    assert {(e.source, e.guard, e.label, e.action) for e in reply.guard_events} == {
        ("policy:watch@1", 0, "mood", GuardAction.FLAG)
    }
    hidden = client.generate("Hello", policies=["hide"], steer=steer, max_tokens=4, temperature=0, logprobs=1)
    assert set(hidden.text.split()) == {REDACTED_TEXT}
    assert set(hidden.token_ids) == {REDACTED_TOKEN_ID}
    assert [(entry.rank, entry.top) for entry in hidden.logprobs] == [(0, ())] * 4
    assert hidden.receipt.num_redacted_tokens == 4
    both = client.generate("Hello", policies=["mood"], steer=["mood=clamp_always:1x"], max_tokens=2, temperature=0)
    assert [entry.overridden_by for entry in both.receipt.interventions] == [("policy:mood@1",), ()]
    with pytest.raises(
        InvalidRequestError, match=r"max_tokens: got 10, expected at most 9, the limit of policy hide@1"
    ):
        client.generate("Hello", policies=["hide"], max_tokens=10)


def test_files_are_followed_and_streams_keep_what_they_began_with(client, directory, wait_until, caplog) -> None:
    stream = client.generate_stream("Hello", policies=["watch"], max_tokens=2000, temperature=0, ignore_eos=True)
    next(stream)
    write(directory, "watch", "stop", version="2")
    wait_until(lambda: "watch@2" in client.get_model_info().policies)
    assert client.generate("Hello", policies=["watch"]).finish_reason is FinishReason.BLOCKED
    with pytest.raises(InvalidRequestError, match="the loaded version, watch@2"):
        client.generate("Hello", policies=["watch@1"])
    for _ in range(5):
        assert next(stream).finish_reason is None
    stream.close()
    # A bad file changes nothing, says why once, and stands in nobody's way once it is mended.
    with caplog.at_level(logging.ERROR, "steerserve.serving.policy_files"):
        (directory / "worse.yaml").write_text("rules: [")
        (directory / "hide.yaml").unlink()
        wait_until(lambda: "worse.yaml:1: not YAML" in caplog.text)
    assert "hide@1" in client.get_model_info().policies
    write(directory, "worse")
    wait_until(lambda: list(client.get_model_info().policies) == ["mood@1", "watch@2", "worse@1"])
    assert caplog.text.count("not YAML") == 1


def test_reload_says_what_changed_or_why_nothing_did(directory, tiny) -> None:
    engine = load_engine(tiny.config(policies=PolicyConfig(directory=str(directory))), EngineConfig(dtype="float32"))
    try:
        files = PolicyFiles(engine, PolicyConfig(directory=str(directory), watch_s=0))
        assert not files.reload()
        write(directory, "watch", "stop")
        with pytest.raises(PolicyError, match="watch@1: changed, expected another version"):
            files.reload()
        write(directory, "watch", "stop", version="2")
        write(directory, "new")
        (directory / "hide.yaml").unlink()
        assert str(files.reload()) == "added new@1; changed watch@2; removed hide@1"

        async def asked() -> None:
            watching = asyncio.create_task(files.watch())
            (directory / "new.yaml").unlink()
            await asyncio.sleep(0.1)
            assert "new" in engine.catalog.policies, "nobody looks at the files by themselves"
            files.ask()
            while "new" in engine.catalog.policies:
                await asyncio.sleep(0.01)
            watching.cancel()

        asyncio.run(asyncio.wait_for(asked(), 20))
    finally:
        engine.close()


def test_a_server_does_not_start_with_a_wrong_file(directory, tiny) -> None:
    write(directory, "mood")
    with pytest.raises(PolicyError, match=r"mood.yaml:2: name: got 'mood', expected another"):
        load_engine(tiny.config(policies=PolicyConfig(directory=str(directory))), EngineConfig(dtype="float32"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["policy", *map(str, arguments)])


def test_check_names_what_is_good_and_what_is_wrong(directory, tiny) -> None:
    good = run("check", directory, "--pack", tiny.pack)
    assert (good.exit_code, good.stdout) == (0, "hide@1: 1 rules, good\nwatch@1: 1 rules, good\n")
    unknown = run("check", directory)
    assert unknown.exit_code == 1
    assert "hide.yaml:4: rules[0].concept: got 'mood', expected a loaded concept: profanity" in unknown.stderr


def test_explain_takes_files_built_in_policies_and_packs(directory, tiny) -> None:
    assert run("explain", "family-friendly").stdout.startswith("family-friendly@1: ")
    assert run("explain", "profanity").stdout.startswith("profanity@1: ")
    told = run("explain", "profanity-monitor").stdout
    assert "of 659 held-out texts that show it 88.8% exceed the card's 0.997553, of 870 others 0.6%" in told
    assert "`steerserve policy test` shows what other thresholds" in told
    assert (
        "above -1e+09 (this policy's threshold): the word is not shown"
        in run("explain", directory / "hide.yaml", "--pack", tiny.pack).stdout
    )
    missing = run("explain", "nothing")
    assert missing.exit_code == 2
    assert "expected a file, or one of family-friendly, profanity, profanity-monitor" in missing.stderr.replace(
        "\n", " "
    )


def test_a_dry_run_counts_where_the_rules_act(directory, tiny, tmp_path) -> None:
    path = directory / "two.yaml"
    path.write_text(
        'format: steerserve.policy/1\nname: two\nversion: "1"\nlimits: {priority: [3, 4]}\nrules:\n'
        "- {concept: mood, action: block, threshold: -1e9, phase: generated, edit: calibrated}\n"
        "- {concept: mood, action: rewind, threshold: 1e9, name: never}\n"
    )
    texts = tmp_path / "texts.jsonl"
    lines = [{"text": f"text number {i}", "label": i % 3 == 0} for i in range(40)]
    texts.write_text("\n".join(map(json.dumps, lines)))
    arguments = ("test", path, "--texts", texts, "--pack", tiny.pack, "--model", tiny.model, "--dtype", "float32")
    told = json.loads(run(*arguments, "--json").stdout)
    assert told["policy"] == "two@1"
    counts = [[line[key] for key in list(line)[:5]] for line in told["rules"]]
    assert counts == [["any", 14, 26, 0, 0], ["mood", 14, 26, 0, 0], ["never", 0, 0, 14, 26]]
    assert [line["recall"] for line in told["rules"]] == [1, 1, 0]
    assert told["rules"][2]["precision"] is None
    assert [reading["text"] for reading in told["texts"]] == [line["text"] for line in lines]
    assert all(set(reading["fired"]) == {"mood"} for reading in told["texts"])
    assert all(set(reading["scores"]) == {"mood", "never"} for reading in told["texts"])
    others = [reading["scores"]["mood"] for reading in told["texts"] if not reading["label"]]
    choices = told["thresholds"]["mood"]
    assert [choice["is_in_force"] for choice in choices] == [True] + [False] * (len(choices) - 1)
    assert [choice["threshold"] for choice in choices] == sorted(choice["threshold"] for choice in choices)
    assert choices[-1]["false_positives"] == 0
    for choice in choices:  # each does what it says, and was chosen as it says
        assert choice["false_positives"] == sum(score > choice["threshold"] for score in others)
        assert choice["is_in_force"] or choice["false_positive_rate"] <= 0.1
    table = run(*arguments).stdout
    assert "35.0%" in table
    assert "-1e+09 (now)" in table
    texts.write_text('\n{"text": "x"}')
    assert "texts.jsonl:2" in run(*arguments).stderr.replace("\n", "")
    texts.write_text('{"text": "x"}')
    wrong = run(*arguments)
    assert wrong.exit_code == 2
    assert "texts.jsonl:1" in wrong.stderr.replace("\n", "")
