"""The command line: quick to help, one clear line for a mistake, and a real server behind it."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from steerserve import cli, client
from steerserve.config import EngineConfig, ServerConfig
from steerserve.types import SamplingParams

HEAVY = ("torch", "transformers", "grpc", "numpy")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments)


@pytest.mark.parametrize("command", [[], ["serve"], ["generate"], ["info"], ["demo"], ["models"]])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    script = (
        "import sys; from steerserve.cli import app\n"
        f"try: app({[*command, '--help']!r})\n"
        f"finally: print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "Usage: " in shown
    assert "HEAVY []" in shown


def test_generate_streams_text_to_stdout_and_the_receipt_to_stderr(server, tiny, tokenizer) -> None:
    result = run(
        "generate", "Hello", "--target", server.address, "--steer", "tiny-sae/4=clamp_always:1x", "--policy", "mood@1",
        "--max-tokens", "3", "--temperature", "0", "--activations",
    )  # fmt: skip
    assert result.exit_code == 0
    assert result.stdout == tokenizer.decode([tiny.policy_token] * 3) + "\n"
    for expected in ("feature tiny-sae/4: clamp", "policy:mood@1", "receipt: steered"):
        assert expected in result.stderr


def test_generate_passes_on_how_to_draw_and_where_to_stop(server, tiny, tokenizer) -> None:
    steer = ["--steer", "tiny-sae/4=clamp_always:1x"]
    piece = tokenizer.decode([tiny.feature_token[4]])
    options = ["--target", server.address, "--temperature", "0", "--min-p", "0.1", "--repetition-penalty", "1.1"]
    stop = ["--frequency-penalty", "0.1", "--presence-penalty", "0.1", "--stop", "no such text", "--stop", piece * 2]
    result = run("generate", "Hello", *steer, *options, *stop, "--max-tokens", "9")
    assert result.exit_code == 0
    assert result.stdout == "\n"
    assert run("generate", "Hello", *steer, *options, "--max-tokens", "9").stdout == piece * 9 + "\n"


def test_generate_passes_on_biases_and_shows_log_probabilities(server, tokenizer) -> None:
    options = ["--target", server.address, "--max-tokens", "3", "--temperature", "0", "--priority", "-1"]
    result = run("generate", "Hello", *options, "--logit-bias", "700=100", "--logprobs", "2", "--stop-token-id", "7")
    assert result.exit_code == 0
    assert result.stdout == tokenizer.decode([700] * 3) + "\n"
    assert "log-probability" in result.stderr
    assert result.stderr.count("  700  ") == 3
    stopped = run("generate", "Hello", *options, "--logit-bias", "700=100", "--stop-token-id", "700")
    assert stopped.stdout == "\n"
    assert "log-probability" not in stopped.stderr


def test_generate_shows_every_response_with_its_receipt(server, tiny, tokenizer) -> None:
    steer = ["--steer", "tiny-sae/4=clamp_always:1x", "--temperature", "0", "--max-tokens", "2"]
    result = run("generate", "Hello", "--target", server.address, *steer, "--n", "3")
    assert result.exit_code == 0
    assert result.stdout == (tokenizer.decode([tiny.feature_token[4]] * 2) + "\n") * 3
    assert result.stderr.count("receipt: steered") == 3


def test_generate_shows_what_a_guard_did(server) -> None:
    result = run("generate", "Hello", "--target", server.address, "--guard", "mood>-1e9=block", "--max-tokens", "2")
    assert (result.exit_code, result.stdout) == (0, "\n")
    assert "guard 0: block at position 0, score " in result.stderr


def test_generate_sends_a_direction_from_a_file(server, tiny, tokenizer, tmp_path) -> None:
    np.save(tmp_path / "calm.npy", tiny.unembedding[700].numpy())
    steer = f"direction:{tmp_path / 'calm.npy'}@{tiny.site}=add:1000"
    options = ["--target", server.address, "--max-tokens", "2", "--temperature", "0", "--chat"]
    result = run("generate", "Hello", "--steer", steer, *options)
    assert result.stdout == tokenizer.decode([700, 700]) + "\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "nope"], "policies[0]: got 'nope', expected a loaded policy: mood@1"),
        (["--steer", "nope=block"], "steering.interventions[0].concept: got 'nope', expected a loaded concept: mood"),
        (["--steer", "mood=explode"], "steer[0] (operation): got 'explode', expected one of"),
        (["--guard", "mood=block"], "guards[0]: got 'mood=block', expected TARGET>NUMBER=ACTION[@PHASE]"),
        (["--logit-bias", "x"], "--logit-bias: got 'x', expected TOKEN_ID=BIAS"),
        (["--max-tokens", "-3"], "sampling.max_tokens: got -3, expected an integer >= 1"),
        (["--target", "127.0.0.1:1"], "failed to connect"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(server, options, message) -> None:
    result = run("generate", "Hello [/] world", "--target", server.address, *options)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "--port: got 70000, expected less than or equal to 65535"),
        (["--kv-cache-tokens", "9"], "--kv-cache-tokens: got 9, expected "),
        (["--dtype", "int8"], "--dtype: got 'int8', expected 'bfloat16' or 'float32'"),
        (["--model", "{tiny}", "--pack", "nope"], "'nope' is neither a directory nor one of the built-in packs"),
        (["--model", "{smollm2}", "--pack", "{pack}"], "pack.model.fingerprint: got"),
    ],
)
def test_serve_refuses_what_it_cannot_load(tiny, smollm2_dir: Path, options, message) -> None:
    places = {"tiny": tiny.model, "pack": tiny.pack, "smollm2": smollm2_dir}
    result = run("serve", *(option.format(**places) for option in options))
    assert result.exit_code == 2
    assert message in result.stderr


def test_info_shows_what_can_be_named(server) -> None:
    result = run("info", "--target", server.address)
    assert result.exit_code == 0
    for expected in ("tiny-llama", "tiny-sae: 32 features at blocks.2.hook_resid_post", "mood@1", "0 of 4 running"):
        assert expected in result.stdout


def test_models_list_names_the_default_model() -> None:
    assert ServerConfig().model in run("models", "list").stdout


def test_clients_look_for_the_server_where_it_listens() -> None:
    config = ServerConfig()
    assert cli.DEFAULT_TARGET == client.DEFAULT_TARGET == f"{config.host}:{config.port}"


def test_options_left_out_mean_the_defaults_of_sampling() -> None:
    defaults = {name: option.default for name, option in inspect.signature(cli.generate).parameters.items()}
    shared = defaults.keys() & set(dir(SamplingParams()))
    assert len(shared) >= 3
    assert {name: defaults[name] for name in shared} == {name: getattr(SamplingParams(), name) for name in shared}


@pytest.mark.parametrize("config", [ServerConfig(), EngineConfig()])
def test_help_tells_the_defaults_of_the_configuration(config) -> None:
    told = {}
    for name, option in inspect.signature(cli.serve, eval_str=True).parameters.items():
        match = re.search(r"\[(.+)\]$", option.annotation.__metadata__[0].help)
        if match and hasattr(config, name):
            told[name] = match[1]
    assert len(told) >= 3
    assert told == {name: f"{getattr(config, name):g}" if isinstance(getattr(config, name), float)
                    else str(getattr(config, name)) for name in told}  # fmt: skip
