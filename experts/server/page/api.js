// The server, as the page asks it: relative addresses, so that it may stand behind a proxy's prefix.

const KEY = "xpert-api-key";
let store = null; // a browser that keeps nothing for anybody refuses even to be asked
try { store = sessionStorage; } catch { /* the key is then known until the page is left */ }
let key = store?.getItem(KEY) ?? "";
let denied = () => {};

export const hasKey = () => key !== "";
export const whenDenied = heard => { denied = heard; };

export function useKey(text) {
  key = text;
  if (key) store?.setItem(KEY, key); else store?.removeItem(KEY);
}

/** What the server refused, in its own words. */
export class Refusal extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/**
 * The response to a GET, or to a POST of `body` as JSON. Throws Refusal, or AbortError once `signal` says so. Where a
 * key is missing the user is asked for one, unless `quiet`.
 */
export async function call(path, {body, signal, quiet = false} = {}) {
  const headers = key ? {authorization: `Bearer ${key}`} : {};
  const post = body === undefined ? {} : {method: "POST", body: JSON.stringify(body)};
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {...post, headers, signal, cache: "no-store"});
  } catch (error) {
    if (error.name === "AbortError" || error.name === "TimeoutError") throw error;
    throw new Refusal("the server cannot be reached", 0);
  }
  if (response.ok) return response;
  const words = await response.json().then(told => told.error.message).catch(() => `the server answered ${response.status}`);
  if (response.status === 401 && !quiet) denied(words);
  throw new Refusal(words, response.status);
}

export const ask = async (path, options) => (await call(path, options)).json();

/** The JSON of each server-sent event. Throws Refusal where the server tells of an error or ends before [DONE]. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {value, done} = await reader.read().catch(error => {
      throw error.name === "AbortError" ? error : new Refusal("the connection broke before the answer was whole", 0);
    });
    if (done) throw new Refusal("the connection ended before the answer was whole", 0);
    const parts = (rest + value).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const lines = part.split(/\r?\n/).filter(line => line.startsWith("data:")); // a line that starts with : is a sign of life
      if (!lines.length) continue;
      const data = lines.map(line => line.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refusal(event.error.message, 0);
      yield event;
    }
  }
}

/** `a=0.7,b=0.3` or `base`, as the header x-xpert-experts says it -> [{expert, weight}]. */
export function expertsOf(header) {
  if (!header || header === "base") return [];
  return header.split(",").map(part => {
    const at = part.lastIndexOf("=");
    return {expert: decodeURIComponent(part.slice(0, at)), weight: Number(part.slice(at + 1))};
  });
}
