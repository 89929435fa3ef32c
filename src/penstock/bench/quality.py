"""What integers cost in answers, ours and llama.cpp's, against the same weights computed in fp32.

Every logit of the text is held: tokens x vocabulary x 4 bytes, twice.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from penstock.bench.hard_models import write_outliers, write_padded
from penstock.bench.sides import run_program
from penstock.bench.venvs import Workshop
from penstock.compress import Quality, Tally, read
from penstock.kernels import make_ops
from penstock.layers import Packing
from penstock.models import Placement, load_decoder
from penstock.spec.hf import read_model_spec
from penstock.spec.location import BUNDLED
from penstock.spec.quantization import Quantization

WINDOW = 512
MODELS: dict[str, Callable[[Path], object]] = {
    "bundled": lambda folder: shutil.copytree(BUNDLED, folder, dirs_exist_ok=True),
    "padded": write_padded,
    "outliers": write_outliers,
}
OURS: dict[str, Quantization] = {"Q8_0": "int8", "Q4_K_M": "int4"}
"""The recipe that stands beside a GGUF type."""
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Row:
    """One way to compute a model. ``ratio``: of its mean divergence to that of llama.cpp's file of the same bits."""

    model: str
    what: str
    quality: Quality
    ratio: float | None = None


def measure_models(
    work: Path, models: list[str], ids: list[int], threads: int, say: Callable[[str], None]
) -> list[Row]:
    """Ours with activations in fp32 and in bf16, from the folder and from llama.cpp's own files."""
    torch.set_num_threads(threads)
    shop, rows = Workshop(work), list[Row]()
    for model in models:
        folder = shop.folder / "models" / f"quality-{model}" / "hf"
        if not (folder / "config.json").is_file():
            MODELS[model](folder)
        reference = ours(folder, folder, "none", "float32", "torch", ids)
        rows += _beside(shop, model, folder, reference, ids, threads, say)
    return rows


def _beside(
    shop: Workshop,
    model: str,
    folder: Path,
    reference: Tensor,
    ids: list[int],
    threads: int,
    say: Callable[[str], None],
) -> list[Row]:
    rows = list[Row]()

    def add(what: str, logits: Tensor, to: Quality | None = None) -> Quality:
        found = compare(reference, logits, ids)
        rows.append(Row(model, what, found, None if to is None else found.kl_mean / to.kl_mean))
        say(f"{model} {what}: {found.kl_mean:.3e}")
        return found

    for dtype in ("float32", "bfloat16"):
        add(f"penstock, {dtype}", ours(folder, folder, "none", dtype, "cpu", ids))
    add("llama.cpp, BF16", theirs(shop, f"quality-{model}", "BF16", ids, threads))
    for form, quantization in OURS.items():
        to = add(f"llama.cpp, {form}", theirs(shop, f"quality-{model}", form, ids, threads))
        gguf = shop.model(f"quality-{model}", form)
        for dtype in ("float32", "bfloat16"):
            add(f"penstock, {quantization}, {dtype}", ours(folder, folder, quantization, dtype, "cpu", ids), to)
            add(f"penstock, {form}, {dtype}", ours(folder, gguf, "none", dtype, "cpu", ids), to)
    return rows


def ours(folder: Path, weights: Path, quantization: Quantization, dtype: str, backend: str, ids: list[int]) -> Tensor:
    """fp32 [len(ids), V]. The spec is the folder's, since llama.cpp's files have no tokenizer here."""
    spec, ops, placement = read_model_spec(folder), make_ops(backend), Placement(getattr(torch, dtype), CPU)
    decoder = load_decoder(weights, spec, ops, placement, Packing(ops, spec, placement, quantization))
    windows = torch.split(torch.tensor(ids), WINDOW)
    return torch.cat([rows.clone() for ids_T in windows for rows in read(decoder, ops, placement, ids_T)])


def theirs(shop: Workshop, shape: str, form: str, ids: list[int], threads: int) -> Tensor:
    gguf = shop.model(shape, form)
    tokens, out = gguf.with_name("ids.npy"), gguf.with_suffix(".npy")
    np.save(tokens, np.array(ids))
    program = ("-m", "penstock.bench.side_llama_logits", str(gguf), str(tokens), str(out), str(WINDOW), str(threads))
    run_program((*shop.importing(), str(shop.python("llama.cpp")), *program))
    return torch.from_numpy(np.load(out))


def compare(reference: Tensor, logits: Tensor, ids: list[int]) -> Quality:
    tally = Tally()
    windows = zip(*(torch.split(x, WINDOW) for x in (reference, logits, torch.tensor(ids))), strict=True)
    for one, other, ids_T in windows:
        tally.add(one, other, ids_T[1:])
    return tally.quality(WINDOW)


def table(rows: list[Row]) -> str:
    head = "| model | computed by | KL, mean | KL, 99 % | same choice | perplexity | ratio to llama.cpp |"
    lines = [head, "| --- | --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        q, ratio = row.quality, "" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append(
            f"| {row.model} | {row.what} | {q.kl_mean:.2e} | {q.kl_p99:.2e} | {q.same_top:.1%}"
            f" | {q.quantized_perplexity:.2f} | {ratio} |"
        )
    return "\n".join(lines)
