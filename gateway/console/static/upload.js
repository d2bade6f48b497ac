// Adding an adapter: from a remote source or a local path, or by an upload.

import { html, useRef, useState } from "./vendor/preact-htm.js";
import { post, query, send } from "./api.js";
import { Dialog, Problem, bytes, plural, say } from "./parts.js";
import { MOST_BYTES, zip } from "./zip.js";

// Maximum number of files of a dropped folder; an adapter has a handful.
const MOST_FILES = 500;

async function inside(entry, path, found) {
  if (found.length >= MOST_FILES) throw new Error(`more than ${MOST_FILES} files: drop only the adapter's folder`);
  if (entry.isFile) {
    found.push({ name: path + entry.name, file: await new Promise((resolve, reject) => entry.file(resolve, reject)) });
    return;
  }
  const reader = entry.createReader();
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return;
    for (const one of some) await inside(one, `${path}${entry.name}/`, found);
  }
}

async function dropped(transfer) {
  const found = [];
  for (const entry of [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean)) await inside(entry, "", found);
  return found.length ? found : chosen(transfer.files); // some browsers do not report folders
}

const chosen = (list) => [...list].slice(0, MOST_FILES).map((file) => ({ name: file.webkitRelativePath || file.name, file }));

const isZip = (files) => files.length === 1 && files[0].name.toLowerCase().endsWith(".zip");

function Files({ onClose, again }) {
  const [files, setFiles] = useState([]);
  const [over, setOver] = useState(false);
  const [error, setError] = useState(null);
  const [step, setStep] = useState("");
  const abort = useRef(null);
  const size = files.reduce((sum, one) => sum + one.file.size, 0);
  async function take(given) {
    try {
      const found = await given;
      setFiles(found);
      setError(null);
    } catch (wrong) {
      setError(wrong);
    }
  }
  async function upload(event) {
    event.preventDefault();
    const form = new FormData(event.target);
    abort.current = new AbortController();
    setError(null);
    try {
      if (size > MOST_BYTES) throw new Error("more than 4 GB: copy the folder to the adapter root or to a bucket instead");
      let done = 0;
      setStep("reading");
      const raw = isZip(files) ? files[0].file : await zip(files, (num) => setStep(`reading, ${bytes((done += num))} of ${bytes(size)}`));
      setStep(`uploading and checking ${bytes(raw.size)}`);
      const values = { name: form.get("name").trim(), replace: form.get("replace") ? "true" : "" };
      const answer = await send(`v1/adapters/upload${query(values)}`, { method: "POST", raw, signal: abort.current.signal, more: { "content-type": "application/zip" } });
      const { name } = await answer.json();
      say(`${name} is served.`);
      again();
      onClose();
    } catch (wrong) {
      if (wrong.name !== "AbortError") setError(wrong);
      setStep("");
    }
  }
  return html`<form onSubmit=${upload}>
    <${Problem} error=${error} />
    <div class=${`drop ${over ? "over" : ""}`} data-drop
      onDragOver=${(event) => { event.preventDefault(); setOver(true); }} onDragLeave=${() => setOver(false)}
      onDrop=${(event) => { event.preventDefault(); setOver(false); take(dropped(event.dataTransfer)); }}>
      <p>Drop a PEFT folder or zip here, or choose</p>
      <div class="row" style=${{ justifyContent: "center" }}>
        <label class="button"><span>files or a zip</span><input type="file" multiple onChange=${(event) => take(chosen(event.target.files))} /></label>
        <label class="button"><span>a folder</span><input type="file" webkitdirectory onChange=${(event) => take(chosen(event.target.files))} /></label>
      </div>
      <p role="status">${files.length ? `${plural(files.length, "file")}, ${bytes(size)}` : "no files chosen"}</p>
    </div>
    <div class="form">
      <label><span>Name</span><input name="name" required maxlength="200" autocomplete="off" spellcheck=${false} /></label>
      <label class="check"><input type="checkbox" name="replace" /> replace an existing adapter</label>
    </div>
    <p class="row end">
      <span role="status" class="soft grow">${step}</span>
      ${step ? html`<button key="stop" type="button" onClick=${() => abort.current.abort()}>Stop</button>` : html`<button key="upload" class="main" disabled=${!files.length}>Upload</button>`}
    </p>
  </form>`;
}

function Register({ onClose, again }) {
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  async function register(event) {
    event.preventDefault();
    const form = new FormData(event.target);
    setBusy(true);
    try {
      const adapter = await post("v1/adapters", {
        name: form.get("name").trim(), source: form.get("source").trim(), token: form.get("token"), replace: Boolean(form.get("replace")),
        pin: Boolean(form.get("pin")), preload: Boolean(form.get("preload")), wait_s: 60,
      });
      say(`${adapter.name}: ${adapter.state.replaceAll("_", " ")}.`);
      again();
      onClose();
    } catch (refused) {
      setError(refused);
    }
    setBusy(false);
  }
  return html`<form onSubmit=${register}>
    <${Problem} error=${error} />
    <div class="form">
      <label><span>Name</span><input name="name" required maxlength="1100" autocomplete="off" spellcheck=${false} /></label>
      <label><span>Source (default: the name): local:FOLDER, ORG/NAME, s3://…</span><input name="source" maxlength="1100" autocomplete="off" spellcheck=${false} /></label>
      <label><span>Access token for the source</span><input name="token" type="password" maxlength="1000" autocomplete="off" /></label>
    </div>
    <fieldset><legend class="hidden">Options</legend>
      <label class="check"><input type="checkbox" name="replace" /> replace an existing adapter</label>
      <label class="check"><input type="checkbox" name="pin" /> pin on all workers</label>
      <label class="check"><input type="checkbox" name="preload" /> preload on all workers</label>
    </fieldset>
    <p class="row end"><button class="main" disabled=${busy} aria-busy=${busy}>Register</button></p>
  </form>`;
}

export function Upload(means) {
  const [way, setWay] = useState("files");
  return html`<${Dialog} title="Add an adapter" onClose=${means.onClose}>
    <div class="row" role="group" aria-label="Source">
      <button type="button" aria-pressed=${way === "files" ? "true" : "false"} onClick=${() => setWay("files")}>Upload files</button>
      <button type="button" aria-pressed=${way === "place" ? "true" : "false"} onClick=${() => setWay("place")}>Hub / S3 / local path</button>
    </div>
    ${way === "files" ? html`<${Files} ...${means} />` : html`<${Register} ...${means} />`}
  <//>`;
}
