"use strict";
// The heat map: layers down, experts (or heads) across, one slice of time at a time; colour is the ratio to the centre of the row.
const OCTAVES = 12; // that the codes reach, up and down
const UNKNOWN = 65535;

function ratios(text) {
  const codes = new Uint16Array(bytesOf(text));
  return Float32Array.from(codes, (code) => (code === 0 ? 0 : code === UNKNOWN ? NaN : 2 ** (((code - 1) / 65533) * 2 * OCTAVES - OCTAVES)));
}

const RAMPS = {
  light: { under: [[241, 241, 238], [120, 174, 222], [14, 72, 140]], over: [[241, 241, 238], [240, 172, 92], [168, 62, 8]], zero: [20, 20, 22], none: [255, 255, 255] },
  dark: { under: [[44, 47, 52], [44, 108, 176], [140, 200, 255]], over: [[44, 47, 52], [176, 96, 24], [255, 190, 100]], zero: [255, 255, 255], none: [25, 27, 30] },
};
const dark = matchMedia("(prefers-color-scheme: dark)");
const ramps = () => RAMPS[dark.matches ? "dark" : "light"];

function colour(ratio, ramp, reach) {
  if (Number.isNaN(ratio)) return ramp.none;
  if (ratio === 0) return ramp.zero;
  const octaves = Math.log2(ratio), [low, middle, high] = octaves < 0 ? ramp.under : ramp.over;
  const part = Math.min(1, Math.abs(octaves) / reach) * 2;
  const [from, to, t] = part < 1 ? [low, middle, part] : [middle, high, part - 1];
  return from.map((channel, i) => channel + (to[i] - channel) * t);
}

function reachOf(load) {
  // Octaves for the colours: as few as show all but a twentieth of the values.
  const every = Math.ceil(load.length / 20000), octaves = [];
  for (let i = 0; i < load.length; i += every) if (load[i] > 0) octaves.push(Math.abs(Math.log2(load[i])));
  octaves.sort((a, b) => a - b);
  const most = octaves[Math.floor(0.95 * octaves.length)] || 0;
  return [0.5, 1].find((reach) => most <= reach) || 2;
}

const cellState = { table: null, column: null, slice: null, reach: null, hover: null, timer: null };
const ORDER = ["tokens", "out_norm", "activation_rms", "weight_norm", "peak_gate", "peak_up", "alignment", "gate_mean", "attention_entropy"];
const LABELS = { tokens: "load (tokens)", out_norm: "output norm", activation_rms: "activation RMS", weight_norm: "weight norm", peak_gate: "peak of gate", peak_up: "peak of up",
  gate_mean: "head gate", attention_entropy: "attention entropy", mass_sum: "router mass", clipped_sum: "clipped", gradient_norm: "gradient norm", parameter_norm: "weight norm",
  update_ratio: "update ÷ weight", orthogonality: "orthogonality residual", step_time: "step time", data_wait: "data wait", communication_time: "communication",
  residual_rms: "residual RMS", residual_max: "residual maximum", router_entropy: "router entropy", routing_confidence: "routing confidence", topk_margin: "top-k margin",
  not_finite: "gradients not finite", output_rms: "output RMS", output_max: "output maximum", q_gain: "q norm gain", k_gain: "k norm gain", logit_max: "largest router logit" };
const label = (name) => LABELS[name] || words(name.replace(/_sum$/, ""));
const byOrder = ([a], [b]) => (ORDER.indexOf(a) + 100) % 100 - (ORDER.indexOf(b) + 100) % 100;

function cellChoices() {
  // [column, table] of what can be shown, the best known first.
  return Object.entries(docs.tables || {}).filter(([, { axes }]) => axes.length === 2)
    .flatMap(([table, { columns }]) => columns.map(([column]) => [column, table])).filter(([column, table]) => has(`cells/${table}/${column}`)).sort(byOrder);
}

