"use strict";
// Scalars over steps or tokens: built once, drawn again when steps come in; one horizontal axis, one zoom, one cross-hair for all.
const plots = new Map(); // by title

const xs = () => docs.curves[view.axis];
function bounds() {
  // First and last point in view.
  const steps = docs.curves.step, last = steps.length - 1;
  if (view.range === null) return [0, last];
  const from = clamp(steps.findIndex((step) => step >= view.range[0]), 0, last), to = steps.findLastIndex((step) => step <= view.range[1]);
  return [from, Math.max(from, to)];
}

function stageSpans() {
  const spans = [];
  docs.curves.stage.forEach((name, i, all) => {
    if (i === 0 || name !== all[i - 1]) spans.push({ name, from: i, to: i });
    spans.at(-1).to = i;
  });
  return spans;
}

function smoothed(values) {
  // The middle half of a window that is centred, so that nothing lags, and that stays within its stage.
  const reach = clamp(Math.round(values.length / 80), 0, 15), result = [];
  for (const { from, to } of stageSpans())
    for (let i = from; i <= to; i++) {
      const wide = Math.min(reach, i - from, to - i);
      const window = values.slice(i - wide, i + wide + 1).filter((value) => value !== null).sort((a, b) => a - b);
      const middle = window.slice(window.length >> 2, window.length - (window.length >> 2));
      result.push(values[i] === null ? null : middle.reduce((sum, value) => sum + value, 0) / middle.length);
    }
  return result;
}

function extent(series, log, zero, [from, to]) {
  let low = Infinity, high = -Infinity;
  for (const { low: lows, high: highs, mean } of series)
    for (let i = from; i <= to; i++)
      for (const value of [(lows || mean)[i], (highs || mean)[i]])
        if (value !== null && (!log || value > 0)) { low = Math.min(low, value); high = Math.max(high, value); }
  return room(low, high, log, zero);
}

function chart(spec) {
  const plot = { spec, log: spec.log === true, series: [], svg: sv("svg", { class: "plot", role: "img", "aria-label": spec.title }) };
  for (const [key, label, tone, dash, sparse] of spec.keys.filter(([key]) => docs.curves.values[key])) {
    const one = { key, label, tone, dash, sparse, shown: true, read: el("b", null, "") };
    one.button = el("button", { class: "key", type: "button", tone, "aria-pressed": "true", title: "show or hide", onclick: () => {
      one.shown = !one.shown || plot.series.filter((other) => other.shown).length === 1;
      one.button.setAttribute("aria-pressed", one.shown);
      drawPlot(plot);
    } }, el("i", { class: dash ? "dashed" : null }), spec.keys.length > 1 ? label : "", one.read);
    plot.series.push(one);
  }
  const logarithmic = spec.log === undefined ? null : chip("log", plot.log, (event) => {
    plot.log = !plot.log;
    event.currentTarget.setAttribute("aria-pressed", plot.log);
    drawPlot(plot);
  }, "logarithmic scale");
  at(spec.more ? "more" : "charts").append(el("div", { class: `card${spec.wide ? " wide" : ""}` },
    el("div", { class: "bar" }, el("h2", null, spec.title), el("span", { class: "unit" }, spec.unit),
      el("span", { class: "push" }, plot.series.map((one) => one.button), logarithmic)), plot.svg));
  pointer(plot);
  return plot;
}

function take(plot) {
  // The newest values.
  for (const one of plot.series) {
    Object.assign(one, { low: undefined, high: undefined }, docs.curves.values[one.key]);
    one.line = plot.spec.smooth && !one.sparse ? smoothed(one.mean) : one.mean;
  }
}

function drawPlot(plot) {
  const { svg, spec, log } = plot, series = plot.series.filter((one) => one.shown), [from, to] = bounds();
  const width = svg.clientWidth || 600, height = spec.wide ? 300 : 210, box = { left: 54, right: width - 6, top: 20, bottom: height - 36 };
  const x = xs(), single = x[from] === x[to], begin = single ? x[from] - 1 : x[from], end = single ? x[to] + 1 : x[to];
  const [low, high] = extent(series, log, spec.zero, [from, to]);
  const px = scale(begin, end, box.left, box.right), py = scale(low, high, box.bottom, box.top, log);
  Object.assign(plot, { box, px, py });
  const parts = [];
  for (const { name, from: first, to: last } of stageSpans()) {
    if (last < from || first > to) continue;
    const left = first <= from ? box.left : px((x[first - 1] + x[first]) / 2), right = last >= to ? box.right : px((x[last] + x[last + 1]) / 2);
    const tone = stageTone(name);
    parts.push(sv("rect", { x: left, y: box.top, width: Math.max(0, right - left), height: box.bottom - box.top, style: `fill: color-mix(in srgb, ${tone} var(--band), transparent)` }));
    parts.push(sv("line", { x1: left, x2: right, y1: box.top, y2: box.top, style: `stroke: ${tone}`, "stroke-width": 2, opacity: 0.6 }));
    if (right - left > 7 * name.length) parts.push(sv("text", { class: "stage", x: left + 4, y: box.top - 7, style: `fill: ${tone}` }, name));
  }
  parts.push(...frame(box, px, py, [begin, end], [low, high], { log, format: spec.format || tight, label: view.axis, ticks: spec.wide ? 6 : 4 }));
  const steps = docs.curves.step;
  parts.push(...alertMarks(box, px, [begin, end], (step) => (view.axis === "step" ? step : x[Math.max(0, steps.findIndex((one) => one >= step))])));
  for (const one of series) parts.push(...drawSeries(plot, one, from, to));
  plot.over = sv("g");
  svg.setAttribute("height", height);
  svg.replaceChildren(...parts, plot.over);
  markPlot(plot);
}

