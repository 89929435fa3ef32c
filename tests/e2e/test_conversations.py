"""OpenAI's Conversations API, through OpenAI's own client: what was said stays there, whatever ends the server."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import openai
import pytest

from commands import penstock
from conftest import BUNDLED
from penstock.text import Tokenizer
from scripted import HERMES, saying
from servers import Server, start

RULE: Any = {"role": "developer", "content": "Be brief."}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TOOLS: Any = [{"type": "function", "name": "get_weather", "parameters": {"type": "object"}, "strict": False}]
Respond = Callable[..., Any]


def respond_of(client: openai.OpenAI, tokenizer: Tokenizer) -> Respond:
    def respond(says: str | None = None, **options: Any) -> Any:
        body = {} if says is None else saying(says, tokenizer)
        asked = {"model": "m", "input": "Weather?", "max_output_tokens": 60, "temperature": 0} | options
        return client.responses.create(**asked, extra_body=body)

    return respond


@pytest.fixture
def respond(hermes: Server, tokenizer: Tokenizer) -> Respond:
    return respond_of(hermes.client, tokenizer)


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts a server over one and the same store, again and again."""
    running: list[Server] = []
    (tmp_path / "template.jinja").write_text(HERMES)

    def begin(*options: str) -> Server:
        own = ("--chat-template", str(tmp_path / "template.jinja"), "--logits-rule", "scripted:say")
        with mock.patch.dict(os.environ, PYTHONPATH=str(Path(__file__).parent)):
            names = ("--served-model-name", "m", "--store", str(tmp_path / "store"))
            running.append(start(BUNDLED, *own, *names, *options))
        return running[-1]

    yield begin
    for server in running:
        server.process.kill()
        server.process.wait()


def said(client: openai.OpenAI, conversation: str) -> list[tuple[str, str]]:
    """(role, text) of its messages, the first one first."""
    items: Any = client.conversations.items.list(conversation, order="asc", limit=100)
    return [(item.role, item.content[0].text) for item in items if item.type == "message"]


def refusal(kind: type[openai.APIStatusError], ask: Callable[[], Any]) -> tuple[Any, Any]:
    with pytest.raises(kind) as refused:
        ask()
    assert type(refused.value) is kind
    return refused.value.code, refused.value.param


def test_responses_go_on_in_a_conversation(respond: Respond, hermes: Server) -> None:
    client = hermes.client
    made = client.conversations.create(items=[RULE], metadata={"topic": "weather"})
    assert made.id.startswith("conv_") and made.object == "conversation" and abs(made.created_at - time.time()) < 60
    assert client.conversations.retrieve(made.id) == made and made.metadata == {"topic": "weather"}
    first = respond("Rain.", conversation=made.id)
    assert first.conversation.id == made.id and client.responses.retrieve(first.id) == first
    counted = client.responses.input_tokens.count(model="m", input="Sure?", conversation=made.id)
    second = list(respond("Yes.", input="Sure?", conversation={"id": made.id}, stream=True))[-1].response
    assert (second.conversation.id, second.status) == (made.id, "completed")
    turns = [("developer", "Be brief."), ("user", "Weather?"), ("assistant", "Rain."), ("user", "Sure?")]
    assert said(client, made.id) == [*turns, ("assistant", "Yes.")]
    whole = [{"role": role, "content": text} for role, text in turns]
    alone = respond("Yes.", input=whole)
    assert alone.conversation is None
    assert counted.input_tokens == second.usage.input_tokens == alone.usage.input_tokens > first.usage.input_tokens
    after = respond("Well.", input="Then?", previous_response_id=first.id)  # from the first turn, in no conversation
    assert after.usage.input_tokens < second.usage.input_tokens + 5 and len(said(client, made.id)) == 5
    ids = [item.id for item in client.conversations.items.list(made.id)]
    assert ids[:2] == [second.output[0].id, *[item.id for item in client.responses.input_items.list(second.id)]]


