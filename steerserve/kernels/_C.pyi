"""Signatures of csrc/bind_ops.h; csrc/ops.h says what the arguments mean."""

from torch import Tensor

def steer_delta(
    x: Tensor,
    ptr: Tensor,
    slot: Tensor,
    op: Tensor,
    value: Tensor,
    score_index: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    max_norm: Tensor,
    normalization: Tensor,
    W_dec: Tensor,
    score_ptr: Tensor,
    score_threshold: Tensor,
    score: Tensor,
    activation: Tensor,
    edit: Tensor,
    x_norm: Tensor,
    num_threads: int,
    /,
) -> None: ...
def sae_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    max_norm: float,
    k: int,
    indices: Tensor,
    values: Tensor,
    count: Tensor,
    workspace: int,
    num_threads: int,
    /,
) -> None: ...
def sae_decode(
    indices: Tensor, values: Tensor, count: Tensor, W_dec: Tensor, b_dec: Tensor, out: Tensor, num_threads: int, /
) -> None: ...
def sae_splice(
    x: Tensor,
    rows: Tensor,
    ptr: Tensor,
    feature: Tensor,
    op: Tensor,
    value: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    max_norm: float,
    normalization: int,
    k: int,
    indices: Tensor,
    values: Tensor,
    count: Tensor,
    activation: Tensor,
    edit: Tensor,
    x_norm: Tensor,
    workspace: int,
    num_threads: int,
    /,
) -> None: ...
def head_scale(z: Tensor, ptr: Tensor, head: Tensor, scale: Tensor, z_norm: Tensor, num_threads: int, /) -> None: ...
def register_torch_kernels() -> None: ...
def open_attention(k_cache: Tensor, v_cache: Tensor, block_table: Tensor, row: Tensor, position: Tensor, /) -> int: ...
def close_attention(handle: int, /) -> None: ...
def simd_level() -> str: ...
def supported_simd_levels() -> list[str]: ...
def set_simd_level(name: str, /) -> None: ...
