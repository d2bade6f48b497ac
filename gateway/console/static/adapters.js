// The catalogue: served adapters and where they are loaded, refused ones and why.

import { html, useMemo, useState } from "./vendor/preact-htm.js";
import { get, pages, part, post, query, remove } from "./api.js";
import { Act, Cut, Dialog, Problem, State, Scroll, Stale, Table, When, bytes, confirmed, count, lasted, usePoll } from "./parts.js";
import { href, leave, replace } from "./route.js";
import { Upload } from "./upload.js";

const MOST = 20_000; // maximum number of listed names
const SMALL = 1000; // maximum number of names with automatic refresh
const EVERY_MS = 10_000;

const path = (adapter, what = "", values = {}) =>
  `v1/adapters/${part(adapter.name)}${what ? `/${what}` : ""}${query({ ...values, tenant: adapter.tenant })}`;

const list = (signal) =>
  pages((after) => `v1/adapters${query({ limit: 1000, after })}`, MOST, signal);

// Meaning of each state.
const MEANING = {
  resident: "in a worker's pool: the next request starts immediately",
  loading: "being loaded into a worker's pool",
  host: "in a worker's host memory: milliseconds away from the pool",
  on_disk: "on the store's disk: the first request fetches it",
  no_effect: "served, but everything it adds is zero: it answers like the base model",
  failed: "refused: not served",
  registered: "registered, not fetched yet",
  downloading: "being downloaded from its source",
  verifying: "being checked by a store",
};

function Where({ adapter }) {
  const places = Object.entries(adapter.workers);
  if (!places.length) return html`<p class="soft">Not loaded on any worker.</p>`;
  return html`<${Scroll} name="Workers"><table>
    <caption class="hidden">Workers that have ${adapter.name}</caption>
    <thead><tr><th scope="col">Worker</th><th scope="col">Tier</th><th scope="col">Pinned</th></tr></thead>
    <tbody>${places.map(([worker, place]) => html`<tr key=${worker}><th scope="row"><${Cut} text=${worker} /></th><td><${State} of=${place.tier} /></td>
      <td class="wrap">${place.pinned ? "yes" : place.problem ? html`<span class="bad">no: ${place.problem}</span>` : "no"}</td></tr>`)}</tbody>
  </table><//>`;
}

function rate(use) {
  const total = use ? use.hits + use.misses : 0;
  return total ? `${Math.round((100 * use.hits) / total)} % of ${count(total)} requests` : "–";
}

function Facts({ adapter, onClose, again }) {
  const use = adapter.use;
  const facts = [
    ...(adapter.base ? [["Base", adapter.base]] : []), ["Source", adapter.source ?? "–"], ["Digest", adapter.digest ?? "–"], ["Rank", adapter.rank ?? "–"], ["Size", bytes(adapter.bytes)],
    ["Target modules", adapter.modules?.join(", ") || "–"], ["Pinned by", adapter.pinned ?? "–"],
    ["Created by a request", adapter.on_request ? "yes" : "no"], ["Created", html`<${When} ms=${adapter.created_ms} />`], ["Last change", html`<${When} ms=${adapter.changed_ms} />`],
    ["Pool hit rate", rate(use)], ["Last used", html`<${When} ms=${use?.last_used_ms} />`],
    ["Fetches", use ? `${count(use.fetches)}, ${lasted(use.mean_fetch_ms)} on average` : "–"],
    ["Loads", use ? `${count(use.loads)}, ${lasted(use.mean_load_ms)} on average` : "–"],
  ];
  const everybody = !adapter.tenant;
  const unload = async () => {
    if (!(await confirmed(`${adapter.name} is no longer served. Accepted requests finish first.`, "Unload"))) return false;
    return remove(path(adapter));
  };
  const act = (title, what, values, done) => html`<${Act} does=${() => post(path(adapter, what, values))} done=${done} after=${again}>${title}<//>`;
  return html`
    <p><${State} of=${adapter.state} /> <span class="soft">${MEANING[adapter.state] ?? ""}</span></p>
    ${adapter.reason ? html`<p class="problem">${adapter.reason}</p>` : null}
    ${adapter.warning ? html`<p class="note">${adapter.warning}</p>` : null}
    <div class="row" role="group" aria-label="Actions">
      ${everybody && (adapter.pinned
        ? act("Unpin", "unpin", {}, "Unpinned.")
        : act("Pin", "pin", { wait_s: 5 }, "Pinned on all workers."))}
      ${act("Preload", "preload", { wait_s: 5 }, "Workers are loading it.")}
      ${act("Evict", "evict", { wait_s: 5 }, ({ freed }) => `Freed ${bytes(freed.pool_bytes)} of pool memory and ${bytes(freed.host_bytes)} of host memory.`)}
      ${act("Refresh", "refresh", { wait_s: 20 }, "Checked its source for changes.")}
      <a class="button" href=${href("playground", "", { model: adapter.name })}>Try it</a>
      <${Act} kind="danger" does=${unload} done=${({ name }) => `${name} was unloaded.`} after=${() => { again(); onClose(); }}>Unload…<//>
    </div>
    <dl class="facts">${facts.map(([name, fact]) => html`<div><dt>${name}</dt><dd>${fact}</dd></div>`)}</dl>
    <h2>By worker</h2>
    <${Where} adapter=${adapter} />`;
}

