"""``penstock run``: one prompt, one completion, streamed to the terminal."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.base import InvalidRequest
from penstock.cli.exits import emit
from penstock.cli.options import MODEL_HELP, engine_options
from penstock.spec import SamplingParams

if TYPE_CHECKING:
    from penstock.text import Delta


@engine_options
def run(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = None,
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help='what to continue; "-", or none in a pipe, reads it from stdin'),
    ] = None,
    *,
    max_tokens: Annotated[int, typer.Option(help="most tokens to generate")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token every time")] = 1.0,
    top_p: Annotated[float, typer.Option(help="keep the likeliest tokens that reach this probability")] = 1.0,
    top_k: Annotated[int, typer.Option(help="keep this many likeliest tokens; 0 keeps all")] = 0,
    seed: Annotated[
        int | None, typer.Option(help="draws another text; without it the text is the same at every run")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of streaming text")] = False,
    engine: dict[str, Any],
) -> None:
    """Continue PROMPT and print the text as it comes. A single argument is the prompt."""
    if prompt is None:
        model, prompt = None, model
        _refuse_model_alone(prompt)
    text = _prompt_text(prompt)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)

    from penstock.llm import LLM

    started = time.perf_counter()
    with LLM(model, **engine) as llm:
        answer = _Answer(llm.get_tokenizer().encode(text), load_s=time.perf_counter() - started)
        show = _discard if as_json else _Terminal()
        for delta in llm.stream({"prompt_token_ids": answer.prompt_token_ids}, params):
            answer.take(delta)
            show(delta.text)
        emit(json.dumps(answer.report()) if as_json else "")


def _refuse_model_alone(prompt: str | None) -> None:
    if prompt is not None and os.path.isfile(os.path.join(prompt, "config.json")):  # false for what is no path at all
        raise InvalidRequest(
            "missing_prompt",
            "MODEL was given without a PROMPT",
            why=f"{prompt} is a model folder",
            fix='add the prompt after it, or "-" to read it from stdin',
        )


def _prompt_text(prompt: str | None) -> str:
    """The prompt, from stdin where it is "-", or where there is none and stdin is no terminal."""
    if prompt not in (None, "-"):
        return prompt
    piped = sys.stdin is not None and (prompt == "-" or not sys.stdin.isatty())
    text = _read_stdin() if piped else ""
    if not text and prompt is None:
        raise InvalidRequest(
            "missing_prompt", "There is no prompt", fix='try: penstock run "Once upon a time", or "-" to read stdin'
        )
    return text


def _read_stdin() -> str:
    """All of stdin, less the newline that ends what echo and editors write."""
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            "invalid_text", "The prompt on stdin is not UTF-8 text", why=f"byte {error.start} cannot be decoded"
        ) from None


@dataclass(slots=True)
class _Answer:
    """One completion and the clock around it. Times count from the moment the model was ready."""

    prompt_token_ids: list[int]
    load_s: float
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    cached: int = 0
    started: float = field(default_factory=time.perf_counter)
    first_s: float | None = None
    total_s: float = 0.0

    def take(self, delta: Delta) -> None:
        self.total_s = time.perf_counter() - self.started
        if delta.token_ids and self.first_s is None:
            self.first_s = self.total_s
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.finish_reason = delta.finish_reason
        self.cached = delta.num_cached_tokens

    def report(self) -> dict[str, object]:
        prompt, completion = len(self.prompt_token_ids), len(self.token_ids)
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
                "cached": self.cached,
            },
            "timings": {
                "load_s": round(self.load_s, 4),
                "time_to_first_token_s": None if self.first_s is None else round(self.first_s, 4),
                "total_s": round(self.total_s, 4),
                "tokens_per_s": round(completion / self.total_s, 2) if self.total_s else None,
            },
        }


class _Terminal:
    """Prints pieces of text at once. On a terminal, control characters are shown, never obeyed."""

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):  # None where stdout is closed
            sys.stdout.reconfigure(errors="replace")
        self._controls = {i: f"\\x{i:02x}" for i in (*range(32), *range(127, 160)) if chr(i) not in "\t\n"}
        self._plain = sys.stdout is None or not sys.stdout.isatty()

    def __call__(self, text: str) -> None:
        if text:
            emit(text if self._plain else text.translate(self._controls), end="")


def _discard(_: str) -> None:
    pass
