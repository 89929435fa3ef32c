"""Frozen values that describe models, requests, outputs and configurations. No behaviour beyond checks."""

from penstock.spec.config import EngineConfig
from penstock.spec.model import DTYPE_BYTES, Dtype, KVGroup, ModelSpec, RopeSpec
from penstock.spec.output import CompletionOutput, FinishReason, Logprob, RequestMetrics, RequestOutput, TokenLogprobs
from penstock.spec.sampling import SamplingParams
from penstock.spec.vocabulary import Vocabulary

__all__ = [
    "DTYPE_BYTES",
    "CompletionOutput",
    "Dtype",
    "EngineConfig",
    "FinishReason",
    "KVGroup",
    "Logprob",
    "ModelSpec",
    "RequestMetrics",
    "RequestOutput",
    "RopeSpec",
    "SamplingParams",
    "TokenLogprobs",
    "Vocabulary",
]
