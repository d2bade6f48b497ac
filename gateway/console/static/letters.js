// Requests that were given up after several workers died, and messages that cannot be read.

import { html } from "./vendor/preact-htm.js";
import { get, pages, part, post, query } from "./api.js";
import { Act, Cut, Dialog, Problem, Stale, Table, When, clock, count, lasted, plural, usePoll } from "./parts.js";
import { href, leave } from "./route.js";

const MOST = 1000; // maximum number of listed dead letters
const EVERY_MS = 4000;

const Retry = ({ letter, after }) => html`<${Act} label=${`Retry ${letter.id}`} disabled=${!letter.request} does=${() => post(`v1/dead_letters/${part(letter.id)}/retry`)}
  done=${({ request }) => `${request} was requeued.`} after=${after}>Retry<//>`;

function Details({ id, onClose, again }) {
  const { value, error } = usePoll((signal) => get(`v1/dead_letters/${part(id)}`, signal), 0, [id]);
  return html`<${Dialog} title=${`Dead letter ${id}`} onClose=${onClose}>
    <${Problem} error=${error} />
    ${value ? html`
      <p>${value.reason}</p>
      <ol class="time">${value.deaths.map((death) => html`<li class="bad">${clock(death.ms)}: ${death.worker ?? death.wid} failed in ${death.phase}, ${lasted(death.after_ms)} after the assignment, ${count(death.output_tokens)} tokens generated</li>`)}</ol>
      ${value.raw ? html`<h2>Message</h2><pre>${value.raw}</pre>` : null}
      <div class="row end"><${Retry} letter=${value} after=${() => { again(); onClose(); }} /></div>` : error ? null : html`<p>Loading…</p>`}
  <//>`;
}

export function Letters({ route }) {
  const poll = usePoll((signal) => pages((after) => `v1/dead_letters${query({ limit: 100, after })}`, MOST, signal), EVERY_MS);
  const { value } = poll;
  const rows = value?.data ?? [];
  const columns = [
    { title: "Time", of: (letter) => html`<${When} ms=${letter.created_ms} />` },
    { title: "Dead letter", of: (letter) => html`<a class="code" href=${href("dead-letters", letter.id)}>${letter.id}</a>` },
    { title: "Reason", of: (letter) => html`<${Cut} text=${letter.reason} />` },
    { title: "Request", of: (letter) => html`<code><${Cut} text=${letter.request?.id ?? "unreadable"} /></code>` },
    { title: "Tenant", of: (letter) => html`<${Cut} text=${letter.request?.tenant || "–"} />` },
    { title: "Worker failures", kind: "num", of: (letter) => count(letter.deaths.length) },
    { title: "Actions", of: (letter) => html`<${Retry} letter=${letter} after=${poll.again} />` },
  ];
  return html`<section class="panel">
    <p role="status">${value ? plural(rows.length, "dead letter") : "Loading…"}</p>
    <${Stale} poll=${poll} />
    ${value ? html`<${Table} name="Dead letters" columns=${columns} rows=${rows} id=${(letter) => letter.id} selected=${route.id} empty="No dead letters." />` : null}
  </section>
  ${route.id ? html`<${Details} key=${route.id} id=${route.id} again=${poll.again} onClose=${() => leave(route)} />` : null}`;
}
