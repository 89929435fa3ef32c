"""Several models behind one address, room for one of them, and what happens to their engines."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import anthropic
import httpx
import msgspec
import pytest

from commands import argv, penstock, running
from penstock import LLM, SamplingParams
from penstock.base import ConfigError, Unavailable
from penstock.cli.offers import Keeping, at_once, configured, models_of
from penstock.serving.logprobs import completion_logprobs
from penstock.serving.models import Models, Served
from penstock.spec import EngineConfig
from servers import PROMPT

NO_SERVICE: Any = None
MIXED = [("tiny", i) if i % 3 else ("nano", i) for i in range(18)]

PERSON = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}}, "required": ["name"]}
ASKED: list[dict[str, Any]] = [
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 1.1, "top_p": 0.9, "seed": 7, "n": 2, "frequency_penalty": 0.5, "logprobs": 1},
    {"temperature": 1.0, "seed": 3, "structured_outputs": {"json": PERSON}, "logprobs": 2},
]
ENGINES = {"tiny": {"model": "penstock-tiny"}, "nano": {"model": "penstock-nano", "quant": "int8"}}


@dataclass(frozen=True)
class Several:
    url: str
    process: subprocess.Popen[str]
    log: Path

    def ask(self, model: str | None, **fields: Any) -> httpx.Response:
        body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0} | ({"model": model} if model else {}) | fields
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)

    def text(self, model: str | None, **fields: Any) -> str:
        response = self.ask(model, **fields)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])

    def command(self, what: str, model: str) -> dict[str, Any]:
        response = httpx.post(f"{self.url}/models/{what}", json={"model": model})
        assert response.status_code == 200, response.text
        return dict(response.json())

    def models(self) -> dict[str, dict[str, Any]]:
        return {model["name"]: model for model in httpx.get(f"{self.url}/models").json()["models"]}

    def state(self, model: str) -> str:
        return str(self.models()[model]["state"])

    def until(self, model: str, state: str) -> None:
        deadline = time.monotonic() + 60
        while self.state(model) != state:
            assert time.monotonic() < deadline, (model, self.models())
            time.sleep(0.02)

    def engines(self) -> set[int]:
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        return set(map(int, " ".join((task / "children").read_text() for task in tasks).split()))


@pytest.fixture(scope="module")
def several(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Several]:
    """The bundled models, of which one is in memory at a time; one that is broken; one that is far too large."""
    folder = tmp_path_factory.mktemp("several")
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{}")
    file, log = folder / "serve.toml", folder / "log"
    file.write_text(f"""
