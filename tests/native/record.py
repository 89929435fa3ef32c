"""A plugin of pytest: calls of the native kernels with the bytes they read and wrote, in the file PENSTOCK_RECORD, for
``replay.cpp``. Of calls that differ in their data alone one is kept, but for ``quantize``, which goes by its data."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from penstock.kernels import _native

PANEL = 16
BYTES = {0: 4, 1: 2, 2: 2}  # float32, bfloat16, float16
RAW, POINTER, NUMBER, REAL = 3, 0, 1, 2
_native.choose("avx2")

LARGEST = 2 << 20

NAMES: dict[str, list[str]] = {
    "pack": "*weight outputs inputs dtype".split(),
    "quantize": "*weight *codes *scales *zeros groups bits group dtype".split(),
    "pack_grouped": "*codes *scales *zeros *out outputs inputs bits group".split(),
    "embed": "*table *ids *out rows outputs inputs bits group ~factor dtype".split(),
    "linear": ("*x *weight *bias *out rows outputs inputs segments activation gated wide bits group dtype".split()),
    "norm": "*x *residual *weight *bias wide_weight centred *out rows width ~eps ~factor dtype".split(),
    "heads": (
        "*qkv *q_weight *k_weight wide_weight whole_row *rope half *positions *slots *q *k_pool *v_pool *k_scales"
        " *v_scales rows heads kv_heads width block_size ~eps dtype".split()
    ),
    "route": "*logits *chosen *weights rows experts active normalize".split(),
    "experts": (
        "*x *chosen *weights *gate_up *gate_up_bias *down *down_bias *shared *gates *out rows active experts width"
        " inner activation gate_up_bits gate_up_group down_bits down_group dtype".split()
    ),
    "draw": "*logits *limits *sites *tokens rows size".split(),
    "attention": (
        "*q *k_pool *v_pool *k_scales *v_scales *out *tables columns block_size *starts *contexts requests heads"
        " kv_heads width window whole ~scale ~softcap *sinks *slopes dtype".split()
    ),
}
WRITTEN = {"weight": ("pack",), "out": None, "residual": None, "tokens": None, "q": ("heads",)}
WRITTEN |= dict.fromkeys(("chosen", "weights"), ("route",))
WRITTEN |= dict.fromkeys(("codes", "scales", "zeros"), ("quantize",))
WRITTEN |= dict.fromkeys(("k_pool", "v_pool", "k_scales", "v_scales"), ("heads",))


def int64s(address: int, count: int) -> tuple[int, ...]:
    return struct.unpack(f"<{count}q", ctypes.string_at(address, 8 * count))


def matrix_bytes(outputs: int, inputs: int, bits: int, group: int, each: int) -> int:
    """Of a packed weight; ``each`` number of a plain one."""
    return -(-outputs // PANEL) * _native.panel_bytes(inputs, bits, group) if bits else outputs * inputs * each


def sizes(call: str, a: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Bytes, and type of the elements, of each buffer."""
    dtype = a.get("dtype", RAW)
    one, n, k, rows = BYTES.get(dtype, 1), a.get("outputs", 0), a.get("inputs", 0), a.get("rows", 0)
    matrix = matrix_bytes(n, k, a.get("bits", 0), a.get("group", 0), one)
    groups = n * k // a["group"] if a.get("bits") else 0
    match call:
        case "pack":
            return {"weight": (n * k * one, dtype)}
        case "quantize":
            groups, numbers = a["groups"], a["groups"] * a["group"]
            found = {"weight": (numbers * one, dtype), "codes": (numbers, RAW)}
            return found | {"scales": (2 * groups, RAW), "zeros": (groups, RAW)}
        case "embed":
            return {"table": (matrix, RAW), "ids": (8 * rows, RAW), "out": (rows * k * one, dtype)}
        case "draw":
            return {"logits": (4 * rows * a["size"], 0), "limits": (40 * rows, RAW), "sites": (40 * rows, RAW)} | {
                "tokens": (8 * rows, RAW)
            }
        case "pack_grouped":
            return {"codes": (n * k, RAW), "scales": (2 * groups, RAW), "zeros": (groups, RAW), "out": (matrix, RAW)}
        case "linear":
            columns, out = n // 2 if a["gated"] else n, (4, 0) if a["wide"] else (one, dtype)
            found = {"x": (rows * k * one, dtype), "weight": (matrix, RAW), "bias": (n * one, dtype)}
            return found | {"out": (rows * columns * out[0], out[1])}
        case "norm":
            row, weight = (rows * a["width"] * one, dtype), (a["width"] * (4 if a["wide_weight"] else one), RAW)
            return {"x": row, "residual": row, "out": row, "weight": weight, "bias": weight}
        case "route":
            slots = rows * a["active"]
            return {"logits": (rows * a["experts"] * 4, 0), "chosen": (slots * 8, RAW), "weights": (slots * 4, 0)}
        case "experts":
            row, slots = (rows * a["width"] * one, dtype), rows * a["active"]
            count, width, inner = a["experts"], a["width"], a["inner"]
            up = count * matrix_bytes(2 * inner, width, a["gate_up_bits"], a["gate_up_group"], one)
            down = count * matrix_bytes(width, inner, a["down_bits"], a["down_group"], one)
            found = {"x": row, "out": row, "shared": row, "gates": (rows * one, dtype)}
            found |= {"gate_up": (up, RAW), "gate_up_bias": (count * 2 * inner * one, dtype), "down": (down, RAW)}
            found |= {"down_bias": (count * width * one, dtype)}
            return found | {"chosen": (slots * 8, RAW), "weights": (slots * 4, 0)}
    d, kv, size, stored = a["width"], a["kv_heads"], a["block_size"], 1 if a["k_scales"] else one
    if call == "heads":
        slots = int64s(a["slots"], rows)
        blocks, each = max(slots, default=-1) // size + 1, 4 if a["wide_weight"] else one
        many = (a["heads"], kv) if a["whole_row"] else (1, 1)
        last = max(int64s(a["positions"], rows), default=-1)
        own = {
            "qkv": (rows * (a["heads"] + 2 * kv) * d * one, dtype),
            "q_weight": (many[0] * d * each, RAW),
            "k_weight": (many[1] * d * each, RAW),
            "rope": ((last + 1) * 2 * a["half"] * 4, RAW),
            "positions": (8 * rows, RAW),
            "slots": (8 * rows, RAW),
            "q": (rows * a["heads"] * d * one, dtype),
        }
    else:
        count, columns = a["requests"], a["columns"]
        starts, contexts = int64s(a["starts"], count + 1), int64s(a["contexts"], count)
        table = struct.unpack(f"<{count * columns}i", ctypes.string_at(a["tables"], 4 * count * columns))
        used = [table[r * columns + i] for r in range(count) for i in range(-(-contexts[r] // size))]
        blocks = max((b for b in used if b != 2**31 - 1), default=-1) + 1
        row = (starts[-1] * a["heads"] * d * one, dtype)
        own = {"q": row, "out": row, "tables": (4 * len(table), RAW), "starts": (8 * count + 8, RAW)}
        own |= {"contexts": (8 * count, RAW), "sinks": (4 * a["heads"], RAW), "slopes": (4 * a["heads"], RAW)}
    pool, scale = (blocks * kv * d * size * stored, RAW if a["k_scales"] else dtype), (blocks * kv * size * 2, 1)
    return own | {"k_pool": pool, "v_pool": pool, "k_scales": scale, "v_scales": scale}


seen: set[tuple[Any, ...]] = set()
file = open(os.environ["PENSTOCK_RECORD"], "wb")  # noqa: SIM115


def recorded(call: str, native: Callable[..., None]) -> Callable[..., None]:
    names = NAMES[call]

    def run(*arguments: Any) -> None:
        a = {name.strip("*~"): value for name, value in zip(names, arguments, strict=True)}
        key: tuple[Any, ...] = (call, *(bool(v) if n[0] == "*" else v for n, v in zip(names, arguments, strict=True)))
        if call == "quantize":
            key += (ctypes.string_at(a["weight"], sizes(call, a)["weight"][0]),)
        about = sizes(call, a) if key not in seen else {}
        if not about or sum(size for size, _ in about.values()) > LARGEST:
            return native(*arguments)
        seen.add(key)
        at = {name: a[name] for name in about if a[name]}
        before = {name: ctypes.string_at(place, about[name][0]) for name, place in at.items()}
        native(*arguments)
        file.write(struct.pack("<16sq", call.encode(), len(arguments)))
        for name, value in zip(names, arguments, strict=True):
            word = name.strip("*~")
            if name[0] != "*":
                kind = REAL if name[0] == "~" else NUMBER
                file.write(struct.pack("<qd" if kind == REAL else "<qq", kind, value))
                continue
            writes = word in WRITTEN and (WRITTEN[word] is None or call in (WRITTEN[word] or ()))
            size, dtype = about[word] if value else (-1, 0)
            file.write(struct.pack("<qqqq", POINTER, size, dtype, writes))
            if value:
                file.write(before[word])
                file.write(ctypes.string_at(value, size) if writes else b"")
        return None

    return run


_recorder = ModuleType("penstock.kernels._native")
_recorder.__spec__, _recorder.__file__ = _native.__spec__, _native.__file__
for _name in dir(_native):
    if not _name.startswith("__"):
        setattr(_recorder, _name, getattr(_native, _name))
for _name in NAMES:
    setattr(_recorder, _name, recorded(_name, getattr(_native, _name)))
sys.modules["penstock.kernels._native"] = sys.modules["penstock.kernels"]._native = _recorder  # type: ignore[attr-defined]


def pytest_sessionfinish() -> None:
    file.close()
    print(f"\n{len(seen)} calls recorded")
