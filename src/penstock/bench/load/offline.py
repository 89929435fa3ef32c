"""A workload without a server: all prompts handed over at once, in this process. Loads torch."""

from __future__ import annotations

import math
import time
from typing import Any

from penstock.bench.job import peak_memory
from penstock.bench.load import machine
from penstock.bench.load.metrics import Figures
from penstock.bench.load.options import LoadOptions
from penstock.bench.load.report import Point, Report, ServerLoad, money
from penstock.bench.load.run import sessions_of, this_machine, today, told
from penstock.bench.load.workload import Session, TokenWriter
from penstock.llm import LLM, TextPrompt, TokensPrompt
from penstock.spec import RequestOutput, SamplingParams


def measure_offline(options: LoadOptions, engine: dict[str, Any], version: str) -> Report:
    """Tokens a second of the whole, from the first prompt handed over to the last text.

    Raises:
        PenstockError: the model cannot be loaded, or the workload cannot be read.
    """
    with LLM(options.model, **engine) as llm:
        longest = llm.engine.config.max_model_len
        writer = TokenWriter(llm.engine.spec.vocab_size)
        warm, _ = sessions_of(options, f"{options.seed} warm-up", longest, warm=True)
        _generate(llm, warm, writer, options)
        sessions, cut = sessions_of(options, f"{options.seed}", longest)
        energy, cpu, started = machine.read_energy(), time.process_time(), time.perf_counter()
        done = _generate(llm, sessions, writer, options)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        joules = (after := machine.read_energy()).joules_since(energy)
        name, command = llm.engine.name, "this process, all prompts at once"
    found = _figures(done, seconds)
    asked = sum(session.turns[0].output for session in sessions)
    short = f"answers are shorter than asked: {found.output_tokens} tokens of {asked}; short answers look fast"
    point = Point(
        load="offline",
        kind="offline",
        value=math.inf,
        figures=found,
        server=ServerLoad(cpu / seconds, peak_memory()),
        joules=joules,
        joules_why=after.why,
        money=None if options.price_per_hour is None else money(found, options.price_per_hour),
        warnings=(short,) if found.output_tokens < asked else (),
    )
    return Report(
        bench="offline",
        date=today(),
        penstock=version,
        machine=this_machine(),
        server=command,
        model=name,
        workload=told(options),
        prompts="of a file" if options.prompts else "random token ids",
        points=(point,),
        notes=(f"{cut} prompts did not fit into the context of {longest} tokens and were cut",) if cut else (),
    )


def _generate(llm: LLM, sessions: list[Session], writer: TokenWriter, options: LoadOptions) -> list[RequestOutput]:
    turns = [session.turns[0] for session in sessions]
    prompts = [
        TextPrompt(prompt=turn.text) if turn.text else TokensPrompt(prompt_token_ids=writer(turn.pieces))
        for turn in turns
    ]
    params = [
        SamplingParams(temperature=options.temperature, max_tokens=turn.output, ignore_eos=options.ignore_eos)
        for turn in turns
    ]
    return llm.generate(prompts, params, use_tqdm=False) if turns else []


def _figures(done: list[RequestOutput], seconds: float) -> Figures:
    """Latencies of single requests mean nothing where all wait for all."""
    inputs = sum(len(request.prompt_token_ids or ()) for request in done)
    outputs = sum(len(request.outputs[0].token_ids) for request in done)
    cached = sum(request.num_cached_tokens or 0 for request in done)
    return Figures(
        requests=len(done),
        succeeded=len(done),
        errors={},
        seconds=seconds,
        offered_per_s=None,
        requests_per_s=len(done) / seconds,
        input_tokens=inputs,
        output_tokens=outputs,
        cached_tokens=cached,
        events=0,
        input_per_s=inputs / seconds,
        output_per_s=outputs / seconds,
        output_per_s_95=None,
        in_flight=float(len(done)),
        peak_in_flight=len(done),
        ttft=None,
        itl=None,
        tpot=None,
        e2e=None,
        late=None,
    )
