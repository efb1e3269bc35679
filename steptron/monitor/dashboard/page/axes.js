"use strict";
// What all plots share: scales, ticks, a frame with axes, and the steps that are in view (one zoom for all).
const view = { axis: "step", range: null, hover: null }; // range: [first, last] step, null: the whole run
const zoomed = []; // drawn again when the view changes

function zoom(range) {
  Object.assign(view, { range, hover: null });
  if (at("reset")) at("reset").hidden = range === null;
  zoomed.forEach((draw) => draw());
}

function niceTicks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * (1 - 1e-9)) * power;
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(+(k * step).toPrecision(12));
  return ticks;
}
function logTicks(low, high) {
  const decades = Math.log10(high / low);
  if (decades < 0.7) return niceTicks(low, high, 4);
  const ticks = [], every = Math.ceil(decades / 7);
  for (let k = Math.floor(Math.log10(low)); k <= Math.log10(high); k++)
    for (const factor of decades > 2.5 ? [1] : [1, 2, 5]) {
      const tick = factor * 10 ** k;
      if (tick >= low && tick <= high && (decades <= 2.5 || k % every === 0)) ticks.push(+tick.toPrecision(6));
    }
  return ticks;
}

function scale(low, high, begin, end, log) {
  const f = log ? Math.log : (value) => value, size = f(high) - f(low) || 1;
  return (value) => begin + ((f(log ? Math.max(value, low) : value) - f(low)) / size) * (end - begin);
}

function room(low, high, log, zero) {
  // A little more than what is there.
  if (low > high) return log ? [0.1, 1] : [0, 1];
  if (log) return low === high ? [low / 2, high * 2] : [low / (high / low) ** 0.04, high * (high / low) ** 0.05];
  if (zero) low = Math.min(0, low);
  const more = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return [zero && low === 0 ? 0 : low - more, high + more];
}

function frame(box, x, y, [begin, end], [low, high], { log, format, label, ticks }) {
  // Grid lines, ticks and labels.
  const parts = [], width = box.right - box.left;
  for (const tick of log ? logTicks(low, high) : niceTicks(low, high, ticks || 4)) {
    parts.push(sv("line", { class: "grid", x1: box.left, x2: box.right, y1: y(tick), y2: y(tick) }));
    parts.push(sv("text", { x: box.left - 8, y: y(tick) + 4, "text-anchor": "end" }, format(tick)));
  }
  for (const tick of niceTicks(begin, end, Math.max(2, Math.floor(width / 90)))) {
    if (tick !== Math.round(tick)) continue;
    parts.push(sv("line", { class: "axis", x1: x(tick), x2: x(tick), y1: box.bottom, y2: box.bottom + 4 }));
    parts.push(sv("text", { x: x(tick), y: box.bottom + 17, "text-anchor": "middle" }, short(tick)));
  }
  parts.push(sv("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
  if (label) parts.push(sv("text", { x: box.right, y: box.bottom + 32, "text-anchor": "end" }, label));
  return parts;
}

function alertMarks(box, x, [begin, end], placeOf) {
  // A dotted line and a triangle where something was raised; those that would cover each other are one.
  const parts = [];
  let before = -Infinity;
  for (const event of alarms()) {
    const place = placeOf(event.step);
    if (place === null || place < begin || place > end || x(place) - before < 3) continue;
    before = x(place);
    const tone = `var(--${eventStyle(event)[0]})`;
    parts.push(sv("line", { class: "event", x1: before, x2: before, y1: box.top, y2: box.bottom, style: `stroke: ${tone}` }));
    parts.push(sv("path", { d: `M${before - 4} ${box.bottom + 7}h8l-4 -7z`, style: `fill: ${tone}` }, sv("title", null, `${words(event.event)}, step ${whole(event.step)}`)));
  }
  return parts;
}
