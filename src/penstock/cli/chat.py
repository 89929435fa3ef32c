"""``penstock chat``: a conversation with a model, on a terminal or through a pipe."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.base import InvalidRequest, PenstockError
from penstock.cli import sampling as cli_sampling
from penstock.cli.answer import Answer
from penstock.cli.chat_commands import NOT_SET, perform
from penstock.cli.complete import complete_model
from penstock.cli.conversation import Conversation
from penstock.cli.exits import emit, exit_code, explain
from penstock.cli.options import MODEL_HELP, engine_options, sampling_options
from penstock.cli.terminal import TextOutput, is_terminal, note, peak_memory, size
from penstock.spec import SamplingParams

if TYPE_CHECKING:
    from penstock.llm import LLM

DEFAULTS = {"max_tokens": 1024}
"""Where neither the command line nor the model says anything."""
ROOM = 4
"""An answer is left at least one part in so many of the context, or max_tokens where that is less."""


@engine_options
@sampling_options(*NOT_SET, **DEFAULTS)
def chat(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP, autocompletion=complete_model)
    ] = None,
    *,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="the system message")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object for each answer")] = False,
    sampling: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    """Talk with MODEL. In a pipe, each line is a turn; /help lists the commands.

    Ctrl-C stops an answer, Ctrl-D ends the program.
    """
    from penstock.cli.prompt import inputs
    from penstock.llm import LLM

    cli_sampling.asked(sampling)  # refused before the model is loaded
    started = time.perf_counter()
    with LLM(model, **engine) as llm:
        _refuse_without_template(llm)
        session = Session(llm, Conversation(system), sampling, as_json=as_json)
        if session.interactive:
            note(f"{llm.engine.name}, ready after {time.perf_counter() - started:.1f} s. /help lists the commands.")
        for text in inputs(session.interactive):
            try:
                if not perform(session, text):
                    break
            except KeyboardInterrupt:
                if not session.interactive:
                    raise
                emit("")
            except PenstockError as error:
                session.failed = error
                explain(error, as_json=as_json)
        session.sum_up()
        if session.failed is not None and not session.interactive:
            sys.exit(exit_code(session.failed))


def _refuse_without_template(llm: LLM) -> None:
    if llm.engine.chat is None:
        raise InvalidRequest(
            "no_chat_template",
            f"The model {llm.engine.name} has no chat template",
            fix="continue text with penstock run, or give a template with --chat-template FILE",
        )


class Session:
    """A conversation, the model that answers, and what its answers have cost.

    Attributes:
        sampling: what was given or ``/set``, by the names of ``cli.options.SAMPLING``.
        failed: the last error of a turn.
    """

    def __init__(self, llm: LLM, conversation: Conversation, sampling: dict[str, Any], *, as_json: bool) -> None:
        self.llm, self.conversation, self.sampling, self.as_json = llm, conversation, dict(sampling), as_json
        self.interactive = is_terminal(sys.stdin) and is_terminal(sys.stdout)
        self.answers: list[Answer] = []
        self.failed: PenstockError | None = None
        self._show = TextOutput()

    def ask(self, text: str) -> None:
        """Says something and prints the answer."""
        self.conversation.say("user", text)
        params = self.params
        longest = self._context
        room = min(longest // ROOM, params.max_tokens or longest)
        ids, dropped = self.conversation.fit(self._encode, longest - room)
        if dropped:
            note(f"[the conversation is too long for the context of {longest} tokens: {dropped} of its turns dropped]")
        answer = Answer(len(ids))
        try:
            with closing(self.llm.stream({"prompt_token_ids": ids}, params)) as deltas:  # type: ignore[type-var]
                for delta in deltas:
                    answer.take(delta)
                    if not self.as_json:
                        self._show(delta.text)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            answer.samples[0].finish_reason = "abort"
        self.conversation.say("assistant", answer.text)
        self.answers.append(answer)
        emit(json.dumps({"role": "assistant", "content": answer.text} | answer.report()) if self.as_json else "")

    @property
    def params(self) -> SamplingParams:
        """Of the next answer. Raises as ``cli.sampling.asked``."""
        asked = cli_sampling.asked(self.sampling)
        return SamplingParams(**{**DEFAULTS, **self.llm.engine.recommended, **asked})

    @property
    def _context(self) -> int:
        return self.llm.engine.setup.limits.max_model_len

    def _encode(self, messages: Any) -> list[int]:
        template = self.llm.engine.chat
        assert template is not None
        return template.encode(self.llm.engine.tokenizer, messages)

    def stats(self) -> Iterator[str]:
        """Lines on the last answer and on all of them."""
        if self.answers:
            last = self.answers[-1]
            yield (
                f"last answer: {last.tokens} tokens, {last.tokens_per_s or 0:.0f} tokens/s, first token after"
                f" {last.first_s or 0:.2f} s; {last.cached} of its {last.prompt_tokens} prompt tokens were cached"
            )
        yield f"context: {len(self._encode(self.conversation.as_messages()))} of {self._context} tokens"
        yield self.summary()

    def summary(self) -> str:
        seconds, tokens = sum(a.total_s for a in self.answers), sum(a.tokens for a in self.answers)
        first = median([a.first_s for a in self.answers if a.first_s is not None] or [0.0])
        return (
            f"{len(self.answers)} answers: {tokens} tokens, {tokens / seconds if seconds else 0:.0f} tokens/s,"
            f" first token after {first:.2f} s (median); peak memory {size(peak_memory())}"
        )

    def sum_up(self) -> None:
        if self.answers and not self.as_json:
            note(self.summary())