function cellsCard() {
  // Built once; `show` draws into it.
  const card = { canvas: el("canvas", { role: "img", tabindex: 0, "aria-label": "value by layer and expert; arrow keys move over the cells" }), trend: sv("svg", { class: "trend", "aria-hidden": "true" }),
    when: el("output", { class: "when" }), note: el("div", { class: "note" }), choices: el("span", { class: "choices" }), unit: el("span", { class: "unit" }),
    bar: el("canvas", { width: 150, height: 1 }), low: el("span"), high: el("span"), zero: el("span", { class: "zero" }, el("i"), "") };
  card.slider = el("input", { type: "range", min: 0, step: 1, "aria-label": "time: slice of the run", oninput: () => show(+card.slider.value) });
  card.play = el("button", { class: "play", type: "button", title: "play", "aria-label": "play", onclick: () => (cellState.timer ? stop() : start()) });
  const icon = (path) => card.play.replaceChildren(sv("svg", { viewBox: "0 0 12 12" }, sv("path", { d: path })));
  const stop = () => { clearInterval(cellState.timer); cellState.timer = null; icon("M2 1l9 5-9 5z"); };
  const count = () => cellState.data.slices.length;
  const start = () => {
    if (cellState.slice === count() - 1) show(0);
    icon("M2 1h3v10H2zM7 1h3v10H7z");
    cellState.timer = setInterval(() => (cellState.slice < count() - 1 ? show(cellState.slice + 1) : stop()), Math.max(60, 4000 / count()));
  };
  const show = (slice) => { cellState.slice = slice; drawCells(card); };
  card.reaches = [[0.5, "1.4 ×"], [1, "2 ×"], [2, "4 ×"]].map(([reach, text]) => [reach, chip(text, false, () => { cellState.reach = reach; drawCells(card); }, "ratio at which the colours end")]);
  card.trend.addEventListener("pointerdown", (event) => {
    const box = card.trend.getBoundingClientRect();
    show(clamp(Math.round(((event.clientX - box.left - 8) / (box.width - 16)) * (count() - 1)), 0, count() - 1));
  });
  put(at("cells"), null, [el("div", { class: "card" },
    el("div", { class: "bar" }, el("h2", null, "Experts and heads"), card.unit, el("span", { class: "push" }, card.choices)),
    el("div", { class: "bar" }, el("span", { class: "push legend" }, el("span", { class: "reaches" }, card.reaches.map(([, node]) => node)), card.low, card.bar, card.high, card.zero)),
    el("div", { class: "heat" }, card.canvas),
    el("div", { class: "player" }, card.play, card.slider, card.when, card.trend, card.note))]);
  hoverCells(card);
  stop();
  dark.addEventListener("change", () => drawCells(card));
  onResize(at("cells"), () => drawCells(card));
  return card;
}

const FAR = 2; // octaves from the median of its layer that are worth a mark
function flag(table, column) {
  // ▲ or ▼ where an expert is far from its layer's median now: the statistic to look at.
  const data = docs[`spread/${table}`];
  if (!data || column === "tokens" || !data.columns.some(([name]) => name === column)) return "";
  const N = data.rows.length, end = (all) => columnOf(data, floats(all), column).subarray(-N);
  const marks = [end(data.high).some((ratio) => Math.log2(ratio) > FAR) ? "▲" : "", end(data.low).some((ratio) => ratio > 0 && Math.log2(ratio) < -FAR) ? "▼" : ""].join("");
  return marks && `${marks} `;
}

let theCells = null;
section((name) => name === "tables" || name.startsWith("cells/") || name === "spread/layer_expert", () => {
  const choices = cellChoices();
  if (!choices.length) return;
  if (!choices.some(([column, table]) => column === cellState.column && table === cellState.table)) [cellState.column, cellState.table] = choices[0];
  const name = `cells/${cellState.table}/${cellState.column}`;
  if (!docs[name]) return void want(name);
  theCells = theCells || cellsCard();
  chooser(theCells.choices, choices.map(([column, table]) => [`${table}/${column}`, `${flag(table, column)}${label(column)}`]), `${cellState.table}/${cellState.column}`, (key) => {
    wanted.delete(`cells/${cellState.table}/${cellState.column}`);
    [cellState.table, cellState.column] = key.split("/");
    cellState.reach = null;
    delete docs[`cells/${key}`];
    delete tags[`cells/${key}`];
    want(`cells/${key}`);
  });
  takeCells(docs[name]);
  drawCells(theCells);
});

