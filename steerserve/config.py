"""Frozen configuration, resolved once; unknown keys are refused."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class EngineConfig(BaseModel):
    """Sizes the engine allocates for, fixed for its life."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_num_seqs: int = Field(default=16, ge=1)
    """Requests that run at the same time; each owns one row of the KV cache."""

    max_model_len: int = Field(default=1024, ge=2)
    """Longest prompt plus response, in tokens."""

    max_waiting: int = Field(default=256, ge=1)
    """Requests that may queue for a row; one more is refused with ``CapacityError``."""

    max_prefills_per_step: int = Field(default=2, ge=1)
    """Requests admitted in one step: a bound on how long running requests wait for a token."""

    bank_capacity: int = Field(default=4096, ge=1)
    """Distinct features that running and queued requests may use at one site at the same time."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Weights and activations of the model; steering accumulates in float32 either way."""

    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads of the model; None leaves the choice to torch."""


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