function drawSeries(plot, one, from, to) {
  const x = xs(), { px, py } = plot, style = `stroke: ${one.tone}`, parts = [];
  const path = (values) => {
    let d = "", pen = "M";
    for (let i = from; i <= to; i++) {
      if (values[i] === null) { if (!one.sparse) pen = "M"; continue; } // a sparse series has values at some steps only
      d += `${pen}${px(x[i]).toFixed(1)} ${py(values[i]).toFixed(1)}`;
      pen = "L";
    }
    return d;
  };
  if (one.high) {
    let over = "", under = "";
    for (let i = from; i <= to; i++) {
      if (one.high[i] === null) continue;
      over += `${over ? "L" : "M"}${px(x[i]).toFixed(1)} ${py(one.high[i]).toFixed(1)}`;
      under = `L${px(x[i]).toFixed(1)} ${py(one.low[i]).toFixed(1)}${under}`;
    }
    if (over) parts.push(sv("path", { class: "range", d: `${over}${under}Z`, style: `fill: ${one.tone}` }));
  }
  if (one.line !== one.mean) parts.push(sv("path", { class: "raw", d: path(one.mean), style }));
  parts.push(sv("path", { class: `mean${one.dash ? " dashed" : ""}`, d: path(one.line), style }));
  if (to - from < 30 || one.sparse)
    for (let i = from; i <= to; i++)
      if (one.mean[i] !== null) parts.push(sv("circle", { cx: px(x[i]), cy: py(one.mean[i]), r: 2.2, style: `fill: ${one.tone}` }));
  return parts;
}

function markPlot(plot) {
  const i = view.hover ?? bounds()[1], format = plot.spec.read || plain, parts = [];
  for (const one of plot.series) one.read.textContent = format(view.hover === null || one.sparse ? lastOf(one.mean.slice(0, i + 1)) : one.mean[i]);
  if (view.hover !== null && plot.px) {
    const x = plot.px(xs()[i]);
    parts.push(sv("line", { class: "cross", x1: x, x2: x, y1: plot.box.top, y2: plot.box.bottom }));
    for (const one of plot.series)
      if (one.shown && one.mean[i] !== null)
        parts.push(sv("circle", { cx: x, cy: plot.py(one.mean[i]), r: 3.5, style: `fill: ${one.tone}; stroke: var(--card)`, "stroke-width": 1.5 }));
  }
  plot.over.replaceChildren(...parts);
}
const markAll = () => plots.forEach((plot) => plot.over && markPlot(plot));

