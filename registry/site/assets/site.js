// The pages of a registry: the list, the heat map and the comparison. What strangers wrote enters the page as text
// nodes only; nothing is fetched, so the pages work from a folder as they do from a server.
"use strict";
(() => {
  const $ = id => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";
  const PAGE_ROWS = 50, FIRST_ROWS = 15, ROW_HEIGHT = 27, OVERSCAN = 12, GAIN_REACH = 0.5;

  // ── small things ────────────────────────────────────────────────────────────────────────────────────────────────

  function node(tag, {text, kind, ...rest} = {}, ...children) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    for (const [name, value] of Object.entries(rest)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }
  const bdi = text => node("bdi", {text});

  const words = text => text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [];
  const haystack = (...texts) => " " + words(texts.join(" ")).join(" ");
  const holds = (held, asked) => asked.every(word => held.includes(" " + word)); // words by their beginnings

  const counted = value => value.toLocaleString("en-US");
  const three = value => value.toFixed(3);
  const hundredths = value => String(Math.round(100 * value));
  const signedScore = value => `${value < -0.0005 ? "−" : "+"}${three(Math.abs(value))}`;
  const signed = (value, digits = 0) => {
    const text = (100 * value).toFixed(digits);
    return Number(text) > 0 ? `+${text}` : text.replace("-", "−").replace(/^−(0\.?0*)$/, "$1");
  };
  function bytes(count) {
    const units = ["B", "KiB", "MiB", "GiB"];
    let at = 0;
    while (count >= 1024 && at < 3) { count /= 1024; at += 1; }
    return `${count.toFixed(at ? 1 : 0)} ${units[at]}`;
  }
  function runs(numbers) { // 1–3, 5
    const found = [];
    for (const number of numbers) {
      const last = found.at(-1);
      if (last && last[1] === number - 1) last[1] = number; else found.push([number, number]);
    }
    return found.map(([low, high]) => low === high ? `${low}` : `${low}–${high}`).join(", ");
  }

  const hashState = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  function keep(state) {
    const kept = new URLSearchParams(Object.entries(state).filter(([, value]) => value));
    history.replaceState(null, "", kept.size ? `#${kept}` : location.pathname + location.search);
  }

  // Intervals are [score, low, high, n]. wording.py says the same of an expert and its base.
  function verdict(one, other) {
    if (one[1] > other[2]) return "better, beyond both intervals";
    if (one[2] < other[1]) return "worse, beyond both intervals";
    if (one[0] === other[0]) return "equal";
    const word = one[0] > other[0] ? "better" : "worse";
    const apart = (one[0] < other[1] || one[0] > other[2]) && (other[0] < one[1] || other[0] > one[2]);
    return apart ? `${word}, though the intervals overlap` : "no clear difference";
  }

  // ── the list ────────────────────────────────────────────────────────────────────────────────────────────────────

  function startIndex(data) {
    const [NAME, PATH, KIND, BASE, VERSIONS, TAGS, SKILLS, SCORES, SIZE, DATE, ABOUT] = Array(11).keys();
    const named = row => row[SKILLS].map(skill => data.skills[skill]);
    const rows = data.rows.map(row => ({row, held: haystack(row[NAME], row[ABOUT], ...named(row))}));
    const fields = ["q", "kind", "base", "skill"];
    for (const [field, list] of [["kind", "kinds"], ["base", "bases"], ["skill", "skills"]]) {
      const options = data[list].map((text, index) => [text, index]).filter(([text]) => text);
      options.sort(([a], [b]) => a.localeCompare(b, "en"));
      $(field).append(...options.map(([text]) => new Option(text, text)));
      $(field).parentElement.hidden = options.length < 2;
    }
    let sort = "name", down = false, page = 0;

    const best = (row, skill) => skill < 0 ? row[SCORES][0] : row[SCORES].find(score => score[0] === skill);
    const keys = {
      name: ({row}) => row[NAME].toLowerCase(),
      versions: ({row}) => row[VERSIONS].length,
      score: ({row}, skill) => best(row, skill)?.[1] ?? -1,
      base: ({row}) => data.bases[row[BASE]].toLowerCase(),
      size: ({row}) => row[SIZE],
      date: ({row}) => row[DATE],
    };

    const breaking = text => node("bdi", {}, ...text.split("/").flatMap((part, at) => at ? ["/", node("wbr"), part] : [part]));

    function line(row, skill) {
      const bests = node("ul", {kind: "bests"});
      const shown = skill < 0 ? row[SCORES].slice(0, 3) : [best(row, skill)].filter(Boolean);
      for (const [at, score, gain] of shown)
        bests.append(node("li", {}, bdi(data.skills[at]), node("b", {text: three(score)}), node("span", {text: signedScore(gain), kind: "range", title: "gain over the base"})));
      const unscored = row[SKILLS].length ? row[SKILLS].slice(0, 3).map(at => data.skills[at]).join(", ") : "–";
      const head = node("th", {scope: "row"}, node("a", {href: row[PATH]}, bdi(row[NAME])));
      if (data.kinds[row[KIND]] === "mixture") head.append(" ", node("span", {text: "mixture", kind: "chip tag"}));
      if (row[ABOUT]) head.append(node("div", {kind: "about"}, bdi(row[ABOUT])));
      const versions = node("td", {text: runs(row[VERSIONS]), kind: "n cell-versions"});
      for (const tag of row[TAGS].slice(0, 3)) versions.append(" ", node("span", {text: tag, kind: "chip tag"}));
      const cells = [
        head, versions,
        node("td", {kind: "cell-score"}, shown.length ? bests : node("span", {text: unscored, kind: "muted"})),
        node("td", {kind: "cell-base"}, breaking(data.bases[row[BASE]] || "–")),
        node("td", {text: bytes(row[SIZE]), kind: "n cell-size"}),
        node("td", {text: row[DATE], kind: "n cell-date"}),
      ];
      return node("tr", {}, ...cells);
    }

    let before; // what the last letters found: more letters find among those
    function find() {
      const asked = words($("q").value), text = asked.join(" "), skill = data.skills.indexOf($("skill").value);
      const kind = data.kinds.indexOf($("kind").value), base = data.bases.indexOf($("base").value);
      const others = fields.slice(1).map(field => $(field).value).join("\n");
      const among = before && before.others === others && text.startsWith(before.text) ? before.found : rows;
      const found = among.filter(({row, held}) =>
        (!asked.length || holds(held, asked)) && ($("kind").value === "" || row[KIND] === kind) &&
        ($("base").value === "" || row[BASE] === base) && (skill < 0 || row[SKILLS].includes(skill)));
      before = {text, others, found};
      if (sort !== "name" || down) {
        const keyed = found.map((entry, at) => [keys[sort](entry, skill), at, entry]);
        keyed.sort(([a, i], [b, j]) => (a < b ? -1 : a > b ? 1 : 0) * (down ? -1 : 1) || i - j);
        return [keyed.map(entry => entry[2]), skill];
      }
      return [found, skill];
    }

    let rest; // while one types, the first rows come at once and the others once the fingers rest
    function show(typing = false) {
      const [found, skill] = find();
      clearTimeout(rest);
      const pages = Math.max(1, Math.ceil(found.length / PAGE_ROWS));
      page = Math.min(Math.max(0, page), pages - 1);
      const from = page * PAGE_ROWS, shown = found.slice(from, from + PAGE_ROWS);
      const now = typing ? FIRST_ROWS : PAGE_ROWS, body = $("list").tBodies[0];
      body.replaceChildren(...shown.slice(0, now).map(({row}) => line(row, skill)));
      if (shown.length > now) rest = setTimeout(() => body.append(...shown.slice(now).map(({row}) => line(row, skill))), 120);
      const part = pages > 1 ? `, ${counted(from + 1)}–${counted(from + shown.length)} shown` : "";
      const of = found.length === rows.length ? "" : ` of ${counted(rows.length)}`;
      $("count").textContent = found.length ? `${counted(found.length)}${of} name${found.length === 1 ? "" : "s"}${part}` : "Nothing matches all of this.";
      for (const head of document.querySelectorAll("#list th[data-sort]"))
        if (head.dataset.sort === sort) head.setAttribute("aria-sort", down ? "descending" : "ascending");
        else head.removeAttribute("aria-sort");
      const turn = (text, to) => {
        const button = node("button", {text, type: "button"});
        button.disabled = to < 0 || to >= pages || to === page;
        button.addEventListener("click", () => { page = to; show(); save(); $("list").scrollIntoView({block: "start"}); });
        return button;
      };
      $("pager").hidden = pages < 2;
      $("pager").replaceChildren(turn("First", 0), turn("Previous", page - 1), node("span", {text: `page ${page + 1} of ${pages}`}), turn("Next", page + 1), turn("Last", pages - 1));
    }

    const save = () => keep({
      ...Object.fromEntries(fields.map(field => [field, $(field).value])),
      sort: sort === "name" && !down ? "" : (down ? "-" : "") + sort, page: page ? String(page + 1) : ""});
    function restore() {
      const state = hashState();
      for (const field of fields) $(field).value = state[field] ?? "";
      for (const field of fields.slice(1)) if ($(field).selectedIndex < 0) $(field).value = "";
      const by = (state.sort ?? "name").replace(/^-/, "");
      sort = Object.hasOwn(keys, by) ? by : "name";
      down = (state.sort ?? "").startsWith("-");
      page = (parseInt(state.page, 10) || 1) - 1;
      show();
    }
    const changed = (typing = false) => { page = 0; show(typing); save(); };
    $("q").addEventListener("input", () => changed(true));
    for (const field of ["kind", "base"]) $(field).addEventListener("change", () => changed());
    $("skill").addEventListener("change", () => { // who is best at it is what one wants to see first
      if ($("skill").value) [sort, down] = ["score", true];
      changed();
    });
    $("filters").addEventListener("submit", event => event.preventDefault());
    $("clear").addEventListener("click", () => { for (const field of fields) $(field).value = ""; changed(); $("q").focus(); });
    for (const head of document.querySelectorAll("#list th[data-sort]"))
      head.firstElementChild.addEventListener("click", () => {
        const by = head.dataset.sort, first = by === "name" || by === "base";
        down = by === sort ? !down : !first;
        sort = by;
        changed();
      });
    addEventListener("hashchange", restore);
    $("filters").hidden = $("list").hidden = false;
    restore();
  }

  // ── the heat map ────────────────────────────────────────────────────────────────────────────────────────────────

  function startHeat(data) {
    const scroll = $("heat"), tip = $("tip");
    const groups = Object.keys(data);
    $("group").append(...groups.map(group => new Option(group, group)));
    $("group-label").hidden = groups.length < 2;
    let group, columns, rows, shownColumns, shownRows, order, byColumn = -1, active = [0, 0], first = 0, last = 0, table;
    const gaining = () => document.querySelector("input[name=show]:checked").value === "gain";
    const valueOf = cell => gaining() ? cell[1][0] - cell[2][0] : cell[1][0];
    const meanOf = cells => cells.length ? cells.reduce((sum, cell) => sum + valueOf(cell), 0) / cells.length : NaN;
    const ranked = (list, key) => [...list].sort((a, b) => (key(b) - key(a)) || 0);
    const bestFirst = value => Number.isNaN(value) ? -9 : value;

    function open(name) {
      group = data[name];
      columns = group.columns.map(([skill, metric, suite], at) => ({at, skill, metric, suite, held: haystack(skill)}));
      rows = group.rows.map(([name, version, path, base], at) => (
        {at, name, version, path, base, held: haystack(name), cells: new Map(group.cells[at].map(cell => [cell[0], cell]))}));
      const bases = [...new Set(rows.map(row => row.base))].sort((a, b) => a.localeCompare(b, "en"));
      $("base").replaceChildren(new Option("any", ""), ...bases.map(base => new Option(base, base)));
      $("base-label").hidden = bases.length < 2;
      const orders = [["like", "by likeness"], ["mean", "by mean"], ["name", "by name"]];
      $("order").replaceChildren(...orders.slice(group.like && group.like_columns ? 0 : 1).map(([value, text]) => new Option(text, value)));
      byColumn = -1;
      arrange();
    }

    function arrange() {
      const asked = words($("find").value), base = $("base").value;
      order = $("order").value;
      shownRows = rows.filter(row => !base || row.base === base);
      const rowsFound = asked.length ? shownRows.filter(row => holds(row.held, asked)) : shownRows;
      const columnsFound = asked.length ? columns.filter(column => holds(column.held, asked)) : columns;
      const nothing = !rowsFound.length && !columnsFound.length;
      if (rowsFound.length || nothing) shownRows = rowsFound;
      shownColumns = columnsFound.length ? columnsFound : nothing ? [] : columns;
      const used = new Set(shownRows.flatMap(row => [...row.cells.keys()]));
      shownColumns = shownColumns.filter(column => used.has(column.at));
      if (asked.length && !rowsFound.length) { // a skill was asked for: experts that have it
        shownRows = shownRows.filter(row => shownColumns.some(column => row.cells.has(column.at)));
      }
      for (const row of shownRows) row.mean = meanOf(shownColumns.map(column => row.cells.get(column.at)).filter(Boolean));
      for (const column of shownColumns) column.mean = meanOf(shownRows.map(row => row.cells.get(column.at)).filter(Boolean));
      if (order === "like") {
        const place = list => new Map(list.map((at, index) => [at, index]));
        const r = place(group.like), c = place(group.like_columns);
        shownRows.sort((a, b) => r.get(a.at) - r.get(b.at));
        shownColumns.sort((a, b) => c.get(a.at) - c.get(b.at));
      } else if (order === "mean") {
        shownRows = ranked(shownRows, row => bestFirst(row.mean));
        shownColumns = ranked(shownColumns, column => bestFirst(column.mean));
      }
      if (!shownColumns.some(column => column.at === byColumn)) byColumn = -1;
      if (byColumn >= 0) {
        const value = row => row.cells.has(byColumn) ? valueOf(row.cells.get(byColumn)) : -9;
        shownRows = ranked(shownRows, value);
      }
      active = [0, 0];
      scale();
      draw();
    }

    // Every metric has a scale of its own: from 0 to 1 (gains: half a point to both sides), or stretched to what occurs.
    let reach;
    function scale() {
      reach = new Map();
      for (const column of shownColumns) {
        const held = reach.get(column.metric) ?? {low: Infinity, high: -Infinity};
        for (const row of shownRows) {
          const cell = row.cells.get(column.at);
          if (cell) { held.low = Math.min(held.low, valueOf(cell)); held.high = Math.max(held.high, valueOf(cell)); }
        }
        reach.set(column.metric, held);
      }
      for (const held of reach.values()) {
        if (gaining()) {
          const most = $("stretch").checked ? Math.max(Math.abs(held.low), Math.abs(held.high), 0.01) : GAIN_REACH;
          [held.low, held.high] = [-most, most];
        } else if (!$("stretch").checked) [held.low, held.high] = [Math.min(0, held.low), Math.max(1, held.high)];
      }
      const byEnds = new Map();
      for (const [metric, {low, high}] of [...reach].sort(([a], [b]) => a < b ? -1 : 1)) {
        const ends = gaining() ? [signed(low), "0", signed(high)] : [hundredths(low), hundredths(high)];
        if (gaining() && !$("stretch").checked) { ends[0] = `≤ ${ends[0]}`; ends[2] = `≥ ${ends[2]}`; }
        const key = ends.join("|");
        byEnds.set(key, {ends, metrics: [...(byEnds.get(key)?.metrics ?? []), metric]});
      }
      const ramps = [...byEnds.values()].slice(0, 6).map(({ends, metrics}) => {
        const ramp = node("div", {kind: "ramp"}, ...Array.from({length: 9}, (_, step) => node("i", {kind: (gaining() ? "d" : "s") + step})));
        const names = metrics.length > 8 ? `${metrics.slice(0, 7).join(", ")} and ${metrics.length - 7} more` : metrics.join(", ");
        return node("div", {}, node("span", {kind: "ramp-name"}, bdi(names)), ramp, node("div", {kind: "ramp-ends"}, ...ends.map(text => node("span", {text}))));
      });
      const missing = node("div", {kind: "key"}, node("i", {kind: "none"}), node("span", {text: "not scored"}));
      const unit = node("div", {kind: "key"}, node("span", {text: gaining() ? "numbers: gain in hundredths" : "numbers: score in hundredths"}));
      $("legend").replaceChildren(...ramps, missing, unit);
    }

    function step(cell, metric) {
      const {low, high} = reach.get(metric);
      const share = high > low ? (valueOf(cell) - low) / (high - low) : 0.5;
      return (gaining() ? "d" : "s") + Math.min(8, Math.max(0, Math.floor(9 * share)));
    }

    function draw() {
      const heads = shownColumns.map(column => {
        const button = node("button", {type: "button", title: `${column.skill} · ${column.metric} · ${column.suite}`}, node("span", {}, bdi(column.skill)));
        button.addEventListener("click", () => { byColumn = byColumn === column.at ? -1 : column.at; arrange(); });
        const head = node("th", {scope: "col"}, button);
        if (column.at === byColumn) head.setAttribute("aria-sort", "descending");
        return head;
      });
      const corner = node("th", {scope: "col", text: "Expert"});
      const mean = node("th", {scope: "col", kind: "mean"}, node("button", {type: "button", title: "mean of the cells shown"}, node("span", {text: "mean of these"})));
      mean.firstElementChild.addEventListener("click", () => { byColumn = -1; $("order").value = "mean"; arrange(); });
      table = node("table", {kind: shownColumns.length <= 10 ? "heat roomy" : "heat", role: "grid", "aria-label": "Scores of experts by skill", "aria-rowcount": shownRows.length + 1, "aria-colcount": shownColumns.length + 2},
        node("thead", {}, node("tr", {"aria-rowindex": 1}, corner, ...heads, mean)), node("tbody"));
      scroll.replaceChildren(table);
      $("count").textContent = shownRows.length && shownColumns.length
        ? `${counted(shownRows.length)} expert${shownRows.length === 1 ? "" : "s"} × ${counted(shownColumns.length)} ${$("group").value.slice(0, -1)}${shownColumns.length === 1 ? "" : "s"}`
        : "Nothing matches.";
      scroll.scrollTop = 0;
      first = last = -1;
      fill();
    }

    function fill(all = false) {
      const height = scroll.clientHeight || 600;
      const top = Math.max(0, Math.floor(scroll.scrollTop / ROW_HEIGHT));
      const seen = Math.ceil(height / ROW_HEIGHT);
      let from = Math.max(0, top - OVERSCAN), to = Math.min(shownRows.length, top + seen + OVERSCAN);
      if (all || shownRows.length <= 60) [from, to] = [0, shownRows.length];
      if (from === first && to === last) return;
      if (first >= 0 && !all && Math.abs(from - first) < OVERSCAN / 2 && top >= first && top + seen <= last) return;
      [first, last] = [from, to];
      const focused = document.activeElement?.closest?.("td[data-r]");
      const spacer = (kind, count) => {
        const cell = node("td", {colspan: shownColumns.length + 2});
        cell.style.height = `${count * ROW_HEIGHT}px`;
        return node("tr", {kind: "spacer", "aria-hidden": "true"}, cell);
      };
      const body = [];
      if (from) body.push(spacer("above", from));
      for (let r = from; r < to; r += 1) body.push(rowOf(shownRows[r], r));
      if (to < shownRows.length) body.push(spacer("below", shownRows.length - to));
      table.tBodies[0].replaceChildren(...body);
      rove();
      if (focused) (cellAt(...active) ?? scroll).focus({preventScroll: true});
    }

    function rowOf(row, r) {
      const cells = shownColumns.map((column, c) => {
        const cell = row.cells.get(column.at);
        const made = node("td", {tabindex: "-1", "data-r": r, "data-c": c, kind: cell ? step(cell, column.metric) : "none"});
        if (cell) made.textContent = gaining() ? signed(valueOf(cell)) : hundredths(valueOf(cell));
        made.setAttribute("aria-label", spoken(row, column, cell));
        return made;
      });
      const mean = node("td", {kind: "mean", text: Number.isNaN(row.mean) ? "" : gaining() ? signed(row.mean) : hundredths(row.mean)});
      const name = node("th", {scope: "row", title: `${row.name}@${row.version}`}, node("a", {href: row.path}, bdi(row.name)));
      return node("tr", {"aria-rowindex": r + 2}, name, ...cells, mean);
    }

    function spoken(row, column, cell) {
      if (!cell) return `${column.skill}: not scored`;
      const [, own, base] = cell;
      return `${column.skill}: ${three(own[0])}, interval ${three(own[1])} to ${three(own[2])}, ${own[3]} items; base ${three(base[0])}`;
    }

    const cellAt = (r, c) => table.querySelector(`td[data-r="${r}"][data-c="${c}"]`);
    function rove() {
      for (const cell of table.querySelectorAll("td[tabindex='0']")) cell.tabIndex = -1;
      const cell = cellAt(...active) ?? table.querySelector("td[data-r]");
      if (cell) cell.tabIndex = 0;
    }

    function explain(cell) {
      const row = shownRows[cell.dataset.r], column = shownColumns[cell.dataset.c], found = row.cells.get(column.at);
      const title = node("b", {}, bdi(`${row.name}@${row.version}`));
      const about = node("div", {kind: "muted"}, bdi(`${column.skill} · ${column.metric} · ${column.suite}`));
      if (!found) { tip.replaceChildren(title, about, node("div", {text: "not scored"})); } else {
        const [, own, base] = found;
        const line = (label, text) => node("tr", {}, node("td", {text: label}), node("td", {text}));
        const told = interval => `${three(interval[0])}  [${three(interval[1])}, ${three(interval[2])}]`;
        tip.replaceChildren(title, about, node("table", {}, node("tbody", {},
          line("score", told(own)), line("base", told(base)), line("gain", `${signed(own[0] - base[0], 1)} hundredths`),
          line("items", own[3] === base[3] ? counted(own[3]) : `${counted(own[3])}, base ${counted(base[3])}`),
        )), node("div", {text: `Against the base: ${verdict(own, base)}.`}));
      }
      const at = cell.getBoundingClientRect(), box = tip.getBoundingClientRect();
      const below = at.bottom + 8 + box.height < innerHeight;
      tip.style.transform = `translate(${Math.max(8, Math.min(at.left + at.width / 2 - box.width / 2, innerWidth - box.width - 8))}px, ${Math.max(8, below ? at.bottom + 8 : at.top - box.height - 8)}px)`;
      tip.classList.add("on");
    }
    const hush = () => tip.classList.remove("on");
    let hushed = null; // the cell whose explanation was sent away: no scrolling brings it back

    function move(event) {
      const steps = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], PageUp: [-15, 0], PageDown: [15, 0], Home: [0, -1e9], End: [0, 1e9]};
      if (event.key === "Escape") { hushed = document.activeElement; return hush(); }
      const by = steps[event.key];
      if (!by || event.target.closest("thead, tbody th") || !shownRows.length) return;
      event.preventDefault();
      const clip = (value, most) => Math.max(0, Math.min(value, most - 1));
      active = [clip(active[0] + by[0], shownRows.length), clip(active[1] + by[1], shownColumns.length)];
      const head = table.tHead.offsetHeight, top = active[0] * ROW_HEIGHT;
      if (top < scroll.scrollTop) scroll.scrollTop = top;
      else if (top + ROW_HEIGHT + head > scroll.scrollTop + scroll.clientHeight) scroll.scrollTop = top + ROW_HEIGHT + head - scroll.clientHeight + 2;
      fill();
      rove();
      const cell = cellAt(...active);
      cell.focus({preventScroll: true});
      scroll.style.scrollPadding = `${head}px 0 0 ${table.querySelector("thead th").offsetWidth}px`; // what the fixed headers hide is not in view
      cell.scrollIntoView({block: "nearest", inline: "nearest", behavior: "instant"});
    }

    const cellOf = event => event.target.closest?.("td[data-r]");
    scroll.tabIndex = -1;
    scroll.addEventListener("scroll", () => { // a move by key scrolls too: what it came to stays explained
      fill();
      const cell = document.activeElement?.closest?.("td[data-r]");
      if (cell && cell !== hushed) explain(cell); else hush();
    }, {passive: true});
    scroll.addEventListener("keydown", move);
    scroll.addEventListener("pointerover", event => { const cell = cellOf(event); if (cell) explain(cell); else hush(); });
    scroll.addEventListener("pointerleave", hush);
    scroll.addEventListener("focusin", event => {
      const cell = cellOf(event);
      if (!cell) return hush();
      active = [Number(cell.dataset.r), Number(cell.dataset.c)];
      hushed = null;
      rove();
      explain(cell);
    });
    scroll.addEventListener("focusout", hush);
    addEventListener("resize", () => fill());
    addEventListener("beforeprint", () => { if (shownRows.length <= 2000) fill(true); });
    const saved = ["show", "group", "order", "base", "find"];
    const changed = () => {
      arrange();
      keep({show: gaining() ? "gain" : "", group: $("group").selectedIndex ? $("group").value : "", order: $("order").selectedIndex ? order : "", base: $("base").value, find: $("find").value});
    };
    for (const input of document.querySelectorAll("input[name=show]")) input.addEventListener("change", changed);
    for (const id of ["base", "stretch"]) $(id).addEventListener("change", changed);
    $("order").addEventListener("change", () => { byColumn = -1; changed(); });
    $("group").addEventListener("change", () => { open($("group").value); changed(); });
    $("find").addEventListener("input", changed);
    $("heat-controls").addEventListener("submit", event => event.preventDefault());
    $("heat-controls").hidden = false;
    const state = hashState();
    if (state.show === "gain") document.querySelector("input[name=show][value=gain]").checked = true;
    if (groups.includes(state.group)) $("group").value = state.group;
    open($("group").value);
    for (const id of saved.slice(2)) if (state[id] && ($(id).tagName === "INPUT" || [...$(id).options].some(option => option.value === state[id]))) $(id).value = state[id];
    arrange();
  }

  // ── the comparison ──────────────────────────────────────────────────────────────────────────────────────────────

  function startCompare(data) {
    const versions = data.versions.map(([ref, latest, path, facts, cells]) => (
      {ref, latest, path, facts: new Map(facts), cells: new Map(cells.map(cell => [cell[0], cell])), held: haystack(ref)}));
    const byRef = new Map(versions.map(version => [version.ref, version]));
    for (const version of versions) if (version.latest) byRef.set(version.ref.replace(/@\d+$/, ""), version);
    const both = () => ["a", "b"].map(id => byRef.get($(id).value.trim()));

    function suggest(text) {
      const asked = words(text), found = [];
      for (const version of versions) {
        if (holds(version.held, asked)) found.push(new Option("", version.ref));
        if (found.length === 40) break;
      }
      $("versions").replaceChildren(...found);
    }

    function chart(intervals) {
      const svg = document.createElementNS(SVG, "svg");
      for (const [name, value] of [["class", "interval"], ["width", "100%"], ["height", "26"], ["aria-hidden", "true"]]) svg.setAttribute(name, value);
      const draw = (tag, values) => {
        const made = document.createElementNS(SVG, tag);
        for (const [name, value] of Object.entries(values)) made.setAttribute(name, value);
        svg.append(made);
      };
      const at = value => `${100 * Math.min(1, Math.max(0, value))}%`;
      for (const x of [0, 0.5, 1]) draw("line", {class: "grid", x1: at(x), x2: at(x), y1: 0, y2: 26});
      intervals.forEach((interval, index) => {
        if (!interval) return;
        const kind = index ? "of-second" : "of-expert", y = index ? 18 : 8;
        draw("line", {class: kind, x1: at(interval[1]), x2: at(interval[2]), y1: y, y2: y});
        draw("circle", {class: kind, cx: at(interval[0]), cy: y, r: index ? 3.5 : 4.5});
      });
      return svg;
    }

    function scores(one, other) {
      const shared = at => one.cells.has(at) && other.cells.has(at);
      const distance = at => shared(at) ? Math.abs(one.cells.get(at)[1][0] - other.cells.get(at)[1][0]) : -1;
      const columns = [...new Set([...one.cells.keys(), ...other.cells.keys()])].sort((a, b) => distance(b) - distance(a) || a - b);
      if (!columns.length) return node("section", {}, node("p", {kind: "empty", text: "Neither has a profile."}));
      const tally = {first: 0, second: 0, unclear: 0, alone: 0};
      const lines = columns.map(at => {
        const [skill, metric, suite] = data.columns[at];
        const [mine, theirs] = [one, other].map(version => version.cells.get(at)?.[1]);
        const head = node("th", {scope: "row"}, bdi(skill), " ", node("span", {kind: "metric", title: suite, text: metric}));
        const told = interval => interval
          ? node("td", {kind: "n"}, three(interval[0]), " ", node("span", {kind: "range", text: `${three(interval[1])}–${three(interval[2])}`}))
          : node("td", {kind: "n", text: "–"});
        let said = `scored for the ${mine ? "first" : "second"} only`, difference = "", n = (mine ?? theirs)[3];
        if (mine && theirs) {
          const words = verdict(mine, theirs);
          const clear = words.endsWith("beyond both intervals");
          said = words.startsWith("better") ? `first ${words}` : words.startsWith("worse") ? `second ${words.replace("worse", "better")}` : words;
          difference = signed(mine[0] - theirs[0], 1);
          tally[!clear ? "unclear" : words.startsWith("better") ? "first" : "second"] += 1;
          if (mine[3] !== theirs[3]) n = `${counted(mine[3])}, ${counted(theirs[3])}`;
        } else tally.alone += 1;
        return node("tr", mine && theirs ? {} : {kind: "alone"}, head, node("td", {kind: "chart-cell"}, chart([mine, theirs])), told(mine), told(theirs),
          node("td", {kind: "n strong", text: difference}), node("td", {kind: "n", text: typeof n === "number" ? counted(n) : n}), node("td", {kind: "verdict", text: said}));
      });
      const title = (text, kind) => node("th", {scope: "col", text, ...(kind ? {kind} : {})});
      const axis = node("th", {scope: "col", kind: "axis-head"}, node("span", {kind: "axis-ends", "aria-hidden": "true"}, ...["0", "0.5", "1"].map(text => node("span", {text}))));
      const table = node("table", {kind: "profile"},
        node("thead", {}, node("tr", {}, title("Skill"), axis, title("First", "n"), title("Second", "n"), title("Difference", "n"), title("n", "n"), title("In words"))),
        node("tbody", {}, ...lines));
      const figure = (label, value) => node("div", {}, node("dt", {text: label}), node("dd", {text: String(value)}));
      const sums = node("dl", {kind: "tally"}, figure("first better, beyond both intervals", tally.first), figure("second better, beyond both intervals", tally.second),
        figure("not told apart", tally.unclear), ...(tally.alone ? [figure("scored for one only", tally.alone)] : []));
      const legend = node("p", {kind: "legend"}, node("span", {}, node("i"), bdi(one.ref)), node("span", {}, node("i", {kind: "of-second"}), bdi(other.ref)), node("span", {text: "bars are 95 % intervals; differences in hundredths"}));
      return node("section", {}, node("h2", {text: "Skill by skill"}), sums, legend, node("div", {kind: "scroll", role: "region", "aria-label": "Skill by skill", tabindex: "0"}, table));
    }

    function facts(one, other) {
      const names = [...new Set([...one.facts.keys(), ...other.facts.keys()])];
      const lines = names.map(name => {
        const [mine, theirs] = [one, other].map(version => version.facts.get(name) ?? "–");
        return node("tr", mine === theirs ? {} : {kind: "differs"}, node("th", {scope: "row", text: name}), node("td", {}, bdi(mine)), node("td", {}, bdi(theirs)));
      });
      const head = version => node("th", {scope: "col"}, node("a", {href: `${version.path}#v${version.ref.split("@").at(-1)}`}, bdi(version.ref)));
      const table = node("table", {kind: "two"}, node("thead", {}, node("tr", {}, node("th", {scope: "col", text: "What differs is bold"}), head(one), head(other))), node("tbody", {}, ...lines));
      return node("section", {}, node("h2", {text: "Facts side by side"}), node("div", {kind: "scroll", role: "region", "aria-label": "Facts side by side", tabindex: "0"}, table));
    }

    function show() {
      const [one, other] = both(), parts = [];
      const unknown = ["a", "b"].map(id => $(id).value.trim()).filter(text => text && !byRef.has(text));
      for (const text of unknown) parts.push(node("section", {kind: "warning"}, node("p", {}, "There is no expert ", bdi(text), " here.")));
      if (one && other) {
        const [first, second] = [one, other].map(version => version.facts.get("base model"));
        if (one === other) parts.push(node("section", {}, node("p", {kind: "empty", text: "That is one and the same version."})));
        if (first !== second) parts.push(node("section", {kind: "warning"}, node("p", {}, "They belong to different base models, ", bdi(first ?? "?"), " and ", bdi(second ?? "?"), ": what differs may be the base's.")));
        parts.push(scores(one, other), facts(one, other));
      } else if (!unknown.length) parts.push(node("section", {}, node("p", {kind: "empty", text: one || other ? "Choose a second expert." : "Choose two experts above; their names are offered as you type."})));
      $("comparison").replaceChildren(...parts);
      document.title = one && other ? `${one.ref} beside ${other.ref}` : "Compare";
    }

    const changed = () => { show(); keep({a: $("a").value.trim(), b: $("b").value.trim()}); };
    for (const id of ["a", "b"]) {
      $(id).addEventListener("input", () => { suggest($(id).value); if (byRef.has($(id).value.trim()) || !$(id).value) changed(); });
      $(id).addEventListener("change", changed);
      $(id).addEventListener("focus", () => suggest($(id).value));
    }
    $("swap").addEventListener("click", () => { [$("a").value, $("b").value] = [$("b").value, $("a").value]; changed(); });
    $("pair").addEventListener("submit", event => event.preventDefault());
    const restore = () => { const state = hashState(); for (const id of ["a", "b"]) $(id).value = state[id] ?? ""; show(); };
    addEventListener("hashchange", restore);
    $("pair").hidden = false;
    restore();
  }

  // ── every page ──────────────────────────────────────────────────────────────────────────────────────────────────

  const page = document.body.dataset.page, held = $("data");
  if (held) ({index: startIndex, heat: startHeat, compare: startCompare})[page]?.(JSON.parse(held.textContent));
  const closed = [];
  addEventListener("beforeprint", () => { for (const part of document.querySelectorAll("details:not([open])")) { part.open = true; closed.push(part); } });
  addEventListener("afterprint", () => { for (const part of closed.splice(0)) part.open = false; });
})();
