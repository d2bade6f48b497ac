// The fleet's current state: queue and workers; and charts of a chosen range, which the gateway keeps.

import { html, useState } from "./vendor/preact-htm.js";
import { get, pages, post, query } from "./api.js";
import { Lines } from "./charts.js";
import { Act, Cut, Scroll, Share, Stale, State, ago, bytes, confirmed, count, usePoll } from "./parts.js";
import { href, replace } from "./route.js";

const EVERY_MS = 2000;
const RANGES = [["15m", "15 min"], ["1h", "1 hour"], ["6h", "6 hours"], ["24h", "24 hours"], ["7d", "7 days"], ["30d", "30 days"], ["90d", "90 days"]];
const OWN = ["15m", "1h", "6h", "24h", "7d"]; // ranges that every gateway has
const PHASES = ["plan_s", "inputs_s", "forward_s", "sample_s", "finish_s"];

// ------------------------------------------------------------ workers

const past = new Map(); // worker's id -> its last counters, and what the ones before make of them

// Throughput of all workers and step time of each, from two samples of their counters.
function compared(workers) {
  let rate = null;
  const steps = new Map();
  for (const worker of workers.filter((one) => one.counters)) {
    const before = past.get(worker.id);
    const now = { sent_ms: worker.sent_ms, counters: worker.counters, rate: before?.rate, step: before?.step };
    if (before && worker.sent_ms > before.sent_ms) {
      const gained = (name) => worker.counters[name] - before.counters[name];
      now.rate = (1000 * gained("num_output_tokens")) / (worker.sent_ms - before.sent_ms);
      const num = gained("num_steps");
      if (num > 0) now.step = (1000 * PHASES.reduce((sum, name) => sum + gained(name), 0)) / num;
    }
    if (now.step !== undefined) steps.set(worker.id, now.step);
    if (now.rate !== undefined) rate = (rate ?? 0) + now.rate;
    if (!before || worker.sent_ms > before.sent_ms) past.set(worker.id, now);
  }
  for (const id of [...past.keys()]) if (!workers.some((worker) => worker.id === id)) past.delete(id);
  return { rate, steps };
}

async function look(signal) {
  const [fleet, workers] = await Promise.all([
    get("v1/fleet", signal),
    pages((after) => `v1/workers${query({ limit: 200, after })}`, 1000, signal),
  ]);
  return { fleet, workers: workers.data, ...compared(workers.data) };
}

function Live({ worker, steps, again, several }) {
  const drain = async () => {
    if (!(await confirmed(`${worker.name} finishes its requests and gets no new ones, until it is resumed or stopped.`, "Drain"))) return false;
    return post(`v1/workers/${encodeURIComponent(worker.id)}/drain`);
  };
  return html`<tr>
    <th scope="row"><${Cut} text=${worker.name} /></th>
    <td><${State} of=${worker.state} /></td>
    ${several ? html`<td><${Cut} text=${worker.base ?? "–"} /></td>` : null}
    <td>${count(worker.running)}</td>
    <td>${count(worker.waiting)}${worker.waiting_adapter ? html` <span class="soft">(${count(worker.waiting_adapter)} for adapters)</span>` : ""}</td>
    <td>${steps.has(worker.id) ? `${steps.get(worker.id).toFixed(1)} ms` : "–"}</td>
    <td><${Share} used=${worker.kv.blocks - worker.kv.free} total=${worker.kv.blocks} label="of the KV cache" /></td>
    <td><${Share} used=${worker.pool.bytes - worker.pool.free} total=${worker.pool.bytes} label="of the pool" /></td>
    <td>${count(worker.adapters.resident)} resident, ${count(worker.adapters.host)} in host memory</td>
    <td>${worker.state === "draining"
      ? html`<${Act} label=${`Resume ${worker.name}`} does=${() => post(`v1/workers/${encodeURIComponent(worker.id)}/resume`)} done=${`${worker.name} accepts requests again.`} after=${again}>Resume<//>`
      : html`<${Act} label=${`Drain ${worker.name}`} does=${drain} done=${`${worker.name} is draining.`} after=${again}>Drain<//>`}</td>
  </tr>`;
}

const Silent = ({ name, state, why }) => html`<tr class="soft"><th scope="row"><${Cut} text=${name} /></th><td><${State} of=${state} /></td><td colspan="8">${why}</td></tr>`;

// What a worker does is known from the gateway alone: while that is silent, nothing is said of them.
function Workers({ workers, steps, again, lost, several }) {
  if (!workers.length) return html`<p class="empty">No workers yet. Requests wait in the queue until one joins.</p>`;
  return html`<${Scroll} name="Workers"><table>
    <caption class="hidden">Workers</caption>
    <thead><tr>${["Worker", "State", ...(several ? ["Base"] : []), "Running", "Waiting", "Step time", "KV cache", "Adapter pool", "Adapters", "Actions"].map((title) => html`<th scope="col">${title}</th>`)}</tr></thead>
    <tbody>${workers.map((worker) =>
      lost ? html`<${Silent} key=${worker.id} name=${worker.name ?? worker.id} state="unknown" why="The gateway can't be reached." />`
      : worker.state === "lost" ? html`<${Silent} key=${worker.id} name=${worker.id} state="lost" why="No heartbeat; its requests move to other workers." />`
      : html`<${Live} key=${worker.id} worker=${worker} steps=${steps} again=${again} several=${several} />`)}</tbody>
  </table><//>`;
}

