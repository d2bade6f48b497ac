// Components shared by all pages. Untrusted text becomes text nodes only; no string is ever parsed as markup.

import { html, useEffect, useLayoutEffect, useRef, useState } from "./vendor/preact-htm.js";

// ------------------------------------------------------------ formatting

export const count = (value) => (value ?? 0).toLocaleString("en");
export const plural = (num, word) => `${count(num)} ${word}${num === 1 ? "" : "s"}`;

export function bytes(value) {
  if (value === null || value === undefined) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let size = value;
  let unit = 0;
  while (size >= 1000 && unit < units.length - 1) [size, unit] = [size / 1000, unit + 1];
  return `${unit && size < 10 ? size.toFixed(1) : Math.round(size)} ${units[unit]}`;
}

export function lasted(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 60_000) return `${(ms / 1000).toFixed(1)} s`;
  return ms < 3_600_000 ? `${Math.round(ms / 60_000)} min` : `${(ms / 3_600_000).toFixed(1)} h`;
}

export const ago = (ms) => (ms ? `${lasted(Math.max(0, Date.now() - ms))} ago` : "–");

const two = (value) => String(value).padStart(2, "0");
const day = (date) => `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
const hours = (date) => `${two(date.getHours())}:${two(date.getMinutes())}`;

// All times of the console, charts too, are in the browser's time zone and this style: 2026-11-30 18:05:34.
export const clock = (ms) => (ms ? `${day(new Date(ms))} ${hours(new Date(ms))}:${two(new Date(ms).getSeconds())}` : "–");
export const hour = (ms) => hours(new Date(ms));
export const date = (ms) => day(new Date(ms)).slice(5);

export const When = ({ ms }) => (ms ? html`<time datetime=${new Date(ms).toISOString()} title=${ago(ms)}>${clock(ms)}</time>` : "–");

// ------------------------------------------------------------ notifications

const said = { lines: [], number: 0, shown: new Set() };

function keep(lines) {
  said.lines = lines;
  for (const show of said.shown) show(lines);
}

export function say(text) {
  const id = ++said.number;
  keep([...said.lines.slice(-2), { id, text }]);
  setTimeout(() => keep(said.lines.filter((line) => line.id !== id)), 6000);
}

// An open dialog has its own, because screen readers ignore what is behind a dialog.
export function Said() {
  const [lines, setLines] = useState(said.lines);
  useEffect(() => {
    said.shown.add(setLines);
    return () => said.shown.delete(setLines);
  }, []);
  return html`<div class="said" role="status" aria-live="polite">
    ${lines.map((line) => html`<div key=${line.id}>${line.text}</div>`)}
  </div>`;
}

export const Problem = ({ error }) =>
  error ? html`<p class="problem" role="alert">${error.message}${error.code ? html` <code>${error.code}</code>` : ""}</p>` : null;

// ------------------------------------------------------------ polling

const pause = { on: false, shown: new Set() };

export function setPaused(on) {
  pause.on = on;
  for (const show of pause.shown) show(on);
}

export function usePaused() {
  const [on, setOn] = useState(pause.on);
  useEffect(() => {
    pause.shown.add(setOn);
    return () => pause.shown.delete(setOn);
  }, []);
  return on;
}

// Polls while the page is visible, refresh is not paused, and `isFinal(value)` is not true. The last value stays while requests fail, and `at` is its time.
export function usePoll(ask, ms, deps = [], isFinal = () => false) {
  const [state, setState] = useState({ value: null, error: null, at: 0 });
  const again = useRef(() => {});
  useEffect(() => {
    const abort = new AbortController();
    let timer = 0;
    let round = 0;
    let ended = false;
    async function look() {
      clearTimeout(timer);
      const own = ++round;
      if (!document.hidden) {
        try {
          const value = await ask(abort.signal);
          ended = isFinal(value);
          if (!abort.signal.aborted && own === round) setState({ value, error: null, at: Date.now() });
        } catch (error) {
          if (abort.signal.aborted) return;
          if (own === round) setState((now) => ({ ...now, error }));
        }
      }
      if (ms && !ended && own === round && !abort.signal.aborted && !pause.on) timer = setTimeout(look, ms);
    }
    const seen = () => document.hidden || pause.on || look();
    const resumed = (on) => (on ? clearTimeout(timer) : look());
    document.addEventListener("visibilitychange", seen);
    pause.shown.add(resumed);
    again.current = look;
    look();
    return () => {
      abort.abort();
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", seen);
      pause.shown.delete(resumed);
    };
  }, deps);
  return { ...state, again: () => again.current() };
}

// Says that what is shown is old, because the gateway no longer answers.
export const Stale = ({ poll }) =>
  poll.error ? html`<p class="problem" role="alert">${poll.error.message}${poll.error.code ? html` <code>${poll.error.code}</code>` : ""}${poll.value ? ` – last values from ${clock(poll.at)}` : ""}</p>` : null;

// A button that calls the gateway, waits for the answer and reports the result.
export function Act({ does, children, label, kind = "", disabled = false, done, after }) {
  const [busy, setBusy] = useState(false);
  async function run() {
    setBusy(true);
    try {
      const result = await does();
      if (done && result !== false) say(typeof done === "function" ? done(result) : done);
    } catch (error) {
      if (error.name !== "AbortError") say(error.reasons?.length ? `${error.message} — ${error.reasons.join("; ")}` : error.message);
    } finally {
      setBusy(false);
      after?.();
    }
  }
  return html`<button type="button" class=${kind} aria-label=${label} disabled=${busy || disabled} aria-busy=${busy} onClick=${run}>${children}</button>`;
}

// ------------------------------------------------------------ dialogs

export function Dialog({ title, onClose, children }) {
  const ref = useRef(null);
  const gone = useRef(false);
  useLayoutEffect(() => {
    const dialog = ref.current;
    if (!dialog.open) dialog.showModal();
    return () => {
      gone.current = true; // the event of this close comes later, when another page may be shown
      dialog.close();
    };
  }, []);
  return html`<dialog ref=${ref} aria-label=${title} onClose=${() => gone.current || onClose()}>
    <div class="row"><h2 class="grow">${title}</h2><button type="button" onClick=${onClose}>Close</button></div>
    ${children}
    <${Said} />
  </dialog>`;
}

let ask = async () => false;

// Resolves to whether the operator confirms.
export const confirmed = (question, verb) => ask(question, verb);

export function Confirm() {
  const [open, setOpen] = useState(null);
  ask = (question, verb) => new Promise((resolve) => setOpen({ question, verb, resolve }));
  if (!open) return null;
  const end = (answer) => {
    open.resolve(answer);
    setOpen(null);
  };
  return html`<${Dialog} title=${open.verb} onClose=${() => end(false)}>
    <p>${open.question}</p>
    <div class="row end"><button type="button" class="danger" onClick=${() => end(true)}>${open.verb}</button></div>
  <//>`;
}

