"use strict";
// Runs side by side: a table of their figures, the keys of their recipes that differ, and one line of each run in every plot.
const comparison = JSON.parse(inside.get("comparison").textContent);
const hidden = new Set(); // numbers of runs that are not drawn

const COLUMNS = [["state", "state", words], ["step", "steps", whole], ["tokens", "tokens", short], ["loss", "last loss", plain], ["lowest_loss", "lowest loss", plain],
  ["grad_norm", "gradient norm", plain], ["tokens_per_second", "tokens/s", short], ["mfu", "MFU", percent], ["seconds", "time in steps", span]];
const PLOTS = [
  { key: "loss", title: "Loss", unit: "nats a token, next token", wide: true }, { key: "grad_norm", title: "Gradient norm", unit: "before clipping", log: true },
  { key: "tokens_per_second", title: "Speed", unit: "tokens/s, all ranks", zero: true, format: short }, { key: "lr", title: "Learning rate", unit: "", zero: true },
  { key: "mfu", title: "Model FLOPs utilisation", unit: "share of the matmul peak", zero: true, format: percent },
];
const drawn = () => comparison.runs.map((run, n) => ({ ...run, n, tone: toneAt(n) })).filter(({ n, curves }) => curves && !hidden.has(n));

function table(top, rows) {
  return el("div", { class: "card wide" }, el("table", { class: "plain" },
    el("thead", null, el("tr", null, top.map((text) => el("th", null, text)))),
    el("tbody", null, rows.map((cells) => el("tr", null, cells.map((cell) => el("td", null, cell)))))));
}

function drawTop() {
  document.title = `${comparison.runs.map(({ name }) => name).join(", ")} · Steptron`;
  at("head").replaceChildren(el("div", { class: "title" }, el("h1", null, `${comparison.runs.length} runs`)));
  const name = (run, n) => el("button", { class: "key", type: "button", tone: toneAt(n), "aria-pressed": String(!hidden.has(n)), title: "show or hide", onclick: () => {
    if (!hidden.delete(n)) hidden.add(n);
    draw();
  } }, el("i"), run.name);
  const tables = [table(["run", ...COLUMNS.map(([, text]) => text)], comparison.runs.map((run, n) => [name(run, n), ...COLUMNS.map(([key, , format]) => (run[key] === null ? "–" : format(run[key])))]))];
  const keys = Object.entries(comparison.differing);
  const text = (value) => (value === null || value === undefined ? "–" : typeof value === "object" ? JSON.stringify(value) : String(value));
  if (keys.length) tables.push(table(["key that differs", ...comparison.runs.map((run) => run.name)], keys.map(([key, values]) => [key, ...values.map(text)])));
  at("tiles").replaceChildren();
  at("alerts").replaceChildren(...tables);
  at("tools").replaceChildren(...["step", "tokens"].map((axis) => chip(`by ${axis}`, view.axis === axis, () => {
    view.axis = axis;
    draw();
  })));
}

function drawOne(spec) {
  const runs = drawn().filter(({ curves }) => curves.values[spec.key]);
  const svg = sv("svg", { class: "plot", role: "img", "aria-label": spec.title });
  const keys = runs.map((run) => el("span", { class: "key", tone: run.tone }, el("i"), run.name));
  const card = el("div", { class: `card${spec.wide ? " wide" : ""}` }, el("div", { class: "bar" }, el("h2", null, spec.title), el("span", { class: "unit" }, spec.unit), el("span", { class: "push" }, keys)), svg);
  at("charts").append(card);
  const lines = runs.map((run) => ({ run, x: run.curves[view.axis], y: run.curves.values[spec.key].mean }));
  const good = (value) => typeof value === "number" && (!spec.log || value > 0);
  const ys = lines.flatMap(({ y }) => y.filter(good)), places = lines.flatMap(({ x }) => x.filter((value) => value !== null));
  const least = (values) => values.reduce((a, b) => Math.min(a, b), Infinity), most = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);
  const width = svg.clientWidth || 600, height = spec.wide ? 300 : 210, box = { left: 54, right: width - 6, top: 20, bottom: height - 36 };
  const begin = places.length ? least(places) : 0, end = places.length ? Math.max(most(places), begin + 1) : 1, [low, high] = room(least(ys), most(ys), spec.log, spec.zero);
  const px = scale(begin, end, box.left, box.right), py = scale(low, high, box.bottom, box.top, spec.log);
  const parts = frame(box, px, py, [begin, end], [low, high], { log: spec.log, format: spec.format || tight, label: view.axis, ticks: spec.wide ? 6 : 4 });
  for (const { run, x, y } of lines) {
    let d = "", pen = "M";
    y.forEach((value, i) => {
      if (!good(value) || x[i] === null) { pen = "M"; return; }
      d += `${pen}${px(x[i]).toFixed(1)} ${py(value).toFixed(1)}`;
      pen = "L";
    });
    parts.push(sv("path", { class: "mean", d, style: `stroke: ${run.tone}` }, sv("title", null, run.name)));
  }
  svg.setAttribute("height", height);
  svg.replaceChildren(...parts);
}

function draw() {
  drawTop();
  at("charts").replaceChildren();
  for (const spec of PLOTS) if (comparison.runs.some(({ curves }) => curves && curves.values[spec.key])) drawOne(spec);
}
draw();
onResize(document.querySelector("main"), draw);
