"""Keys, tenants and rates, at a real server that others than this machine could reach."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx
import openai
import pytest

from commands import argv, penstock, running
from penstock.serving import admin
from penstock.serving.app import ROUTES
from penstock.serving.dashboard import PAGES
from penstock.serving.limits import MAX_BODY_BYTES
from servers import PROMPT

COMPLETIONS = "/v1/completions"


@dataclass(frozen=True)
class Keyed:
    """A server with keys, its port for administration, and the keys by name."""

    url: str
    admin: str
    file: Path
    keys: dict[str, str]
    process: subprocess.Popen[str]
    log: Path

    def ask(self, key: str | None, path: str = COMPLETIONS, admin: bool = False, **fields: Any) -> httpx.Response:
        headers = {} if key is None else {"authorization": f"Bearer {self.keys.get(key, key)}"}
        url = (self.admin if admin else self.url) + path
        if not fields:
            return httpx.get(url, headers=headers)
        return httpx.post(url, json={"prompt": PROMPT, "max_tokens": 4} | fields, headers=headers, timeout=60)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("admin", "/status", admin=True).json()
        return found


def add(file: Path, *options: str) -> str:
    done = penstock("keys", "add", file, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().strip()


@pytest.fixture(scope="module")
def keyed(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    folder = tmp_path_factory.mktemp("keyed")
    file, log = folder / "keys.jsonl", folder / "log"
    keys = {
        "acme": add(file, "--tenant", "acme"),
        "birch": add(file, "--tenant", "birch"),
        "early": add(file, "--tenant", "birch", "--min-priority", "-6"),
        "slow": add(file, "--tenant", "slow", "--requests-per-minute", "3", "--tokens-per-minute", "120"),
        "patient": add(file, "--tenant", "patient", "--tokens-per-minute", "600"),
        "uploader": add(file, "--tenant", "uploader", "--requests-per-minute", "3"),
        "single": add(file, "--tenant", "single", "--concurrency", "1"),
        "admin": add(file, "--role", "admin"),
    }
    options = ["--dtype", "float32", "--num-threads", "1", "--host", "0.0.0.0", "--port", "0", "--admin-port", "0"]
    options += ["--queue-tokens", "2000", "--store", str(folder / "store")]
    arguments = argv("serve", stories, "--keys", file, *options)
    with log.open("w") as errors, running(arguments, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        assert "Bearer $KEY" in lines[3], [*lines, log.read_text()]
        url = lines[0].split()[-1].removesuffix("/v1")
        yield Keyed(url, lines[1].split()[-1], file, keys, process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_nothing_but_live_and_the_page_without_a_key(keyed: Keyed) -> None:
    """The whole table of routes, by every method."""
    public = {"/live", "/v2/health/live", *PAGES}
    assert set(ROUTES) > {COMPLETIONS, "/metrics", "/requests", "/page/app.js"} | public
    for path in [*ROUTES, "/nowhere", "/docs", "/openapi.json", "/v1", "/page", "/page/", "/page/../app.py"]:
        for method in ("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH"):
            response = httpx.request(method, keyed.url + path.replace("{model:path}", "x"))
            if path in public:
                assert response.status_code == (200 if method in ("GET", "HEAD") else 405)
            else:
                assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer", (path, method)
    for path in ("/metrics", "/status", "/reload", "/drain", "/live", "/nowhere"):
        assert httpx.post(keyed.admin + path).status_code == 401


def test_a_key_opens_what_its_role_may(keyed: Keyed) -> None:
    for path, (access, *methods) in ROUTES.items():
        if access == "admin":  # at the port for that alone
            for key in ("acme", "admin"):
                fields = {"model": "stories260k"} if "POST" in methods else {}
                assert code(keyed.ask(key, path, **fields)) == (404, "unknown_path"), path
        elif len(methods) == 1 and "{" not in path:
            assert keyed.ask("acme", path).status_code == keyed.ask("admin", path).status_code == 200, path
    assert "/metrics" not in keyed.ask("acme", "/openapi.json").json()["paths"]
    for path, (access, *methods) in admin.ROUTES.items():
        if len(methods) == 1:
            assert keyed.ask("admin", path, admin=True).status_code == (404 if "{" in path else 200), path
            assert access == "public" or code(keyed.ask("acme", path, admin=True)) == (403, "role_not_allowed"), path
    assert code(keyed.ask("acme", "/drain", admin=True, x=1)) == (403, "role_not_allowed")
    assert code(keyed.ask("acme", "/nowhere")) == (404, "unknown_path")
    assert keyed.ask("admin", COMPLETIONS, admin=True, x=1).status_code == 404  # another port, other paths
    assert not keyed.status()["draining"]


def test_commands_and_the_page_find_the_port_for_administration(keyed: Keyed, tmp_path: Path) -> None:
    listed = [json.loads(line) for line in penstock("ps", "--json").stdout.splitlines()]
    (own,) = [each for each in listed if each["pid"] == keyed.process.pid]
    assert own["admin"] == keyed.admin and own["status"]["alive"]
    assert penstock("top", "--once", str(keyed.process.pid)).returncode == 0
    assert penstock("trace", keyed.url, "--out", tmp_path / "t").returncode == 0
    elsewhere = {"XDG_RUNTIME_DIR": str(tmp_path)}  # as from another machine
    refused = penstock("trace", keyed.url, "--out", tmp_path / "t", "--api-key", keyed.keys["admin"], **elsewhere)
    assert b"trace_refused" in refused.stderr and b"--admin-port" in refused.stderr
    page = "".join(httpx.get(f"{keyed.admin}{path}").text for path in PAGES if path.endswith(("live.js", "engine.js")))
    asked = set(re.findall(r'json\([`"](/[a-z/]+)', page))
    assert asked == {"/status", "/debug/engine"} <= set(admin.ROUTES)
    assert {"/v1/models", "/requests", *PAGES} <= set(admin.ROUTES)


def test_both_headers_carry_a_key(keyed: Keyed) -> None:
    good, other = keyed.keys["acme"], keyed.keys["birch"]

    def status(*headers: tuple[str, str]) -> int:
        return httpx.get(f"{keyed.url}/v1/models", headers=list(headers)).status_code

    assert status(("x-api-key", good)) == status(("Authorization", f"bearer  {good}")) == 200
    assert status(("x-api-key", good), ("authorization", f"Bearer {good}")) == 200
    for headers in (
        [("x-api-key", good), ("authorization", f"Bearer {other}")],
        [("x-api-key", good), ("x-api-key", "other")],
        [("authorization", f"Basic {good}")], [("authorization", good)], [("authorization", "Bearer")],
        [("x-api-key", "")], [("x-api-key", good[:-1])], [("x-api-key", good + "x")], [("x-api-key", good.upper())],
        [("x-api-key", "a" * 8000)], [("cookie", f"x-api-key={good}")],
    ):  # fmt: skip
        assert status(*headers) == 401, headers
    assert httpx.get(f"{keyed.url}/v1/models?api_key={good}").status_code == 401
    client = openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=good, max_retries=0)
    assert client.completions.create(model="stories260k", prompt=PROMPT, max_tokens=2).usage
    with pytest.raises(openai.AuthenticationError) as caught:
        client.with_options(api_key="penstock-wrong").models.list()
    assert caught.value.code == "invalid_api_key"
    with pytest.raises(openai.PermissionDeniedError):
        client.with_options(base_url=keyed.admin).get("/metrics", cast_to=httpx.Response)


def test_no_host_and_no_path_changes_the_verdict(keyed: Keyed) -> None:
    """2,000 pairs of Host and path, raw, on connections that are kept: without a key only /live itself answers."""
    random = Random(7)
    names = ["live", "metrics", "v1", "models", "completions", "status", "ready"]
    glue = "/ // /./ /../ %2f %2F \\ ; ? # %00 %2e%2e/ @ :80/ /live/../ %".split()
    hosts = ["", *"localhost evil.example evil/live? x@evil [::1] a:b:c 127.0.0.1:80/live# live é".split()]
    host, port = keyed.url.removeprefix("http://").split(":")
    verdicts = {"open": 0, "shut": 0}
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    for _ in range(2000):
        parts = [random.choice(names) + random.choice(glue) for _ in range(random.randint(1, 4))]
        path = random.choice(["/", "", "//", "http://x/", "/live?", "/live#"]) + "".join(parts)
        path = random.choice([path, path.rstrip("/"), "/live", "/live/", "/LIVE", "/live%2F", "/%6cive"])
        named = random.choice(hosts) + random.choice(["", "/live", ":1", "?/live", "#"])
        answers = []
        for name in (named, "localhost"):
            connection.putrequest("GET", path.replace(" ", "") or "/", skip_host=True, skip_accept_encoding=True)
            connection.putheader("Host", name.encode("latin-1"))
            connection.endheaders()
            response = connection.getresponse()
            body = response.read()
            answers.append(response.status)
            if response.status == 200:
                assert body == b"ok\n"
            if response.will_close:
                connection.close()
        if 400 in answers:  # no HTTP: nothing was looked at
            assert set(answers) <= {400, 401, 200}
            continue
        assert answers[0] == answers[1] and answers[0] in (200, 401), (path, named, answers)
        public = path.split("?")[0] in ("/live", "/%6cive")
        assert (answers[0] == 200) == public, (path, named, answers)
        verdicts["open" if public else "shut"] += 1
    assert verdicts["open"] > 100 and verdicts["shut"] > 1000
    connection.close()


def test_rates_are_of_a_tenant_and_say_when_to_come_again(keyed: Keyed) -> None:
    answers = [keyed.ask("slow", max_tokens=30, ignore_eos=True) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    told = answers[0].headers
    assert (told["x-ratelimit-limit-requests"], told["x-ratelimit-remaining-requests"]) == ("3", "2")
    assert told["x-ratelimit-limit-tokens"] == "120" and 80 <= int(told["x-ratelimit-remaining-tokens"]) < 120
    assert 0 < float(told["x-ratelimit-reset-requests"].removesuffix("s")) <= 20
    assert not [name for name in keyed.ask("acme", max_tokens=1).headers if name.startswith("x-ratelimit")]
    refused = keyed.ask("slow", max_tokens=30)
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert code(refused) == (429, "requests_over_rate")
    assert 1 <= int(refused.headers["retry-after"]) <= 26
    assert "acme" not in refused.text and "3 a minute" in refused.json()["error"]["message"]
    assert refused.json()["error"]["type"] == "rate_limit_error"
    with pytest.raises(openai.RateLimitError):
        openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=keyed.keys["slow"], max_retries=0).completions.create(
            model="stories260k", prompt=PROMPT
        )
    assert keyed.ask("acme", max_tokens=30).status_code == 200  # nobody else is slowed down
    shown = keyed.ask("admin", "/metrics", admin=True).text
    assert 'penstock_tenant_requests_total{status="200",tenant="slow"} 3.0' in shown
    assert 'penstock_tenant_tokens_total{kind="completion",tenant="slow"} 90.0' in shown
    assert 'tenant_requests_total{status="429",tenant="slow"}' not in shown  # refused before it was let in


def test_one_at_a_time(keyed: Keyed) -> None:
    long = {"max_tokens": 450, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(keyed.ask, "single", **long)
        wait_until(lambda: keyed.status()["tenants"].get("single") == 1)
        assert code(keyed.ask("single", max_tokens=1)) == (429, "too_many_at_once")
        assert keyed.ask("acme", max_tokens=1).status_code == 200
        assert first.result().status_code == 200
    assert keyed.ask("single", max_tokens=1).status_code == 200


def test_a_full_queue_refuses_and_empties(keyed: Keyed) -> None:
    """The budget is 2,000 tokens: four samples of 450 fill it."""
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(keyed.ask, "acme", max_tokens=450, n=4, ignore_eos=True)
        wait_until(lambda: keyed.status()["queue"]["tokens"] > 1800)
        refused = keyed.ask("birch", max_tokens=450)
        assert code(refused) == (503, "queue_full") and int(refused.headers["retry-after"]) >= 1
        assert keyed.ask("birch", max_tokens=4).status_code == 200  # there is room for a small one
        assert first.result().status_code == 200
    wait_until(lambda: keyed.status()["queue"] == {"requests": 0, "tokens": 0, "tokens_limit": 2000})
    assert keyed.ask("birch", max_tokens=450, n=8, ignore_eos=True).status_code == 200  # larger than all: alone


def test_whatever_ends_a_request_frees_its_room(keyed: Keyed) -> None:
    host, port = keyed.url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": True}).encode()
    head = (
        f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"x-api-key: {keyed.keys['acme']}\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    for sent in (head, head + body[:10], head + body):
        for reads in (False, True):
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                connection.sendall(sent)
                if reads and sent.endswith(body):
                    connection.recv(1000)
    for fields in ({"max_tokens": 0}, {"model": "nobody"}, {"prompt": [9999]}, {"prompt": "x" * 9999}, {"nobody": 1}):
        keyed.ask("acme", **fields)
    wait_until(lambda: keyed.status()["queue"]["requests"] == 0)
    status = keyed.status()
    assert status["queue"]["tokens"] == 0 and status["tenants"] == {}
    wait_until(lambda: keyed.status()["engine"]["kv_blocks_used"] == 0)


def test_prefixes_are_shared_within_a_tenant_alone(keyed: Keyed) -> None:
    prompt = [1, *range(300, 364)]

    def cached(key: str) -> int:
        answer = keyed.ask(key, prompt=prompt, max_tokens=1).json()
        found: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found

    assert [cached("acme"), cached("acme")] == [0, 64]
    assert [cached("birch"), cached("birch")] == [0, 64]
    best = {"prompt": [1, *range(200, 264)], "best_of": 2, "n": 1}
    assert keyed.ask("acme", **best).status_code == 200
    hits = keyed.status()["engine"]["prefix_hit_tokens"]
    keyed.ask("birch", **best)
    assert keyed.status()["engine"]["prefix_hit_tokens"] - hits <= 64  # its own two samples may share


def test_nobody_goes_ahead_of_others_but_whose_key_says_so(keyed: Keyed) -> None:
    model = "stories260k"
    for key, least in (("acme", 0), ("early", -6)):
        assert keyed.ask(key, priority=least, max_tokens=1).status_code == 200
        for path, body in (
            (COMPLETIONS, {"priority": least - 1}),
            (COMPLETIONS, {"priority": least - 1, "stream": True, "service_tier": "priority"}),
            ("/v1/embeddings", {"input": "a", "priority": least - 1}),
            ("/api/generate", {"priority": least - 1}),
            (f"/v2/models/{model}/generate", {"text_input": "a", "parameters": {"priority": least - 1}}),
            (f"/v2/models/{model}/generate_stream", {"text_input": "a", "parameters": {"priority": least - 1}}),
        ):
            refused = keyed.ask(key, path, **body)
            assert refused.status_code == 403 and "priority_not_allowed" in refused.text, (path, refused.text)
            assert str(least) in refused.text
    tiers = {key: keyed.ask(key, service_tier="priority", max_tokens=1).json() for key in ("acme", "early", "admin")}
    assert [tiers[key]["service_tier"] for key in tiers] == ["default", "priority", "priority"]
    assert keyed.ask("acme", service_tier="flex", max_tokens=1).json()["service_tier"] == "flex"
    assert keyed.ask("admin", priority=-(10**6), max_tokens=1).status_code == 200


def test_a_line_of_a_batch_does_not_go_ahead_of_those_who_wait(keyed: Keyed) -> None:
    client = openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=keyed.keys["admin"], max_retries=0)
    body = {"prompt": PROMPT, "max_tokens": 1}
    lines = [
        json.dumps(
            {"custom_id": str(priority), "method": "POST", "url": COMPLETIONS, "body": body | {"priority": priority}}
        )
        for priority in (-(10**6), 0)
    ]
    file = client.files.create(file=("x", "\n".join(lines).encode()), purpose="batch").id
    batch = client.batches.create(input_file_id=file, endpoint=COMPLETIONS, completion_window="24h").id
    wait_until(lambda: client.batches.retrieve(batch).status == "completed")
    done = client.batches.retrieve(batch)
    assert done.error_file_id is not None and done.output_file_id is not None
    assert "priority_not_allowed" in client.files.content(done.error_file_id).text
    assert json.loads(client.files.content(done.output_file_id).text)["custom_id"] == "0"


def test_uploads_and_batches_count_as_requests(keyed: Keyed) -> None:
    client = openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=keyed.keys["uploader"], max_retries=0)
    file = client.files.create(file=("x", b"{}"), purpose="batch").id
    for _ in range(2):
        client.batches.create(input_file_id=file, endpoint=COMPLETIONS, completion_window="24h")
    with pytest.raises(openai.RateLimitError):
        client.files.create(file=("x", b"{}"), purpose="batch")
    with pytest.raises(openai.RateLimitError):
        client.batches.create(input_file_id=file, endpoint=COMPLETIONS, completion_window="24h")
    assert client.files.retrieve(file).id == file  # to look costs nothing
    assert keyed.status()["requests"] == []


def test_a_batch_waits_for_its_tenant_s_tokens(keyed: Keyed) -> None:
    """600 a minute are 10 a second: six lines take what there is, the seventh comes two seconds later."""
    client = openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=keyed.keys["patient"], max_retries=0)

    def begin(client: openai.OpenAI, *lengths: int) -> str:
        lines = []
        for i, tokens in enumerate(lengths):
            body = {"prompt": [5], "max_tokens": tokens, "ignore_eos": True}
            lines.append(json.dumps({"custom_id": str(i), "method": "POST", "url": COMPLETIONS, "body": body}))
        file = client.files.create(file=("x", "\n".join(lines).encode()), purpose="batch").id
        return client.batches.create(input_file_id=file, endpoint=COMPLETIONS, completion_window="24h").id

    began = time.monotonic()
    batch = begin(client, *[99] * 6, 25)
    wait_until(lambda: client.batches.retrieve(batch).status == "completed")
    counts = client.batches.retrieve(batch).request_counts
    assert counts is not None and (counts.completed, counts.failed) == (7, 0)
    assert time.monotonic() - began > 2
    resting = begin(client, 500, 500)  # for three quarters of a minute
    other = openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=keyed.keys["acme"], max_retries=0)
    quick = begin(other, 4)
    wait_until(lambda: other.batches.retrieve(quick).status == "completed")
    assert client.batches.cancel(resting).status == "cancelling"
    wait_until(lambda: client.batches.retrieve(resting).status == "cancelled")


def test_anthropic_s_routes_refuse_in_its_own_form(keyed: Keyed) -> None:
    """Whoever refuses: the gate, the router, the body's reader, the rates."""
    url, own = f"{keyed.url}/v1/messages", {"x-api-key": keyed.keys["birch"]}
    refusals = {
        "authentication_error": httpx.post(url),
        "not_found_error": httpx.post(f"{url}/nothing", headers=own),
        "invalid_request_error": httpx.get(url, headers=own),
        "request_too_large": httpx.post(url, headers=own, json={"x": " " * MAX_BODY_BYTES}),
        "rate_limit_error": [httpx.post(url, headers={"x-api-key": keyed.keys["slow"]}, json={}) for _ in range(4)][-1],
    }
    for kind, response in refusals.items():
        assert (response.json()["type"], response.json()["error"]["type"]) == ("error", kind), response.text
    assert [response.status_code for response in refusals.values()] == [401, 404, 405, 413, 429]
    assert keyed.ask(None, "/v1/messagesx").json()["error"]["code"] == "no_api_key"