function chooser(host, entries, chosen, act) {
  // Chips, one of them pressed; where there are many, a list.
  const key = JSON.stringify([entries, chosen]);
  if (host.dataset.key === key) return;
  const focus = host.contains(document.activeElement);
  host.dataset.key = key;
  const few = entries.slice(0, 4), rest = entries.slice(4);
  const nodes = few.map(([value, text]) => chip(text, value === chosen, () => act(value)));
  if (rest.length) {
    const inRest = rest.some(([value]) => value === chosen);
    nodes.push(el("select", { class: `chip${inRest ? " on" : ""}`, "aria-label": "other statistics", onchange: (event) => event.currentTarget.value && act(event.currentTarget.value) },
      el("option", { value: "", selected: inRest ? null : "" }, "more …"), rest.map(([value, text]) => el("option", { value, selected: value === chosen ? "" : null }, text))));
  }
  host.replaceChildren(...nodes);
  if (focus) (host.querySelector("[aria-pressed=true]") || host.querySelector("select")).focus();
}

function takeCells(data) {
  const before = cellState.data, at_end = cellState.slice === null || !before || cellState.slice >= before.slices.length - 1;
  const shownStep = before && !at_end ? before.slices[cellState.slice][0] : null;
  const L = data.rows.length, E = data.cells.length, load = ratios(data.ratio), S = data.slices.length;
  const worst = [], least = [], zero = [];
  for (let s = 0; s < S; s++) {
    const [high, low, none] = [new Float32Array(L).fill(NaN), new Float32Array(L).fill(NaN), new Int32Array(L)];
    for (let l = 0; l < L; l++)
      for (let i = (s * L + l) * E; i < (s * L + l + 1) * E; i++) {
        const ratio = load[i];
        if (!(ratio <= high[l])) high[l] = Number.isNaN(ratio) ? high[l] : ratio;
        if (!(ratio >= low[l])) low[l] = Number.isNaN(ratio) ? low[l] : ratio;
        if (ratio === 0) none[l]++;
      }
    worst.push(high);
    least.push(low);
    zero.push(none);
  }
  Object.assign(cellState, { data, L, E, load, centre: floats(data.centre), worst, least, zero });
  cellState.reach = cellState.reach || reachOf(load);
  // A slider at its end follows the run; elsewhere it stays at its step.
  cellState.slice = at_end ? S - 1 : clamp(data.slices.findLastIndex(([first]) => first <= shownStep), 0, S - 1);
}

const most = (row) => row.reduce((a, b) => (Number.isNaN(b) || b <= a ? a : b), -Infinity);
const fewest = (row) => row.reduce((a, b) => (Number.isNaN(b) || b >= a ? a : b), Infinity);

