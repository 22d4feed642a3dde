// The experts and what they can do: a table of experts by skills, coloured by score, the base beside them.

import {$, fact, gain, hundredths, name, node, score} from "./dom.js";

const STEPS = 9, ROOMY = 7; // shades; up to so many skills their names are written level where there is room
const REGISTERED = /^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\/[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/; // names that have a page of their own

const page = key => REGISTERED.test(key) ? `registry/names/${key}.html` : `registry/index.html#q=${encodeURIComponent(key)}`;
const shade = value => `s${Math.max(0, Math.min(STEPS - 1, Math.floor(value * STEPS)))}`;

/** The base's scores by skill: [lowest, mean, highest] of what the cards of the experts say, which need not agree. */
function baseScores(experts, skills) {
  return new Map(skills.map(skill => {
    const found = experts.map(expert => expert.xpert.scores?.[skill]?.base).filter(Number.isFinite);
    return [skill, found.length ? [Math.min(...found), found.reduce((sum, one) => sum + one, 0) / found.length, Math.max(...found)] : null];
  }));
}

function cell(row, column, value, subject, told) {
  if (value === undefined) {
    return node("td", {kind: "none", "data-r": row, "data-c": column, tabindex: -1}, node("span", {kind: "unseen", text: "not scored"}));
  }
  const made = node("td", {kind: shade(value), "data-r": row, "data-c": column, tabindex: -1, text: hundredths(value)});
  made.append(node("span", {kind: "unseen", text: told.map(([term, text]) => `, ${term} ${text}`).join("")}));
  made.told = [subject, [["score", score(value)], ...told]];
  return made;
}

function first(model, about, choose) {
  const key = model.id, use = node("button", {type: "button", kind: "use", text: "Use", "data-model": key, "aria-label": `Use ${key} as the model`});
  use.addEventListener("click", () => choose(key));
  const link = model.xpert.kind === "expert" ? node("a", {href: page(key)}, name(key)) : name(key);
  const version = (/@\d+$/.exec(model.xpert.ref ?? "") ?? []).map(text => node("span", {kind: "muted", text: ` ${text}`}));
  return node("th", {scope: "row"}, node("div", {kind: "expert"}, node("span", {}, link, ...version), use), ...(about ? [node("p", {kind: "about", text: about})] : []));
}

/** `models` as GET /v1/models gives them; `choose` is told the id of the one that is to answer. */
export function show(models, choose) {
  const experts = models.filter(model => model.xpert?.kind === "expert"), base = models.find(model => model.xpert?.kind === "base");
  const skills = [...new Set(experts.flatMap(expert => Object.keys(expert.xpert.scores ?? {})))];
  const ofBase = baseScores(experts, skills);
  const rows = [];
  if (base) {
    const cells = skills.map((skill, column) => {
      const found = ofBase.get(skill);
      if (!found) return cell(0, column, undefined);
      const differs = found[0] !== found[2] ? [["by suite", `${score(found[0])} to ${score(found[2])}`]] : [];
      return cell(0, column, found[1], ["the base", skill], differs);
    });
    rows.push(node("tr", {kind: "base"}, first(base, "the model alone, for comparison", choose), ...cells));
  }
  for (const expert of experts) {
    const {about, scores = {}, skills: declared = []} = expert.xpert;
    const cells = skills.map((skill, column) => {
      const found = scores[skill];
      if (!found || !Number.isFinite(found.expert)) return cell(rows.length, column, undefined);
      const metric = found.metric ? [["metric", found.metric]] : [];
      const against = Number.isFinite(found.base) ? [["base", score(found.base)], ["gain", `${gain(found.expert - found.base)} hundredths`]] : [];
      return cell(rows.length, column, found.expert, [expert.id, skill], [...against, ...metric]);
    });
    const unscored = declared.filter(skill => !skills.includes(skill)).join(", ");
    rows.push(node("tr", {}, first(expert, [about, unscored && `for ${unscored}`].filter(Boolean).join(" · "), choose), ...cells));
  }
  const heads = skills.map(skill => node("th", {scope: "col"}, node("span", {title: skill}, name(skill))));
  const head = node("tr", {}, node("th", {scope: "col", text: "Expert"}), ...heads);
  const table = node("table", {kind: skills.length <= ROOMY ? "heat roomy" : "heat"}, node("caption", {kind: "unseen", text: "Experts by skills: score in hundredths"}),
    node("thead", {}, head), node("tbody", {}, ...rows));
  table.querySelector("td[data-r]")?.setAttribute("tabindex", "0");
  $("heat").replaceChildren(table);
  $("heat").classList.toggle("bare", !skills.length);
  const ramp = node("span", {kind: "ramp", "aria-hidden": "true"}, ...Array.from({length: STEPS}, (_, at) => node("i", {kind: `s${at}`})));
  const scale = node("span", {}, "0", ramp, "100"), unscored = node("span", {}, node("i", {kind: "none key"}), "not scored");
  $("legend").replaceChildren(...(skills.length ? [scale, unscored] : ["no expert's card has scores yet"]));
  mark();
}

/** Marks the model that is chosen. */
export function mark() {
  for (const button of $("heat").querySelectorAll(".use")) button.setAttribute("aria-pressed", String(button.dataset.model === $("model").value));
}

// ── the cell one points at ──────────────────────────────────────────────────────────────────────────────────────────

let told = null; // the cell that the tip is of

function tell(cell) {
  const tip = $("tip");
  if (!cell?.told) return hush();
  told = cell;
  const [[who, skill], lines] = cell.told;
  tip.replaceChildren(node("b", {}, name(who)), node("span", {text: skill}), node("dl", {}, ...lines.map(([term, text]) => fact(term, text))));
  const box = cell.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const below = box.bottom + 8 + own.height < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - own.width - 8))}px`;
  tip.style.top = `${below ? box.bottom + 8 : Math.max(8, box.top - own.height - 8)}px`;
  tip.classList.add("on");
}

/** Sends the tip away; says whether there was one. */
export function hush() {
  const shown = told !== null;
  told = null;
  $("tip").classList.remove("on");
  return shown;
}

function move(event) {
  const at = event.target.closest("td[data-r]");
  if (!at) return;
  let [row, column] = [Number(at.dataset.r), Number(at.dataset.c)];
  const last = at.parentElement.cells.length - 2; // beside the expert
  const steps = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -column], End: [0, last - column]}[event.key];
  if (!steps || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  [row, column] = [row + steps[0], column + steps[1]];
  const next = $("heat").querySelector(`td[data-r="${row}"][data-c="${column}"]`);
  if (!next) return;
  at.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

$("heat").addEventListener("keydown", move);
$("heat").addEventListener("focusin", event => tell(event.target.closest("td")));
$("heat").addEventListener("focusout", hush);
$("heat").addEventListener("pointerover", event => tell(event.target.closest("td")));
$("heat").addEventListener("pointerleave", hush);
// The cell that has the focus may have moved because it got it.
const moved = () => { if (told) told === document.activeElement ? tell(told) : hush(); };
for (const what of ["scroll", "resize"]) addEventListener(what, moved, {passive: true, capture: true});