def test_calls_and_their_results_are_part_of_it(respond: Respond, hermes: Server) -> None:
    id = hermes.client.conversations.create().id
    (call,) = respond(CALL, tools=TOOLS, conversation=id).output
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    answer = respond("Rain.", input=[result], tools=TOOLS, conversation=id)
    items: Any = list(hermes.client.conversations.items.list(id, order="asc"))
    assert [item.type for item in items] == ["message", "function_call", "function_call_output", "message"]
    assert items[1].name == "get_weather" and items[1].id == call.id and items[2].output == "rain"
    again = [{"role": "user", "content": "Weather?"}, call.model_dump(exclude_none=True), result]
    assert respond("Rain.", input=again, tools=TOOLS).usage.input_tokens == answer.usage.input_tokens


def test_items_come_and_go(respond: Respond, hermes: Server) -> None:
    client, items = hermes.client, hermes.client.conversations.items
    id = client.conversations.create().id
    turns: Any = [{"role": "assistant" if i % 2 else "user", "content": f"{i}"} for i in range(20)]
    added = items.create(id, items=turns, include=["message.output_text.logprobs"])
    assert len(added.data) == 20 and not added.has_more and added.last_id == added.data[-1].id
    (last,) = items.create(id, items=[{"role": "user", "content": [{"type": "input_text", "text": "20"}]}]).data
    told = [*added.data, last]
    assert [(item.role, item.content[0].type, item.content[0].text) for item in told] == [
        ("assistant", "output_text", f"{i}") if i % 2 else ("user", "input_text", f"{i}") for i in range(21)
    ]
    assert list(items.list(id, order="asc", limit=4)) == told  # page after page
    assert list(items.list(id, include=["reasoning.encrypted_content"])) == told[::-1]
    first = items.list(id, limit=2, after=told[4].id)
    assert first.has_more and [item.id for item in first.data] == [told[3].id, told[2].id]
    assert items.retrieve(told[7].id, conversation_id=id) == told[7]
    assert items.delete(told[7].id, conversation_id=id).id == id
    assert refusal(openai.NotFoundError, lambda: items.retrieve(told[7].id, conversation_id=id))[0] == "item_not_found"
    named = [{"type": "item_reference", "id": told[6].id}]
    assert items.create(id, items=named).data[0].content[0].text == "6"
    counted = client.responses.input_tokens.count(model="m", input=[*named, {"role": "user", "content": "?"}])
    assert counted == client.responses.input_tokens.count(model="m", input=[turns[6], {"role": "user", "content": "?"}])
    changed = client.conversations.update(id, metadata={"a": "b"})
    assert changed.metadata == {"a": "b"} == client.conversations.retrieve(id).metadata
    assert client.conversations.update(id, metadata=None).metadata == {}
    gone = client.conversations.delete(id)
    assert (gone.id, gone.deleted, gone.object) == (id, True, "conversation.deleted")
    for ask in (
        lambda: client.conversations.retrieve(id),
        lambda: client.conversations.delete(id),
        lambda: client.conversations.update(id, metadata={}),
        lambda: items.list(id),
        lambda: items.create(id, items=[]),
        lambda: items.retrieve(told[0].id, conversation_id=id),
        lambda: items.delete(told[0].id, conversation_id=id),
    ):
        assert refusal(openai.NotFoundError, ask)[0] == "conversation_not_found"
    lost = refusal(openai.NotFoundError, lambda: respond(conversation=id))
    assert lost == ("conversation_not_found", "conversation")


