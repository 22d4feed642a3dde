// What the server is doing, asked every second while somebody looks. A server that does not tell is left alone.

import {ask} from "./api.js";
import {$, counted, drawn, fact, plural} from "./dom.js";

const EVERY = 1000, AFTER_FAILURE = 5000, KEPT = 60, WIDTH = 240, HEIGHT = 36;
let timer = 0, over = false, asking = false;
const seen = []; // [running, waiting], the newest last

const path = (values, most) => values.map((value, at) => {
  const x = WIDTH * (KEPT - values.length + at) / (KEPT - 1), y = HEIGHT - 1 - (HEIGHT - 3) * value / most;
  return `${x.toFixed(1)},${y.toFixed(1)}`;
}).join(" ");

function draw(room) {
  const most = Math.max(room, 1, ...seen.map(([running, waiting]) => running + waiting));
  const running = path(seen.map(one => one[0]), most), both = path(seen.map(([one, other]) => one + other), most);
  const start = (WIDTH * (KEPT - seen.length) / (KEPT - 1)).toFixed(1);
  $("spark").replaceChildren(drawn("polygon", {points: `${start},${HEIGHT} ${running} ${WIDTH},${HEIGHT}`, class: "area"}),
    drawn("polyline", {points: both, class: "waiting"}), drawn("polyline", {points: running, class: "running"}));
}

function since(epoch) {
  const minutes = Math.max(0, Math.floor((Date.now() / 1000 - epoch) / 60)), hours = Math.floor(minutes / 60);
  return hours >= 48 ? plural(Math.floor(hours / 24), "day") : hours ? `${hours} h ${minutes % 60} min` : `${minutes} min`;
}

const of = (value, most) => most === undefined ? counted(value) : `${counted(value)} of ${counted(most)}`;

function show(load) {
  seen.push([load.running, load.waiting]);
  if (seen.length > KEPT) seen.shift();
  draw(load.max_batch ?? 0);
  $("figures").replaceChildren(fact("running", of(load.running, load.max_batch)), fact("waiting", of(load.waiting, load.max_queue)),
    fact("tokens/s", load.tokens_per_second.toFixed(load.tokens_per_second < 100 ? 1 : 0)), fact("requests", counted(load.requests)),
    ...(load.generation === undefined ? [] : [fact("generation", counted(load.generation))]));
  $("load-since").textContent = load.started ? `up ${since(load.started)}` : "";
  const experts = Object.entries(load.experts ?? {}).filter(([, count]) => count).sort((one, other) => other[1] - one[1]);
  $("busy").textContent = experts.length ? experts.map(([key, count]) => `${key} ${count}`).join(" · ") : "no expert is answering";
}

/** Asks once and shows it; false where the server has nothing to tell. `renewed` hears of a new generation. */
async function look(renewed) {
  const load = await ask("v1/load", {signal: AbortSignal.timeout(5000), quiet: true});
  if (![load.running, load.waiting, load.tokens_per_second, load.requests].every(Number.isFinite)) throw new TypeError("no load");
  show(load);
  $("load").hidden = false;
  $("load").classList.remove("stale");
  if (load.generation !== renewed.at) {
    if (renewed.at !== undefined) renewed.hear();
    renewed.at = load.generation;
  }
}

/** Begins to ask; resolves after the first answer. `hear` is called when the server serves a new generation. */
export async function watch(hear) {
  const renewed = {at: undefined, hear};
  async function turn() {
    clearTimeout(timer);
    if (over || asking || document.hidden) return;
    let pause = EVERY;
    asking = true;
    try {
      await look(renewed);
    } catch (error) {
      over = error.status === 404 || error.status === 405 || error instanceof TypeError;
      if (over) $("load").hidden = true;
      $("load").classList.add("stale");
      pause = AFTER_FAILURE;
    }
    asking = false;
    if (!over) timer = setTimeout(turn, pause);
  }
  document.addEventListener("visibilitychange", turn);
  await turn();
}
