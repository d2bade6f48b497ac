// Requests that run, wait or have ended: a list with filters, and the timeline of each.

import { html, useMemo } from "./vendor/preact-htm.js";
import { get, pages, post, query } from "./api.js";
import { Act, Cut, Dialog, Problem, Stale, State, Table, When, clock, confirmed, count, lasted, plural, usePoll } from "./parts.js";
import { href, leave, replace } from "./route.js";

const MOST = 1000; // maximum number of listed requests
const MOST_PAGES = 10; // of a poll, each of up to 1,000 requests that the gateway looks at
const EVERY_MS = 4000;
const ENDED = ["completed", "failed", "cancelled", "refused"];
const SPANS = [["", "any time"], ["300", "last 5 minutes"], ["3600", "last hour"], ["86400", "last 24 hours"], ["custom", "custom range"]];

export const modelOf = (one) => one.model ?? one.adapter?.name ?? one.adapter?.digest.slice(0, 12) ?? (one.state === "refused" ? "–" : "base");

// An error as one line, after the HTTP status where it is known.
export const why = (error, status) => (error ? `${status ? `${status}: ` : ""}${[error.message, error.code].filter(Boolean).join(" – ")}` : "");

// ------------------------------------------------------------ one request

const isEnded = (one) => ENDED.includes(one.state);

// Its text follows the end by about a second, where texts are kept.
const isSettled = (one) => isEnded(one) && (one.text || Math.abs(Date.now() - one.timeline.at(-1).ms) > 5000);

// The prompt and the output, where the gateway keeps them.
function Texts({ of }) {
  if (!of) return null;
  if (of.problem) return html`<p class="problem">Prompt and output are not available: ${of.problem}</p>`;
  const part = (title, text) => html`<h2>${title}</h2><pre tabindex="0" aria-label=${title}>${text}</pre>`;
  return html`
    ${part("Prompt", of.prompt)}
    ${of.output === null ? null : part("Output", of.output)}
    ${of.is_cut ? html`<p class="soft">Too long to be kept whole: a prompt is cut at its beginning, an output at its end.</p>` : null}`;
}

function Timeline({ id, onClose }) {
  const poll = usePoll((signal) => get(`v1/requests/${encodeURIComponent(id)}`, signal), 2000, [id], isSettled);
  const { value, error } = poll;
  const ended = value && isEnded(value);
  const begin = value?.timeline?.[0]?.ms ?? 0;
  const worker = value?.worker ?? value?.timeline?.findLast((event) => event.worker)?.worker;
  const cancel = async () =>
    (await confirmed(`The request ${id} ends, and its client is notified that it was cancelled.`, "Cancel the request")) && post(`v1/requests/${encodeURIComponent(id)}/cancel`);
  return html`<${Dialog} title=${`Request ${id}`} onClose=${onClose}>
    ${value ? html`<${Stale} poll=${poll} />` : html`<${Problem} error=${error} />`}
    ${value ? html`
      <dl class="facts">
        <div><dt>State</dt><dd><${State} of=${value.state} />${value.finish ? ` ${value.finish}` : ""}</dd></div>
        <div><dt>Submitted</dt><dd><${When} ms=${value.submitted_ms ?? begin} /></dd></div>
        <div><dt>Tenant</dt><dd>${value.tenant || "–"}</dd></div>
        <div><dt>Model</dt><dd>${modelOf(value)}</dd></div>
        <div><dt>Worker</dt><dd>${worker ?? "–"}</dd></div>
        <div><dt>Tokens</dt><dd>${count(value.prompt_tokens)} in (${count(value.cached_tokens)} cached), ${count(value.output_tokens)} out</dd></div>
        <div><dt>Worker failures</dt><dd>${count(value.attempts)}</dd></div>
      </dl>
      ${value.error ? html`<p class="problem">${why(value.error, value.status)}</p>` : null}
      <h2>Timeline</h2>
      <ol class="time">${(value.timeline ?? []).map((event) => html`<li class=${event.event === "worker_died" ? "bad" : ""}>
        <span class="soft code" title=${clock(event.ms)}>+${lasted(event.ms - begin)}</span> ${event.text}</li>`)}</ol>
      <${Texts} of=${value.text} />
      ${ended ? null : html`<div class="row end"><${Act} kind="danger" does=${cancel} done="Cancellation was requested." after=${poll.again}>Cancel…<//></div>`}
    ` : error ? null : html`<p>Loading…</p>`}
  <//>`;
}

// ------------------------------------------------------------ filters

const local = (text) => (text ? new Date(text).getTime() : 0);

// The time that a filter asks for, unix ms; 0: no limit.
function limits({ span, from, to }) {
  if (span === "custom") return { since: local(from), until: local(to) };
  return { since: span ? Date.now() - 1000 * Number(span) : 0, until: 0 };
}

