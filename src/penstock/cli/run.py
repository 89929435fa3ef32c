"""``penstock run``: a prompt's completion as it comes, or those of a whole file."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from penstock.base import InvalidRequest
from penstock.cli import sampling as cli_sampling
from penstock.cli.answer import Answer
from penstock.cli.batch import run_file
from penstock.cli.complete import complete_model
from penstock.cli.exits import emit
from penstock.cli.lines import instead_of, is_jsonl
from penstock.cli.options import MODEL_HELP, engine_options, sampling_options
from penstock.cli.terminal import TextOutput
from penstock.cli.trace import write_own
from penstock.spec import SamplingParams

DEFAULTS = {"max_tokens": 256}
"""Where neither the command line nor the model says anything."""


@engine_options
@sampling_options(**DEFAULTS)
def run(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP, autocompletion=complete_model)
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help='what to continue; "-", or none in a pipe, reads it from stdin'),
    ] = None,
    *,
    input: Annotated[
        str | None, typer.Option(metavar="FILE", help='complete each line of a file, or of stdin with "-"')
    ] = None,
    output: Annotated[str | None, typer.Option(metavar="FILE", help="where the JSON lines of --input go")] = None,
    input_format: Annotated[
        Literal["text", "jsonl"] | None,
        typer.Option(help="what a line of --input is; by the ending of its name unless given"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of streaming text")] = False,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write the steps of PROMPT's completion there, for Perfetto")
    ] = None,
    sampling: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    """Continue PROMPT and print the text as it comes. A single argument is the prompt.

    With --input, each line is a prompt and gets a line of JSON, in order; the totals go to stderr.
    """
    asked = cli_sampling.asked(sampling)
    if input is not None and trace is not None:
        raise InvalidRequest("trace_of_one", "--trace is of one PROMPT", why="--input has many", fix="leave one out")
    if input is not None:
        with instead_of("prompt", prompt):
            run_file(model, engine, DEFAULTS, asked, input, output, is_jsonl(input, input_format), as_json)
        return
    if output is not None or input_format is not None:
        raise InvalidRequest(
            "missing_input", "--output and --input-format need --input", fix="name the file of prompts"
        )
    if prompt is None:
        model, prompt = None, model
        _refuse_model_alone(prompt)
    _complete(model, engine, asked, _prompt_text(prompt), as_json, trace)


def _complete(
    model: str | None, engine: dict[str, Any], asked: dict[str, Any], text: str, as_json: bool, trace: Path | None
) -> None:
    from penstock.llm import LLM

    started = time.perf_counter()
    with LLM(model, **engine) as llm:
        params = SamplingParams(**{**DEFAULTS, **llm.engine.recommended, **asked})
        prompt = llm.get_tokenizer().encode(text)
        load_s = time.perf_counter() - started
        answer = Answer(len(prompt), params.n)
        show = TextOutput()
        streamed = not as_json and params.n == 1
        for delta in llm.stream({"prompt_token_ids": prompt}, params):
            answer.take(delta)
            if streamed:
                show(delta.text)
        if trace is not None:
            write_own(trace, llm.engine.service)
    if as_json:
        report = answer.report()
        report["timings"] = {"load_s": round(load_s, 4)} | report["timings"]
        emit(json.dumps(report))
        return
    for number, sample in enumerate(answer.samples if not streamed else [], 1):
        emit(f"--- {number} of {params.n}")
        show(sample.text)
        emit("")
    if streamed:
        emit("")


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
            "invalid_text",
            "The prompt on stdin is not UTF-8 text",
            why=f"byte {error.start} cannot be decoded",
            fix="convert it, as with iconv -t utf-8",
        ) from None
