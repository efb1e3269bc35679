"use strict";
// Long lists of names (parameters, modules, ranks): those that stand out first, each with its history, and a box to find others.
const ROWS = 10; // shown at first

function namedCard(host, table, title, spec) {
  const card = { table, spec, column: null, by: spec.orders[0][0], find: "", more: false, choices: el("span", { class: "choices" }), body: el("tbody"), heads: el("tr"), unit: el("span", { class: "unit" }) };
  card.orders = spec.orders.map(([key, text, hint]) => [key, chip(text, false, () => { card.by = key; drawNamed(card); }, hint)]);
  card.box = el("input", { type: "search", placeholder: spec.placeholder, "aria-label": `find ${title.toLowerCase()}`, oninput: () => { card.find = card.box.value; drawNamed(card); } });
  card.button = el("button", { class: "chip", type: "button", onclick: () => { card.more = !card.more; drawNamed(card); } });
  at(host).append(el("div", { class: "card" },
    el("div", { class: "bar" }, el("h2", null, title), card.unit, el("span", { class: "push" }, card.choices)),
    el("div", { class: "bar find" }, card.box, card.orders.map(([, node]) => node), el("span", { class: "push" }, card.button)),
    el("div", { class: "scroll" }, el("table", { class: "data named" }, el("thead", null, card.heads), card.body))));
  return card;
}

const namedCards = new Map();
const middleOf = (values) => {
  const known = values.filter(Number.isFinite).sort((a, b) => a - b);
  return known.length ? known[known.length >> 1] : NaN;
};

function takeNamed(card, data) {
  const all = floats(data.values), names = data.columns.map(([column]) => column).filter((column) => card.spec.columns.includes(column))
    .sort((a, b) => card.spec.columns.indexOf(a) - card.spec.columns.indexOf(b));
  if (!names.length) return false;
  if (!names.includes(card.column)) card.column = names[0];
  const values = columnOf(data, all, card.column), N = data.names.length, T = data.spans.length;
  const rows = data.names.map((name, i) => {
    const history = Array.from({ length: T }, (_, t) => values[t * N + i]), last = history.findLast(Number.isFinite) ?? NaN;
    return { name: `${card.spec.prefix}${name}`, history, last };
  });
  const middle = middleOf(rows.map(({ last }) => last));
  for (const row of rows) row.ratio = row.last / (card.spec.against === "others" ? middle : middleOf(row.history));
  if (card.spec.against !== "others") {
    const common = middleOf(rows.map(({ ratio }) => ratio)); // what all have done is no news of one
    for (const row of rows) row.ratio /= common;
  }
  Object.assign(card, { data, rows, names });
  return true;
}

function drawNamed(card) {
  const { spec, by, data } = card, find = card.find.trim().toLowerCase();
  chooser(card.choices, card.names.map((name) => [name, label(name)]), card.column, (name) => { card.column = name; takeNamed(card, data); drawNamed(card); });
  card.orders.forEach(([key, node]) => node.setAttribute("aria-pressed", String(key === by)));
  const away = (row) => (row.ratio > 0 && Number.isFinite(row.ratio) ? Math.abs(Math.log2(row.ratio)) : Number.isNaN(row.ratio) ? -1 : 99);
  const key = { changed: away, slow: (row) => row.ratio, highest: (row) => row.last, lowest: (row) => -row.last }[by];
  const score = (row) => (Number.isNaN(key(row)) ? -Infinity : key(row));
  const found = card.rows.filter((row) => row.name.toLowerCase().includes(find)).sort((a, b) => score(b) - score(a));
  const shownRows = found.slice(0, card.more ? 200 : ROWS), unit = data.columns.find(([name]) => name === card.column)[1];
  card.unit.textContent = `${whole(found.length)} of ${whole(card.rows.length)}${unit === "1" ? "" : ` · ${unit}`}`;
  card.button.textContent = card.more ? "fewer" : `show ${Math.min(200, found.length)}`;
  card.button.hidden = found.length <= ROWS;
  card.heads.replaceChildren(...[spec.what, "", "last", spec.against === "others" ? "÷ median of all" : "change"].map((text, i) =>
    el("th", { class: i > 1 ? "right" : null, title: text === "change" ? CHANGE : null }, text)));
  card.body.replaceChildren(...shownRows.map((row) => {
    const strong = away(row) >= Math.log2(spec.strong) ? (row.ratio > 1 ? "up" : "down") : "";
    return el("tr", null, el("td", { class: "name", title: row.name }, row.name), el("td", { class: "spark" }, spark(row.history, strong)), el("td", { class: "right" }, plain(row.last, 4)),
      el("td", { class: `right ${strong}` }, `${strong ? (strong === "up" ? "▲ " : "▼ ") : ""}${times(row.ratio)}`));
  }), ...(found.length ? [] : [el("tr", null, el("td", { colspan: 4, class: "soft" }, "none of that name"))]));
}

function spark(history, strong) {
  const known = history.filter((value) => value > 0 && Number.isFinite(value));
  if (known.length < 2) return "";
  const low = Math.log(Math.min(...known)), size = Math.max(Math.log(Math.max(...known)) - low, 0.1);
  const d = history.map((value, t) => (value > 0 && Number.isFinite(value) ? [(t / (history.length - 1)) * 138 + 1, 21 - ((Math.log(value) - low) / size) * 20] : null)).filter(Boolean)
    .map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
  return sv("svg", { viewBox: "0 0 140 22", width: 140, height: 22, "aria-hidden": "true" }, sv("path", { class: `mean ${strong}`, d }));
}

const CHANGE = "last value ÷ the median of its own history, over the same of all others";
const PARAMETER = { what: "Parameter", strong: 2, prefix: "", placeholder: "filter by name", against: "itself", columns: ["gradient_norm", "parameter_norm", "update_ratio", "orthogonality"],
  orders: [["changed", "most changed", CHANGE], ["highest", "highest"], ["lowest", "lowest"]] };
const LISTS = [
  ["parameters", "parameter", "Parameters", PARAMETER],
  ["parameters", "module", "Watched modules", { ...PARAMETER, what: "Module", columns: ["output_rms", "output_max"] }],
  ["ranks", "rank", "Ranks", { what: "Rank", strong: 1.3, prefix: "rank ", placeholder: "filter by rank", against: "others", columns: ["step_time", "data_wait", "communication_time", "not_finite"],
    orders: [["slow", "slowest", "÷ median of all ranks"], ["lowest", "fastest"]] }],
];

function drawLists() {
  for (const [host, table, title, spec] of LISTS) {
    const name = `series/${table}`;
    if (!has(name)) continue;
    if (!docs[name]) { want(name); continue; }
    if (!namedCards.has(table)) {
      if (!docs[name].columns.some(([column]) => spec.columns.includes(column))) continue;
      namedCards.set(table, namedCard(host, table, title, spec));
    }
    const card = namedCards.get(table);
    if (takeNamed(card, docs[name])) drawNamed(card);
  }
}
section((name) => ["tables", "series/parameter", "series/module", "series/rank"].includes(name), drawLists);
