// The page's start and its keys.

import {ask, hasKey, useKey, whenDenied} from "./api.js";
import * as chat from "./chat.js";
import * as composer from "./composer.js";
import {$, plural} from "./dom.js";
import * as experts from "./experts.js";
import * as load from "./load.js";
import * as routes from "./route.js";

function choose(id) {
  composer.choose(id);
  experts.mark();
  rerouted();
  $("prompt").focus();
}

async function models() {
  const found = (await ask("v1/models")).data;
  const of = kind => found.filter(model => model.xpert?.kind === kind), [mixture] = of("mixture"), [base] = of("base");
  if (mixture) {
    document.title = `${mixture.id} · xpert`;
    $("name").textContent = mixture.id;
    const on = base ? ` on ${base.xpert.ref.split("/").pop()}` : "";
    $("about").textContent = `${plural(of("expert").length, "expert")}${on}, router ${mixture.xpert.router}`;
  }
  composer.offer(found);
  experts.show(found, choose);
  $("trouble").hidden = true;
}

const trouble = error => {
  if (error.status === 401) return; // the form for the key says it
  $("trouble").textContent = error.message;
  $("trouble").hidden = false;
};

// ── the prompt ──────────────────────────────────────────────────────────────────────────────────────────────────────

const rerouted = () => { if ($("preview").checked) routes.previewSoon(chat.routeBody); };

for (const id of ["prompt", "model", "options", "system", "preview"]) $(id).addEventListener("input", rerouted);
$("model").addEventListener("change", experts.mark);
$("form").addEventListener("submit", event => { event.preventDefault(); chat.send(); });
$("stop").addEventListener("click", chat.stop);
$("clear").addEventListener("click", chat.clear);
$("route-only").addEventListener("click", () => {
  const body = chat.routeBody();
  if (body) routes.preview(body); else $("prompt").focus();
});

addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.closest("#form")) {
    event.preventDefault();
    if (!chat.busy()) $("form").requestSubmit($("send"));
  } else if (event.key === "Escape") {
    if (!experts.hush()) chat.stop();
  } else if (event.key === "/" && !event.target.closest("input, textarea, select") && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    $("prompt").focus();
  }
});

// ── the key ─────────────────────────────────────────────────────────────────────────────────────────────────────────

whenDenied(words => {
  $("key-words").textContent = words;
  if ($("key-form").hidden) {
    $("key-form").hidden = false;
    $("key").focus();
  }
});
$("key").addEventListener("input", () => $("key").setCustomValidity(/^[\x21-\x7e]*$/.test($("key").value.trim()) ? "" : "A key has no spaces and no letters beyond ASCII."));
$("key-form").addEventListener("submit", event => {
  event.preventDefault();
  useKey($("key").value.trim());
  $("key").value = "";
  $("key-form").hidden = true;
  $("forget").hidden = false;
  $("prompt").focus();
  models().catch(trouble);
});
$("forget").addEventListener("click", () => {
  useKey("");
  $("forget").hidden = true;
  $("prompt").focus();
});

// ── the start ───────────────────────────────────────────────────────────────────────────────────────────────────────

$("url").textContent = new URL("v1", location.href.split(/[?#]/)[0]).href;
$("forget").hidden = !hasKey();
const first = Promise.allSettled([models().catch(trouble), load.watch(() => models().catch(trouble))]);
// Shown at once whole, so that nothing moves; but a slow server does not leave the page empty.
await Promise.race([first, new Promise(done => setTimeout(done, 1500))]);
document.body.classList.add("ready");
// What is hidden takes no focus, so it is given now; where there is no keyboard the prompt would only call one up.
if (!$("key-form").hidden) $("key").focus();
else if (!matchMedia("(pointer: coarse)").matches && !location.hash) $("prompt").focus({preventScroll: true});
