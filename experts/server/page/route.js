// The route panel: who answers, with what weight, who else was thought of, and why.

import {ask, expertsOf} from "./api.js";
import {$, fact, name, node, plural, score} from "./dom.js";

const FEW = 12, PAUSE = 300; // candidates shown at first; milliseconds without a key before a route is asked for
let all = false, latest = null;

const weighted = experts => experts.map(({expert, weight}) => `${expert} ${weight.toFixed(2)}`).join(", ") || "the base";

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

function ballots(votes) {
  const rows = votes.map(vote => node("tr", {}, node("th", {scope: "row"}, name(String(vote.expert ?? ""))),
    node("td", {kind: "n", text: typeof vote.weight === "number" ? vote.weight.toFixed(2) : ""}), node("td", {kind: "said", text: String(vote.text ?? "").slice(0, 400)})));
  const head = node("tr", {}, ...["Vote of", "Weight", "Reply"].map(text => node("th", {scope: "col", text, ...(text === "Weight" ? {kind: "n"} : {})})));
  return node("table", {kind: "votes"}, node("caption", {text: plural(votes.length, "vote")}), node("thead", {}, head), node("tbody", {}, ...rows));
}

/**
 * Shows a route as `POST /v1/route` gives it. `of` says whose route it is; `header` is x-xpert-experts of an answer;
 * `told` is what the answer itself said of its experts, where the server says so (its experts, reason and votes).
 */
export function show(route, of, {header = "", told = {}} = {}) {
  latest = [route, of, {header, told}];
  const said = {...route, ...told};
  const experts = header ? expertsOf(header) : said.experts ?? [];
  const chips = experts.map(({expert, weight}) => node("li", {kind: "chip"}, name(expert), node("b", {text: weight.toFixed(2)})));
  $("route-of").textContent = of;
  $("chosen").replaceChildren(...(chips.length ? chips : [node("li", {kind: "chip", text: "the base alone"})]));
  $("reason").textContent = said.reason ?? "";
  $("reason").className = "";
  const facts = [];
  if (typeof said.chance === "number") facts.push(fact("Chance", `${(100 * said.chance).toFixed(0)} %`));
  if (said.escalation) facts.push(fact("If unsure", `under a confidence of ${said.escalation.below}, ${weighted(said.escalation.experts)} answers`));
  if (said.aggregator) facts.push(fact("Aggregated", String(said.aggregator)));
  if (typeof said.log?.share === "number") facts.push(fact("Agreed", `${(100 * said.log.share).toFixed(0)} % of the votes`));
  if (header) facts.push(fact("Header", node("code", {text: `x-xpert-experts: ${header}`})));
  const keys = list => list.map(one => one.expert).sort().join();
  if (header && route.experts && !told.experts && keys(route.experts) !== keys(experts)) {
    facts.push(fact("Asked again", `the route now goes to ${weighted(route.experts)}`));
  }
  $("route-facts").replaceChildren(...facts);
  const candidates = said.candidates ?? [];
  $("candidates").replaceChildren(...(candidates.length ? bars(candidates, new Map(experts.map(one => [one.expert, one.weight]))) : []));
  $("votes").replaceChildren(...(said.log?.votes?.length ? [ballots(said.log.votes)] : []));
}

export function trouble(words) {
  latest = null;
  for (const id of ["chosen", "route-facts", "candidates", "votes"]) $(id).replaceChildren();
  $("route-of").textContent = "No route";
  $("reason").textContent = words;
  $("reason").className = "bad";
}

// ── where a prompt would go ─────────────────────────────────────────────────────────────────────────────────────────

let timer = 0, asking = null, known = {body: "", route: null};

/** The route of a request; the last one is remembered, so that sending what was just previewed asks nothing again. */
export async function routeOf(body, signal) {
  const text = JSON.stringify(body);
  if (known.body !== text) known = {body: text, route: await ask("v1/route", {body, signal})};
  return known.route;
}

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
    const route = await routeOf(body, mine.signal);
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
