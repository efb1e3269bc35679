"use strict";
// Many lines in one plot: a line a layer (or source, or position), the worst few in colour and named, the others grey.
// A name has one colour in all charts; where two that are named have the same, the second is dashed.
const NAMED = 3; // lines that are named

function manyCard(host, title, unit) {
  const card = { svg: sv("svg", { class: "plot", role: "img", "aria-label": title }), shown: null, read: el("span", { class: "push worst" }) };
  host.append(el("div", { class: "card" }, el("div", { class: "bar" }, el("h2", null, title), el("span", { class: "unit" }, unit), card.read), card.svg));
  card.svg.addEventListener("pointermove", (event) => hoverMany(card, event));
  card.svg.addEventListener("pointerleave", () => { untip(); card.hover = null; card.over && card.over.replaceChildren(); });
  return card;
}

function drawMany(card, { names, spans, values, log, worse, prefix, reference, few, stands, toneOf }) {
  // `values`: [T, N]; `worse`: a number for each line, the highest are named; `stands`: whether a line stands out, others stay thin;
  // `toneOf`: colour of a name.
  const { svg } = card, N = names.length, value = (t, i) => values[t * N + i];
  const inView = spans.map((_, t) => t).filter((t) => view.range === null || (spans[t][1] >= view.range[0] && spans[t][0] <= view.range[1]));
  const ts = inView.length ? inView : spans.map((_, t) => t), steps = spans.map(([, last]) => last);
  const width = svg.clientWidth || 560, height = 210, box = { left: 54, right: width - (width < 480 ? 40 : 70), top: 12, bottom: height - 36 };
  let low = Infinity, high = -Infinity;
  for (const t of ts) for (let i = 0; i < N; i++) if (Number.isFinite(value(t, i)) && (!log || value(t, i) > 0)) { low = Math.min(low, value(t, i)); high = Math.max(high, value(t, i)); }
  if (reference !== undefined) [low, high] = [Math.min(low, reference), Math.max(high, reference)];
  if (log && reference !== undefined) [low, high] = [Math.min(low, reference / 1.04), Math.max(high, reference * 1.04)];
  [low, high] = room(low, high, log, false);
  const [first, last] = [steps[ts[0]], steps[ts.at(-1)]], begin = first === last ? first - 1 : first, until = first === last ? last + 1 : last;
  const x = scale(begin, until, box.left, box.right), y = scale(low, high, box.bottom, box.top, log);
  const ranked = names.map((_, i) => i).filter((i) => Number.isFinite(worse(i))).sort((a, b) => worse(b) - worse(a));
  const tops = few ? names.map((_, i) => i) : ranked.slice(0, NAMED), tones = tops.map((i) => toneOf(names[i], i)), tone = (k) => tones[k];
  const dashed = (k) => tones.indexOf(tones[k]) < k;
  const end = (i) => ts.findLast((one) => Number.isFinite(value(one, i))); // where the line ends
  const path = (i) => {
    let d = "", pen = "M";
    for (const t of ts) {
      const v = value(t, i);
      if (!Number.isFinite(v) || (log && v <= 0)) { if (!(log && v === 0)) { pen = "M"; continue; } }
      d += `${pen}${x(steps[t]).toFixed(1)} ${y(log && v <= 0 ? low : v).toFixed(1)}${pen === "M" ? "h0" : ""}`; // h0: a dot, should none follow
      pen = "L";
    }
    return d;
  };
  const parts = frame(box, x, y, [begin, until], [low, high], { log, format: tight, label: "step" });
  parts.push(...alertMarks(box, x, [begin, until], (step) => step));
  if (reference !== undefined) parts.push(sv("line", { class: "reference", x1: box.left, x2: box.right, y1: y(reference), y2: y(reference) }));
  parts.push(sv("path", { class: "many", d: names.map((_, i) => (tops.includes(i) ? "" : path(i))).join("") }));
  tops.toReversed().forEach((i) => parts.push(sv("path", { class: `mean${few || stands(i) ? "" : " faint"}${dashed(tops.indexOf(i)) ? " dashed" : ""}`, d: path(i), style: `stroke: ${tone(tops.indexOf(i))}` })));
  const ends = tops.map((i, k) => ({ i, k, t: end(i) })).filter(({ t }) => t !== undefined).map((one) => ({ ...one, place: y(Math.max(value(one.t, one.i), log ? low : -Infinity)) }))
    .sort((a, b) => a.place - b.place);
  let above = -Infinity, below = box.bottom + 4;
  for (const one of ends) above = one.text = Math.max(one.place + 4, above + 12); // names do not cover each other,
  for (const one of ends.toReversed()) below = (one.text = Math.min(one.text, below)) - 12; // nor the axis
  for (const { i, k, t, place, text } of ends) {
    parts.push(sv("circle", { cx: x(steps[t]), cy: place, r: 2.5, style: `fill: ${tone(k)}` }));
    parts.push(sv("text", { x: box.right + 6, y: text, style: `fill: ${tone(k)}` }, `${width < 480 ? "" : prefix}${names[i]}`));
  }
  card.read.replaceChildren(...tops.slice(0, few ? 8 : NAMED).map((i, k) => el("span", { class: "key", tone: tone(k) }, el("i", { class: dashed(k) ? "dashed" : null }), `${prefix}${names[i]}`, el("b", null, plain(value(end(i), i), 3)))));
  card.over = sv("g");
  Object.assign(card, { shown: { names, spans, value, ts, steps, x, y, box, prefix, N, log, low, path } });
  svg.setAttribute("height", height);
  svg.replaceChildren(...parts, card.over);
}

