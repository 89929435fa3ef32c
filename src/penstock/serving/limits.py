"""What one request may cost before it is looked at. Each is tested at the limit and one above it."""

from __future__ import annotations

MAX_BODY_BYTES = 8 << 20
"""Largest request body. A million tokens of English are about 5 MB."""

MAX_HEADER_BYTES = 32 << 10
"""Sum of names and values of a request's headers."""

MAX_HEADERS = 64

BODY_SECONDS = 30.0
"""A body must have arrived whole after this long."""

INLINE_BYTES = 32 << 10
"""Bodies up to this size are parsed on the event loop; larger ones in a thread, so that nobody else waits."""

MAX_PROMPTS = 256
"""Prompts in one request."""

MAX_TEXTS = 2048
"""Texts to embed or to score in one request, as OpenAI's API allows."""

MAX_CHOICES = 512
"""Prompts times n in one request."""

MAX_MESSAGES = 2048
MAX_MODEL_NAME = 512

MAX_TOOLS = 128
"""Tools in one request, and calls in one message."""

MAX_TOOL_CHARS = 256 << 10
"""Of all tools of a request together, as JSON."""

MAX_TOOL_DEPTH = 32
"""How deep brackets may nest in one tool."""

MAX_TEMPLATE_VARIABLES = 32
MAX_TEMPLATE_VARIABLE = 4096
"""Characters of one variable that a request sets in the chat template."""


MAX_STORED_RESPONSES = 1024
MAX_STORED_BYTES = 64 << 20
"""Of responses kept for those that follow them, with their conversations."""

MAX_ERROR_CHARS = 600
"""An error message may quote what the client sent, but not all of it."""

DRAIN_SECONDS = 30.0
"""After SIGTERM, running requests have this long to finish."""

MAX_CONNECTIONS = 4096
"""More are answered 503 at once."""
