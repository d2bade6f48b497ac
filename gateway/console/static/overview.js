// The fleet's current state: queue, workers, and recent throughput and time to first token, from its own counters.

import { html } from "./vendor/preact-htm.js";
import { get, pages, post } from "./api.js";
import { Lines } from "./charts.js";
import { Act, Cut, Problem, Share, State, ago, bytes, confirmed, count, usePoll } from "./parts.js";

const EVERY_MS = 2000;
const KEPT = 450; // points per series: 15 minutes
const RECENT_MS = 60_000; // window of ended requests for time to first token

// Samples, kept while other pages are shown.
const past = { times: [], tokens: [], median: [], tail: [], workers: new Map(), seen: 0 };

const PHASES = ["plan_s", "inputs_s", "forward_s", "sample_s", "finish_s"];

// Throughput of all workers and step time of each, from two samples of their counters.
function compared(workers) {
  let rate = null;
  const steps = new Map();
  for (const worker of workers) {
    const before = past.workers.get(worker.id);
    if (!before || !worker.counters || worker.sent_ms <= before.sent_ms) {
      if (before?.step !== undefined) steps.set(worker.id, before.step);
      if (before?.rate !== undefined) rate = (rate ?? 0) + before.rate;
      continue;
    }
    const gained = (name) => worker.counters[name] - before.counters[name];
    const own = (1000 * gained("num_output_tokens")) / (worker.sent_ms - before.sent_ms);
    const num = gained("num_steps");
    if (num > 0) steps.set(worker.id, (1000 * PHASES.reduce((sum, name) => sum + gained(name), 0)) / num);
    rate = (rate ?? 0) + own;
    past.workers.set(worker.id, { sent_ms: worker.sent_ms, counters: worker.counters, rate: own, step: steps.get(worker.id) ?? before.step });
  }
  for (const worker of workers) {
    if (worker.counters && !past.workers.has(worker.id)) past.workers.set(worker.id, { sent_ms: worker.sent_ms, counters: worker.counters });
  }
  for (const id of [...past.workers.keys()]) if (!workers.some((worker) => worker.id === id)) past.workers.delete(id);
  return { rate, steps };
}

export function quantile(sorted, share) {
  return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] : null;
}

async function look(signal) {
  const [fleet, workers, ended] = await Promise.all([
    get("v1/fleet", signal),
    pages((after) => `v1/workers?limit=200${after ? `&after=${encodeURIComponent(after)}` : ""}`, 1000, signal),
    get("v1/requests?state=ended&limit=100", signal),
  ]);
  const { rate, steps } = compared(workers.data);
  const firsts = ended.data
    .filter((one) => one.first_ms && one.ended_ms > Date.now() - RECENT_MS)
    .map((one) => one.first_ms - one.submitted_ms)
    .sort((a, b) => a - b);
  const now = Date.now() / 1000;
  if (now - past.seen > 1) {
    past.seen = now;
    for (const [line, value] of [["times", now], ["tokens", rate], ["median", quantile(firsts, 0.5)], ["tail", quantile(firsts, 0.95)]]) {
      past[line].push(value);
      if (past[line].length > KEPT) past[line].shift();
    }
  }
  return { fleet, workers: workers.data, steps, rate };
}

function Workers({ workers, steps, again }) {
  const drain = async (worker) => {
    if (!(await confirmed(`${worker.name} finishes its requests and gets no new ones, until it is resumed or stopped.`, "Drain"))) return false;
    return post(`v1/workers/${encodeURIComponent(worker.id)}/drain`);
  };
  return html`<div class="scroll" tabindex="0" role="region" aria-label="Workers"><table>
    <caption class="hidden">Workers</caption>
    <thead><tr>${["Worker", "State", "Running", "Waiting", "Step", "KV cache", "Pool", "Adapters", ""].map((title) => html`<th scope="col">${title || html`<span class="hidden">Actions</span>`}</th>`)}</tr></thead>
    <tbody>${workers.map((worker) => worker.state === "lost"
      ? html`<tr key=${worker.id}><th scope="row"><${Cut} text=${worker.id} /></th><td><${State} of="lost" /></td><td colspan="7" class="soft">No heartbeat; its requests move to other workers.</td></tr>`
      : html`<tr key=${worker.id}>
        <th scope="row"><${Cut} text=${worker.name} /></th>
        <td><${State} of=${worker.state} /></td>
        <td>${count(worker.running)}</td>
        <td>${count(worker.waiting)}${worker.waiting_adapter ? html` <span class="soft">(${count(worker.waiting_adapter)} for adapters)</span>` : ""}</td>
        <td>${steps.has(worker.id) ? `${steps.get(worker.id).toFixed(1)} ms` : "–"}</td>
        <td><${Share} used=${worker.kv.blocks - worker.kv.free} total=${worker.kv.blocks} label="of the KV cache" /></td>
        <td><${Share} used=${worker.pool.bytes - worker.pool.free} total=${worker.pool.bytes} label="of the pool" /></td>
        <td>${count(worker.adapters.resident)} resident, ${count(worker.adapters.host)} in host memory</td>
        <td>${worker.state === "draining"
          ? html`<${Act} label=${`Resume ${worker.name}`} does=${() => post(`v1/workers/${encodeURIComponent(worker.id)}/resume`)} done=${`${worker.name} accepts requests again.`} after=${again}>Resume<//>`
          : html`<${Act} label=${`Drain ${worker.name}`} does=${() => drain(worker)} done=${`${worker.name} is draining.`} after=${again}>Drain<//>`}</td>
      </tr>`)}</tbody>
  </table></div>`;
}

export function Overview() {
  const { value, error, again } = usePoll(look, EVERY_MS);
  if (!value) return error ? html`<${Problem} error=${error} />` : html`<p>Loading …</p>`;
  const { fleet, workers, steps, rate } = value;
  const queue = fleet.queue;
  const oldest = queue ? Math.min(...Object.values(queue.oldest_ms).filter(Boolean), Infinity) : Infinity;
  const facts = [
    ["Model", fleet.model ?? "unknown until a worker joins"],
    ["Running", count(fleet.running)],
    ["Queued", `${count(fleet.queued)}${queue?.batch ? ` (${count(queue.batch)} batch)` : ""}`],
    ["Oldest queued", Number.isFinite(oldest) ? ago(oldest) : "none"],
    ["Throughput", rate === null ? "–" : `${rate.toFixed(0)} tokens/s`],
    ["Workers", count(fleet.workers)],
    ["Dead letters", queue ? count(queue.dead_letters) : "–"],
    ["Queue memory", queue ? `${bytes(queue.used_bytes)}${queue.max_bytes ? ` of ${bytes(queue.max_bytes)}` : ""}` : "–"],
  ];
  return html`
    <${Problem} error=${error} />
    ${queue ? null : html`<p class="note">No active scheduler: requests stay queued until one starts.</p>`}
    <section class="panel" aria-label="Queue"><dl class="facts">${facts.map(([name, fact]) => html`<div><dt>${name}</dt><dd>${fact}</dd></div>`)}</dl></section>
    <div class="grid">
      <section class="panel"><${Lines} title="Throughput" unit="tokens/s" times=${past.times} lines=${[{ label: "all workers", values: past.tokens }]} /></section>
      <section class="panel"><${Lines} title="Time to first token, requests of the last minute" unit="ms" times=${past.times} lines=${[{ label: "median", values: past.median }, { label: "p95", values: past.tail }]} /></section>
    </div>
    <section class="panel"><h2>Workers</h2><${Workers} workers=${workers} steps=${steps} again=${again} /></section>`;
}
