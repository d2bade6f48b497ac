// The address of what is shown: #/PAGE/ID?FILTERS. Everything that can be opened has one.

import { useEffect, useState } from "./vendor/preact-htm.js";

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function here() {
  const [path, search] = location.hash.replace(/^#\/?/, "").split("?");
  const slash = path.indexOf("/");
  const page = slash < 0 ? path : path.slice(0, slash);
  return { page: decoded(page) || "overview", id: slash < 0 ? "" : decoded(path.slice(slash + 1)), params: Object.fromEntries(new URLSearchParams(search)) };
}

// Returns the address of a page, or of one object on it; empty parameters are left out.
export function href(page, id = "", params = {}) {
  const given = Object.entries(params).filter(([, value]) => value !== "" && value !== undefined && value !== null);
  return `#/${page}${id ? `/${encodeURIComponent(id)}` : ""}${given.length ? `?${new URLSearchParams(given)}` : ""}`;
}

const shown = new Set();
const turn = () => shown.forEach((show) => show(here()));
addEventListener("hashchange", turn);

export function go(address) {
  if (location.hash !== address) location.hash = address;
}

// Goes from an object to its list, unless the address has become another meanwhile.
export function leave({ page, id }, params = {}) {
  const now = here();
  if (now.page === page && now.id === id) go(href(page, "", params));
}

// Changes the address without a step in the browser's history, as filters do.
export function replace(address) {
  history.replaceState(null, "", address);
  turn();
}

export function useRoute() {
  const [route, setRoute] = useState(here());
  useEffect(() => {
    shown.add(setRoute);
    setRoute(here());
    return () => shown.delete(setRoute);
  }, []);
  return route;
}
