"""OpenVINO GenAI by its continuous batching pipeline, with its defaults: 8-bit KV, dynamic quantization of activations.

Runs in a venv that has openvino-genai.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
import openvino_genai as genai

from penstock.bench.job import Complete, Job, Prompts, contend


def openvino_genai(job: Job) -> Complete:
    """Options: any property of the CPU plugin, by its own name."""
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = -(-job.kv_bytes // (1 << 30))
    scheduler.max_num_seqs = job.prompts
    scheduler.enable_prefix_caching = job.shared > 0
    properties = {"INFERENCE_NUM_THREADS": job.threads, **job.options}
    pipeline: Any = genai.ContinuousBatchingPipeline(job.model, scheduler, "CPU", properties)

    def complete(prompts: Prompts, outputs: int) -> int:
        config = genai.GenerationConfig(max_new_tokens=outputs, min_new_tokens=outputs, ignore_eos=True)
        tensors = [openvino.Tensor(np.array([ids], dtype=np.int64)) for ids in prompts]
        done = pipeline.generate(tensors, [config] * len(tensors))
        return sum(len(request.m_generation_ids[0]) for request in done)

    return complete


if __name__ == "__main__":
    contend(openvino_genai)