function drawCells(card) {
  const { data, slice, reach, L, E, worst, least, zero } = cellState, { slider } = card;
  slider.max = data.slices.length - 1;
  slider.value = slice;
  slider.disabled = data.slices.length < 2;
  const [, , stage] = data.slices[slice];
  slider.setAttribute("aria-valuetext", stepsOf(data.slices[slice]));
  card.when.replaceChildren(el("b", null, stepsOf(data.slices[slice])), stage ? ` · ${stage}` : "");
  card.unit.textContent = `${label(cellState.column)} of each ${data.cell} ÷ ${data.centre_is} of its ${data.row}`;
  const high = most(worst[slice]), low = fewest(least[slice]), none = zero[slice].reduce((a, b) => a + b, 0);
  const where = (rows, value) => {
    const l = rows.indexOf(value), row = cellState.load.subarray((slice * L + l) * E, (slice * L + l + 1) * E);
    return l < 0 ? "" : `${data.row} ${data.rows[l]}, ${data.cell} ${data.cells[row.indexOf(value)]}`;
  };
  card.note.replaceChildren(
    el("span", { class: "up" }, "▲ highest"), ` ${times(high)} in ${where(worst[slice], high)}`, el("br"),
    el("span", { class: "down" }, "▼ lowest"), none ? ` zero: ${whole(none)} of ${whole(L * E)}` : ` ${times(low)} in ${where(least[slice], low)}`);
  card.reaches.forEach(([one, node]) => node.setAttribute("aria-pressed", String(one === reach)));
  card.low.textContent = `${plain(2 ** -reach, 2)} ×`;
  card.high.textContent = `${plain(2 ** reach, 2)} ×`;
  card.zero.lastChild.textContent = cellState.column === "tokens" ? "no token" : "zero";
  drawLegend(card.bar, reach);
  drawHeat(card.canvas);
  drawTrend(card.trend);
}

function drawLegend(canvas, reach) {
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, 1), ramp = ramps();
  for (let i = 0; i < canvas.width; i++)
    image.data.set([...colour(2 ** ((i / (canvas.width - 1) - 0.5) * 2 * reach), ramp, reach), 255], 4 * i);
  context.putImageData(image, 0, 0);
}

function drawHeat(canvas) {
  const { data, L, E, load, slice, hover, reach } = cellState, ramp = ramps(), style = getComputedStyle(document.body);
  const width = canvas.clientWidth, narrow = width < 560, left = narrow ? 30 : 62, right = narrow ? 44 : 78, cellH = clamp(Math.floor(420 / L), 8, 26), top = 4, bottom = 34;
  const cellW = (width - left - right) / E, height = top + L * cellH + bottom, density = devicePixelRatio || 1;
  Object.assign(cellState, { left, top, cellW, cellH });
  canvas.style.height = `${height}px`;
  canvas.width = width * density;
  canvas.height = height * density;
  const pixels = new OffscreenCanvas(E, L), image = new ImageData(E, L);
  for (let i = 0; i < L * E; i++) image.data.set([...colour(load[slice * L * E + i], ramp, reach), 255], 4 * i);
  pixels.getContext("2d").putImageData(image, 0, 0);
  const context = canvas.getContext("2d");
  context.scale(density, density);
  context.imageSmoothingEnabled = false;
  context.drawImage(pixels, left, top, E * cellW, L * cellH);
  context.fillStyle = style.getPropertyValue("--card");
  if (cellW >= 7) for (let e = 1; e < E; e++) context.fillRect(left + e * cellW - 0.5, top, 1, L * cellH);
  for (let l = 1; l < L; l++) context.fillRect(left, top + l * cellH - 0.5, E * cellW, cellH >= 12 ? 1 : 0.5);
  context.font = `11.5px ${style.fontFamily}`;
  context.fillStyle = style.getPropertyValue("--soft");
  context.textBaseline = "middle";
  const skip = Math.ceil(14 / cellH), ends = cellState.worst[slice];
  for (let l = 0; l < L; l++) {
    if (l % skip && !(hover && hover.l === l)) continue;
    const y = top + (l + 0.5) * cellH;
    context.textAlign = "right";
    context.fillText(l || narrow ? data.rows[l] : `${data.row} ${data.rows[l]}`, left - 8, y);
    context.textAlign = "left";
    context.fillText(`${Number.isNaN(ends[l]) ? "–" : `${ends[l].toPrecision(3)} ×`}${l || narrow ? "" : " max"}`, left + E * cellW + 8, y);
  }
  context.textAlign = "center";
  const every = [1, 2, 4, 8, 16, 32, 64, 128].find((n) => n * cellW >= 34) || 256;
  for (let e = 0; e < E; e += every) context.fillText(data.cells[e], left + (e + 0.5) * cellW, top + L * cellH + 12);
  context.textAlign = "right";
  context.fillText(data.cell, left + E * cellW, top + L * cellH + 27);
  if (hover) {
    context.strokeStyle = style.getPropertyValue("--ink");
    context.lineWidth = 1.5;
    context.strokeRect(left + hover.e * cellW - 0.5, top + hover.l * cellH - 0.5, cellW + 1, cellH + 1);
  }
}

