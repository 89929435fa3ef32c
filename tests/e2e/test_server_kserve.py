"""The Open Inference Protocol, and Triton's generate extension."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from servers import MODEL, PROMPT, Server

PATH = f"/v2/models/{MODEL}"
GREEDY = {"temperature": 0, "max_tokens": 8}


def text(*texts: str) -> dict[str, Any]:
    return {"name": "text_input", "shape": [len(texts)], "datatype": "BYTES", "data": list(texts)}


def infer(server: Server, *inputs: dict[str, Any], **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{PATH}/infer", json={"inputs": inputs, **fields}, timeout=60)


def completed(server: Server, *prompts: str, **fields: Any) -> list[str]:
    answer = server.client.completions.create(model=MODEL, prompt=list(prompts), **GREEDY | fields)  # type: ignore[call-overload]
    return [choice.text for choice in answer.choices]


def test_who_is_there(server: Server) -> None:
    def get(path: str) -> Any:
        return httpx.get(server.url + path).json()

    assert get("/v2")["name"] == "penstock" and "generate" in get("/v2")["extensions"]
    assert get("/v2/health/live") == {"live": True} and get("/v2/health/ready") == {"ready": True}
    assert get(f"{PATH}/ready") == {"name": MODEL, "ready": True}
    told = get(PATH)
    assert told["name"] == MODEL and told["inputs"][0]["name"] == "text_input"
    assert {tensor["name"]: tensor["datatype"] for tensor in told["outputs"]}["text_output"] == "BYTES"
    for path in ("/v2/models/other", "/v2/models/other/ready"):
        assert httpx.get(server.url + path).status_code == 404


def test_texts_are_gone_on_from(server: Server) -> None:
    prompts = [PROMPT, "The dog"]
    answer = infer(server, text(*prompts), parameters=GREEDY, id="7").json()
    [output] = answer["outputs"]
    assert (answer["model_name"], answer["id"]) == (MODEL, "7")
    expected = completed(server, *prompts)
    assert output == {
        "name": "text_output",
        "datatype": "BYTES",
        "shape": [2],
        "data": [prompt + more for prompt, more in zip(prompts, expected, strict=True)],
    }
    sampling = {"name": "sampling_parameters", "shape": [1], "datatype": "BYTES", "data": [json.dumps(GREEDY)]}
    excluded = {"name": "exclude_input_in_output", "shape": [1], "datatype": "BOOL", "data": [True]}
    nested = text(PROMPT) | {"shape": [1, 1], "data": [[PROMPT]]}
    wanted = [{"name": "finish_reason"}, {"name": "text_output"}]
    bare = infer(server, nested, sampling, excluded, outputs=wanted).json()["outputs"]
    assert {tensor["name"]: tensor["data"] for tensor in bare} == {
        "text_output": expected[:1],
        "finish_reason": ["length"],
    }


def test_vectors_are_numbers(server: Server) -> None:
    [output] = infer(server, text("a", "b"), outputs=[{"name": "embedding"}]).json()["outputs"]
    made = server.client.embeddings.create(model=MODEL, input=["a", "b"], encoding_format="float").data
    assert output["datatype"] == "FP32" and output["shape"] == [2, len(made[0].embedding)]
    assert output["data"] == [number for entry in made for number in entry.embedding]


def test_the_version_that_is_told_may_be_named(server: Server, stories: Path) -> None:
    """As clients of the protocol do that were given one; a model's name may be a path, such as that of its folder."""
    told = httpx.get(server.url + PATH).json()
    assert told["versions"] == ["1"]
    body = {"inputs": [text(PROMPT)], "parameters": GREEDY}
    whole = {"text_input": PROMPT, **GREEDY}
    for name in (MODEL, str(stories)):
        path = f"{server.url}/v2/models/{name}"

        def ask(where: str, asked: dict[str, Any] | None = None, path: str = path) -> httpx.Response:
            return httpx.request("POST" if asked else "GET", path + where, json=asked, timeout=60)

        assert ask("/versions/1").json() == told and ask("/versions/1/ready").json() == ask("/ready").json()
        for verb, asked in (("infer", body), ("generate", whole), ("generate_stream", whole)):
            named, plain = ask(f"/versions/1/{verb}", asked), ask(f"/{verb}", asked)
            assert named.status_code == 200 and named.text == plain.text, named.text
        for other in ("2", "01", "x"):
            each: list[tuple[str, Any]] = [("", None), ("/ready", None), ("/infer", body), ("/generate", whole)]
            for where, asked in each:
                refused = ask(f"/versions/{other}{where}", asked)
                assert (refused.status_code, refused.json()["param"]) == (404, "version"), refused.text
                assert refused.json()["code"] == "model_not_found"
    assert httpx.post(f"{server.url}/v2/models/other/versions/1/infer", json=body).status_code == 404


