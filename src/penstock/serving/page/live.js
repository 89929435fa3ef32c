// GET /status once a second, and what it says over the last minutes.

import { $, el, json } from "./api.js";
import { lines } from "./chart.js";

const SPAN = 300;
const past = { generated: [], prompt: [], running: [], waiting: [], kv: [] };
let before = null;
let timer = 0;
let visible = false;

export function shown(yes) {
  visible = yes;
  if (yes) draw(performance.now() / 1000);
}

// Goes on in other views, so that the charts have no holes; in a hidden tab a browser slows it down by itself.
export async function poll() {
  clearTimeout(timer);
  let pause = 1000;
  try {
    take(await json("/status"));
    $("live-note").textContent = "";
  } catch (error) {
    const states = { undefined: "not reachable", 401: "needs a key", 403: "ready", 404: "ready" };
    const state = states[error.status] ?? "in trouble";
    $("state").textContent = state;
    $("state").className = state === "ready" ? "" : "bad";
    const notes = { undefined: "The server does not answer; asking again.", 404: "The live view is at the server's --admin-port." };
    $("live-note").textContent = notes[error.status] ?? error.message;
    before = null;
    if ([401, 403, 404].includes(error.status)) return; // another key starts it again
    pause = 3000;
  }
  timer = setTimeout(poll, pause);
}

function take(status) {
  const now = performance.now() / 1000;
  const { engine, queue } = status;
  const used = engine.kv_blocks ? (100 * engine.kv_blocks_used) / engine.kv_blocks : 0;
  if (before) {
    const seconds = now - before.at;
    // Counters fall when another server has taken this one's place.
    const since = (name) => Math.max(0, engine[name] - before.engine[name]);
    const [generated, prompt, steps, hits] = ["generated_tokens", "prompt_tokens", "steps", "prefix_hit_tokens"].map(since);
    push("generated", now, generated / seconds);
    push("prompt", now, prompt / seconds);
    $("rate").textContent = whole(generated / seconds);
    $("steps").textContent = whole(steps / seconds);
    $("batch").textContent = steps ? ((generated + Math.max(0, prompt - hits)) / steps).toFixed(1) : "–";
  }
  push("running", now, engine.running);
  push("waiting", now, engine.waiting);
  push("kv", now, used);
  before = { at: now, engine };
  $("running").textContent = engine.running;
  $("waiting").textContent = engine.waiting;
  $("kv").textContent = `${used.toFixed(1)} %`;
  $("hits").textContent = engine.prompt_tokens ? `${Math.min(100, (100 * engine.prefix_hit_tokens) / engine.prompt_tokens).toFixed(0)} %` : "–";
  $("queue").textContent = `${((100 * queue.tokens) / queue.tokens_limit).toFixed(1)} %`;
  $("preemptions").textContent = whole(engine.preemptions);
  $("state").textContent = status.draining ? "draining" : status.alive ? "ready" : "engine stopped";
  $("state").className = status.draining || !status.alive ? "bad" : "";
  for (const { name, state, progress } of status.models) {
    const option = [...document.querySelectorAll("#model option")].find(({ value }) => value === name);
    const far = progress === null ? state : `${state} ${(100 * progress).toFixed(0)} %`;
    if (option) option.textContent = state === "loaded" ? name : `${name} (${far})`;
  }
  if (visible) {
    draw(now);
    $("under-way").replaceChildren(...status.requests.map(row));
  }
}

function push(name, at, value) {
  past[name].push({ at, value });
  if (past[name][0].at < at - SPAN) past[name].shift();
}

function draw(now) {
  lines($("chart-rate"), [past.generated, past.prompt], now, SPAN);
  lines($("chart-batch"), [past.running, past.waiting], now, SPAN);
  lines($("chart-kv"), [past.kv], now, SPAN, 100);
}

function row(request) {
  const cell = (text, number) => el("td", { textContent: text, className: number ? "n" : "" });
  return el("tr", {},
    cell(request.id.slice(0, 12)), cell(request.tenant ?? "–"), cell(request.phase), cell(request.seconds.toFixed(1), true),
    cell(whole(request.prompt_tokens), true), cell(whole(request.completion_tokens), true));
}

export const whole = (number) => Math.round(number).toLocaleString("en");
