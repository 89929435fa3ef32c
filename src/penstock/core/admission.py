"""What may enter: the limits of one engine, and the checks of a submission against them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.base import ContextOverflow, InvalidRequest
from penstock.core.kv.groups import KVCache
from penstock.core.service import MAX_PRIORITY, Submission, Task
from penstock.spec import Vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Attributes:
    max_batch_tokens: positions computed in one step.
    max_batch_requests: requests in one step; at most ``max_batch_tokens``, so that each can have one.
    max_model_len: prompt and completion together.
    max_mixed_prefill: positions of prompts in a step in which others wait for their next token.
    max_prefix_waits: steps a request sits out in a row while another computes blocks it could share.
    whole: a prompt is computed in one step or not at all (encoders); nothing can be generated.
    """

    max_batch_tokens: int
    max_batch_requests: int
    max_model_len: int
    max_mixed_prefill: int | None = None
    max_prefix_waits: int = 32
    whole: bool = False

    def budget(self, emitted: list[int]) -> int:
        """Positions of a step. ``emitted``: how many tokens of its answer each running request has."""
        if self.max_mixed_prefill is None or not any(emitted):
            return self.max_batch_tokens
        return min(self.max_batch_tokens, self.max_mixed_prefill + len(emitted) - emitted.count(0))

    @property
    def longest_prompt(self) -> int:
        """Of a request that wants a vector; one that generates needs room for a token more."""
        return min(self.max_model_len, self.max_batch_tokens) if self.whole else self.max_model_len

    def check_length(self, tokens: int, task: Task = "generate") -> None:
        """Of a prompt. Raises InvalidRequest: (empty_prompt), ContextOverflow: (prompt_too_long)."""
        if not tokens:
            raise InvalidRequest("empty_prompt", "The prompt has no tokens", fix="send at least one token")
        if task != "generate" and tokens > self.longest_prompt:
            raise ContextOverflow(
                "prompt_too_long",
                f"The prompt is too long: {tokens} tokens",
                why=f"this model's maximum context length is {self.longest_prompt} tokens",
                fix="shorten it, or cut it with truncate_prompt_tokens",
                tokens=tokens,
                most=self.longest_prompt,
            )
        if task == "generate" and tokens >= self.max_model_len:
            raise ContextOverflow(
                "prompt_too_long",
                f"The prompt is too long: {tokens} tokens",
                why=f"this model's maximum context length is {self.max_model_len} tokens, of which at least one is for "
                "the completion",
                fix="shorten the prompt or raise max_model_len",
                tokens=tokens,
                most=self.max_model_len - 1,
            )


def _span(tokens: Sequence[int]) -> tuple[int, int]:
    """The least and the largest, by pieces: other threads may have a turn between two of them."""
    pieces = [tokens[i : i + 8192] for i in range(0, len(tokens), 8192)]
    return min(map(min, pieces)), max(map(max, pieces))


def check_prompt(tokens: Sequence[int], limits: Limits, vocabulary: Vocabulary, task: Task = "generate") -> None:
    """Raises InvalidRequest: empty_prompt, prompt_too_long, invalid_prompt, token_out_of_range."""
    limits.check_length(len(tokens), task)
    if not isinstance(tokens, array) and not {int}.issuperset(map(type, tokens)):
        raise InvalidRequest("invalid_prompt", "Token ids must be integers", fix="convert them to int")
    low, high = _span(tokens)
    if low < 0 or high >= vocabulary.size:
        raise InvalidRequest(
            "token_out_of_range",
            f"Token id {low if low < 0 else high} is not in the vocabulary",
            why=f"its ids are 0 to {vocabulary.size - 1}",
            fix="tokenize with the model's own tokenizer",
        )


def final_length(submission: Submission, limits: Limits, vocabulary: Vocabulary, kv: KVCache) -> int:
    """Tokens, prompt included, at which a submission's samples end for lack of room.

    Raises:
        InvalidRequest: as ``check_prompt``; token_out_of_range, invalid_parameter, cannot_continue; kv_too_small when
            not even an empty pool could hold it.
    """
    check_prompt(submission.tokens, limits, vocabulary, submission.task)
    if abs(submission.priority) > MAX_PRIORITY:
        why = f"it must be from {-MAX_PRIORITY} to {MAX_PRIORITY}"
        raise InvalidRequest("invalid_parameter", "priority is out of range", why=why)
    params = submission.params
    if submission.task == "generate" and limits.whole:
        raise InvalidRequest(
            "cannot_generate",
            "This model cannot generate text",
            why="it is an encoder: it turns a text into a vector",
            fix="ask for an embedding or a score, or serve a decoder",
        )
    if submission.task != "generate" and params.n != 1:
        raise InvalidRequest("invalid_parameter", f"n = {params.n} cannot be used", why="a text has one vector")
    for name in ("logit_bias", "stop_token_ids", "allowed_token_ids"):
        if (high := max(getattr(params, name) or (0,))) >= vocabulary.size:
            why = f"the vocabulary has ids 0 to {vocabulary.size - 1}"
            raise InvalidRequest("token_out_of_range", f"{name} names token id {high}", why=why, fix="leave it out")
    longest = limits.max_model_len
    limit = min(longest, len(submission.tokens) + (params.max_tokens or longest))
    if submission.task != "generate":
        limit = len(submission.tokens) + 1  # what is owed at the end takes the place of a token
    if submission.emitted:
        _check_emitted(submission, limit, vocabulary)
    if shortage := kv.shortage(limit - 1):  # the last token is never computed
        raise InvalidRequest(
            "kv_too_small",
            f"The request may grow to {limit} tokens",
            why=f"it then needs {shortage[0]} KV blocks of {kv.block_size} tokens and there are {shortage[1]}",
            fix="lower max_tokens or give the KV pool more memory (kv_memory)",
        )
    return limit


def _check_emitted(submission: Submission, limit: int, vocabulary: Vocabulary) -> None:
    count, room = len(submission.emitted), limit - len(submission.tokens)
    why = ""
    if count != submission.params.n or submission.task != "generate" or not submission.unfinished:
        unfinished = len(submission.unfinished)
        why = f"it tells of {count} samples, {unfinished} of them unfinished, and has {submission.params.n}"
    for sample, tokens in submission.unfinished:
        if len(tokens) >= room:
            why = f"sample {sample} has {len(tokens)} tokens and may have {room}"
        elif not all(type(token) is int and 0 <= token < vocabulary.size for token in tokens):
            why = f"a token of sample {sample} is not in the vocabulary of {vocabulary.size}"
    if why:
        raise InvalidRequest(
            "cannot_continue",
            "The request cannot go on from the tokens it brings",
            why=why,
            fix="send what was told of it, and nothing else",
        )