def test_a_tenant_is_told_of_its_own_requests(keyed: Keyed) -> None:
    """Their numbers, and no word of what they say."""
    long = {"prompt": [1, *range(260, 300)], "max_tokens": 30, "ignore_eos": True}
    for key in ("acme", "birch", "birch"):
        assert keyed.ask(key, **long).status_code == 200
    assert keyed.ask("birch", "/tokenize", max_tokens=None).status_code == 200

    def told(key: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = keyed.ask(key, "/requests").json()["requests"]
        return found

    assert {each["tenant"] for each in told("acme")} == {"acme"}
    assert {each["tenant"] for each in told("admin")} >= {"acme", "birch"}
    latest, first = told("birch")[:2]
    assert (latest["prompt_tokens"], latest["completion_tokens"], latest["finish"]) == (41, 30, "length")
    assert (first["cached_tokens"], latest["cached_tokens"]) == (0, 32)
    assert list(latest["phases"]) == ["read", "queue", "prompt", "decode"]
    assert sum(latest["phases"].values()) == pytest.approx(latest["total_s"], abs=1e-5)
    assert min(latest["phases"].values()) >= 0 and 0 < latest["longest_gap_s"] < latest["total_s"]
    assert latest["why"].startswith(f"{max(latest['phases'].values()):.3f} of {latest['total_s']:.3f} s ")


def test_sighup_takes_new_keys_or_keeps_the_old(keyed: Keyed) -> None:
    late = add(keyed.file, "--tenant", "late")
    assert code(keyed.ask(late, "/v1/models")) == (401, "invalid_api_key")
    keyed.process.send_signal(signal.SIGHUP)
    wait_until(lambda: keyed.ask(late, "/v1/models").status_code == 200)

    listed = [json.loads(line) for line in penstock("keys", "list", "--json", keyed.file).stdout.splitlines()]
    (own,) = [record["id"] for record in listed if record["tenant"] == "late"]
    assert penstock("keys", "revoke", keyed.file, own).returncode == 0
    good = keyed.file.read_bytes()
    keyed.file.write_bytes(good + b"{}\n")
    keyed.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "missing required field" in keyed.log.read_text())
    assert f"Line {len(listed) + 1} of" in keyed.log.read_text()
    assert keyed.ask(late, "/v1/models").status_code == 200  # the keys from before
    refused = keyed.ask("admin", "/reload", admin=True, x=1)
    assert code(refused) == (409, "keys_invalid") and "line" in refused.text.lower()
    keyed.file.write_bytes(good)
    assert keyed.ask("admin", "/reload", admin=True, x=1).json() == {"keys": len(listed)}
    assert code(keyed.ask(late, "/v1/models")) == (401, "key_revoked")
    assert late not in keyed.file.read_text() and late not in keyed.log.read_text()


