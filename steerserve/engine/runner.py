"""One forward pass: the model, its paged KV cache and the splices, and nothing about requests."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import nn

from steerserve.config import EngineConfig
from steerserve.models.attention import KVStore, PagedAttention
from steerserve.models.loading import LoadedModel
from steerserve.models.rowwise import RowwiseLayers
from steerserve.models.splice import Splicer
from steerserve.types import Site

SCORES_PER_TOKEN = 16
"""Room for scores in a step, on average; a token may use more of it."""

COMPILER_OPTIONS = {"cpp_wrapper": True, "size_asserts": False, "alignment_asserts": False}
"""Calls between kernels in C++ rather than Python, and no checks of what the model's own operators return: 1 ms of a
step of 30 layers."""


class ModelRunner:
    """Runs a model over flat batches: N tokens of any rows, each at its own position of its row.

    A token's logits depend on its row's tokens up to it and on their edits, and on nothing else: not a bit of them
    depends on the other rows, on how a prompt is cut into passes, or on the blocks a row was given.

    The model belongs to the runner until ``close``.

    Attributes:
        kv_store: the cache. Block ids are its third dimension.
        splicer: the buffers in which a step finds its edits.
    """

    def __init__(self, loaded: LoadedModel, config: EngineConfig, sites: Sequence[Site]) -> None:
        """Take the model over, to be steered at ``sites``.

        Raises:
            IncompatibleError: the model's positions depend on the whole batch.
        """
        self._model = model = loaded.model
        self._adapter = loaded.adapter
        self._num_layers = loaded.n_layers
        self._compile = config.compile
        num_tokens = config.max_num_batched_tokens
        self.kv_store = KVStore(
            model.config,
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
            max_num_batched_tokens=num_tokens,
            dtype=model.dtype,
        )
        self.splicer = Splicer(
            model,
            loaded.adapter,
            sites,
            max_tokens=num_tokens,
            max_entries=config.max_step_entries,
            max_scores=SCORES_PER_TOKEN * num_tokens,
        )
        self._undo = ExitStack()
        self._undo.callback(self.kv_store.close)
        self._undo.callback(PagedAttention(model, loaded.adapter, self.kv_store).remove)
        self._undo.callback(RowwiseLayers(model).remove)
        self._undo.callback(self.splicer.remove)
        self._input_ids = torch.zeros(1, num_tokens, dtype=torch.long)
        self._position_ids = torch.zeros(1, num_tokens, dtype=torch.long)
        self._logits_at = torch.zeros(num_tokens, dtype=torch.long)
        self._inputs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._decoders: dict[int, nn.Module] = {}
        self._no_logits = torch.zeros(0, loaded.vocab_size)
        self._is_warm = False

    def warm_up(self) -> float:
        """Run passes of every kind, before the first request; compiles the model if so configured. Once is enough.

        Returns:
            Seconds it took.
        """
        started = time.perf_counter()
        if self._is_warm:
            return 0.0
        if self._compile:
            self.splicer.install()
            decoder = self._model.get_decoder()
            # All sizes are static but the marked ones: ``dynamic`` would trace the model twice, because of its floats.
            # Isolated: else the models of all runners in the process count as recompilations of one function.
            decoder.compile(fullgraph=True, dynamic=False, isolate_recompiles=True, options=COMPILER_OPTIONS)
            self._undo.callback(setattr, decoder, "_compiled_call_impl", None)
        for num_tokens in sorted({1, min(2, self._logits_at.numel()), self._logits_at.numel()}):
            nothing = [0] * num_tokens
            self._forward(nothing, nothing, nothing, logits_at=[0])
        self._is_warm = True
        return time.perf_counter() - started

    def set_blocks(self, row: int, first_index: int, block_ids: Sequence[int]) -> None:
        """Write a row's line of the block table from its ``first_index``-th block on."""
        self.kv_store.block_table.numpy()[row, first_index : first_index + len(block_ids)] = block_ids

    def forward(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        rows: Sequence[int],
        logits_at: Sequence[int],
        num_layers: int | None = None,
    ) -> torch.Tensor:
        """Feed N tokens; float32 logits ``[len(logits_at), vocab]`` at these indices into the batch.

        The tokens of one row stand at consecutive positions, behind what the row holds already. What they follow
        in the batch may be any tokens of other rows.

        Args:
            num_layers: how many layers run at least where no logits are asked for; None: all. Less only for rows of
                which none are ever wanted: they hold these tokens in these layers alone.
        """
        assert self._is_warm or not self._compile, "warm_up compiles the model, and comes first"
        return self._forward(token_ids, positions, rows, logits_at, num_layers)

    def close(self) -> None:
        """Give the model back as it was; a second time changes nothing."""
        self._undo.close()

    def _forward(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        rows: Sequence[int],
        logits_at: Sequence[int],
        num_layers: int | None = None,
    ) -> torch.Tensor:
        num_tokens = len(token_ids)
        self._input_ids.numpy()[0, :num_tokens] = token_ids
        self._position_ids.numpy()[0, :num_tokens] = positions
        self.kv_store.position.numpy()[:num_tokens] = positions
        self.kv_store.row.numpy()[:num_tokens] = rows
        self._logits_at.numpy()[: len(logits_at)] = logits_at
        input_ids, position_ids = self._inputs.get(num_tokens) or self._inputs_of(num_tokens)
        with torch.inference_mode(), self._no_recompilation():
            if not logits_at and not self._compile:  # one graph, with all of the model, is what is compiled
                decoder = self._decoder(self._num_layers if num_layers is None else num_layers)
                decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False)
                return self._no_logits
            output = self._model(
                input_ids=input_ids,
                position_ids=position_ids,
                use_cache=False,
                logits_to_keep=self._logits_at[: len(logits_at)],
            )
            logits: torch.Tensor = output.logits[0].float()
        return logits

    def _decoder(self, num_layers: int) -> nn.Module:
        if num_layers not in self._decoders:
            self._decoders[num_layers] = self._adapter.first_layers(self._model, num_layers)
        return self._decoders[num_layers]

    def _inputs_of(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The inputs cut to size, each made once: what the compiler is told about a size is told about the tensor."""
        # Through NumPy: of a view, the compiler would want to know the base as well.
        input_ids, position_ids = (
            torch.from_numpy(buffer.numpy()[:, :num_tokens]) for buffer in (self._input_ids, self._position_ids)
        )
        if self._compile:
            for tensor in (input_ids, position_ids):
                # One graph for every size, 1 included: the same code, and so the same bits.
                torch._dynamo.decorators.mark_unbacked(tensor, 1)
        self._inputs[num_tokens] = input_ids, position_ids
        return input_ids, position_ids

    def _no_recompilation(self) -> AbstractContextManager[None]:
        if self._compile and self._is_warm:
            stance: AbstractContextManager[None] = torch.compiler.set_stance("fail_on_recompile")
            return stance
        return nullcontext()
