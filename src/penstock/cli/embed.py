"""``penstock embed``: vectors of texts."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from penstock.base import InvalidRequest, PenstockError
from penstock.cli import lines
from penstock.cli.answer import usage
from penstock.cli.batch import sum_up
from penstock.cli.complete import complete_model
from penstock.cli.exits import as_dict, emit
from penstock.cli.options import MODEL_HELP, engine_options
from penstock.cli.terminal import is_terminal
from penstock.spec import PoolingParams

if TYPE_CHECKING:
    from penstock.llm.embedding import VectorJob, Vectors
    from penstock.llm.prompts import Prompt

TOGETHER = 256
"""Lines that are computed together. A step holds fewer, and lines are written in order."""


@engine_options
def embed(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP, autocompletion=complete_model)
    ] = None,
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="what to embed")] = None,
    *,
    input: Annotated[
        str | None, typer.Option(metavar="FILE", help='embed each line of a file, or of stdin with "-"')
    ] = None,
    output: Annotated[str | None, typer.Option(metavar="FILE", help="where the JSON lines of --input go")] = None,
    input_format: Annotated[
        Literal["text", "jsonl"] | None,
        typer.Option(help="what a line of --input is; by the ending of its name unless given"),
    ] = None,
    dimensions: Annotated[int | None, typer.Option(help="keep this many leading numbers")] = None,
    normalize: Annotated[bool | None, typer.Option(help="give vectors length 1; as the model's folder says")] = None,
    truncate_prompt_tokens: Annotated[
        int | None, typer.Option(help="shorten longer texts to this many tokens; -1 to what the model holds")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object rather than numbers")] = False,
    engine: dict[str, Any],
) -> None:
    """Print the vector of TEXT, or of each line of a file. A single argument is the text."""
    params = PoolingParams(dimensions=dimensions, normalize=normalize, truncate_prompt_tokens=truncate_prompt_tokens)
    if input is not None:
        with lines.instead_of("text", text):
            _embed_file(model, engine, params, input, output, lines.is_jsonl(input, input_format), as_json)
        return
    if text is None:
        model, text = None, model
    if text is None:
        raise InvalidRequest("missing_prompt", "There is no text", fix='try: penstock embed "Once upon a time"')
    from penstock.llm import LLM

    with LLM(model, **engine) as llm:
        (out,) = llm.embed([text], pooling_params=params)
    if as_json:
        counts = usage(len(out.prompt_token_ids), 0, out.num_cached_tokens)
        emit(json.dumps({"embedding": out.outputs.embedding, "usage": counts}))
    else:
        emit(" ".join(f"{number:.6g}" for number in out.outputs.embedding))


def _embed_file(
    model: str | None,
    engine: Mapping[str, Any],
    params: PoolingParams,
    source: str,
    target: str | None,
    as_jsonl: bool,
    as_json: bool,
) -> None:
    from penstock.llm import LLM
    from penstock.llm.embedding import Vectors
    from penstock.llm.requests import Requests

    with lines.opened(source) as file, lines.written(target, source) as write:
        started = time.perf_counter()
        with LLM(model, **engine) as llm:
            tally = lines.Tally(time.perf_counter() - started, counted="prompt_tokens")
            vectors = Vectors(Requests(llm.engine, lambda: 0))
            with lines.progress(file, shown=target is not None or not is_terminal(sys.stdout)) as advance:
                for report, error in _reports(vectors, params, file, as_jsonl):
                    tally.add(report, error)
                    write(report)
                    advance(tally)
    sum_up(tally, as_json)


def _reports(
    vectors: Vectors, params: PoolingParams, file: IO[bytes], as_jsonl: bool
) -> Iterator[tuple[dict[str, Any], PenstockError | None]]:
    """A report on each line, and its error if it had one. A bad line harms no other."""
    waiting = lines.numbered(file)
    while together := list(islice(waiting, TOGETHER)):
        started = [_start(vectors, params, number, raw, as_jsonl) for number, raw in together]
        vectors.collect([job for _, job in started if not isinstance(job, PenstockError)], lambda job: None)
        for head, job in started:
            try:
                if isinstance(job, PenstockError):
                    raise job
                out = vectors.embedded(job)
            except PenstockError as error:
                yield head | {"error": as_dict(error)}, error
            else:
                counts = usage(len(out.prompt_token_ids), 0, out.num_cached_tokens)
                yield head | {"embedding": out.outputs.embedding, "usage": counts}, None


def _start(
    vectors: Vectors, params: PoolingParams, number: int, raw: bytes, as_jsonl: bool
) -> tuple[dict[str, Any], VectorJob | PenstockError]:
    """The beginning of a line's report, and its request or what is wrong with it."""
    head: dict[str, Any] = {"line": number}
    try:
        prompt, own = lines.parsed(number, raw, as_jsonl)
        if (name := own.pop("id", None)) is not None:
            head["id"] = name
        if own:
            raise InvalidRequest("unknown_option", f"{sorted(own)[0]!r} is nothing that a line to embed can say")
        if "messages" in prompt:
            raise InvalidRequest("invalid_prompt", "A conversation has no vector", fix="write a prompt")
        return head, vectors.embedding(cast("Prompt", prompt), params)
    except PenstockError as error:
        return head, error
