"""The best-of-N measurement: what it counts, against samples that are written by hand."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from penstock import LLM, CompletionOutput, PenstockError, RequestOutput
from penstock.bench.best_of_n import (
    BestOfReport,
    BestOfRow,
    Question,
    _qualities,
    chart,
    last_number,
    measure_best_of_n,
    read_questions,
    table,
)


def output(*answers: tuple[str, float]) -> RequestOutput:
    outputs = [CompletionOutput(i, text, [1], value) for i, (text, value) in enumerate(answers)]
    return RequestOutput("0", None, [1, 2], outputs, finished=True)


QUESTIONS = [Question("What is 40 + 2?", "42"), Question("And 1,000 - 1?", "So it is #### 999")]
OUTPUTS = [
    output(("42", -3.0), ("7", -1.0), ("it is 42.", -2.0), ("8", -4.0)),
    output(("1", -1.0), ("2", -2.0), ("2", -3.0), ("999.0", -4.0)),
]


def test_last_number() -> None:
    texts = ("42", "x = -7.50, so", "It is 1,024.0 in all", "3 + 4 = 7.", "none", "")
    assert [last_number(text) for text in texts] == ["42", "-7.5", "1024", "7", None, None]


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (1, (3 / 8, 3 / 8, 3 / 8)),
        # pairs: majority takes the first of a tie; mean log-probability the surest; the oracle any
        (2, ((1 + 1 + 0 + 0) / 4, (0 + 1 + 0 + 0) / 4, (1 + 1 + 0 + 1) / 4)),
        (4, (1 / 2, 0 / 2, 2 / 2)),
    ],
)
def test_qualities_of_groups(n: int, expected: tuple[float, float, float]) -> None:
    assert _qualities(QUESTIONS, OUTPUTS, n) == pytest.approx(expected)


def test_questions_are_read_from_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "a", "answer": "#### 4", "more": 1}\n{"question": "b", "answer": "5"}\n')
    assert read_questions(path) == [Question("a", "#### 4"), Question("b", "5")]
    for text in ("", "{", '{"question": "a"}', '{"question": "a", "answer": "none"}', '{"question": 1, "answer": "1"}'):
        path.write_text(text)
        with pytest.raises(PenstockError, match="invalid_questions"):
            read_questions(path)
    with pytest.raises(PenstockError, match="file_not_found"):
        read_questions(tmp_path / "absent.jsonl")


def test_a_measurement_of_a_model(test_data: Path) -> None:
    model = str(test_data / "models" / "stories260k")
    with LLM(model, backend="ref", dtype="float32", kv_memory="16M", num_threads=1) as llm:
        report = measure_best_of_n(llm, QUESTIONS, [2, 1], max_tokens=3, seed=1, dollars_per_hour=3600.0)
    assert [row.n for row in report.rows] == [1, 2]
    assert [row.tokens for row in report.rows] == [3.0, 6.0]
    assert report.rows[0].prompt_tokens == report.rows[1].prompt_tokens > 5
    assert all(row.dollars == pytest.approx(1000 * row.seconds) for row in report.rows)
    assert (report.greedy, report.questions, report.rows[1].oracle) == (0.0, 2, 0.0)


def test_a_report_is_shown_as_table_and_chart() -> None:
    rows = tuple(BestOfRow(n, 0.5, 0.25, n / 8, 3.0 * n, 9.0, 0.01, None) for n in (1, 2, 4, 8))
    report = BestOfReport("a <model>", 7, 1.0, 3, 0, 0.4, rows)
    lines = table(report).splitlines()
    assert lines[0] == "a <model>: 7 questions, temperature 1, at most 3 tokens, seed 0; 40.0% right at temperature 0"
    assert lines[5].split() == ["8", "50.0%", "25.0%", "100.0%", "24.0", "9.0", "10.00"]
    svg = ElementTree.fromstring(chart(report))
    space = "{http://www.w3.org/2000/svg}"
    first, *_ = (line.attrib["points"].split() for line in svg.iter(f"{space}polyline"))
    heights = [float(point.split(",")[1]) for point in first]
    assert len(heights) == 4 and heights == sorted(heights, reverse=True) and heights[-1] == 40.0
    assert "one, temperature 0" in [text.text for text in svg.iter(f"{space}text")]