// Of a fleet of several bases: each with its workers, its requests and a way to its adapters.
function Bases({ bases, failed }) {
  return html`<section class="panel"><h2>Bases</h2><${Scroll} name="Bases"><table>
    <caption class="hidden">Bases</caption>
    <thead><tr>${["Base", "State", "Task", "Workers", "Running", "Queued", "Adapters"].map((title) => html`<th scope="col">${title}</th>`)}</tr></thead>
    <tbody>${bases.map((base) => html`<tr key=${base.name}>
      <th scope="row"><${Cut} text=${base.name} /></th>
      <td><${State} of=${failed[base.name] ? "failed" : base.workers ? "ready" : "no_worker"} />${failed[base.name] ? html` <${Cut} text=${failed[base.name]} />` : null}</td>
      <td>${base.task ?? "–"}</td><td>${count(base.workers)}</td><td>${count(base.running)}</td><td>${count(base.queued)}</td>
      <td><a href=${href("adapters", "", { base: base.name })}>Show adapters</a></td></tr>`)}</tbody>
  </table><//></section>`;
}

// ------------------------------------------------------------ charts

const share = (part, rest) => part.map((value, place) => (value === null || !(value + rest[place]) ? null : (100 * value) / (value + rest[place])));
// Values per so many seconds, of periods of which the last may be shorter.
const per = (values, s, { step_s, elapsed_s }) => values.map((value, place) => (value === null ? null : (value * s) / (place < values.length - 1 ? step_s : elapsed_s)));

// An answer without the period of now, where the next one soon has it.
function complete(answer) {
  if (answer.step_s > 10) return answer;
  const cut = (columns) => Object.fromEntries(Object.entries(columns).map(([name, one]) => [name, Array.isArray(one) ? one.slice(0, -1) : one]));
  return { ...answer, num: answer.num - 1, elapsed_s: answer.step_s, fleet: cut(answer.fleet), groups: answer.groups.map(cut) };
}

// What the chart of models or tenants shows: its title, its unit, and the values of a group.
const METRICS = {
  requests: ["Requests", "requests/min", (one, answer) => per(one.requests, 60, answer)],
  tokens: ["Output tokens", "tokens/s", (one, answer) => per(one.output_tokens, 1, answer)],
  ttft: ["Time to first token (p95)", "ms", (one) => one.ttft_p95_ms],
  hits: ["Pool hit rate", "%", (one) => share(one.hits, one.misses)],
};

