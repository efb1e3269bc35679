"use strict";
// Tokens by source, the ledger, and the call that draws the page.

function sources() {
  const stages = Object.entries(D.sources).filter(([, totals]) => Object.keys(totals).length);
  if (!stages.length) return;
  const names = [...new Set(stages.flatMap(([, totals]) => Object.keys(totals)))];
  names.forEach((name, i) => sourceTone.set(name, TONES[i % TONES.length]));
  const all = Object.fromEntries(names.map((name) => [name, stages.reduce((sum, [, totals]) => sum + (totals[name] || 0), 0)]));
  const line = (label, totals, mix, bold) => {
    const sum = Object.values(totals).reduce((a, b) => a + b, 0) || 1, planned = Object.values(mix).reduce((a, b) => a + b, 0);
    const parts = names.filter((name) => totals[name]).map((name) => {
      const share = totals[name] / sum, plan = planned && mix[name] !== undefined ? mix[name] / planned : null;
      return el("div", { class: "part", tone: sourceTone.get(name), style: `flex: ${share} 1 0`, onpointerleave: untip, onpointermove: (event) =>
        tip(event, `${label} · ${name}`, [[null, "tokens", whole(totals[name])], [null, "share", percent(share)], ...(plan === null ? [] : [[null, "recipe's weight", percent(plan)]])]),
      }, share > 0.06 ? percent(share) : "");
    });
    let edge = 0;
    const aims = planned ? names.slice(0, -1).filter((name) => mix[name]).map((name) => el("div", { class: "aim", style: `left: ${100 * (edge += mix[name] / planned)}%` })) : [];
    return [el("div", { class: bold ? "all" : "" }, bold ? null : el("span", { class: "dot", tone: stageTone.get(label) || TONES[0] }), label),
      el("div", { class: "whole" }, parts, aims), el("div", { class: "unit" }, `${short(sum)} tokens`)];
  };
  const mixes = new Map(D.stages.map((stage) => [stage.name, stage.mix]));
  put(at("sources"), { class: "card" }, [
    el("div", { class: "bar" }, el("h2", null, "Tokens by source"), el("span", { class: "unit" }, "share of a stage's tokens; the bars' marks are the recipe's weights"),
      el("span", { class: "push" }, names.map((name) => el("span", { class: "key" }, el("span", { class: "dot", style: "margin: 0", tone: sourceTone.get(name) }), name, el("b", null, short(all[name])))))),
    el("div", { class: "mix" }, stages.map(([name, totals]) => line(name, totals, mixes.get(name) || {}, false)), stages.length > 1 ? line("all", all, {}, true) : null),
  ]);
}

const EVENT_TONES = { run_start: "blue", stage_start: "violet", resume: "blue", checkpoint: "slate", checkpoint_skipped: "amber", run_end: "green" };

function facts(event) {
  const entries = Object.entries(event).filter(([name]) => !["time", "event", "step"].includes(name));
  const flat = entries.filter(([, value]) => value === null || typeof value !== "object");
  const deep = entries.filter(([, value]) => value !== null && typeof value === "object" && Object.keys(value).length);
  const show = (value) => (typeof value === "number" ? (Number.isInteger(value) ? whole(value) : tight(+value.toPrecision(4))) : String(value));
  return [
    flat.map(([name, value]) => el("span", { class: "fact" }, el("span", null, name.replaceAll("_", " ")), show(value))),
    deep.map(([name, value]) => el("details", null, el("summary", null, name.replaceAll("_", " ")), el("pre", null, JSON.stringify(value, null, 2).replace(/^\{\n|\n\}$/g, "")))),
  ];
}

function ledger() {
  if (!D.ledger.length) return;
  const kinds = new Map();
  for (const { event } of D.ledger) kinds.set(event, (kinds.get(event) || 0) + 1);
  const tone = (event) => `var(--${EVENT_TONES[event] || "amber"})`;
  const rows = D.ledger.map((event) => el("tr", { "data-kind": event.event },
    el("td", { class: "soft" }, clock(event.time)), el("td", { class: "right" }, whole(event.step)),
    el("td", null, el("span", { class: "badge", tone: tone(event.event) }, String(event.event).replaceAll("_", " "))), el("td", { class: "facts" }, facts(event))));
  const chips = [...kinds].map(([kind, count]) => el("button", { class: "chip", "aria-pressed": "true", title: "show or hide", onclick: (click) => {
    const chip = click.currentTarget, on = chip.getAttribute("aria-pressed") !== "true";
    chip.setAttribute("aria-pressed", on);
    for (const row of rows) if (row.dataset.kind === kind) row.hidden = !on;
  } }, `${String(kind).replaceAll("_", " ")} ${count}`));
  put(at("ledger"), { class: "card" }, [
    el("div", { class: "bar" }, el("h2", null, "Ledger"),
      el("span", { class: "unit" }, `what was decided, and on what evidence${D.ledger_left_out ? `; the newest ${whole(D.ledger.length)} of ${whole(D.ledger.length + D.ledger_left_out)}` : ""}`),
      el("span", { class: "push" }, chips)),
    el("div", { class: "scroll" }, el("table", { class: "data" },
      el("thead", null, el("tr", null, el("th", null, "Time (UTC)"), el("th", { class: "right" }, "Step"), el("th", null, "Event"), el("th", null, "Evidence"))), el("tbody", null, rows))),
  ]);
}

head();
tiles();
curriculum();
charts();
experts();
sources();
ledger();
redraw();
onResize(at("charts"), redraw);
