"""Harvest: what is on disk is what the model computed, once, whatever interrupted it."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from steerserve.errors import AssetError, IncompatibleError, InvalidRequestError
from steerserve.lab import harvest as harvesting
from steerserve.lab.activations import activations_of
from steerserve.lab.harvest import HarvestConfig, harvest
from steerserve.lab.manifest import Manifest
from steerserve.lab.tokens import pack_contexts
from steerserve.models.loading import LoadedModel
from steerserve.types import Site, Stream

SITE = Site(1, Stream.RESID_POST)
SITES = (Site(0, Stream.RESID_PRE), Site(1, Stream.MLP_OUT), SITE)
CONFIG = HarvestConfig(SITES, context_length=16, batch_size=3)


def oracle(model: LoadedModel, tokens: torch.Tensor) -> dict[Site, torch.Tensor]:
    """The same activations from Hugging Face's own records and a plain hook."""
    caught: list[torch.Tensor] = []
    layer = model.model.get_submodule("model.layers.1")
    handle = layer.mlp.register_forward_hook(lambda _module, _args, output: caught.append(output))
    with torch.no_grad():
        hidden = model.model(tokens.long(), output_hidden_states=True).hidden_states
    handle.remove()
    return dict(zip(SITES, (hidden[0], caught[0], hidden[2]), strict=True))