// Whether a request passes the filters, as the gateway reads them: one that knows fewer returns more.
export function passes(one, { status, model, q }, { since, until }) {
  const ms = one.ended_ms || one.submitted_ms;
  if (ms < since || (until && ms >= until)) return false;
  if (status && one.state !== status) return false;
  if (model && modelOf(one) !== model) return false;
  const texts = [one.id, one.call, modelOf(one), one.worker, one.error?.code, one.error?.message];
  return !q || texts.some((text) => text?.toLowerCase().includes(q.toLowerCase()));
}

function Filters({ given, change }) {
  const field = (name, words, more = {}) => html`<label><span>${words}</span><input ...${more} value=${given[name] ?? ""} onChange=${(event) => change({ [name]: event.target.value.trim() })} /></label>`;
  const choice = (name, words, options) => html`<label><span>${words}</span><select value=${given[name] ?? ""} onChange=${(event) => change({ [name]: event.target.value })}>
    ${options.map(([value, text]) => html`<option value=${value}>${text}</option>`)}</select></label>`;
  return html`<form class="form filters" onSubmit=${(event) => event.preventDefault()} aria-label="Filters">
    ${choice("state", "State", [["", "all"], ["running", "running"], ["queued", "queued"], ["ended", "ended"]])}
    ${choice("status", "Result", [["", "any"], ...ENDED.map((one) => [one, one])])}
    ${choice("span", "Time", SPANS)}
    ${given.span === "custom" ? html`${field("from", "From", { type: "datetime-local", step: 1 })}${field("to", "To", { type: "datetime-local", step: 1 })}` : null}
    ${field("model", "Model or adapter", { spellcheck: false })}
    ${field("tenant", "Tenant", { spellcheck: false, maxlength: 64 })}
    ${field("q", "Search (ID, worker, error)", { type: "search", spellcheck: false, maxlength: 100 })}
  </form>`;
}

// ------------------------------------------------------------ the page

export function Requests({ route }) {
  const given = route.params;
  const asked = JSON.stringify(given);
  const poll = usePoll((signal) => {
    const { state, status, tenant, model, q } = given;
    const { since, until } = limits(given);
    return pages((after) => `v1/requests${query({ state, status, tenant, model, q, since: since || "", until: until || "", limit: 100, after })}`, MOST, signal, MOST_PAGES);
  }, EVERY_MS, [asked]);
  const { value } = poll;
  const rows = useMemo(() => {
    const found = (value?.data ?? []).filter((one) => passes(one, given, limits(given)));
    return found.sort((a, b) => b.submitted_ms - a.submitted_ms || (a.id < b.id ? 1 : -1));
  }, [value, asked]);
  const filtered = Object.values(given).some(Boolean);
  const change = (more) => replace(href("requests", "", { ...given, ...more }));
  const columns = [
    { title: "Time", of: (one) => html`<${When} ms=${one.submitted_ms} />` },
    { title: "State", of: (one) => html`<${State} of=${one.state} />` },
    { title: "Request", of: (one) => html`<a class="cut code" title=${one.id} href=${href("requests", one.id, given)}>${one.id}</a>` },
    { title: "Model", of: (one) => html`<${Cut} text=${modelOf(one)} />` },
    { title: "Tenant", of: (one) => html`<${Cut} text=${one.tenant || "–"} />` },
    { title: "Error", of: (one) => html`<${Cut} text=${why(one.error, one.status) || (one.state === "failed" ? one.finish ?? "error" : "–")} />` },
    { title: "Worker", of: (one) => html`<${Cut} text=${one.worker ?? "–"} />` },
    { title: "Input tokens", kind: "num", of: (one) => count(one.prompt_tokens) },
    { title: "Output tokens", kind: "num", of: (one) => count(one.output_tokens) },
    { title: "Time to first token", kind: "num", of: (one) => (one.first_ms ? lasted(one.first_ms - one.submitted_ms) : "–") },
    { title: "Latency", kind: "num", of: (one) => (one.ended_ms ? lasted(one.ended_ms - one.submitted_ms) : lasted(Date.now() - one.submitted_ms)) },
    { title: "Class", of: (one) => one.class ?? "–" },
    { title: "Worker failures", kind: "num", of: (one) => one.attempts || "–" },
  ];
  return html`<section class="panel">
    <${Filters} given=${given} change=${change} />
    <div class="row"><p class="grow" role="status">${value ? `${plural(rows.length, "request")}${value.more ? (value.data.length < MOST ? ", older ones were not searched" : `, out of the latest ${count(MOST)}`) : ""}` : "Loading…"}</p>
      ${filtered ? html`<button type="button" onClick=${() => replace(href("requests"))}>Clear filters</button>` : null}</div>
    <${Stale} poll=${poll} />
    ${value ? html`<${Table} name="Requests" columns=${columns} rows=${rows} id=${(one) => one.id} selected=${route.id}
      empty=${filtered ? "No request matches the filters." : "No requests yet. The playground sends one."} />` : null}
  </section>
  ${route.id ? html`<${Timeline} key=${route.id} id=${route.id} onClose=${() => leave(route, given)} />` : null}`;
}
