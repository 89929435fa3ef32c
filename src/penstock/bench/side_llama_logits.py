"""Logits of a text by llama.cpp: argv is GGUF IDS OUT WINDOW THREADS, the second and third npy files.

Every window is read by itself, K and V in fp32. Runs in a venv that has llama-cpp-python and numpy.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import llama_cpp as api
import numpy as np


def logits(path: str, ids: Any, window: int, threads: int) -> Any:
    """fp32 [len(ids), V]."""
    api.llama_backend_init()
    model: Any = api.llama_model_load_from_file(os.fsencode(path), api.llama_model_default_params())
    params: Any = api.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = window
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = 0
    params.type_k = params.type_v = api.GGML_TYPE_F32
    context: Any = api.llama_init_from_model(model, params)
    vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    batch: Any = api.llama_batch_init(window, 0, 1)
    found = []
    for start in range(0, len(ids), window):
        part = ids[start : start + window]
        api.llama_memory_clear(api.llama_get_memory(context), True)
        batch.n_tokens = len(part)
        for i, token in enumerate(part):
            batch.token[i], batch.pos[i], batch.logits[i] = int(token), i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if status := api.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        found.append(np.ctypeslib.as_array(api.llama_get_logits(context), (len(part), vocab_size)).copy())
    return np.concatenate(found)


if __name__ == "__main__":
    path, ids, out, window, threads = sys.argv[1:]
    np.save(out, logits(path, np.load(ids), int(window), int(threads)))
