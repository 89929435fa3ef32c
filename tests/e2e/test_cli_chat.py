"""``penstock chat``: through a pipe, and on a terminal where somebody types and interrupts."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from commands import GREEDY, Terminal, argv, penstock, running

CHAT = ("chat", *GREEDY, "--max-tokens", "12")


def chat(stdin: str, *options: str) -> tuple[list[str], str]:
    """Lines of stdout and stderr as text."""
    done = penstock(*CHAT, *options, stdin=stdin.encode())
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().splitlines(), done.stderr.decode()


def answers(stdin: str, *options: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in chat(stdin, "--json", *options)[0]]


def test_each_line_of_a_pipe_is_a_turn_and_turns_are_remembered() -> None:
    first, second = answers("Hello, Mary.\nWhere is the key?\n")
    assert first["role"] == second["role"] == "assistant" and len(first["token_ids"]) <= 12
    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"] + 12  # type: ignore[index]
    assert second["usage"]["cached"] >= 16  # type: ignore[index]  # the first turn's blocks are not computed again
    (alone,) = answers("Where is the key?\n")
    assert alone["usage"]["prompt_tokens"] < second["usage"]["prompt_tokens"]  # type: ignore[index]


def test_text_blocks_and_what_it_comes_to_at_the_end() -> None:
    (quoted,) = answers('"""Hello,\nMary."""\n')
    (block,) = answers('/multiline\nHello,\nMary.\n"""\n')
    (line,) = answers("Hello, Mary.\n")
    assert quoted["usage"] == block["usage"] != line["usage"] and quoted["content"] == block["content"]
    out, errors = chat("Hello, Mary.\n")
    assert "\n".join(out) == line["content"]
    assert "1 answers: " in errors and "tokens/s" in errors and "peak memory" in errors and "MiB" in errors


def test_commands(tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    script = f"""
/system You are a gardener.
Hello, Mary.
/undo
/undo
Good day.
/regen
/set max-tokens 3
Where is the key?
/params
/stats
/save {saved}
/clear
/load {saved}
/help
//home is a message
/exit
never said
"""
    out, errors = chat(script, "--json")
    said = [json.loads(line) for line in out]
    assert len(said) == 5 and [len(answer["token_ids"]) <= 3 for answer in said] == [False, False, False, True, True]
    assert said[1]["usage"] == said[2]["usage"] | {"cached": said[1]["usage"]["cached"]}
    assert "taken back: Hello, Mary." in errors and "nothing to take back" in errors
    assert "saved 4 messages" in errors and "loaded 4 messages" in errors
    assert "prompt tokens were cached" in errors and "context: " in errors
    assert "max_tokens             3" in errors and "/regen" in errors and "/multiline" in errors
    kept = json.loads(saved.read_text())["messages"]
    assert [message["role"] for message in kept] == ["system", "user", "assistant", "user", "assistant"]
    assert kept[0]["content"] == "You are a gardener." and kept[1]["content"] == "Good day."


def test_what_is_wrong_with_a_turn_ends_no_conversation(tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    script = "/hepl\n/set n 2\n/set temp 1\n/set temperature hot\n/set temperature -1\n"
    script += f"/save {other}\n/load {other}\n/load no\n/save\n"
    done = penstock(*CHAT, "--json", stdin=f"{script}/regen\n{'word ' * 2000}\nHello.\n".encode())
    codes = [json.loads(line)["error"]["code"] for line in done.stderr.decode().splitlines()]
    assert codes == [
        *(
            "unknown_command",
            "unknown_option",
            "unknown_option",
            "invalid_parameter",
            "invalid_parameter",
            "file_exists",
        ),
        *("invalid_messages", "input_unreadable", "invalid_parameter", "empty_conversation", "prompt_too_long"),
    ]
    assert "did you mean n?" not in done.stderr.decode()
    assert "/help" in done.stderr.decode() and "temperature?" in done.stderr.decode()
    assert done.returncode == 2 and other.read_text() == "mine"
    (answer,) = done.stdout.splitlines()
    assert json.loads(answer)["usage"] == answers("Hello.\n")[0]["usage"]  # the others left no trace


def test_the_oldest_turns_make_room() -> None:
    long = "and then there was a wind on the moor " * 12
    out, errors = chat(f"{long}\n" * 3 + "/stats\n", "--json", "--max-model-len", "256", "--system", "Be brief.")
    usages = [json.loads(line)["usage"] for line in out]
    assert [u["prompt_tokens"] for u in usages[1:]] == [usages[0]["prompt_tokens"]] * 2
    assert errors.count("1 of its turns dropped") == 2


def test_a_model_without_a_template_and_bad_options(stories: Path) -> None:
    done = penstock("chat", stories)
    assert done.returncode == 2 and b"code: no_chat_template" in done.stderr and b"--chat-template" in done.stderr
    done = penstock("chat", "--temperature", "-1", "no/such/folder")
    assert done.returncode == 2 and b"code: invalid_parameter" in done.stderr
    done = penstock(*CHAT, "--json", stdin=b"\xff\n")
    assert done.returncode == 2 and json.loads(done.stderr)["error"]["code"] == "invalid_text"


def test_ctrl_c_in_a_pipe_ends_it_quietly() -> None:
    arguments = argv("chat", "--backend", "ref", "--ignore-eos")
    with running(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(b"Hello.\n")
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130 and process.stderr.read() == b""


@pytest.fixture
def terminal() -> Terminal:
    return Terminal(argv("chat", "--backend", "ref", "--num-threads", "1", "--ignore-eos", "--temperature", "0"))


def test_a_terminal(terminal: Terminal) -> None:
    with terminal:
        assert "penstock-tiny, ready" in terminal.read_until(">>> ")
        terminal.type("Hello there\n")
        terminal.read_until("Hello there")
        terminal.read_text()
        terminal.interrupt()  # the answer ends, the program goes on
        terminal.read_until(">>> ")
        terminal.type("/stats\n")
        shown = terminal.read_until(">>> ")
        assert "last answer: " in shown and "cached" in shown
        terminal.type("half a line")
        terminal.read_until("half a line")  # the line editor has it, and waits for more
        assert "Ctrl-D or /exit" in terminal.interrupt_until(">>> ")
        terminal.type("/hepl\n")
        assert "code: unknown_command" in terminal.read_until(">>> ")
        terminal.type("/undo\n")
        assert "taken back: Hello there" in terminal.read_until(">>> ")
        terminal.type("\x04")
        assert "1 answers: " in terminal.read_until("peak memory")
        assert terminal.end() == 0


def test_lines_are_edited_recalled_and_completed(terminal: Terminal) -> None:
    pytest.importorskip("readline")
    with terminal:
        terminal.read_until(">>> ")
        terminal.type("/paramz\x7fs\n")
        assert "temperature" in terminal.read_until(">>> ")
        terminal.type("/sys\t A gardener.\n")
        assert "system: A gardener." in terminal.read_until(">>> ")
        terminal.type("\x1b[A\n")  # arrow up
        assert "system: A gardener." in terminal.read_until(">>> ")
        terminal.type('"""a\nb"""\n')
        terminal.read_until('... b"""')
        terminal.read_text()
        terminal.interrupt()
        terminal.read_until(">>> ")
        terminal.type("/undo\n")
        assert "taken back: a\nb" in terminal.read_until(">>> ")
        terminal.type("/multiline\nno")
        terminal.read_until("... no")
        terminal.interrupt_until(">>> ")  # gives up the whole message
        terminal.type("/exit\n")
        assert terminal.end() == 0
