"use strict";
// Elements, numbers, and where documents come from: inside this file (the report), or from the server that gave it (the live page).
const TONES = ["blue", "amber", "teal", "violet", "rose", "green", "slate", "brown"].map((name) => `var(--${name})`);
const SVG = "http://www.w3.org/2000/svg";
const docs = {}; // the documents as they stand, by name
const STAGE_TONES = ["slate", "violet", "green", "rose", "brown", "teal"].map((name) => `var(--${name})`);
const toneAt = (i) => TONES[(i + TONES.length) % TONES.length];
const sourceTone = (name) => toneAt(docs.run.source_names.indexOf(name)); // the same in every chart
const stageTone = (name) => STAGE_TONES[Math.max(0, docs.run.stages.findIndex((stage) => stage.name === name)) % STAGE_TONES.length];

// ---------------------------------------------------------------- elements and numbers

function put(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") node.style.cssText += value;
    else if (name === "tone") node.style.setProperty("--tone", value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  for (const child of children.flat(2)) if (child !== null && child !== undefined && child !== false) node.append(child);
  return node;
}
const el = (tag, attributes, ...children) => put(document.createElement(tag), attributes, children);
const sv = (tag, attributes, ...children) => put(document.createElementNS(SVG, tag), attributes, children);
const at = (id) => document.getElementById(id);
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const words = (name) => String(name).replaceAll("_", " ");
const chip = (text, pressed, act, title) => el("button", { class: "chip", type: "button", "aria-pressed": String(pressed), title, onclick: act }, text);

const whole = (n) => (n === null || n === undefined ? "–" : Math.round(n).toLocaleString("en-US"));
function short(n) {
  if (n === null || n === undefined) return "–";
  for (const [factor, suffix] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]])
    if (Math.abs(n) >= factor * 0.99995) return +(n / factor).toPrecision(3) + suffix;
  return String(+n.toPrecision(3));
}
function plain(n, digits = 4) {
  if (n === null || n === undefined || Number.isNaN(n)) return "–";
  if (typeof n === "string") return n;
  if (n !== 0 && (Math.abs(n) < 1e-3 || Math.abs(n) >= 1e6)) return n.toExponential(Math.max(0, digits - 2)).replace("e+", "e").replace("e-", "e−");
  return n.toPrecision(digits);
}
const tight = (n) => (n === 0 ? "0" : Math.abs(n) < 1e-3 || Math.abs(n) >= 1e6 ? n.toExponential().replace(/(\.\d{1,2})\d*/, "$1").replace("e+", "e").replace("e-", "e−") : String(+n.toPrecision(6)));
const times = (ratio) => (ratio === null || Number.isNaN(ratio) ? "–" : `${ratio >= 100 || ratio < 0.01 ? tight(+ratio.toPrecision(2)) : plain(ratio, 3)} ×`);
const percent = (n) => (n === null || n === undefined ? "–" : `${+(100 * n).toPrecision(3)} %`);
const clock = (iso) => (iso ? iso.slice(0, 19).replace("T", " ") : "–");
const stepsOf = ([first, last]) => (first === last ? `step ${whole(first)}` : `steps ${whole(first)}–${whole(last)}`);
function span(seconds) {
  if (seconds < 10) return `${+seconds.toPrecision(2)} s`;
  const s = Math.round(seconds), h = Math.floor(s / 3600), m = Math.floor((s % 3600) / 60);
  if (h >= 48) return `${Math.floor(h / 24)} d ${h % 24} h`;
  return h ? `${h} h ${m} min` : m ? `${m} min ${s % 60} s` : `${s} s`;
}
function onResize(node, act) {
  let width = node.clientWidth;
  new ResizeObserver(() => {
    if (node.clientWidth === width) return;
    width = node.clientWidth;
    requestAnimationFrame(act);
  }).observe(node);
}
const lastOf = (values) => values.findLast((value) => value !== null);
const bytesOf = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
const floats = (text) => new Float32Array(bytesOf(text));

function tip(event, top, rows) {
  const box = at("tip"), node = event.currentTarget, frame = node && node.getBoundingClientRect();
  const [left, upper] = event.clientX === undefined ? [frame.left + 40, frame.top] : [event.clientX, event.clientY]; // from the keyboard
  const lines = rows.map(([tone, name, value]) => el("tr", null, el("td", null, tone ? el("i", { tone }) : null, name), el("td", null, value)));
  box.replaceChildren(el("div", { class: "top" }, top), el("table", null, lines));
  box.style.display = "block";
  const { width, height } = box.getBoundingClientRect();
  box.style.left = `${Math.max(4, left + 16 + width > innerWidth ? left - width - 16 : left + 16)}px`;
  box.style.top = `${clamp(upper + 14, 4, Math.max(4, innerHeight - height - 8))}px`;
}
const untip = () => (at("tip").style.display = "none");

// ---------------------------------------------------------------- documents

const inside = new Map([...document.querySelectorAll("script[data-name]")].map((node) => [node.dataset.name, node]));
const live = inside.size === 0;
const tags = {}; // of the documents in `docs`
const wanted = new Set(["run", "curves", "ledger", "tables"]); // what sections have asked for
const sections = []; // { needs, draw }: drawn when one of the documents they need has changed
let index = live ? null : Object.fromEntries([...inside.keys()].map((name) => [name, "inside"]));

const has = (name) => index !== null && name in index;
const section = (needs, draw) => sections.push({ needs, draw });

async function load(name) {
  if (!live) return JSON.parse(inside.get(name).textContent);
  const answer = await fetch(`/data/${name}`, { cache: "no-store", signal: AbortSignal.timeout(60000) });
  if (!answer.ok) throw new Error(`${name}: ${answer.status}`);
  return answer.json();
}

async function refresh() {
  // Fetch what is wanted and has changed, then draw the sections that need it.
  const changed = [];
  for (const name of wanted) {
    if (!has(name) || tags[name] === index[name]) continue;
    const tag = index[name];
    docs[name] = await load(name);
    tags[name] = tag;
    changed.push(name);
  }
  const done = sections.filter(({ needs }) => changed.some((name) => needs(name)));
  for (const { draw } of done) draw();
  if (done.length) drawStrip();
  return changed;
}

let fetching = Promise.resolve();
function want(name) {
  // A section needs one more document; it is drawn once it is here.
  wanted.add(name);
  fetching = fetching.then(refresh).catch(lost);
  return fetching;
}
