"""Frozen values that describe models, requests, outputs and configurations. No behaviour beyond checks."""

from penstock.spec.config import EngineConfig
from penstock.spec.model import DTYPE_BYTES, Activation, Dtype, KVGroup, ModelSpec, MoESpec, RopeSpec
from penstock.spec.output import CompletionOutput, FinishReason, Logprob, RequestMetrics, RequestOutput, TokenLogprobs
from penstock.spec.sampling import SamplingParams
from penstock.spec.structured import StructuredOutputs
from penstock.spec.vocabulary import Vocabulary

__all__ = [
    "DTYPE_BYTES",
    "Activation",
    "CompletionOutput",
    "Dtype",
    "EngineConfig",
    "FinishReason",
    "KVGroup",
    "Logprob",
    "MoESpec",
    "ModelSpec",
    "RequestMetrics",
    "RequestOutput",
    "RopeSpec",
    "SamplingParams",
    "StructuredOutputs",
    "TokenLogprobs",
    "Vocabulary",
]
