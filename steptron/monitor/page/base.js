"use strict";
// The page: one JSON value in, everything drawn from it. Curves share their horizontal axis, zoom and cross-hair.
const D = JSON.parse(document.getElementById("data").textContent);
const TONES = ["blue", "teal", "amber", "violet", "rose", "green", "slate", "brown"].map((name) => `var(--${name})`);
const SVG = "http://www.w3.org/2000/svg";
const curves = D.curves;
const STAGE_TONES = ["slate", "violet", "green", "rose", "brown", "teal"].map((name) => `var(--${name})`);
const stageTone = new Map(D.stages.map((stage, i) => [stage.name, STAGE_TONES[i % STAGE_TONES.length]]));
const sourceTone = new Map();

// ---------------------------------------------------------------- elements and numbers

function put(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") node.style.cssText += value;
    else if (name === "tone") node.style.setProperty("--tone", value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  for (const child of children.flat(2)) if (child !== null && child !== undefined) node.append(child);
  return node;
}
const el = (tag, attributes, ...children) => put(document.createElement(tag), attributes, children);
const sv = (tag, attributes, ...children) => put(document.createElementNS(SVG, tag), attributes, children);
const at = (id) => document.getElementById(id);
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

const whole = (n) => (n === null || n === undefined ? "–" : Math.round(n).toLocaleString("en-US"));
function short(n) {
  if (n === null || n === undefined) return "–";
  for (const [factor, suffix] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]])
    if (Math.abs(n) >= factor * 0.99995) return +(n / factor).toPrecision(3) + suffix;
  return String(+n.toPrecision(3));
}
function plain(n, digits = 4) {
  if (n === null || n === undefined) return "–";
  if (typeof n === "string") return n;
  if (n !== 0 && (Math.abs(n) < 1e-3 || Math.abs(n) >= 1e6)) return n.toExponential(Math.max(0, digits - 2));
  return n.toPrecision(digits);
}
const tight = (n) => (n === 0 ? "0" : Math.abs(n) < 1e-3 ? String(+n.toPrecision(3)).replace("e-", "e−") : String(+n.toPrecision(6)));
const percent = (n) => (n === null || n === undefined ? "–" : `${+(100 * n).toPrecision(3)} %`);
const clock = (iso) => (iso ? iso.slice(0, 19).replace("T", " ") : "–");
function span(seconds) {
  if (seconds < 10) return `${+seconds.toPrecision(2)} s`;
  const s = Math.round(seconds), h = Math.floor(s / 3600), m = Math.floor((s % 3600) / 60);
  if (h >= 48) return `${Math.floor(h / 24)} d ${h % 24} h`;
  return h ? `${h} h ${m} min` : m ? `${m} min ${s % 60} s` : `${s} s`;
}
function onResize(node, act) {
  let width = 0;
  new ResizeObserver(() => {
    if (node.clientWidth === width) return;
    width = node.clientWidth;
    requestAnimationFrame(act);
  }).observe(node);
}
const lastOf = (values) => values.findLast((value) => value !== null);

function tip(event, top, rows) {
  const box = at("tip");
  const lines = rows.map(([tone, name, value]) => el("tr", null, el("td", null, tone ? el("i", { tone }) : null, name), el("td", null, value)));
  box.replaceChildren(el("div", { class: "top" }, top), el("table", null, lines));
  box.style.display = "block";
  const { width, height } = box.getBoundingClientRect();
  const left = event.clientX + 16 + width > innerWidth ? event.clientX - width - 16 : event.clientX + 16;
  box.style.left = `${Math.max(4, left)}px`;
  box.style.top = `${clamp(event.clientY + 14, 4, Math.max(4, innerHeight - height - 8))}px`;
}
const untip = () => (at("tip").style.display = "none");

// ---------------------------------------------------------------- head, tiles, stages

const STATES = { finished: "green", running: "blue", stopped: "amber", interrupted: "amber", empty: "slate" };

