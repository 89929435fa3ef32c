"""What one request may cost before it is looked at. Each is tested at the limit and one above it."""

from __future__ import annotations

MAX_BODY_BYTES = 8 << 20
"""Largest request body. A million tokens of English are about 5 MB."""

MAX_UPLOADING = 256 << 20
"""Bytes of bodies that are read, parsed or wait to be tokenized; of each the first INLINE_BYTES do not count."""

MAX_HEADER_BYTES = 32 << 10
"""Sum of names and values of a request's headers."""

MAX_HEADERS = 64

HEAD_SECONDS = 10.0
"""A request's headers must have arrived after this long; of a new connection, counted from its start. And so must the
rest of a body that was answered unread: a client that still sends it can read the answer meanwhile."""

STALL_SECONDS = 60.0
"""A client that has not taken what was sent to it for so long is cut off, and its request ends."""

TOLD_SECONDS = 2.0
"""A stream that waits for its model for longer is told so, and as often. Its status is 200 from then on."""

PING_SECONDS = 15.0
"""A stream in which there has been nothing for so long is told that the server is there: proxies give up after 60."""

BODY_SECONDS = 30.0
"""A body must have arrived whole after this long."""

REQUESTS_AT_ONCE = 4
"""Requests that are read in one turn of the event loop."""

JOINED_BYTES = 64 << 10
"""Answers are written once a turn of the event loop, or when there is more than this."""

INLINE_BYTES = 32 << 10
"""Bodies up to this size are parsed on the event loop; larger ones in a thread, so that nobody else waits."""

LONG_BYTES = 256 << 10
"""Bodies above this size are parsed one at a time."""

MAX_FIELDS_NOTED = 32
"""Unknown fields that get a line in the log in NOTED_SECONDS, each one line."""

NOTED_SECONDS = 60.0

MAX_JSON_DEPTH = 160
"""Brackets within brackets. A schema may have 128 levels of its own."""

MAX_JSON_VALUES = 1 << 16
"""Values in one body but token ids. So many are decoded in some 10 ms, and nobody has a turn meanwhile."""

MAX_PROMPTS = 256
"""Prompts in one request."""

MAX_TEXTS = 2048
"""Texts to embed or to score in one request, as OpenAI's API allows."""

MAX_CHOICES = 512
"""Prompts times n in one request."""

MAX_MESSAGES = 2048
MAX_PARTS = 2048
"""Parts, or blocks, of one message."""

MAX_ARGUMENT_CHARS = 4 << 20
"""Of the arguments of one call that a conversation brings along."""

MAX_INCLUDED = 64
MAX_MODEL_NAME = 512
MAX_SHOWN = 50
"""Requests in a status, the oldest."""

MAX_REMEMBERED = 100
"""Requests of one tenant that have ended. The dashboard's inspector shows them."""

MAX_REMEMBERED_IN_ALL = 1000

MAX_KEPT_TOKENS = 4096
"""Of a prompt, and of an answer, that the inspector shows where texts are kept."""

MAX_VISITS = 4096
"""Of those, without their sentences: a trace shows them."""

MAX_TRACE_SECONDS = 3600.0
MAX_LIVE_SECONDS = 60.0
LOOK_SECONDS = 10.0
"""The engine must have told what it does after this long."""

MAX_STEPS_SHOWN = 512
"""Steps of one answer to the dashboard, the latest."""

MAX_BLOCKS_SHOWN = 4096
"""KV blocks of one pool on its map; of more, every so many-th."""

MAX_TOOLS = 128
"""Tools in one request, and calls in one message."""

MAX_TOOL_CHARS = 256 << 10
"""Of all tools of a request together, as JSON."""

MAX_TOOL_DEPTH = 32
"""How deep brackets may nest in one tool."""

MAX_TEMPLATE_VARIABLES = 32
MAX_TEMPLATE_VARIABLE = 4096
"""Characters of one variable that a request sets in the chat template."""

MAX_RESPONSES, MAX_RESPONSE_BYTES = 1 << 14, 256 << 20
"""Of one tenant, kept for those that follow them, each with all that led to it. Beyond that its oldest go."""

MAX_RESPONSES_IN_ALL, MAX_RESPONSE_BYTES_IN_ALL = 1 << 16, 1 << 30
MAX_RESPONSES_IN_MEMORY, MAX_RESPONSE_BYTES_IN_MEMORY = 1 << 10, 64 << 20
"""Of all tenants, where the store cannot be opened."""

RESPONSE_DAYS = 30
"""How long a response is kept, as by OpenAI."""

MAX_CONVERSATIONS, MAX_CONVERSATION_BYTES = 1 << 16, 1 << 30
"""Of one tenant. Beyond that a new one is refused, and none vanishes. Each has at most MAX_MESSAGES items of
MAX_BODY_BYTES, as a request that brings all of it along."""

MAX_CONVERSATIONS_IN_ALL, MAX_CONVERSATION_BYTES_IN_ALL = 1 << 18, 4 << 30

MAX_ITEMS = 20
"""Items that are added to a conversation at a time, as OpenAI's API allows."""

MAX_ERROR_CHARS = 600
"""An error message may quote what the client sent, but not all of it."""

DRAIN_SECONDS = 30.0
"""After SIGTERM, running requests have this long to finish."""

CLOSE_SECONDS = 5
"""And then clients this long to read what was written for them."""

STILL_SECONDS = 5
"""An event loop that has run nothing for so long is reported, with what it is at."""

STUCK_SECONDS = 60
"""And ends its process after so long, so that whoever supervises it starts another."""

MAX_CONNECTIONS = 4096
"""More are answered 503 at once. There are fewer where the process may not open as many files."""

REFUSED_CONNECTIONS = 64
"""Of those, at a time; still more are closed."""

OTHER_FILES = 256
"""Descriptors of a server that are no connections: of engines, uploads, logs, what is stored."""

MAX_FILE_BYTES = 200 << 20
"""Of one uploaded file, as OpenAI's API allows for batches."""

MAX_SPOOLED_BYTES = 2 << 30
"""Of all files that are being uploaded; meanwhile they are in the folder of temporary files."""

MAX_STORED_BYTES = 10 << 30
"""Of one tenant's files, where it uploads another. What its batches leave counts then, but is never refused itself."""

MAX_FILE_NAME = 255
FILE_SECONDS = 600.0
"""A file must have arrived whole after this long."""

MAX_UNFINISHED_BATCHES = 100
"""Of one tenant: what they will leave is bounded by that."""

MAX_BATCH_LINES = 50_000
MAX_COMPLAINTS = 20
"""Faults of a batch's file that are named; the others are as likely to be the same."""

MAX_METADATA = 16
"""Pairs of metadata; names of 64 characters, values of 512."""

MAX_LISTED = 100
"""Items on a page of a list."""

MAX_FILES_LISTED = 10_000
"""On a page of files, as OpenAI's API allows."""

MIN_STAY_SECONDS, MAX_STAY_SECONDS = 3600, 30 * 86_400
"""A file that does not stay for ever stays for so long, as by OpenAI."""
