"""Frozen configuration, resolved once; unknown keys are refused."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator


class EngineConfig(BaseModel):
    """Sizes the engine allocates for, fixed for its life."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    max_num_seqs: int = Field(default=16, ge=1)
    """Requests that run at the same time."""

    max_model_len: int = Field(default=1024, ge=2)
    """Longest prompt plus response, in tokens."""

    max_waiting: int = Field(default=256, ge=1)
    """Requests that may queue; one more is refused with ``CapacityError``."""

    max_num_batched_tokens: int = Field(default=128, ge=1)
    """Tokens of one step. Running requests come first; what is left is for prompts, so that it bounds how long a
    prompt can hold up a stream."""

    block_size: int = Field(default=16, ge=1)
    """Positions of a KV cache block, the unit in which requests take memory and share prefixes."""

    kv_cache_tokens: int | None = Field(default=None, ge=1)
    """Positions the KV cache has room for; None: all that ``max_num_seqs`` requests can need. With less, requests
    are preempted when it is full and computed again later."""

    enable_prefix_caching: bool = True
    """Requests that begin alike, with the same effective edits, share what was computed."""

    bank_capacity: int = Field(default=4096, ge=1)
    """Distinct features that running and queued requests may use at one site at the same time."""

    max_step_entries: int = Field(default=65536, ge=1)
    """Pairs of a token and a feature that one step may have at one site; bounds a step's tokens under large plans."""

    sites: tuple[str, ...] | None = None
    """Sites that can be steered; None: all, or with ``compile`` those of the loaded SAEs and packs."""

    compile: bool = False
    """Compile the model with torch.compile: faster steps for a minute or more of warm-up, less once it is cached."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Weights and activations of the model; steering accumulates in float32 either way."""

    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads of the model; None leaves the choice to torch."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV cache."""
        if self.kv_cache_tokens is None:
            return self.max_num_seqs * self.max_blocks
        return self.kv_cache_tokens // self.block_size

    @property
    def max_blocks(self) -> int:
        """Blocks of the longest request."""
        return -(-self.max_model_len // self.block_size)

    @field_validator("max_num_batched_tokens")
    @classmethod
    def _one_token_for_each_request(cls, value: int, info: ValidationInfo) -> int:
        max_num_seqs = info.data.get("max_num_seqs", 1)
        if value < max_num_seqs:
            raise ValueError(f"at least max_num_seqs, {max_num_seqs}: every running request needs a token of each step")
        return value

    @field_validator("kv_cache_tokens")
    @classmethod
    def _room_for_one_request(cls, value: int | None, info: ValidationInfo) -> int | None:
        block_size = info.data.get("block_size", 1)
        needed = -(-info.data.get("max_model_len", 0) // block_size) * block_size
        if value is not None and value < needed:
            raise ValueError(f"at least {needed}, room for one request of max_model_len")
        return value


class ServerConfig(BaseModel):
    """What one server loads and where it listens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "smollm2-135m-instruct"
    """A name ``steerserve models list`` knows, a Hugging Face id, or a local directory."""

    packs: tuple[str, ...] | None = None
    """Concept packs, by built-in name or directory; None loads every built-in pack made for the model."""

    saes: tuple[str, ...] | None = None
    """Sparse autoencoders, by built-in name or directory; None loads every built-in one made for the model."""

    host: str = "127.0.0.1"
    """Address to listen on. There is no authentication: leave loopback only inside a trusted network."""

    port: int = Field(default=50051, ge=0, le=65535)
    """0 lets the operating system choose; the bound port is reported."""

    drain_timeout_s: float = Field(default=30.0, ge=0)
    """Seconds that running requests get to finish after SIGTERM."""

    max_message_bytes: int = Field(default=4 << 20, ge=1 << 16)
    """Largest request the server reads."""
