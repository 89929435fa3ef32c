"""``penstock bench``: what Penstock says about its speed, measured here."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal

import typer

from penstock.base import InvalidRequest
from penstock.cli import bench_load
from penstock.cli.exits import emit, guarded
from penstock.cli.options import MODEL_HELP
from penstock.spec.sampling import MAX_N

app = typer.Typer(rich_markup_mode=None)
app.command("serve")(guarded(bench_load.serve))
app.command("latency")(guarded(bench_load.latency))
app.command("offline")(guarded(bench_load.offline))
app.command("cost")(guarded(bench_load.cost))


@app.command("startup")
@guarded
def startup(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = None,
    runs: Annotated[int, typer.Option(min=1, max=1000, help="measured runs, after one to warm the file cache")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Time from the start of the process to the first token; the bundled model by default."""
    from penstock.bench.startup import measure_startup

    report = measure_startup(model, runs=runs)
    if as_json:
        emit(json.dumps(dataclasses.asdict(report)))
        return
    emit(f"process start to first token: median {report.median_s:.2f} s of {runs} runs")
    emit(f"  from {report.min_s:.2f} to {report.max_s:.2f} s; first run, cold file cache: {report.first_s:.2f} s")
    emit(f"  command: {shlex.join(report.command)}")
    emit(f"  machine: {report.machine}, {report.cpus} CPUs, Python {report.python}; {report.date}")


