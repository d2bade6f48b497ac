// Current and recent requests with their timelines; jobs, batches and dead letters.

import { html, useState } from "./vendor/preact-htm.js";
import { get, pages, part, post, query } from "./api.js";
import { Act, Cut, Dialog, Problem, State, Table, ago, clock, confirmed, count, lasted, usePoll } from "./parts.js";

const MOST = 1000; // maximum number of listed requests
const EVERY_MS = 4000;

const by = (path, values) => (after) => `${path}${query({ ...values, after })}`;

// ------------------------------------------------------------ requests

function Timeline({ id, onClose }) {
  const { value, error, again } = usePoll((signal) => get(`v1/requests/${encodeURIComponent(id)}`, signal), 2000, [id]);
  const ended = value && ["completed", "failed", "cancelled"].includes(value.state);
  const begin = value?.timeline[0]?.ms ?? 0;
  const cancel = async () =>
    (await confirmed(`The request ${id} ends, and its client is notified that it was cancelled.`, "Cancel the request")) && post(`v1/requests/${encodeURIComponent(id)}/cancel`);
  return html`<${Dialog} title=${`Request ${id}`} onClose=${onClose}>
    <${Problem} error=${error} />
    ${value ? html`
      <dl class="facts">
        <div><dt>State</dt><dd><${State} of=${value.state} />${value.finish ? ` ${value.finish}` : ""}</dd></div>
        <div><dt>Tenant</dt><dd>${value.tenant || "–"}</dd></div>
        <div><dt>Adapter</dt><dd>${value.adapter ? value.adapter.name ?? value.adapter.digest.slice(0, 12) : "the base model"}</dd></div>
        <div><dt>Tokens</dt><dd>${count(value.prompt_tokens)} in (${count(value.cached_tokens)} cached), ${count(value.output_tokens)} out</dd></div>
        <div><dt>Worker failures</dt><dd>${count(value.attempts)}</dd></div>
      </dl>
      ${value.error ? html`<p class="problem">${value.error.message}</p>` : null}
      <h2>Timeline</h2>
      <ol class="time">${value.timeline.map((event) => html`<li class=${event.event === "worker_died" ? "bad" : ""}>
        <span class="soft code">+${lasted(event.ms - begin)}</span> ${event.text}</li>`)}</ol>
      ${ended ? null : html`<div class="row end"><${Act} kind="danger" does=${cancel} done="Cancellation was requested." after=${again}>Cancel …<//></div>`}
    ` : error ? null : html`<p>Loading …</p>`}
  <//>`;
}

function RequestList({ state }) {
  const { value, error } = usePoll((signal) => pages(by("v1/requests", { state, limit: 100 }), MOST, signal), EVERY_MS, [state]);
  const [open, setOpen] = useState("");
  const rows = value?.data ?? [];
  const columns = [
    { title: "Request", of: (one) => html`<button type="button" class="plain cut code" title=${one.id} onClick=${() => setOpen(one.id)}>${one.id}</button>` },
    { title: "State", of: (one) => html`<${State} of=${one.state} />` },
    { title: "Adapter", of: (one) => html`<${Cut} text=${one.adapter ? one.adapter.name ?? one.adapter.digest.slice(0, 12) : "base"} />` },
    { title: "Tenant", of: (one) => html`<${Cut} text=${one.tenant || "–"} />` },
    { title: "Class", of: (one) => one.class },
    { title: "Worker", of: (one) => html`<${Cut} text=${one.worker ?? "–"} />` },
    { title: "Input tokens", kind: "num", of: (one) => count(one.prompt_tokens) },
    { title: "Output tokens", kind: "num", of: (one) => count(one.output_tokens) },
    { title: "Time to first token", kind: "num", of: (one) => (one.first_ms ? lasted(one.first_ms - one.submitted_ms) : "–") },
    { title: "Latency", kind: "num", of: (one) => (one.ended_ms ? lasted(one.ended_ms - one.submitted_ms) : lasted(Date.now() - one.submitted_ms)) },
    { title: "Worker failures", kind: "num", of: (one) => one.attempts || "–" },
  ];
  return html`
    <${Problem} error=${error} />
    <p role="status">${value ? `${count(rows.length)} requests${value.more ? `, showing the first ${count(MOST)}` : ""}` : "Loading …"}</p>
    <${Table} name="Requests" columns=${columns} rows=${rows} id=${(one) => one.id} selected=${open} />
    ${open ? html`<${Timeline} id=${open} onClose=${() => setOpen("")} />` : null}`;
}

// ------------------------------------------------------------ jobs and batches

