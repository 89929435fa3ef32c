// GET /debug/engine once a second while the live view is shown: what each step was made of, its phases, the line, and the
// KV blocks.

import { $, el, json } from "./api.js";
import { stacks, swatch } from "./chart.js";

const SHOWN = 120;
const COLOURS = { free: "--card", kept: "--k1", "in use": "--k2", shared: "--k3" };
const CELL = 9;
let steps = [];
let last = -1; // step that was told of
let chosen = null; // the number of a step, at which the chart stands still; null follows the last one
let timer = 0;
let model = ""; // whose engine; the first that is in memory, unless one is chosen

export function serve(name) {
  [model, steps, last, chosen] = [name, [], -1, null];
}

export function shown(yes) {
  clearTimeout(timer);
  if (yes) poll();
}

async function poll() {
  clearTimeout(timer);
  let pause = 1000;
  try {
    const [which, since] = [model, last < 0 ? "seconds=60" : `seconds=5&after=${last}`];
    const told = await json(`/debug/engine?${since}${which && `&model=${encodeURIComponent(which)}`}`);
    if (which === model) take(told);
  } catch (error) {
    if ([401, 403, 404].includes(error.status)) return; // the view says so, and another key starts it again
    pause = 3000;
  }
  if (!$("live").hidden) timer = setTimeout(poll, pause);
}

function take(told) {
  const follows = steps.length && told.steps.length && told.steps[0].number === steps.at(-1).number + 1;
  const anew = told.last < last; // another engine, which counts from 0
  if (anew) steps = [];
  last = anew ? -1 : told.last;
  if (chosen === null || anew) {
    if (told.steps.length) steps = [...(follows ? steps : []), ...told.steps].slice(-SHOWN);
    draw();
  }
  const rows = told.requests.map(row);
  if (told.live > rows.length) rows.push(el("tr", {}, el("td", { colSpan: 8, textContent: `and ${told.live - rows.length} more` })));
  $("line").replaceChildren(...rows);
  $("kv-counts").textContent = told.pools.map(counts).join("; ");
  told.pools.forEach(map);
  while ($("kv-map").children.length > told.pools.length) $("kv-map").lastChild.remove();
}

function draw() {
  const step = steps.find(({ number }) => number === chosen) ?? steps.at(-1);
  stacks($("chart-steps"), steps, SHOWN, chosen === null ? null : step?.number);
  $("step-note").textContent = step ? sentence(step) : "No step in the last minute.";
}

function sentence(step) {
  const parts = [["prompt", step.prompt], ["decode", step.decode], ["computed again", step.again]];
  const tokens = parts.filter(([, count]) => count).map(([name, count]) => `${count} ${name}`).join(" + ");
  const phases = Object.entries(step.us).map(([name, us]) => `${name} ${(us / 1000).toFixed(2)}`).join(", ");
  const how = step.failed ? ", failed" : step.replayed ? ", replayed" : "";
  return `Step ${step.number}${how}: ${step.requests} samples, ${tokens} tokens, ${step.waiting} waiting; ms: ${phases}${chosen === null ? "" : ". Escape goes on."}`;
}

function row(request) {
  const cell = (text, number) => el("td", { textContent: text, className: number ? "n" : "" });
  const waited = request.starved ? `, ${request.starved.toFixed(1)} s for KV` : "";
  return el("tr", {},
    cell(request.id.slice(0, 18)), cell(request.sample, true), cell(request.state),
    cell(request.seconds.toFixed(1), true), cell(`${request.prompt} (${request.cached})`, true),
    cell(`${request.computed} of ${request.known}`, true), cell(request.blocks, true),
    cell(`${request.preempted}${waited}`, true));
}

const counts = (pool) =>
  `${pool.total} blocks${pool.window ? ` (window ${pool.window})` : ""}: ${pool.free} free, ${pool.idle} kept for a prefix hit, ` +
  `${pool.open + pool.sealed} in use${pool.stride > 1 ? `; each cell is one of ${pool.stride}` : ""}`;

// A byte for each cell: 0 free, 1 kept, 2 and 3 in use, plus 4 times its readers.
function map(pool, index) {
  const box = $("kv-map");
  const canvas = box.children[index] ?? box.appendChild(el("canvas", {}));
  const cells = Uint8Array.from(atob(pool.map), (character) => character.charCodeAt(0));
  const columns = Math.max(1, Math.floor((box.clientWidth - 4) / CELL));
  const scale = devicePixelRatio || 1;
  const [width, height] = [columns * CELL, Math.ceil(cells.length / columns) * CELL];
  Object.assign(canvas, { width: width * scale, height: height * scale });
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", counts(pool));
  const style = getComputedStyle(document.documentElement);
  const colours = Object.fromEntries(Object.entries(COLOURS).map(([name, variable]) => [name, style.getPropertyValue(variable)]));
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.strokeStyle = style.getPropertyValue("--dim");
  pen.lineWidth = 0.5;
  cells.forEach((cell, i) => {
    const [x, y] = [(i % columns) * CELL + 0.5, Math.floor(i / columns) * CELL + 0.5];
    pen.fillStyle = colours[cell === 0 ? "free" : cell === 1 ? "kept" : cell >> 2 > 1 ? "shared" : "in use"];
    pen.fillRect(x, y, CELL - 2, CELL - 2);
    if (cell === 0) pen.strokeRect(x, y, CELL - 2, CELL - 2); // not by its colour alone
  });
}

function choose(number) {
  chosen = number;
  draw();
}

// Left and right go from step to step, Escape follows the last one again.
$("chart-steps").addEventListener("keydown", (event) => {
  const at = chosen === null ? steps.length - 1 : steps.findIndex(({ number }) => number === chosen);
  const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1 }[event.key];
  if (event.key === "Escape") choose(null);
  else if (to === undefined || !steps.length) return;
  else choose(steps[Math.min(Math.max(to, 0), steps.length - 1)].number);
  event.preventDefault();
});
$("chart-steps").addEventListener("click", (event) => {
  const bar = event.target.closest("[data-step]");
  if (bar) choose(Number(bar.dataset.step));
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => $("live").hidden || poll());
$("kv-legend").append(...Object.keys(COLOURS).flatMap((name) => [swatch(name.replace(" ", "-")), `${name}  `]));
