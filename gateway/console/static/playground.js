// A chat with one model, or one prompt to several models side by side; and the same call as code.

import { html, useMemo, useRef, useState } from "./vendor/preact-htm.js";
import { events, gateway, get, key, pages, query, send } from "./api.js";
import { Problem, copy, lasted, usePoll } from "./parts.js";

const MOST_SIDE_BY_SIDE = 6;
const OFFERED = 100; // maximum number of suggested names

const PARAMETERS = [
  ["max_tokens", "Max tokens", 256, 1], ["temperature", "Temperature", 0.7, "any"], ["top_p", "top_p", 1, "any"], ["seed", "Seed (empty: random)", "", 1],
];

function body(model, mode, turns, values) {
  const given = Object.fromEntries(PARAMETERS.map(([name]) => [name, values[name]]).filter(([, value]) => value !== "").map(([name, value]) => [name, Number(value)]));
  if (mode === "text") return { model, prompt: turns.at(-1).content, ...given };
  const system = values.system ? [{ role: "system", content: values.system }] : [];
  return { model, messages: [...system, ...turns], ...given };
}

const route = (mode) => (mode === "text" ? "v1/completions" : "v1/chat/completions");

// ------------------------------------------------------------ code snippets

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

export function curl(mode, wanted) {
  const door = key.get() ? ` \\\n  -H "Authorization: Bearer $LORAFLEET_KEY"` : "";
  return `curl ${gateway}/${route(mode)} \\\n  -H 'Content-Type: application/json'${door} \\\n  -d ${quoted(JSON.stringify(wanted))}`;
}

const literal = (value) => JSON.stringify(value, null, 4).replaceAll("\n", "\n    ");

export function python(mode, wanted) {
  const call = mode === "text" ? "client.completions.create" : "client.chat.completions.create";
  const said = mode === "text" ? "answer.choices[0].text" : "answer.choices[0].message.content";
  const rows = Object.entries(wanted).map(([name, value]) => `    ${name}=${literal(value)},`).join("\n");
  const secret = key.get() ? 'os.environ["LORAFLEET_KEY"]' : '"none"';
  return `${key.get() ? "import os\n\n" : ""}from openai import OpenAI\n\nclient = OpenAI(base_url="${gateway}/v1", api_key=${secret})\nanswer = ${call}(\n${rows}\n)\nprint(${said})`;
}

function Program({ mode, wanted }) {
  const [open, setOpen] = useState("curl");
  const text = open === "curl" ? curl(mode, wanted) : python(mode, wanted);
  return html`<section class="panel">
    <div class="row"><h2 class="grow">Code</h2>
      ${["curl", "Python"].map((name) => html`<button type="button" aria-pressed=${name === open ? "true" : "false"} onClick=${() => setOpen(name)}>${name}</button>`)}
      <button type="button" onClick=${() => copy(text)}>Copy</button></div>
    <pre tabindex="0" aria-label=${`Code: ${open}`}>${text}</pre>
  </section>`;
}

// ------------------------------------------------------------ answers

// Streams an answer; `show` gets the answer so far.
async function stream(model, mode, turns, values, signal, show) {
  const began = performance.now();
  let text = "";
  let first = null;
  const end = { tokens: null, finish: "" };
  const answer = await send(route(mode), { method: "POST", signal, body: { ...body(model, mode, turns, values), stream: true, stream_options: { include_usage: true } } });
  for await (const event of events(answer)) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices?.[0];
    const gained = (mode === "text" ? choice?.text : choice?.delta?.content) ?? "";
    if (gained && first === null) first = performance.now() - began;
    text += gained;
    if (choice?.finish_reason) end.finish = choice.finish_reason;
    if (event.usage) end.tokens = event.usage.completion_tokens;
    show({ ...end, text, first, took: performance.now() - began });
  }
}

function Answer({ model, turns, now, error }) {
  return html`<section class="panel" aria-label=${`Answers of ${model}`}>
    <h2>${model}</h2>
    ${turns.map((turn) => html`<div class=${`turn ${turn.role}`}><span class="hidden">${turn.role}: </span>${turn.content}</div>`)}
    ${now && (now.text || !now.finish) ? html`<div class="turn assistant" aria-busy=${!now.finish}>${now.text || "…"}</div>` : null}
    ${now ? html`
      <p class="soft">${now.first === null ? "waiting" : `first token after ${lasted(now.first)}, latency ${lasted(now.took)}`}${now.tokens ? `, ${now.tokens} tokens, ${((1000 * now.tokens) / now.took).toFixed(1)} tokens/s` : ""}${now.finish ? `, ${now.finish}` : ""}</p>` : null}
    <${Problem} error=${error} />
  </section>`;
}

// ------------------------------------------------------------ the page

async function names(signal) {
  const fleet = await get("v1/fleet", signal);
  const found = await pages((after) => `v1/adapters${query({ limit: 1000, after })}`, 20_000, signal);
  return [...(fleet.model ? [fleet.model] : []), ...found.data.filter((one) => one.state !== "failed").map((one) => one.name)];
}

