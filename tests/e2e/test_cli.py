"""The command line with a real model: text, JSON, errors with their exit codes, and quiet ends."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from commands import GREEDY, argv, penstock, running
from servers import PROMPT, TEMPLATE

RUN = ("run", *GREEDY)


def test_run_prints_text_and_the_same_text_as_json(stories: Path) -> None:
    plain = penstock(*RUN, "--max-tokens", "24", stories, PROMPT)
    assert (plain.returncode, plain.stderr) == (0, b"")
    assert plain.stdout.startswith(b", there was a little girl named Lily") and plain.stdout.endswith(b"\n")

    done = penstock(*RUN, "--max-tokens", "24", "--json", stories, "-", stdin=PROMPT.encode())
    answer = json.loads(done.stdout)
    assert answer["text"] == plain.stdout.decode()[:-1]
    assert len(answer["token_ids"]) == 24 and answer["finish_reason"] == "length"
    usage, timings = answer["usage"], answer["timings"]
    assert usage["completion_tokens"] == 24 and usage["total_tokens"] == 24 + usage["prompt_tokens"]
    assert usage["cached"] == 0
    assert 0 < timings["time_to_first_token_s"] <= timings["total_s"] and timings["load_s"] > 0
    assert timings["tokens_per_s"] == pytest.approx(24 / timings["total_s"], rel=0.01)


def test_what_is_left_open_is_as_the_model_recommends(stories: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(stories, folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.0, "max_new_tokens": 5}')
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n")

    def tokens(*arguments: str | Path) -> list[int]:
        done = penstock("run", "--dtype", "float32", "--num-threads", "1", *arguments)
        ids: list[int] = json.loads(done.stdout)["token_ids"]
        return ids

    greedy = tokens("--json", "--temperature", "0", "--max-tokens", "5", stories, PROMPT)
    assert tokens("--json", folder, PROMPT) == greedy == tokens("--input", tmp_path / "prompts.txt", folder)
    assert tokens("--json", "--max-tokens", "3", folder, PROMPT) == greedy[:3]
    plain = ("--json", "--generation-config", "none", "--max-tokens", "40")
    assert tokens(*plain, folder, PROMPT) == tokens(*plain, stories, PROMPT)
    assert len(tokens(*plain, folder, PROMPT)) == 40
    script = b"Hello\n/params\n/set max_tokens 2\nHello\n/set max_tokens -\nHello\n"
    options = ("--json", "--chat-template", tmp_path / "template.jinja")
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    talk = penstock("chat", *options, folder, stdin=script)
    assert [len(json.loads(line)["token_ids"]) for line in talk.stdout.splitlines()] == [5, 2, 5]
    assert b"temperature            0.0" in talk.stderr


def test_a_prompt_from_a_pipe_loses_one_newline(stories: Path) -> None:
    def tokens(*arguments: str | Path, stdin: bytes = b"") -> int:
        done = penstock(*RUN, "--max-tokens", "1", "--json", *arguments, stdin=stdin)
        assert done.returncode == 0, done.stderr
        count: int = json.loads(done.stdout)["usage"]["prompt_tokens"]
        return count

    plain = tokens(stories, PROMPT)
    assert tokens(stories, "-", stdin=f"{PROMPT}\n".encode()) == plain
    assert tokens(stories, "-", stdin=f"{PROMPT}\n\n".encode()) > plain
    assert tokens(stdin=f"{PROMPT}\n".encode()) == tokens(PROMPT)  # the bundled model
    assert b'"-" to read' in penstock("run").stderr


def test_a_model_alone_is_no_prompt(stories: Path) -> None:
    assert penstock("run", stories).stderr.startswith(b"Error: MODEL was given without a PROMPT\n")


def test_a_full_disk_and_a_closed_stdout(stories: Path) -> None:
    command = shlex.join(argv(*RUN, "--max-tokens", "2", stories, PROMPT))

    def end(redirection: str) -> tuple[int, bytes]:
        done = subprocess.run(["bash", "-c", command + redirection], stderr=subprocess.PIPE, timeout=60)
        return done.returncode, done.stderr

    code, errors = end(" >/dev/full")
    assert code == 1 and errors.endswith(b"  code: output_failed\n") and len(errors.splitlines()) == 4, errors
    assert end(" >&-") == (0, b"")


def test_seeds(stories: Path) -> None:
    def text(seed: int) -> bytes:
        return penstock("run", "--max-tokens", "12", "--seed", str(seed), stories, PROMPT).stdout

    assert text(3) != text(4)


@pytest.mark.parametrize(
    ("arguments", "code", "name"),
    [
        (["run"], 2, "missing_prompt"),
        (["run", "{model}"], 2, "missing_prompt"),
        (["run", "--temperature", "-1", "{model}", PROMPT], 2, "invalid_parameter"),
        (["run", "--max-tokens", "9", "{model}", "word " * 600], 2, "prompt_too_long"),
        (["run", "no/such/folder", PROMPT], 3, "model_not_found"),
        (["run", "--tensor-parallel-size", "2", "{model}", PROMPT], 3, "parallelism_unsupported"),
        (["serve", "--tensor-parallel-size", "2", "--port", "0", "{model}"], 3, "parallelism_unsupported"),
        (["serve", "--host", "203.0.113.1", "--port", "0", "{model}"], 3, "cannot_listen"),
        (["serve", "--host", "no host", "--port", "0", "{model}"], 3, "cannot_listen"),
    ],
)
def test_errors_are_one_short_block(stories: Path, arguments: list[str], code: int, name: str) -> None:
    done = penstock(*(part.format(model=stories) for part in arguments))
    errors = done.stderr.decode()
    assert done.returncode == code and done.stdout == b"", errors
    assert errors.startswith("Error: ") and errors.endswith(f"  code: {name}\n") and len(errors.splitlines()) <= 4


def test_a_traceback_only_on_request(stories: Path) -> None:
    bad = ("run", "--temperature", "-1", stories, PROMPT)
    assert b"Traceback" not in penstock(*bad).stderr
    shown = penstock(*bad, PENSTOCK_DEBUG="1")
    assert shown.returncode == 2 and shown.stderr.startswith(b"Traceback") and b"  code: " in shown.stderr


def test_stdin_that_is_not_text(stories: Path) -> None:
    done = penstock("run", stories, "-", stdin=b"\xff\xfe")
    assert done.returncode == 2 and b"code: invalid_text" in done.stderr


def test_a_port_that_was_asked_for_and_is_taken(stories: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = penstock("serve", "--port", str(taken.getsockname()[1]), stories)
    assert done.returncode == 3 and b"code: port_in_use" in done.stderr and b"--port" in done.stderr


def test_serve_finds_a_free_port_and_its_curl_line_works(stories: Path) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", 8000))
            taken.listen()
        except OSError:
            pass  # somebody else has it, which serves the purpose as well
        with running(argv("serve", stories, "--backend", "torch"), stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lines = []
            while not lines or not lines[-1].startswith("  curl "):
                lines.append(process.stdout.readline())
                assert lines[-1], lines
            assert ":8000/" not in lines[0] and "stories260k" in lines[0]
            assert any("torch backend does not promise one answer" in line for line in lines)
            answer = subprocess.run(["bash", "-c", lines[-1]], capture_output=True, timeout=60, check=True)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
        assert json.loads(answer.stdout)["choices"][0]["text"].strip()


def test_another_loopback_address_is_a_name_of_its_own(stories: Path) -> None:
    options = ("--host", "127.0.0.2", "--port", "0")
    with running(argv("serve", stories, *options), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        assert httpx.get(f"{url}/models").status_code == 200
        assert httpx.get(f"{url}/models", headers={"host": "127.0.0.3"}).status_code == 403
        process.terminate()


def test_ref_backend_is_not_labelled(stories: Path) -> None:
    with running(argv("serve", stories, "--backend", "ref", "--port", "0"), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert b"Serving" in process.stdout.readline() and b"Try it" in process.stdout.readline()
        process.terminate()
        assert process.wait(30) == 0


def test_ctrl_c_and_a_closed_pipe_are_quiet(stories: Path) -> None:
    endless = argv(*RUN, "--max-tokens", "500", "--backend", "ref", stories, PROMPT)
    with running(endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130 and process.stderr.read() == b""
    with running(endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.wait(30) == 141 and process.stderr.read() == b""


def test_ctrl_c_while_loading_is_quiet(stories: Path) -> None:
    with running(argv("run", stories, PROMPT), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():  # torch is being imported
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr is not None and b"Traceback" not in process.stderr.read()


@pytest.mark.slow
def test_bench_startup(stories: Path) -> None:
    done = penstock("bench", "startup", "--runs", "1", "--json", stories)
    report = json.loads(done.stdout)
    assert report["runs_s"] == [report["median_s"]] and 0.1 < report["median_s"] < report["exit_s"]
    assert report["command"][:2] == ["penstock", "run"]
    failed = penstock("bench", "startup", "no/such/folder")
    assert failed.returncode == 1 and b"code: bench_run_failed" in failed.stderr and b"model_not_found" in failed.stderr


def test_a_text_too_short_to_compare_on_is_found_before_anything_is_written(stories: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "out", tmp_path / "text"
    text.write_text("")
    refused = penstock("quantize", stories, out, "--text", text, "--quant", "int8")
    assert refused.returncode != 0 and b"There is no text to compare on" in refused.stderr
    assert not out.exists()
    text.write_text(PROMPT)
    done = penstock("quantize", stories, out, "--text", text, "--quant", "int8", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] > 2 and (out / "quality.json").exists()