function pointer(plot) {
  const { svg } = plot;
  let start = null;
  const nearest = (event) => {
    const x = xs(), place = event.clientX - svg.getBoundingClientRect().left;
    let [low, high] = bounds();
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (plot.px(x[middle]) <= place) low = middle; else high = middle;
    }
    return place - plot.px(x[low]) < plot.px(x[high]) - place ? low : high;
  };
  svg.addEventListener("pointermove", (event) => {
    const i = (view.hover = nearest(event)), curves = docs.curves;
    markAll();
    if (start !== null && Math.abs(event.clientX - start.at) > 6) {
      const [a, b] = [start.index, i].map((one) => plot.px(xs()[one])).sort((p, q) => p - q);
      plot.over.append(sv("rect", { class: "select", x: a, y: plot.box.top, width: b - a, height: plot.box.bottom - plot.box.top }));
    }
    const format = plot.spec.read || plain, range = (one) => (one.high && one.high[i] !== one.low[i] ? `  (${format(one.low[i])} to ${format(one.high[i])})` : "");
    const raised = alarms().filter(({ step }) => step <= curves.step[i] && (i === 0 || step > curves.step[i - 1])).slice(0, 3);
    tip(event, `step ${whole(curves.step[i])} · ${short(curves.tokens[i])} tokens · ${curves.stage[i]}`, [
      ...plot.series.filter((one) => one.shown).map((one) => [one.tone, one.label, format(one.mean[i]) + range(one)]),
      ...raised.map((one) => [`var(--${eventStyle(one)[0]})`, words(one.event), words(one.detector || one.act || "")])]);
  });
  svg.addEventListener("pointerdown", (event) => {
    if (event.pointerType !== "mouse") return;
    start = { at: event.clientX, index: nearest(event) };
    svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener("pointerup", (event) => {
    const end = nearest(event), steps = docs.curves.step;
    if (start !== null && Math.abs(event.clientX - start.at) > 6 && end !== start.index) zoom([steps[Math.min(start.index, end)], steps[Math.max(start.index, end)]]);
    start = null;
  });
  svg.addEventListener("pointerleave", () => { view.hover = null; markAll(); untip(); });
  svg.addEventListener("dblclick", () => zoom(null));
}

function drawTools() {
  const curves = docs.curves, bad = curves.not_finite;
  const axis = (name) => chip(`by ${name}`, view.axis === name, () => {
    view.axis = name;
    drawTools();
    plots.forEach(drawPlot);
  });
  const key = document.activeElement && at("tools").contains(document.activeElement) ? document.activeElement.textContent : null;
  at("tools").replaceChildren(...[
    axis("step"), curves.tokens.every((n) => n !== null) ? axis("tokens") : null,
    el("button", { class: "chip", type: "button", id: "reset", hidden: view.range === null ? "" : null, onclick: () => zoom(null) }, "whole run"),
    bad.length ? el("span", { style: "color: var(--rose)" }, `loss not finite at step ${bad.slice(0, 5).map(whole).join(", ")}${bad.length > 5 ? ", …" : ""}`) : null,
    el("span", { class: "hint" }, `drag to zoom, double-click for the whole run${curves.bucket > 1 ? ` · a point is the mean of up to ${curves.bucket} steps, shaded from lowest to highest` : ""}`),
  ].filter(Boolean));
  if (key !== null) [...at("tools").children].find((node) => node.textContent === key)?.focus();
}

const [blue, amber, teal, violet, rose, green, slate, brown] = TONES;
const CHARTS = [
  { title: "Loss", unit: "nats a token", wide: true, log: false, smooth: true, keys: [["loss", "next token", blue], ["total_loss", "total", amber], ["mtp_loss", "MTP heads", teal, true], ["eval/loss", "held out", green, false, true]] },
  { title: "Held-out text", more: true, unit: "bits a byte", keys: [["eval/bits_per_byte", "bits a byte", green, false, true]] },
  { title: "Gradient norm", unit: "before clipping", log: true, smooth: true, keys: [["grad_norm", "gradient norm", violet]] },
  { title: "Speed", unit: "tokens/s, all ranks", zero: true, smooth: true, format: short, read: short, keys: [["tokens_per_second", "tokens/s", teal]] },
  { title: "Learning rate", more: true, unit: "", zero: true, keys: [["lr", "learning rate", blue]] },
  { title: "Model FLOPs utilisation", more: true, unit: "share of the matmul peak", zero: true, smooth: true, format: percent, read: percent, keys: [["mfu", "MFU", green]] },
  { title: "Balance loss", more: true, unit: "EP groups", smooth: true, keys: [["balance_loss", "balance loss", rose]] },
  { title: "Batch", more: true, unit: "tokens a step", zero: true, format: short, read: short, keys: [["batch_tokens", "tokens a step", slate]] },
  { title: "Step time", more: true, unit: "seconds", zero: true, smooth: true, keys: [["step_time", "step time", brown]] },
];

section((name) => name === "curves" || name === "ledger", () => {
  if (!docs.curves) return at("charts").replaceChildren(el("div", { class: "card wide none" }, "No step has been recorded yet."));
  const built = [...plots.values()].reduce((count, plot) => count + plot.series.length, 0);
  if (built !== CHARTS.flatMap(({ keys }) => keys).filter(([key]) => docs.curves.values[key]).length) {
    plots.clear();
    at("charts").replaceChildren();
    at("more").replaceChildren();
    for (const spec of CHARTS.filter(({ keys }) => keys.some(([key]) => docs.curves.values[key]))) plots.set(spec.title, chart(spec));
  }
  plots.forEach(take);
  drawTools();
  plots.forEach(drawPlot);
  return undefined;
});
zoomed.push(() => plots.forEach(drawPlot));
onResize(document.querySelector("main"), () => plots.forEach(drawPlot));
