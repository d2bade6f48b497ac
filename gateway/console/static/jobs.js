// Calls that run in the background: a list, and each with its answer.

import { html } from "./vendor/preact-htm.js";
import { get, pages, part, post, query } from "./api.js";
import { Act, Cut, Dialog, Problem, Stale, State, Table, When, copy, count, plural, usePoll } from "./parts.js";
import { href, leave } from "./route.js";
import { why } from "./requests.js";

const MOST = 1000; // maximum number of listed jobs
const EVERY_MS = 4000;

const open = (job) => ["queued", "running"].includes(job.status);

const Cancel = ({ job, after }) => html`<${Act} label=${`Cancel ${job.id}`} kind="danger" does=${() => post(`v1/jobs/${part(job.id)}/cancel`)} done="Cancellation was requested." after=${after}>Cancel<//>`;

// The texts of an answer, whichever endpoint gave it.
const texts = (result) => (result?.choices ?? []).map((choice) => choice.message?.content ?? choice.text).filter((text) => typeof text === "string");

function Details({ id, onClose }) {
  const poll = usePoll((signal) => get(`v1/jobs/${part(id)}`, signal), 2000, [id]);
  const { value, error } = poll;
  const facts = value && [
    ["Status", html`<${State} of=${value.status} />`], ["Endpoint", value.endpoint], ["Model", value.model ?? "–"],
    ["Created", html`<${When} ms=${1000 * value.created_at} />`], ["First token", html`<${When} ms=${1000 * value.started_at} />`], ["Ended", html`<${When} ms=${1000 * value.completed_at} />`],
    ["Output tokens", count(value.tokens_generated)], ["Worker failures", count(value.attempts)],
    ...(value.position === null || value.position === undefined ? [] : [["Position in the queue", count(value.position)]]),
    ...(value.waiting_for ? [["Waiting for", value.waiting_for]] : []),
  ];
  const answers = texts(value?.result);
  return html`<${Dialog} title=${`Job ${id}`} onClose=${onClose}>
    ${value ? html`<${Stale} poll=${poll} />` : html`<${Problem} error=${error} />`}
    ${value ? html`
      <dl class="facts">${facts.map(([name, fact]) => html`<div><dt>${name}</dt><dd>${fact}</dd></div>`)}</dl>
      ${value.error ? html`<p class="problem">${why(value.error)}</p>` : null}
      ${answers.map((text, place) => html`<h2>Answer${answers.length > 1 ? ` ${place + 1}` : ""}</h2><div class="turn assistant">${text}</div>`)}
      ${value.result ? html`<details><summary>Response as JSON</summary><pre>${JSON.stringify(value.result, null, 2)}</pre></details>` : null}
      <div class="row end">
        <a class="button" href=${href("requests", id.replace(/^job_/, ""))}>Timeline</a>
        ${value.result ? html`<button type="button" onClick=${() => copy(answers.length ? answers.join("\n\n") : JSON.stringify(value.result))}>Copy answer</button>` : null}
        ${open(value) ? html`<${Cancel} job=${value} after=${poll.again} />` : null}
      </div>` : error ? null : html`<p>Loading…</p>`}
  <//>`;
}

export function Jobs({ route }) {
  const poll = usePoll((signal) => pages((after) => `v1/jobs${query({ limit: 100, after })}`, MOST, signal), EVERY_MS);
  const { value } = poll;
  const rows = value?.data ?? [];
  const columns = [
    { title: "Created", of: (job) => html`<${When} ms=${1000 * job.created_at} />` },
    { title: "Status", of: (job) => html`<${State} of=${job.status} />` },
    { title: "Job", of: (job) => html`<a class="cut code" title=${job.id} href=${href("jobs", job.id)}>${job.id}</a>` },
    { title: "Model", of: (job) => html`<${Cut} text=${job.model ?? "–"} />` },
    { title: "Endpoint", of: (job) => job.endpoint },
    { title: "Output tokens", kind: "num", of: (job) => count(job.tokens_generated) },
    { title: "Error", of: (job) => html`<${Cut} text=${why(job.error) || "–"} />` },
    { title: "Actions", of: (job) => (open(job) ? html`<${Cancel} job=${job} after=${poll.again} />` : "–") },
  ];
  return html`<section class="panel">
    <p role="status">${value ? `${plural(rows.length, "job")} of this key's tenant` : "Loading…"}</p>
    <${Stale} poll=${poll} />
    ${value ? html`<${Table} name="Jobs" columns=${columns} rows=${rows} id=${(job) => job.id} selected=${route.id} empty=${html`No jobs. A call with <code>"background": true</code> starts one.`} />` : null}
  </section>
  ${route.id ? html`<${Details} key=${route.id} id=${route.id} onClose=${() => leave(route)} />` : null}`;
}
