"use strict";
// Starts the page; the live one asks every two seconds what has changed.
const POLL_MS = 2000;
let lostSince = null;

function lost(error) {
  // The server is away or failed: say so, and how old this is; go on asking.
  lostSince = lostSince || Date.now();
  const node = at("link");
  if (node) node.replaceChildren(el("span", { class: "state", tone: "var(--rose)", title: String(error) }, el("span", { "aria-hidden": "true" }, "✕"), `connection lost ${span((Date.now() - lostSince) / 1000)} ago`));
}

function linked() {
  lostSince = null;
  const run = docs.run, node = at("link");
  if (!node || !run) return;
  const age = run.updated_s ? Date.now() / 1000 - run.updated_s : null;
  node.textContent = [run.state === "running" && age !== null ? `last step ${span(Math.max(1, Math.round(age)))} ago` : null, reading ? "reading older steps …" : null].filter(Boolean).join(" · ");
  node.className = "soft";
}

let reading = false;
let indexTag = null;
async function poll() {
  try {
    const answer = await fetch("/data/index", { cache: "no-store", headers: indexTag ? { "If-None-Match": indexTag } : {}, signal: AbortSignal.timeout(60000) });
    if (answer.status !== 304) {
      if (!answer.ok) throw new Error(`index: ${answer.status}`);
      const found = await answer.json();
      index = found.documents;
      reading = found.reading;
      for (const name of [...wanted]) if (!has(name) && !["run", "curves", "ledger", "tables"].includes(name)) wanted.delete(name);
      await (fetching = fetching.then(refresh));
      indexTag = answer.headers.get("ETag"); // only now: what failed half-way is asked for again
    }
    linked();
  } catch (error) {
    lost(error);
  }
  setTimeout(poll, document.hidden ? 5 * POLL_MS : POLL_MS);
}

async function start() {
  if (live) return poll();
  await refresh();
  await fetching;
  return undefined;
}
start();
