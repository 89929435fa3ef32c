"""What a server's interpreters do while it loads a model and answers, as their audit events tell (PEP 578)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest

from servers import start

HOOK = '''
import os, sys

def begin():
    out = os.open(os.environ["AUDIT_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    import json
    canary = "canary" + "bird"

    def told(value, depth=0):
        """Whether code was made of a text of the test's."""
        if hasattr(value, "co_consts"):
            return told((value.co_consts, value.co_names), depth)
        if isinstance(value, bytes):
            return canary.encode() in value
        if isinstance(value, (tuple, list)):
            return depth < 9 and any(told(each, depth + 1) for each in value)
        return isinstance(value, str) and canary in value

    def hook(event, args):
        if event in ("exec", "compile"):
            if not told(args[0]):
                return
            where = args[1] if event == "compile" else args[0].co_filename
            args = (where if isinstance(where, str) else "",)
        elif event == "open":
            if not isinstance(args[0], (str, bytes)) or not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
            args = (os.path.abspath(os.fsdecode(args[0])),)
        elif event == "socket.connect":
            args = (args[1],)
        elif event == "subprocess.Popen":
            args = (list(map(os.fsdecode, args[1])),)
        elif event not in ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"):
            return
        line = json.dumps([os.getpid(), event, list(args)], default=str) + "\\n"
        os.write(out, line.encode())

    sys.addaudithook(hook)

begin()
'''
CANARY = "canarybird"
"""In all that the test gives a server: what is compiled must not have it, but for a template, which jinja2 compiles."""
PROCESSES = {"penstock.host", "penstock.texthost"}


def hooked(folder: Path) -> dict[str, str]:
    """Variables with which every interpreter begins by installing the hook, and what it writes goes to ``folder``."""
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(HOOK)
    own = {
        "HOME": "home",
        "TMPDIR": "tmp",
        "XDG_RUNTIME_DIR": "run",
        "PENSTOCK_CACHE": "cache",
        "PENSTOCK_DATA": "data",
    }
    for name in own.values():
        (folder / name).mkdir(mode=0o700)
    found = {name: str(folder / place) for name, place in own.items()}
    return found | {
        "PYTHONPATH": str(folder / "hook"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "AUDIT_LOG": str(folder / "audit"),
    }


def events(folder: Path) -> list[tuple[int, str, list[Any]]]:
    return [tuple(json.loads(line)) for line in (folder / "audit").read_text().splitlines()]  # type: ignore[misc]


def forbidden(event: str, args: list[Any], folder: Path) -> bool:
    match event:
        case "exec" | "compile":
            return bool(args[0] != "<template>")
        case "open":
            path = Path(args[0])
            return not path.is_relative_to(folder) and path != Path(os.devnull)
        case "socket.connect":
            return not isinstance(args[0], str) and args[0][0] not in ("127.0.0.1", "::1")
        case "subprocess.Popen":
            words = args[0]
            return words[0] != sys.executable or PROCESSES.isdisjoint(words)
    return True


@pytest.mark.slow
def test_a_server_does_nothing_that_data_could_make_it_do(stories: Path, tmp_path: Path) -> None:
    """It runs no code but its own and a template's, unpickles nothing, starts its own processes alone, speaks to nobody
    outside, and writes to its own folders.
    """
    template = "{{ messages[0].content }} canarybird{% if tools %}{{ tools }}{% endif %}"
    (tmp_path / "template.jinja").write_text(template)
    with mock.patch.dict(os.environ, hooked(tmp_path)):
        options = ("--chat-template", str(tmp_path / "template.jinja"), "--tokenizer-workers", "1")
        server = start(stories, *options, "--store", str(tmp_path / "store"))
    try:
        url, one = f"{server.url}/v1", {"role": "user", "content": f"{CANARY}('x')"}
        schema = {"type": "object", "properties": {CANARY: {"type": "string", "pattern": f"{CANARY}|a"}}}
        tool = {"type": "function", "function": {"name": CANARY, "parameters": schema}}
        for path, body in (
            ("chat/completions", {"messages": [one], "max_tokens": 4}),
            ("chat/completions", {"messages": [one], "max_tokens": 4, "tools": [tool], "tool_choice": "required"}),
            ("completions", {"prompt": CANARY, "max_tokens": 4, "structured_outputs": {"json": schema}}),
            ("completions", {"prompt": CANARY, "max_tokens": 4, "structured_outputs": {"regex": f"{CANARY}+"}}),
            ("embeddings", {"input": CANARY}),
        ):
            answer = httpx.post(f"{url}/{path}", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
        httpx.post(f"{url}/completions", json={"prompt": CANARY * 20_000, "max_tokens": 4}, timeout=60)
    finally:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
    seen = events(tmp_path)
    assert [each for each in seen if forbidden(each[1], each[2], tmp_path)] == []
    assert len({pid for pid, *_ in seen}) >= 3 and {"open", "compile", "subprocess.Popen"} <= {
        name for _, name, _ in seen
    }


def test_the_hook_sees_each(tmp_path: Path) -> None:
    code = f"""
import os, pickle, socket, subprocess
exec("x = '{CANARY}'")
eval("'{CANARY}'")
pickle.loads(pickle.dumps(os.getcwd))
subprocess.run(["true"])
os.system("true")
open({str(tmp_path.with_name("other"))!r}, "w").close()
s = socket.socket()
s.setblocking(False)
try:
    s.connect(("192.0.2.1", 9))
except OSError:
    pass
"""
    (tmp_path / "code.py").write_text(code)
    runs = f"import runpy; runpy.run_path({str(tmp_path / 'code.py')!r})"
    subprocess.run([sys.executable, "-c", runs], env=os.environ | hooked(tmp_path), check=True)
    found = {event for _, event, args in events(tmp_path) if forbidden(event, args, tmp_path)}
    wanted = {"exec", "compile", "pickle.find_class", "subprocess.Popen", "os.system", "open", "socket.connect"}
    assert wanted <= found, wanted - found