function Charts({ params, set, offer }) {
  const { range } = params;
  const by = params.by === "tenant" ? "tenant" : "model";
  const metric = METRICS[params.metric] ? params.metric : "requests";
  const { value, error } = usePoll(async (signal) => {
    const answer = await get(`v1/timeseries${query({ range, group_by: by })}`, signal);
    offer(answer.ranges ?? OWN); // a gateway of an earlier version says nothing of ranges
    return complete(answer);
  }, range === "15m" ? 5000 : 30_000, [range, by]);
  if (!value) return error ? html`<p class="note">${error.message}</p>` : html`<p>Loading…</p>`;
  const { fleet, step_s: step } = value;
  const times = Array.from({ length: value.num }, (_, place) => value.start_time + place * step);
  const [all, ...groups] = value.groups;
  const [title, unit, values] = METRICS[metric];
  return html`
    ${value.note ? html`<p class="note">${value.note}</p>` : null}
    ${value.gateways > 1 && value.source !== "prometheus" ? html`<p class="note">There are ${value.gateways} gateways: calls, errors and times to first token are those of the one that serves this page. Queue, throughput and prefix cache are of the whole fleet.</p>` : null}
    <div class="grid charts">
      <section class="panel"><${Lines} title="Queue" unit="requests" times=${times} lines=${[{ label: "running", values: fleet.running }, { label: "queued", values: fleet.queued }]} /></section>
      <section class="panel"><${Lines} title="Throughput" unit="tokens/s" times=${times} lines=${[{ label: "all workers", values: per(fleet.output_tokens, 1, value) }]} /></section>
      <section class="panel"><${Lines} title="Time to first token" unit="ms" times=${times} lines=${[{ label: "p50", values: all.ttft_p50_ms }, { label: "p95", values: all.ttft_p95_ms }]} /></section>
      <section class="panel"><${Lines} title="Errors" unit="calls/min" times=${times} lines=${[["rate limited (429)", all.refused], ["client errors (4xx)", all.client_errors], ["server errors (5xx)", all.server_errors]].map(([label, values]) => ({ label, values: per(values, 60, value) }))} /></section>
      <section class="panel"><${Lines} title="Hit rate" unit="%" times=${times} lines=${[{ label: "adapter pool", values: share(all.hits, all.misses) }, { label: "prefix cache", values: share(fleet.cached_tokens, fleet.computed_tokens) }]} /></section>
      <section class="panel">
        <${Lines} title=${`${title} by ${by}`} unit=${unit} times=${times} lines=${groups.filter((one) => one.name).map((one) => ({ label: one.name, values: values(one, value) }))} />
        <div class="row filters">
          <label><span>Metric</span><select value=${metric} onChange=${(event) => set({ metric: event.target.value })}>${Object.entries(METRICS).map(([name, [words]]) => html`<option value=${name}>${words}</option>`)}</select></label>
          <label><span>Group by</span><select value=${by} onChange=${(event) => set({ by: event.target.value })}><option value="model">model</option><option value="tenant">tenant</option></select></label>
        </div>
      </section>
    </div>`;
}

// ------------------------------------------------------------ the page

export function Overview({ route }) {
  const poll = usePoll(look, EVERY_MS);
  const [ranges, offer] = useState(OWN);
  const range = RANGES.some(([name]) => name === route.params.range) ? route.params.range : "15m";
  const set = (more) => replace(href("overview", "", { ...route.params, ...more }));
  if (!poll.value) return poll.error ? html`<${Stale} poll=${poll} />` : html`<p>Loading…</p>`;
  const { fleet, workers, steps, rate } = poll.value;
  const queue = fleet.queue;
  const oldest = queue ? Math.min(...Object.values(queue.oldest_ms).filter(Boolean), Infinity) : Infinity;
  const facts = [
    ["Model", fleet.model ?? "unknown until a worker joins"],
    ["Running", count(fleet.running)],
    ["Queued", `${count(fleet.queued)}${queue?.batch ? ` (${count(queue.batch)} batch)` : ""}`],
    ["Oldest queued", Number.isFinite(oldest) ? ago(oldest) : "none"],
    ["Throughput", rate === null ? "–" : `${rate.toFixed(0)} tokens/s`],
    ["Workers", count(fleet.workers)],
    ["Dead letters", queue ? html`<a href=${href("dead-letters")}>${count(queue.dead_letters)}</a>` : "–"],
    ["Queue memory", queue ? `${bytes(queue.used_bytes)}${queue.max_bytes ? ` of ${bytes(queue.max_bytes)}` : ""}` : "–"],
  ];
  return html`
    <${Stale} poll=${poll} />
    ${queue || poll.error ? null : html`<p class="note">No active scheduler: requests stay queued until one starts.</p>`}
    <section class=${`panel ${poll.error ? "stale" : ""}`} aria-label="Queue"><dl class="facts">${facts.map(([name, fact]) => html`<div><dt>${name}</dt><dd>${fact}</dd></div>`)}</dl></section>
    ${fleet.bases ? html`<${Bases} bases=${fleet.bases} failed=${fleet.failed} />` : null}
    <section class="panel"><h2>Workers</h2><${Workers} workers=${workers} steps=${steps} again=${poll.again} lost=${poll.error?.status === 0} several=${Boolean(fleet.bases)} /></section>
    <div class="row tabs" role="group" aria-label="Range of the charts">${RANGES.filter(([name]) => ranges.includes(name)).map(([name, words]) => html`<button type="button" aria-pressed=${name === range ? "true" : "false"} onClick=${() => set({ range: name })}>${words}</button>`)}</div>
    <${Charts} params=${{ ...route.params, range }} set=${set} offer=${offer} />`;
}
