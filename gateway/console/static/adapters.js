// The catalogue: what is served, where it is, and what was refused and why.

import { html, useMemo, useState } from "./vendor/preact-htm.js";
import { get, pages, part, post, query, remove } from "./api.js";
import { Act, Cut, Dialog, Problem, State, Table, ago, bytes, clock, confirmed, count, lasted, usePoll } from "./parts.js";
import { Upload } from "./upload.js";

const MOST = 20_000; // names that are listed
const SMALL = 1000; // names up to which the list is read again by itself
const EVERY_MS = 10_000;

const path = (adapter, what = "", values = {}) =>
  `v1/adapters/${part(adapter.name)}${what ? `/${what}` : ""}${query(values)}`;

const list = (signal) =>
  pages((after) => `v1/adapters${query({ limit: 1000, after })}`, MOST, signal);

// What a state means, and what to do.
const MEANING = {
  resident: "in a worker's pool: its next request starts at once",
  loading: "on its way into a worker's pool",
  host: "in a worker's host memory: some milliseconds from the pool",
  on_disk: "at the store: the first request fetches it",
  no_effect: "served, but everything that it adds is zero: it answers as the base model does",
  failed: "refused: it is not served",
  registered: "known, and not fetched yet",
  downloading: "being fetched from its source",
  verifying: "being checked by a store",
};

function Where({ adapter }) {
  const places = Object.entries(adapter.workers);
  if (!places.length) return html`<p class="soft">No worker has it.</p>`;
  return html`<div class="scroll" tabindex="0" role="region" aria-label="Where it is"><table>
    <caption class="hidden">Where ${adapter.name} is</caption>
    <thead><tr><th scope="col">Worker</th><th scope="col">Tier</th><th scope="col">Pinned</th></tr></thead>
    <tbody>${places.map(([worker, place]) => html`<tr key=${worker}><th scope="row"><${Cut} text=${worker} /></th><td><${State} of=${place.tier} /></td>
      <td class="wrap">${place.pinned ? "yes" : place.problem ? html`<span class="bad">no: ${place.problem}</span>` : "no"}</td></tr>`)}</tbody>
  </table></div>`;
}

export function Details({ adapter, onClose, again }) {
  const use = adapter.use;
  const facts = [
    ["Source", adapter.source ?? "–"], ["Digest", adapter.digest ?? "–"], ["Rank", adapter.rank ?? "–"], ["Size", bytes(adapter.bytes)],
    ["Changes", adapter.modules?.join(", ") || "–"], ["Pinned by", adapter.pinned ?? "nobody"],
    ["Named by a request alone", adapter.on_request ? "yes" : "no"], ["Since", clock(adapter.created_ms)], ["Last change", ago(adapter.changed_ms)],
    ["Found in a pool", use ? `${count(use.hits)} of ${count(use.hits + use.misses)} requests` : "–"], ["Last used", ago(use?.last_used_ms)],
    ["Fetched", use ? `${count(use.fetches)} times, ${lasted(use.mean_fetch_ms)} each` : "–"],
    ["Loaded", use ? `${count(use.loads)} times, ${lasted(use.mean_load_ms)} each` : "–"],
  ];
  const everybody = !adapter.tenant;
  const unload = async () => {
    if (!(await confirmed(`${adapter.name} is not served any more; requests that were accepted end first.`, "Unload"))) return false;
    return remove(path(adapter));
  };
  const act = (title, what, values, done) => html`<${Act} does=${() => post(path(adapter, what, values))} done=${done} after=${again}>${title}<//>`;
  return html`<${Dialog} title=${adapter.name} onClose=${onClose}>
    <p><${State} of=${adapter.state} /> <span class="soft">${MEANING[adapter.state] ?? ""}</span></p>
    ${adapter.reason ? html`<p class="problem">${adapter.reason}</p>` : null}
    ${adapter.warning ? html`<p class="note">${adapter.warning}</p>` : null}
    <div class="row" role="group" aria-label="Orders">
      ${everybody && (adapter.pinned
        ? act("Unpin", "unpin", {}, "It may be evicted again.")
        : act("Pin", "pin", { wait_s: 5 }, "Workers keep it from now on."))}
      ${act("Preload", "preload", { wait_s: 5 }, "Workers fetch it.")}
      ${act("Evict", "evict", { wait_s: 5 }, (told) => `Freed ${bytes(told.freed.pool_bytes)} of pools and ${bytes(told.freed.host_bytes)} of host memory.`)}
      ${act("Refresh", "refresh", { wait_s: 20 }, "A store has looked at its source again.")}
      <${Act} kind="danger" does=${unload} done=${(told) => `${told.name} is unloaded.`} after=${() => { again(); onClose(); }}>Unload …<//>
    </div>
    <dl class="facts">${facts.map(([name, fact]) => html`<div><dt>${name}</dt><dd>${fact}</dd></div>`)}</dl>
    <h2>By worker</h2>
    <${Where} adapter=${adapter} />
  <//>`;
}