port = 0
num_threads = 1
max_loaded = 1
least_stay = 0
step_timeout = 3
store = "{folder / "store"}"
[models.tiny]
path = "penstock-tiny"
aliases = ["gpt-4o", "small"]
[models.nano]
path = "penstock-nano"
quant = "int8"
max_model_len = 256
[models.broken]
path = "{folder / "broken"}"
[models.huge]
path = "{stories}"
kv-memory = "900T"
[models.brief]
path = "{stories}"
keep_alive = "1s"
""")
    arguments, own = argv("serve", "--config", file), {"XDG_RUNTIME_DIR": str(folder)}
    with (
        log.open("w") as errors,
        mock.patch.dict(os.environ, own),
        running(arguments, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"Serving tiny, nano, broken, huge, brief at (\S+)/v1\n", line)
        assert found, line + log.read_text()
        yield Several(found[1], process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_names_and_states(several: Several) -> None:
    listed = httpx.get(f"{several.url}/v1/models").json()["data"]
    assert [(m["id"], m["aliases"]) for m in listed][:2] == [("tiny", ["gpt-4o", "small"]), ("nano", [])]
    assert {m["id"]: m["state"] for m in listed}["tiny"] == "loaded" and listed[1]["state"] == "unloaded"
    health = httpx.get(f"{several.url}/health").json()
    assert health["status"] == "ready" and [(m["name"], m["alive"]) for m in health["models"]][:2] == [
        ("tiny", True),
        ("nano", False),
    ]
    texts = {several.text(name) for name in ("tiny", "gpt-4o", "small", "penstock-tiny", None)}
    assert len(texts) == 1, "one model, whatever it is called; it is meant where none is named"
    unknown = several.ask("gpt-5").json()["error"]
    assert unknown["code"] == "model_not_found" and "'tiny', 'nano', 'broken'" in unknown["message"]
    assert httpx.get(f"{several.url}/ready").status_code == httpx.get(f"{several.url}/ready/tiny").status_code == 200
    away = httpx.get(f"{several.url}/ready/nano")
    assert (away.status_code, away.json()["error"]["code"]) == (503, "not_in_memory")
    assert httpx.post(f"{several.url}/models/load", json={"model": "gpt-5"}).status_code == 404
    assert httpx.post(f"{several.url}/models/load", json={"name": "tiny"}).status_code == 400
    assert several.models()["tiny"]["requests"] == {"running": 0, "waiting": 0}
    assert len(several.engines()) == 1


def test_other_apis_tell_of_each_without_loading_it(several: Several) -> None:
    several.text("tiny")
    tags = {m["model"]: m for m in httpx.get(f"{several.url}/api/tags").json()["models"]}
    assert list(tags) == ["tiny", "nano", "broken", "huge", "brief"]
    assert all(tags["nano"][name] for name in ("size", "digest", "details", "modified_at"))
    assert tags["broken"]["digest"] and tags["broken"]["details"]["family"] == "", "its file does not say what it is"
    assert [m["model"] for m in httpx.get(f"{several.url}/api/ps").json()["models"]] == ["tiny"]
    for path in ("/v2/models/nano", "/v2/models/nano/ready"):
        away = httpx.get(several.url + path)
        assert (away.status_code, "not_in_memory" in away.text) == (503, True), away.text
    for name, capabilities in (("small", ["completion"]), ("nano", ["completion"]), ("broken", [])):
        shown = httpx.post(f"{several.url}/api/show", json={"model": name})
        assert shown.status_code == 200 and shown.json()["capabilities"][:1] == capabilities, shown.text
    assert httpx.get(f"{several.url}/v2/models/tiny/ready").json()["ready"] is True
    assert httpx.get(f"{several.url}/v2/health/ready").json()["ready"] is True
    assert several.state("nano") == "unloaded"


def test_anthropic_s_client_pages_through_the_models(several: Several) -> None:
    client, all_of = anthropic.Anthropic(base_url=several.url, api_key="none", max_retries=0).models, ["tiny", "nano"]
    all_of += ["broken", "huge", "brief"]

    def listed(**asked: Any) -> list[list[str]]:
        return [[model.id for model in page.data] for page in client.list(**asked).iter_pages()]

    assert listed() == listed(limit=5) == [all_of]
    assert listed(limit=2) == [all_of[:2], all_of[2:4], all_of[4:]]
    assert listed(limit=2, after_id="nano") == [all_of[2:4], all_of[4:]]
    assert listed(limit=3, before_id="brief") == [all_of[1:4], all_of[:1]]
    assert (
        client.list(after_id="brief").data == [] and client.list(before_id="huge", after_id="tiny").last_id == "broken"
    )
    for wrong in (
        {"limit": 0},
        {"limit": 1001},
        {"limit": "0000000019"},
        {"limit": "1" + "0" * 5000},
        {"after_id": "small"},
        {"before_id": ""},
    ):
        with pytest.raises(anthropic.BadRequestError, match=next(iter(wrong))):
            client.list(**wrong)  # type: ignore[arg-type]
    assert len(httpx.get(f"{several.url}/v1/models?limit=2").json()["data"]) == 5, (
        "a page is asked for by others' clients"
    )


def test_the_wait_for_a_model_is_told_as_such(several: Several) -> None:
    several.text("nano" if several.state("tiny") == "loaded" else "tiny")
    last = httpx.get(f"{several.url}/requests").json()["requests"][0]
    assert 0 < last["load_s"] < last["admitted_s"] and last["phases"]["load"] == last["load_s"]
    assert "passed until its model was in memory" in last["why"]


def test_each_engine_is_looked_at_by_its_model(several: Several) -> None:
    several.text("tiny")
    for path in ("/debug/engine", "/debug/trace"):
        for query in ("", "?model=tiny", "?model=gpt-4o"):
            assert httpx.get(f"{several.url}{path}{query}").status_code == 200
        away, unknown = (httpx.get(f"{several.url}{path}?model={name}") for name in ("nano", "gpt-5"))
        assert (away.status_code, away.json()["error"]["code"]) == (503, "not_in_memory")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert httpx.get(f"{several.url}/debug/engine").json()["steps"]


@pytest.mark.slow
def test_clients_of_two_models_take_turns(several: Several) -> None:
    """All at once, with room for one: everybody is answered by the right model, in few turns."""
    alone = {name: several.text(name) for name in ("nano", "tiny")}
    assert len(set(alone.values())) == 2
    with ThreadPoolExecutor(len(MIXED)) as pool:
        answers = list(pool.map(lambda ask: (ask[0], several.text(ask[0])), MIXED))
    assert all(text == alone[name] for name, text in answers)
    assert len(several.engines()) == 1
    status = httpx.get(f"{several.url}/status").json()
    assert {m["name"]: m["requests"] for m in status["models"]}["nano"] == {"running": 0, "waiting": 0}
    assert status["engine"]["generated_tokens"] >= 8 * len(MIXED), "of engines that are gone, too"
    assert status["queue"] == {"requests": 0, "tokens": 0} | {"tokens_limit": status["queue"]["tokens_limit"]}


@pytest.mark.slow
def test_one_that_runs_is_waited_for(several: Several) -> None:
    """A stream of one model, a request for the other, and one more for the first: they are answered in that order."""
    several.command("load", "tiny")
    several.until("tiny", "loaded")
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 300, "ignore_eos": True, "stream": True}
    with ThreadPoolExecutor(2) as pool, httpx.stream("POST", f"{several.url}/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: ")
        ended: list[str] = []
        other = pool.submit(lambda: ended.append(several.text("nano") and "nano"))
        while not several.models()["nano"]["requests"]["waiting"]:
            time.sleep(0.01)
        later = pool.submit(lambda: ended.append(several.text("tiny") and "tiny"))
        while several.models()["tiny"]["requests"] != {"running": 1, "waiting": 1}:
            assert not later.done() or several.models()["tiny"]["requests"]["running"] == 0
            if not several.models()["tiny"]["requests"]["running"]:
                break  # the stream has ended meanwhile
            time.sleep(0.01)
        assert [line for line in lines if line][-1] == "data: [DONE]"
        other.result(), later.result()
    assert ended == ["nano", "tiny"]


@pytest.mark.slow
def test_unload_waits_for_what_runs(several: Several) -> None:
    several.command("load", "tiny")
    several.until("tiny", "loaded")
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 300, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{several.url}/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: ")
        several.command("unload", "tiny")
        rest = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    assert rest[-1]["choices"][0]["finish_reason"] == "length"
    several.until("tiny", "unloaded")
    assert several.engines() == set() and httpx.get(f"{several.url}/ready").status_code == 200
    assert several.text("tiny") and several.state("tiny") == "loaded"


def test_nobody_leaves_for_one_that_cannot_be_loaded(several: Several) -> None:
    several.text("tiny")
    engines = several.engines()
    refused = several.ask("broken")
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (503, "model_not_loaded") and "broken" not in error["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= 7 and "tried again in" in error["message"]
    again = several.ask("broken")
    assert again.status_code == 503 and several.models()["broken"]["failure"]
    assert several.state("tiny") == "loaded" and several.engines() == engines


@pytest.mark.slow
def test_nobody_leaves_for_one_that_does_not_fit(several: Several) -> None:
    several.text("tiny")
    engines = several.engines()
    large = several.ask("huge")
    error = large.json()["error"]
    assert large.status_code == 503 and error["code"] == "kv_memory_too_large" and "are free" in error["message"]
    assert several.state("tiny") == "loaded" and several.engines() == engines


def test_a_batch_whose_model_cannot_be_loaded_holds_up_no_other(several: Several) -> None:
    def begin(model: str) -> str:
        body = {"model": model, "prompt": PROMPT, "max_tokens": 4}
        line = json.dumps({"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": body}).encode()
        file = httpx.post(f"{several.url}/v1/files", files={"file": ("in.jsonl", line)}, data={"purpose": "batch"})
        asked = {"input_file_id": file.json()["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        return str(httpx.post(f"{several.url}/v1/batches", json=asked).json()["id"])

    def told(batch: str) -> dict[str, Any]:
        return dict(httpx.get(f"{several.url}/v1/batches/{batch}").json())

    stuck, other = begin("broken"), begin("tiny")
    deadline = time.monotonic() + 30
    while told(other)["status"] != "completed":
        assert time.monotonic() < deadline, (told(stuck), told(other))
        time.sleep(0.05)
    assert told(stuck)["status"] == "in_progress" and told(stuck)["request_counts"]["failed"] == 0
    httpx.post(f"{several.url}/v1/batches/{stuck}/cancel")
    while told(stuck)["status"] != "cancelled":
        assert time.monotonic() < deadline, told(stuck)
        time.sleep(0.05)


@pytest.mark.slow
def test_an_engine_dies_or_hangs_while_it_streams(several: Several) -> None:
    ask = {"max_tokens": 300, "ignore_eos": True}
    undisturbed = several.text("tiny", **ask)
    for number in (signal.SIGKILL, signal.SIGSTOP):
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(several.text, "tiny", **ask)
            while several.models()["tiny"]["kv_blocks_used"] == 0 and not answer.done():
                time.sleep(0.005)
            (engine,) = several.engines()
            os.kill(engine, number)
            assert answer.result() == undisturbed
    assert "it hangs" in several.log.read_text()


def alone(name: str) -> list[Any]:
    """What a model's engine says without a server, one request after another: samples as the API tells them."""
    said = []
    with LLM(num_threads=1, **ENGINES[name]) as llm:
        for fields in ASKED:
            params = SamplingParams(**{**llm.engine.recommended, "max_tokens": 40, **fields})
            (answer,) = llm.generate([PROMPT], params, use_tqdm=False)
            told = [completion_logprobs(sample, llm.engine.tokenizer, 0) for sample in answer.outputs]  # type: ignore[arg-type]
            said.append(
                [
                    (
                        sample.text,
                        sample.finish_reason,
                        each.tokens,
                        each.token_logprobs,
                        json.loads(msgspec.json.encode(each.top_logprobs)),
                    )
                    for sample, each in zip(answer.outputs, told, strict=True)
                ]
            )
    return said