function hoverMany(card, event) {
  if (!card.shown) return;
  const { names, spans, value, ts, steps, x, y, prefix, N, path, log, low, box } = card.shown, frameBox = card.svg.getBoundingClientRect();
  const px = event.clientX - frameBox.left, py = event.clientY - frameBox.top;
  const t = ts.reduce((best, one) => (Math.abs(x(steps[one]) - px) < Math.abs(x(steps[best]) - px) ? one : best), ts[0]);
  let nearest = -1, distance = Infinity;
  for (let i = 0; i < N; i++) {
    const away = Math.abs(y(Math.max(value(t, i), log ? low : -Infinity)) - py);
    if (away < distance) [nearest, distance] = [i, away];
  }
  if (nearest < 0) return;
  card.over.replaceChildren(
    sv("line", { class: "cross", x1: x(steps[t]), x2: x(steps[t]), y1: box.top, y2: box.bottom }),
    sv("path", { class: "mean hover", d: path(nearest) }),
    sv("circle", { cx: x(steps[t]), cy: y(Math.max(value(t, nearest), log ? low : -Infinity)), r: 3.5, style: "fill: var(--ink)" }));
  tip(event, `${stepsOf(spans[t])} · ${spans[t][2]}`, [[null, `${prefix}${names[nearest]}`, plain(value(t, nearest), 4)]]);
}

function columnOf(data, values, name) {
  // [T, N] of one statistic out of [C, T, N].
  const c = data.columns.findIndex(([column]) => column === name), size = values.length / data.columns.length;
  return values.subarray(c * size, (c + 1) * size);
}

const layerTone = (name) => toneAt(+name);
const manyCards = new Map();
function many(host, key, title, unit, spec) {
  if (!manyCards.has(key)) manyCards.set(key, manyCard(at(host), title, unit));
  drawMany(manyCards.get(key), spec);
}

// ---------------------------------------------------------------- extremes of experts, by layer

const SPREAD = ["out_norm", "activation_rms", "weight_norm"];
const WARNS = { out_norm: ["rising: one expert blows up", "an expert falls silent"], activation_rms: ["", "falling: an expert dies while dispatch is healthy"], weight_norm: ["", "falling: its weights die"] };