def test_it_is_also_added_to_where_the_response_is_not_stored(respond: Respond, hermes: Server) -> None:
    id = hermes.client.conversations.create().id
    answer = respond("Rain.", conversation=id, store=False)
    assert said(hermes.client, id) == [("user", "Weather?"), ("assistant", "Rain.")]
    with pytest.raises(openai.NotFoundError):
        hermes.client.responses.retrieve(answer.id)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("", {"items": [RULE] * 21}, "items"),
        ("", {"metadata": {f"{i}": "" for i in range(17)}}, "metadata"),
        ("", {"metadata": {"a": "b" * 513}}, "metadata[...]"),
        ("", {"items": [{"role": "wizard", "content": "a"}]}, "items[0].role"),
        ("", {"items": [RULE, {"type": "item_reference", "id": "msg_1"}]}, "items[1]"),
        ("", {"items": ["a"]}, "items[0]"),
        ("/conv_1", {}, "metadata"),
        ("/conv_1/items", {}, "items"),
        ("/conv_1/items", {"items": [{"type": "function_call"}]}, "items[0]"),
        ("/conv_1/items", {"items": [{"role": "user", "content": [{"type": "input_image"}]}]}, "items[0].content"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked(hermes: Server, path: str, body: Any, param: str) -> None:
    response = httpx.post(f"{hermes.url}/v1/conversations{path}", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


def test_a_response_goes_on_from_one_thing(respond: Respond, hermes: Server) -> None:
    first = respond("Rain.")
    both: Any = {"conversation": hermes.client.conversations.create().id, "previous_response_id": first.id}
    count = hermes.client.responses.input_tokens.count
    for ask in (lambda: respond(**both), lambda: count(model="m", input="a", **both)):
        assert refusal(openai.BadRequestError, ask) == ("invalid_parameter", "conversation")
    for query in ("limit=0", "limit=101", "order=up", "after=msg_1"):
        path = f"{hermes.url}/v1/conversations/{both['conversation']}/items?{query}"
        assert httpx.get(path).json()["error"]["param"] == query.partition("=")[0]
    wrong = httpx.get(f"{hermes.url}/v1/conversations/{both['conversation']}/items?include[]=other")
    assert wrong.json()["error"]["code"] == "unsupported_parameter"


def test_turns_never_mix(respond: Respond, hermes: Server) -> None:
    id = hermes.client.conversations.create().id
    locked = threading.Event()

    def take_turns(name: str) -> None:
        for i in range(3):
            while True:
                try:
                    respond(f"{name}.{i}", input=f"{name}.{i}?", conversation=id)
                    break
                except openai.BadRequestError as error:
                    assert (error.code, error.param) == ("conversation_locked", "conversation")
                    locked.set()
                    time.sleep(0.01)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(take_turns, "abcd"))
    turns = said(hermes.client, id)
    assert locked.is_set() and len(turns) == 24
    assert all(user[1] == f"{answer[1]}?" for user, answer in zip(turns[::2], turns[1::2], strict=True))


def test_a_turn_ends_with_its_request_whatever_becomes_of_it(respond: Respond, hermes: Server) -> None:
    client, items = hermes.client, hermes.client.conversations.items
    id = client.conversations.create(items=[RULE]).id
    longest = httpx.post(f"{hermes.url}/tokenize", json={"prompt": "a"}).json()["max_model_len"]
    long: Any = {"model": "m", "input": "Go on.", "conversation": id, "max_output_tokens": longest - 200}
    stream = client.responses.create(**long, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    item = items.list(id).data[0].id
    for ask in (
        lambda: respond("Yes.", conversation=id),
        lambda: items.create(id, items=[RULE]),
        lambda: items.delete(item, conversation_id=id),
        lambda: client.conversations.delete(id),
    ):
        assert refusal(openai.BadRequestError, ask) == ("conversation_locked", "conversation")
    assert client.conversations.update(id, metadata={"a": "b"}).metadata == {"a": "b"}
    assert client.responses.input_tokens.count(model="m", input="a", conversation=id).input_tokens > 0
    stream.close()
    deadline = time.monotonic() + 20
    while True:
        try:
            respond("Yes.", conversation=id)
            break
        except openai.BadRequestError:
            assert time.monotonic() < deadline, "a request that was given up keeps its turn"
            time.sleep(0.05)
    turns = [("developer", "Be brief."), ("user", "Weather?"), ("assistant", "Yes.")]
    assert said(client, id) == turns, "nothing of the one that was given up"
    for wrong in ({"input": "a " * 9000}, {"temperature": -1}, {"input": [{"role": "wizard", "content": ""}]}):
        refusal(openai.BadRequestError, lambda wrong=wrong: respond(conversation=id, **wrong))
        assert respond("No.", conversation=id).status == "completed"
    assert len(said(client, id)) == 9


def test_all_of_it_outlives_the_server(begin: Callable[..., Server], tokenizer: Tokenizer) -> None:
    """Killed when the answer has come, and ended in good order."""
    server = begin()
    client = server.client
    id = client.conversations.create(items=[RULE], metadata={"a": "b"}).id
    last = respond_of(client, tokenizer)("Rain.", conversation=id)
    for turn in range(2):
        events = list(respond_of(client, tokenizer)("Yes.", input="Sure?", conversation=id, stream=True))
        server.process.kill() if turn else server.process.terminate()
        server.process.wait(60)
        server = begin()
        client = server.client
        assert client.conversations.retrieve(id).metadata == {"a": "b"}
        assert len(said(client, id)) == 5 + 2 * turn
        assert client.responses.retrieve(events[-1].response.id) == events[-1].response
        assert client.responses.retrieve(last.id) == last
        assert [item.type for item in client.responses.input_items.list(last.id)] == ["message"]
        again = respond_of(client, tokenizer)("Well.", input="Then?", previous_response_id=last.id, store=False)
        assert again.usage.input_tokens > last.usage.input_tokens
    counted = client.responses.input_tokens.count(model="m", input="And?", conversation=id).input_tokens
    answer = respond_of(client, tokenizer)("So.", input="And?", conversation=id)
    assert answer.usage.input_tokens == counted and len(said(client, id)) == 9


def test_of_another_tenant_s_there_is_nothing(
    begin: Callable[..., Server], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    keys = [penstock("keys", "add", tmp_path / "keys", "--tenant", name).stdout.decode().strip() for name in "ab"]
    server = begin("--keys", str(tmp_path / "keys"))
    own, other = (openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) for key in keys)
    id = own.conversations.create(items=[RULE]).id
    (item,) = own.conversations.items.list(id).data
    answer = respond_of(own, tokenizer)("Rain.", conversation=id)
    respond = respond_of(other, tokenizer)
    for ask in (
        lambda: other.conversations.retrieve(id),
        lambda: other.conversations.delete(id),
        lambda: other.conversations.update(id, metadata={}),
        lambda: other.conversations.items.list(id),
        lambda: other.conversations.items.create(id, items=[RULE]),
        lambda: other.conversations.items.retrieve(item.id, conversation_id=id),
        lambda: other.conversations.items.delete(item.id, conversation_id=id),
        lambda: respond(conversation=id),
        lambda: other.responses.input_tokens.count(model="m", input="a", conversation=id),
    ):
        assert refusal(openai.NotFoundError, ask)[0] == "conversation_not_found"
    for ask in (lambda: other.responses.retrieve(answer.id), lambda: respond(previous_response_id=answer.id)):
        assert refusal(openai.NotFoundError, ask)[0] == "response_not_found"
    named = [{"type": "item_reference", "id": item.id}]
    assert refusal(openai.BadRequestError, lambda: respond(input=named)) == ("invalid_parameter", "input[0]")
    assert len(said(own, id)) == 3


def test_two_servers_of_one_store_both_answer(begin: Callable[..., Server], tokenizer: Tokenizer) -> None:
    """The second one keeps responses in memory, and says where conversations are."""
    first = begin()
    respond_of(first.client, tokenizer)("Rain.")
    second = begin()
    respond = respond_of(second.client, tokenizer)
    answer = respond("Rain.")
    assert (
        answer.store and respond("Yes.", previous_response_id=answer.id).usage.input_tokens > answer.usage.input_tokens
    )
    refused = refusal(openai.InternalServerError, lambda: second.client.conversations.create())
    assert refused[0] == "store_in_use"