def answer_of(server: Several, model: str, index: int, **fields: Any) -> list[Any]:
    response = server.ask(model, max_tokens=40, **ASKED[index], **fields)
    assert response.status_code == 200, response.text
    return [
        (
            each["text"],
            each["finish_reason"],
            *(each["logprobs"][told] for told in ("tokens", "token_logprobs", "top_logprobs")),
        )
        for each in response.json()["choices"]
    ]


def test_each_model_says_what_its_engine_says_alone(tmp_path: Path) -> None:
    """Bit for bit: beside streams of the other model, at every tier, and after it has left memory and come back."""
    file, log = tmp_path / "serve.toml", tmp_path / "log"
    tables = [f"[models.{name}]\npath = '{each['model']}'\n" for name, each in ENGINES.items()]
    shared = f"port = 0\nnum_threads = 1\nmax_num_seqs = 4\nscheduling_policy = 'priority'\nstore = '{tmp_path}/s'\n"
    file.write_text(shared + "".join(tables) + "quant = 'int8'\n")
    expected = {name: alone(name) for name in ENGINES}
    assert expected["tiny"] != expected["nano"]
    long: dict[str, Any] = {"max_tokens": 300, "ignore_eos": True, "temperature": 1.0}
    arguments = argv("serve", "--config", file)
    with log.open("w") as errors, running(arguments, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        assert process.stdout is not None
        server = Several(process.stdout.readline().split()[-1].removesuffix("/v1"), process, log)
        asked = [
            (name, i, tier) for tier in ("flex", "auto", "priority") for i in range(len(ASKED)) for name in ENGINES
        ]
        assert server.text("nano")  # both are in memory
        with ThreadPoolExecutor(len(asked) + 6) as pool:
            beside = [
                pool.submit(server.text, name, **long, seed=i, service_tier=tier)
                for name in ENGINES
                for i, tier in enumerate(("priority", "default", "flex"))
            ]
            while not all(model["kv_blocks_used"] for model in server.models().values()):
                assert not all(one.done() for one in beside), "they have ended before they were seen"
                time.sleep(0.005)
            told = [(one, pool.submit(answer_of, server, *one[:2], service_tier=one[2])) for one in asked]
            assert [one for one, answer in told if answer.result() != expected[one[0]][one[1]]] == []
        for leaving, staying in (("nano", "tiny"), ("tiny", "nano")):
            with ThreadPoolExecutor(1) as pool:
                server.command("unload", leaving)
                server.until(leaving, "unloaded")
                stream = pool.submit(server.text, staying, **long, seed=1)
                assert [answer_of(server, leaving, i) for i in range(len(ASKED))] == expected[leaving]
                assert stream.result() == beside[1 if staying == "tiny" else 4].result()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.slow
def test_an_engine_dies_while_that_of_another_model_streams(tmp_path: Path) -> None:
    """Both in memory, both streaming: neither stream learns of the death, and the other engine lives."""
    arguments = argv("serve", "penstock-tiny", "penstock-nano", "--port", "0", "--num-threads", "1")
    log, ask = tmp_path / "log", {"max_tokens": 300, "ignore_eos": True}
    with log.open("w") as errors, running(arguments, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        assert process.stdout is not None
        server = Several(process.stdout.readline().split()[-1].removesuffix("/v1"), process, log)
        names = ("penstock-tiny", "penstock-nano")
        undisturbed = [server.text(name, **ask) for name in names]
        engines = server.engines()
        assert len(engines) == 2
        for victim in engines:
            before = server.engines()
            with ThreadPoolExecutor(2) as pool:
                answers = [pool.submit(server.text, name, **ask) for name in names]
                while not all(model["kv_blocks_used"] for model in server.models().values()):
                    assert not all(answer.done() for answer in answers), "both have ended before they were seen"
                    time.sleep(0.005)
                os.kill(victim, signal.SIGKILL)
                assert [answer.result() for answer in answers] == undisturbed
            assert len(server.engines()) == 2 and before - {victim} < server.engines()
        assert log.read_text().count("was killed by signal 9") == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.slow
def test_an_idle_one_leaves(several: Several) -> None:
    assert several.text("brief")
    several.until("brief", "unloaded")
    assert several.engines() == set()


@pytest.mark.slow
def test_ps_shows_each(several: Several) -> None:
    assert several.text("nano")
    rows = [re.split("  +", line) for line in penstock("ps").stdout.decode().splitlines()]
    mine = {row[1]: row[3] for row in rows if row[0] == str(several.process.pid)}
    assert list(mine) == ["tiny", "nano", "broken", "huge", "brief"], rows
    assert (mine["nano"], mine["tiny"]) == ("ready", "unloaded")
    shown = penstock("top", str(several.process.pid), "--once", "--interval", "0.1").stdout.decode()
    assert "tiny unloaded, nano ready" in shown


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[models.a]\nquantt = 'int8'", "Did you mean quant"), ("[models.a]\naliases = 'x'", "a list of texts"),
        ("[models.a]\npin = 1", "true or false"), ("[models.a]\npath = 7", "a text"),
        ("[models.a]\nkeep_alive = 'soon'", "'soon' is not a span"), ("[models.a]\nquant = 'int3'", "'int3'"),
        ("models = 1", r"\[models.NAME\]"), ("[models]\na = 1", r"\[models.NAME\]"),
        ("[models.a]\naliases = ['b']\n[models.b]", "Two models are called 'b'"),
        ("[models.a]\npin = true\n[models.b]", "1 of 2 are pinned, and max_loaded is 1"),
    ],
)  # fmt: skip
def test_tables_that_are_refused(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        models_of(configured([], {}, file), NO_SERVICE, Keeping(max_loaded=1))


def test_who_is_refused_before_he_waits_hears_of_it(tmp_path: Path) -> None:
    async def main() -> None:
        models = Models([Served(name="a", config=EngineConfig(model=str(tmp_path / "nothing")))])
        tickets = [models.ask(models.first) for _ in range(2)]
        while models.policy.models["a"].waiting:
            await asyncio.sleep(0.01)
        with pytest.raises(Unavailable, match="model_not_found"):
            await asyncio.wait_for(models.granted(tickets[0]), 30)
        for ticket in tickets:
            models.leave(ticket)
        with pytest.raises(Unavailable, match="is tried again"):
            models.ask(models.first)
        models.close()

    asyncio.run(main())


def test_those_who_go_away_together_are_looked_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        models = Models([Served(name="a", config=EngineConfig(model=str(tmp_path / "nothing")))])
        turn = mock.Mock(wraps=models.policy.turn)
        with mock.patch.object(models.policy, "turn", turn):
            for ticket in [models.ask(models.first) for _ in range(100)]:
                models.leave(ticket)
            await asyncio.sleep(0)
        assert turn.call_count == 1 and not models.policy.models["a"].waiting and not models._waiting
        models.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    "wrong", [{"keep_alive": "5 years"}, {"max_loaded": 0}, {"step_timeout": -1.0}, {"least_stay": -1.0}]
)
def test_options_that_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"not a span|cannot be used"):
        Keeping(**wrong)


