"use strict";
// The heat map: layers down, experts across, one slice of time at a time; colour is the load over the layer's mean.
const OCTAVES = 12; // that the codes reach, up and down

function decode(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const view16 = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 2 }, (_, i) => {
    const code = view16.getUint16(2 * i, true);
    return code === 0 ? 0 : 2 ** (((code - 1) / 65534) * 2 * OCTAVES - OCTAVES);
  });
}

const RAMPS = {
  light: { under: [[242, 242, 239], [136, 178, 230], [24, 70, 148]], over: [[242, 242, 239], [246, 176, 104], [176, 42, 24]], idle: [211, 18, 126] },
  dark: { under: [[38, 41, 46], [44, 98, 168], [132, 190, 255]], over: [[38, 41, 46], [170, 88, 30], [255, 186, 112]], idle: [255, 79, 174] },
};
const ramps = () => RAMPS[matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"];

function colour(ratio, ramp, reach) {
  if (ratio === 0) return ramp.idle;
  const octaves = Math.log2(ratio), [low, middle, high] = octaves < 0 ? ramp.under : ramp.over;
  const part = Math.min(1, Math.abs(octaves) / reach) * 2;
  const [from, to, t] = part < 1 ? [low, middle, part] : [middle, high, part - 1];
  return from.map((channel, i) => channel + (to[i] - channel) * t);
}

function reachOf(load) {
  // Octaves for the colours: as few as show all but a twentieth of the loads.
  const octaves = load.filter((ratio, i) => ratio > 0 && i % Math.ceil(load.length / 20000) === 0).map((ratio) => Math.abs(Math.log2(ratio))).sort();
  const most = octaves[Math.floor(0.95 * octaves.length)] || 0;
  return [0.5, 1].find((reach) => most <= reach) || 2;
}

function imbalance(load, slices, layers, experts) {
  // Highest and lowest load by slice and layer, and experts without a token.
  const worst = [], least = [], idle = [];
  for (let s = 0; s < slices; s++) {
    worst.push([]);
    least.push([]);
    idle.push([]);
    for (let l = 0; l < layers; l++) {
      const row = load.subarray((s * layers + l) * experts, (s * layers + l + 1) * experts);
      worst[s].push(row.reduce((a, b) => Math.max(a, b), 0));
      least[s].push(row.reduce((a, b) => Math.min(a, b), Infinity));
      idle[s].push(row.reduce((n, ratio) => n + (ratio === 0), 0));
    }
  }
  return { worst, least, idle };
}

function experts() {
  if (!D.experts) return;
  const X = D.experts, L = X.layers.length, E = X.experts, load = decode(X.load);
  const state = { X, L, E, load, slice: X.slices.length - 1, hover: null, timer: null, reach: reachOf(load), ...imbalance(load, X.slices.length, L, E) };
  const canvas = el("canvas", { role: "img", "aria-label": "expert load by layer and expert" });
  const slider = el("input", { type: "range", min: 0, max: X.slices.length - 1, step: 1, "aria-label": "time", oninput: () => show(+slider.value) });
  slider.value = state.slice;
  const when = el("div", { class: "when" }), note = el("div", { class: "note" });
  const trend = sv("svg", { class: "trend" });
  const play = el("button", { class: "play", title: "play", onclick: () => (state.timer ? stop() : start()) });
  const icon = (path) => play.replaceChildren(sv("svg", { viewBox: "0 0 12 12" }, sv("path", { d: path })));
  const stop = () => { clearInterval(state.timer); state.timer = null; icon("M2 1l9 5-9 5z"); };
  const start = () => {
    if (state.slice === X.slices.length - 1) show(0);
    icon("M2 1h3v10H2zM7 1h3v10H7z");
    state.timer = setInterval(() => (state.slice < X.slices.length - 1 ? show(state.slice + 1) : stop()), Math.max(60, 4000 / X.slices.length));
  };
  function show(slice) {
    state.slice = slice;
    slider.value = slice;
    const [first, last, stage] = X.slices[slice];
    when.replaceChildren(el("b", null, first === last ? `step ${whole(first)}` : `steps ${whole(first)}–${whole(last)}`), ` · ${stage}`);
    const high = Math.max(...state.worst[slice]), low = Math.min(...state.least[slice]), idle = state.idle[slice].reduce((a, b) => a + b, 0);
    const where = (row, value) => `in layer ${X.layers[row.indexOf(value)]}`;
    note.replaceChildren(el("span", { style: "color: var(--amber)" }, "highest"), ` ${plain(high, 3)} × ${where(state.worst[slice], high)}`, el("br"),
      el("span", { style: "color: var(--blue)" }, "lowest"), idle ? ` no token at all: ${whole(idle)} of ${whole(L * E)}` : ` ${plain(low, 3)} × ${where(state.least[slice], low)}`);
    drawHeat(canvas, state);
    drawTrend(trend, state);
  }
  const legendBar = el("canvas", { width: 150, height: 1 }), low = el("span"), high = el("span");
  const reaches = [[0.5, "1.4 ×"], [1, "2 ×"], [2, "4 ×"]].map(([reach, label]) => el("button", { class: "chip", title: "load at which the colours end", onclick: () => {
    state.reach = reach;
    again();
  } }, label));
  put(at("experts"), { class: "card" }, [
    el("div", { class: "bar" }, el("h2", null, "Expert load"), el("span", { class: "unit" }, "tokens of an expert ÷ mean of its layer"),
      el("span", { class: "push legend" }, reaches, low, legendBar, high, el("i"), "no token")),
    el("div", { class: "heat" }, canvas),
    el("div", { class: "player" }, play, slider, when, trend, note),
  ]);
  trend.addEventListener("pointerdown", (event) => {
    const box = trend.getBoundingClientRect();
    show(clamp(Math.round(((event.clientX - box.left - 8) / (box.width - 16)) * (X.slices.length - 1)), 0, X.slices.length - 1));
  });
  hoverHeat(canvas, state);
  function again() {
    reaches.forEach((chip, i) => chip.setAttribute("aria-pressed", String([0.5, 1, 2][i] === state.reach)));
    low.textContent = `${plain(2 ** -state.reach, 2)} ×`;
    high.textContent = `${plain(2 ** state.reach, 2)} ×`;
    drawLegend(legendBar, state.reach);
    show(state.slice);
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  onResize(at("experts"), again);
  stop();
}

function drawLegend(canvas, reach) {
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, 1), ramp = ramps();
  for (let i = 0; i < canvas.width; i++)
    image.data.set([...colour(2 ** ((i / (canvas.width - 1) - 0.5) * 2 * reach), ramp, reach), 255], 4 * i);
  context.putImageData(image, 0, 0);
}

function drawHeat(canvas, state) {
  const { X, L, E, load, slice, hover } = state, ramp = ramps(), style = getComputedStyle(document.body);
  const width = canvas.clientWidth, left = 62, right = 78, cellH = clamp(Math.floor(420 / L), 8, 26), top = 4, bottom = 34;
  const cellW = (width - left - right) / E, height = top + L * cellH + bottom, density = devicePixelRatio || 1;
  Object.assign(state, { left, top, cellW, cellH });
  canvas.style.height = `${height}px`;
  canvas.width = width * density;
  canvas.height = height * density;
  const pixels = new OffscreenCanvas(E, L), image = new ImageData(E, L);
  for (let i = 0; i < L * E; i++) image.data.set([...colour(load[slice * L * E + i], ramp, state.reach), 255], 4 * i);
  pixels.getContext("2d").putImageData(image, 0, 0);
  const context = canvas.getContext("2d");
  context.scale(density, density);
  context.imageSmoothingEnabled = false;
  context.drawImage(pixels, left, top, E * cellW, L * cellH);
  const ink = style.getPropertyValue("--soft"), card = style.getPropertyValue("--card");
  context.fillStyle = card;
  if (cellW >= 7) for (let e = 1; e < E; e++) context.fillRect(left + e * cellW - 0.5, top, 1, L * cellH);
  for (let l = 1; l < L; l++) context.fillRect(left, top + l * cellH - 0.5, E * cellW, cellH >= 12 ? 1 : 0.5);
  context.font = `11.5px ${style.fontFamily}`;
  context.fillStyle = ink;
  context.textBaseline = "middle";
  const skip = Math.ceil(14 / cellH);
  for (let l = 0; l < L; l++) {
    if (l % skip && !(hover && hover.l === l)) continue;
    const y = top + (l + 0.5) * cellH;
    context.textAlign = "right";
    context.fillText(l ? X.layers[l] : `layer ${X.layers[l]}`, left - 8, y);
    context.textAlign = "left";
    context.fillText(`${state.worst[slice][l].toPrecision(3)} ×${l ? "" : " max"}`, left + E * cellW + 8, y);
  }
  context.textAlign = "center";
  const every = [1, 2, 4, 8, 16, 32, 64, 128].find((n) => n * cellW >= 34) || 256;
  for (let e = 0; e < E; e += every) context.fillText(e, left + (e + 0.5) * cellW, top + L * cellH + 12);
  context.textAlign = "right";
  context.fillText("expert", left + E * cellW, top + L * cellH + 27);
  if (hover) {
    context.strokeStyle = style.getPropertyValue("--ink");
    context.lineWidth = 1.5;
    context.strokeRect(left + hover.e * cellW - 0.5, top + hover.l * cellH - 0.5, cellW + 1, cellH + 1);
  }
}

function drawTrend(svg, state) {
  // Highest and lowest load of any layer over time, in octaves around the mean.
  const { X, worst, least, slice } = state, n = X.slices.length, width = svg.clientWidth || 500, height = 46;
  const octaves = (value) => Math.max(-6, Math.log2(value));
  const high = worst.map((row) => octaves(Math.max(...row))), low = least.map((row) => octaves(Math.min(...row)));
  const top = Math.max(...high, 0.5), bottom = Math.min(...low, -0.5);
  const x = (s) => 8 + (n > 1 ? s / (n - 1) : 0.5) * (width - 16), y = (value) => 4 + ((top - value) / (top - bottom)) * (height - 8);
  const path = (values) => values.map((value, s) => `${s ? "L" : "M"}${x(s).toFixed(1)} ${y(value).toFixed(1)}`).join("");
  const line = (values, tone) => sv("path", { d: path(values), fill: "none", style: `stroke: ${tone}`, "stroke-width": 1.5 });
  const dot = (value, tone) => sv("circle", { cx: x(slice), cy: y(value), r: 3, style: `fill: ${tone}` });
  svg.replaceChildren(
    sv("title", null, "highest and lowest load over time, logarithmic; the line between them is the mean"),
    sv("line", { x1: 8, x2: width - 8, y1: y(0), y2: y(0), style: "stroke: var(--line)" }),
    sv("line", { x1: x(slice), x2: x(slice), y1: 0, y2: height, style: "stroke: var(--faint)" }),
    line(high, "var(--amber)"), line(low, "var(--blue)"), dot(high[slice], "var(--amber)"), dot(low[slice], "var(--blue)"));
}

function hoverHeat(canvas, state) {
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect(), { X, L, E, left, top, cellW, cellH, load, slice } = state;
    const e = Math.floor((event.clientX - box.left - left) / cellW), l = Math.floor((event.clientY - box.top - top) / cellH);
    if (e < 0 || e >= E || l < 0 || l >= L) return leave();
    if (!state.hover || state.hover.e !== e || state.hover.l !== l) {
      state.hover = { e, l };
      drawHeat(canvas, state);
    }
    const ratio = load[(slice * L + l) * E + e];
    tip(event, `layer ${X.layers[l]} · expert ${e}`, [
      [null, "load", ratio === 0 ? "no token" : `${plain(ratio, 3)} × mean`],
      [null, "share of the layer", percent(ratio / E)],
      [null, "busiest of the layer", `${plain(state.worst[slice][l], 3)} × mean`],
      [null, "idle in the layer", `${state.idle[slice][l]} of ${E}`],
    ]);
    return undefined;
  });
  const leave = () => {
    untip();
    if (state.hover) { state.hover = null; drawHeat(canvas, state); }
  };
  canvas.addEventListener("pointerleave", leave);
}
