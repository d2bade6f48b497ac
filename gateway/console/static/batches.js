// Batches: files of calls. Uploads one, shows how far it is, and downloads the answers.

import { html, useRef, useState } from "./vendor/preact-htm.js";
import { download, get, pages, part, post, query, upload } from "./api.js";
import { Act, Cut, Dialog, Problem, Stale, State, Table, When, bytes, count, say, usePoll } from "./parts.js";
import { go, href, leave } from "./route.js";

const MOST = 1000; // maximum number of listed batches
const EVERY_MS = 3000;
const PEEK = 1 << 20; // bytes of a file that are read to find its endpoint
const ENDPOINTS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings", "/v1/classify", "/v1/rerank", "/v1/score"];

const open = (batch) => ["validating", "in_progress", "finalizing"].includes(batch.status);

function Progress({ of: { total, completed, failed } }) {
  const done = completed + failed;
  return html`<label class="row nowrap"><progress max=${total || 1} value=${done}></progress> ${count(done)} of ${count(total)}</label>`;
}

const Cancel = ({ batch, after }) => html`<${Act} label=${`Cancel ${batch.id}`} kind="danger" does=${() => post(`v1/batches/${part(batch.id)}/cancel`)} done="Cancellation was requested." after=${after}>Cancel<//>`;

const Save = ({ file, name, children }) => html`<${Act} does=${() => download(`v1/files/${part(file)}/content`, name)} done=${`${name} was downloaded.`}>${children}<//>`;

// ------------------------------------------------------------ one batch

function Details({ id, onClose }) {
  const poll = usePoll((signal) => get(`v1/batches/${part(id)}`, signal), 2000, [id]);
  const { value, error } = poll;
  const ended = value && (value.completed_at ?? value.failed_at ?? value.expired_at ?? value.cancelled_at);
  const facts = value && [
    ["Status", html`<${State} of=${value.status} />`], ["Progress", html`<${Progress} of=${value.request_counts} />`], ["Failed", count(value.request_counts.failed)],
    ["Endpoint", value.endpoint], ["Model", value.model ?? "several"],
    ["Created", html`<${When} ms=${1000 * value.created_at} />`], ["Started", html`<${When} ms=${1000 * value.in_progress_at} />`], [ended ? "Ended" : "Expires", html`<${When} ms=${1000 * (ended || value.expires_at)} />`],
    ["Input tokens", count(value.usage?.input_tokens)], ["Output tokens", count(value.usage?.output_tokens)],
  ];
  return html`<${Dialog} title=${`Batch ${id}`} onClose=${onClose}>
    ${value ? html`<${Stale} poll=${poll} />` : html`<${Problem} error=${error} />`}
    ${value ? html`
      <dl class="facts">${facts.map(([name, fact]) => html`<div><dt>${name}</dt><dd>${fact}</dd></div>`)}</dl>
      ${value.errors ? html`<h2>Errors in the file</h2><ol class="time">${value.errors.data.map((one) => html`<li class="bad">${one.line ? `Line ${one.line}: ` : ""}${one.message} <code>${one.code}</code></li>`)}</ol>` : null}
      <div class="row end">
        ${value.output_file_id ? html`<${Save} file=${value.output_file_id} name=${`${id}.output.jsonl`}>Download answers<//>` : null}
        ${value.error_file_id ? html`<${Save} file=${value.error_file_id} name=${`${id}.errors.jsonl`}>Download errors<//>` : null}
        <${Save} file=${value.input_file_id} name=${`${id}.input.jsonl`}>Download input<//>
        ${open(value) ? html`<${Cancel} batch=${value} after=${poll.again} />` : null}
      </div>` : error ? null : html`<p>Loading…</p>`}
  <//>`;
}

// ------------------------------------------------------------ a new batch

// The endpoint that the first line of a file names, "" for none that is known.
async function endpointOf(file) {
  const line = (await file.slice(0, PEEK).text()).split("\n").find((text) => text.trim()) ?? "";
  try {
    const { url } = JSON.parse(line);
    return ENDPOINTS.includes(url) ? url : "";
  } catch {
    return "";
  }
}