def test_names_on_the_command_line_and_tables(tmp_path: Path) -> None:
    """A name of a table is that table; the others follow in the order of the file."""
    file = tmp_path / "serve.toml"
    file.write_text("[models.a]\npath = 'p'\nkv-dtype = 'int8'\n[models.b]\ndepth = 2\npin = true\nkeep_alive = 60\n")
    configs = configured(["b", "org/c"], {"depth": 1, "served_model_name": None}, file)
    told = [(c.model, c.served_model_name, c.depth, c.kv_dtype) for c, _ in configs]
    assert told == [("b", "b", 2, "auto"), ("org/c", None, 1, "auto"), ("p", "a", 1, "int8")]
    assert at_once(configs).model == "b"
    models = models_of(configs, NO_SERVICE, Keeping(keep_alive="10m"))
    stays = {name: (model.stay.keep_alive, model.stay.pinned) for name, model in models.all.items()}
    assert stays == {"b": (60.0, True), "c": (600.0, False), "a": (600.0, False)} and models.find(None).name == "b"
    alone = configured([], {"served_model_name": "mine"}, None)
    assert [(c.model, c.served_model_name) for c, _ in alone] == [(None, "mine")]
    for named, path in (([], file), (["b"], file), (["a", "c"], None)):  # a name for all of them is none
        with pytest.raises(ConfigError, match=r"--served-model-name mine.*aliases = \['mine'\]"):
            configured(named, {"served_model_name": "mine"}, path)


@pytest.mark.slow
def test_a_server_that_cannot_begin_says_why(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(
        "[models.a]\npath = 'penstock-nano'\n[models.b]\npath = 'penstock-tiny'\npin = true\nkv_memory = '900T'"
    )
    done = penstock("serve", "--config", file, "--port", "0", "--num-threads", "1")
    errors = done.stderr.decode()
    assert done.returncode == 3 and "kv_memory = '900T'" in errors and "--kv-memory" in errors, errors
    assert "Traceback" not in errors and done.stdout == b""
