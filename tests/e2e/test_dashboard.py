"""The dashboard in a browser: Debian's Chromium, one server with keys whose model says what a test wants."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
import yaml
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from commands import penstock
from conftest import BUNDLED
from penstock.text import Tokenizer
from scripted import HERMES, saying
from servers import Server, start

ROOT = Path(__file__).resolve().parents[2]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = '{"name": "weather", "arguments": {"city": "Rome"}}'
SAID = f"<think>\nhm, rain\n</think>\n\nI look.\n<tool_call>\n{CALL}\n</tool_call>"
FAINT = """
() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = numbers(colour).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if ((numbers(colour)[3] ?? 1) > 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const faint = [];
  for (const node of document.querySelectorAll("body *")) {
    const said = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!said || !node.checkVisibility()) continue;
    const style = getComputedStyle(node);
    const front = node instanceof SVGElement ? style.fill : style.color;
    const [one, other] = [light(front), light(behind(node))].sort((a, b) => b - a);
    const contrast = (one + 0.05) / (other + 0.05);
    if (contrast < 4.5) faint.push(`${node.tagName} ${node.textContent.trim().slice(0, 20)} ${contrast.toFixed(2)}`);
  }
  return faint;
}
"""
"""Texts with less contrast than WCAG 2.2 asks for (1.4.3, AA)."""

CELLS = """
() => {
  const canvas = document.querySelector("#kv-map canvas");
  const { data, width } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const style = getComputedStyle(document.documentElement);
  const seen = {};
  for (const [name, variable] of [["free", "--card"], ["shared", "--k3"], ["used", "--k2"]]) {
    const [r, g, b] = style.getPropertyValue(variable).trim().slice(1).match(/../g).map((hex) => parseInt(hex, 16));
    let count = 0;
    for (let at = 0; at < data.length; at += 4) count += data[at] === r && data[at + 1] === g && data[at + 2] === b;
    seen[name] = count;
  }
  return seen;
}
"""
"""Pixels of the map of KV blocks that have the colour of a state."""

ENDLESS = {"ignore_eos": True, "max_tokens": 900, "n": 16}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    file = tmp_path_factory.mktemp("keys") / "keys.jsonl"
    made = {"file": str(file)}
    for name, options in (("admin", ["--role", "admin"]), ("acme", ["--tenant", "acme"])):
        done = penstock("keys", "add", file, *options)
        assert done.returncode == 0, done.stderr
        made[name] = done.stdout.decode().strip()
    return made


@pytest.fixture(scope="module")
def served(keys: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("dashboard")
    (folder / "template.jinja").write_text(HERMES)
    options = ("--chat-template", str(folder / "template.jinja"), "--logits-rule", "scripted:say")
    more = ("--keys", keys["file"], "--log-file", str(folder / "requests.jsonl"))
    with mock.patch.dict(os.environ, PYTHONPATH=str(Path(__file__).parent)), (folder / "log").open("w+") as log:
        running = start(BUNDLED, *options, *more, log=log)
        yield running
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(30) == 0
        log.seek(0)
        assert log.read() == ""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """None needs to be had on a laptop; CI must have one."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        missing = "no Chromium is found: apt-get install chromium"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Browser, served: Server) -> Iterator[Page]:
    """Whatever a test does, nothing goes wrong that only the console would tell, and nobody else is asked."""
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    opened = context.new_page()
    opened.set_default_timeout(20_000)
    faults: list[str] = []
    # That a request was answered 4xx is for the page to handle, and Chromium's to tell.
    opened.on("console", lambda said: said.type in ("error", "warning") and faults.append(said.text))
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("request", lambda asked: asked.url.startswith(f"{served.url}/") or faults.append(asked.url))
    yield opened
    context.close()
    assert [fault for fault in faults if not re.search(r"status of 40[0134] ", fault)] == []


def enter(page: Page, served: Server, key: str, view: str = "live") -> None:
    page.add_init_script(f"sessionStorage.setItem('penstock-key', {json.dumps(key)})")
    page.goto(f"{served.url}/#{view}")
    expect(page.locator("#state")).to_have_text("ready")