@pytest.fixture
def contexts(token_id) -> Callable[[list[str]], torch.Tensor]:
    """Texts, character by character, each followed by the end token, in full rows of 16."""

    def contexts(texts: list[str]) -> torch.Tensor:
        ids = [token for text in texts for token in [*map(token_id, text), 256]]
        return torch.tensor(ids[: len(ids) // 16 * 16]).view(-1, 16)

    return contexts


def test_contexts_are_the_texts_joined_by_the_end_token(tiny: LoadedModel, contexts, sentences: list[str]) -> None:
    packed = torch.stack(list(pack_contexts(tiny, sentences, 16)))
    assert torch.equal(packed.long(), contexts(sentences))


def test_activations_are_the_models_own(tiny: LoadedModel, contexts, sentences: list[str]) -> None:
    tokens = contexts(sentences[:3])
    expected = oracle(tiny, tokens)
    captured = activations_of(tiny, tokens, SITES)
    assert captured.keys() == expected.keys()
    for site in SITES:
        torch.testing.assert_close(captured[site], expected[site], rtol=0, atol=0)


def test_a_reading_leaves_no_hook_behind(tiny: LoadedModel, contexts, sentences: list[str]) -> None:
    tokens = contexts(sentences[:1])
    before = tiny.model(tokens).logits
    activations_of(tiny, tokens, SITES)
    assert torch.equal(tiny.model(tokens).logits, before)  # a pass runs to its end again


def test_no_row_of_a_bos_token_is_kept(with_bos: LoadedModel, tmp_path: Path, sentences: list[str]) -> None:
    manifest = harvest(with_bos, sentences, tmp_path, CONFIG)
    shard = load_file(tmp_path / manifest.shards[0])
    assert (shard["input_ids"][:, 0] == 257).all()
    assert (shard["position"] > 0).all()
    assert manifest.num_rows == len(shard["input_ids"]) * 15


def test_harvest_keeps_every_ordinary_row(tiny: LoadedModel, tmp_path: Path, contexts, sentences: list[str]) -> None:
    manifest = harvest(tiny, sentences, tmp_path, CONFIG)
    tokens = contexts(sentences)
    expected = oracle(tiny, tokens)
    assert manifest.num_tokens == tokens.numel()
    assert manifest.num_rows == len(tokens) * 15  # all but the first position of each context
    (shard,) = (load_file(tmp_path / name) for name in manifest.shards)
    assert torch.equal(shard["tokens"].long(), tokens[:, 1:].flatten())
    for site in SITES:
        rows = expected[site][:, 1:].flatten(0, 1)
        assert shard[str(site)].dtype == torch.bfloat16
        torch.testing.assert_close(shard[str(site)].float(), rows, rtol=2**-7, atol=1e-5)


def test_a_massive_row_is_dropped_at_every_site(
    with_massive_x: LoadedModel, tmp_path: Path, contexts, sentences: list[str], token_id
) -> None:
    texts = [text.replace("e", "X") for text in sentences]
    manifest = harvest(with_massive_x, texts, tmp_path, CONFIG)
    tokens = contexts(texts)[:, 1:].flatten()
    massive = tokens == token_id("X")
    assert 0 < massive.sum() < len(tokens) // 4
    shard = load_file(tmp_path / manifest.shards[0])
    assert torch.equal(shard["tokens"].long(), tokens[~massive])
    assert all(len(shard[str(site)]) == len(shard["tokens"]) == manifest.num_rows for site in SITES)


@pytest.mark.parametrize(("max_tokens", "num_contexts"), [(0, 30), (16, 1), (48, 3), (50, 4), (10_000, 30)])
def test_max_tokens_counts_whole_contexts(
    tiny: LoadedModel, tmp_path: Path, max_tokens: int, num_contexts: int
) -> None:
    texts = ["x" * 95] * 5  # 6 contexts each
    assert harvest(tiny, texts, tmp_path, replace(CONFIG, max_tokens=max_tokens)).num_tokens == 16 * num_contexts


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from steerserve.lab import harvest as harvesting
from steerserve.lab.manifest import Manifest
from steerserve.models.loading import load_model
from steerserve.types import Site, Stream

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def die_computing():
    def report(activity, num_tokens, _):
        if activity == "harvesting" and num_tokens == 16 * 13:  # in the third shard
            die()
    return report

def die_writing():
    def write_half(tensors, path):
        write(tensors, path)
        os.truncate(path, path.stat().st_size // 2)
        die()
    write = harvesting.save_file
    harvesting.save_file = write_half
    return lambda *_: None

def die_before_the_manifest():
    Manifest.save = die
    return lambda *_: None

torch.set_num_threads(1)
model = load_model(sys.argv[1], torch.float32)
texts = Path(sys.argv[3]).read_text().splitlines()
sites = tuple(map(Site.parse, sys.argv[4:]))
harvesting.TOKENS_PER_SHARD = 16 * 5
for death in (die_writing, die_before_the_manifest, die_computing, die_writing, die_before_the_manifest):
    child = os.fork()
    if child == 0:
        report = death()
        harvesting.harvest(model, texts, Path(sys.argv[2]), harvesting.HarvestConfig(sites, 16, 3), report)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (death, status)
"""


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five contexts of 16 each."""
    monkeypatch.setattr(harvesting, "TOKENS_PER_SHARD", 16 * 5)


@pytest.mark.usefixtures("small_shards")
def test_a_harvest_that_was_killed_again_and_again_ends_in_the_same_bytes(
    tiny: LoadedModel, tiny_model_dir, tmp_path: Path, sentences: list[str]
) -> None:
    texts, parts = sentences[:14], tmp_path / "parts"
    whole = harvest(tiny, texts, tmp_path / "whole", CONFIG)
    assert len(whole.shards) > 4
    (tmp_path / "texts").write_text("\n".join(texts))
    arguments = [tiny_model_dir("llama"), parts, tmp_path / "texts", *SITES]
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], capture_output=True, text=True)
    assert killed.returncode == 0, killed.stderr
    finished = Manifest.load(parts).shards
    assert 1 <= len(finished) < len(whole.shards)
    before = {name: (parts / name).stat() for name in finished}
    assert harvest(tiny, texts, parts, CONFIG) == whole
    for name in finished:
        after = (parts / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (before[name].st_ino, before[name].st_mtime_ns)
    for file in (*whole.shards, "manifest.json"):
        assert (parts / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert {path.name for path in parts.iterdir()} == {*whole.shards, "manifest.json", ".lock"}


@pytest.mark.usefixtures("small_shards")
def test_rows_say_where_they_come_from(tiny: LoadedModel, tmp_path: Path, contexts, sentences: list[str]) -> None:
    manifest = harvest(tiny, sentences, tmp_path, CONFIG)
    shards = [load_file(tmp_path / name) for name in manifest.shards]
    every_context = torch.cat([shard["input_ids"] for shard in shards])
    assert torch.equal(every_context.long(), contexts(sentences))
    for name, shard in zip(manifest.shards, shards, strict=True):
        assert torch.equal(every_context[shard["context"].long(), shard["position"].long()], shard["tokens"])
        record = manifest.records[name]
        assert torch.equal(every_context[record.first_context :][: record.num_contexts], shard["input_ids"])
        assert (record.num_rows, record.num_bytes) == (len(shard["tokens"]), (tmp_path / name).stat().st_size)
    assert (shards[0]["context"].dtype, shards[0]["position"].dtype) == (torch.int32, torch.int16)


@pytest.mark.usefixtures("small_shards")
def test_a_finished_harvest_is_left_alone_and_can_be_extended(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sentences: list[str]
) -> None:
    config = replace(CONFIG, max_tokens=16 * 7)
    first = harvest(tiny, sentences, tmp_path, config)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(harvesting, "save_file", lambda *_: pytest.fail("wrote a shard again"))
        assert harvest(tiny, sentences, tmp_path, config) == first
        assert harvest(tiny, sentences, tmp_path, replace(CONFIG, max_tokens=16)) == first
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    longer = harvest(tiny, sentences, tmp_path, replace(CONFIG, max_tokens=16 * 20))
    assert [longer.records[name].num_contexts for name in longer.shards] == [5, 2, 5, 5, 3]
    assert longer.num_tokens == 16 * 20
    assert all((tmp_path / name).read_bytes() == before[name] for name in first.shards)
    rows = torch.cat([load_file(tmp_path / name)["context"] for name in longer.shards])
    assert torch.equal(rows, torch.arange(20).repeat_interleave(15).int())


@pytest.mark.usefixtures("small_shards")
def test_other_texts_are_refused(tiny: LoadedModel, tmp_path: Path, sentences: list[str]) -> None:
    harvest(tiny, sentences, tmp_path, replace(CONFIG, max_tokens=16 * 12))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    others = [text.replace("quiet", "silent") for text in sentences]
    for texts, shard in ((others, "shard_0000"), (sentences[1:], "shard_00000"), (sentences[:3], "shard_00001")):
        with pytest.raises(AssetError, match=f"{shard}.*was made of other texts"):
            harvest(tiny, texts, tmp_path, CONFIG)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.usefixtures("small_shards")
def test_a_damaged_shard_is_named_and_made_again_once_deleted(
    tiny: LoadedModel, tmp_path: Path, sentences: list[str]
) -> None:
    manifest = harvest(tiny, sentences, tmp_path, CONFIG)
    second = tmp_path / manifest.shards[1]
    content = second.read_bytes()
    for damaged in (content[:-7], b"", content[:50], b"\xff" * len(content)):
        second.write_bytes(damaged)
        with pytest.raises(AssetError, match=r"shard_00001\.safetensors is damaged .*; delete it and repeat"):
            harvest(tiny, sentences, tmp_path, CONFIG)
    second.unlink()
    with pytest.raises(AssetError, match=r"shard_00001\.safetensors is missing"):
        manifest.check(tmp_path, manifest.shards[1])
    assert harvest(tiny, sentences, tmp_path, CONFIG) == manifest
    assert second.read_bytes() == content


@pytest.mark.usefixtures("small_shards")
def test_a_full_disk_ends_the_harvest_and_spares_what_is_there(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sentences: list[str]
) -> None:
    """The limit on a file's size stands for the disk's: it stops the write itself, after a part of the file."""
    whole = harvest(tiny, sentences, tmp_path / "whole", CONFIG)
    parts, two = tmp_path / "parts", replace(CONFIG, max_tokens=16 * 10)
    harvest(tiny, sentences, parts, two)
    before = {path.name: path.read_bytes() for path in parts.iterdir()}
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(
            AssetError, match=r"shard_00002\.safetensors could not .*; 2 shards with 160 tokens are kept"
        ):
            harvest(tiny, sentences, parts, CONFIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name: path.read_bytes() for path in parts.iterdir()} == before
    assert harvest(tiny, sentences, parts, CONFIG) == whole


@pytest.mark.usefixtures("small_shards")
def test_an_activation_that_is_not_finite_is_named_and_not_written(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sentences: list[str]
) -> None:
    def spoilt(model: LoadedModel, tokens: torch.Tensor, sites: tuple[Site, ...]) -> dict[Site, torch.Tensor]:
        activations = activations_of(model, tokens, sites)
        calls.append(tokens)
        if len(calls) == 4:  # contexts 8 and 9: the second half of the second shard
            activations[SITES[1]][1, 7, 30] = spoil
        return activations

    monkeypatch.setattr(harvesting, "activations_of", spoilt)
    for spoil in (float("nan"), float("inf"), -float("inf")):
        calls: list[torch.Tensor] = []
        directory = tmp_path / str(spoil)
        message = r"shard_00001\.safetensors was not written: blocks\.1\.hook_mlp_out .* context 9, position 7"
        with pytest.raises(AssetError, match=message):
            harvest(tiny, sentences, directory, CONFIG)
        assert Manifest.load(directory).shards == ["shard_00000.safetensors"]
        assert not (directory / "shard_00001.safetensors").exists()


def test_rows_in_other_dtypes(tiny: LoadedModel, tmp_path: Path, contexts, sentences: list[str]) -> None:
    expected = oracle(tiny, contexts(sentences))
    for name, dtype in (("float32", torch.float32), ("float16", torch.float16)):
        manifest = harvest(tiny, sentences, tmp_path / name, replace(CONFIG, dtype=name))
        shard = load_file(tmp_path / name / manifest.shards[0])
        assert manifest.dtype == name
        for site in SITES:
            assert torch.allclose(
                shard[str(site)].float(), expected[site][:, 1:].flatten(0, 1).to(dtype).float(), atol=1e-5
            )
            assert shard[str(site)].dtype == dtype


def test_a_value_beyond_float16_is_refused(with_massive_x: LoadedModel, tmp_path: Path) -> None:
    with torch.no_grad():
        with_massive_x.model.get_input_embeddings().weight *= 1e6
    with pytest.raises(AssetError, match=r"blocks\.0\.hook_resid_pre has values beyond the range of float16"):
        harvest(with_massive_x, ["abc" * 20], tmp_path, replace(CONFIG, dtype="float16"))


def test_two_harvests_do_not_write_to_one_directory(tiny: LoadedModel, tmp_path: Path, sentences: list[str]) -> None:
    with FileLock(tmp_path / ".lock"), pytest.raises(AssetError, match="another process harvests into"):
        harvest(tiny, sentences, tmp_path, CONFIG)


def test_what_cannot_be_harvested(tiny: LoadedModel, tmp_path: Path, sentences: list[str]) -> None:
    out = tmp_path / "x"
    for change, message in (
        ({"sites": ()}, "at least one site"),
        ({"sites": (SITE, SITE)}, "each given once"),
        ({"context_length": 257}, "context_length: got 257, expected 2 to 256"),
        ({"context_length": 1}, "context_length: got 1"),
        ({"dtype": "int8"}, "dtype: got 'int8', expected one of bfloat16, float16, float32"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            harvest(tiny, sentences, out, replace(CONFIG, **change))
    with pytest.raises(AssetError, match="fill no context of 16 tokens"):
        harvest(tiny, ["short"], out, CONFIG)
    assert not out.exists()
    (tmp_path / "file").write_text("")
    for blocked in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(AssetError, match="cannot write to"):
            harvest(tiny, sentences, blocked, CONFIG)


def test_progress_counts_up_to_all_tokens(tiny: LoadedModel, tmp_path: Path, sentences: list[str]) -> None:
    seen: list[tuple[str, int, int]] = []
    manifest = harvest(tiny, sentences, tmp_path, CONFIG, lambda *step: seen.append(step))
    counts = [num_tokens for _, num_tokens, _ in seen]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1], seen[-1][2]) == (0, manifest.num_tokens, manifest.num_tokens)
    assert {activity for activity, *_ in seen} == {"harvesting"}
    seen.clear()
    harvest(tiny, sentences, tmp_path, CONFIG, lambda *step: seen.append(step))
    assert {activity for activity, *_ in seen} == {"checking"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sites": SITES[:1]}, "holds a harvest with sites"),
        ({"context_length": 8}, "holds a harvest with context_length 16, not 8"),
        ({"batch_size": 4}, "holds a harvest with batch_size 3, not 4"),
        ({"dtype": "float32"}, "holds a harvest with dtype bfloat16, not float32"),
    ],
)
def test_a_harvest_of_something_else_is_not_continued(
    tiny: LoadedModel, tmp_path: Path, sentences: list[str], change: dict[str, object], message: str
) -> None:
    harvest(tiny, sentences, tmp_path, CONFIG)
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(AssetError, match=message):
        harvest(tiny, sentences, tmp_path, replace(CONFIG, **change))
    with pytest.raises(AssetError, match="holds a harvest with model_fingerprint"):
        harvest(replace(tiny, fingerprint="0" * 64), sentences, tmp_path, CONFIG)
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_a_site_outside_the_model_is_refused(tiny: LoadedModel, tmp_path: Path, sentences: list[str]) -> None:
    with pytest.raises(IncompatibleError, match=r"blocks\.3\.hook_resid_post.*a layer below 3"):
        harvest(tiny, sentences, tmp_path, replace(CONFIG, sites=(SITE, Site(3, Stream.RESID_POST))))


def test_a_harvest_of_an_earlier_version_is_read_but_not_continued(
    tiny: LoadedModel, tmp_path: Path, sentences: list[str]
) -> None:
    manifest = harvest(tiny, sentences, tmp_path, CONFIG)
    content = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({k: v for k, v in content.items() if k != "records"}))
    assert Manifest.load(tmp_path).shards == manifest.shards
    with pytest.raises(AssetError, match="earlier version"):
        harvest(tiny, sentences, tmp_path, CONFIG)


def test_a_directory_without_a_usable_harvest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="holds no harvest"):
        Manifest.load(tmp_path)
    for content in ("{", "[]", '{"shards": []}', json.dumps({"more": 1})):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(AssetError, match=r"manifest\.json is damaged"):
            Manifest.load(tmp_path)
    Manifest("tiny", "f" * 64, [str(SITE)], 32, 16, dtype="int4").save(tmp_path)
    with pytest.raises(AssetError, match="dtype is 'int4', expected one of bfloat16, float16, float32"):
        Manifest.load(tmp_path)
