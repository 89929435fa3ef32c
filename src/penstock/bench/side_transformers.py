"""Hugging Face transformers as it is usually run on a CPU: ``generate`` on one static batch."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from penstock.bench.job import Complete, Job, Prompts, contend


def transformers(job: Job) -> Complete:
    torch.set_num_threads(job.threads)
    model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=job.options.get("dtype", "auto"))

    def complete(prompts: Prompts, outputs: int) -> int:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=outputs,
                max_new_tokens=outputs,
                pad_token_id=0,
            )
        return int(out[:, ids.shape[1] :].numel())

    return complete


if __name__ == "__main__":
    contend(transformers)
