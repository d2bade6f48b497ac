// The frame: navigation between pages, and the sign-in form where API keys are on.

import { html, render, useEffect, useState } from "./vendor/preact-htm.js";
import { get, key, whenLocked } from "./api.js";
import { Adapters } from "./adapters.js";
import { Batches } from "./batches.js";
import { forgetChats } from "./chats.js";
import { Jobs } from "./jobs.js";
import { Keys } from "./keys.js";
import { Letters } from "./letters.js";
import { Overview } from "./overview.js";
import { Confirm, Problem, Said, setPaused, usePaused } from "./parts.js";
import { Playground } from "./playground.js";
import { Requests } from "./requests.js";
import { href, useRoute } from "./route.js";
import { THEMES, setTheme, theme } from "./store.js";
import { Usage } from "./usage.js";

// Address, title, component.
const PAGES = [
  ["overview", "Overview", Overview],
  ["adapters", "Adapters", Adapters],
  ["requests", "Requests", Requests],
  ["jobs", "Jobs", Jobs],
  ["batches", "Batches", Batches],
  ["dead-letters", "Dead letters", Letters],
  ["usage", "Usage", Usage],
  ["keys", "Tenants and keys", Keys],
  ["playground", "Playground", Playground],
];

const NEEDED = "This fleet requires API keys.";

const Unknown = ({ route }) => html`<p>There is no page <code>${route.page}</code>. <a href=${href("overview")}>Go to the overview</a>.</p>`;

function SignIn({ text, onOpen }) {
  const [value, setValue] = useState("");
  const [error, setError] = useState(null);
  async function enter(event) {
    event.preventDefault();
    if (value.trim() !== key.get()) forgetChats(); // they are another key's
    key.set(value.trim());
    try {
      await get("v1/fleet");
      onOpen();
    } catch (refused) {
      key.set("");
      setError(refused);
    }
  }
  return html`<main>
    <form class="panel narrow" onSubmit=${enter}>
      <h1>Lorafleet</h1>
      <p>${text} The console needs a key with the scope <code>admin</code>. It is stored in this tab only, until the tab is closed.</p>
      <${Problem} error=${error} />
      <label><span>API key</span>
        <input type="password" autocomplete="off" spellcheck=${false} required value=${value} onInput=${(event) => setValue(event.target.value)} /></label>
      <p class="row end"><button class="main">Sign in</button></p>
    </form>
  </main>`;
}

function Controls({ onLeave }) {
  const paused = usePaused();
  const [look, setLook] = useState(theme());
  return html`<div class="row controls">
    <button type="button" title="Live refresh of all pages" aria-pressed=${paused ? "true" : "false"} onClick=${() => setPaused(!paused)}>${paused ? "Resume" : "Pause"}</button>
    <label><span class="hidden">Theme</span><select value=${look} onChange=${(event) => { setTheme(event.target.value); setLook(event.target.value); }}>
      ${THEMES.map((name) => html`<option value=${name}>${name === "system" ? "Auto" : name === "light" ? "Light" : "Dark"}</option>`)}</select></label>
    ${key.get() ? html`<button type="button" onClick=${onLeave}>Sign out</button>` : null}
  </div>`;
}

function App() {
  const route = useRoute();
  const [locked, setLocked] = useState(null); // null: not known yet; "": signed in; else why not
  useEffect(() => {
    whenLocked((text) => setLocked((now) => now || (key.get() ? text : NEEDED)));
    get("v1/fleet").then(
      () => setLocked(""),
      (error) => setLocked((now) => now || (error.status === 401 || error.status === 403 ? (key.get() ? error.message : NEEDED) : "")),
    );
  }, []);
  const [name, title, Page] = PAGES.find(([one]) => one === route.page) ?? ["", "Page not found", Unknown];
  useEffect(() => {
    document.title = `${route.id || title} · Lorafleet`;
  }, [title, route.id]);
  if (locked === null) return html`<main><h1>Lorafleet</h1><p>Connecting…</p></main>`;
  if (locked) return html`<${SignIn} text=${locked} onOpen=${() => setLocked("")} />`;
  return html`
    <a class="skip" href="#content" onClick=${(event) => { event.preventDefault(); document.getElementById("content").focus(); }}>Skip to content</a>
    <header class="top">
      <a class="brand" href=${href("overview")}>Lorafleet</a>
      <nav aria-label="Pages">${PAGES.map(([one, words]) => html`<a href=${href(one)} aria-current=${one === name ? "page" : undefined}>${words}</a>`)}</nav>
      <${Controls} onLeave=${() => { key.set(""); forgetChats(); setLocked("Signed out."); }} />
    </header>
    <main id="content" tabindex="-1"><h1>${title}</h1><${Page} key=${name} route=${route} /></main>
    <${Confirm} />
    <${Said} />`;
}

render(html`<${App} />`, document.getElementById("app"));
