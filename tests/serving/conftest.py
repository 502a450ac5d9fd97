"""A tiny model whose answer under steering can be worked out by hand, behind a real server on a real socket.

The model is a random Llama. Its steered features write the unembedding of one token into the last layer's
output, far longer than anything else there: whatever is in the context, that token is the answer. The
policy's feature is longer still.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from steerserve import SteerserveClient
from steerserve.config import EngineConfig, ServerConfig
from steerserve.engine.engine import Engine
from steerserve.models.loading import checkpoint_fingerprint
from steerserve.sae.formats.saelens import save_sae
from steerserve.sae.model import SAE
from steerserve.serving.app import Server, load_engine
from steerserve.steering.pack_files import save_pack
from steerserve.steering.packs import DetectorCard, ModelRef, PackCard, PackTensors, PolicyAction
from steerserve.types import Op, Site, Stream

STRENGTH = 1000.0
D_SAE = 32
MAX_MODEL_LEN = 1 << 15  # a response that nobody ends takes longer than ``wait_until`` waits


@dataclass(frozen=True)
class Tiny:
    """The model directory, what was made for it, and which token each feature forces.

    Attributes:
        unembedding: ``[vocab, d]``.
        feature_token: token that feature j of the SAE forces.
        policy_token: token that the pack's policy forces.
    """

    model: Path
    sae: Path
    pack: Path
    site: Site
    unembedding: torch.Tensor
    feature_token: tuple[int, ...]
    policy_token: int

    def config(self, **changes: object) -> ServerConfig:
        values = {"model": str(self.model), "saes": (str(self.sae),), "packs": (str(self.pack),), "port": 0}
        return ServerConfig(**(values | changes))

    def arguments(self) -> list[str]:
        return [
            "--model",
            str(self.model),
            "--sae",
            str(self.sae),
            "--pack",
            str(self.pack),
            "--port",
            "0",
            "--max-model-len",
            str(MAX_MODEL_LEN),
        ]


@pytest.fixture(scope="session")
def tokenizer(smollm2_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Tiny:
    root = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=MAX_MODEL_LEN, tie_word_embeddings=True, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.model.norm.weight.data.fill_(20.0)  # sharp enough that a forced token is also the one that is drawn
    model.save_pretrained(root / "tiny-llama")
    tokenizer.save_pretrained(root / "tiny-llama")
    unembedding = model.lm_head.weight.detach()
    site = Site(layer=2, stream=Stream.RESID_POST)
    feature_token = tuple(range(1000, 1000 + D_SAE))
    policy_token = 3000
    save_sae(_sae(site, unembedding[list(feature_token)]), root / "tiny-sae", dtype=torch.float32)
    _save_pack(root, site, unembedding[policy_token])
    return Tiny(root / "tiny-llama", root / "tiny-sae", root / "mood", site, unembedding, feature_token, policy_token)


def _sae(site: Site, decoder: torch.Tensor) -> SAE:
    d_sae, d_model = decoder.shape
    return SAE(
        name="tiny-sae",
        site=site,
        W_enc=torch.randn(d_model, d_sae),
        b_enc=torch.zeros(d_sae),
        W_dec=decoder / decoder.norm(dim=1, keepdim=True),
        b_dec=torch.zeros(d_model),
        threshold=torch.zeros(d_sae),
        max_activation=torch.full((d_sae,), STRENGTH),
    )


def _save_pack(root: Path, site: Site, towards: torch.Tensor) -> None:
    unit = (towards / towards.norm()).numpy()[None]
    one = np.ones(1, dtype=np.float32)
    card = PackCard(
        name="mood",
        version="1",
        description="forces one token",
        model=ModelRef(name="tiny-llama", fingerprint=checkpoint_fingerprint(root / "tiny-llama")),
        sites=[str(site)],
        policy=PolicyAction(op=Op.CLAMP, always=True),
        detector=DetectorCard(kind="features", site=str(site), threshold=0.0),
        evaluation={"rate": 0.5},
    )
    tensors = PackTensors(
        site=np.zeros(1, dtype=np.int64), edited=np.ones(1, dtype=bool),
        W_enc=unit, b_enc=0 * one, threshold=-np.inf * one, max_norm=np.inf * one, W_dec=unit,
        value=10 * STRENGTH * one, weight=one, max_activation=STRENGTH * one, feature_ids=np.array([-1]),
    )  # fmt: skip
    save_pack(card, tensors, root / "mood")


class RunningServer:
    """A server in an event loop of its own thread."""

    def __init__(self, config: ServerConfig, engine_config: EngineConfig) -> None:
        self.engine: Engine = load_engine(config, engine_config)
        self._config = config
        self._ready = threading.Event()
        self._stop: Callable[[], None] = lambda: None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self._ready.wait(60)
        if self._failure is not None:
            raise self._failure

    def begin_stop(self) -> None:
        """As SIGTERM does."""
        with suppress(RuntimeError):  # it has stopped
            self._stop()

    def stop(self) -> None:
        self.begin_stop()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as failure:
            self._failure = failure
            self._ready.set()

    async def _serve(self) -> None:
        server = Server(self.engine, self._config)
        await server.start()
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        self._stop = lambda: loop.call_soon_threadsafe(stop.set) and None
        self.address = server.address
        self.http_address = server.http_address
        self.metrics_address = server.metrics_address
        self.admin_address = server.admin_address
        self._ready.set()
        await stop.wait()
        await server.stop()


StartServer = Callable[..., AbstractContextManager[RunningServer]]


@pytest.fixture(scope="session")
def start_server(tiny: Tiny) -> StartServer:
    """A context manager that serves the tiny model; keyword arguments change its ``EngineConfig``."""

    @contextmanager
    def start(config: ServerConfig | None = None, **engine_values: object) -> Iterator[RunningServer]:
        values = {
            "dtype": "float32",
            "num_threads": 1,
            "max_num_seqs": 4,
            "max_model_len": MAX_MODEL_LEN,
        } | engine_values
        server = RunningServer(config or tiny.config(), EngineConfig(**values))
        try:
            yield server
        finally:
            server.stop()

    return start


@pytest.fixture(scope="session")
def server(start_server: StartServer) -> Iterator[RunningServer]:
    """One server that all tests share; tests that break theirs start their own."""
    with start_server() as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[SteerserveClient]:
    with SteerserveClient(server.address) as connected:
        yield connected


@pytest.fixture(scope="session")
def spawn_server() -> Callable[[list[str]], AbstractContextManager[tuple[subprocess.Popen[str], str]]]:
    """A context manager that runs ``steerserve serve`` in a process of its own: the process and its address."""

    @contextmanager
    def spawn(arguments: list[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
        command = [sys.executable, "-m", "steerserve", "serve", *arguments, "--num-threads", "1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                yield process, process.stdout.readline().split()[-1]
            finally:
                process.kill()

    return spawn


@pytest.fixture(scope="session")
def wait_until() -> Callable[[Callable[[], bool]], None]:
    """Poll a condition until it holds; fails the test if it does not within 20 seconds."""

    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, "timed out"
            time.sleep(0.02)

    return wait
