// Which view is shown, and the key.

import { $, el, json, key } from "./api.js";
import * as engine from "./engine.js";
import * as inspector from "./inspector.js";
import * as live from "./live.js";
import * as playground from "./playground.js";

const VIEWS = { live, playground, inspector };

function show() {
  const [wanted, rest] = location.hash.slice(1).split("/");
  const name = Object.hasOwn(VIEWS, wanted) ? wanted : "live";
  for (const [other, view] of Object.entries(VIEWS)) {
    $(other).hidden = other !== name;
    const link = document.querySelector(`nav a[href="#${other}"]`);
    if (other === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
    view.shown(other === name, rest && decodeURIComponent(rest));
  }
  engine.shown(name === "live");
}

function askForKey() {
  if (!$("key-dialog").open) {
    $("key").value = "";
    $("key-dialog").showModal();
  }
}

async function start() {
  try {
    const { data } = await json("/v1/models");
    const one = data.length === 1 && data[0].id;
    const choice = el("select", { ariaLabel: "Model", onchange: () => {
      playground.serve(choice.value);
      engine.serve(choice.value);
    } });
    choice.append(...data.map(({ id }) => el("option", { value: id, textContent: id })));
    $("model").replaceChildren(one || choice);
    playground.serve(data[0].id);
  } catch {
    // The live view asks next, goes on asking, and says what is wrong.
  }
  live.poll();
}

addEventListener("hashchange", show);
addEventListener("key-wanted", askForKey);
$("key-button").addEventListener("click", askForKey);
$("key-cancel").addEventListener("click", () => $("key-dialog").close());
$("key-form").addEventListener("submit", () => {
  key.set($("key").value.trim());
  start();
  show();
});
show();
start();