const TIERS = ["resident", "loading", "host"];

function tiers(adapter) {
  const places = Object.values(adapter.workers);
  return TIERS.map((tier) => [tier, places.filter((place) => place.tier === tier).length]).filter(([, num]) => num)
    .map(([tier, num]) => `${tier} on ${num}`).join(", ") || "–";
}

export function Adapters() {
  const [num, setNum] = useState(0);
  const found = usePoll(async (signal) => {
    const all = await list(signal);
    setNum(all.data.length);
    return all;
  }, num > SMALL ? 0 : EVERY_MS, [num > SMALL]);
  const [words, setWords] = useState("");
  const [state, setState] = useState("");
  const [open, setOpen] = useState(null);
  const [adding, setAdding] = useState(false);
  const all = found.value?.data ?? [];
  const shown = useMemo(() => {
    const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
    return all.filter((one) => (!state || one.state === state) &&
      wanted.every((word) => one.name.toLowerCase().includes(word) || (one.source ?? "").toLowerCase().includes(word) || (one.digest ?? "").startsWith(word)));
  }, [all, words, state]);
  const states = useMemo(() => [...new Set(all.map((one) => one.state))].sort(), [all]);
  // Shows an adapter as it is now, if it is still the one that is open.
  async function renew(adapter) {
    const same = (now) => now?.name === adapter.name;
    try {
      const fresh = await get(path(adapter));
      setOpen((now) => (same(now) ? fresh : now));
    } catch {
      setOpen((now) => (same(now) ? null : now));
      found.again();
    }
  }
  function look(adapter) {
    setOpen(adapter);
    renew(adapter);
  }
  const columns = [
    { title: "Name", of: (one) => html`<button type="button" class="plain cut" title=${one.name} onClick=${() => look(one)}>${one.name}</button>` },
    { title: "State", of: (one) => html`<${State} of=${one.state} />` },
    { title: "Tiers", of: tiers },
    { title: "Rank", kind: "num", of: (one) => one.rank ?? "–" },
    { title: "Size", kind: "num", of: (one) => bytes(one.bytes) },
    { title: "Pinned", of: (one) => one.pinned ?? "–" },
    { title: "Source", of: (one) => html`<${Cut} text=${one.source ?? "–"} />` },
    { title: "Digest", of: (one) => html`<code>${one.digest?.slice(0, 12) ?? "–"}</code>` },
    { title: "Refused because", of: (one) => html`<${Cut} text=${one.reason ?? "–"} />` },
  ];
  return html`
    <${Problem} error=${found.error} />
    <section class="panel">
      <div class="row">
        <label class="grow"><span>Search by name, source or digest</span><input type="search" value=${words} onInput=${(event) => setWords(event.target.value)} /></label>
        <label><span>State</span><select value=${state} onChange=${(event) => setState(event.target.value)}>
          <option value="">any</option>${states.map((one) => html`<option value=${one}>${one.replaceAll("_", " ")}</option>`)}</select></label>
        <${Act} does=${async () => found.again()}>Read again<//>
        <button type="button" class="main" onClick=${() => setAdding(true)}>Add …</button>
      </div>
      <p role="status">${found.value ? `${count(shown.length)} of ${count(all.length)} adapters` : "Asking …"}${found.value?.more ? `; the first ${count(MOST)} are listed` : ""}${num > SMALL ? html`<span class="soft">; so many are not read again by themselves</span>` : ""}</p>
      <${Table} name="Adapters" columns=${columns} rows=${shown} id=${(one) => one.name} selected=${open?.name} />
    </section>
    ${open ? html`<${Details} adapter=${open} onClose=${() => setOpen(null)} again=${() => { found.again(); renew(open); }} />` : null}
    ${adding ? html`<${Upload} onClose=${() => setAdding(false)} again=${found.again} />` : null}`;
}
