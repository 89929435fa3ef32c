"""Who is compared on what, each in the ways its own documentation recommends; the best of a peer's ways counts."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from pathlib import Path

import torch

from penstock.bench.job import Job, Run
from penstock.bench.sides import HERE, command
from penstock.bench.venvs import PINS, Workshop
from penstock.spec import ModelSpec
from penstock.spec.sizing import kv_bytes_per_token

OURS = "penstock"
ASIDE = ("bench", "cli", "serving", "train")
PAGE = 16
"""Tokens by which the KV of a request is rounded up."""


@dataclass(frozen=True, slots=True)
class Cell:
    """``prompts`` at once of ``inputs`` tokens, ``outputs`` tokens each, the first ``shared`` in common.

    Attributes:
        unit: what is counted. "s" is the time from where loading began to the end of the warm-up, imports not counted.
    """

    prompts: int
    inputs: int
    outputs: int
    shared: int = 0
    unit: str = "tokens/s"

    def speed(self, run: Run) -> float:
        """In the cell's unit; of seconds, one over them: more is better."""
        if self.unit == "s":
            return 1 / (run.loaded_s or run.ready_s)
        return (self.prompts * self.inputs if self.unit == "prompt tokens/s" else run.tokens) / run.seconds


CELLS = {
    "decode": Cell(1, 16, 128),
    "prefill512": Cell(1, 512, 1, unit="prompt tokens/s"),
    "prefill4096": Cell(1, 4096, 1, unit="prompt tokens/s"),
    "batch8": Cell(8, 128, 128),
    "batch32": Cell(32, 128, 128),
    "prefix32": Cell(32, 2000, 64, shared=1500),
    "load": Cell(1, 16, 1, unit="s"),
}


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run a contender: the form it gets the weights in (``venvs.Workshop.model``), and its own options."""

    peer: str
    form: str
    options: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return " ".join((self.form, *(f"{name}={value}" for name, value in self.options.items())))


def settings(peer: str, bits: int, *, fast_bf16: bool) -> list[Setting]:
    """A peer without weights of so few bits gets its next wider ones; the form says which.

    Args:
        fast_bf16: this processor multiplies bf16 faster than fp32; where not, it is often a hundred times slower.
    """
    wide = {} if fast_bf16 else {"dtype": "float32"}
    if peer == "llama.cpp":
        ways = ({"flash_attn": "off"}, {"flash_attn": "on"}, {"flash_attn": "on", "kv": "q8_0"})
        forms = {16: ("BF16",), 8: ("Q8_0",), 4: ("Q4_0", "Q4_K_M")}[bits]
        return [Setting(peer, form, way) for form in forms for way in ways]
    if peer == "openvino":
        return [Setting(peer, {16: "ov-fp16", 8: "ov-int8", 4: "ov-int4"}[bits])]
    if peer == "vllm":
        return [Setting(peer, "hf" if bits == 16 else "w8a8", wide)]
    if peer == OURS and bits < 16:
        return [Setting(peer, "hf", {"quant": f"int{bits}"} | kv) for kv in ({"kv_dtype": "int8"}, {})]
    return [Setting(peer, "hf", {} if peer == OURS else wide)]


def make_job(spec: ModelSpec, cell: Cell, model: Path, threads: int, options: dict[str, str]) -> Job:
    own = -(-(cell.inputs - cell.shared + cell.outputs) // PAGE) + 1
    tokens = cell.shared + (cell.prompts + 2) * own * PAGE  # two more for the warm-up, whose prefix is another
    return Job(
        model=str(model),
        prompts=cell.prompts,
        inputs=cell.inputs,
        outputs=cell.outputs,
        threads=threads,
        vocab_size=spec.vocab_size,
        kv_bytes=(tokens + cell.shared) * kv_bytes_per_token(spec, spec.dtype),
        shared=cell.shared,
        options=options,
    )


def argv(shop: Workshop, setting: Setting, job: Job) -> tuple[str, ...]:
    """The command of a run; makes the venv if need be."""
    threads = str(job.threads)
    if setting.peer in HERE:
        return command(setting.peer, job)
    variables = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    python = shop.python(setting.peer)
    if setting.peer == "vllm":
        variables["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{job.threads - 1}"
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the memory measured is this process's
        variables["VLLM_CACHE_ROOT"] = str(shop.folder / "vllm_cache")
        found = [python.parents[1] / "lib" / "libiomp5.so", *Path("/usr/lib").glob("*/libtcmalloc*.so.4")]
        variables["LD_PRELOAD"] = ":".join(str(path) for path in found if path.is_file())
    return command(setting.peer, job, (*shop.importing(**variables), str(python), "-P"))


@cache
def version(peer: str) -> str:
    """What a contender's results are filed under; for our own, every file counts that a request can meet."""
    if peer in PINS:
        return PINS[peer][0]
    if peer != OURS:
        return f"{peer}=={importlib.metadata.version(peer)}"
    digest = blake2b(digest_size=4)
    for path in sorted(_own_files()):
        digest.update(path.read_bytes())
    return f"{peer}=={importlib.metadata.version(peer)}+{digest.hexdigest()}"


def _own_files() -> list[Path]:
    package = Path(__file__).parents[1]
    native = importlib.metadata.distribution(OURS).files or []
    sources = [path for path in package.rglob("*.py") if path.relative_to(package).parts[0] not in ASIDE]
    return [*sources, *(Path(str(path.locate())) for path in native if path.suffix == ".so")]


@cache
def machine() -> str:
    """The processor, as far as its speed goes."""
    capability = torch.backends.cpu.get_cpu_capability()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    words = [
        found[1] if (found := re.search(rf"^{key}\s*: (.+)$", text, re.MULTILINE)) else "?"
        for key in ("vendor_id", "cpu family", "model")
    ]
    return f"{platform.system()} {platform.machine()}, {words[0]} family {words[1]} model {words[2]}, {capability}"