def test_generate(server: Server) -> None:
    [expected] = completed(server, PROMPT)
    url = f"{server.url}{PATH}/generate"
    for fields in (
        {"parameters": {**GREEDY, "exclude_input_in_output": True}},
        {**GREEDY, "exclude_input_in_output": True},
        {"sampling_parameters": json.dumps(GREEDY), "exclude_input_in_output": True},
    ):
        answer = httpx.post(url, json={"text_input": PROMPT, **fields}, timeout=60).json()
        assert answer == {"model_name": MODEL, "model_version": "1", "text_output": expected}
    assert httpx.post(url, json={"text_input": PROMPT, **GREEDY}).json()["text_output"] == PROMPT + expected
    body = {"text_input": PROMPT, "parameters": GREEDY, "id": "7"}
    streamed = httpx.post(f"{url}_stream", json=body, timeout=60)
    pieces = [json.loads(line.removeprefix("data: ")) for line in streamed.text.splitlines() if line]
    assert "".join(piece["text_output"] for piece in pieces) == expected and len(pieces) > 4
    assert {piece["id"] for piece in pieces} == {"7"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("infer", {"inputs": []}, "inputs"),
        ("infer", {"inputs": [text("a") | {"name": "x"}]}, "inputs"),
        ("infer", {"inputs": [text("a") | {"shape": [2]}]}, "inputs[text_input].data"),
        ("infer", {"inputs": [text("a") | {"shape": [-1]}]}, "inputs[0].shape[0]"),
        ("infer", {"inputs": [text("a") | {"datatype": "FP32"}]}, "inputs[text_input].datatype"),
        ("infer", {"inputs": [text("a") | {"data": [1]}]}, "inputs[text_input].data"),
        ("infer", {"inputs": [text("a") | {"data": [["a"]]}]}, "inputs[text_input].data"),
        ("infer", {"inputs": [text("a")], "parameters": {"max_tokens": 0.5}}, "max_tokens"),
        ("infer", {"inputs": [text("a")], "parameters": {"temperature": -1}}, "temperature"),
        ("infer", {"inputs": [text("a")], "parameters": {"use_beam_search": True}}, "use_beam_search"),
        ("infer", {"inputs": [text("a")], "parameters": {"stream": True}}, "stream"),
        ("infer", {"inputs": [text("a")], "outputs": [{"name": "x"}]}, "outputs"),
        ("infer", {"inputs": [text("a"), text("b")]}, "inputs"),
        ("infer", {"inputs": [text("a")], "outputs": [{"name": "embedding"}, {"name": "text_output"}]}, "outputs"),
        ("infer", {"inputs": [text("a")], "parameters": {"exclude_input_in_output": "no"}}, "exclude_input_in_output"),
        ("generate", {"text_input": "a", "stream": True}, "stream"),
        ("generate", {"text_input": "a", "parameters": {"stream": True}}, "stream"),
        ("generate", {"text_input": "a", "sampling_parameters": '{"max_tokens": NaN}'}, "sampling_parameters"),
        ("generate", {"text_input": "a", "sampling_parameters": "[" * 9000}, "sampling_parameters"),
        ("generate", {}, "text_input"),
        ("generate", {"text_input": "a", "parameters": {"exclude_input_in_output": []}}, "exclude_input_in_output"),
        ("generate_stream", {"text_input": "a", "parameters": {"best_of": 2}}, "best_of"),
        ("generate_stream", {"text_input": "a", "parameters": {"n": 2}}, "n"),
    ],
)
def test_what_cannot_be_asked(server: Server, path: str, body: dict[str, Any], param: str) -> None:
    response = httpx.post(f"{server.url}{PATH}/{path}", json=body, timeout=60)
    error = response.json()
    assert response.status_code == 400 and isinstance(error["error"], str) and error["param"] == param, error


def test_another_model_is_not_here(server: Server) -> None:
    response = httpx.post(f"{server.url}/v2/models/other/generate", json={"text_input": "a"})
    assert response.status_code == 404 and response.json()["code"] == "model_not_found"
