"""Files and batches over a real server, which is killed while it works on them."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from servers import MODEL, TEMPLATE, Server, start

ENDED = ("completed", "failed", "expired", "cancelled")
BATCH, FORM = {"purpose": "batch"}, "multipart/form-data"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def over(stories: Path, store: Path) -> Server:
    template = store.parent / "template.jinja"
    template.write_text(TEMPLATE)
    names = ("--served-model-name", MODEL, "--chat-template", str(template))
    return start(stories, *names, "--dtype", "float32", "--store", str(store))


def kill(server: Server) -> None:
    server.process.kill()
    server.process.wait()


@pytest.fixture
def begin(stories: Path, tmp_path: Path) -> Iterator[Callable[[], Server]]:
    """Starts a server over one and the same store, again and again."""
    running: list[Server] = []

    def begin() -> Server:
        running.append(over(stories, tmp_path / "store"))
        return running[-1]

    yield begin
    for server in running:
        kill(server)


@pytest.fixture(scope="module")
def shared(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = over(stories, tmp_path_factory.mktemp("shared") / "store")
    yield server
    kill(server)


def request(number: int, **body: Any) -> dict[str, Any]:
    body = {"model": MODEL, "prompt": f"Once there were {number}", "max_tokens": 4 + number % 5} | body
    return {"custom_id": f"line-{number}", "method": "POST", "url": COMPLETIONS, "body": body}


def jsonl(lines: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def upload(client: openai.OpenAI, data: bytes) -> str:
    return client.files.create(file=("requests.jsonl", data), purpose="batch").id


def submit(client: openai.OpenAI, data: bytes, endpoint: Any = COMPLETIONS, **more: Any) -> str:
    file = upload(client, data)
    return client.batches.create(input_file_id=file, endpoint=endpoint, completion_window="24h", **more).id


def ended(client: openai.OpenAI, id: str, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while (batch := client.batches.retrieve(id)).status not in ENDED:
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
    return batch


def content(client: openai.OpenAI, id: str | None) -> list[dict[str, Any]]:
    assert id is not None
    return [json.loads(line) for line in client.files.content(id).text.splitlines()]


def test_a_file_has_the_same_answers_whenever_it_is_sent(shared: Server) -> None:
    """Ids of calls too."""
    now = {"type": "function", "function": {"name": "now"}}
    body = {"messages": [{"role": "user", "content": "Tell me"}], "max_tokens": 60, "temperature": 1.0}
    asked = body | {"tools": [now], "tool_choice": "required", "n": 2}
    data = jsonl([{"custom_id": str(i), "method": "POST", "url": CHAT, "body": asked} for i in range(2)])
    answers = []
    for _ in range(2):
        batch = ended(shared.client, submit(shared.client, data, CHAT))
        answers.append([line["response"]["body"]["choices"] for line in content(shared.client, batch.output_file_id)])
    assert answers[0] == answers[1]
    calls = [choice["message"]["tool_calls"][0]["id"] for choices in answers[0] for choice in choices]
    assert len(set(calls)) == 4


def test_files_come_and_go(begin: Callable[[], Server]) -> None:
    client = begin().client
    data = jsonl([request(1)])
    made = client.files.create(file=("../../etc/päss.jsonl", data), purpose="batch")
    assert made.object == "file" and made.bytes == len(data) and made.status == "processed"
    assert made.filename == "päss.jsonl"
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == data
    others = [upload(client, data) for _ in range(3)]
    assert [file.id for file in client.files.list()] == [*reversed(others), made.id]
    assert [file.id for file in client.files.list(limit=2, order="asc")] == [made.id, *others]  # the client turns pages
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError) as caught:
        client.files.content(made.id)
    assert caught.value.code == "file_not_found"


def test_files_stay_for_as_long_as_they_were_told(shared: Server) -> None:
    """What is uploaded, and what a batch leaves."""
    client = shared.client
    data, stay = jsonl([request(1), request(2, temperature=-1)]), {"anchor": "created_at", "seconds": 2_592_000}
    files: Any = client.files
    made = files.create(file=("x", data), purpose="batch", expires_after=stay)
    assert made.expires_at == made.created_at + 2_592_000 and files.retrieve(made.id) == made
    assert made in list(files.list()) and files.retrieve(upload(client, data)).expires_at is None
    short = {"output_expires_after": stay | {"seconds": 3600}}
    for more, lasts in ((short, 3600), ({}, None)):
        batch = ended(client, submit(client, data, **more))
        for id in (batch.output_file_id, batch.error_file_id):
            left = files.retrieve(id)
            assert left.expires_at == (None if lasts is None else left.created_at + lasts)
    file = upload(client, data)
    for wrong in (3599, 2_592_001):
        with pytest.raises(openai.BadRequestError, match="output_expires_after"):
            client.batches.create(
                input_file_id=file,
                endpoint=COMPLETIONS,
                completion_window="24h",
                output_expires_after={"anchor": "created_at", "seconds": wrong},
            )


def test_a_batch_of_each_endpoint(begin: Callable[[], Server]) -> None:
    client = begin().client
    bodies = {
        CHAT: {"model": MODEL, "messages": [{"role": "user", "content": "Tell me"}], "max_tokens": 5},
        "/v1/responses": {"model": MODEL, "input": "Tell me", "max_output_tokens": 5},
        "/v1/embeddings": {"model": MODEL, "input": "a cat"},
    }
    lines = [{"custom_id": "a", "method": "POST", "url": url, "body": body} for url, body in bodies.items()]
    ids = [submit(client, jsonl([line]), line["url"], metadata={"for": "a test"}) for line in lines]
    for id, kind in zip(ids, ("chat.completion", "response", "list"), strict=True):
        batch = ended(client, id)
        assert batch.status == "completed" and batch.request_counts.completed == 1, batch
        assert batch.metadata == {"for": "a test"} and batch.error_file_id is None and batch.usage.input_tokens > 0
        [line] = content(client, batch.output_file_id)
        assert line["response"]["status_code"] == 200 and line["response"]["body"]["object"] == kind
    assert [batch.id for batch in client.batches.list(limit=1)] == [*reversed(ids)]


def test_responses_of_a_batch_are_the_same_each_time_and_kept_nowhere_else(begin: Callable[[], Server]) -> None:
    client, url = begin().client, "/v1/responses"
    wrong = [{"input": "A", "store": True}, {"input": "A", "conversation": "conv_1"}]
    bodies = [{"input": "Tell me", "max_output_tokens": 5}, *wrong]
    lines = [{"custom_id": str(i), "method": "POST", "url": url, "body": body} for i, body in enumerate(bodies)]
    batches = [ended(client, submit(client, jsonl(lines), url)) for _ in range(2)]
    answers = []
    for batch in batches:
        [line] = content(client, batch.output_file_id)
        assert line["response"]["body"].pop("created_at") == batch.created_at
        del line["response"]["body"]["usage"]["input_tokens_details"]  # the second finds the first one's prompt
        answers.append(line)
        assert batch.usage.output_tokens == 5 and batch.request_counts.failed == 2
        refused = content(client, batch.error_file_id)
        assert [each["response"]["body"]["error"]["param"] for each in refused] == ["store", "conversation"]
    assert answers[0] == answers[1]
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answers[0]["response"]["body"]["id"])


def test_files_can_be_had_to_the_end_of_a_drain(begin: Callable[[], Server]) -> None:
    server = begin()
    client = server.client
    file = upload(client, jsonl([request(1)]))
    stream = client.completions.create(
        model=MODEL, prompt="A", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    server.process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.InternalServerError, match="shutting_down"):
        while True:
            upload(client, jsonl([request(1)]))
    assert client.files.content(file).read() == jsonl([request(1)])
    assert len(list(stream)) > 300
    assert server.process.wait(30) == 0


def test_answers_are_those_of_single_requests(begin: Callable[[], Server]) -> None:
    """Alone, in a batch, in another batch of the same file: the same text, ids and seeds."""
    client = begin().client
    lines = [request(i, temperature=0.9, **({"seed": i} if i % 2 else {})) for i in range(1, 9)]
    first, second = (ended(client, submit(client, jsonl(lines))) for _ in range(2))
    outputs = [content(client, batch.output_file_id) for batch in (first, second)]
    assert [line["custom_id"] for line in outputs[0]] == [line["custom_id"] for line in lines]
    for batch, output in zip((first, second), outputs, strict=True):
        for line in output:
            assert line["response"]["body"].pop("created") == batch.created_at
    assert outputs[0] == outputs[1]
    for asked, line in zip(lines, outputs[0], strict=True):
        if "seed" in asked["body"]:
            alone = client.completions.create(**asked["body"])
            assert alone.choices[0].text == line["response"]["body"]["choices"][0]["text"]


def test_a_line_that_fails_harms_no_other(begin: Callable[[], Server]) -> None:
    client = begin().client
    bad = [request(1, temperature=-1), request(2, model="other"), request(3, stream=True), request(4, prompt=[[]])]
    batch = ended(client, submit(client, jsonl([*bad, request(5)])))
    assert batch.status == "completed" and (batch.request_counts.completed, batch.request_counts.failed) == (1, 4)
    assert [line["custom_id"] for line in content(client, batch.output_file_id)] == ["line-5"]
    errors = content(client, batch.error_file_id)
    codes = [(line["response"]["status_code"], line["response"]["body"]["error"]["code"]) for line in errors]
    assert codes == [
        (400, "invalid_parameter"),
        (404, "model_not_found"),
        (400, "invalid_parameter"),
        (400, "empty_prompt"),
    ]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty_file"),
        (b"\n\n", "empty_file"),
        (b"{", "invalid_json"),
        (b"\xff\n", "invalid_json"),
        (b'{"custom_id": "a", "body": ' + b"[" * 100_000, "invalid_json"),
        (jsonl([request(1), request(1)]), "duplicate_custom_id"),
        (jsonl([request(1) | {"url": CHAT}]), "mismatched_endpoint"),
        (jsonl([request(1) | {"method": "GET"}]), "invalid_parameter"),
        (jsonl([request(1) | {"custom_id": ""}]), "invalid_parameter"),
    ],
)
def test_a_file_that_is_no_batch(shared: Server, data: bytes, code: str) -> None:
    client = shared.client
    batch = ended(client, submit(client, data))
    assert batch.status == "failed" and batch.errors.data[0].code == code
    assert batch.output_file_id is None and batch.failed_at


@pytest.mark.parametrize(
    ("send", "status", "code"),
    [
        ({"json": {}}, 415, "unsupported_media_type"),
        ({"files": {"file": b"x"}}, 400, "invalid_parameter"),
        ({"data": BATCH, "files": {"other": b"x"}}, 400, "invalid_parameter"),
        ({"data": {"purpose": "fine-tune"}, "files": {"file": b"x"}}, 400, "invalid_parameter"),
        (
            {"data": BATCH, "files": {"file": b"x"}, "headers": {"origin": "http://evil"}},
            403,
            "origin_not_allowed",
        ),
        (
            {"content": b"--x\r\nbroken", "headers": {"content-type": f"{FORM}; boundary=x"}},
            400,
            "invalid_parameter",
        ),
        ({"content": b"x", "headers": {"content-type": FORM}}, 400, "invalid_form"),
        *(
            ({"data": BATCH | stay, "files": {"file": b"x"}}, 400, "invalid_parameter")
            for stay in (
                {"expires_after": '{"anchor": "created_at", "seconds": 3600}'},
                {"expires_after[seconds]": "3600"},
                {"expires_after[anchor]": "created_at"},
                {"expires_after[anchor]": "last_used", "expires_after[seconds]": "3600"},
                *(
                    {"expires_after[anchor]": "created_at", "expires_after[seconds]": n}
                    for n in ("3599", "2592001", "x")
                ),
            )
        ),
        ({"data": BATCH, "files": [("file", b"x"), ("file", b"y")]}, 400, "invalid_form"),
    ],
)
def test_an_upload_that_is_refused(shared: Server, send: dict[str, Any], status: int, code: str) -> None:
    answer = httpx.post(f"{shared.url}/v1/files", **send)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize("id", ["..%2F..%2Fstore.sqlite", "file-%00", "file-" + "0" * 32, "store.sqlite", "a" * 3000])
def test_an_id_is_no_path(shared: Server, id: str) -> None:
    for path in (f"/v1/files/{id}", f"/v1/files/{id}/content", f"/v1/batches/{id}"):
        answer = httpx.get(shared.url + path)
        assert answer.status_code == 404, answer.text
    assert httpx.delete(f"{shared.url}/v1/files/{id}").status_code == 404


def test_lists_refuse_what_they_cannot_do(shared: Server) -> None:
    for most, path in ((10_000, "files"), (100, "batches")):
        assert httpx.get(f"{shared.url}/v1/{path}?limit={most}").status_code == 200
        wrong = ("0", most + 1, "x", "9" * 20, "00000000199999999", "000000001" + "0" * 27, "000000001" + "0" * 5000)
        for query in (*(f"limit={limit}" for limit in wrong), "order=up", "after=nothing"):
            answer = httpx.get(f"{shared.url}/v1/{path}?{query}")
            assert answer.json()["error"]["code"] == "invalid_parameter", query


def test_one_store_has_one_server(begin: Callable[[], Server], tmp_path: Path, capfd: Any) -> None:
    first, second = begin(), begin()
    assert list(first.client.files.list()) == []
    with pytest.raises(openai.InternalServerError) as caught:
        second.client.files.list()
    assert caught.value.code == "store_in_use" and str(tmp_path) not in str(caught.value)
    told = ""
    while f"another server uses the store {tmp_path}" not in told:  # a thread writes what the server logs
        told += capfd.readouterr().err
        time.sleep(0.01)
    assert second.client.completions.create(model=MODEL, prompt="A", max_tokens=1).choices


def test_a_batch_can_be_cancelled(begin: Callable[[], Server]) -> None:
    client = begin().client
    id = submit(client, jsonl([request(i, max_tokens=200, ignore_eos=True) for i in range(2000)]))
    input_file = client.batches.retrieve(id).input_file_id
    while client.batches.retrieve(id).request_counts.completed < 10:
        time.sleep(0.05)
    with pytest.raises(openai.ConflictError) as caught:
        client.files.delete(input_file)
    assert caught.value.code == "file_in_use"
    assert client.batches.cancel(id).status == "cancelling"
    batch = ended(client, id)
    assert batch.status == "cancelled" and 10 <= batch.request_counts.completed < 2000
    assert len(content(client, batch.output_file_id)) == batch.request_counts.completed
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(id)
    assert client.files.delete(input_file).deleted


def killed_at_random(begin: Callable[[], Server], data: bytes, lines: int, kills: int) -> None:
    """Every line is answered once, as in a run that nobody disturbed."""
    server, rng = begin(), random.Random(lines)
    undisturbed = ended(server.client, submit(server.client, data), 3600)
    expected = content(server.client, undisturbed.output_file_id)
    id = submit(server.client, data)
    for number in range(kills):
        goal = (number + rng.random()) * lines / kills
        while server.client.batches.retrieve(id).request_counts.completed < goal:
            time.sleep(0.02)
        kill(server)
        server = begin()
    client = server.client
    batch = ended(client, id, 3600)
    assert batch.status == "completed" and batch.request_counts.completed == lines
    got = content(client, batch.output_file_id)
    for line in (*expected, *got):
        del line["response"]["body"]["created"]
    assert got == expected
    assert batch.usage == undisturbed.usage


def test_kills(begin: Callable[[], Server]) -> None:
    killed_at_random(begin, jsonl([request(i, temperature=0.8) for i in range(300)]), 300, 2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills_of_a_large_batch(begin: Callable[[], Server]) -> None:
    killed_at_random(begin, jsonl([request(i, temperature=0.8) for i in range(10_000)]), 10_000, 3)
