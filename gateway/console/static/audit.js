// The audit log: actions of operators, and of tenants on their adapters.

import { html, useState } from "./vendor/preact-htm.js";
import { get, query } from "./api.js";
import { Cut, Stale, Table, When, usePoll } from "./parts.js";

const MOST = 200; // maximum number of listed entries

export function Audit() {
  const [by, setBy] = useState("operators");
  const poll = usePoll((signal) => get(`v1/audit${query({ limit: MOST, by })}`, signal), 30_000, [by]);
  const columns = [
    { title: "Time", of: (one) => html`<${When} ms=${one.ms} />` },
    { title: "Key", of: (one) => html`<${Cut} text=${[one.who, one.tenant].filter(Boolean).join(" of ") || "anonymous"} />` },
    { title: "Action", of: (one) => html`<code>${one.action}</code>` },
    { title: "Target", of: (one) => html`<${Cut} text=${one.target || "–"} />` },
    { title: "Details", of: (one) => html`<${Cut} text=${one.detail || "–"} />` },
    { title: "Outcome", of: (one) => html`<${Cut} text=${one.outcome} />` },
  ];
  return html`<section class="panel">
    <div class="row"><h2 class="grow">Audit log</h2>
      <label><span>Actions of</span><select value=${by} onChange=${(event) => setBy(event.target.value)}><option value="operators">operators</option><option value="tenants">tenants</option></select></label></div>
    <${Stale} poll=${poll} />
    ${poll.value ? html`<${Table} name="Audit log" columns=${columns} rows=${poll.value.data} id=${(one) => one.id} empty="No actions yet." />` : html`<p>Loading…</p>`}
  </section>`;
}
