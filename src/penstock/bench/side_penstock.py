"""Penstock by its in-process face: tokens in, tokens and their text out."""

from __future__ import annotations

from typing import Any

from penstock import runtime  # noqa: F401  # as the other sides import their libraries: loading is measured without
from penstock.bench.job import Complete, Job, Prompts, contend
from penstock.kernels import cpu  # noqa: F401
from penstock.llm import LLM, TokensPrompt
from penstock.spec import SamplingParams


def penstock(job: Job) -> Complete:
    options: dict[str, Any] = dict(job.options)
    llm = LLM(
        job.model,
        max_model_len=job.inputs + job.outputs,
        max_num_seqs=job.prompts,
        kv_memory=str(job.kv_bytes),
        num_threads=job.threads,
        enable_prefix_caching=job.shared > 0,
        **options,
    )

    def complete(prompts: Prompts, outputs: int) -> int:
        params = SamplingParams(temperature=0.0, max_tokens=outputs, ignore_eos=True)
        done = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], params, use_tqdm=False)
        return sum(len(request.outputs[0].token_ids) for request in done)

    return complete


if __name__ == "__main__":
    contend(penstock)
