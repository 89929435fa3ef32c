"""Penstock serves open-weight language models.

>>> from penstock import LLM, SamplingParams
>>> LLM().generate("Once upon a time", SamplingParams(temperature=0))[0].outputs[0].text  # doctest: +SKIP

Nothing heavy is imported until it is used: ``import penstock`` loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from penstock.base import PenstockError
from penstock.spec import (
    CompletionOutput,
    EmbeddingRequestOutput,
    PoolingParams,
    RequestOutput,
    SamplingParams,
    ScoringRequestOutput,
)

if TYPE_CHECKING:
    from penstock.llm import (
        LLM,
        AsyncLLM,
        BeamSearchParams,
        Majority,
        SearchOutput,
        TextPrompt,
        TokensPrompt,
        Verifier,
        mean_logprob,
    )

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "CompletionOutput",
    "EmbeddingRequestOutput",
    "Majority",
    "PenstockError",
    "PoolingParams",
    "RequestOutput",
    "SamplingParams",
    "ScoringRequestOutput",
    "SearchOutput",
    "TextPrompt",
    "TokensPrompt",
    "Verifier",
    "__version__",
    "mean_logprob",
]

_LATE = {
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "Majority",
    "SearchOutput",
    "TextPrompt",
    "TokensPrompt",
    "Verifier",
    "mean_logprob",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        from penstock import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'penstock' has no attribute {name!r}")