@app.command("best-of-n")
@guarded
def best_of_n(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = None,
    questions: Annotated[
        Path | None, typer.Option(help="lines of JSON with question and answer; held-out sums if left out")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="questions asked, the first ones")] = 200,
    samples: Annotated[str, typer.Option(help="the N to report, with commas between")] = "1,2,4,8,16,32",
    temperature: Annotated[float, typer.Option(help="of the samples")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="most tokens of an answer")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="of the first question; the others count up")] = 0,
    num_threads: Annotated[int | None, typer.Option(min=1, help="compute threads")] = None,
    dollars_per_hour: Annotated[float | None, typer.Option(min=0.0, help="price of this machine, for the cost")] = None,
    plot: Annotated[Path | None, typer.Option(help="write the curves to this SVG file")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Quality against N on questions with a checker: majority, mean log-probability, and a verifier that knows."""
    from penstock.bench.best_of_n import Question, chart, measure_best_of_n, read_questions, table
    from penstock.llm import LLM
    from penstock.train.arithmetic import split_problems

    counts = _counts("--samples", samples, MAX_N)
    if questions is None:
        asked = [Question(problem.question, problem.answer) for problem in split_problems()[1]]
    else:
        asked = read_questions(questions)
    with LLM(model, num_threads=num_threads, max_num_seqs=max(64, counts[-1])) as llm:
        report = measure_best_of_n(
            llm,
            asked[:limit],
            counts,
            temperature=temperature,
            max_tokens=max_tokens,
            seed=seed,
            dollars_per_hour=dollars_per_hour,
        )
    if plot is not None:
        plot.write_text(chart(report), "utf-8")
    emit(json.dumps(dataclasses.asdict(report)) if as_json else table(report))


def _counts(option: str, text: str, most: int) -> list[int]:
    """Raises InvalidRequest: invalid_parameter."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and 1 <= int(part) <= most for part in parts):
        why = f"it must be numbers from 1 to {most} with commas between"
        raise InvalidRequest("invalid_parameter", f"{option} {text!r} cannot be used", why=why)
    return sorted({int(part) for part in parts})


@app.command("overhead")
@guarded
def overhead(
    running: Annotated[int, typer.Option(min=1, max=4096, help="requests in each step")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Time per step spent outside the model: scheduler and batch arrays."""
    from penstock.bench.overhead import measure_overhead

    rows = measure_overhead(running)
    if as_json:
        emit(json.dumps([dataclasses.asdict(row) for row in rows]))
        return
    for row in rows:
        emit(
            f"{row.scenario:15} {row.total_ms:.3f} ms a step at {row.running} requests"
            f" (scheduler {row.scheduler_ms:.3f}, inputs {row.inputs_ms:.3f}; worst round {row.worst_round_ms:.3f};"
            f" {row.arrivals:.1f} arrivals a step)"
        )


@app.command("determinism")
@guarded
def determinism(
    work: Annotated[Path, typer.Option(help="folder to build the other kernels in; kept")] = Path("determinism"),
    shape: Annotated[str, typer.Option(help="whose layers: qwen3-0.6b, llama-3.2-1b, tiny")] = "qwen3-0.6b",
    prompt: Annotated[int, typer.Option(min=1, help="rows of a prompt")] = 512,
    context: Annotated[int, typer.Option(min=1, help="positions that attention sees")] = 4096,
    threads: Annotated[int, typer.Option(min=1, help="compute threads")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="rounds of calls in turn")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """What a fixed order of additions costs: these kernels beside the same sources with sums in any order."""
    from penstock.bench.checkpoints import SHAPES
    from penstock.bench.determinism import measure_determinism, table
    from penstock.spec.hf import model_spec

    dense = [name for name in SHAPES if model_spec(SHAPES[name]).moe is None]
    spec = model_spec(SHAPES[_among("--shape", [shape], dense)[0]])
    if context < prompt:
        why = f"the {prompt} rows of the prompt end at position {context}"
        raise InvalidRequest("invalid_parameter", f"--context {context} cannot be used", why=why)
    report = measure_determinism(spec, work, prompt=prompt, context=context, threads=threads, rounds=rounds)
    emit(json.dumps(dataclasses.asdict(report)) if as_json else table(report))


@app.command("context")
@guarded
def context(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = None,
    contexts: Annotated[str, typer.Option(help="tokens before the one that is decoded, with commas between")] = "256",
    threads: Annotated[str, typer.Option(help="numbers of compute threads, with commas between")] = "1,2",
    quant: Annotated[Literal["none", "int8", "int4"], typer.Option(help="of the weights")] = "none",
    kv_dtype: Annotated[Literal["auto", "int8"], typer.Option(help="of K and V")] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="of every case, in turn")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Decode behind contexts of many lengths, and what a second thread gives."""
    from penstock.bench.context import measure_context, table
    from penstock.spec import EngineConfig

    lengths, counts = _counts("--contexts", contexts, 1 << 20), _counts("--threads", threads, 1024)
    report = measure_context(EngineConfig(model=model, quant=quant, kv_dtype=kv_dtype), lengths, counts, rounds)
    emit(json.dumps(dataclasses.asdict(report)) if as_json else table(report))


@app.command("throughput")
@guarded
def throughput(
    model: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="a model folder; random weights like Qwen3-0.6B if left out")
    ] = None,
    peer: Annotated[str | None, typer.Option(help="measure this beside it: transformers")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="prompts, all handed over at once")] = 32,
    inputs: Annotated[int, typer.Option("--in", min=1, help="tokens of each prompt")] = 128,
    outputs: Annotated[int, typer.Option("--out", min=2, help="tokens generated for each")] = 128,
    threads: Annotated[int, typer.Option(min=1, help="compute threads")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="runs of each, in turn")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Tokens a second of a batch, beside a peer and beside what this machine's memory and arithmetic allow."""
    from penstock.bench.sides import HERE
    from penstock.bench.throughput import measure_throughput, table

    peers = [name for name in HERE if name != "penstock"]
    if peer is not None and peer not in peers:
        why = f"it must be one of {', '.join(peers)}"
        raise InvalidRequest("invalid_parameter", f"--peer {peer!r} cannot be used", why=why)
    report = measure_throughput(
        model, peer=peer, prompts=prompts, inputs=inputs, outputs=outputs, threads=threads, rounds=rounds
    )
    emit(json.dumps(dataclasses.asdict(report)) if as_json else table(report))


@app.command("peers")
@guarded
def peers(
    shape: Annotated[str, typer.Option(help="of the model: qwen3-0.6b, llama-3.2-1b, moe-64, tiny")] = "qwen3-0.6b",
    work: Annotated[Path, typer.Option(help="folder for the peers' venvs, models and results; kept")] = Path("peers"),
    only: Annotated[str | None, typer.Option(help="contenders, with commas between; all by default")] = None,
    cells: Annotated[str | None, typer.Option(help="what is measured, with commas between; all by default")] = None,
    bits: Annotated[int, typer.Option(help="of the weights: 16, 8 or 4")] = 16,
    threads: Annotated[int, typer.Option(min=1, help="compute threads")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="runs of ours and of the two best peers, in turn")] = 5,
    again: Annotated[bool, typer.Option("--again", help="measure anew what was measured already")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Beside llama.cpp, OpenVINO GenAI, vLLM and transformers: one model, the same requests, in turn."""
    from penstock.bench.checkpoints import SHAPES
    from penstock.bench.contenders import CELLS
    from penstock.bench.peers_report import measure_peers, table
    from penstock.bench.sides import SIDES

    _among("--shape", [shape], SHAPES)
    _among("--bits", [str(bits)], ("16", "8", "4"))
    report = measure_peers(
        work,
        shape=shape,
        bits=bits,
        cells=_among("--cells", cells.split(",") if cells else list(CELLS), CELLS),
        only=_among("--only", only.split(","), SIDES) if only else None,
        rounds=rounds,
        threads=threads,
        again=again,
        say=lambda line: typer.echo(line, err=True),
    )
    emit(json.dumps(dataclasses.asdict(report)) if as_json else table(report))


@app.command("quality")
@guarded
def quality(
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="a file of text: what is read")],
    work: Annotated[Path, typer.Option(help="folder for llama.cpp's venv and the models; kept")] = Path("peers"),
    models: Annotated[str, typer.Option(help="with commas between")] = "bundled,padded,outliers",
    tokens: Annotated[int, typer.Option(min=2, help="of the text, the first ones")] = 4096,
    threads: Annotated[int, typer.Option(min=1, help="compute threads")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """What small integers cost in answers, beside llama.cpp: divergence from the same weights computed in fp32."""
    from penstock.bench.quality import MODELS, measure_models, table
    from penstock.spec.hf import read_model_spec
    from penstock.spec.location import BUNDLED
    from penstock.text import load_tokenizer

    ids = load_tokenizer(BUNDLED, read_model_spec(BUNDLED).vocab_size).encode(text.read_text("utf-8"))[:tokens]
    names = _among("--models", models.split(","), MODELS)
    rows = measure_models(work, names, ids, threads, say=lambda line: typer.echo(line, err=True))
    emit(json.dumps([dataclasses.asdict(row) for row in rows]) if as_json else table(rows))


def _among(option: str, given: list[str], known: Collection[str]) -> list[str]:
    """Raises InvalidRequest: invalid_parameter."""
    for name in given:
        if name not in known:
            why = f"it must be of {', '.join(known)}"
            raise InvalidRequest("invalid_parameter", f"{option} {name!r} cannot be used", why=why)
    return given


@app.command("structured")
@guarded
def structured(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON lines: a schema each, perhaps with instances")],
    model: Annotated[str | None, typer.Option("--model", help=MODEL_HELP)] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="longest completion")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="of the draw; 0 is greedy")] = 1.0,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first so many schemas")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Compile JSON schemas, tell instances apart, and generate an instance of each; the bundled model by default."""
    from penstock.bench.structured import measure_structured

    report = measure_structured(file, model, max_tokens=max_tokens, temperature=temperature, limit=limit)
    if as_json:
        emit(json.dumps(dataclasses.asdict(report)))
        return
    compiled, reasons = report.exact + report.wider, report.finish_reasons
    emit(f"compiled           {compiled} of {report.schemas}: {report.exact} exactly, {report.wider} with validation")
    emit("compile time       median {:.1f} ms, p99 {:.1f} ms, worst {:.1f} ms".format(*report.compile_ms))
    emit(f"valid instances    {report.valid_accepted} of {report.valid} accepted")
    emit(f"invalid instances  {report.invalid_rejected} of {report.invalid} rejected")
    emit(
        f"completions        {', '.join(f'{reasons[name]} {name}' for name in sorted(reasons))}; {report.tokens} tokens"
    )
    emit(f"finished           {report.finished_valid} of {report.finished} are valid")
    emit("mask per token     median {:.0f} us, p99 {:.0f} us".format(*report.mask_us))
    emit("before the first   median {:.2f} ms, p99 {:.2f} ms, the grammar being known".format(*report.first_mask_ms))
    ids_of = {"misjudged": report.misjudged, "not valid": report.broken, "unfinished": report.unfinished}
    for name, ids in ids_of.items():
        if ids:
            emit(f"{name:18} {' '.join(ids[:20])}")
    emit(f"in all             {report.seconds:.0f} s")
