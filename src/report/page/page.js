"use strict";
// Draws the page from the runs in #data. Columns of a run's `train`: step, tokens, seconds, loss, ...; of its
// `validation`: step, tokens, seconds, loss. A number that is not finite is null.

const runs = JSON.parse(document.getElementById("data").textContent);
// Okabe and Ito's colours; beyond six runs they come again.
const light = ["#0072b2", "#d55e00", "#009e73", "#b0578d", "#b47a00", "#3a8fc4"];
const dark = ["#56b4e9", "#ff8a4c", "#2fc79a", "#e39cc4", "#f0b93a", "#9ecdf0"];
const night = matchMedia("(prefers-color-scheme: dark)");
const color = (i) => (night.matches ? dark : light)[i % 6];

const AXES = { tokens: "tokens", flops: "training FLOPs", time: "time", step: "step" };
const CHARTS = [
  { key: "loss", title: "Loss", unit: "nats a token; dashed: held-out", validation: true },
  { key: "lr", title: "Learning rate" },
  { key: "grad_norm", title: "Gradient norm", unit: "before clipping" },
  { key: "update_norm", title: "Update norm" },
  { key: "tokens_per_second", title: "Throughput", unit: "tokens a second" },
  { key: "memory", title: "Memory", unit: "bytes" },
];
const state = { axis: "tokens", smooth: 0, logX: false, logY: false, from: null, to: null, hidden: new Set() };

// ---- numbers

function short(value) {
  if (value === null || value === undefined || !isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e3) {
    const group = Math.min(8, Math.floor(Math.log10(size * 1.0005) / 3));
    return (value / 1000 ** group).toPrecision(3) + " " + " kMGTPEZY"[group];
  }
  if (size < 1e-3) return value.toExponential(2).replace("e-", "e−");
  return String(+value.toPrecision(4));
}

function duration(seconds) {
  if (seconds === null || !isFinite(seconds)) return "–";
  const s = Math.round(seconds), two = (n) => String(n).padStart(2, "0");
  if (seconds < 60) return +seconds.toPrecision(3) + " s";
  if (s < 3600) return `${Math.floor(s / 60)}m ${two(s % 60)}s`;
  if (s < 86400) return `${Math.floor(s / 3600)}h ${two(Math.floor(s / 60) % 60)}m`;
  return `${Math.floor(s / 86400)}d ${two(Math.floor(s / 3600) % 24)}h`;
}

const onAxis = (value) => (state.axis === "time" ? duration(value) : short(value));

function ticks(low, high, log, count) {
  if (log && high / low > 5) {
    const found = [], each = Math.log10(high / low) > 3 ? [1] : [1, 2, 5];
    const every = Math.max(1, Math.ceil(Math.log10(high / low) / count));
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
      if (e % every === 0) for (const m of each) found.push(m * 10 ** e);
    return found.filter((v) => v >= low && v <= high);
  }
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.7);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(+(i * step).toPrecision(12));
  return found;
}

// ---- points

// The points of a run in one chart: [x, y], those that cannot be drawn left out.
function points(run, part, key) {
  const table = run[part];
  const x = state.axis === "flops" ? table.tokens.map((t) => t * run.flops_per_token)
    : table[state.axis === "time" ? "seconds" : state.axis];
  const found = [];
  (table[key] || []).forEach((y, i) => {
    if (y === null || x[i] === null || (state.logY && y <= 0) || (state.logX && x[i] <= 0)) return;
    found.push([x[i], y]);
  });
  return found;
}

// An exponential mean, without the pull of its first value (Adam's correction). The weight is that of the value before.
function smoothed(line) {
  if (state.smooth === 0) return line;
  let mean = 0, weight = 1;
  return line.map(([x, y]) => {
    mean = state.smooth * mean + (1 - state.smooth) * y;
    weight *= state.smooth;
    return [x, mean / (1 - weight)];
  });
}

// ---- charts

const NS = "http://www.w3.org/2000/svg";
function draw(parent, name, attributes, text) {
  const element = document.createElementNS(NS, name);
  for (const key in attributes) element.setAttribute(key, attributes[key]);
  if (text !== undefined) element.textContent = text;
  return parent.appendChild(element);
}

