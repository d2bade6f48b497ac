// What this browser remembers besides the key: the theme and the playground's chats. Signing out deletes the chats.

const PREFIX = "lorafleet.";

export function recall(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

// Returns whether it was stored: a browser may have no room, or forbid it.
export function remember(name, value) {
  try {
    if (value === null) localStorage.removeItem(PREFIX + name);
    else localStorage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
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
