// What this browser remembers besides the key: the theme, and in the tab alone, as the key, the playground's chats.

const PREFIX = "lorafleet.";
const storage = (name) => (name === "theme" ? localStorage : sessionStorage); // throws where the browser forbids it

export function recall(name, otherwise) {
  try {
    return JSON.parse(storage(name).getItem(PREFIX + name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

// Returns whether it was stored: a browser may have no room, or forbid it.
export function remember(name, value) {
  try {
    if (value === null) storage(name).removeItem(PREFIX + name);
    else storage(name).setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

// Earlier releases kept chats for all tabs and keys.
try {
  localStorage.removeItem(`${PREFIX}chats`);
} catch {
  // There is nothing to delete where the browser forbids storage.
}

// ------------------------------------------------------------ theme

const dark = matchMedia("(prefers-color-scheme: dark)");
export const THEMES = ["system", "light", "dark"];
export const theme = () => (THEMES.includes(recall("theme", "")) ? recall("theme", "") : "system");

function paint() {
  document.documentElement.dataset.theme = theme() === "system" ? (dark.matches ? "dark" : "light") : theme();
  dispatchEvent(new Event("themechange"));
}

export function setTheme(name) {
  remember("theme", name === "system" ? null : name);
  paint();
}

dark.addEventListener("change", paint);
paint();
