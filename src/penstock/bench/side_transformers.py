"""Hugging Face transformers as it is usually run on a CPU: ``generate`` on one static batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from penstock.bench.job import Job, contend


def transformers(job: Job) -> Callable[[int, int], int]:
    torch.set_num_threads(job.threads)
    model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    prompts = torch.tensor(job.tokens())

    def complete(count: int, outputs: int) -> int:
        ids = prompts[:count]
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
