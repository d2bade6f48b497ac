// Tenants with limits, API keys and the audit log.

import { html, useState } from "./vendor/preact-htm.js";
import { pages, part, post, query, remove } from "./api.js";
import { Act, Cut, Dialog, Problem, Stale, State, Table, When, bytes, confirmed, copy, count, usePoll } from "./parts.js";
import { Audit } from "./audit.js";

const MOST = 10_000;
const LIMITS = [
  ["requests_per_minute", "Requests per minute"], ["tokens_per_minute", "Tokens per minute"], ["concurrency", "Concurrency"],
  ["kept_bytes", "Bytes stored in the queue"], ["weight", "Weight (default 1)"],
];

const read = async (signal) => {
  const [keys, tenants] = await Promise.all(
    ["v1/keys", "v1/tenants"].map((path) => pages((after) => `${path}${query({ limit: 1000, after })}`, MOST, signal)),
  );
  return { keys: keys.data, tenants: tenants.data, writable: keys.page.writable };
};

function NewKey({ onClose, again }) {
  const [made, setMade] = useState(null);
  const [error, setError] = useState(null);
  async function create(event) {
    event.preventDefault();
    const form = new FormData(event.target);
    try {
      const scopes = ["infer", "adapters"].filter((scope) => form.get(scope));
      setMade(await post("v1/keys", { tenant: form.get("tenant"), scopes, expires_in_s: Number(form.get("days")) * 86_400, note: form.get("note") }));
      setError(null);
      again();
    } catch (refused) {
      setError(refused);
    }
  }
  if (made) return html`<${Dialog} title="New key" onClose=${onClose}>
    <p>The key is shown only once; only its hash is stored.</p>
    <pre class="panel" data-secret>${made.secret}</pre>
    <div class="row end"><button type="button" class="main" onClick=${() => copy(made.secret)}>Copy</button></div>
  <//>`;
  return html`<${Dialog} title="New key" onClose=${onClose}>
    <form onSubmit=${create}>
      <${Problem} error=${error} />
      <div class="form">
        <label><span>Tenant</span><input name="tenant" required maxlength="64" autocomplete="off" /></label>
        <label><span>Days until it expires (0: never)</span><input name="days" type="number" min="0" max="3650" value="90" required /></label>
        <label><span>Note</span><input name="note" maxlength="200" autocomplete="off" /></label>
      </div>
      <fieldset><legend>Scopes</legend>
        <label class="check"><input type="checkbox" name="infer" defaultChecked=${true} /> infer: generate and list models</label>
        <label class="check"><input type="checkbox" name="adapters" /> adapters: register and unload the tenant's adapters</label>
      </fieldset>
      <p class="soft">Keys with the scope admin can only be created by <code>lorafleet keys create</code>.</p>
      <p class="row end"><button class="main">Create key</button></p>
    </form>
  <//>`;
}

function Limits({ tenant, onClose, again }) {
  const [error, setError] = useState(null);
  async function save(event) {
    event.preventDefault();
    const form = new FormData(event.target);
    const body = Object.fromEntries(LIMITS.map(([name]) => [name, Number(form.get(name))]));
    body.adapters = form.get("adapters").split(/[\s,]+/).filter(Boolean);
    try {
      await post(`v1/tenants/${part(tenant.id)}`, body);
      again();
      onClose();
    } catch (refused) {
      setError(refused);
    }
  }
  return html`<${Dialog} title=${`Limits of ${tenant.id}`} onClose=${onClose}>
    <form onSubmit=${save}>
      <${Problem} error=${error} />
      <p class="soft">Shared by all keys of the tenant, effective from the next request. 0: no limit; for bytes, the fleet's default.</p>
      <div class="form">${LIMITS.map(([name, words]) => html`<label><span>${words}</span>
        <input name=${name} type="number" min=${name === "weight" ? 0.001 : 0} step=${name === "weight" ? "any" : 1} required value=${tenant[name]} /></label>`)}
        <label><span>Visible shared adapters (patterns)</span><input name="adapters" value=${tenant.adapters.join(" ")} /></label>
      </div>
      <p class="row end"><button class="main">Save</button></p>
    </form>
  <//>`;
}