export function Playground() {
  const known = usePoll(names, 0);
  const [models, setModels] = useState([]);
  const [typed, setTyped] = useState("");
  const [mode, setMode] = useState("chat");
  const [prompt, setPrompt] = useState("");
  const [values, setValues] = useState({ ...Object.fromEntries(PARAMETERS.map(([name, , value]) => [name, value])), system: "" });
  const [past, setPast] = useState({}); // model -> turns
  const [now, setNow] = useState({}); // model -> the streaming answer
  const [errors, setErrors] = useState({});
  const running = useRef(null);
  const [busy, setBusy] = useState(false);
  const offered = useMemo(() => (known.value ?? []).filter((name) => name.toLowerCase().includes(typed.toLowerCase())).slice(0, OFFERED), [known.value, typed]);
  const asked = models.length ? models : known.value?.slice(0, 1) ?? [];
  const turnsOf = (model) => (mode === "chat" ? past[model] ?? [] : []);

  function add(event) {
    event.preventDefault();
    const name = typed.trim();
    if (name && !models.includes(name) && models.length < MOST_SIDE_BY_SIDE) setModels([...models, name]);
    setTyped("");
  }

  async function ask(event) {
    event.preventDefault();
    const abort = new AbortController();
    running.current = abort;
    setBusy(true);
    setErrors({});
    const said = { role: "user", content: prompt };
    await Promise.all(asked.map(async (model) => {
      const turns = [...turnsOf(model), said];
      let last = { text: "", first: null, took: 0, tokens: null, finish: "" };
      setPast((all) => ({ ...all, [model]: turns }));
      setNow((all) => ({ ...all, [model]: last }));
      try {
        await stream(model, mode, turns, values, abort.signal, (seen) => {
          last = seen;
          setNow((all) => ({ ...all, [model]: seen }));
        });
      } catch (error) {
        if (error.name !== "AbortError") setErrors((all) => ({ ...all, [model]: error }));
        last = { ...last, finish: "stopped" };
        setNow((all) => ({ ...all, [model]: last }));
      }
      if (mode === "chat" && asked.length === 1 && last.text) {
        setPast((all) => ({ ...all, [model]: [...turns, { role: "assistant", content: last.text }] }));
        setNow((all) => ({ ...all, [model]: { ...last, text: "" } }));
      }
    }));
    setBusy(false);
  }

  const wanted = body(asked[0] ?? "MODEL", mode, [...turnsOf(asked[0]), { role: "user", content: prompt || "Hello" }], values);
  return html`
    <${Problem} error=${known.error} />
    <form class="panel" onSubmit=${add} aria-label="Models">
      <div class="row">
        <label class="grow"><span>Model or adapter (up to ${MOST_SIDE_BY_SIDE} side by side; default: the base model)</span>
          <input list="models" value=${typed} autocomplete="off" spellcheck=${false} onInput=${(event) => setTyped(event.target.value)} /></label>
        <datalist id="models">${offered.map((name) => html`<option key=${name} value=${name}></option>`)}</datalist>
        <button disabled=${models.length >= MOST_SIDE_BY_SIDE}>Add</button>
      </div>
      <div class="chips">${models.map((name) => html`<button type="button" key=${name} aria-label=${`Remove ${name}`} onClick=${() => setModels(models.filter((one) => one !== name))}>${name} ✕</button>`)}</div>
    </form>
    <form class="panel" onSubmit=${ask} aria-label="Request">
      <div class="form">
        <label><span>Endpoint</span><select value=${mode} onChange=${(event) => setMode(event.target.value)}><option value="chat">chat completions</option><option value="text">completions</option></select></label>
        ${PARAMETERS.map(([name, words, , step]) => html`<label><span>${words}</span><input type="number" step=${step} min="0" value=${values[name]} onInput=${(event) => setValues({ ...values, [name]: event.target.value })} /></label>`)}
      </div>
      ${mode === "chat" ? html`<label><span>System prompt</span><input value=${values.system} onInput=${(event) => setValues({ ...values, system: event.target.value })} /></label>` : null}
      <label><span>Prompt</span><textarea required value=${prompt} onInput=${(event) => setPrompt(event.target.value)}></textarea></label>
      <p class="row end">
        <button type="button" disabled=${busy} onClick=${() => { setPast({}); setNow({}); setErrors({}); }}>New chat</button>
        ${busy ? html`<button key="stop" type="button" class="danger" onClick=${() => running.current?.abort()}>Stop</button>` : html`<button key="ask" class="main" disabled=${!asked.length}>Send</button>`}
      </p>
    </form>
    <div class="answers">${asked.filter((model) => past[model] || now[model]).map((model) => html`<${Answer} key=${model} model=${model} turns=${past[model] ?? []} now=${now[model]?.text || (busy && now[model]) || now[model]?.finish ? now[model] : null} error=${errors[model]} />`)}</div>
    <${Program} mode=${mode} wanted=${wanted} />`;
}
