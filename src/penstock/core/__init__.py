"""The brain: requests, plans, the KV ledger, the scheduler and the loop. Plain synchronous Python over integers."""