function head() {
  const run = D.run;
  document.title = `${run.name} · Steptron`;
  const facts = [
    D.stages.length ? `${D.stages.length} stage${D.stages.length > 1 ? "s" : ""}` : null,
    run.started ? `started ${clock(run.started)} UTC` : null,
    run.updated ? `last step ${clock(run.updated)} UTC` : "no step yet",
    run.resumes ? `resumed ${run.resumes === 1 ? "once" : `${run.resumes} times`}` : null,
  ];
  const state = el("span", { class: "state", tone: `var(--${STATES[run.state]})` }, run.state === "empty" ? "no steps" : run.state);
  put(at("head"), null, [
    el("div", { class: "title" }, el("h1", null, run.name), state),
    el("div", { class: "under" }, facts.filter(Boolean).join(" · ")),
  ]);
  at("foot").append(`Steptron ${run.version} · written ${clock(run.written)} UTC · this file needs no network`);
}

function tiles() {
  const tile = (name, value, small, more) =>
    at("tiles").append(
      el("div", { class: "tile" }, el("div", { class: "name" }, name),
        el("div", { class: "value" }, value, small ? el("small", null, ` ${small}`) : null), el("div", { class: "more" }, more || "")));
  if (!curves) return;
  const values = curves.values, run = D.run;
  const recent = (key) => {
    const numbers = values[key] ? values[key].mean.slice(-20).filter((value, i, all) => value !== null && curves.stage.at(i - all.length) === run.stage) : [];
    return numbers.length ? numbers.reduce((a, b) => a + b, 0) / numbers.length : null;
  };
  if (values.loss) tile("Loss", plain(lastOf(values.loss.mean)), "nats", `from ${plain(values.loss.mean.find((v) => v !== null))}`);
  tile("Tokens", short(run.tokens), run.budget ? `of ${short(run.budget)}` : "", run.budget ? `${percent(Math.min(1, run.tokens / run.budget))} of the budget` : "");
  tile("Step", whole(run.step), "", run.stage ? `in stage ${run.stage}` : "");
  if (values.tokens_per_second) tile("Speed", short(recent("tokens_per_second")), "tokens/s", values.mfu ? `MFU ${percent(recent("mfu"))}` : "");
  if (values.grad_norm) tile("Gradient norm", plain(recent("grad_norm"), 3), "", `highest ${plain(Math.max(...(values.grad_norm.high || values.grad_norm.mean)), 3)}`);
  tile("Time in steps", span(run.seconds), "", `${span(run.seconds / Math.max(1, run.step))} a step`);
}

function curriculum() {
  if (!D.stages.length) return;
  const total = D.stages.reduce((sum, stage) => sum + (stage.budget || stage.tokens || 1), 0);
  const strip = D.stages.map((stage) => {
    const size = stage.budget || stage.tokens || 1;
    return el("div", { tone: stageTone.get(stage.name), style: `flex: ${Math.max(size / total, 0.02)} 1 0` },
      el("u", { style: `width: ${100 * Math.min(1, stage.tokens / size)}%` }),
      el("span", null, stage.name, el("em", null, stage.seq_len ? `length ${whole(stage.seq_len)}` : "")));
  });
  const rate = (lr) => (lr.peak === undefined ? "–" : `${lr.kind} ${tight(lr.peak)}${lr.end === null || lr.end === undefined ? "" : ` → ${tight(lr.end)}`}`);
  const names = ["Stage", "Steps", "Tokens", "Budget", "Length", "Batch", "Learning rate", "MTP weight", "Bias rate", "RoPE θ (full)"];
  const rows = D.stages.map((stage) => el("tr", null,
    el("td", null, el("span", { class: "dot", tone: stageTone.get(stage.name) }), stage.name),
    [stage.first === null ? "not begun" : [...new Set([stage.first, stage.last])].map(whole).join("–"), short(stage.tokens), short(stage.budget), whole(stage.seq_len),
      whole(stage.batch_size), rate(stage.lr), stage.mtp_weight ?? "–", stage.bias_rate ?? "–", short(stage.rope_theta_full),
    ].map((text) => el("td", null, String(text)))));
  put(at("curriculum"), { class: "card" }, [
    el("div", { class: "bar" }, el("h2", null, "Stages"), el("span", { class: "unit" }, "width by tokens, filled as far as the run got")),
    el("div", { class: "strip" }, strip),
    el("div", { class: "scroll" }, el("table", { class: "data" }, el("thead", null, el("tr", null, names.map((name) => el("th", null, name)))), el("tbody", null, rows))),
  ]);
}