function drawSpread() {
  const name = "spread/layer_expert";
  if (!has(name)) return;
  if (!docs[name]) return void want(name);
  const data = docs[name], there = SPREAD.filter((column) => data.columns.some(([one]) => one === column)), high = floats(data.high), low = floats(data.low);
  const N = data.rows.length, T = data.spans.length;
  for (const column of there)
    for (const [kind, all] of [["max", high], ["min", low]]) {
      const values = columnOf(data, all, column), sign = kind === "max" ? 1 : -1;
      const last = (i) => lastKnown(values, T, N, i), middle = middleOf(data.rows.map((_, i) => last(i)));
      many("spread", `${column}/${kind}`, `${label(column)[0].toUpperCase()}${label(column).slice(1)}: ${kind} ÷ median`, WARNS[column][kind === "max" ? 0 : 1] || `of a layer's experts`,
        { names: data.rows, spans: data.spans, values, log: true, worse: (i) => sign * last(i), prefix: "layer ", toneOf: layerTone, reference: 1, stands: (i) => Math.abs(Math.log2(last(i) / middle)) > 0.3 });
    }
}

// ---------------------------------------------------------------- layers; losses by source, position and MTP head

const LAYER_ORDER = ["residual_rms", "residual_max", "router_entropy", "routing_confidence", "topk_margin", "logit_max"];

function drawLayers() {
  const name = "series/layer";
  if (!has(name)) return;
  if (!docs[name]) return void want(name);
  const data = docs[name], all = floats(data.values), N = data.names.length, T = data.spans.length;
  const columns = data.columns.map(([column]) => column).filter((column) => LAYER_ORDER.includes(column)).sort((a, b) => LAYER_ORDER.indexOf(a) - LAYER_ORDER.indexOf(b));
  for (const column of columns) {
    const values = columnOf(data, all, column);
    many("layers", column, `${label(column)[0].toUpperCase()}${label(column).slice(1)}`, "by layer", {
      names: data.names, spans: data.spans, values, log: column.startsWith("residual"), prefix: "layer ", toneOf: layerTone,
      worse: (i) => changeOf(values, T, N, i), stands: (i) => changeOf(values, T, N, i) > 1 });
  }
}

function drawLosses() {
  for (const [table, column, title, prefix, toneOf] of [["source", "source_loss", "Loss by source", "", sourceTone], ["position", "position_loss", "Loss by position", "from ", (_, i) => toneAt(i)],
    ["mtp_head", "mtp_loss", "Loss by MTP head", "head ", (_, i) => toneAt(i)]]) {
    const name = `series/${table}`;
    if (!has(name)) continue;
    if (!docs[name]) { want(name); continue; }
    const data = docs[name];
    if (!data.columns.some(([one]) => one === column)) continue;
    const values = columnOf(data, floats(data.values), column), N = data.names.length;
    many("losses", table, title, "nats a token", { names: data.names, spans: data.spans, values, log: false, prefix, toneOf, few: N <= 8, stands: () => true, worse: (i) => lastKnown(values, data.spans.length, N, i) });
  }
}

function lastKnown(values, T, N, i) {
  for (let t = T - 1; t >= 0; t--) if (Number.isFinite(values[t * N + i])) return values[t * N + i];
  return NaN;
}

function changeOf(values, T, N, i) {
  // How far the last value is from the middle of all, in octaves.
  const known = [];
  for (let t = 0; t < T; t++) if (Number.isFinite(values[t * N + i])) known.push(values[t * N + i]);
  if (known.length < 2) return NaN;
  const last = known.at(-1), middle = known.slice().sort((a, b) => a - b)[known.length >> 1];
  return last > 0 && middle > 0 ? Math.abs(Math.log2(last / middle)) : Math.abs(last - middle);
}

section((name) => ["tables", "ledger", "spread/layer_expert"].includes(name), drawSpread);
section((name) => ["tables", "ledger", "series/layer"].includes(name), drawLayers);
section((name) => ["tables", "ledger", "series/source", "series/position", "series/mtp_head"].includes(name), drawLosses);
for (const [id, draw] of [["spread", drawSpread], ["layers", drawLayers], ["losses", drawLosses]]) {
  zoomed.push(draw);
  onResize(at(id), draw);
}
