"use strict";
// The top of the page: what run this is, how it is, its key figures, and what was raised or decided lately.
const STATES = { // colour, mark, words
  finished: ["green", "✓", "finished"], running: ["blue", "▶", "running"], empty: ["slate", "·", "no steps"], interrupted: ["rose", "✕", "interrupted"],
  saved: ["amber", "■", "saved, resumable"], stopped: ["amber", "■", "stopped"], failed: ["rose", "✕", "failed"],
};
const ENDS = { 0: "finished", 1: "failed", 2: "failed", 75: "saved", 76: "saved" }; // by exit code, as in dashboard.py
const EVENTS = {
  alarm: ["rose", "▲"], alarm_cleared: ["green", "✓"], decision: ["amber", "◆"], rewind: ["violet", "↶"], skip: ["amber", "◆"], clip: ["amber", "◆"], stop: ["rose", "■"],
  run_start: ["blue", "▶"], fork: ["blue", "▶"], resume: ["blue", "▶"], stage_start: ["violet", "→"], stage_end: ["slate", "·"], checkpoint: ["slate", "·"], checkpoint_skipped: ["amber", "·"], run_end: ["green", "✓"], sources: ["slate", "·"],
};
const QUIET = new Set(["run_start", "fork", "sources", "stage_start", "stage_end", "resume", "new_layout", "checkpoint", "evaluation", "run_end", "detectors", "alarm_cleared"]); // no reason to look twice
const grave = (event) => !QUIET.has(event.event);
const eventStyle = (event) => (event.event === "run_end" && event.reason ? STATES[ENDS[event.exit_code] || "stopped"] : EVENTS[event.event]) || [grave(event) ? "amber" : "slate", grave(event) ? "◆" : "·"];
const alarms = () => docs.ledger.events.filter(grave);

function badge(event) {
  const [tone, mark] = eventStyle(event);
  return el("span", { class: "badge", tone: `var(--${tone})` }, el("span", { "aria-hidden": "true" }, `${mark} `), words(event.event));
}

function drawHead() {
  const run = docs.run, [tone, mark, state] = STATES[run.state];
  document.title = `${run.step === null ? "" : `${whole(run.step)} · `}${run.name} · Steptron`;
  const facts = [
    run.stages.length ? `${run.stages.length} stage${run.stages.length > 1 ? "s" : ""}` : null,
    run.started ? `started ${clock(run.started)} UTC` : null,
    run.updated ? `last step ${clock(run.updated)} UTC` : "no step yet",
    run.parent ? `forked from ${run.parent.name} at step ${whole(run.parent.step)}` : null,
    run.resumes ? `resumed ${run.resumes === 1 ? "once" : `${run.resumes} times`}` : null,
  ];
  const { commit, command, host, ...versions } = run.origin;
  const origin = [command, host ? `on ${host}` : null, commit ? `commit ${commit.replace(/^(.{10})[0-9a-f]*/, "$1")}` : null,
    ...Object.entries(versions).map((pair) => pair.join(" "))].filter(Boolean).join(" · ");
  at("head").replaceChildren(
    el("div", { class: "title" }, el("h1", null, run.name),
      el("span", { class: "state", tone: `var(--${tone})` }, el("span", { "aria-hidden": "true" }, mark), state),
      el("span", { id: "link", role: "status" })),
    el("div", { class: "under" }, facts.filter(Boolean).join(" · ")), origin ? el("div", { class: "under" }, origin) : "", run.reason ? el("div", { class: "under reason" }, run.reason) : "");
  at("foot").textContent = live ? `Steptron ${run.version} · live from this machine` : `Steptron ${run.version} · written ${clock(run.written)} UTC · this file needs no network`;
}

