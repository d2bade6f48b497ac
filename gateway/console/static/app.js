// The frame: navigation between pages, and the sign-in form where API keys are on.

import { html, render, useEffect, useState } from "./vendor/preact-htm.js";
import { get, key, whenLocked } from "./api.js";
import { Adapters } from "./adapters.js";
import { Keys } from "./keys.js";
import { Overview } from "./overview.js";
import { Confirm, Problem, Said } from "./parts.js";
import { Playground } from "./playground.js";
import { Requests } from "./requests.js";

const PAGES = [
  ["overview", "Overview", Overview],
  ["adapters", "Adapters", Adapters],
  ["requests", "Requests and jobs", Requests],
  ["keys", "Tenants and keys", Keys],
  ["playground", "Playground", Playground],
];

const here = () => location.hash.replace(/^#\/?/, "").split("?")[0] || "overview";

function SignIn({ text, onOpen }) {
  const [value, setValue] = useState("");
  const [error, setError] = useState(null);
  async function enter(event) {
    event.preventDefault();
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
    <form class="panel" onSubmit=${enter}>
      <h1>Lorafleet</h1>
      <p>${text || "This fleet requires API keys."} The console needs a key with the scope <code>admin</code>. It is stored in this tab only, until the tab is closed.</p>
      <${Problem} error=${error} />
      <label><span>API key</span>
        <input type="password" autocomplete="off" spellcheck=${false} required value=${value} onInput=${(event) => setValue(event.target.value)} /></label>
      <p class="row end"><button class="main">Sign in</button></p>
    </form>
  </main>`;
}

function App() {
  const [page, setPage] = useState(here());
  const [locked, setLocked] = useState(null); // null: not known yet
  useEffect(() => {
    const turn = () => setPage(here());
    addEventListener("hashchange", turn);
    whenLocked((text) => setLocked(text || " "));
    get("v1/fleet").then(
      () => setLocked(""),
      (error) => setLocked(error.status === 401 || error.status === 403 ? error.message : ""),
    );
    return () => removeEventListener("hashchange", turn);
  }, []);
  const [name, title, Page] = PAGES.find(([one]) => one === page) ?? PAGES[0];
  useEffect(() => {
    document.title = `${title} · Lorafleet`;
  }, [title]);
  if (locked === null) return html`<main><h1>Lorafleet</h1><p>Connecting …</p></main>`;
  if (locked) return html`<${SignIn} text=${key.get() ? locked : ""} onOpen=${() => setLocked("")} />`;
  return html`
    <a class="skip" href="#content" onClick=${(event) => { event.preventDefault(); document.getElementById("content").focus(); }}>Skip to content</a>
    <header class="top">
      <span class="brand">Lorafleet</span>
      <nav aria-label="Pages">${PAGES.map(([one, words]) => html`<a href=${`#/${one}`} aria-current=${one === name ? "page" : undefined}>${words}</a>`)}</nav>
      ${key.get() ? html`<button type="button" onClick=${() => { key.set(""); setLocked("Signed out."); }}>Sign out</button>` : null}
    </header>
    <main id="content" tabindex="-1"><h1>${title}</h1><${Page} key=${name} /></main>
    <${Confirm} />
    <${Said} />`;
}

render(html`<${App} />`, document.getElementById("app"));
