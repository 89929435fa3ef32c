"""llama.cpp by its C API, as its own llama-batched-bench drives it: one sequence for each prompt, greedy draws.

A shared prefix is computed once and its KV given to all sequences, as that program does with ``-pps``. Runs in a venv
that has llama-cpp-python and numpy.
"""

from __future__ import annotations

import os
from typing import Any

import llama_cpp as api
import numpy as np

from penstock.bench.job import Complete, Job, Prompts, contend

BATCH, MICROBATCH = 2048, 512
"""Tokens handed over at once, and tokens of one pass through the graph: the defaults of llama.cpp's programs."""
SLACK = 64
"""Positions of each sequence beyond what the job needs."""


class Batch:
    """The tokens of one call of ``llama_decode``."""

    def __init__(self) -> None:
        self.native: Any = api.llama_batch_init(BATCH, 0, 1)
        self.native.n_tokens = 0

    def add(self, token: int, position: int, sequence: int, logits: bool) -> None:
        i, batch = self.native.n_tokens, self.native
        batch.token[i], batch.pos[i], batch.logits[i] = token, position, logits
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        batch.n_tokens = i + 1

    def run(self, context: Any) -> None:
        if self.native.n_tokens and (status := api.llama_decode(context, self.native)):
            raise RuntimeError(f"llama_decode returned {status}")
        self.native.n_tokens = 0


def llama(job: Job) -> Complete:
    context, vocab_size = _context(job)
    memory, batch = api.llama_get_memory(context), Batch()

    def prefill(prompts: Prompts) -> list[int]:
        """Computes all prompts and draws the first token of each."""
        for position, token in enumerate(prompts[0][: job.shared]):
            if batch.native.n_tokens == BATCH:
                batch.run(context)
            batch.add(token, position, 0, False)
        batch.run(context)
        for sequence in range(1, len(prompts) if job.shared else 0):
            api.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
        drawn: list[int] = []
        asked = 0
        for sequence, prompt in enumerate(prompts):
            for position in range(job.shared, len(prompt)):
                if batch.native.n_tokens == BATCH:
                    batch.run(context)
                    drawn += draw(asked)
                    asked = 0
                last = position == len(prompt) - 1
                batch.add(prompt[position], position, sequence, last)
                asked += last
        batch.run(context)
        return drawn + draw(asked)

    def draw(rows: int) -> list[int]:
        if not rows:
            return []
        logits = np.ctypeslib.as_array(api.llama_get_logits(context), (rows, vocab_size))
        return [int(id) for id in logits.argmax(axis=1)]

    def complete(prompts: Prompts, outputs: int) -> int:
        api.llama_memory_clear(memory, True)
        drawn = prefill(prompts)
        tokens = len(drawn)
        for position in range(job.inputs, job.inputs + outputs - 1):
            for sequence, token in enumerate(drawn):
                batch.add(token, position, sequence, True)
            batch.run(context)
            drawn = draw(len(prompts))
            tokens += len(drawn)
        return tokens

    return complete


def _context(job: Job) -> tuple[Any, int]:
    """The context and the size of the vocabulary. Options: flash_attn (on, off), kv (f16, q8_0)."""
    api.llama_backend_init()
    model: Any = api.llama_model_load_from_file(os.fsencode(job.model), api.llama_model_default_params())
    params: Any = api.llama_context_default_params()
    own = job.inputs - job.shared + job.outputs + SLACK
    # A context that is not unified gives each sequence an equal part of it, rounded up to a multiple of 256.
    params.n_ctx = job.shared + job.prompts * own if job.shared else job.prompts * (-(-own // 256) * 256)
    params.kv_unified = job.shared > 0
    params.n_seq_max = job.prompts
    params.n_batch, params.n_ubatch = BATCH, MICROBATCH
    params.n_threads = params.n_threads_batch = job.threads
    params.flash_attn_type = int(job.options.get("flash_attn") == "on")
    if job.options.get("kv") == "q8_0":
        params.type_k = params.type_v = api.GGML_TYPE_Q8_0
    context = api.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError(f"llama.cpp made no context for {job}")
    return context, api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))


if __name__ == "__main__":
    contend(llama)