function html(parent, name, text, attributes) {
  const element = document.createElement(name);
  if (text !== undefined && text !== null) element.textContent = text;
  for (const key in attributes || {}) element.setAttribute(key, attributes[key]);
  return parent.appendChild(element);
}

const seen = () => runs.map((run, i) => ({ run, i })).filter(({ i }) => !state.hidden.has(i));

class Chart {
  constructor(about, place) {
    this.about = about;
    this.figure = html(place, "figure", null, { class: "card", id: "chart-" + about.key });
    const caption = html(this.figure, "figcaption", about.title);
    if (about.unit) html(caption, "small", about.unit);
    this.svg = draw(this.figure, "svg", { role: "img", "aria-label": about.title });
    this.svg.addEventListener("pointerdown", (e) => { if (e.pointerType === "mouse") this.start = this.unplace(e); });
    this.svg.addEventListener("pointermove", (e) => this.point(e));
    this.svg.addEventListener("pointerup", (e) => this.release(e));
    this.svg.addEventListener("pointerleave", () => this.leave());
    this.svg.addEventListener("dblclick", () => zoom(null, null));
  }

  paint() {
    const width = Math.max(260, this.figure.clientWidth - 24), high = this.about.key === "loss" ? 340 : 210;
    this.box = { left: 58, right: width - 12, top: 8, bottom: high - 40 };
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${width} ${high}`);
    this.lines = this.collect();
    const all = this.lines.flatMap((line) => line.points);
    const { from, to } = state;
    const inside = all.filter(([x]) => (from === null || x >= from) && (to === null || x <= to));
    const { left, right, top, bottom } = this.box;
    if (inside.length === 0) {
      draw(this.svg, "text", { x: width / 2, y: high / 2, "text-anchor": "middle" }, "nothing to draw");
      this.x = null;
      return;
    }
    this.x = this.scale(inside.map((p) => p[0]), state.logX, left, right, 0, [state.from, state.to]);
    this.y = this.scale(inside.map((p) => p[1]), state.logY, bottom, top, 0.05, [null, null]);
    for (const value of ticks(this.y.low, this.y.high, state.logY, high / 50)) {
      const y = this.y.place(value);
      draw(this.svg, "path", { class: "grid", d: `M${left} ${y}H${right}` });
      draw(this.svg, "text", { x: left - 6, y: y + 4, "text-anchor": "end" }, short(value));
    }
    for (const value of ticks(this.x.low, this.x.high, state.logX, width / 110)) {
      const x = this.x.place(value);
      draw(this.svg, "path", { class: "grid", d: `M${x} ${top}V${bottom}` });
      draw(this.svg, "text", { x, y: bottom + 16, "text-anchor": "middle" }, onAxis(value));
    }
    draw(this.svg, "path", { class: "axis", d: `M${left} ${top}V${bottom}H${right}` });
    draw(this.svg, "text", { x: (left + right) / 2, y: bottom + 34, "text-anchor": "middle" }, AXES[state.axis]);
    const window = draw(this.svg, "svg", { x: left, y: top, width: right - left, height: bottom - top });
    window.setAttribute("viewBox", `${left} ${top} ${right - left} ${bottom - top}`);
    for (const { points, look, color } of this.lines) {
      const at = points.map(([x, y]) => `${this.x.place(x).toFixed(1)},${this.y.place(y).toFixed(1)}`);
      draw(window, "polyline", { class: look, stroke: color, points: at.join(" ") });
      if (points.length === 1)
        draw(window, "circle", { cx: this.x.place(points[0][0]), cy: this.y.place(points[0][1]), r: 3.5, fill: color });
    }
    this.over = draw(this.svg, "g", {});
  }

  collect() {
    const lines = [];
    for (const { run, i } of seen()) {
      const raw = points(run, "train", this.about.key);
      if (state.smooth > 0 && raw.length) lines.push({ points: raw, look: "run raw", color: color(i) });
      if (raw.length) lines.push({ points: smoothed(raw), look: "run", color: color(i), name: run.name });
      const held = this.about.validation ? points(run, "validation", this.about.key) : [];
      if (held.length) lines.push({ points: held, look: "run held", color: color(i), name: run.name + " (held-out)" });
    }
    return lines;
  }

  // A scale over values; `fixed` holds ends that the reader chose.
  scale(values, log, start, end, room, fixed) {
    let low = Infinity, high = -Infinity;
    for (const v of values) { low = Math.min(low, v); high = Math.max(high, v); }
    const along = log ? Math.log : (v) => v, back = log ? Math.exp : (v) => v;
    let [a, b] = [along(fixed[0] ?? low), along(fixed[1] ?? high)];
    if (!(b > a)) { const half = log ? 0.5 : Math.max(Math.abs(a) * 0.05, 1e-12); a -= half; b += half; }
    const more = (b - a) * room;
    a -= more; b += more;
    return {
      low: back(a), high: back(b),
      place: (v) => start + ((along(v) - a) / (b - a)) * (end - start),
      value: (at) => back(a + ((at - start) / (end - start)) * (b - a)),
    };
  }

  // Where the pointer is, in the picture's own coordinates.
  unplace(event) {
    const frame = this.svg.getBoundingClientRect();
    const x = ((event.clientX - frame.left) / frame.width) * this.svg.viewBox.baseVal.width;
    return Math.min(Math.max(x, this.box.left), this.box.right);
  }

  point(event) {
    if (!this.x) return;
    const at = this.unplace(event), value = this.x.value(at), { top, bottom } = this.box;
    this.over.replaceChildren();
    draw(this.over, "path", { class: "cross", d: `M${at} ${top}V${bottom}` });
    if (this.start !== undefined)
      draw(this.over, "rect", {
        class: "drag", x: Math.min(at, this.start), y: top, width: Math.abs(at - this.start), height: bottom - top,
      });
    tip.replaceChildren();
    html(tip, "div", `${AXES[state.axis]} ${onAxis(value)}`, { class: "prompt" });
    for (const line of this.lines.filter((line) => line.name)) {
      const near = nearest(line.points, value);
      draw(this.over, "circle", { cx: this.x.place(near[0]), cy: this.y.place(near[1]), r: 3.5, fill: line.color });
      const row = html(tip, "div");
      html(row, "span", null, { class: "swatch" }).style.borderColor = line.color;
      row.append(`${line.name}  ${short(near[1])}`);
    }
    tip.style.display = "block";
    const left = event.pageX + 16, room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = Math.max(4, left > room ? event.pageX - tip.offsetWidth - 16 : left) + "px";
    tip.style.top = event.pageY + 14 + "px";
  }

  release(event) {
    const [start, end] = [this.start, this.unplace(event)];
    this.start = undefined;
    if (start === undefined || !this.x || Math.abs(end - start) < 6) return;
    zoom(this.x.value(Math.min(start, end)), this.x.value(Math.max(start, end)));
  }

  leave() {
    this.start = undefined;
    tip.style.display = "none";
    if (this.over) this.over.replaceChildren();
  }
}

// The point whose x is nearest; points are sorted by x.
function nearest(line, value) {
  let low = 0, high = line.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (line[middle][0] < value) low = middle; else high = middle;
  }
  return Math.abs(line[low][0] - value) <= Math.abs(line[high][0] - value) ? line[low] : line[high];
}

function zoom(from, to) {
  state.from = from;
  state.to = to;
  paint();
}

// ---- the rest of the page

const tip = document.getElementById("tip");
const charts = CHARTS.map((about) => new Chart(about, document.getElementById("charts")));

function paint() {
  for (const chart of charts) chart.paint();
  document.querySelectorAll("[data-run]").forEach((swatch) => {
    swatch.style.borderColor = color(+swatch.dataset.run);
  });
  document.getElementById("whole").disabled = state.from === null && state.to === null;
}

function controls() {
  const place = document.getElementById("controls");
  const group = html(place, "span", null, { class: "choice", role: "radiogroup", "aria-label": "horizontal axis" });
  const choices = { tokens: "tokens", flops: "FLOPs", time: "time", step: "steps" };
  for (const axis in choices) {
    if (axis === "flops" && !runs.some((run) => run.flops_per_token)) continue;
    const label = html(group, "label");
    const input = html(label, "input", null, { type: "radio", name: "axis", value: axis });
    input.checked = axis === state.axis;
    input.addEventListener("change", () => { state.axis = axis; zoom(null, null); });
    label.append(choices[axis]);
  }
  const smooth = html(place, "label", "smoothing ");
  const range = html(smooth, "input", null, { type: "range", min: 0, max: 0.99, step: 0.01, value: 0, id: "smooth" });
  range.addEventListener("input", () => { state.smooth = +range.value; paint(); });
  for (const [key, name] of [["logX", "log x"], ["logY", "log y"]]) {
    const label = html(place, "label");
    const box = html(label, "input", null, { type: "checkbox", id: key });
    box.addEventListener("change", () => { state[key] = box.checked; zoom(null, null); });
    label.append(" " + name);
  }
  html(place, "button", "whole range", { id: "whole" }).addEventListener("click", () => zoom(null, null));
  html(place, "span", "drag over a chart to look closer", { class: "prompt" });
}

function overview() {
  const table = document.getElementById("runs"), head = html(table, "tr");
  const columns = ["run", "parameters", "steps", "tokens", "FLOPs", "time", "tokens/s", "loss", "best held-out", "last held-out"];
  for (const name of columns) html(head, "th", name);
  const best = Math.min(...runs.map((run) => run.best ?? Infinity));
  runs.forEach((run, i) => {
    const row = html(table, "tr"), label = html(html(row, "td"), "label");
    const box = html(label, "input", null, { type: "checkbox" });
    box.checked = true;
    box.addEventListener("change", () => {
      if (box.checked) state.hidden.delete(i); else state.hidden.add(i);
      paint();
    });
    label.append(" ");
    html(label, "span", null, { class: "swatch", "data-run": i });
    label.append(run.name);
    const steps = run.steps ? `${run.step} of ${run.steps}` : String(run.step);
    const numbers = [short(run.parameters), steps, short(run.tokens), short(run.flops), duration(run.seconds),
      short(run.speed), short(run.loss), short(run.best), short(run.last)];
    numbers.forEach((text, n) => {
      html(row, "td", text, n === 7 && run.best !== null && run.best === best && runs.length > 1 ? { class: "best" } : {});
    });
  });
}

// The settings of all runs side by side; those in which runs differ come first.
function settings() {
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))];
  if (keys.length === 0) return;
  const place = document.getElementById("settings");
  html(place, "h2", "Settings");
  const table = html(html(place, "div", null, { class: "card wide" }), "table"), head = html(table, "tr");
  html(head, "th", "");
  for (const run of runs) html(head, "th", run.name);
  const differs = (key) => new Set(runs.map((run) => run.settings[key])).size > 1;
  for (const key of [...keys.filter(differs), ...keys.filter((key) => !differs(key))]) {
    const row = html(table, "tr");
    html(row, "td", key);
    for (const run of runs) html(row, "td", run.settings[key] ?? "–", differs(key) ? {} : { class: "same" });
  }
}

// The texts of each run: those of its newest step open, those before it folded, newest first.
function samples() {
  const some = runs.filter((run) => run.samples.length);
  if (some.length === 0) return;
  const place = document.getElementById("samples");
  html(place, "h2", "Samples");
  for (const run of some) {
    const card = html(place, "div", null, { class: "card" });
    html(card, "figcaption", run.name);
    const newest = Math.max(...run.samples.map((sample) => sample.step ?? 0));
    const [now, before] = [[], []];
    for (const sample of run.samples) ((sample.step ?? newest) === newest ? now : before).push(sample);
    now.forEach((sample) => written(card, sample));
    if (before.length === 0) continue;
    const fold = html(card, "details");
    html(fold, "summary", `before: ${before.length}`);
    before.sort((a, b) => b.step - a.step).forEach((sample) => written(fold, sample));
  }
}

function written(place, sample) {
  const text = html(place, "p", null, { class: "sample" });
  if (sample.step !== undefined) html(text, "small", `step ${sample.step}  `);
  html(text, "span", sample.prompt, { class: "prompt" });
  text.append(sample.text);
}

overview();
controls();
settings();
samples();
paint();
addEventListener("resize", paint);
night.addEventListener("change", paint);
