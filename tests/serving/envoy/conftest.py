"""A server whose policy knows three words. ``data_plane`` lies beside the tests that import it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from steerserve.models.loading import checkpoint_fingerprint
from steerserve.steering.pack_files import save_pack
from steerserve.steering.packs import DetectorCard, ModelRef, PackCard, PackTensors, PolicyAction
from steerserve.types import Op

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("data_plane")

from data_plane import DataPlane  # noqa: E402

SITE = "blocks.0.hook_resid_pre"
"""What is read there is the token's embedding, and nothing else."""
WORDS = {"wind": "flag", "rain": "redact", "storm": "block"}
POLICY = """
format: steerserve.policy/1
name: weather
version: "1"
rules:
"""


@pytest.fixture(scope="session")
def weather(tiny, tokenizer, tmp_path_factory) -> dict[str, object]:
    """What a server's configuration needs for the policy ``weather``: each word is a concept with an action."""
    root = tmp_path_factory.mktemp("weather")
    for word in WORDS:
        _save_word(root / word, word, tiny, tokenizer)
    rules = "".join(f"  - {{concept: {word}, action: {action}}}\n" for word, action in WORDS.items())
    (root / "policies").mkdir()
    (root / "policies" / "weather.yaml").write_text(POLICY + rules)
    return {
        "packs": tuple(str(root / word) for word in WORDS),
        "saes": (),
        "policies": {"directory": str(root / "policies")},
        "envoy": {"policies": ("weather",)},
    }


def _save_word(directory: Path, word: str, tiny, tokenizer) -> None:
    """A pack whose score is 1 where the token is the word, with or without a space before it, far less elsewhere."""
    ids = [tokenizer(text)["input_ids"] for text in (f" {word}", word)]
    assert [len(tokens) for tokens in ids] == [1, 1]
    embeddings = tiny.unembedding[[tokens[0] for tokens in ids]].numpy()  # tied
    reads = np.linalg.pinv(embeddings).T.astype(np.float32)
    one = np.ones(2, dtype=np.float32)
    card = PackCard(
        name=word,
        version="1",
        description=f"the word {word}",
        model=ModelRef(name="tiny-llama", fingerprint=checkpoint_fingerprint(tiny.model)),
        sites=[SITE],
        policy=PolicyAction(op=Op.MONITOR),
        detector=DetectorCard(kind="features", site=SITE, threshold=0.9),
    )
    tensors = PackTensors(
        site=np.zeros(2, dtype=np.int64), edited=np.zeros(2, dtype=bool), W_enc=reads, b_enc=0 * one,
        threshold=-np.inf * one, max_norm=np.inf * one, W_dec=0 * reads, value=0 * one, weight=one,
        max_activation=one, feature_ids=np.array([-1, -1]),
    )  # fmt: skip
    save_pack(card, tensors, directory)


@pytest.fixture(scope="session")
def envoy_server(start_server, tiny, weather):
    """One server that all tests share; tests that break theirs start their own."""
    with start_server(tiny.config(**weather), max_model_len=256) as running:
        yield running


@pytest.fixture
def plane(envoy_server) -> Iterator[DataPlane]:
    with DataPlane(envoy_server.address) as connected:
        yield connected
