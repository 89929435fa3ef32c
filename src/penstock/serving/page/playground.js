// One conversation, or one text and what follows it, streamed; what was asked and what came is kept for the inspector.

import { $, ask, el, events, json } from "./api.js";

const KEPT = 50;
export const asked = new Map(); // by x-request-id: {path, body, tokens, prompt}
const turns = [];
let model = "";
let stopping = null;

export const serve = (name) => (model = name);
export const shown = (yes) => yes && $("text").focus();

const kind = () => new FormData($("ask")).get("kind");

function parsed(id, wanted) {
  const text = $(id).value.trim();
  if (!text) return undefined;
  const value = JSON.parse(text);
  if (!wanted(value)) throw new Error("it has another shape");
  return value;
}

function body(text) {
  const all = { model, stream: true, stream_options: { include_usage: true } };
  for (const name of ["max_tokens", "temperature", "top_p", "seed"]) {
    if ($(name).value !== "") all[name] = Number($(name).value);
  }
  const top = Number($("alternatives").value);
  if (kind() === "completion") {
    Object.assign(all, { prompt: text, logprobs: top });
  } else {
    const system = $("system").value ? [{ role: "system", content: $("system").value }] : [];
    Object.assign(all, { messages: [...system, ...turns], logprobs: true, top_logprobs: top });
    all.tools = parsed("tools", Array.isArray);
  }
  return Object.assign(all, parsed("fields", (value) => value && typeof value === "object" && !Array.isArray(value)));
}

function bubble(role, text = "") {
  const said = el("pre", { textContent: text });
  const turn = el("div", { className: "turn" }, el("b", { textContent: role }), said);
  $("turns").append(turn);
  return { turn, said };
}

// What a stream has brought so far, on the page and as the message that the next turn repeats.
class Answer {
  constructor(first) {
    Object.assign(this, bubble("assistant", first), { text: "", thoughts: "", calls: [], tokens: [], usage: null, finish: null });
  }

  take(chunk) {
    if (chunk.error) throw new Error(chunk.error.message);
    this.usage = chunk.usage ?? this.usage;
    const choice = chunk.choices[0];
    if (!choice || choice.index) return; // of several only the first is shown
    this.finish = choice.finish_reason ?? this.finish;
    this.note(choice.logprobs);
    const delta = choice.delta ?? { content: choice.text };
    if (delta.reasoning_content) this.think(delta.reasoning_content);
    if (delta.content) {
      this.text += delta.content;
      this.said.append(delta.content);
    }
    for (const piece of delta.tool_calls ?? []) this.call(piece);
    $("turns").scrollTop = $("turns").scrollHeight;
  }

  note(logprobs) {
    for (const one of logprobs?.content ?? []) {
      this.tokens.push({ token: one.token, logprob: one.logprob, top: one.top_logprobs.map((top) => [top.token, top.logprob]) });
    }
    logprobs?.tokens?.forEach((token, i) => {
      const logprob = logprobs.token_logprobs[i];
      if (logprob === null) return; // the first of an echoed prompt
      this.tokens.push({ token, logprob, top: Object.entries(logprobs.top_logprobs[i]) });
    });
  }

  think(text) {
    if (!this.thoughts) {
      this.thought = el("pre");
      this.turn.insertBefore(el("details", { open: true }, el("summary", { textContent: "Thoughts" }), this.thought), this.said);
    }
    this.thoughts += text;
    this.thought.append(text);
  }

  call(piece) {
    const call = (this.calls[piece.index] ??= { id: piece.id, type: "function", function: { name: piece.function.name, arguments: "" } });
    call.function.arguments += piece.function.arguments;
    call.shown ??= this.turn.appendChild(el("pre", { className: "call" }));
    call.shown.textContent = `${call.function.name}(${call.function.arguments})`;
  }

  get some() {
    return this.text || this.thoughts || this.calls.length;
  }

  message() {
    const calls = this.calls.map(({ id, type, function: called }) => ({ id, type, function: called }));
    const told = { role: "assistant", content: this.text };
    if (this.thoughts) told.reasoning_content = this.thoughts;
    if (calls.length) told.tool_calls = calls;
    return told;
  }
}

async function send() {
  if (stopping) return;
  const text = $("text").value;
  const chat = kind() === "chat";
  if (!text) return note("There is nothing to send.");
  let request;
  if (chat) turns.push({ role: "user", content: text });
  try {
    request = body(text);
  } catch (error) {
    if (chat) turns.pop();
    return note(`Tools and other fields must be JSON: ${error.message}.`);
  }
  if (chat) bubble("user", text);
  $("text").value = chat ? "" : text;
  await stream(chat ? "/v1/chat/completions" : "/v1/completions", request, new Answer(chat || request.echo ? "" : text));
}

async function stream(path, request, answer) {
  stopping = new AbortController();
  busy(true);
  const question = turns.at(-1);
  const began = performance.now();
  try {
    const response = await ask(path, request, stopping.signal);
    const id = response.headers.get("x-request-id");
    keep(id, { path, body: request, tokens: answer.tokens });
    for await (const chunk of events(response)) answer.take(chunk);
    const seconds = ((performance.now() - began) / 1000).toFixed(2);
    const { prompt_tokens, completion_tokens } = answer.usage;
    note(`${prompt_tokens} tokens in, ${completion_tokens} out in ${seconds} s; ended by ${answer.finish}.`);
  } catch (error) {
    note(error.name === "AbortError" ? "Stopped." : error.message);
  }
  if (request.messages && turns.at(-1) === question) settle(question, answer);
  stopping = null;
  busy(false);
}

// A turn that brought nothing is taken back: the next question shall not follow one that was never answered.
function settle(question, answer) {
  if (answer.some) return turns.push(answer.message());
  turns.pop();
  answer.turn.previousSibling.remove();
  answer.turn.remove();
  $("text").value ||= question.content;
}

function keep(id, record) {
  asked.set(id, record);
  if (asked.size > KEPT) asked.delete(asked.keys().next().value);
  $("look").href = `#inspector/${encodeURIComponent(id)}`;
  $("look").hidden = false;
}

// Fields that the prompt is made of.
const COMPLETION = ["prompt", "add_special_tokens"];
const CHAT = [
  "messages", "tools", "tool_choice", "reasoning_effort", "chat_template_kwargs", "add_generation_prompt", "continue_final_message",
];

// The prompt as the model got it: after the template, token by token.
export async function promptOf({ path, body }) {
  const rendered = path === "/v1/completions" ? COMPLETION : CHAT;
  const given = Object.fromEntries(rendered.map((name) => [name, body[name]]));
  return (await json("/tokenize", { model: body.model, return_token_strs: true, ...given })).token_strs;
}

function busy(yes) {
  $("send").disabled = yes;
  $("stop").disabled = !yes;
}

const note = (text) => ($("ask-note").textContent = text);

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send();
});
$("stop").addEventListener("click", () => stopping?.abort());
$("clear").addEventListener("click", () => {
  stopping?.abort();
  turns.length = 0;
  $("turns").replaceChildren();
  note("");
});