function drawStrip() {
  // Stays at the top while the page is scrolled.
  const run = docs.run, parts = [["tiles", "Overview"], ["charts", "Curves"], ["cells", "Experts"], ["spread", "Extremes"], ["layers", "Layers"],
    ["parameters", "Parameters"], ["ranks", "Ranks"], ["more", "More"], ["curriculum", "Stages"], ["ledger", "Ledger"]];
  const count = alarms().length;
  at("strip").replaceChildren(el("div", null, el("b", null, run.name), run.step === null ? null : el("span", { class: "soft" }, `step ${whole(run.step)}`),
    count ? el("a", { href: "#alerts", class: "badge", tone: "var(--rose)" }, `▲ ${count}`) : null,
    el("nav", { "aria-label": "Sections" }, parts.filter(([id]) => at(id).childElementCount).map(([id, text]) => el("a", { href: `#${id}` }, text)))));
}

function drawTiles() {
  const run = docs.run, curves = docs.curves;
  if (!curves) return at("tiles").replaceChildren();
  const values = curves.values;
  const tile = (name, value, small, more) => el("div", { class: "tile" }, el("div", { class: "name" }, name),
    el("div", { class: "value" }, value, small ? el("small", null, ` ${small}`) : null), el("div", { class: "more" }, more || ""));
  const now = (key) => (values[key] ? lastOf(values[key].mean) : null); // as in the curve's legend
  const left = run.state === "running" && run.left_s !== null;
  at("tiles").replaceChildren(...[
    values.loss && tile("Loss", plain(now("loss")), "nats", `from ${plain(values.loss.mean.find((v) => v !== null))}`),
    tile("Tokens", short(run.tokens), run.budget ? `of ${short(run.budget)}` : "", run.budget && run.tokens !== null ? `${percent(Math.min(1, run.tokens / run.budget))} of the budget` : ""),
    tile("Step", whole(run.step), "", run.stage ? `in stage ${run.stage}` : ""),
    values.tokens_per_second && tile("Speed", short(now("tokens_per_second")), "tokens/s", values.mfu ? `MFU ${percent(now("mfu"))}` : ""),
    values.grad_norm && tile("Gradient norm", plain(now("grad_norm")), "", `highest ${plain(Math.max(...(values.grad_norm.high || values.grad_norm.mean)))}`),
    left ? tile("Time left", span(run.left_s), "", `${span(run.seconds)} so far`) : tile("Time in steps", span(run.seconds), "", `mean ${span(run.seconds / Math.max(1, run.step))} a step`),
  ].filter(Boolean));
  return undefined;
}

function drawAlerts() {
  const all = alarms();
  if (!docs.curves && !all.length) return at("alerts").replaceChildren();
  const well = ["running", "finished"].includes(docs.run.state); // a tick is for a run that goes on, or is done
  if (!all.length) return at("alerts").replaceChildren(el("div", { class: "card calm" }, well ? el("span", { style: "color: var(--green)", "aria-hidden": "true" }, "✓ ") : "", "No alarm so far."));
  const rows = all.slice(-5).reverse().map((event) => el("li", null,
    el("span", { class: "when" }, `step ${whole(event.step)}`), badge(event), el("span", { class: "what" }, brief(event))));
  at("alerts").replaceChildren(el("div", { class: "card alarmed" },
    el("div", { class: "bar" }, el("h2", null, `${whole(all.length)} alert${all.length > 1 ? "s" : ""}`), el("span", { class: "unit" }, "newest first; marked in the curves below"),
      all.length > 5 ? el("span", { class: "push" }, el("a", { href: "#ledger" }, "all in the ledger")) : null),
    el("ul", null, rows)));
  return undefined;
}

function brief(event) {
  // An event in one line: what it is about, then the sentence it brings; without one, its numbers.
  const about = event.detector || event.act, text = event.text || event.reason || event.message;
  const numbers = Object.entries(event).filter(([name, value]) => !["time", "event", "step", "detector", "act"].includes(name) && value !== null && typeof value !== "object")
    .slice(0, 6).map(([name, value]) => el("span", { class: "fact" }, el("span", null, words(name)), shown(value)));
  return [about ? el("b", null, words(about)) : null, about ? " " : null, text ? String(text) : numbers];
}
const shown = (value) => (typeof value === "number" ? (Number.isInteger(value) ? whole(value) : tight(+value.toPrecision(4))) : String(value));

section((name) => name === "run" || name === "ledger" || name === "curves", () => {
  drawHead();
  drawTiles();
  drawAlerts();
});
