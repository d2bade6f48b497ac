// A chat with one model, or one prompt to several side by side; chats are kept, and each is also shown as code.

import { html, useEffect, useMemo, useRef, useState } from "./vendor/preact-htm.js";
import { gateway, get, pages, query } from "./api.js";
import { PARAMETERS, ask, bodyOf, change, chatOf, isRunning, newChat, removeChat, retry, stop, titleOf, useChats } from "./chats.js";
import { Problem, clock, copy, lasted, say, usePoll } from "./parts.js";
import { go, href, replace } from "./route.js";
import { Code } from "./snippets.js";

const MOST_SIDE_BY_SIDE = 6;
const OFFERED = 100; // maximum number of suggested names

async function names(signal) {
  const fleet = await get("v1/fleet", signal);
  const found = await pages((after) => `v1/adapters${query({ limit: 1000, after })}`, 20_000, signal);
  return [...(fleet.model ? [fleet.model] : []), ...found.data.filter((one) => one.state !== "failed").map((one) => one.name)];
}

// ------------------------------------------------------------ answers

function Calls({ turn, waits, onResults }) {
  const [results, setResults] = useState({});
  return html`<div class="calls">
    ${turn.tool_calls.map((call, place) => html`<div class="turn tool"><code>${call.function.name}(${call.function.arguments})</code>
      ${waits ? html`<label><span>Result of ${call.function.name}</span><input value=${results[place] ?? ""} onInput=${(event) => setResults({ ...results, [place]: event.target.value })} /></label>` : null}</div>`)}
    ${waits ? html`<p class="row end"><button type="button" onClick=${() => onResults(turn.tool_calls.map((call, place) => ({ role: "tool", tool_call_id: call.id, content: results[place] ?? "" })))}>Send results</button></p>` : null}
  </div>`;
}

function figures(turn) {
  if (!turn.finish && turn.first === null) return "waiting";
  const first = turn.first === null ? "" : `first token after ${lasted(turn.first)}, latency ${lasted(turn.took)}`;
  const rate = turn.tokens && turn.took ? `${turn.tokens} tokens, ${((1000 * turn.tokens) / turn.took).toFixed(1)} tokens/s` : "";
  return [first, rate, turn.finish].filter(Boolean).join(", ");
}

function Turn({ turn, last, busy, onRetry, onResults }) {
  if (turn.role !== "assistant") return html`<span class="hidden">${turn.role}:</span><div class=${`turn ${turn.role}`}>${turn.content}</div>`;
  const shown = turn.content || (turn.finish || turn.tool_calls?.length ? "" : "…");
  return html`
    ${shown ? html`<span class="hidden">assistant:</span><div class="turn assistant" aria-busy=${!turn.finish}>${shown}</div>` : null}
    ${turn.tool_calls?.length ? html`<${Calls} turn=${turn} waits=${last && !busy && !turn.error} onResults=${onResults} />` : null}
    <${Problem} error=${turn.error} />
    <div class="row figures"><span class="soft grow">${figures(turn)}</span>
      ${turn.content && turn.finish ? html`<button type="button" class="plain" onClick=${() => copy(turn.content)}>Copy</button>` : null}
      ${last && !busy && (turn.error || ["stopped", "interrupted"].includes(turn.finish)) ? html`<button type="button" onClick=${onRetry}>Retry</button>` : null}</div>`;
}

function Answers({ chat, model, busy }) {
  const turns = chat.turns[model] ?? [];
  return html`<section class="panel" aria-label=${`Answers of ${model}`}>
    <h2>${model}</h2>
    ${turns.map((turn, place) => html`<${Turn} key=${place} turn=${turn} last=${place === turns.length - 1} busy=${busy} onRetry=${() => retry(chat.id, model)} onResults=${(said) => ask(chat.id, said, [model])} />`)}
  </section>`;
}

// ------------------------------------------------------------ models

function Models({ chat, known }) {
  const [typed, setTyped] = useState("");
  const offered = useMemo(() => (known ?? []).filter((name) => name.toLowerCase().includes(typed.toLowerCase())).slice(0, OFFERED), [known, typed]);
  const full = chat.models.length >= MOST_SIDE_BY_SIDE;
  const add = (text) => {
    addModel(chat.id, text);
    setTyped("");
  };
  const input = (event) => (event.inputType === "insertReplacementText" ? add(event.target.value) : setTyped(event.target.value)); // picked from the list
  return html`<form onSubmit=${(event) => { event.preventDefault(); add(typed); }} aria-label="Models">
    <div class="row">
      <label class="grow"><span>Model or adapter (up to ${MOST_SIDE_BY_SIDE} side by side; default: the base model)</span>
        <input id="model" list="models" value=${typed} autocomplete="off" spellcheck=${false} placeholder=${known ? `${known.length} to choose from` : ""} disabled=${full}
          onInput=${input} onChange=${(event) => add(event.target.value)} /></label>
      <datalist id="models">${offered.map((name) => html`<option key=${name} value=${name}></option>`)}</datalist>
      <button disabled=${full}>Add</button>
    </div>
    <div class="chips">${chat.models.map((name) => html`<button type="button" key=${name} aria-label=${`Remove ${name}`} onClick=${() => change(chat.id, { models: chat.models.filter((one) => one !== name) })}>
      ${name}${known && !known.includes(name) && name !== "base" ? html` <span class="soft">(not in the catalogue)</span>` : ""} ✕</button>`)}</div>
  </form>`;
}

function addModel(id, text) {
  const name = text.trim();
  const { models } = chatOf(id);
  if (name && !models.includes(name) && models.length < MOST_SIDE_BY_SIDE) change(id, { models: [...models, name] });
}

