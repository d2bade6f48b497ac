// Usage per day, and the audit log.

import { html, useState } from "./vendor/preact-htm.js";
import { get, query } from "./api.js";
import { Cut, Problem, Table, clock, count, usePoll } from "./parts.js";

const DAYS = 31;
const GROUPS = [["project_id", "tenant"], ["model", "model"], ["adapter", "adapter"]];

const dayOf = (seconds) => new Date(1000 * seconds).toISOString().slice(0, 10);

export function Usage() {
  const [by, setBy] = useState("project_id");
  const [days, setDays] = useState(7);
  const { value, error } = usePoll(
    (signal) => get(`v1/usage${query({ start_time: Math.floor(Date.now() / 1000) - (days - 1) * 86_400, limit: DAYS, group_by: by })}`, signal),
    60_000, [by, days],
  );
  const rows = (value?.data ?? []).flatMap((bucket) => bucket.results.map((one) => ({ ...one, day: dayOf(bucket.start_time) }))).reverse();
  const columns = [
    { title: "Day (UTC)", of: (one) => one.day },
    { title: GROUPS.find(([name]) => name === by)[1], of: (one) => html`<${Cut} text=${one[by] || (by === "adapter" ? "the base model" : "–")} />` },
    { title: "Requests", kind: "num", of: (one) => count(one.num_model_requests) },
    { title: "Input tokens", kind: "num", of: (one) => count(one.input_tokens) },
    { title: "Cached", kind: "num", of: (one) => count(one.input_cached_tokens) },
    { title: "Output tokens", kind: "num", of: (one) => count(one.output_tokens) },
    ...(by === "adapter" ? [{ title: "Pool residency (s)", kind: "num", of: (one) => (one.adapter_seconds === null ? "–" : count(Math.round(one.adapter_seconds))) }] : []),
  ];
  return html`<section class="panel">
    <div class="row"><h2 class="grow">Usage</h2>
      <label><span>By</span><select value=${by} onChange=${(event) => setBy(event.target.value)}>${GROUPS.map(([name, words]) => html`<option value=${name}>${words}</option>`)}</select></label>
      <label><span>Days</span><select value=${days} onChange=${(event) => setDays(Number(event.target.value))}>${[1, 7, DAYS].map((num) => html`<option value=${num}>${num}</option>`)}</select></label>
    </div>
    <${Problem} error=${error} />
    <${Table} name="Usage" columns=${columns} rows=${rows} id=${(one) => `${one.day} ${one[by]}`} />
  </section>`;
}

// Operators' actions, newest first.
export function Audit() {
  const { value, error } = usePoll((signal) => get("v1/audit?limit=200", signal), 30_000);
  const columns = [
    { title: "Time", of: (one) => clock(one.ms) },
    { title: "Key", of: (one) => html`<${Cut} text=${[one.who, one.tenant].filter(Boolean).join(" of ") || "anonymous"} />` },
    { title: "Action", of: (one) => html`<code>${one.action}</code>` },
    { title: "Target", of: (one) => html`<${Cut} text=${one.target || "–"} />` },
    { title: "Details", of: (one) => html`<${Cut} text=${one.detail || "–"} />` },
    { title: "Outcome", of: (one) => html`<${Cut} text=${one.outcome} />` },
  ];
  return html`<section class="panel"><h2>Audit log</h2>
    <${Problem} error=${error} />
    <${Table} name="Audit log" columns=${columns} rows=${value?.data ?? []} id=${(one) => one.id} />
  </section>`;
}
