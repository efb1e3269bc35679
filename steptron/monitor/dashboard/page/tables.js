"use strict";
// Stages, tokens by source, and the ledger.

function drawCurriculum() {
  const stages = docs.run.stages;
  if (!stages.length) return;
  const total = stages.reduce((sum, stage) => sum + (stage.budget || stage.tokens || 1), 0);
  const strip = stages.map((stage) => {
    const size = stage.budget || stage.tokens || 1;
    return el("div", { tone: stageTone(stage.name), style: `flex: ${Math.max(size / total, 0.02)} 1 0` },
      el("u", { style: `width: ${100 * Math.min(1, stage.tokens / size)}%` }),
      el("span", null, stage.name, el("em", null, stage.seq_len ? `length ${whole(stage.seq_len)}` : "")));
  });
  const rate = (lr) => (lr.peak === undefined ? "–" : `${lr.kind} ${tight(lr.peak)}${lr.end === null || lr.end === undefined ? "" : ` → ${tight(lr.end)}`}`);
  const names = ["Stage", "Steps", "Tokens", "Budget", "Length", "Batch", "Learning rate", "MTP weight", "Bias rate", "RoPE θ (full)"];
  const rows = stages.map((stage) => el("tr", null,
    el("td", null, el("span", { class: "dot", tone: stageTone(stage.name) }), stage.name),
    [stage.first === null ? "not begun" : [...new Set([stage.first, stage.last])].map(whole).join("–"), short(stage.tokens), short(stage.budget), whole(stage.seq_len),
      typeof stage.batch_size === "number" ? whole(stage.batch_size) : stage.batch_size ? "schedule" : "–", rate(stage.lr), stage.mtp_weight ?? "–", stage.bias_rate ?? "–", short(stage.rope_theta_full),
    ].map((text) => el("td", null, String(text)))));
  at("curriculum").replaceChildren(el("div", { class: "card" },
    el("div", { class: "bar" }, el("h2", null, "Stages"), el("span", { class: "unit" }, "width by tokens, filled as far as the run got")),
    el("div", { class: "strip" }, strip),
    el("div", { class: "scroll" }, el("table", { class: "data" }, el("thead", null, el("tr", null, names.map((name) => el("th", null, name)))), el("tbody", null, rows)))));
}

function drawSources() {
  const run = docs.run, stages = Object.entries(run.sources).filter(([, totals]) => Object.keys(totals).length);
  if (!stages.length) return;
  const drawn = new Set(stages.flatMap(([, totals]) => Object.keys(totals))), names = run.source_names.filter((name) => drawn.has(name)), tone = sourceTone;
  const all = Object.fromEntries(names.map((name) => [name, stages.reduce((sum, [, totals]) => sum + (totals[name] || 0), 0)]));
  const line = (title, totals, mix, bold) => {
    const sum = Object.values(totals).reduce((a, b) => a + b, 0) || 1, planned = Object.values(mix).reduce((a, b) => a + b, 0);
    const parts = names.filter((name) => totals[name]).map((name) => {
      const share = totals[name] / sum, plan = planned && mix[name] !== undefined ? mix[name] / planned : null;
      return el("div", { class: "part", tone: tone(name), style: `flex: ${share} 1 0`, onpointerleave: untip, onpointermove: (event) =>
        tip(event, `${title} · ${name}`, [[null, "tokens", whole(totals[name])], [null, "share", percent(share)], ...(plan === null ? [] : [[null, "recipe's weight", percent(plan)]])]),
      }, share > 0.06 ? percent(share) : "");
    });
    let edge = 0;
    const aims = planned ? names.slice(0, -1).filter((name) => mix[name]).map((name) => el("div", { class: "aim", style: `left: ${100 * (edge += mix[name] / planned)}%` })) : [];
    return [el("div", { class: bold ? "all" : "" }, bold ? null : el("span", { class: "dot", tone: stageTone(title) }), title),
      el("div", { class: "whole" }, parts, aims), el("div", { class: "unit" }, `${short(sum)} tokens`)];
  };
  const mixes = new Map(run.stages.map((stage) => [stage.name, stage.mix]));
  at("sources").replaceChildren(el("div", { class: "card" },
    el("div", { class: "bar" }, el("h2", null, "Tokens by source"), el("span", { class: "unit" }, "share of a stage's tokens; the bars' marks are the recipe's weights"),
      el("span", { class: "push" }, names.map((name) => el("span", { class: "key" }, el("span", { class: "dot", style: "margin: 0", tone: tone(name) }), name, el("b", null, short(all[name])))))),
    el("div", { class: "mix" }, stages.map(([name, totals]) => line(name, totals, mixes.get(name) || {}, false)), stages.length > 1 ? line("all", all, {}, true) : null)));
}

