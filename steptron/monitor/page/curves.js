"use strict";
// Curves over steps or tokens, on one horizontal axis with one zoom and one cross-hair.
const view = { axis: "step", from: 0, to: curves ? curves.step.length - 1 : 0, hover: null };
const plots = [];
const xs = () => curves[view.axis];
const redraw = () => plots.forEach((plot) => plot.draw());

function stageSpans() {
  const spans = [];
  curves.stage.forEach((name, i) => {
    if (i === 0 || name !== curves.stage[i - 1]) spans.push({ name, from: i, to: i });
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

function niceTicks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough) * power;
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(+(k * step).toPrecision(12));
  return ticks;
}
function logTicks(low, high) {
  const decades = Math.log10(high / low);
  if (decades < 0.7) return niceTicks(low, high, 4);
  const ticks = [];
  for (let k = Math.floor(Math.log10(low)); k <= Math.log10(high); k++)
    for (const factor of decades > 2.5 ? [1] : [1, 2, 5]) {
      const tick = factor * 10 ** k;
      if (tick >= low && tick <= high) ticks.push(+tick.toPrecision(6));
    }
  return ticks;
}

function extent(series, log, zero) {
  let low = Infinity, high = -Infinity;
  for (const { low: lows, high: highs, mean } of series)
    for (let i = view.from; i <= view.to; i++)
      for (const value of [(lows || mean)[i], (highs || mean)[i]])
        if (value !== null && (!log || value > 0)) { low = Math.min(low, value); high = Math.max(high, value); }
  if (low > high) return log ? [0.1, 1] : [0, 1];
  if (log) return low === high ? [low / 2, high * 2] : [low / (high / low) ** 0.04, high * (high / low) ** 0.05];
  if (zero) low = Math.min(0, low);
  const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return [zero && low === 0 ? 0 : low - room, high + room];
}

function chart(spec) {
  const series = spec.keys.filter(([key]) => curves.values[key]).map(([key, label, tone]) => {
    const values = curves.values[key];
    return { key, label, tone, shown: true, ...values, line: spec.smooth ? smoothed(values.mean) : values.mean };
  });
  if (!series.length) return;
  let log = spec.log === true;
  const svg = sv("svg", { class: "plot", role: "img", "aria-label": spec.title });
  for (const one of series) {
    one.read = el("b", null, "");
    one.button = el("button", { class: "key", tone: one.tone, "aria-pressed": "true", title: "show or hide", onclick: () => {
      one.shown = !one.shown || series.filter((other) => other.shown).length === 1;
      one.button.setAttribute("aria-pressed", one.shown);
      plot.draw();
    } }, el("i"), series.length > 1 ? one.label : "", one.read);
  }
  const scale = spec.log === undefined ? null : el("button", { class: "chip", "aria-pressed": String(log), onclick: () => {
    log = !log;
    scale.setAttribute("aria-pressed", log);
    plot.draw();
  } }, "log");
  at("charts").append(el("div", { class: `card${spec.wide ? " wide" : ""}` },
    el("div", { class: "bar" }, el("h2", null, spec.title), el("span", { class: "unit" }, spec.unit),
      el("span", { class: "push" }, series.map((one) => one.button), scale)), svg));
  const plot = { spec, series, svg, draw: () => drawPlot(plot, log), mark: () => markPlot(plot) };
  plots.push(plot);
  pointer(plot);
}

function drawPlot(plot, log) {
  const { svg, spec } = plot, series = plot.series.filter((one) => one.shown);
  const width = svg.clientWidth || 600, height = spec.wide ? 300 : 210, box = { left: 54, right: width - 6, top: 20, bottom: height - 36 };
  const x = xs(), first = x[view.from], last = x[view.to], single = first === last;
  const begin = single ? first - 1 : view.from === 0 && !single ? first : first, end = single ? last + 1 : last;
  const [low, high] = extent(series, log, spec.zero);
  const px = (value) => box.left + ((value - begin) / (end - begin)) * (box.right - box.left);
  const f = log ? Math.log : (value) => value;
  const py = (value) => box.bottom - ((f(Math.max(value, log ? low : -Infinity)) - f(low)) / (f(high) - f(low))) * (box.bottom - box.top);
  Object.assign(plot, { box, px, py, log });
  const parts = [];
  for (const { name, from, to } of stageSpans()) {
    if (to < view.from || from > view.to) continue;
    const left = from <= view.from ? box.left : px((x[from - 1] + x[from]) / 2), right = to >= view.to ? box.right : px((x[to] + x[to + 1]) / 2);
    const tone = stageTone.get(name) || TONES[0];
    parts.push(sv("rect", { x: left, y: box.top, width: Math.max(0, right - left), height: box.bottom - box.top, style: `fill: color-mix(in srgb, ${tone} var(--band), transparent)` }));
    parts.push(sv("line", { x1: left, x2: right, y1: box.top, y2: box.top, style: `stroke: ${tone}`, "stroke-width": 2, opacity: 0.6 }));
    if (right - left > 7 * name.length) parts.push(sv("text", { class: "stage", x: left + 4, y: box.top - 7, style: `fill: ${tone}` }, name));
  }
  const format = spec.format || tight;
  for (const tick of log ? logTicks(low, high) : niceTicks(low, high, spec.wide ? 6 : 4)) {
    parts.push(sv("line", { class: "grid", x1: box.left, x2: box.right, y1: py(tick), y2: py(tick) }));
    parts.push(sv("text", { x: box.left - 8, y: py(tick) + 4, "text-anchor": "end" }, format(tick)));
  }
  for (const tick of niceTicks(begin, end, Math.max(2, Math.floor(width / 90)))) {
    if (tick !== Math.round(tick)) continue;
    parts.push(sv("line", { class: "axis", x1: px(tick), x2: px(tick), y1: box.bottom, y2: box.bottom + 4 }));
    parts.push(sv("text", { x: px(tick), y: box.bottom + 17, "text-anchor": "middle" }, short(tick)));
  }
  parts.push(sv("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
  parts.push(sv("text", { x: box.right, y: box.bottom + 32, "text-anchor": "end" }, view.axis));
  for (const one of series) parts.push(...drawSeries(plot, one));
  plot.over = sv("g");
  svg.setAttribute("height", height);
  svg.replaceChildren(...parts, plot.over);
  markPlot(plot);
}

function drawSeries(plot, one) {
  const x = xs(), { px, py } = plot, style = `stroke: ${one.tone}`, parts = [];
  const path = (values) => {
    let d = "", pen = "M";
    for (let i = view.from; i <= view.to; i++) {
      if (values[i] === null) { pen = "M"; continue; }
      d += `${pen}${px(x[i]).toFixed(1)} ${py(values[i]).toFixed(1)}`;
      pen = "L";
    }
    return d;
  };
  if (one.high) {
    let over = "", under = "";
    for (let i = view.from; i <= view.to; i++) {
      if (one.high[i] === null) continue;
      over += `${over ? "L" : "M"}${px(x[i]).toFixed(1)} ${py(one.high[i]).toFixed(1)}`;
      under = `L${px(x[i]).toFixed(1)} ${py(one.low[i]).toFixed(1)}${under}`;
    }
    parts.push(sv("path", { class: "range", d: `${over}${under}Z`, style: `fill: ${one.tone}` }));
  }
  if (one.line !== one.mean) parts.push(sv("path", { class: "raw", d: path(one.mean), style }));
  parts.push(sv("path", { class: "mean", d: path(one.line), style }));
  if (view.to - view.from < 30)
    for (let i = view.from; i <= view.to; i++)
      if (one.mean[i] !== null) parts.push(sv("circle", { cx: px(x[i]), cy: py(one.mean[i]), r: 2.2, style: `fill: ${one.tone}` }));
  return parts;
}

function markPlot(plot) {
  const i = view.hover ?? view.to, format = plot.spec.read || plain, parts = [];
  for (const one of plot.series) one.read.textContent = format(one.mean[i]);
  if (view.hover !== null && plot.px) {
    const x = plot.px(xs()[i]);
    parts.push(sv("line", { class: "cross", x1: x, x2: x, y1: plot.box.top, y2: plot.box.bottom }));
    for (const one of plot.series)
      if (one.shown && one.mean[i] !== null)
        parts.push(sv("circle", { cx: x, cy: plot.py(one.mean[i]), r: 3.5, style: `fill: ${one.tone}; stroke: var(--card)`, "stroke-width": 1.5 }));
  }
  plot.over.replaceChildren(...parts);
}

function pointer(plot) {
  const { svg } = plot;
  let start = null;
  const nearest = (event) => {
    const x = xs(), place = event.clientX - svg.getBoundingClientRect().left;
    let low = view.from, high = view.to;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (plot.px(x[middle]) <= place) low = middle; else high = middle;
    }
    return place - plot.px(x[low]) < plot.px(x[high]) - place ? low : high;
  };
  svg.addEventListener("pointermove", (event) => {
    const i = (view.hover = nearest(event));
    plots.forEach((other) => other.mark());
    if (start !== null && Math.abs(event.clientX - start.at) > 6) {
      const [a, b] = [start.index, i].map((index) => plot.px(xs()[index])).sort((p, q) => p - q);
      plot.over.append(sv("rect", { class: "select", x: a, y: plot.box.top, width: b - a, height: plot.box.bottom - plot.box.top }));
    }
    const format = plot.spec.read || plain, range = (one) => (one.high && one.high[i] !== one.low[i] ? `  (${format(one.low[i])} to ${format(one.high[i])})` : "");
    tip(event, `step ${whole(curves.step[i])} · ${short(curves.tokens[i])} tokens · ${curves.stage[i]}`,
      plot.series.filter((one) => one.shown).map((one) => [one.tone, one.label, format(one.mean[i]) + range(one)]));
  });
  svg.addEventListener("pointerdown", (event) => {
    if (event.pointerType !== "mouse") return;
    start = { at: event.clientX, index: nearest(event) };
    svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener("pointerup", (event) => {
    const end = nearest(event);
    if (start !== null && Math.abs(event.clientX - start.at) > 6 && end !== start.index) zoom(Math.min(start.index, end), Math.max(start.index, end));
    start = null;
  });
  svg.addEventListener("pointerleave", () => { view.hover = null; plots.forEach((other) => other.mark()); untip(); });
  svg.addEventListener("dblclick", () => zoom(0, curves.step.length - 1));
}

function zoom(from, to) {
  Object.assign(view, { from, to, hover: null });
  at("reset").hidden = from === 0 && to === curves.step.length - 1;
  redraw();
}

function charts() {
  if (!curves) {
    put(at("charts"), null, [el("div", { class: "card wide none" }, "No step has been recorded yet.")]);
    return;
  }
  const axis = (name) => el("button", { class: "chip", "aria-pressed": String(view.axis === name), onclick: (event) => {
    view.axis = name;
    for (const chip of at("tools").querySelectorAll("[aria-pressed]")) chip.setAttribute("aria-pressed", chip === event.currentTarget);
    redraw();
  } }, `by ${name}`);
  put(at("tools"), null, [
    axis("step"), curves.tokens.every((n) => n !== null) ? axis("tokens") : null,
    el("button", { class: "chip", id: "reset", hidden: "", onclick: () => zoom(0, curves.step.length - 1) }, "whole run"),
    curves.not_finite.length ? el("span", { style: "color: var(--rose)" }, `loss not finite at step ${curves.not_finite.slice(0, 5).map(whole).join(", ")}${curves.not_finite.length > 5 ? ", …" : ""}`) : null,
    el("span", { class: "hint" }, `drag to zoom, double-click for the whole run${curves.bucket > 1 ? ` · a point is the mean of up to ${curves.bucket} steps, shaded from lowest to highest` : ""}`),
  ]);
  const [blue, teal, amber, violet, rose, green, slate, brown] = TONES;
  chart({ title: "Loss", unit: "nats a token", wide: true, log: false, smooth: true,
    keys: [["loss", "total", blue], ["lm_loss", "next token", teal], ["mtp_loss", "MTP heads", amber]] });
  chart({ title: "Learning rate", unit: "", zero: true, keys: [["lr", "learning rate", blue]] });
  chart({ title: "Gradient norm", unit: "before clipping", log: true, smooth: true, keys: [["grad_norm", "gradient norm", violet]] });
  chart({ title: "Speed", unit: "tokens/s, all ranks", zero: true, smooth: true, format: short, read: short, keys: [["tokens_per_second", "tokens/s", teal]] });
  chart({ title: "Model FLOPs utilisation", unit: "share of the matmul peak", zero: true, smooth: true, format: percent, read: percent, keys: [["mfu", "MFU", green]] });
  chart({ title: "Balance loss", unit: "EP groups", smooth: true, keys: [["balance_loss", "balance loss", rose]] });
  chart({ title: "Batch", unit: "tokens a step", zero: true, format: short, read: short, keys: [["batch_tokens", "tokens a step", slate]] });
  if (at("charts").childElementCount % 2 === 0) chart({ title: "Step time", unit: "seconds", zero: true, smooth: true, keys: [["step_time", "step time", brown]] });
}
