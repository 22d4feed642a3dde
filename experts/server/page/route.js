// The route panel: who answers, with what weight, who else was thought of, and why.

import {ask, expertsOf} from "./api.js";
import {$, fact, name, node, plural, score} from "./dom.js";

const FEW = 12, LONG = 400; // candidates shown at first; characters of a reply among several
const PAUSE = 300; // milliseconds without a key before a route is asked for
let all = false, latest = null;

const named = experts => experts.map(({expert, weight}) => experts.length > 1 ? `${expert} ${weight.toFixed(2)}` : expert).join(", ") || "the base";

/** Who answers, or answered: as the answer says, else its header, else the route. */
export const answeredBy = (route, header) => route.answered_by ?? (header ? expertsOf(header) : route.experts ?? []);

function bars(candidates, weights) {
  const scores = candidates.map(candidate => candidate.score);
  const low = Math.min(0, ...scores), span = Math.max(0, ...scores) - low || 1;
  const zero = `${100 * -low / span}%`;
  const rows = (all ? candidates : candidates.slice(0, FEW)).map(candidate => {
    const weight = weights.get(candidate.expert);
    const track = node("div", {kind: "track"}), fill = node("i"), axis = node("b");
    fill.style.left = `${100 * (Math.min(0, candidate.score) - low) / span}%`;
    fill.style.width = `${100 * Math.abs(candidate.score) / span}%`;
    if (candidate.score < 0) fill.className = "below";
    axis.style.left = zero;
    track.append(fill, axis);
    return node("tr", weight === undefined ? {} : {kind: "chosen"},
      node("th", {scope: "row"}, name(candidate.expert)), node("td", {}, track), node("td", {kind: "n", text: score(candidate.score)}),
      node("td", {kind: "n", text: weight === undefined ? "" : weight.toFixed(2)}));
  });
  const head = node("tr", {}, node("th", {scope: "col", text: "Candidate"}), node("th", {scope: "col"}, node("span", {kind: "unseen", text: "Bar"})),
    node("th", {scope: "col", kind: "n", text: "Score"}), node("th", {scope: "col", kind: "n", text: "Weight"}));
  const table = node("table", {kind: "candidates"}, node("caption", {kind: "unseen", text: "Candidates by score"}), node("thead", {}, head), node("tbody", {}, ...rows));
  if (candidates.length <= FEW) return [table];
  const more = node("button", {type: "button", text: all ? `The first ${FEW} only` : `All ${candidates.length}`});
  more.addEventListener("click", () => { all = !all; show(...latest); $("candidates").querySelector("button").focus(); });
  return [table, more];
}

/** The replies that one answer came of: each with whose it is, what it weighed and what it was read as, where told. */
function replies(given, what) {
  const rows = given.map(one => {
    const reply = node("td", {kind: "said"}), text = String(one.text ?? "").slice(0, LONG);
    if (one.answer && one.answer !== text.trim()) reply.append(node("b", {text: one.answer}), " ");
    reply.append(text);
    const whose = one.experts?.join(", ") || one.expert || "the base", weight = one.weight ?? one.mean_logprob;
    return node("tr", {}, node("th", {scope: "row"}, name(whose)), node("td", {kind: "n", text: typeof weight === "number" ? score(weight) : ""}), reply);
  });
  const weight = given.some(one => one.mean_logprob !== undefined) ? "Log-prob." : "Weight";
  const head = node("tr", {}, node("th", {scope: "col", text: "Of"}), node("th", {scope: "col", kind: "n", text: weight}), node("th", {scope: "col", text: "Reply"}));
  return node("table", {kind: "votes"}, node("caption", {text: plural(given.length, what, what === "reply" ? "replies" : undefined)}), node("thead", {}, head), node("tbody", {}, ...rows));
}

/**
 * Shows a route as `POST /v1/route` gives it, or an answer's field `xpert`, which also says how it was answered:
 * answered_by, stage, confidence, aggregated. `of` says whose it is; `header` is the answer's x-xpert-experts.
 */
export function show(route, of, header = "") {
  latest = [route, of, header];
  const experts = answeredBy(route, header), log = route.aggregated ?? {};
  const chips = experts.map(({expert, weight}) => node("li", {kind: "chip"}, name(expert), node("b", {text: weight.toFixed(2)})));
  $("route-of").textContent = of;
  $("chosen").replaceChildren(...(chips.length ? chips : [node("li", {kind: "chip", text: "the base alone"})]));
  $("reason").textContent = route.reason ?? "";
  $("reason").className = "";
  const facts = [], add = (term, ...description) => facts.push(fact(term, ...description));
  if (Number.isFinite(route.chance)) add("Chance", `${(100 * route.chance).toFixed(0)} %`);
  if (route.escalation) add("If unsure", `under a confidence of ${route.escalation.below}, ${named(route.escalation.experts)} answers`);
  if (Number.isFinite(route.confidence)) add("Confidence", `${route.confidence.toFixed(2)}${route.stage > 1 ? ", so it was answered anew" : ""}`);
  if (Number.isFinite(log.share)) add("Agreed", `${(100 * log.share).toFixed(0)} % of the votes`);
  if (header) add("Header", node("code", {text: `x-xpert-experts: ${header}`}));
  $("route-facts").replaceChildren(...facts);
  $("votes").replaceChildren(...(log.votes?.length ? [replies(log.votes, "vote")] : log.replies?.length ? [replies(log.replies, "reply")] : []));
  const candidates = route.candidates ?? [], weights = new Map((route.experts ?? experts).map(one => [one.expert, one.weight]));
  $("candidates").replaceChildren(...(candidates.length ? bars(candidates, weights) : []));
}

export function trouble(words) {
  latest = null;
  for (const id of ["chosen", "route-facts", "candidates", "votes"]) $(id).replaceChildren();
  $("route-of").textContent = "No route";
  $("reason").textContent = words;
  $("reason").className = "bad";
}

// ── where a prompt would go ─────────────────────────────────────────────────────────────────────────────────────────

let timer = 0, asking = null;

export function forget() {
  clearTimeout(timer);
  asking?.abort();
  asking = null;
}

/** Asks where a prompt would go and shows it. One is asked at a time: a newer one takes the older one's place. */
export async function preview(body) {
  forget();
  const mine = asking = new AbortController();
  try {
    const route = await ask("v1/route", {body, signal: mine.signal});
    if (asking === mine) show(route, `Where this prompt would go, asked of ${body.model}`);
  } catch (error) {
    if (asking === mine && error.name !== "AbortError") trouble(error.message);
  }
}

/** `request` gives the body, or null where there is nothing to route. */
export function previewSoon(request) {
  forget();
  timer = setTimeout(() => { const body = request(); if (body) preview(body); }, PAUSE);
}
