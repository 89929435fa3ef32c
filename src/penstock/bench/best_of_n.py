"""Quality against N: what more samples of a question buy, by how the answer is chosen, and what they cost.

Every question has an answer that can be checked. The largest N is sampled once; what a smaller N would have given is
read off its samples, averaged over all disjoint groups of N, so that the curves differ by the choice alone. Time is
that of requests of N samples each, measured apart.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock.base import InvalidRequest, NotFound
from penstock.bench.chart import line_chart
from penstock.llm import LLM, Majority, Scorer, Verifier, choose, mean_logprob
from penstock.spec import CompletionOutput, RequestOutput, SamplingParams


@dataclass(frozen=True, slots=True)
class Question:
    """A question, and a text in which the right answer is the last number."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class BestOfRow:
    """One N. Qualities are shares of questions answered right.

    Attributes:
        majority: the answer that most samples reach (self-consistency).
        mean_logprob: the sample of which the model is surest.
        oracle: a verifier that knows the answer: right if any sample is.
        tokens: drawn for one answer, on average.
        prompt_tokens: computed for one answer, on average: shared by its samples.
        seconds: of the whole run, for one answer.
        dollars: for 1,000 answers, at the price given.
    """

    n: int
    majority: float
    mean_logprob: float
    oracle: float
    tokens: float
    prompt_tokens: float
    seconds: float
    dollars: float | None


@dataclass(frozen=True, slots=True)
class BestOfReport:
    """Attributes:
    greedy: quality of the likeliest answer, one sample at temperature 0.
    """

    model: str
    questions: int
    temperature: float
    max_tokens: int
    seed: int
    greedy: float
    rows: tuple[BestOfRow, ...]


