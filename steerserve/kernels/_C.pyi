def steer_delta(
    x: int,
    x_is_bf16: bool,
    x_row_stride: int,
    num_rows: int,
    d: int,
    ptr: int,
    num_stages: int,
    slot: int,
    op: int,
    value: int,
    nnz: int,
    W_enc: int,
    b_enc: int,
    threshold: int,
    max_norm: int,
    W_dec: int,
    num_slots: int,
    activation: int,
    edit: int,
    x_norm: int,
    num_threads: int,
    /,
) -> None: ...
def simd_level() -> str: ...
def supported_simd_levels() -> list[str]: ...
def set_simd_level(name: str, /) -> None: ...