def test_refuses_to_start_open_by_accident(stories: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    add(file)
    for options, name in (
        (["--host", "0.0.0.0"], "keys_required"),
        (["--admin-port", "0"], "admin_key_required"),
        (["--admin-port", "0", "--keys", str(file)], "admin_key_required"),
        (["--keys", str(tmp_path / "none")], "keys_unreadable"),
        (["--keys", str(tmp_path)], "keys_unreadable"),
    ):
        done = penstock("serve", stories, "--port", "0", *options)
        assert done.returncode == 3 and done.stderr.endswith(f"code: {name}\n".encode()), done.stderr


def test_a_stranger_without_a_key_administers_nothing(stories: Path) -> None:
    """Of the whole table of routes; whatever is sent as a key. ``penstock ps`` has one that no stranger knows."""
    options = ("--host", "0.0.0.0", "--port", "0", "--allow-anyone", "--num-threads", "1")
    arguments = argv("serve", stories, "penstock-nano", *options, "--keep-alive", "1h")
    with running(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1].removesuffix("/v1")
        assert "Anyone who can reach" in process.stdout.readline()
        for headers in ({}, {"authorization": "Bearer none"}, {"x-api-key": "penstock-" + "a" * 43}):
            with httpx.Client(base_url=url, headers=headers, timeout=60) as stranger:
                for path, (access, _, *methods) in ROUTES.items():
                    for method in " ".join(methods or ["GET"]).split() if access == "admin" else ():
                        refused = stranger.request(method, path, json={"model": "stories260k"})
                        assert code(refused) == (403, "role_not_allowed"), path
                        assert "Serve with --keys" in refused.json()["error"]["message"]
                    for method in " ".join(methods or ["GET"]).split() if access == "tenant" else ():
                        assert code(stranger.request(method, path, json={})) == (403, "no_tenant"), (method, path)
                assert stranger.post("/v1/files", data={"purpose": "batch"}, files={"file": b"{}"}).status_code == 403
                for path, (access, *rest) in ROUTES.items():
                    if access != "admin" and len(rest) == 1 and "{" not in path:
                        assert stranger.get(path).status_code == 200, path
                assert stranger.post(COMPLETIONS, json={"prompt": PROMPT, "max_tokens": 2}).status_code == 200
                assert stranger.get("/requests").json() == {"requests": []}
                leaving = {"model": "stories260k", "keep_alive": 0, "prompt": PROMPT, "options": {"num_predict": 1}}
                assert stranger.post("/api/generate", json=leaving | {"stream": False}).status_code == 200
                assert [each["name"] for each in stranger.get("/api/ps").json()["models"]] == ["stories260k"]
        listed = [json.loads(line) for line in penstock("ps", "--json").stdout.splitlines()]
        (status,) = [each["status"] for each in listed if each["pid"] == process.pid]
        assert [model["state"] for model in status["models"]] == ["loaded", "unloaded"]


def test_a_second_signal_does_not_wait(stories: Path) -> None:
    options = ("--port", "0", "--num-threads", "1", "--backend", "ref")
    with running(argv("serve", stories, *options), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        ask = {"prompt": PROMPT, "max_tokens": 500, "n": 64, "ignore_eos": True}
        with ThreadPoolExecutor(1) as pool:
            doomed = pool.submit(httpx.post, f"{url}/completions", json=ask, timeout=60)
            root = url.removesuffix("/v1")
            wait_until(lambda: httpx.get(f"{root}/status").json()["queue"]["requests"] == 1)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(f"{root}/ready").status_code == 503)
            late = httpx.post(f"{url}/completions", json=ask)  # it still listens, and says why not
            assert code(late) == (503, "shutting_down") and late.headers["retry-after"]
            process.send_signal(signal.SIGTERM)
            assert code(doomed.result()) == (503, "shutting_down")
        assert process.wait(10) == 0


def wait_until(true: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_drain_under_load_loses_nothing(stories: Path) -> None:
    """Eight clients that never pause. Whoever was answered 200 got all of it; the others were told, or not let in."""
    options = ("--port", "0", "--num-threads", "1", "--dtype", "float32")
    body = {"prompt": PROMPT, "max_tokens": 60, "ignore_eos": True, "temperature": 0, "stream": True}
    with running(argv("serve", stories, *options), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        whole = httpx.post(f"{url}/completions", json=body, timeout=60).text
        assert whole.endswith("data: [DONE]\n\n") and whole.count("data: ") == 61
        texts = [json.loads(event[6:])["choices"] for event in whole.split("\n\n")[:-2]]

        def client() -> tuple[int, int]:
            done = told = 0
            with httpx.Client(timeout=60) as kept:
                while True:
                    try:
                        answer = kept.post(f"{url}/completions", json=body)
                    except httpx.ConnectError:
                        return done, told
                    except (httpx.ReadError, httpx.RemoteProtocolError):
                        continue  # its connection waited to be accepted when the server stopped listening
                    if answer.status_code == 503:
                        assert code(answer) == (503, "shutting_down") and answer.headers["connection"] == "close"
                        told += 1
                        continue
                    events = answer.text.split("\n\n")
                    assert events[-2:] == ["data: [DONE]", ""]
                    assert [json.loads(event[6:])["choices"] for event in events[:-2]] == texts
                    done += 1

        with ThreadPoolExecutor(8) as pool:
            clients = [pool.submit(client) for _ in range(8)]
            time.sleep(1.5)
            process.send_signal(signal.SIGTERM)
            done, told = map(sum, zip(*(one.result() for one in clients), strict=True))
        assert process.wait(30) == 0
        assert done >= 8 and told > 0


def test_files_and_batches_are_a_tenant_s_own(keyed: Keyed) -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "A", "max_tokens": 2}}
    acme, birch = (
        openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=keyed.keys[name], max_retries=0) for name in ("acme", "birch")
    )
    before = {each.id for each in acme.files.list()}
    file = acme.files.create(file=("a.jsonl", json.dumps(line).encode()), purpose="batch").id
    batch = acme.batches.create(input_file_id=file, endpoint="/v1/completions", completion_window="24h").id
    wait_until(lambda: acme.batches.retrieve(batch).status == "completed")
    made = acme.batches.retrieve(batch).output_file_id
    assert made is not None and {each.id for each in acme.files.list()} - before == {file, made}
    assert list(birch.files.list()) == [] and list(birch.batches.list()) == []
    for refused in (
        lambda: birch.files.content(made),
        lambda: birch.files.delete(file),
        lambda: birch.batches.retrieve(batch),
        lambda: birch.batches.cancel(batch),
        lambda: birch.batches.create(input_file_id=file, endpoint="/v1/completions", completion_window="24h"),
    ):
        with pytest.raises(openai.NotFoundError):
            refused()


