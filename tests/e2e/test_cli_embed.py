"""``penstock embed``: vectors on the command line are those of ``LLM.embed``, and a bad line harms no other."""

from __future__ import annotations

import json
import math
from pathlib import Path

from commands import penstock

TEXTS = ["The garden was locked.", "Nobody had the key.", "It rained."]


def embed(*arguments: str | Path, stdin: str = "", code: int = 0) -> list[dict[str, object]]:
    done = penstock("embed", "--dtype", "float32", *arguments, stdin=stdin.encode())
    assert done.returncode == code, done.stderr.decode()
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_text_and_lines_of_a_file_have_the_same_vectors(tmp_path: Path) -> None:
    source, target = tmp_path / "texts.txt", tmp_path / "vectors.jsonl"
    source.write_text("\n".join(TEXTS))
    assert embed("--input", source, "--output", target) == []
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert [line["line"] for line in lines] == [1, 2, 3]
    (alone,) = embed("--json", TEXTS[1])
    assert alone["usage"] == lines[1]["usage"]
    assert math.dist(alone["embedding"], lines[1]["embedding"]) < 1e-5  # type: ignore[arg-type]
    assert abs(math.hypot(*lines[0]["embedding"]) - 1) < 1e-6
    assert math.dist(lines[0]["embedding"], lines[2]["embedding"]) > 0.01
    numbers = penstock("embed", "--dimensions", "4", TEXTS[0]).stdout.split()
    assert len(numbers) == 4 and all(-1 <= float(number) <= 1 for number in numbers)


def test_one_bad_line_harms_no_other() -> None:
    lines: list[tuple[str, str | None]] = [
        (json.dumps({"prompt": TEXTS[0], "id": "first"}), None),
        ("{", "invalid_line"),
        ('""', "empty_prompt"),
        (json.dumps("word " * 3000), "prompt_too_long"),
        ('{"prompt": "a", "temperature": 0}', "unknown_option"),
        ('{"messages": []}', "invalid_prompt"),
        ('{"prompt_token_ids": [5, 6]}', None),
    ]
    text = "\n".join(line for line, _ in lines)
    found = embed("--input", "-", "--input-format", "jsonl", "--dimensions", "8", stdin=text, code=2)
    assert [line.get("error", {}).get("code") for line in found] == [code for _, code in lines]  # type: ignore[attr-defined]
    assert found[0]["id"] == "first" and len(found[0]["embedding"]) == 8  # type: ignore[arg-type]


def test_errors() -> None:
    for arguments, code, name in (
        ((), 2, b"missing_prompt"),
        (("--dimensions", "0", "a"), 2, b"invalid_parameter"),
        (("--dimensions", "9999", "a"), 2, b"invalid_parameter"),
        (("--input", "no/such/file"), 3, b"input_unreadable"),
        (("--input", "x", "MODEL", "text"), 2, b"invalid_parameter"),
        (("no/such/folder", "text"), 3, b"model_not_found"),
    ):
        done = penstock("embed", *arguments)
        assert done.returncode == code and b"code: " + name in done.stderr, (arguments, done.stderr)
