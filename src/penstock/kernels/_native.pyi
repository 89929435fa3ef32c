"""The extension module: addresses and sizes, unchecked. ``csrc/cpu/kernels.h`` says what they are."""

def usable() -> list[str]: ...
def choose(name: str) -> None: ...
def chosen() -> str: ...
def set_threads(count: int) -> None: ...
def threads() -> int: ...
def pack(weight: int, outputs: int, inputs: int, dtype: int) -> None: ...
def panel_bytes(inputs: int, bits: int, group: int) -> int: ...
def quantize(
    weight: int, codes: int, scales: int, zeros: int, groups: int, bits: int, group: int, dtype: int
) -> None: ...
def pack_grouped(
    codes: int, scales: int, zeros: int, out: int, outputs: int, inputs: int, bits: int, group: int
) -> None: ...
def embed(
    table: int,
    ids: int,
    out: int,
    rows: int,
    outputs: int,
    inputs: int,
    bits: int,
    group: int,
    factor: float,
    dtype: int,
) -> None: ...
def linear(
    x: int,
    weight: int,
    bias: int,
    out: int,
    rows: int,
    outputs: int,
    inputs: int,
    segments: int,
    activation: int,
    gated: bool,
    wide: bool,
    bits: int,
    group: int,
    dtype: int,
) -> None: ...
def norm(
    x: int,
    residual: int,
    weight: int,
    bias: int,
    wide_weight: bool,
    centred: bool,
    out: int,
    rows: int,
    width: int,
    eps: float,
    factor: float,
    dtype: int,
) -> None: ...
def heads(
    qkv: int,
    q_weight: int,
    k_weight: int,
    wide_weight: bool,
    whole_row: bool,
    rope: int,
    half: int,
    positions: int,
    slots: int,
    q: int,
    k_pool: int,
    v_pool: int,
    k_scales: int,
    v_scales: int,
    rows: int,
    heads: int,
    kv_heads: int,
    width: int,
    block_size: int,
    eps: float,
    dtype: int,
) -> None: ...
def attention(
    q: int,
    k_pool: int,
    v_pool: int,
    k_scales: int,
    v_scales: int,
    out: int,
    tables: int,
    columns: int,
    block_size: int,
    starts: int,
    contexts: int,
    requests: int,
    heads: int,
    kv_heads: int,
    width: int,
    window: int,
    whole: bool,
    scale: float,
    softcap: float,
    sinks: int,
    slopes: int,
    dtype: int,
) -> None: ...
def route(logits: int, chosen: int, weights: int, rows: int, experts: int, active: int, normalize: bool) -> None: ...
def experts(
    x: int,
    chosen: int,
    weights: int,
    gate_up: int,
    gate_up_bias: int,
    down: int,
    down_bias: int,
    shared: int,
    gates: int,
    out: int,
    rows: int,
    active: int,
    experts: int,
    width: int,
    inner: int,
    activation: int,
    gate_up_bits: int,
    gate_up_group: int,
    down_bits: int,
    down_group: int,
    dtype: int,
) -> None: ...
def draw(logits: int, limits: int, sites: int, tokens: int, rows: int, size: int) -> None: ...

class Step: ...

def step(
    rows: int,
    requests: int,
    ids: int,
    positions: int,
    starts: int,
    contexts: int,
    groups: list[tuple[int, int, int]],
) -> Step: ...

class Tape:
    def __init__(self) -> None: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def lay_out(self, then: Step, limit: int, results: list[int]) -> list[int]: ...
    def bind(self, memory: int) -> None: ...
    def replay(self, now: Step) -> None: ...
