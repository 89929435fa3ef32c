"""Frozen values that describe models, requests, outputs and configurations. No behaviour beyond checks."""

from penstock.spec.config import EngineConfig
from penstock.spec.encoder import EncoderSpec
from penstock.spec.model import DTYPE_BYTES, Activation, Dtype, KVDtype, KVGroup, ModelSpec, MoESpec, RopeSpec
from penstock.spec.output import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    FinishReason,
    Logprob,
    RequestMetrics,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
    Timing,
    TokenLogprobs,
)
from penstock.spec.pooling import PoolingParams, PoolingSpec
from penstock.spec.sampling import SamplingParams
from penstock.spec.structured import StructuredOutputs
from penstock.spec.vocabulary import Vocabulary

__all__ = [
    "DTYPE_BYTES",
    "Activation",
    "CompletionOutput",
    "Dtype",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EncoderSpec",
    "EngineConfig",
    "FinishReason",
    "KVDtype",
    "KVGroup",
    "Logprob",
    "MoESpec",
    "ModelSpec",
    "PoolingParams",
    "PoolingSpec",
    "RequestMetrics",
    "RequestOutput",
    "RopeSpec",
    "SamplingParams",
    "ScoringOutput",
    "ScoringRequestOutput",
    "StructuredOutputs",
    "Timing",
    "TokenLogprobs",
    "Vocabulary",
]
