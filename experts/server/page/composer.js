// What the form asks for: the model with its route options, the sampling settings, the messages.

import {$} from "./dom.js";

const NUMBERS = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"];
const kinds = new Map(); // model id -> mixture, expert or base

/** Puts the models that answer into the selector (an embedder does not) and keeps the choice where it still is one. */
export function offer(models) {
  const before = $("model").value, notes = {mixture: " (routed)", expert: "", base: " (model alone)"};
  const answering = models.filter(model => model.xpert?.kind in notes);
  kinds.clear();
  for (const model of answering) kinds.set(model.id, model.xpert.kind);
  $("model").replaceChildren(...answering.map(model => new Option(model.id + notes[model.xpert.kind], model.id)));
  if (kinds.has(before)) $("model").value = before;
  show();
}

export function choose(id) {
  $("model").value = id;
  show();
}

/** `NAME`, or `NAME:router=knn,k=3` for a mixture with route options. */
export function model() {
  const id = $("model").value, options = $("options").value.trim().replace(/^:/, "");
  return kinds.get(id) === "mixture" && options ? `${id}:${options}` : id;
}

export function show() {
  $("options").disabled = kinds.get($("model").value) !== "mixture";
  $("asked").textContent = model();
}

/** The messages of a request: the system prompt if there is one, what was said so far, and the prompt. */
export function messages(said, prompt) {
  const system = $("system").value.trim();
  return [...(system ? [{role: "system", content: system}] : []), ...said, {role: "user", content: prompt}];
}

/** Only what was filled in is sent: the rest is the server's to choose. */
export function sampling() {
  const given = NUMBERS.filter(id => $(id).value !== "").map(id => [id, Number($(id).value)]);
  const stop = $("stop_texts").value.split("\n").filter(Boolean);
  return {
    ...Object.fromEntries(given),
    ...(stop.length ? {stop} : {}),
    ...($("json").checked ? {response_format: {type: "json_object"}} : {}),
  };
}

// A setting in a closed fold cannot be pointed at by the browser when it is wrong.
$("settings").addEventListener("invalid", () => { $("settings").open = true; }, true);
for (const id of ["model", "options"]) $(id).addEventListener("input", show);