function NewBatch({ onClose, again }) {
  const [file, setFile] = useState(null);
  const [endpoint, setEndpoint] = useState(ENDPOINTS[0]);
  const [over, setOver] = useState(false);
  const [error, setError] = useState(null);
  const [step, setStep] = useState("");
  const [sent, setSent] = useState(0);
  const abort = useRef(null);
  async function take(given) {
    if (!given) return;
    setFile(given);
    setError(null);
    setEndpoint((await endpointOf(given)) || endpoint);
  }
  async function start(event) {
    event.preventDefault();
    abort.current = new AbortController();
    const { signal } = abort.current;
    setError(null);
    setStep("Uploading");
    setSent(0);
    try {
      const form = new FormData();
      form.append("purpose", "batch");
      form.append("file", file, file.name);
      const { id } = await upload("v1/files", form, { signal, progress: setSent });
      setStep("Starting");
      const batch = await post("v1/batches", { input_file_id: id, endpoint, completion_window: "24h" }, signal);
      say(`${batch.id} was started.`);
      again();
      go(href("batches", batch.id));
      onClose();
    } catch (wrong) {
      if (wrong.name !== "AbortError") setError(wrong);
      setStep("");
    }
  }
  return html`<${Dialog} title="New batch" onClose=${() => { abort.current?.abort(); onClose(); }}>
    <form onSubmit=${start}>
      <${Problem} error=${error} />
      <div class=${`drop ${over ? "over" : ""}`} data-drop
        onDragOver=${(event) => { event.preventDefault(); setOver(true); }} onDragLeave=${() => setOver(false)}
        onDrop=${(event) => { event.preventDefault(); setOver(false); take(event.dataTransfer.files[0]); }}>
        <p>Drop a JSONL file here, one call per line, or choose</p>
        <label class="button"><span>a file</span><input type="file" accept=".jsonl,application/jsonl" onChange=${(event) => take(event.target.files[0])} /></label>
        <p role="status">${file ? `${file.name}, ${bytes(file.size)}` : "no file chosen"}</p>
      </div>
      <div class="form"><label><span>Endpoint</span><select value=${endpoint} onChange=${(event) => setEndpoint(event.target.value)}>${ENDPOINTS.map((one) => html`<option value=${one}>${one}</option>`)}</select></label></div>
      <p class="row end">
        <span role="status" class="soft grow">${step ? html`${step}… <progress max="1" value=${sent} aria-label="Uploaded"></progress>` : ""}</span>
        ${step ? html`<button key="stop" type="button" onClick=${() => abort.current.abort()}>Stop</button>` : html`<button key="start" class="main" disabled=${!file}>Start batch</button>`}
      </p>
    </form>
  <//>`;
}

// ------------------------------------------------------------ the page

export function Batches({ route }) {
  const poll = usePoll((signal) => pages((after) => `v1/batches${query({ limit: 100, after })}`, MOST, signal), EVERY_MS);
  const [making, setMaking] = useState(false);
  const { value } = poll;
  const rows = value?.data ?? [];
  const columns = [
    { title: "Created", of: (batch) => html`<${When} ms=${1000 * batch.created_at} />` },
    { title: "Status", of: (batch) => html`<${State} of=${batch.status} />` },
    { title: "Batch", of: (batch) => html`<a class="cut code" title=${batch.id} href=${href("batches", batch.id)}>${batch.id}</a>` },
    { title: "Progress", of: (batch) => html`<${Progress} of=${batch.request_counts} />` },
    { title: "Failed", kind: "num", of: (batch) => count(batch.request_counts.failed) },
    { title: "Model", of: (batch) => html`<${Cut} text=${batch.model ?? "several"} />` },
    { title: "Errors", of: (batch) => html`<${Cut} text=${batch.errors?.data.map((one) => one.message).join("; ") ?? "–"} />` },
    { title: "Actions", of: (batch) => (open(batch) ? html`<${Cancel} batch=${batch} after=${poll.again} />` : batch.output_file_id ? html`<${Save} file=${batch.output_file_id} name=${`${batch.id}.output.jsonl`}>Download<//>` : "–") },
  ];
  return html`<section class="panel">
    <div class="row"><p class="grow" role="status">${value ? `${count(rows.length)} ${rows.length === 1 ? "batch" : "batches"} of this key's tenant` : "Loading…"}</p>
      <button type="button" class="main" onClick=${() => setMaking(true)}>New batch…</button></div>
    <${Stale} poll=${poll} />
    ${value ? html`<${Table} name="Batches" columns=${columns} rows=${rows} id=${(batch) => batch.id} selected=${route.id} empty="No batches yet." />` : null}
  </section>
  ${route.id ? html`<${Details} key=${route.id} id=${route.id} onClose=${() => leave(route)} />` : null}
  ${making ? html`<${NewBatch} onClose=${() => setMaking(false)} again=${poll.again} />` : null}`;
}