def farthest(a: list[float], b: list[float]) -> float:
    """The statistic of Kolmogorov and Smirnov: how far the two distributions are apart, from 0 to 1."""
    return max(abs(sum(x <= at for x in a) / len(a) - sum(x <= at for x in b) / len(b)) for at in a + b)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_time_tells_a_tenant_nothing_of_another_s_prompts(keyed: Keyed) -> None:
    """A tenant times prompts that another has sent, and prompts that nobody has; then some that it sent itself.

    80 of each, in turn, so that whatever else the machine does meets all alike. Of two samples of 80 from the same
    distribution the statistic exceeds 0.31 once in a thousand times (Smirnov, 1948: 1.95 * sqrt(2 / 80)).
    """
    dice = Random(7)

    def timed(prompt: list[int]) -> float:
        began = time.perf_counter()
        assert birch.post(COMPLETIONS, json={"prompt": prompt, "max_tokens": 1}).status_code == 200
        return time.perf_counter() - began

    headers = {"authorization": f"Bearer {keyed.keys['birch']}"}
    birch = httpx.Client(base_url=keyed.url, headers=headers, timeout=60)  # a kept connection: less noise of its own
    others, fresh, own = list[float](), list[float](), list[float]()
    for _ in range(80):
        seen, unseen = ([1, *(dice.randrange(260, 500) for _ in range(480))] for _ in range(2))
        assert keyed.ask("acme", prompt=seen, max_tokens=1).status_code == 200
        first, second = (others, seen), (fresh, unseen)
        for times, prompt in (first, second) if dice.random() < 0.5 else (second, first):
            times.append(timed(prompt))
        own.append(timed(unseen))
    birch.close()
    assert farthest(others, fresh) < 0.31, (sorted(others)[40], sorted(fresh)[40])
    assert farthest(own, fresh) > 0.31, "the cache saves too little time here for this test to mean anything"
    print(f"apart: others' {farthest(others, fresh):.2f}, its own {farthest(own, fresh):.2f}")
