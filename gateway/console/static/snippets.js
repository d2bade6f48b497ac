// The same call as code, for a terminal and for Python.

import { html, useState } from "./vendor/preact-htm.js";
import { gateway, key } from "./api.js";
import { copy } from "./parts.js";

export const route = (mode) => (mode === "text" ? "v1/completions" : "v1/chat/completions");

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

export function curl(mode, wanted) {
  const door = key.get() ? ` \\\n  -H "Authorization: Bearer $LORAFLEET_KEY"` : "";
  return `curl ${gateway}/${route(mode)} \\\n  -H 'Content-Type: application/json'${door} \\\n  -d ${quoted(JSON.stringify(wanted))}`;
}

// A JSON value as Python writes it.
function literal(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${literal(one)}`).join(", ")}}`;
  return JSON.stringify(value);
}

export function python(mode, wanted) {
  const call = mode === "text" ? "client.completions.create" : "client.chat.completions.create";
  const said = mode === "text" ? "answer.choices[0].text" : "answer.choices[0].message";
  const rows = Object.entries(wanted).map(([name, value]) => {
    const list = Array.isArray(value) && value.length > 1;
    return `    ${name}=${list ? `[\n${value.map((one) => `        ${literal(one)},\n`).join("")}    ]` : literal(value)},`;
  }).join("\n");
  const secret = key.get() ? 'os.environ["LORAFLEET_KEY"]' : '"none"';
  return `${key.get() ? "import os\n\n" : ""}from openai import OpenAI\n\nclient = OpenAI(base_url="${gateway}/v1", api_key=${secret})\nanswer = ${call}(\n${rows}\n)\nprint(${said}${mode === "text" || wanted.tools ? "" : ".content"})`;
}

export function Code({ mode, wanted }) {
  const [open, setOpen] = useState("curl");
  const text = open === "curl" ? curl(mode, wanted) : python(mode, wanted);
  return html`<section class="panel">
    <div class="row"><h2 class="grow">Code</h2>
      ${["curl", "Python"].map((name) => html`<button type="button" aria-pressed=${name === open ? "true" : "false"} onClick=${() => setOpen(name)}>${name}</button>`)}
      <button type="button" onClick=${() => copy(text)}>Copy code</button></div>
    <pre tabindex="0" aria-label=${`Code: ${open}`}>${text}</pre>
  </section>`;
}
