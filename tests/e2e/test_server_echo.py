"""Prompts that are shown again, with the log-probabilities of their tokens, and prompts with a gap to be filled in."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import BUNDLED
from penstock import AsyncLLM
from penstock.serving import build_app
from penstock.spec import EngineConfig
from penstock.text import Tokenizer
from servers import PROMPT, Server

STORY = f"{PROMPT}, there was a little girl named Lily."


def ask(server: Server, **fields: Any) -> Any:
    body = {"prompt": STORY, "temperature": 0, "echo": True, "logprobs": 2, "max_tokens": 0} | fields
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()


def test_a_prompt_is_as_likely_as_when_it_was_drawn(server: Server) -> None:
    """Bit for bit, whatever is in the cache: what the tokens of an answer are given when they are a prompt."""
    [drawn] = ask(server, prompt=PROMPT, max_tokens=24)["choices"]
    ids = httpx.post(f"{server.url}/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    chunks = ask(server, prompt=PROMPT, max_tokens=24, echo=False)["choices"][0]["logprobs"]
    own = httpx.post(f"{server.url}/tokenize", json={"prompt": drawn["text"]}).json()["tokens"]
    assert own[: len(ids)] == ids and len(own) == len(ids) + 24
    answer = ask(server, prompt=own)
    [choice] = answer["choices"]
    told = choice["logprobs"]
    assert told["token_logprobs"] == drawn["logprobs"]["token_logprobs"]
    assert told["token_logprobs"][len(ids) :] == chunks["token_logprobs"]
    assert told["top_logprobs"] == drawn["logprobs"]["top_logprobs"]
    assert choice["text"] == drawn["text"] and choice["finish_reason"] == "length"
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (len(own), 0)


def test_the_form_is_openai_s(server: Server) -> None:
    [choice] = ask(server, max_tokens=3)["choices"]
    told = choice["logprobs"]
    ids = httpx.post(f"{server.url}/tokenize", json={"prompt": STORY}).json()["tokens"]
    assert len(ids) + 3 == len(told["tokens"]) == len(told["token_logprobs"]) == len(told["text_offset"])
    assert told["token_logprobs"][0] is None is told["top_logprobs"][0] and None not in told["token_logprobs"][1:]
    assert all(2 <= len(top) <= 3 for top in told["top_logprobs"][1 : len(ids)])  # the token itself, and two
    assert told["text_offset"] == sorted(told["text_offset"]) and told["text_offset"][0] == 0
    assert told["text_offset"][len(ids)] == len(STORY)
    assert choice["text"].startswith(STORY) and len(choice["text"]) > len(STORY)
    assert "".join(told["tokens"]).endswith(choice["text"])


def test_a_stream_and_several_choices_say_the_same(server: Server) -> None:
    for fields in ({"max_tokens": 5}, {"max_tokens": 0}):
        whole = ask(server, prompt=[STORY, PROMPT], n=2, seed=1, temperature=1, **fields)
        joined: dict[int, dict[str, Any]] = {}
        body = {"prompt": [STORY, PROMPT], "n": 2, "seed": 1, "echo": True, "logprobs": 2, "stream": True} | fields
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        for piece in (httpx.Response(200, text=line).json() for line in lines[:-1]):
            [new] = piece["choices"]
            known = joined.setdefault(new["index"], {"text": "", "tokens": [], "token_logprobs": []})
            known["text"] += new["text"]
            for name in ("tokens", "token_logprobs"):
                known[name] += (new["logprobs"] or {name: []})[name]
        assert len(joined) == 4
        for choice in whole["choices"]:
            told = joined[choice["index"]]
            assert told["text"] == choice["text"]
            for name in ("tokens", "token_logprobs"):
                assert told[name] == choice["logprobs"][name]
    assert ask(server, prompt=[1])["choices"][0]["logprobs"]["token_logprobs"] == [None]


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"echo": False}, "invalid_parameter", "max_tokens"),
        ({"max_tokens": 4, "n": 1, "best_of": 2}, "unsupported_parameter", "best_of"),
        ({"suffix": "x", "echo": False, "max_tokens": 4}, "unsupported_parameter", "suffix"),
        ({"suffix": "x", "max_tokens": 4}, "unsupported_parameter", "suffix"),
        ({"suffix": "x", "prompt": [1, 2], "max_tokens": 4}, "unsupported_parameter", "suffix"),
        ({"suffix": 7}, "invalid_parameter", "suffix"),
    ],
)
def test_what_cannot_be_asked(server: Server, fields: dict[str, Any], code: str, param: str) -> None:
    error = ask(server, **fields)["error"]
    assert (error["code"], error["param"]) == (code, param), error


def test_a_gap_is_shown_as_the_model_has_learned_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The bundled tokenizer, with names of Qwen2.5-Coder for tokens that it has in reserve. Typed, they are text."""
    shutil.copytree(BUNDLED, tmp_path / "model", copy_function=lambda a, b: Path(b).write_bytes(Path(a).read_bytes()))
    for file in (tmp_path / "model").glob("*token*.json"):
        text = file.read_text("utf-8")
        for number, name in enumerate(("prefix", "suffix", "middle")):
            text = text.replace(f"<|reserved_{number}|>", f"<|fim_{name}|>")
        file.write_text(text, "utf-8")
    llm = AsyncLLM(EngineConfig(model=str(tmp_path / "model"), num_threads=1))
    before, after = "The key<|fim_middle|> is in", " the<|im_end|> door."
    own = llm.engine.tokenizer.special_tokens
    ids = [
        own["<|fim_prefix|>"],
        *tokenizer.encode(before, add_special_tokens=False, parse_special=False),
        own["<|fim_suffix|>"],
        *tokenizer.encode(after, add_special_tokens=False, parse_special=False),
        own["<|fim_middle|>"],
    ]

    async def both() -> list[Any]:
        app, _ = build_app(llm)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            asked = [{"prompt": before, "suffix": after, "echo": True}, {"prompt": ids}]
            bodies = [body | {"max_tokens": 8, "temperature": 0} for body in asked]
            return [(await client.post("/v1/completions", json=body)).json() for body in bodies]

    try:
        filled, plain = asyncio.run(both())
    finally:
        llm.close()
    assert filled["choices"][0]["text"] == before + plain["choices"][0]["text"]
    assert filled["usage"] == plain["usage"] | {"prompt_tokens_details": filled["usage"]["prompt_tokens_details"]}