export function Keys() {
  const poll = usePoll(read, 15_000);
  const { value, error, again } = poll;
  const [making, setMaking] = useState(false);
  const [limiting, setLimiting] = useState(null);
  if (error?.code === "api_keys_off") return html`<p class="note">API keys are off: anyone who can reach this gateway has full access. <code>--api-keys</code> turns them on.</p><${Audit} />`;
  const revoke = async (key) =>
    (await confirmed(`${key.id} of ${key.tenant} stops working with its next request.`, "Revoke")) && remove(`v1/keys/${part(key.id)}`);
  const writable = value?.writable ?? false;
  const limit = (value_) => value_ || "–";
  const tenants = [
    { title: "Tenant", of: (one) => html`<${Cut} text=${one.id} />` },
    { title: "Requests/min", kind: "num", of: (one) => limit(one.requests_per_minute && count(one.requests_per_minute)) },
    { title: "Tokens/min", kind: "num", of: (one) => limit(one.tokens_per_minute && count(one.tokens_per_minute)) },
    { title: "Concurrency", kind: "num", of: (one) => limit(one.concurrency) },
    { title: "Stored bytes", kind: "num", of: (one) => limit(one.kept_bytes && bytes(one.kept_bytes)) },
    { title: "Weight", kind: "num", of: (one) => one.weight },
    { title: "Visible adapters", of: (one) => html`<${Cut} text=${one.adapters.join(" ") || "none"} />` },
    { title: "Actions", of: (one) => html`<button type="button" disabled=${!writable} aria-label=${`Limit ${one.id}`} onClick=${() => setLimiting(one)}>Limit…</button>` },
  ];
  const keys = [
    { title: "Key", of: (one) => html`<code>${one.id}</code>` },
    { title: "Tenant", of: (one) => html`<${Cut} text=${one.tenant} />` },
    { title: "Scopes", of: (one) => one.scopes.join(", ") },
    { title: "Created", of: (one) => html`<${When} ms=${one.created_ms} />` },
    { title: "Expires", of: (one) => (one.expired ? html`<${State} of="expired" />` : one.expires_ms ? html`<${When} ms=${one.expires_ms} />` : "never") },
    { title: "Note", of: (one) => html`<${Cut} text=${one.note || "–"} />` },
    { title: "Actions", of: (one) => html`<${Act} kind="danger" label=${`Revoke ${one.id}`} disabled=${!writable} does=${() => revoke(one)} done=${`${one.id} was revoked.`} after=${again}>Revoke…<//>` },
  ];
  return html`
    <${Stale} poll=${poll} />
    ${value && !writable ? html`<p class="note">Read-only: change keys and limits with <code>lorafleet keys</code>, or allow it here with the setting <code>console_keys</code> (see docs/keys.md for the risks).</p>` : null}
    <section class="panel"><h2>Tenants</h2>${value ? html`<${Table} name="Tenants" columns=${tenants} rows=${value.tenants} id=${(one) => one.id} empty="No tenants yet." />` : html`<p>Loading…</p>`}</section>
    <section class="panel">
      <div class="row"><h2 class="grow">Keys</h2><button type="button" class="main" disabled=${!writable} onClick=${() => setMaking(true)}>New key…</button></div>
      ${value ? html`<${Table} name="Keys" columns=${keys} rows=${value.keys} id=${(one) => one.id} empty="No keys yet." />` : null}
    </section>
    <${Audit} />
    ${making ? html`<${NewKey} onClose=${() => setMaking(false)} again=${again} />` : null}
    ${limiting ? html`<${Limits} tenant=${limiting} onClose=${() => setLimiting(null)} again=${again} />` : null}`;
}
