// The server's own routes, with the key that this tab keeps.

const KEPT = "penstock-key";

export const key = {
  get: () => sessionStorage.getItem(KEPT) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEPT, value) : sessionStorage.removeItem(KEPT)),
};

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export async function ask(path, body, signal) {
  const sent = key.get();
  const headers = sent ? { authorization: `Bearer ${sent}` } : {};
  const options = { headers, signal, cache: "no-store" };
  if (body !== undefined) {
    options.method = "POST";
    options.body = JSON.stringify(body);
    headers["content-type"] = "application/json";
  }
  const response = await fetch(path, options);
  if (response.ok) return response;
  // A question from before the key was typed may be refused after it: that is no word on the new key.
  if (response.status === 401 && sent === key.get()) dispatchEvent(new Event("key-wanted"));
  const told = await response.json().catch(() => null);
  throw new Refused(response.status, told?.error?.message ?? `the server answers ${response.status}`);
}

export const json = async (path, body, signal) => (await ask(path, body, signal)).json();

// The data of each server-sent event, parsed. A character or an event may be cut anywhere between two chunks.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
        if (data === "[DONE]") return;
        if (data) yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

export const el = (tag, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
};

export const $ = (id) => document.getElementById(id);
