"""Texts and conversations as tokens, and back."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from penstock.text import Tokenizer
from servers import Server

USER = {"role": "user", "content": "Hello <|im_end|> you"}
TOOLS = [{"type": "function", "function": {"name": "now"}}]


def post(server: Server, path: str, **fields: Any) -> Any:
    response = httpx.post(server.url + path, json=fields)
    return response.json() if response.status_code == 200 else response.json()["error"]["code"]


def test_a_text(hermes: Server, tokenizer: Tokenizer) -> None:
    for special in (True, False):
        answer = post(
            hermes, "/tokenize", prompt="Hello, <|im_end|>", add_special_tokens=special, return_token_strs=True
        )
        assert answer["tokens"] == tokenizer.encode("Hello, <|im_end|>", add_special_tokens=special)
        assert answer["count"] == len(answer["tokens"]) and "".join(answer["token_strs"]).endswith("Hello, <|im_end|>")
    assert answer["max_model_len"] > 100
    assert post(hermes, "/detokenize", tokens=answer["tokens"]) == {"prompt": "Hello, <|im_end|>"}


def test_a_long_text(hermes: Server, tokenizer: Tokenizer) -> None:
    """Longer than what is tokenized in the event loop, or in its process; there and back in pieces."""
    text = 'Ünder the "old" oak\n' * 9000
    answer = post(hermes, "/tokenize", prompt=text, return_token_strs=True, add_special_tokens=False)
    assert answer["tokens"] == tokenizer.encode(text, add_special_tokens=False) and answer["count"] > 50_000
    assert answer["token_strs"] == [tokenizer.token_text(token) for token in answer["tokens"]]
    assert post(hermes, "/detokenize", tokens=answer["tokens"]) == {"prompt": text}


def test_a_conversation_as_it_would_run(hermes: Server, tokenizer: Tokenizer) -> None:
    all_options: list[dict[str, Any]] = [
        {}, {"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "none"}, {"reasoning_effort": "none"},
        {"messages": [USER, {"role": "assistant", "content": "Well,"}], "continue_final_message": True},
        {"add_generation_prompt": False},
    ]  # fmt: skip
    counts = []
    for options in all_options:
        answer = post(hermes, "/tokenize", **{"messages": [USER]} | options)
        run = httpx.post(
            f"{hermes.url}/v1/chat/completions", json={"messages": [USER], "max_tokens": 1} | options
        ).json()
        assert answer["count"] == run["usage"]["prompt_tokens"]
        counts.append(answer["count"])
    assert counts[2] == counts[0] < min(counts[1], counts[3])
    text = post(hermes, "/detokenize", tokens=answer["tokens"])["prompt"]
    assert text.count("<|im_end|>") == 2 and text.endswith("you<|im_end|>\n")
    ends = answer["tokens"].count(tokenizer.added_tokens["<|im_end|>"])
    assert ends == 1  # what the user typed is no token


@pytest.mark.parametrize(
    ("path", "fields", "code"),
    [
        ("/tokenize", {}, "invalid_parameter"),
        ("/tokenize", {"prompt": "a", "messages": [USER]}, "invalid_parameter"),
        ("/tokenize", {"messages": []}, "invalid_parameter"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model_not_found"),
        ("/tokenize", {"messages": [USER], "chat_template_kwargs": {"x": 1}}, "unsupported_parameter"),
        ("/tokenize", {"messages": [USER], "tools": [{"type": "function"}]}, "invalid_parameter"),
        ("/detokenize", {"tokens": [-1]}, "token_out_of_range"),
        ("/detokenize", {"tokens": [1 << 40]}, "token_out_of_range"),
        ("/detokenize", {"tokens": [[100] * 20_000]}, "invalid_parameter"),
        ("/detokenize", {"tokens": "a"}, "invalid_parameter"),
    ],
)
def test_what_cannot_be_asked(hermes: Server, path: str, fields: dict[str, Any], code: str) -> None:
    assert post(hermes, path, **fields) == code