// ------------------------------------------------------------ tables

const ROW = 40; // px, as `th, td` of style.css
const SPARE = 8; // rows rendered above and below the visible ones

// A scrolling region that says so where some of its columns are out of sight.
export function Scroll({ name, kind = "", box, children }) {
  const own = useRef(null);
  const ref = box ?? own;
  const [wide, setWide] = useState(false);
  useEffect(() => {
    const look = () => setWide(ref.current.scrollWidth > ref.current.clientWidth + 1);
    const watch = new ResizeObserver(look);
    watch.observe(ref.current);
    if (ref.current.firstElementChild) watch.observe(ref.current.firstElementChild);
    look();
    return () => watch.disconnect();
  }, []);
  return html`<div class=${`scroll ${kind}`} ref=${ref} tabindex="0" role="region" aria-label=${name}>${children}</div>
    ${wide ? html`<p class="cue">Scroll sideways for more columns →</p>` : null}`;
}

// A virtual table: only visible rows are rendered. columns: [{ title, of, kind }]. empty: said instead of no rows.
export function Table(means) {
  return means.rows.length ? html`<${Rows} ...${means} />` : html`<p class="empty">${means.empty ?? "None."}</p>`;
}

function Rows({ name, columns, rows, id, selected }) {
  const ref = useRef(null);
  const [seen, setSeen] = useState({ top: 0, height: 800 });
  useEffect(() => {
    const box = ref.current;
    const look = () => setSeen({ top: box.scrollTop, height: box.clientHeight || 800 });
    box.addEventListener("scroll", look, { passive: true });
    const watch = new ResizeObserver(look);
    watch.observe(box);
    look();
    return () => {
      box.removeEventListener("scroll", look);
      watch.disconnect();
    };
  }, []);
  const first = Math.max(0, Math.min(Math.floor(seen.top / ROW) - SPARE, rows.length - 1));
  const last = Math.min(rows.length, Math.ceil((seen.top + seen.height) / ROW) + SPARE);
  const space = (num) => (num > 0 ? html`<tr class="space" aria-hidden="true"><td colspan=${columns.length} style=${{ height: `${num * ROW}px` }}></td></tr>` : null);
  return html`<${Scroll} name=${name} kind="virtual" box=${ref}>
    <table aria-rowcount=${rows.length + 1}>
      <caption class="hidden">${name}, ${count(rows.length)} rows</caption>
      <thead><tr aria-rowindex="1">${columns.map((column) => html`<th scope="col" class=${column.kind}>${column.title}</th>`)}</tr></thead>
      <tbody>
        ${space(first)}
        ${rows.slice(first, last).map((row, place) => html`<tr key=${id(row)} aria-rowindex=${first + place + 2} aria-selected=${selected === id(row) ? "true" : undefined}>
          ${columns.map((column) => html`<td class=${column.kind}>${column.of(row)}</td>`)}
        </tr>`)}
        ${space(rows.length - last)}
      </tbody>
    </table>
  <//>`;
}

export const Cut = ({ text }) => html`<span class="cut" title=${text}>${text}</span>`;

export function Share({ used, total, label }) {
  const part = total ? Math.max(0, Math.min(1, used / total)) : 0;
  return html`<span class="row"><span class="bar" aria-hidden="true"><span style=${{ width: `${part * 100}%` }}></span></span>
    <span>${total ? `${Math.round(part * 100)} %` : "–"}<span class="hidden"> ${label}</span></span></span>`;
}

const GOOD = new Set(["ready", "resident", "completed", "assigned", "host"]);
const BAD = new Set(["failed", "lost", "expired", "refused", "unknown"]);
export const State = ({ of }) => html`<span class=${`tag ${GOOD.has(of) ? "good" : BAD.has(of) ? "bad" : "warn"}`}>${of === "assigned" ? "running" : of.replaceAll("_", " ")}</span>`;

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    say("Copied.");
  } catch {
    say("The browser does not allow copying; select the text instead.");
  }
}
