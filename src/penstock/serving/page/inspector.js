// GET /requests: those that ended last; of those that this page asked, or whose texts the server keeps, also the prompt
// and each token's probability.

import { $, el, json } from "./api.js";
import { bar, swatch } from "./chart.js";
import { whole } from "./live.js";
import { asked, promptOf } from "./playground.js";

const POLL = 2000;
let known = [];
let chosen = null;
let timer = 0;

export function shown(yes, id) {
  clearTimeout(timer);
  if (!yes) return;
  if (id && id !== chosen) {
    chosen = id;
    $("detail").replaceChildren(el("p", { className: "note", textContent: "It has not ended yet." }));
    known = [];
  }
  poll();
}

async function poll() {
  clearTimeout(timer);
  try {
    const had = known.some(({ id }) => id === chosen);
    known = (await json("/requests")).requests;
    $("inspector-note").textContent = known.length ? "" : "No request has ended yet.";
    list();
    const record = known.find(({ id }) => id === chosen);
    if (record && !had) await detail(record);
  } catch (error) {
    $("inspector-note").textContent = error.status === undefined ? "The server does not answer; asking again." : error.message;
    if (error.status === 401) return; // another key starts it again
  }
  clearTimeout(timer);
  if (!$("inspector").hidden) timer = setTimeout(poll, POLL);
}

const nameOf = ({ id, time }) => `${id} ${time}`; // clients choose ids, and may choose one twice

// Rows are kept, so that the focus stays where it is.
function list() {
  const body = $("finished");
  const rows = new Map([...body.rows].map((row) => [row.dataset.name, row]));
  const wanted = known.map((record) => rows.get(nameOf(record)) ?? row(record));
  for (const old of rows.values()) if (!wanted.includes(old)) old.remove();
  wanted.forEach((one, i) => body.rows[i] === one || body.insertBefore(one, body.rows[i] ?? null));
  for (const one of body.rows) one.setAttribute("aria-selected", String(one.dataset.id === chosen));
}

function row(record) {
  const choose = el("button", { type: "button", textContent: record.id.slice(0, 8), title: record.id });
  choose.addEventListener("click", () => {
    chosen = record.id;
    list();
    detail(record).then(() => $("detail").focus());
  });
  const cell = (text, number) => el("td", { textContent: text, className: number ? "n" : "" });
  const ended = new Date(Date.parse(record.time) + 1000 * record.total_s);
  const line = el("tr", {},
    el("td", {}, choose), cell(ended.toLocaleTimeString()), cell(record.total_s.toFixed(2), true),
    cell(whole(record.prompt_tokens), true), cell(whole(record.completion_tokens), true),
    cell(record.status === 200 ? (record.finish ?? "–") : `${record.status}`));
  line.dataset.id = record.id;
  line.dataset.name = nameOf(record);
  return line;
}

async function detail(record) {
  const mine = asked.get(record.id) ?? (record.kept ? await kept(record.id) : null);
  const legend = el("p", {});
  for (const [name, seconds] of Object.entries(record.phases)) legend.append(swatch(name), `${name} ${seconds.toFixed(3)} s  `);
  const facts = {
    Request: record.id, Path: record.path, Status: record.status, Model: record.model ?? "–", Tenant: record.tenant ?? "–",
    "Tokens in": `${whole(record.prompt_tokens)}, ${whole(record.cached_tokens)} of them from the cache`,
    "Tokens out": whole(record.completion_tokens), End: record.finish ?? "–",
    "First token after": record.first_token_s === null ? "–" : `${record.first_token_s.toFixed(3)} s`,
    Preempted: record.preempted ? `${record.preempted} times, ${record.starved_s.toFixed(3)} s without KV blocks` : "never",
    "Its client took nothing for": `${record.client_s.toFixed(3)} s`,
    "Longest gap": `${record.longest_gap_s.toFixed(3)} s`, "Under way when it came": record.ahead,
  };
  const table = el("table", {}, el("tbody", {}, ...Object.entries(facts).map(([name, value]) =>
    el("tr", {}, el("th", { scope: "row", textContent: name }), el("td", { textContent: value })))));
  const parts = [heading("Where its time went"), el("p", { id: "why", textContent: record.why }), bar(record.phases), legend, table];
  if (mine) parts.push(...(await prompt(mine)), ...answer(mine.tokens));
  else parts.push(el("p", { className: "note", textContent: "Its texts were not kept: only this page's own requests show them, or all with --keep-texts." }));
  if (record.id === chosen) $("detail").replaceChildren(...parts);
}

async function kept(id) {
  const { prompt, tokens } = await json(`/requests/${encodeURIComponent(id)}`);
  return { prompt, tokens: tokens.map((token) => ({ ...token, top: [] })) };
}

const heading = (text) => el("h2", { textContent: text });

async function prompt(mine) {
  mine.prompt ??= await promptOf(mine).catch((error) => [error.message]);
  const shown = el("div", { className: "rendered", tabIndex: 0 }, ...mine.prompt.map((token) => el("span", { textContent: token })));
  return [heading(`Prompt after the template, ${mine.prompt.length} tokens`), shown];
}

// Underlined where the draw was a surprise: dotted below 50 %, plain below 10 %, thick below 1 %.
function answer(tokens) {
  const share = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)} %`;
  const told = ([token, logprob]) => `${JSON.stringify(token)} ${share(logprob)}`;
  const marks = tokens.map(({ token, logprob, top }) => {
    const rank = [0.5, 0.1, 0.01].filter((limit) => Math.exp(logprob) < limit).length;
    return el("span", { textContent: token, className: `p${rank}`, title: [[token, logprob], ...top].map(told).join("\n") });
  });
  const rows = tokens.map(({ token, logprob, top }, i) => el("tr", {},
    el("td", { className: "n", textContent: i }), el("td", { textContent: JSON.stringify(token) }),
    el("td", { className: "n", textContent: logprob.toFixed(4) }), el("td", { className: "n", textContent: share(logprob) }),
    el("td", { textContent: top.map(told).join("  ") })));
  const head = el("tr", {}, ...["#", "Token", "Logprob", "Probability", "Likeliest"].map((name) => el("th", { textContent: name })));
  const list = el("details", {}, el("summary", { textContent: "Each token" }),
    el("table", { className: "each" }, el("thead", {}, head), el("tbody", {}, ...rows)));
  return [heading(`Answer, ${tokens.length} tokens`), el("div", { className: "tokens", tabIndex: 0 }, ...marks), list];
}
