"""Routes of Ollama's API, of the Open Inference Protocol, and of Triton's generate extension."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from penstock.serving import kserve, ollama, ollama_models
from penstock.serving.gate import Access
from penstock.serving.ollama_schemas import OllamaChat, OllamaEmbed, OllamaEmbedding, OllamaGenerate
from penstock.serving.operations import Endpoint, operation

Generate = Callable[..., Awaitable[ASGIApp]]
"""(request, shape, prepare, dialect): answers with what the model generates, whole or in a stream."""
Answer = Callable[..., Awaitable[ASGIApp]]
"""(request, shape, answer): answers with one value."""
Read = Callable[..., Awaitable[tuple[Any, int]]]
"""(request, shape): what is asked, and how many bytes its body had; the caller has entered."""
Entry = tuple[Access, Endpoint] | tuple[Access, Endpoint, str]


def other_apis(generate: Generate, answer: Answer, read: Read) -> dict[str, Entry]:
    """By path, as the table of routes has them."""

    def post(says: str, how: Callable[..., Awaitable[ASGIApp]], shape: type, *rest: Any, **said: Any) -> Entry:
        @operation(says, takes=shape, gives=dict[str, Any], **said)
        async def endpoint(request: Request) -> ASGIApp:
            kserve.check_version(request)
            return await how(request, shape, *rest)

        return "inference", endpoint, "POST"

    task, events = ollama.OllamaTask, {"streams": (dict[str, Any],)}
    lines = {**events, "lines": True}
    return {
        "/api/chat": post("Ollama: answer a conversation.", generate, OllamaChat, task.chat, ollama.LINES, **lines),
        "/api/generate": post("Ollama: complete.", generate, OllamaGenerate, task.generate, ollama.LINES, **lines),
        "/api/embed": post("Ollama: embed texts.", answer, OllamaEmbed, ollama.embed),
        "/api/embeddings": post("Ollama: embed a text.", answer, OllamaEmbedding, ollama.embedding),
        "/api/show": post("Ollama: describe a model.", ollama_models.show, ollama_models.ShowRequest, read),
        "/api/tags": ("inference", ollama_models.tags),
        "/api/ps": ("inference", ollama_models.running),
        "/api/version": ("inference", ollama_models.version),
        "/v2": ("inference", kserve.server),
        "/v2/health/live": ("public", kserve.live),
        "/v2/health/ready": ("inference", kserve.ready),
        **of_models(post, generate, answer),
    }


def of_models(post: Callable[..., Entry], generate: Generate, answer: Answer) -> dict[str, Entry]:
    """Paths with a version come first: a model's name may be a path, and would take it in."""
    found: dict[str, Entry] = {}
    stream, prepare = "Complete, in a stream.", kserve.GenerateTask.prepare
    made = (prepare, kserve.EVENTS)
    for path, of in (
        ("/v2/models/{model:path}/versions/{version}", " Of its version 1."),
        ("/v2/models/{model:path}", ""),
    ):
        events: dict[str, Any] = {"streams": (dict[str, Any],)}
        found |= {
            path + "/infer": post("Tensors to tensors." + of, answer, kserve.InferRequest, kserve.infer),
            path + "/generate": post("Complete." + of, generate, kserve.GenerateRequest, *made, **events),
            path + "/generate_stream": post(stream + of, generate, kserve.GenerateStreamRequest, *made, **events),
            path + "/ready": ("inference", kserve.model_ready),
            path: ("inference", kserve.model),
        }
    return found
