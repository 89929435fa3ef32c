"""What this machine allows the requests that were sent, beside what they took. Loads torch."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.bench.job import Job
from penstock.bench.limits import Limits, limit_seconds, measure_limits
from penstock.bench.load.metrics import Figures
from penstock.bench.load.report import Share
from penstock.runtime.host import cpu_count
from penstock.spec import ModelSpec

QUANT_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Ceiling:
    """Attributes:
    bits: of a weight.
    """

    spec: ModelSpec
    bits: int
    threads: int
    limits: Limits

    @classmethod
    def measure(cls, spec: ModelSpec, quant: str, dtype: str, threads: int | None) -> Ceiling:
        bits = QUANT_BITS.get(quant) or (32 if "float32" in (dtype, spec.dtype if dtype == "auto" else "") else 16)
        threads = threads or cpu_count()
        return cls(spec, bits, threads, measure_limits(threads))

    def again(self) -> Ceiling:
        """The better of two measurements: others may have been at work during the first."""
        return Ceiling(self.spec, self.bits, self.threads, self.limits.at_best(measure_limits(self.threads)))

    def share(self, figures: Figures) -> Share | None:
        """None of a run in which nothing was generated."""
        if not figures.succeeded or not figures.output_tokens:
            return None
        together = max(1, min(figures.succeeded, round(figures.in_flight)))
        inputs = max(1, round((figures.input_tokens - (figures.cached_tokens or 0)) / figures.succeeded))
        outputs = max(1, round(figures.output_tokens / figures.succeeded))
        job = Job(
            model="", prompts=together, inputs=inputs, outputs=outputs, threads=self.threads, vocab_size=0, kv_bytes=0
        )
        least = limit_seconds(self.spec, job, self.limits, self.bits) * figures.succeeded / together
        return Share(
            least, least / figures.seconds, self.limits.read_rate / 1e9, self.limits.matmul_rate(self.bits) / 1e9
        )