def last_number(text: str) -> str | None:
    """The last number in a text, as plain digits: "so 1,024.0" gives "1024"; None if there is none."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return f"{float(found[-1].replace(',', '')):.10g}" if found else None


def read_questions(path: Path) -> list[Question]:
    """Reads lines of JSON with ``question`` and ``answer`` (GSM8K's form).

    Raises:
        NotFound: (file_not_found) there is no such file.
        InvalidRequest: (invalid_questions) a line is not of that form, or its answer has no number.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise NotFound("file_not_found", f"{path} cannot be read", why=error.strerror or type(error).__name__) from None
    questions = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            made = Question(row["question"], row["answer"])
            usable = last_number(made.answer) is not None and isinstance(made.question, str)
        except (ValueError, TypeError, KeyError):
            usable = False
        if not usable:
            what = f"Line {number} of {path} is not a question"
            raise InvalidRequest("invalid_questions", what, fix='write {"question": "...", "answer": "... 42"}')
        questions.append(made)
    if not questions:
        raise InvalidRequest("invalid_questions", f"{path} has no questions")
    return questions


def measure_best_of_n(
    llm: LLM,
    questions: Sequence[Question],
    counts: Sequence[int],
    *,
    temperature: float = 1.0,
    max_tokens: int = 16,
    seed: int = 0,
    dollars_per_hour: float | None = None,
) -> BestOfReport:
    """Asks every question, by the model's chat template if it has one.

    Args:
        counts: the N to report; the largest is sampled.
    """
    counts = sorted(set(counts))

    def params(n: int) -> list[SamplingParams]:
        return [
            SamplingParams(n=n, temperature=temperature, max_tokens=max_tokens, logprobs=0, seed=seed + i)
            for i in range(len(questions))
        ]

    greedy, _ = _ask(llm, questions, [SamplingParams(temperature=0.0, max_tokens=max_tokens)] * len(questions))
    timed = {n: _ask(llm, questions, params(n)) for n in counts}
    most = timed[counts[-1]][0]
    rows = []
    for n in counts:
        outputs, seconds = timed[n]
        each = seconds / len(questions)
        majority, by_logprob, oracle = _qualities(questions, most, n)
        rows.append(
            BestOfRow(
                n=n,
                majority=majority,
                mean_logprob=by_logprob,
                oracle=oracle,
                tokens=statistics.mean(sum(len(c.token_ids) for c in o.outputs) for o in outputs),
                prompt_tokens=statistics.mean(len(o.prompt_token_ids) for o in outputs),
                seconds=each,
                dollars=None if dollars_per_hour is None else 1000 * each * dollars_per_hour / 3600,
            )
        )
    right = [_right(question, o.outputs[0]) for question, o in zip(questions, greedy, strict=True)]
    return BestOfReport(
        model=llm.engine.name,
        questions=len(questions),
        temperature=temperature,
        max_tokens=max_tokens,
        seed=seed,
        greedy=statistics.mean(right),
        rows=tuple(rows),
    )


def _ask(
    llm: LLM, questions: Sequence[Question], params: Sequence[SamplingParams]
) -> tuple[list[RequestOutput], float]:
    """The outputs, and the seconds they took together."""
    started = time.perf_counter()
    if llm.engine.chat is None:
        outputs = llm.generate([q.question for q in questions], params, use_tqdm=False)
    else:
        outputs = llm.chat([[{"role": "user", "content": q.question}] for q in questions], params, use_tqdm=False)
    return outputs, time.perf_counter() - started


def _right(question: Question, completion: CompletionOutput) -> float:
    return float(last_number(completion.text) == last_number(question.answer))


def _qualities(questions: Sequence[Question], outputs: Sequence[RequestOutput], n: int) -> tuple[float, float, float]:
    """By majority, mean log-probability and the oracle; over all questions and all disjoint groups of ``n`` samples."""
    right: list[list[float]] = []
    for question, output in zip(questions, outputs, strict=True):
        gold = last_number(question.answer)
        oracle = Verifier(lambda _, text, gold=gold: float(last_number(text) == gold))  # type: ignore[misc]
        scorers: tuple[Scorer, ...] = (Majority(last_number), mean_logprob, oracle)
        for at in range(0, len(output.outputs) - n + 1, n):
            group = output.outputs[at : at + n]
            picks = [group[choose(scorer(question.question, group))] for scorer in scorers]
            right.append([_right(question, pick) for pick in picks])
    majority, by_logprob, by_oracle = (statistics.mean(column) for column in zip(*right, strict=True))
    return majority, by_logprob, by_oracle


def table(report: BestOfReport) -> str:
    """The report for a terminal."""
    lines = [
        f"{report.model}: {report.questions} questions, temperature {report.temperature:g}, at most {report.max_tokens}"
        f" tokens, seed {report.seed}; {report.greedy:.1%} right at temperature 0",
        f"{'N':>4} {'majority':>9} {'logprob':>9} {'verifier':>9} {'tokens':>9} {'prompt':>7} {'ms':>8}"
        + ("  $ per 1,000" if report.rows[0].dollars is not None else ""),
    ]
    for row in report.rows:
        cost = "" if row.dollars is None else f" {row.dollars:12.4g}"
        lines.append(
            f"{row.n:4} {row.majority:9.1%} {row.mean_logprob:9.1%} {row.oracle:9.1%}"
            f" {row.tokens:9.1f} {row.prompt_tokens:7.1f} {1e3 * row.seconds:8.2f}{cost}"
        )
    lines.append("tokens drawn, prompt tokens (shared by the samples) and time are those of one answer")
    return "\n".join(lines)


def chart(report: BestOfReport) -> str:
    """The report's curves as an SVG."""
    curves = {
        "verifier that knows": [row.oracle for row in report.rows],
        "majority": [row.majority for row in report.rows],
        "mean log-probability": [row.mean_logprob for row in report.rows],
    }
    ticks = [f"{row.n}" for row in report.rows]
    title = f"{report.model}, {report.questions} questions, temperature {report.temperature:g}"
    return line_chart(title, "samples per question (N)", ticks, curves, {"one, temperature 0": report.greedy})