def say(page: Page, text: str, **fields: Any) -> str:
    """Sends it, waits for the end, and returns the request's id."""
    page.fill("#fields", json.dumps(fields))
    page.fill("#text", text)
    page.click("#send")
    expect(page.locator("#ask-note")).to_contain_text("ended by")
    return page.locator("#look").get_attribute("href").removeprefix("#inspector/")


def test_loads_quickly_and_stays_in_place(page: Page, served: Server, keys: dict[str, str]) -> None:
    answer = httpx.get(served.url)
    assert answer.headers["content-security-policy"].startswith("default-src 'self'; ")
    assert "style=" not in answer.text and "onclick" not in answer.text
    page.add_init_script(
        "window.moved = 0; new PerformanceObserver((list) => list.getEntries().forEach((e) => { moved += e.value; }))"
        ".observe({type: 'layout-shift', buffered: true});"
    )
    enter(page, served, keys["admin"])
    expect(page.locator("#steps")).to_have_text("0")  # a second answer has come
    assert page.evaluate("moved") < 0.005
    took = []
    for _ in range(3):  # the machine has other work
        page.reload(wait_until="load")
        took.append(page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd"))
    assert min(took) < 1500, took

    back = "getComputedStyle(document.documentElement).backgroundColor"
    backs = set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        backs.add(page.evaluate(back))
        for view, other in (("live", "#kv-counts"), ("playground", "#text"), ("inspector", "#finished")):
            page.click(f'nav a[href="#{view}"]')
            expect(page.locator(other)).to_be_attached()
            assert page.evaluate(FAINT) == [], scheme
    assert len(backs) == 2
    unnamed = "[...document.querySelectorAll('input, textarea')].filter((e) => !e.labels.length).map((e) => e.id)"
    assert page.evaluate(unnamed) == []


def test_live_view_shows_what_is_under_way(page: Page, served: Server, keys: dict[str, str]) -> None:
    enter(page, served, keys["admin"], "playground")
    page.fill("#fields", json.dumps(ENDLESS))
    page.fill("#text", "Tell me all of it. " * 9)  # more than a KV block
    page.click("#send")
    expect(page.locator(".turn pre").nth(1)).to_have_text(re.compile(".{20}", re.DOTALL))  # it comes in pieces
    page.click("nav >> text=Live")
    expect(page.locator("#running")).to_have_text("16")
    expect(page.locator("#under-way td:nth-child(3)")).to_have_text(re.compile("prompt|decode"))
    expect(page.locator("#rate")).to_have_text(re.compile("[1-9]"))
    assert page.locator("#chart-rate path").count() == 2
    expect(page.locator("#line tr")).to_have_count(16)
    expect(page.locator("#line td:nth-child(3)").first).to_have_text("running")
    assert page.locator("#chart-steps rect.decode").count() > 1
    expect(page.locator("#kv-counts")).to_have_text(
        re.compile(r"^\d+ blocks: \d+ free, \d+ kept for a prefix hit, [1-9]")
    )
    page.locator("#chart-steps").focus()
    expect(page.locator("#step-note")).to_have_text(
        re.compile(r"^Step \d+.*16 samples, 16 decode tokens, .*forward \d")
    )
    page.keyboard.press("Home")  # from here on the chart stands still
    first = int(page.locator("#chart-steps [data-step]").first.get_attribute("data-step") or "")
    expect(page.locator("#step-note")).to_have_text(re.compile(rf"^Step {first}\b"))
    assert page.locator("#chart-steps rect.chosen").count() == 1
    page.keyboard.press("ArrowRight")
    expect(page.locator("#step-note")).to_have_text(re.compile(rf"^Step {first + 1}\b.*Escape goes on"))
    page.locator(f"#chart-steps [data-step='{first}']").click()
    expect(page.locator("#step-note")).to_have_text(re.compile(rf"^Step {first}\b"))
    page.keyboard.press("Escape")
    expect(page.locator("#step-note")).not_to_have_text(re.compile("Escape"))
    in_use = page.evaluate(CELLS)
    assert in_use["shared"] > 0 and in_use["free"] > in_use["shared"], in_use  # 16 samples read one prompt
    page.click("nav >> text=Playground")
    page.click("#stop")
    expect(page.locator("#ask-note")).to_have_text("Stopped.")
    expect(page.locator("#stop")).to_be_disabled()
    page.click("#look")
    expect(page.locator("#detail")).to_contain_text("Endabort")


def test_playground_shows_thoughts_and_calls_and_the_inspector_all_of_it(
    page: Page, served: Server, keys: dict[str, str], tokenizer: Tokenizer
) -> None:
    enter(page, served, keys["acme"], "playground")  # a key that may not see the live view
    page.fill("#tools", json.dumps([TOOL]))
    identifier = say(page, "Is it <b>wet</b>?", **saying(SAID, tokenizer))
    answer = page.locator(".turn").nth(1)
    expect(answer.locator("details pre")).to_contain_text("hm, rain")
    expect(answer.locator(".call")).to_have_text('weather({"city": "Rome"})')
    expect(page.locator(".turn").nth(0).locator("pre")).to_have_text("Is it <b>wet</b>?")

    page.click("#look")
    (told,) = [
        each
        for each in httpx.get(f"{served.url}/requests", headers={"x-api-key": keys["acme"]}).json()["requests"]
        if each["id"] == identifier
    ]
    expect(page.locator("#why")).to_have_text(told["why"])
    expect(page.locator("#detail svg").first).to_have_attribute("aria-label", re.compile("read .*, decode "))
    shown = page.locator(".rendered").text_content() or ""
    assert shown.startswith('<|im_start|>system\nTools:{"type": "function", ')
    assert shown.endswith("Is it <b>wet</b>?<|im_end|>\n<|im_start|>assistant\n")
    assert page.locator(".rendered span").count() == told["prompt_tokens"]
    assert page.locator(".tokens span").count() == told["completion_tokens"]
    assert "".join(page.locator(".tokens span").all_text_contents()).startswith(SAID)
    page.click("text=Each token")
    assert page.locator(".each tbody tr").count() == told["completion_tokens"]
    own = r"^0\"<\"-\d+\.\d{4}0\.\d %.+ %$"  # the probability is the model's, who would have said something else
    expect(page.locator(".each tbody tr").first).to_have_text(re.compile(own))
    page.click("nav >> text=Playground")
    page.click("#clear")
    say(page, "And now?", reasoning_effort="none", tool_choice="none", **saying("No.", tokenizer))
    page.click("#look")
    expect(page.locator(".rendered")).to_contain_text("<|im_start|>assistant\n<think>\n\n</think>")
    assert "Tools:" not in (page.locator(".rendered").text_content() or "")

    page.click("nav >> text=Live")
    expect(page.locator("#live-note")).to_contain_text("role_not_allowed")


def test_a_question_that_was_refused_is_no_turn(
    page: Page, served: Server, keys: dict[str, str], tokenizer: Tokenizer
) -> None:
    """It is taken back into the box, unless something else is there; what was answered before it stays."""
    enter(page, served, keys["admin"], "playground")
    sent: list[Any] = []
    page.on("request", lambda asked: asked.url.endswith("completions") and sent.append(asked.post_data_json))
    said = saying("No.", tokenizer)
    say(page, "One?", reasoning_effort="none", **said)
    page.fill("#fields", json.dumps({"temperature": -1}))
    page.fill("#text", "Two?")
    page.click("#send")
    expect(page.locator("#ask-note")).to_contain_text("temperature")
    expect(page.locator("#text")).to_have_value("Two?")
    expect(page.locator(".turn")).to_have_count(2)

    held: list[Route] = []
    page.route("**/v1/chat/completions", lambda route: held.append(route))
    with page.expect_request("**/v1/chat/completions"):
        page.click("#send")
    page.fill("#text", "Three?")
    fault = {"error": {"message": "come back later", "type": "x", "param": None, "code": "x"}}
    held[0].fulfill(status=404, json=fault)
    expect(page.locator("#ask-note")).to_have_text("come back later")
    expect(page.locator("#text")).to_have_value("Three?")
    page.unroute("**/v1/chat/completions")

    say(page, "Three?", reasoning_effort="none", **said)
    turns = [(message["role"], message["content"]) for message in sent[-1]["messages"]]
    assert turns == [("user", "One?"), ("assistant", "No."), ("user", "Three?")]
    expect(page.locator(".turn")).to_have_count(4)


def test_completions_go_on_from_a_text(page: Page, served: Server, keys: dict[str, str], tokenizer: Tokenizer) -> None:
    enter(page, served, keys["admin"], "playground")
    page.check("input[value=completion]")
    say(page, "Once upon", **saying(" a time.", tokenizer))
    expect(page.locator(".turn pre")).to_have_text("Once upon a time.")
    page.click("#look")
    expect(page.locator(".rendered")).to_have_text("Once upon")
    page.click("nav >> text=Playground")
    say(page, "Once upon", echo=True, **saying(" a time.", tokenizer))
    expect(page.locator(".turn pre").last).to_have_text("Once upon a time.")
    page.fill("#fields", "[")
    page.fill("#text", "x")
    page.click("#send")
    expect(page.locator("#ask-note")).to_contain_text("must be JSON")


def test_the_page_says_that_administration_is_elsewhere(page: Page, served: Server, keys: dict[str, str]) -> None:
    for path in ("status", "debug/engine*"):
        page.route(f"{served.url}/{path}", lambda route: route.fulfill(status=404, json={}))
    enter(page, served, keys["admin"])
    expect(page.locator("#live-note")).to_contain_text("--admin-port")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(4000)
    assert asked == []
    page.goto(f"{served.url}/#playground")
    expect(page.locator("#text")).to_be_visible()


def test_a_keyboard_is_enough(page: Page, served: Server, keys: dict[str, str], tokenizer: Tokenizer) -> None:
    """From the key that the page asks for to a request that was looked at."""

    def until(selector: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("(wanted) => document.activeElement.matches(wanted)", selector):
                return
        raise AssertionError(f"Tab does not lead to {selector}")

    page.goto(served.url)
    expect(page.locator("#key")).to_be_focused()
    page.keyboard.type(keys["admin"])
    page.keyboard.press("Enter")
    expect(page.locator("#state")).to_have_text("ready")
    until('[href="#playground"]')
    page.keyboard.press("Enter")
    expect(page.locator("#text")).to_be_focused()
    page.keyboard.type("Good morning.")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#ask-note")).to_contain_text("ended by")
    until("#look")
    page.keyboard.press("Enter")
    expect(page.locator("#why")).to_be_visible()
    until("#finished button")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    page.keyboard.press("Enter")
    expect(page.locator("#detail")).to_be_focused()
    assert page.evaluate("Object.keys(localStorage).length + document.cookie.length") == 0


def test_a_refusal_that_comes_after_the_key_asks_for_none(page: Page, served: Server, keys: dict[str, str]) -> None:
    """A question asked before the key was typed, refused after it: the dialog would take the keyboard away again."""
    late: list[Route] = []

    def hold(route: Route) -> None:
        if late or "authorization" in route.request.headers:
            route.continue_()
        else:
            late.append(route)

    page.route("**/debug/engine*", hold)
    page.goto(served.url)
    expect(page.locator("#key")).to_be_focused()
    page.keyboard.type(keys["admin"])
    page.keyboard.press("Enter")
    expect(page.locator("#state")).to_have_text("ready")
    with page.expect_response(lambda response: response.status == 401):
        late[0].continue_()
    expect(page.locator("#key-dialog")).to_be_hidden()
    page.wait_for_timeout(200)
    expect(page.locator("#key-dialog")).to_be_hidden()


def test_dashboards_and_alerts_name_only_metrics_that_exist(served: Server, keys: dict[str, str]) -> None:
    exposed = httpx.get(f"{served.url}/metrics", headers={"x-api-key": keys["admin"]}).text
    there = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", exposed, re.MULTILINE):
        there |= {name + end for end in ("_bucket", "_sum", "_count")} if kind == "histogram" else {name}

    panels = json.loads((ROOT / "deploy/grafana/penstock.json").read_text())["panels"]
    (group,) = yaml.safe_load((ROOT / "deploy/prometheus/penstock.yml").read_text())["groups"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    asked += [rule["expr"] for rule in group["rules"]]
    named = [set(re.findall(r"\bpenstock_\w+", text)) for text in asked]
    assert set().union(*named) <= there
    assert all(names or "up{" in text for names, text in zip(named, asked, strict=True)) and len(asked) > 30
    for rule in group["rules"]:
        assert {"alert", "expr", "labels", "annotations"} <= set(rule) and {"summary", "description"} == set(
            rule["annotations"]
        )