function drawTrend(svg) {
  // Highest and lowest value of any row over time, in octaves around the centre.
  const { data, worst, least, slice } = cellState, n = data.slices.length, width = svg.clientWidth || 500, height = 46;
  const octaves = (value) => (Number.isFinite(value) ? clamp(Math.log2(value), -6, 12) : 0);
  const high = worst.map((row) => octaves(most(row))), low = least.map((row) => octaves(fewest(row)));
  const top = Math.max(...high, 0.5), bottom = Math.min(...low, -0.5);
  const x = (s) => 8 + (n > 1 ? s / (n - 1) : 0.5) * (width - 16), y = (value) => 4 + ((top - value) / (top - bottom)) * (height - 8);
  const path = (values) => values.map((value, s) => `${s ? "L" : "M"}${x(s).toFixed(1)} ${y(value).toFixed(1)}`).join("");
  const line = (values, tone) => sv("path", { d: path(values), fill: "none", style: `stroke: ${tone}`, "stroke-width": 1.5 });
  const dot = (value, tone) => sv("circle", { cx: x(slice), cy: y(value), r: 3, style: `fill: ${tone}` });
  svg.replaceChildren(
    sv("title", null, "highest and lowest ratio over time, logarithmic; the line between them is the centre"),
    sv("line", { x1: 8, x2: width - 8, y1: y(0), y2: y(0), style: "stroke: var(--line)" }),
    sv("line", { x1: x(slice), x2: x(slice), y1: 0, y2: height, style: "stroke: var(--faint)" }),
    line(high, "var(--amber)"), line(low, "var(--blue)"), dot(high[slice], "var(--amber)"), dot(low[slice], "var(--blue)"));
}

function hoverCells(card) {
  const { canvas } = card;
  const leave = () => {
    untip();
    if (cellState.hover) { cellState.hover = null; drawHeat(canvas); }
  };
  const enter = (event, e, l) => {
    const { data, E, L, load, slice, centre, worst, least, zero } = cellState;
    if (!cellState.hover || cellState.hover.e !== e || cellState.hover.l !== l) {
      cellState.hover = { e, l };
      drawHeat(canvas);
    }
    const ratio = load[(slice * L + l) * E + e], middle = centre[slice * L + l];
    tip(event, `${data.row} ${data.rows[l]} · ${data.cell} ${data.cells[e]}`, [
      [null, label(cellState.column), Number.isNaN(ratio) ? "not known" : ratio === 0 ? (cellState.column === "tokens" ? "no token" : "0") : `${plain(ratio * middle, 4)} ${data.unit === "1" ? "" : data.unit}`],
      [null, `÷ ${data.centre_is} of the ${data.row}`, times(ratio)],
      [null, `highest of the ${data.row}`, times(worst[slice][l])],
      [null, `lowest of the ${data.row}`, times(least[slice][l])],
      ...(zero[slice][l] ? [[null, `zero in the ${data.row}`, `${zero[slice][l]} of ${E}`]] : [])]);
  };
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect(), { L, E, left, top, cellW, cellH } = cellState;
    const e = Math.floor((event.clientX - box.left - left) / cellW), l = Math.floor((event.clientY - box.top - top) / cellH);
    if (e < 0 || e >= E || l < 0 || l >= L) leave(); else enter(event, e, l);
  });
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key], { hover, E, L } = cellState;
    if (event.key === "Escape") return leave();
    if (!move) return undefined;
    event.preventDefault();
    return enter(event, clamp((hover ? hover.e : 0) + move[0], 0, E - 1), clamp((hover ? hover.l : 0) + move[1], 0, L - 1));
  });
  canvas.addEventListener("pointerleave", leave);
  canvas.addEventListener("blur", leave);
}