// ------------------------------------------------------------ the page

// The chat that the address names, or a new one: with its models and its prompt, if it names these.
function useChat(route, chats) {
  const found = chats.find((one) => one.id === route.id);
  useEffect(() => {
    if (found) return;
    const { model, prompt, endpoint, system } = route.params;
    const given = model || prompt;
    const empty = chats.find((one) => !Object.keys(one.turns).length && !one.draft);
    const chat = given ? newChat({ models: model ? model.split(",").slice(0, MOST_SIDE_BY_SIDE) : [], draft: prompt ?? "", system: system ?? "", mode: endpoint === "text" ? "text" : "chat" })
      : route.id ? null : (chats[0] && Date.now() - chats[0].changed_ms < 86_400_000 ? chats[0] : empty ?? newChat());
    if (chat) replace(href("playground", chat.id));
  }, [route.id, found]);
  return found;
}

export function Playground({ route }) {
  const chats = useChats();
  const chat = useChat(route, chats);
  const known = usePoll(names, 0);
  if (!chat) return route.id ? html`<p>This tab has no chat <code>${route.id}</code>. <a href=${href("playground")}>Start a new one</a>.</p>` : html`<p>Loading…</p>`;
  return html`<${Problem} error=${known.error} /><${Chat} key=${chat.id} chat=${chat} chats=${chats} known=${known.value} />`;
}

function Chat({ chat, chats, known }) {
  const form = useRef(null);
  const busy = isRunning(chat.id);
  const asked = chat.models.length ? chat.models : known?.slice(0, 1) ?? [];
  const set = (more) => change(chat.id, more);
  const shown = [...new Set([...asked, ...Object.keys(chat.turns)])].filter((model) => chat.turns[model]?.length);

  async function submit(event) {
    event.preventDefault();
    addModel(chat.id, document.getElementById("model").value); // what is typed is asked, whether or not it was added
    const models = chat.models.length ? chat.models : asked;
    const prompt = chat.draft;
    if (busy || !prompt.trim() || !models.length) return;
    set({ draft: "" });
    await ask(chat.id, [{ role: "user", content: prompt }], models);
  }

  function press(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.current.requestSubmit();
  }

  const link = `${gateway}/console/${href("playground", "", { model: chat.models.join(","), prompt: chat.draft || titlePrompt(chat), system: chat.system, endpoint: chat.mode === "text" ? "text" : "" })}`;
  return html`
    <section class="panel">
      <div class="row filters">
        <label class="grow"><span>Chat</span><select value=${chat.id} onChange=${(event) => go(href("playground", event.target.value))}>
          ${chats.map((one) => html`<option key=${one.id} value=${one.id}>${titleOf(one)} – ${clock(one.changed_ms)}</option>`)}</select></label>
        <button type="button" onClick=${() => go(href("playground", newChat({ models: [...chat.models], mode: chat.mode, values: { ...chat.values }, system: chat.system, tools: chat.tools }).id))}>New chat</button>
        <button type="button" onClick=${() => copy(link)}>Copy link</button>
        <button type="button" class="danger" onClick=${() => { removeChat(chat.id); go(href("playground")); say("The chat was deleted."); }}>Delete chat</button>
      </div>
      <${Models} chat=${chat} known=${known} />
    </section>
    <div class="answers">${shown.map((model) => html`<${Answers} key=${model} chat=${chat} model=${model} busy=${busy} />`)}</div>
    <form class="panel" ref=${form} onSubmit=${submit} aria-label="Request">
      <label><span>Prompt</span><textarea required value=${chat.draft} onInput=${(event) => set({ draft: event.target.value })} onKeyDown=${press} aria-describedby="keys"></textarea></label>
      <p class="row end">
        <span id="keys" class="soft grow">Enter sends, Shift+Enter starts a new line.</span>
        ${busy ? html`<button key="stop" type="button" class="danger" onClick=${() => stop(chat.id)}>Stop</button>` : html`<button key="ask" class="main" disabled=${!asked.length}>Send</button>`}
      </p>
      <details open=${innerWidth > 700}><summary>Parameters</summary>
        <div class="form">
          <label><span>Endpoint</span><select value=${chat.mode} onChange=${(event) => set({ mode: event.target.value })}><option value="chat">chat completions</option><option value="text">completions</option></select></label>
          ${PARAMETERS.map(([name, words, , step]) => html`<label><span>${words}</span><input type="number" step=${step} min="0" value=${chat.values[name]} onInput=${(event) => set({ values: { ...chat.values, [name]: event.target.value } })} /></label>`)}
        </div>
        ${chat.mode === "chat" ? html`
          <label><span>System prompt</span><input value=${chat.system} onInput=${(event) => set({ system: event.target.value })} /></label>
          <label><span>Tools (a JSON array of tool definitions)</span><textarea class="code" spellcheck=${false} value=${chat.tools} onInput=${(event) => set({ tools: event.target.value })}></textarea></label>` : null}
      </details>
    </form>
    <${Program} chat=${chat} model=${asked[0] ?? "MODEL"} />`;
}

const titlePrompt = (chat) => Object.values(chat.turns)[0]?.find((turn) => turn.role === "user")?.content ?? "";

// The next call if a prompt is typed, else the last one, as code.
function Program({ chat, model }) {
  const turns = [...(chat.turns[model] ?? [])];
  if (chat.draft || !turns.length) turns.push({ role: "user", content: chat.draft || "Hello" });
  else while (turns.at(-1)?.role === "assistant") turns.pop();
  try {
    return html`<${Code} mode=${chat.mode} wanted=${bodyOf(chat, model, turns)} />`;
  } catch (error) {
    return html`<${Problem} error=${error} />`;
  }
}
