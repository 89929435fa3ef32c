"""POST /v1/embeddings, in OpenAI's shape; /v1/score and /v1/rerank, in vLLM's."""

from __future__ import annotations

import time
import uuid
from base64 import b64encode
from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar, Generic, Literal, TypeVar, cast

import msgspec
import numpy as np
from msgspec import Meta

from penstock.serving.context import Context
from penstock.serving.edge import off_loop
from penstock.serving.gate import current
from penstock.serving.limits import MAX_TEXTS
from penstock.serving.schemas import Harmless, ModelRequest, Texts, each_of
from penstock.spec import EmbeddingRequestOutput, PoolingParams, ScoringRequestOutput
from penstock.spec.ranges import MAX_ID

Truncation = Annotated[int, Meta(ge=-1, le=MAX_ID)]
_encode = msgspec.json.Encoder().encode
Several = Annotated[list[str], Meta(min_length=1, max_length=MAX_TEXTS)]


class EmbeddingRequest(ModelRequest, kw_only=True):
    """POST /v1/embeddings"""

    HARMLESS: ClassVar[Harmless] = {"add_special_tokens": (True,), "messages": ()}
    IDS: ClassVar[tuple[str, ...]] = ("input",)

    input: Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=MAX_ID)] | None = None
    normalize: bool | None = None
    truncate_prompt_tokens: Truncation | None = None

    def check(self) -> None:
        self.inputs()

    def inputs(self) -> list[str] | list[Sequence[int]]:
        return each_of("input", self.input, MAX_TEXTS)


class ScoreRequest(ModelRequest, kw_only=True):
    """POST /v1/score"""

    text_1: str | Several
    text_2: str | Several
    use_activation: bool | None = None
    truncate_prompt_tokens: Truncation | None = None


class RerankRequest(ModelRequest, kw_only=True):
    """POST /v1/rerank"""

    query: str
    documents: Several
    top_n: Annotated[int, Meta(ge=0, le=MAX_TEXTS)] | None = None
    use_activation: bool | None = None
    truncate_prompt_tokens: Truncation | None = None


class VectorUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class Embedding(msgspec.Struct):
    index: int
    embedding: list[float] | str
    object: str = "embedding"


class Score(msgspec.Struct):
    index: int
    score: float
    object: str = "score"


V = TypeVar("V", Embedding, Score)


class VectorList(msgspec.Struct, Generic[V]):
    id: str
    created: int
    model: str
    data: list[V]
    usage: VectorUsage
    object: str = "list"


class Document(msgspec.Struct):
    text: str


class Ranked(msgspec.Struct):
    index: int
    document: Document
    relevance_score: float


class Ranking(msgspec.Struct):
    id: str
    model: str
    usage: VectorUsage
    results: list[Ranked]


async def embedded(request: EmbeddingRequest, context: Context) -> list[EmbeddingRequestOutput]:
    """Raises InvalidRequest, and what ``AsyncLLM.embed_all`` raises."""
    params = PoolingParams(
        dimensions=request.dimensions,
        normalize=request.normalize,
        truncate_prompt_tokens=request.truncate_prompt_tokens,
    )
    admit = current.get().charge
    return await context.own_llm.embed_all(request.inputs(), params, request.priority or 0, admit=admit)


async def embeddings(request: EmbeddingRequest, context: Context) -> VectorList[Embedding]:
    """As ``embedded``."""
    outputs = await embedded(request, context)
    packed = request.encoding_format == "base64"

    def encoded() -> list[msgspec.Raw]:
        """One by one: thousands of vectors in one go hold up the interpreter for as long as it takes."""
        vectors = enumerate(output.outputs.embedding for output in outputs)
        return [msgspec.Raw(_encode(Embedding(i, base64_of(v) if packed else v))) for i, v in vectors]

    data = await off_loop(8 * sum(len(output.outputs.embedding) for output in outputs), encoded)
    whole = cast("list[Embedding]", data)
    return VectorList(_id("embd"), int(time.time()), context.name, whole, _usage(outputs))


async def scores(request: ScoreRequest, context: Context) -> VectorList[Score]:
    """Raises InvalidRequest, and what ``AsyncLLM.score`` raises."""
    outputs = await _scored(request.text_1, request.text_2, request, context)
    data = [Score(i, output.outputs.score) for i, output in enumerate(outputs)]
    return VectorList(_id("score"), int(time.time()), context.name, data, _usage(outputs))


async def ranking(request: RerankRequest, context: Context) -> Ranking:
    """The documents with the highest scores, all of them if ``top_n`` is absent or 0; of equals the first comes first.

    Raises InvalidRequest, and what ``AsyncLLM.score`` raises.
    """
    outputs = await _scored(request.query, request.documents, request, context)
    results = [
        Ranked(i, Document(document), output.outputs.score)
        for i, (document, output) in enumerate(zip(request.documents, outputs, strict=True))
    ]
    results.sort(key=lambda result: -result.relevance_score)
    return Ranking(_id("rerank"), context.name, _usage(outputs), results[: request.top_n or None])


async def _scored(
    first: str | list[str], second: str | list[str], request: ScoreRequest | RerankRequest, context: Context
) -> list[ScoringRequestOutput]:
    params = PoolingParams(use_activation=request.use_activation, truncate_prompt_tokens=request.truncate_prompt_tokens)
    return await context.own_llm.score(first, second, params, request.priority or 0, admit=current.get().charge)


def base64_of(vector: list[float]) -> str:
    """Little-endian 32-bit floats, which is what OpenAI's clients ask for and read."""
    return b64encode(np.array(vector, "<f4").tobytes()).decode("ascii")


def _id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


def _usage(outputs: Iterable[EmbeddingRequestOutput | ScoringRequestOutput]) -> VectorUsage:
    tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return VectorUsage(tokens, tokens)
