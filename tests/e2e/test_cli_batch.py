"""``penstock run --input``: a line of JSON for each prompt, in order, whatever the others are."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from commands import GREEDY, Terminal, argv, penstock
from servers import PROMPT

RUN = ("run", "--dtype", "float32", "--num-threads", "1", "--max-tokens", "8")


def results(done: subprocess.CompletedProcess[bytes], code: int = 0) -> list[dict[str, Any]]:
    assert done.returncode == code, done.stderr.decode()
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_lines_of_text_in_order_and_the_totals(stories: Path, tmp_path: Path) -> None:
    prompts = [f"{PROMPT}, {word}" for word in ("a cat", "a dog that ran to the park", "one")]
    source, target = tmp_path / "prompts.txt", tmp_path / "texts.jsonl"
    source.write_text("\n\n".join(prompts) + "\r\n")
    done = penstock(*RUN, "--json", stories, "--input", source, "--output", target)
    assert done.returncode == 0 and done.stdout == b"", done.stderr
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert [line["line"] for line in lines] == [1, 3, 5]
    assert all(len(line["token_ids"]) == 8 and line["finish_reason"] == "length" for line in lines)
    totals = json.loads(done.stderr)
    assert totals["prompts"] == 3 and totals["failed"] == 0 and totals["usage"]["completion_tokens"] == 24
    assert totals["timings"]["tokens_per_s"] == pytest.approx(24 / totals["timings"]["total_s"], rel=0.05)
    assert totals["peak_memory_bytes"] > 50 << 20
    # A line's text is its own: from stdin, one at a time, and after other lines.
    piped = penstock(*RUN, "--max-num-seqs", "1", stories, "--input", "-", stdin=source.read_bytes())
    assert results(piped) == lines and b"24 tokens in" in piped.stderr and b"tokens/s" in piped.stderr


def test_a_terminal_shows_progress_where_it_shows_nothing_else(stories: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Once\n" * 3)
    arguments = argv(*RUN, stories, "--input", tmp_path / "prompts.txt", "--output", tmp_path / "texts.jsonl")
    with Terminal(arguments, "xterm") as terminal:
        assert "Prompts" in terminal.read_until("3 prompts: 24 tokens")
        assert terminal.end() == 0
    assert len((tmp_path / "texts.jsonl").read_text().splitlines()) == 3


def test_one_bad_line_harms_no_other(stories: Path) -> None:
    good = {"prompt": PROMPT, "id": "mine", "max_tokens": 3, "temperature": 0}
    lines: list[tuple[bytes, str | None]] = [
        (json.dumps(good).encode(), None),
        (b"not json", "invalid_line"),
        (b"\xff", "invalid_line"),
        (b"[" * 100_000, "invalid_line"),
        (b"[1, 2]", "invalid_line"),
        (b'{"prompt": "a", "messages": []}', "invalid_line"),
        (b'{"prompt": "a", "no_such": 1}', "unknown_option"),
        (b'{"prompt": "a", "temperature": -1}', "invalid_parameter"),
        (b'{"prompt": ["a"]}', "invalid_prompt"),
        (b'{"prompt_token_ids": [1, 99999]}', "token_out_of_range"),
        (json.dumps("word " * 2000).encode(), "prompt_too_long"),
        (b'{"messages": [{"role": "user", "content": "Hi"}]}', "no_chat_template"),
        (b'{"messages": "Hi"}', "no_chat_template"),
        (json.dumps(good | {"id": 7, "n": 2}).encode(), None),
    ]
    done = penstock(*RUN, stories, "--input", "-", "--input-format", "jsonl", stdin=b"\n".join(raw for raw, _ in lines))
    found = results(done, code=2)
    assert [line.get("error", {}).get("code") for line in found] == [code for _, code in lines]
    assert [line["line"] for line in found] == list(range(1, len(lines) + 1))
    assert found[0]["id"] == "mine" and found[-1]["id"] == 7
    assert [sample["token_ids"] for sample in found[-1]["outputs"]] == [found[0]["token_ids"]] * 2
    assert f"{len(lines)} prompts, {len(lines) - 2} failed: 9 tokens".encode() in done.stderr


def test_the_name_says_what_a_line_is_and_messages_are_chats(tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text('"Once"\n{"messages": [{"role": "user", "content": "Hello."}]}\n{"prompt_token_ids": [5, 6]}\n')
    text, chat, ids = results(penstock(*RUN, "--input", source))
    assert chat["usage"]["prompt_tokens"] > 8 and ids["usage"]["prompt_tokens"] == 2
    source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes())  # a byte order mark, as editors on Windows write it
    assert results(penstock(*RUN, "--input", source))[0] == text
    as_text = results(penstock(*RUN, "--input", source, "--input-format", "text"))
    assert as_text[0]["usage"]["prompt_tokens"] > text["usage"]["prompt_tokens"]


def test_seeds_belong_to_lines(stories: Path) -> None:
    def texts(stdin: bytes, *options: str) -> list[str]:
        return [
            line.get("text", "") for line in results(penstock(*RUN, *options, stories, "--input", "-", stdin=stdin))
        ]

    once = texts(b"Once\nOnce\n")
    assert once[0] != once[1] and texts(b"\nOnce\n") == once[1:]
    given = texts(b"Once\nOnce\n", "--seed", "5")
    assert given[0] == given[1]


@pytest.mark.parametrize(
    ("arguments", "code", "name"),
    [
        (["--input", "no/such/file"], 3, "input_unreadable"),
        (["--input", "{here}"], 3, "input_unreadable"),
        (["--input", "{file}", "--output", "{file}"], 2, "invalid_parameter"),
        (["--input", "{file}", "--output", "{here}"], 1, "output_failed"),
        (["--input", "{file}", "{here}", "a prompt"], 2, "invalid_parameter"),
        (["--input", "{file}", "a prompt"], 3, "model_not_found"),
        (["--output", "{here}/x", "a prompt"], 2, "missing_input"),
    ],
)
def test_errors(tmp_path: Path, arguments: list[str], code: int, name: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Once\n")
    done = penstock("run", *(part.format(here=tmp_path, file=file) for part in arguments))
    assert done.returncode == code and f"  code: {name}\n".encode() in done.stderr, done.stderr
    assert file.read_text() == "Once\n"
    meant_as_one = "a prompt" in arguments and "--input" in arguments
    assert (b"the prompts are in the file, and an argument is the MODEL" in done.stderr) == meant_as_one


def test_a_full_disk(stories: Path) -> None:
    done = penstock(*RUN, stories, "--input", "-", "--output", "/dev/full", stdin=b"Once\n")
    assert done.returncode == 1 and b"code: output_failed" in done.stderr


def test_samples_and_logprobs_of_one_prompt(stories: Path) -> None:
    done = penstock("run", "--max-tokens", "4", "--n", "2", "--logprobs", "1", "--json", stories, PROMPT)
    (answer,) = results(done)
    assert len(answer["outputs"]) == 2
    for sample in answer["outputs"]:
        assert len(sample["logprobs"]) == 4
        for token, entry in zip(sample["token_ids"], sample["logprobs"], strict=True):
            assert entry[str(token)]["logprob"] <= 0
    shown = penstock("run", "--max-tokens", "4", "--n", "2", stories, PROMPT).stdout.decode()
    assert shown.startswith(f"--- 1 of 2\n{answer['outputs'][0]['text']}\n--- 2 of 2\n")


def test_sampling_options_reach_the_draw(stories: Path) -> None:
    def text(*options: str) -> str:
        done = penstock("run", *GREEDY, "--max-tokens", "12", *options, stories, PROMPT)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode()

    plain = text()
    assert "little girl" in plain and text("--stop", "girl") == plain[: plain.index("girl")] + "\n"
    assert "little" not in text("--bad-words", "little")
    assert text("--choice", "yes", "--choice", "no") in ("yes\n", "no\n")
    assert text("--regex", "[0-9]{3}").strip().isdecimal()


def test_a_schema_from_a_file_and_from_the_line(stories: Path, tmp_path: Path) -> None:
    number = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    schema = json.dumps(number)
    file = tmp_path / "schema.json"
    file.write_text(schema)
    for given in (str(file), schema):
        done = penstock("run", *GREEDY, "--max-tokens", "40", "--json-schema", given, stories, PROMPT)
        assert json.loads(done.stdout)["n"] in (1, 2), (done.stdout, done.stderr)
    failed = penstock("run", "--json-schema", "no/such/file", stories, PROMPT)
    assert failed.returncode == 3 and b"code: input_unreadable" in failed.stderr


def test_usage_errors_are_json_too() -> None:
    done = subprocess.run(argv("run", "--json", "--max-token", "3", "x"), capture_output=True, timeout=60)
    error = json.loads(done.stderr)["error"]
    assert done.returncode == 2 and error["code"] == "invalid_option" and "--max-tokens" in error["what"]
