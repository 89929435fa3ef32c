"""Load on a server over HTTP, and what came of it: ``penstock bench offline|serve|latency|cost``. Nothing here but
``offline`` and ``ceiling`` loads torch."""