function Jobs() {
  const { value, error, again } = usePoll((signal) => pages(by("v1/jobs", { limit: 100 }), MOST, signal), EVERY_MS);
  const rows = value?.data ?? [];
  const open = (job) => ["queued", "running"].includes(job.status);
  const columns = [
    { title: "Job", of: (job) => html`<code><${Cut} text=${job.id} /></code>` },
    { title: "Status", of: (job) => html`<${State} of=${job.status} />` },
    { title: "Model", of: (job) => html`<${Cut} text=${job.model ?? "–"} />` },
    { title: "Created", of: (job) => ago(job.created_at * 1000) },
    { title: "Actions", of: (job) => open(job) ? html`<${Act} label=${`Cancel ${job.id}`} does=${() => post(`v1/jobs/${part(job.id)}/cancel`)} done="Cancellation was requested." after=${again}>Cancel<//>` : "" },
  ];
  return html`<${Problem} error=${error} /><p role="status">${value ? `${count(rows.length)} jobs of this key's tenant` : "Loading …"}</p>
    <${Table} name="Jobs" columns=${columns} rows=${rows} id=${(job) => job.id} />`;
}

function Batches() {
  const { value, error, again } = usePoll((signal) => pages(by("v1/batches", { limit: 100 }), MOST, signal), EVERY_MS);
  const rows = value?.data ?? [];
  const open = (batch) => ["validating", "in_progress", "finalizing"].includes(batch.status);
  const columns = [
    { title: "Batch", of: (batch) => html`<code><${Cut} text=${batch.id} /></code>` },
    { title: "Status", of: (batch) => html`<${State} of=${batch.status} />` },
    { title: "Model", of: (batch) => html`<${Cut} text=${batch.model ?? "several"} />` },
    { title: "Done", of: ({ request_counts: num }) => html`<label class="row"><progress max=${num.total || 1} value=${num.completed + num.failed}></progress> ${count(num.completed + num.failed)} of ${count(num.total)}</label>` },
    { title: "Failed", kind: "num", of: (batch) => count(batch.request_counts.failed) },
    { title: "Created", of: (batch) => ago(batch.created_at * 1000) },
    { title: "Errors", of: (batch) => html`<${Cut} text=${batch.errors?.data.map((one) => one.message).join("; ") ?? "–"} />` },
    { title: "Actions", of: (batch) => open(batch) ? html`<${Act} label=${`Cancel ${batch.id}`} does=${() => post(`v1/batches/${part(batch.id)}/cancel`)} done="Cancellation was requested." after=${again}>Cancel<//>` : "" },
  ];
  return html`<${Problem} error=${error} /><p role="status">${value ? `${count(rows.length)} batches of this key's tenant` : "Loading …"}</p>
    <${Table} name="Batches" columns=${columns} rows=${rows} id=${(batch) => batch.id} />`;
}

// ------------------------------------------------------------ dead letters

function Letters() {
  const { value, error, again } = usePoll((signal) => pages(by("v1/dead_letters", { limit: 100 }), MOST, signal), EVERY_MS);
  const [open, setOpen] = useState(null);
  const rows = value?.data ?? [];
  const retry = (letter) => html`<${Act} label=${`Retry ${letter.id}`} disabled=${!letter.request} does=${() => post(`v1/dead_letters/${part(letter.id)}/retry`)}
    done=${({ request }) => `${request} was requeued.`} after=${() => { again(); setOpen(null); }}>Retry<//>`;
  const columns = [
    { title: "Dead letter", of: (letter) => html`<button type="button" class="plain code" onClick=${() => setOpen(letter)}>${letter.id}</button>` },
    { title: "Time", of: (letter) => ago(letter.created_ms) },
    { title: "Request", of: (letter) => html`<code><${Cut} text=${letter.request?.id ?? "unreadable"} /></code>` },
    { title: "Tenant", of: (letter) => html`<${Cut} text=${letter.request?.tenant || "–"} />` },
    { title: "Worker failures", kind: "num", of: (letter) => count(letter.deaths.length) },
    { title: "Reason", of: (letter) => html`<${Cut} text=${letter.reason} />` },
    { title: "Actions", of: retry },
  ];
  return html`<${Problem} error=${error} /><p role="status">${value ? `${count(rows.length)} dead letters` : "Loading …"}</p>
    <${Table} name="Dead letters" columns=${columns} rows=${rows} id=${(letter) => letter.id} />
    ${open ? html`<${Dialog} title=${`Dead letter ${open.id}`} onClose=${() => setOpen(null)}>
      <p>${open.reason}</p>
      <ol class="time">${open.deaths.map((death) => html`<li class="bad">${clock(death.ms)}: ${death.worker ?? death.wid} failed in ${death.phase}, ${lasted(death.after_ms)} after the assignment, ${count(death.output_tokens)} tokens generated</li>`)}</ol>
      ${open.raw ? html`<h2>Message</h2><pre>${open.raw}</pre>` : null}
      <div class="row end">${retry(open)}</div>
    <//>` : null}`;
}

// ------------------------------------------------------------ the page

const VIEWS = [
  ["All", () => html`<${RequestList} key="all" state="" />`], ["Running", () => html`<${RequestList} key="running" state="running" />`],
  ["Queued", () => html`<${RequestList} key="queued" state="queued" />`], ["Ended", () => html`<${RequestList} key="ended" state="ended" />`],
  ["Jobs", () => html`<${Jobs} />`], ["Batches", () => html`<${Batches} />`], ["Dead letters", () => html`<${Letters} />`],
];

export function Requests() {
  const [view, setView] = useState("All");
  return html`<section class="panel">
    <div class="row" role="group" aria-label="Views">${VIEWS.map(([name]) => html`<button type="button" aria-pressed=${name === view ? "true" : "false"} onClick=${() => setView(name)}>${name}</button>`)}</div>
    ${VIEWS.find(([name]) => name === view)[1]()}
  </section>`;
}
