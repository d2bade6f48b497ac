// The gateway's API, called with the operator's key, which sessionStorage holds until the tab is closed.

const KEY = "lorafleet.key";
const ROOT = new URL("../", location.href); // the gateway, under whatever prefix the console is served

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

export const gateway = ROOT.href.replace(/\/$/, "");

// An error answer of the gateway.
export class Refused extends Error {
  constructor(status, message, code, reasons) {
    super(message);
    this.status = status;
    this.code = code;
    this.reasons = reasons ?? [];
  }
}

let onLocked = () => {};
export const whenLocked = (does) => (onLocked = does);

function headers(more) {
  const secret = key.get();
  return { ...(secret ? { authorization: `Bearer ${secret}` } : {}), ...more };
}

async function refusal(answer) {
  let error = {};
  try {
    const { error: given } = await answer.json();
    error = typeof given === "object" && given !== null ? given : { message: given };
  } catch {
    error = {};
  }
  const refused = new Refused(answer.status, error.message || `the gateway answered ${answer.status}`, error.code, error.reasons);
  if (answer.status === 401) onLocked(refused.message);
  return refused;
}

// Sends a request and returns the answer; throws `Refused`.
export async function send(path, { method = "GET", body, raw, signal, more } = {}) {
  const init = { method, signal, headers: headers(more), cache: "no-store", redirect: "error" };
  if (body !== undefined) {
    init.body = JSON.stringify(body);
    init.headers["content-type"] = "application/json";
  } else if (raw !== undefined) {
    init.body = raw;
  }
  let answer;
  try {
    answer = await fetch(new URL(path, ROOT), init);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "the gateway can't be reached");
  }
  if (!answer.ok) throw await refusal(answer);
  return answer;
}

export const get = async (path, signal) => (await send(path, { signal })).json();
export const post = async (path, body, signal) => (await send(path, { method: "POST", body, signal })).json();
export const remove = async (path) => (await send(path, { method: "DELETE" })).json();

// Saves what the gateway answers as a file of this computer.
export async function download(path, name) {
  const url = URL.createObjectURL(await (await send(path)).blob());
  const link = document.createElement("a");
  [link.href, link.download] = [url, name];
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

// Posts a form and reports the share of its bytes that were sent, which `fetch` cannot. Throws `Refused`.
export function upload(path, form, { signal, progress }) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", new URL(path, ROOT));
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => event.lengthComputable && progress(event.loaded / event.total);
    request.onerror = () => reject(new Refused(0, "the gateway can't be reached"));
    request.onabort = () => reject(new DOMException("stopped", "AbortError"));
    request.onload = async () => {
      const answer = new Response(request.responseText, { status: request.status });
      if (answer.ok) resolve(await answer.json());
      else reject(await refusal(answer));
    };
    signal.addEventListener("abort", () => request.abort());
    request.send(form);
  });
}

// Encodes a name for a path. Slashes in adapter names stay, unless the path would then lead elsewhere.
export function part(text) {
  const names = text.split("/");
  return names.some((name) => name === "." || name === "..") ? encodeURIComponent(text) : names.map(encodeURIComponent).join("/");
}

export function query(values) {
  const given = Object.entries(values).filter(([, value]) => value !== "" && value !== undefined && value !== null);
  return given.length ? `?${new URLSearchParams(given)}` : "";
}

// Reads a list page by page, up to `most` objects and `mostPages` pages: a page may be empty, and not be the last one.
// `next` returns the path of the page after a cursor.
export async function pages(next, most, signal, mostPages = 100) {
  const found = [];
  let after = "";
  for (let number = 0; number < mostPages; number++) {
    const page = await get(next(after), signal);
    found.push(...page.data);
    after = page.last_id;
    if (!page.has_more || !after) return { data: found, more: false, page };
    if (found.length >= most) return { data: found, more: true, page };
  }
  return { data: found, more: true };
}

// Yields the JSON values of a server-sent event stream.
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
