"""Frozen configuration, resolved once; unknown keys are refused."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator


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


class HttpConfig(BaseModel):
    """The OpenAI-compatible HTTP interface."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    port: int | None = Field(default=None, ge=0, le=65535)
    """None: there is no HTTP. 0 lets the operating system choose; the bound port is reported."""

    host: str = "127.0.0.1"
    """Address to listen on."""

    default_max_tokens: int = Field(default=256, ge=1)
    """Most tokens of a chat completion that does not say."""

    read_timeout_s: float = Field(default=30.0, gt=0)
    """For a request's headers to arrive, and then for its body."""

    write_timeout_s: float = Field(default=30.0, gt=0)
    """For a client to take the next piece of a stream; one that reads no more is hung up on, and its slot freed."""


class PolicyConfig(BaseModel):
    """Where policies come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    directory: str | None = None
    """Directory of ``*.yaml`` files, or one file; None: the built-in policies whose concepts are loaded."""

    watch_s: float = Field(default=2.0, ge=0)
    """Seconds between two looks at the files, which are read again when they have changed; 0: on SIGHUP alone."""


class EnvoyConfig(BaseModel):
    """Checks of another model's traffic, as an external processor of Envoy on the gRPC port."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policies: tuple[str, ...] = ()
    """Policies whose rules judge requests and answers, as name or name@version; none: the service is off."""

    fail_open: bool = False
    """What cannot be read or judged passes unchecked; otherwise it is refused."""

    hold_back: int = Field(default=32, ge=1)
    """Characters of a streamed answer that are collected before they are judged, and held until then."""


class AccessConfig(BaseModel):
    """Who may call the server, and how the wire is protected."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str | None = None
    """YAML file of tenants and keys; None: everyone may ask everything, on loopback alone."""

    insecure_bind: bool = False
    """Listen on other addresses than loopback though there are no keys, or no TLS."""

    certificate: str | None = None
    """PEM file of the server's certificate chain; with ``private_key``, gRPC and HTTP speak TLS alone."""

    private_key: str | None = None
    """PEM file of its key."""

    client_ca: str | None = None
    """PEM file of the authorities of client certificates; with it every client of gRPC and HTTP must show one."""

    admin_port: int | None = Field(default=None, ge=0, le=65535)
    """Port of ``PolicyService``, which then is on no other; None: it is on the port of gRPC."""

    admin_host: str = "127.0.0.1"
    """Address of that port."""

    @model_validator(mode="after")
    def _certificate_and_key(self) -> Self:
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("private_key and certificate: expected both or neither")
        if self.client_ca is not None and self.certificate is None:
            raise ValueError("client_ca: expected a certificate too")
        return self


class TelemetryConfig(BaseModel):
    """What operators see of the server."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Port of Prometheus' ``/metrics``; None: there is none. 0 lets the operating system choose."""

    metrics_host: str = "127.0.0.1"
    """Address of the metrics; they tell tenants' names and traffic, and ask for no key."""

    traces: bool = False
    """Send OpenTelemetry spans to where the ``OTEL_*`` environment variables say."""

    log_format: Literal["console", "json"] = "console"
    """Form of the log, which goes to standard error."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """INFO has a line for each request."""

    hang_s: float = Field(default=300.0, gt=0)
    """A step of the engine that takes longer has hung: liveness turns NOT_SERVING, so that the server is restarted."""


class AuditConfig(BaseModel):
    """The log of all exchanges, and what proves that it is whole; see docs/audit.md."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    directory: str | None = None
    """Where the log is kept; None: there is none."""

    key: str | None = None
    """File of the key of its MACs and hashes, as ``steerserve audit key create`` makes it."""

    heads: str | None = None
    """File of its signed heads: on another machine's disk, or at least out of the reach of who can write the log."""

    signing_key: str | None = None
    """File of the private key that signs the heads."""

    heads_to_log: bool = False
    """Write each head to the server's own log as well."""

    head_records: int = Field(default=1000, ge=1)
    """Records after which a head is exported."""

    head_interval_s: float = Field(default=10.0, gt=0)
    """Seconds after which it is, if there is a new record."""

    fsync: Literal["always", "interval", "never"] = "always"
    """``always``: no answer ends before the disk has its record. Otherwise a crash of the machine may lose records:
    those of ``fsync_interval_s``, or what the operating system still held; never any below an exported head."""

    fsync_interval_s: float = Field(default=1.0, gt=0)
    """Seconds between two fsyncs under ``interval``."""

    max_file_bytes: int = Field(default=64 << 20, ge=1 << 12)
    """A file that has become as large is followed by a new one."""

    rotate_daily: bool = True
    """So is a file of another day (UTC)."""

    log_text: bool = False
    """Record prompts and responses themselves, not only their keyed hashes."""

    on_failure: Literal["refuse", "serve"] = "refuse"
    """What happens while the log cannot be written: requests end with UNAVAILABLE, or are served without a record."""

    @model_validator(mode="after")
    def _has_its_keys(self) -> Self:
        if self.directory is not None and self.key is None:
            raise ValueError("audit.key is needed for audit.directory; `steerserve audit key create` makes one")
        if (self.heads is None) is not (self.signing_key is None):
            raise ValueError("audit.heads and audit.signing_key are needed both, or neither")
        return self


class ServerConfig(BaseModel):
    """What one server loads and where it listens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "smollm2-135m-instruct"
    """A name ``steerserve models list`` knows, a Hugging Face id, or a local directory."""

    packs: tuple[str, ...] | None = None
    """Concept packs, by built-in name or directory; None loads every built-in pack made for the model."""

    saes: tuple[str, ...] | None = None
    """Sparse autoencoders, by built-in name or directory; None loads every built-in one made for the model."""

    policies: PolicyConfig = PolicyConfig()
    """Policies beside those that the packs are."""

    monitor_plan: str | None = None
    """Monitor plan, a file or a built-in one: what is read of every response, docs/circuits.md; None: nothing."""

    host: str = "127.0.0.1"
    """Address to listen on; others than loopback need keys and TLS, or ``access.insecure_bind``."""

    port: int = Field(default=50051, ge=0, le=65535)
    """0 lets the operating system choose; the bound port is reported."""

    drain_timeout_s: float = Field(default=30.0, ge=0)
    """Seconds that running requests get to finish after SIGTERM."""

    max_message_bytes: int = Field(default=4 << 20, ge=1 << 16)
    """Largest request the server reads."""

    http: HttpConfig = HttpConfig()
    """The HTTP interface beside gRPC; off unless it has a port."""

    envoy: EnvoyConfig = EnvoyConfig()
    """The external processor for Envoy; off unless it has policies."""

    access: AccessConfig = AccessConfig()
    """Keys and TLS."""

    telemetry: TelemetryConfig = TelemetryConfig()
    """Metrics, log and traces."""

    audit: AuditConfig = AuditConfig()
    """The log of all exchanges; off unless it has a directory."""
