"use strict";
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (selector, from) => (from || document).querySelector(selector);
  const all = (selector, from) => [...(from || document).querySelectorAll(selector)];

  function add(parent, name, attributes, text) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    return parent.appendChild(node);
  }

  function html(name, attributes, text) {
    const node = document.createElement(name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    return node;
  }

  // ----- theme: automatic, light, dark -------------------------------------------------------------------------------

  const themes = ["auto", "light", "dark"], themeButton = document.getElementById("theme");
  function setTheme(theme) {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    find("span", themeButton).textContent = theme;
    themeButton.setAttribute("aria-label", "Colour theme: " + (theme === "auto" ? "automatic" : theme));
  }
  function remembered(theme) {  // some browsers refuse storage to file:// pages
    try {
      if (theme) localStorage.setItem("theme", theme);
      return localStorage.getItem("theme");
    } catch (error) { return null; }
  }
  let theme = themes.includes(remembered()) ? remembered() : "auto";
  setTheme(theme);
  themeButton.addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    setTheme(theme);
    remembered(theme);
  });

  // ----- charts: a frame with axes, redrawn when its width changes ----------------------------------------------------

  const niceTicks = (low, high, count) => {
    const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
    const step = power * [1, 2, 2.5, 5, 10].find(m => m * power >= raw), ticks = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) ticks.push(+(i * step).toPrecision(12));
    return ticks;
  };

  // axis: {low, high, log, ticks: [[value, text]], name}. Returns {svg, x, y, plot, width, height} in pixels of the viewBox.
  function frame(host, label, x, y, height, title) {
    const width = Math.max(280, host.clientWidth), left = 56, right = 18, top = title ? 34 : 16, bottom = 40;
    host.textContent = "";
    const svg = add(host, "svg", {viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": label});
    const place = (axis, from, to) => value => {
      const f = v => axis.log ? Math.log(v) : v;
      return from + (to - from) * (f(value) - f(axis.low)) / (f(axis.high) - f(axis.low) || 1);
    };
    const px = place(x, left, width - right), py = place(y, height - bottom, top);
    if (title) add(svg, "text", {x: left, y: 20, class: "title"}, title);
    for (const [value, text] of y.ticks) {
      add(svg, "line", {class: "grid", x1: left, x2: width - right, y1: py(value), y2: py(value)});
      add(svg, "text", {x: left - 8, y: py(value) + 4, "text-anchor": "end"}, text);
    }
    let free = -1e9;  // leave out names that would touch
    for (const [value, text] of x.ticks) {
      add(svg, "line", {class: "grid", x1: px(value), x2: px(value), y1: top, y2: height - bottom});
      if (px(value) - free > 9 + 7 * text.length) {
        const last = px(value) > width - right - 4 * text.length;
        add(svg, "text", {x: px(value), y: height - bottom + 17, "text-anchor": last ? "end" : "middle"}, text);
        free = px(value);
      }
    }
    add(svg, "line", {class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom});
    if (x.name) add(svg, "text", {x: width - right, y: height - 6, "text-anchor": "end"}, x.name);
    if (y.name) add(svg, "text", {x: left + 6, y: top + 10}, y.name);
    const clip = "clip" + (frame.count = (frame.count || 0) + 1);
    const inside = {x: left, y: top, width: width - left - right, height: height - top - bottom};
    add(add(svg, "clipPath", {id: clip}), "rect", inside);
    return {svg, x: px, y: py, plot: add(svg, "g", {"clip-path": `url(#${clip})`}), width, height};
  }

  const drawings = new Map();
  const observer = new ResizeObserver(entries => {
    for (const {target} of entries) if (drawings.get(target).width !== target.clientWidth) redraw(target);
  });
  function redraw(host) {
    const drawing = drawings.get(host);
    drawing.width = host.clientWidth;
    drawing.draw(host);
  }
  function drawn(host, draw) {
    drawings.set(host, {draw, width: 0});
    redraw(host);
    observer.observe(host);
  }

  // ----- worth table: scale and order ---------------------------------------------------------------------------------

  const worthControls = document.getElementById("worth-controls");
  if (worthControls) worthControls.addEventListener("change", event => {
    for (const panel of all("#worth .panel")) panel.hidden = panel.dataset.scale !== event.target.value;
  });
  for (const button of all(".worth thead button")) button.addEventListener("click", () => {
    const column = button.dataset.sort, header = button.closest("th"), inTable = button.closest("table");
    const byRecord = column === "record";
    const up = header.getAttribute("aria-sort") === (byRecord ? "ascending" : "descending");
    for (const th of all("th[aria-sort]", inTable)) th.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", byRecord !== up ? "ascending" : "descending");
    for (const body of all("tbody", inTable)) {
      const ranked = body.dataset.group === "resolved";  // the other groups have no order but the records'
      const rows = all("tr:not(.group)", body), order = row => +row.dataset.order;
      if (!byRecord && !ranked) continue;
      rows.sort((a, b) => {
        if (byRecord) return (up ? -1 : 1) * (order(a) - order(b));
        const has = [a, b].map(row => row.dataset[column] !== undefined);
        if (!has[0] || !has[1]) return has[1] - has[0] || order(a) - order(b);
        return (up ? -1 : 1) * (b.dataset[column] - a.dataset[column]);
      });
      body.append(...rows);
    }
  });

  // ----- history ------------------------------------------------------------------------------------------------------

  const timeText = minutes => minutes >= 1 ? +minutes.toPrecision(4) + " min" : +(60 * minutes).toPrecision(3) + " s";
  const historyControls = document.getElementById("history-controls");
  const points = data.history.map(([ref, day, minutes, title, people, status, scope, here, kind, note]) => (
    {ref, day, minutes, title, people, status, scope, here, kind, note, time: Date.parse(day), track: ref.split("/")[0]}));
  const states = {full: "rerun here at full scale", here: "runs here as a delta", absent: "not here yet"};
  let chosen = 0;

  function drawHistory(host) {
    const on = name => historyControls.elements[name]?.checked;
    const shown = points.filter(p => on(p.track) && (p.status !== "claim" || on("claims")));
    if (!shown.length) { host.textContent = "Nothing is chosen above."; return; }
    const times = shown.map(p => p.time), minutes = shown.map(p => p.minutes), days = 86400000;
    const years = [], low = Math.min(...times) - 20 * days, high = Math.max(...times) + 20 * days;
    for (let year = 2024; year < 2100 && Date.UTC(year) < high; year++) for (const month of [0, 3, 6, 9]) {
      const t = Date.UTC(year, month);
      if (t > low && t < high) years.push([t, month ? ["", "Apr", "Jul", "Oct"][month / 3] : String(year)]);
    }
    const bottom = Math.min(...minutes) / 1.25, top = Math.max(...minutes) * 1.2;
    const ticks = [300, 100, 45, 20, 10, 5, 3, 2, 1, 40 / 60, 20 / 60, 10 / 60, 5 / 60].filter(t => t > bottom && t < top);
    const chart = frame(host, "Published minutes over date; use the arrow keys to go through the records",
      {low, high, ticks: years}, {low: bottom, high: top, log: true, ticks: ticks.map(t => [t, timeText(t)])},
      host.clientWidth < 600 ? 340 : 430);
    for (const track of new Set(shown.map(p => p.track))) {
      let path = "";
      for (const p of shown.filter(p => p.track === track && p.status === "record")) {
        const x = chart.x(p.time).toFixed(1), y = chart.y(p.minutes).toFixed(1);
        path += path ? `H${x}V${y}` : `M${x} ${y}`;
      }
      add(chart.plot, "path", {class: "track " + track, d: path});
    }
    const marks = shown.map((p, i) => {
      const x = chart.x(p.time), y = chart.y(p.minutes);
      const shape = p.status === "claim" ? (p.scope === "retrieval" ? "l5 9h-10z" : "l5 5l-5 5l-5 -5z") : "";
      const node = shape ? add(chart.svg, "path", {d: `M${x} ${y - 5}${shape}`})
        : p.status === "retiming" ? add(chart.svg, "rect", {x: x - 3.5, y: y - 3.5, width: 7, height: 7})
        : add(chart.svg, "circle", {cx: x, cy: y, r: 4});
      node.setAttribute("class", `mark ${p.here} ${p.track} ${p.status}`);
      node.setAttribute("role", "button");
      node.setAttribute("tabindex", "-1");
      node.setAttribute("aria-label", `${p.ref}, ${p.day}, ${timeText(p.minutes)}, ${p.title}`);
      for (const type of ["click", "pointerenter", "focus"]) node.addEventListener(type, () => choose(i));
      return node;
    });
    function choose(i) {
      marks[chosen] && marks[chosen].classList.remove("chosen");
      chosen = i;
      marks.forEach((m, k) => m.setAttribute("tabindex", k === i ? "0" : "-1"));
      marks[i].classList.add("chosen");
      const p = shown[i], status = p.status === "record" ? "" : `, ${p.status}`;
      const note = p.note ? ` ${p.note[0].toUpperCase()}${p.note.slice(1)}.` : "";
      const out = document.getElementById("history-readout");
      out.textContent = "";
      out.append(html("b", {}, `${p.ref}: ${timeText(p.minutes)}`),
        `, ${p.day}. ${p.title}. By ${p.people}. Kind ${p.kind}${status}; ${states[p.here]}.${note}`);
    }
    chosen = Math.min(chosen, marks.length - 1);
    marks[chosen].setAttribute("tabindex", "0");
    chart.svg.addEventListener("keydown", event => {
      const step = {ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1}[event.key];
      if (!step) return;
      event.preventDefault();
      marks[(chosen + step + marks.length) % marks.length].focus();
    });
  }
  drawn(document.getElementById("history-chart"), drawHistory);
  historyControls.addEventListener("change", () => redraw(document.getElementById("history-chart")));

  // ----- curves -------------------------------------------------------------------------------------------------------

  const curves = data.published.map(c => ({...c, scale: "full", kind: "published"}));
  curves.push(...data.runs.map(r => ({...r, kind: "here"})));
  const curveRefs = data.settings.records.map(r => r.ref).filter(ref => curves.some(c => c.ref === ref));
  const hue = ref => curveRefs.length < 2 ? 0 : curveRefs.indexOf(ref) / (curveRefs.length - 1);
  const every = Math.ceil(curveRefs.length / 6);  // at first about seven curves, evenly chosen
  const visible = new Set(curveRefs.filter((ref, i) => i % every === 0 || i === curveRefs.length - 1));
  const order = ["full", "small", "tiny", "micro"], scales = order.filter(s => curves.some(c => c.scale === s));
  const axisOf = () => +find("#curves-controls input:checked").value;
  const nameOf = ref => ref.replace(/^short\//, "");

  function drawCurves(host) {
    const scale = host.dataset.scale, axis = axisOf();
    const mine = curves.filter(c => c.scale === scale && visible.has(c.ref))
      .map(c => ({...c, points: c.points.filter(p => p[axis] !== null)}));
    const shown = mine.filter(c => c.points.length > 1), without = mine.filter(c => c.points.length <= 1);
    const rerun = curves.some(c => c.scale === "full" && c.kind === "here") ? " and rerun here" : "";
    const title = scale === "full" ? "Published, full scale (dashed)" + rerun : `Run here, scale ${scale}`;
    host.style.padding = shown.length ? "" : "1rem";
    if (!shown.length) {
      const busy = axis === 2 && mine.length && scale !== "full"
        ? " At this scale a time measures what else the machine was doing, and these runs did not take turns." : "";
      host.textContent = `${title}: no curve of the chosen records has this axis.` + busy;
      return;
    }
    const high = Math.max(...shown.map(c => c.points.at(-1)[axis])), losses = shown.map(c => c.points.at(-1)[3]);
    const early = shown.map(c => (c.points.find(p => p[axis] >= .07 * c.points.at(-1)[axis]) || c.points.at(-1))[3]);
    const bottom = Math.min(...losses), top = Math.max(...early), pad = .05 * (top - bottom) || .1;
    const tokens = high >= 2e9 ? [1e9, "billion tokens"] : high >= 2e6 ? [1e6, "million tokens"] : [1e3, "thousand tokens"];
    const unit = [[1, "steps"], tokens, high > 300000 ? [60000, "minutes"] : [1000, "seconds"]][axis];
    const ticks = niceTicks(0, high / unit[0], host.clientWidth < 500 ? 4 : 6).map(t => [t * unit[0], String(t)]);
    const levels = niceTicks(bottom - pad, top + pad, 6).map(t => [t, String(t)]);
    const chart = frame(host, `${title}: validation loss against ${unit[1]}`,
      {low: 0, high: high * 1.06, ticks, name: unit[1]}, {low: bottom - pad, high: top + pad, ticks: levels}, 360,
      host.clientWidth < 420 ? title : title + ", validation loss");
    const ends = [];
    for (const c of shown) {
      const path = c.points.map(p => `${chart.x(p[axis]).toFixed(1)} ${chart.y(p[3]).toFixed(1)}`);
      add(chart.plot, "path", {class: `curve ${c.kind}`, style: `--t:${hue(c.ref)}`, d: "M" + path.join("L")});
      const last = c.points.at(-1);
      ends.push({x: chart.x(last[axis]) + 4, y: chart.y(last[3]) + 4, ref: c.ref});
    }
    ends.sort((a, b) => a.y - b.y).forEach((end, i) => {  // names keep their order and 11 pixels of distance
      for (const above of ends.slice(0, i)) if (Math.abs(above.x - end.x) < 18) end.y = Math.max(end.y, above.y + 11);
      add(chart.svg, "text", {x: end.x, y: end.y, class: "curve-name", style: `--t:${hue(end.ref)}`}, nameOf(end.ref));
    });
    if (without.length) add(chart.svg, "text", {x: 64, y: chart.height - 6},
      `without ${["steps", "tokens", "times"][axis]}: ` + [...new Set(without.map(c => nameOf(c.ref)))].join(", "));
    const ring = add(chart.svg, "circle", {class: "probe", r: 5, cx: -20, cy: -20});
    for (const type of ["pointermove", "pointerdown"]) chart.svg.addEventListener(type, event => {
      const box = chart.svg.getBoundingClientRect(), k = chart.width / box.width;
      const at = [(event.clientX - box.left) * k, (event.clientY - box.top) * k];
      let best = null, distance = Infinity;
      for (const c of shown) for (const p of c.points) {
        const away = Math.hypot(chart.x(p[axis]) - at[0], chart.y(p[3]) - at[1]);
        if (away < distance) [best, distance] = [[c, p], away];
      }
      const [c, p] = best;
      ring.setAttribute("cx", chart.x(p[axis]));
      ring.setAttribute("cy", chart.y(p[3]));
      const out = document.getElementById("curves-readout");
      out.textContent = "";
      out.append(html("b", {}, `${c.ref}: loss ${p[3]}`), ` at step ${p[0].toLocaleString("en")}`,
        p[1] === null ? "" : `, ${p[1].toLocaleString("en")} tokens`, p[2] === null ? "" : `, ${(p[2] / 1000).toFixed(1)} s`,
        c.kind === "published" ? " (published)" : ` (scale ${c.scale}, seed ${c.seed}, ${c.where})`);
    });
  }

  const chips = document.getElementById("curves-chips"), curveHosts = [];
  function chipButton(text, pressed, action) {
    const button = html("button", {type: "button"}, "");
    if (pressed !== null) button.setAttribute("aria-pressed", pressed);
    button.append(text);
    button.addEventListener("click", action);
    return chips.appendChild(button);
  }
  function showCurves() {
    for (const button of all("[data-ref]", chips)) button.setAttribute("aria-pressed", visible.has(button.dataset.ref));
    curveHosts.forEach(redraw);
  }
  for (const ref of curveRefs) {
    const button = chipButton(nameOf(ref), visible.has(ref), () => {
      if (!visible.delete(ref)) visible.add(ref);
      showCurves();
    });
    const ends = curves.filter(c => c.ref === ref)
      .map(c => `${c.kind === "published" ? "published" : c.scale} ends at ${c.points.at(-1)[3]}`);
    button.dataset.ref = ref;
    button.style.setProperty("--t", hue(ref));
    button.setAttribute("aria-label", `${ref}, ${ends.join(", ")}`);
    button.prepend(html("i", {}));
  }
  if (curveRefs.length) {
    chipButton("all", null, () => { curveRefs.forEach(ref => visible.add(ref)); showCurves(); });
    chipButton("none", null, () => { visible.clear(); showCurves(); });
  } else document.getElementById("curves-charts").textContent = "No curve is committed yet.";
  for (const scale of scales) {
    const host = html("div", {class: "chart", "data-scale": scale});
    document.getElementById("curves-charts").append(host);
    curveHosts.push(host);
    drawn(host, drawCurves);
  }
  document.getElementById("curves-controls").addEventListener("change", showCurves);

  // ----- settings of two records --------------------------------------------------------------------------------------

  const records = new Map(data.settings.records.map(r => [r.ref, r]));
  function chainOf(ref) {
    const chain = [];
    for (let r = records.get(ref); r; r = records.get(r.parent)) chain.unshift(r);
    return chain;
  }
  function settingsOf(ref) {
    const values = {};
    for (const r of chainOf(ref)) for (const path in r.changes) values[path] = r.changes[path];
    return values;
  }
  function setterOf(ref, path) {
    const setters = chainOf(ref).filter(r => r.sets.some(p => p === path || path.startsWith(p + ".")));
    return setters.length ? setters.at(-1).ref : "";
  }
  const diffControls = document.getElementById("diff-controls"), {left, right, swap} = diffControls.elements;
  for (const select of [left, right]) {
    for (const r of records.values()) select.append(html("option", {value: r.ref}, `${r.ref}  ${r.title}`));
  }
  function showDiff() {
    const a = settingsOf(left.value), b = settingsOf(right.value), body = find("#diff-table tbody");
    const differ = Object.keys(data.settings.paths).filter(p => (a[p] ?? null) !== (b[p] ?? null));
    body.textContent = "";
    for (const path of differ) {
      const row = body.appendChild(html("tr", {})), name = row.appendChild(html("th", {scope: "row"}));
      const code = name.appendChild(html("code", {}));
      path.split(".").forEach((part, i) => code.append(...(i ? [".", html("wbr", {}), part] : [part])));
      name.append(html("small", {}, data.settings.paths[path]));
      for (const text of [a[path] ?? "off", b[path] ?? "off", setterOf(right.value, path)]) row.append(html("td", {}, text));
    }
    document.getElementById("diff-count").textContent = differ.length === 1 ? "One setting differs."
      : differ.length ? `${differ.length} settings differ.` : "No setting differs.";
  }
  if (records.size) {
    const refs = [...records.keys()].filter(ref => !ref.startsWith("variants/"));  // at first the last two of the lineage
    left.value = refs[Math.max(0, refs.length - 2)];
    right.value = refs.at(-1);
    diffControls.addEventListener("change", showDiff);
    swap.addEventListener("click", () => {
      [left.value, right.value] = [right.value, left.value];
      showDiff();
    });
    showDiff();
  }

  // ----- small scale against published --------------------------------------------------------------------------------

  for (const host of all(".scatter")) {
    const found = data.predictions.find(p => p.scale === host.dataset.scale)[host.dataset.key].points;
    const name = host.dataset.key === "records" ? "published: tokens saved, %" : "published: loss saved, nats";
    if (!found.length) {
      host.textContent = "No technique has both figures yet.";
      host.style.padding = "1rem";
      continue;
    }
    const range = values => {
      const low = Math.min(0, ...values), high = Math.max(0, ...values), pad = .1 * (high - low) || 1;
      return {low: low - pad, high: high + pad};
    };
    drawn(host, () => {
      const x = range(found.map(p => p.x)), y = range(found.map(p => p.y));
      const count = host.clientWidth < 400 ? 4 : 5, text = t => String(t).replace("-", "\u2212");
      const ticks = a => niceTicks(a.low, a.high, count).map(t => [t, text(t)]);
      const chart = frame(host, "Measured at small scale against published", {...x, ticks: ticks(x), name},
        {...y, ticks: ticks(y), name: "measured here: loss saved, nats"}, 320);
      add(chart.svg, "line", {class: "axis", x1: chart.x(0), x2: chart.x(0), y1: chart.y(y.low), y2: chart.y(y.high)});
      add(chart.svg, "line", {class: "axis", x1: chart.x(x.low), x2: chart.x(x.high), y1: chart.y(0), y2: chart.y(0)});
      for (const p of found) {
        const said = `${p.label} (${p.record}): published ${text(p.x.toPrecision(3))}, here ${text(p.y.toPrecision(3))}`;
        const spot = add(chart.svg, "circle", {class: p.resolved ? "spot" : "spot open", cx: chart.x(p.x), cy: chart.y(p.y),
          r: 4.5, tabindex: 0, role: "img", "aria-label": said + (p.resolved ? "" : ", unresolved")});
        add(spot, "title", {}, spot.getAttribute("aria-label"));
        const flip = chart.x(p.x) + 12 + 7.4 * p.tag.length > chart.width;
        const place = {x: chart.x(p.x) + (flip ? -8 : 8), y: chart.y(p.y) + 4, "text-anchor": flip ? "end" : "start"};
        add(chart.svg, "text", place, p.tag);
      }
    });
  }
})();
