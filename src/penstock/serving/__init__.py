"""HTTP over an engine: the API of OpenAI, with the fields vLLM adds to it."""

from penstock.serving.app import build_app
from penstock.serving.server import listen, serve

__all__ = ["build_app", "listen", "serve"]