// ---------------------------------------------------------------- the ledger

const ledgerState = { hidden: new Set(), find: "", card: null };

function inline(value) {
  // A short list or set of plain values in one line: layer 7, expert 11. Otherwise null.
  if (value === null || typeof value !== "object") return null;
  const entries = Object.entries(value);
  if (!entries.length || entries.length > 6 || entries.some(([, one]) => one !== null && typeof one === "object")) return null;
  return entries.map(([name, one]) => (Array.isArray(value) ? shown(one) : `${words(name)} ${shown(one)}`)).join(", ");
}

function facts(event) {
  const entries = Object.entries(event).filter(([name]) => !["time", "event", "step", "text"].includes(name)).map(([name, value]) => [name, inline(value) ?? value]);
  const flat = entries.filter(([, value]) => value === null || typeof value !== "object");
  const deep = entries.filter(([, value]) => value !== null && typeof value === "object" && Object.keys(value).length);
  return [
    event.text ? el("div", { class: "text" }, String(event.text)) : null,
    flat.map(([name, value]) => el("span", { class: "fact" }, el("span", null, words(name)), value === null ? "–" : shown(value))),
    deep.map(([name, value]) => el("details", null, el("summary", null, words(name)), el("pre", null, JSON.stringify(value, null, 2).replace(/^\{\n|\n\}$/g, "")))),
  ];
}

function ledgerCard() {
  const card = { unit: el("span", { class: "unit" }), chips: el("span", { class: "push" }), body: el("tbody") };
  card.box = el("input", { type: "search", placeholder: "filter", "aria-label": "filter the ledger", oninput: () => { ledgerState.find = card.box.value.trim().toLowerCase(); filterLedger(); } });
  put(at("ledger"), null, [el("div", { class: "card" },
    el("div", { class: "bar" }, el("h2", null, "Ledger"), card.unit, card.chips),
    el("div", { class: "bar find" }, card.box),
    el("div", { class: "scroll", tabindex: 0, "aria-label": "ledger" }, el("table", { class: "data" },
      el("thead", null, el("tr", null, el("th", null, "Time (UTC)"), el("th", { class: "right" }, "Step"), el("th", null, "Event"), el("th", null, "Evidence"))), card.body)))]);
  return card;
}

function filterLedger() {
  for (const row of ledgerState.card.body.rows)
    row.hidden = ledgerState.hidden.has(row.dataset.kind) || !row.textContent.toLowerCase().includes(ledgerState.find);
}

function drawLedger() {
  const { events, left_out } = docs.ledger;
  if (!events.length) return;
  const card = (ledgerState.card = ledgerState.card || ledgerCard()), kinds = new Map();
  for (const { event } of events) kinds.set(event, (kinds.get(event) || 0) + 1);
  card.unit.textContent = `what was decided, and on what evidence; newest first${left_out ? `; the newest ${whole(events.length)} of ${whole(events.length + left_out)}` : ""}`;
  const focus = card.chips.contains(document.activeElement) ? document.activeElement.dataset.kind : null;
  card.chips.replaceChildren(...[...kinds].map(([kind, count]) => put(chip(`${words(kind)} ${count}`, !ledgerState.hidden.has(kind), (event) => {
    if (!ledgerState.hidden.delete(kind)) ledgerState.hidden.add(kind);
    event.currentTarget.setAttribute("aria-pressed", !ledgerState.hidden.has(kind));
    filterLedger();
  }, "show or hide"), { "data-kind": kind }, [])));
  if (focus) card.chips.querySelector(`[data-kind="${CSS.escape(focus)}"]`)?.focus();
  card.body.replaceChildren(...events.toReversed().map((event) => el("tr", { "data-kind": event.event, class: grave(event) ? "grave" : null, tone: `var(--${eventStyle(event)[0]})` },
    el("td", { class: "soft" }, clock(event.time)), el("td", { class: "right" }, whole(event.step)), el("td", null, badge(event)), el("td", { class: "facts" }, facts(event)))));
  filterLedger();
}

section((name) => name === "run", () => { drawCurriculum(); drawSources(); });
section((name) => name === "ledger", drawLedger);