// The adapter that the address names, read again after each action.
function Details({ name, tenant, known, onClose, again }) {
  const poll = usePoll((signal) => get(path({ name, tenant }), signal), EVERY_MS, [name, tenant]);
  const adapter = poll.value ?? known;
  return html`<${Dialog} title=${name} onClose=${onClose}>
    <${Problem} error=${poll.error} />
    ${adapter ? html`<${Facts} adapter=${adapter} onClose=${onClose} again=${() => { again(); poll.again(); }} />` : poll.error ? null : html`<p>Loading…</p>`}
  <//>`;
}

const idOf = (adapter) => `${adapter.tenant ?? ""}\n${adapter.name}`;

const TIERS = ["resident", "loading", "host"];

function tiers(adapter) {
  const places = Object.values(adapter.workers);
  return TIERS.map((tier) => [tier, places.filter((place) => place.tier === tier).length]).filter(([, num]) => num)
    .map(([tier, num]) => `${tier} on ${num}`).join(", ") || "–";
}

export function Adapters({ route }) {
  const [num, setNum] = useState(0);
  const found = usePoll(async (signal) => {
    const all = await list(signal);
    setNum(all.data.length);
    return all;
  }, num > SMALL ? 0 : EVERY_MS, [num > SMALL]);
  const [words, setWords] = useState("");
  const [state, setState] = useState("");
  const { base = "" } = route.params;
  const [adding, setAdding] = useState(false);
  const all = found.value?.data ?? [];
  const shown = useMemo(() => {
    const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
    return all.filter((one) => (!state || one.state === state) && (!base || one.base === base) &&
      wanted.every((word) => one.name.toLowerCase().includes(word) || (one.source ?? "").toLowerCase().includes(word) || (one.digest ?? "").startsWith(word)));
  }, [all, words, state, base]);
  const chosen = { name: route.id, tenant: route.params.tenant };
  const states = useMemo(() => [...new Set(all.map((one) => one.state))].sort(), [all]);
  const bases = useMemo(() => [...new Set(all.map((one) => one.base).filter(Boolean))].sort(), [all]); // none in a fleet of one
  const columns = [
    { title: "Name", of: (one) => html`<a class="cut" title=${one.name} href=${href("adapters", one.name, { tenant: one.tenant })}>${one.name}</a>` },
    { title: "State", of: (one) => html`<${State} of=${one.state} />` },
    ...(bases.length ? [{ title: "Base", of: (one) => html`<${Cut} text=${one.base ?? "–"} />` }] : []),
    { title: "Tiers", of: tiers },
    { title: "Rank", kind: "num", of: (one) => one.rank ?? "–" },
    { title: "Size", kind: "num", of: (one) => bytes(one.bytes) },
    { title: "Pinned", of: (one) => one.pinned ?? "–" },
    { title: "Source", of: (one) => html`<${Cut} text=${one.source ?? "–"} />` },
    { title: "Digest", of: (one) => html`<code>${one.digest?.slice(0, 12) ?? "–"}</code>` },
    { title: "Error", of: (one) => html`<${Cut} text=${one.reason ?? "–"} />` },
  ];
  return html`
    <${Stale} poll=${found} />
    <section class="panel">
      <div class="row filters">
        <label class="grow"><span>Search by name, source or digest</span><input type="search" value=${words} onInput=${(event) => setWords(event.target.value)} /></label>
        <label><span>State</span><select value=${state} onChange=${(event) => setState(event.target.value)}>
          <option value="">any</option>${states.map((one) => html`<option value=${one}>${one.replaceAll("_", " ")}</option>`)}</select></label>
        ${bases.length || base ? html`<label><span>Base</span><select value=${base} onChange=${(event) => replace(href("adapters", "", { ...route.params, base: event.target.value }))}>
          <option value="">any</option>${[...new Set([...bases, base])].filter(Boolean).map((one) => html`<option value=${one}>${one}</option>`)}</select></label>` : null}
        <${Act} does=${async () => found.again()}>Refresh<//>
        <button type="button" class="main" onClick=${() => setAdding(true)}>Add…</button>
      </div>
      <p role="status">${found.value ? `${count(shown.length)} of ${count(all.length)} adapters` : "Loading…"}${found.value?.more ? `; showing the first ${count(MOST)}` : ""}${num > SMALL ? html`<span class="soft">; automatic refresh is off for long lists</span>` : ""}</p>
      ${found.value ? html`<${Table} name="Adapters" columns=${columns} rows=${shown} id=${idOf} selected=${idOf(chosen)}
        empty=${all.length ? "No adapter matches the search." : "No adapters yet. Add one, or put its folder into the adapter root."} />` : null}
    </section>
    ${route.id ? html`<${Details} key=${idOf(chosen)} ...${chosen} known=${all.find((one) => idOf(one) === idOf(chosen))} onClose=${() => leave(route)} again=${found.again} />` : null}
    ${adding ? html`<${Upload} onClose=${() => setAdding(false)} again=${found.again} />` : null}`;
}
