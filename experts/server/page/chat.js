// The conversation: what was said, and the answer that is on its way.

import {call, events} from "./api.js";
import * as composer from "./composer.js";
import {$, name, node, plural, say} from "./dom.js";
import * as routes from "./route.js";

let turns = [], count = 0, running = null;

export const busy = () => running !== null;
export const stop = () => running?.abort();

/** What was said so far, for the next request. An answer that was stopped stays as far as it came. */
const said = () => turns.filter(turn => turn.text.data).flatMap(turn => [
  {role: "user", content: turn.prompt}, {role: "assistant", content: turn.text.data}]);

/** The body of a route request for what stands in the prompt, or null. */
export function routeBody() {
  const prompt = $("prompt").value.trim();
  return prompt && $("model").value ? {model: composer.model(), messages: composer.messages(said(), prompt)} : null;
}

export function clear() {
  stop();
  turns = [];
  count = 0;
  $("log").replaceChildren($("nothing"));
  $("nothing").hidden = false;
  $("prompt").focus();
}

function opened(prompt, model) {
  const turn = {prompt, model, number: ++count, text: document.createTextNode(""), header: null, route: {}, begin: performance.now()};
  turn.reply = node("div", {kind: "reply"}, turn.text);
  turn.facts = node("p", {kind: "facts", text: "Answering"});
  $("nothing").hidden = true;
  for (const refused of $("log").querySelectorAll(".refused")) refused.remove();
  $("log").append(node("article", {kind: "turn", "aria-label": `Turn ${turn.number}`}, node("p", {kind: "you", text: prompt}), turn.reply, turn.facts));
  $("log").scrollTop = $("log").scrollHeight;
  return turn;
}

const showRoute = turn => routes.show(turn.route, `Answer ${turn.number}, asked of ${turn.model}`, turn.header);

function written(turn, text) {
  const log = $("log"), atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  turn.first ??= performance.now();
  turn.text.appendData(text);
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function closed(turn, how) {
  const end = performance.now(), {usage, first, begin} = turn, facts = [];
  if (how !== "done") facts.push(how);
  if (turn.finish === "length") facts.push("cut at the most tokens");
  if (usage) facts.push(`${usage.prompt_tokens} + ${plural(usage.completion_tokens, "token")}`);
  if (usage?.completion_tokens > 1 && end > first) facts.push(`${((usage.completion_tokens - 1) / (end - first) * 1000).toFixed(1)} tokens/s`);
  if (first) facts.push(`first token after ${((first - begin) / 1000).toFixed(2)} s`);
  const button = node("button", {type: "button", text: "Route", "aria-label": `Show the route of answer ${turn.number}`});
  button.addEventListener("click", () => { routes.forget(); showRoute(turn); });
  const experts = turn.header === null ? null : routes.answeredBy(turn.route, turn.header);
  if (how === "done" && !turn.text.data) facts.unshift("an empty answer");
  const from = experts?.length ? experts.flatMap(({expert}, at) => [...(at ? [", "] : []), name(expert)]) : [experts ? "the base" : ""];
  const log = $("log"), atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  turn.facts.replaceChildren(node("span", {}, ...from), ...facts.map(text => node("span", {text})), ...(experts ? [button] : []));
  if (atEnd) log.scrollTop = log.scrollHeight;
  say(`${how === "done" ? "Answered" : how}${usage ? `, ${plural(usage.completion_tokens, "token")}` : ""}${experts ? `, by ${experts.map(one => one.expert).join(", ") || "the base"}` : ""}`);
}

async function answered(turn, body, signal) {
  const response = await call("v1/chat/completions", {body, signal});
  turn.header = response.headers.get("x-xpert-experts") ?? "";
  showRoute(turn);
  for await (const event of events(response)) {
    const choice = event.choices?.[0];
    if (choice?.delta?.content) written(turn, choice.delta.content);
    if (choice?.finish_reason) turn.finish = choice.finish_reason;
    if (event.usage) turn.usage = event.usage;
    if (event.xpert) { turn.route = event.xpert; showRoute(turn); }
  }
}

/** Sends the prompt, and shows the answer as it comes with the route that it tells of itself. */
export async function send() {
  const asked = routeBody();
  if (!asked || running) return;
  routes.forget();
  const control = running = new AbortController();
  const turn = opened($("prompt").value.trim(), asked.model);
  turns.push(turn);
  $("prompt").value = "";
  $("send").disabled = true;
  $("stop").disabled = false;
  say("Answering");
  const body = {...asked, ...composer.sampling(), stream: true, stream_options: {include_usage: true}, xpert: {explain: true}};
  try {
    await answered(turn, body, control.signal);
    closed(turn, "done");
  } catch (error) {
    failed(turn, error);
  }
  if (running === control) {
    running = null;
    $("send").disabled = false;
    $("stop").disabled = true;
  }
}

function failed(turn, error) {
  if (error.name === "AbortError") return closed(turn, "stopped");
  if (!turn.text.data) {
    turns = turns.filter(one => one !== turn); // what was refused was not said
    turn.reply.remove();
    turn.facts.parentElement.classList.add("refused");
    if (!$("prompt").value) $("prompt").value = turn.prompt;
  }
  closed(turn, "failed");
  turn.facts.before(node("p", {kind: "bad", text: error.message, role: "alert"}));
  $("log").scrollTop = $("log").scrollHeight;
}
