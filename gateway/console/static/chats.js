// The playground's chats: kept in this tab, answered whichever page is shown, and deleted by signing out or in.

import { useEffect, useState } from "./vendor/preact-htm.js";
import { events, send } from "./api.js";
import { route } from "./snippets.js";
import { recall, remember } from "./store.js";

const MOST_CHATS = 50;
const MOST_CHARACTERS = 2_000_000; // of all chats, as they are stored
const SAVE_MS = 500;

export const PARAMETERS = [
  ["max_tokens", "Max tokens", 256, 1], ["temperature", "Temperature", 0.7, "any"], ["top_p", "Top p", 1, "any"], ["seed", "Seed (empty: random)", "", 1],
];

// A chat: { id, changed_ms, mode, models, values, system, tools, draft, turns }, where `turns` has a list for each model.
// A turn: { role, content, tool_calls?, tool_call_id? }, of an answer also { first, took, tokens, finish, error }.
const areTexts = (...values) => values.every((value) => typeof value === "string");
const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const isCall = (call) => areTexts(call?.id, call?.function?.name, call?.function?.arguments);
const isTurn = (turn) => areTexts(turn?.role, turn?.content) && (turn.tool_calls === undefined || (Array.isArray(turn.tool_calls) && turn.tool_calls.every(isCall)));
const isChat = (chat) =>
  areTexts(chat?.id, chat?.mode, chat?.system, chat?.tools, chat?.draft) && Array.isArray(chat.models) && areTexts(...chat.models) && isObject(chat.values) &&
  isObject(chat.turns) && Object.values(chat.turns).every((turns) => Array.isArray(turns) && turns.every(isTurn));

const recalled = recall("chats", []);
let chats = Array.isArray(recalled) ? recalled.filter(isChat) : []; // another release may have kept another shape
for (const chat of chats) for (const turns of Object.values(chat.turns)) for (const turn of turns) if (turn.role === "assistant" && !turn.finish) turn.finish = "interrupted";

const running = new Map(); // chat's id -> what stops its answers
const shown = new Set();
let saving = 0;

function save() {
  clearTimeout(saving);
  saving = 0;
  while (chats.length > MOST_CHATS || (chats.length > 1 && JSON.stringify(chats).length > MOST_CHARACTERS)) chats = chats.slice(0, -1);
  while (!remember("chats", chats.length ? chats : null) && chats.length > 1) chats = chats.slice(0, -1);
}

function changed() {
  saving ||= setTimeout(save, SAVE_MS);
  for (const show of shown) show({});
}

addEventListener("pagehide", () => saving && save());

export function useChats() {
  const [, setSeen] = useState({});
  useEffect(() => {
    shown.add(setSeen);
    return () => shown.delete(setSeen);
  }, []);
  return chats;
}

export const chatOf = (id) => chats.find((one) => one.id === id);
export const isRunning = (id) => running.has(id);
export const stop = (id) => running.get(id)?.abort();

export function newChat(more = {}) {
  const values = Object.fromEntries(PARAMETERS.map(([name, , value]) => [name, value]));
  const chat = { id: Date.now().toString(36) + Math.random().toString(36).slice(2, 6), changed_ms: Date.now(), mode: "chat", models: [], system: "", tools: "", draft: "", turns: {}, values, ...more };
  chats = [chat, ...chats];
  changed();
  return chat;
}

export function change(id, more) {
  Object.assign(chatOf(id) ?? {}, more);
  changed();
}

export function removeChat(id) {
  stop(id);
  chats = chats.filter((one) => one.id !== id);
  changed();
}

export function forgetChats() {
  for (const id of [...running.keys()]) stop(id);
  chats = [];
  save();
  changed();
}

export const titleOf = (chat) => Object.values(chat.turns)[0]?.find((turn) => turn.role === "user")?.content.slice(0, 60) || "New chat";

// ------------------------------------------------------------ requests

function plain({ role, content, tool_calls, tool_call_id }) {
  return { role, content, ...(tool_calls?.length ? { tool_calls } : {}), ...(tool_call_id ? { tool_call_id } : {}) };
}

// The messages of a chat. What was asked and failed, or was never answered, is left out but for its end.
export function messagesOf(turns) {
  const found = [];
  let pending = [];
  for (const turn of turns) {
    if (turn.role !== "assistant") {
      pending.push(plain(turn));
      continue;
    }
    if (!turn.error && (turn.content || turn.tool_calls?.length)) found.push(...pending, plain(turn));
    pending = [];
  }
  return [...found, ...pending];
}

// Throws for tools that are no JSON array.
function toolsOf(text) {
  if (!text.trim()) return null;
  let tools;
  try {
    tools = JSON.parse(text);
  } catch (error) {
    throw new Error(`Tools: ${error.message}`);
  }
  if (!Array.isArray(tools)) throw new Error("Tools: expected a JSON array of tool definitions");
  return tools;
}

export function bodyOf(chat, model, turns) {
  const given = Object.fromEntries(PARAMETERS.map(([name]) => [name, chat.values[name]]).filter(([, value]) => value !== "").map(([name, value]) => [name, Number(value)]));
  if (chat.mode === "text") return { model, prompt: turns.findLast((turn) => turn.role === "user")?.content ?? "", ...given };
  const tools = toolsOf(chat.tools);
  return { model, messages: [...(chat.system ? [{ role: "system", content: chat.system }] : []), ...messagesOf(turns)], ...given, ...(tools ? { tools } : {}) };
}

// Adds a piece of a streamed tool call to those that have begun.
function addCall(calls, piece) {
  const call = (calls[piece.index] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
  if (piece.id) call.id = piece.id;
  if (piece.function?.name) call.function.name = piece.function.name;
  call.function.arguments += piece.function?.arguments ?? "";
}

async function answer(chat, model, turn, body, signal) {
  const began = performance.now();
  const reply = await send(route(chat.mode), { method: "POST", signal, body: { ...body, stream: true, stream_options: { include_usage: true } } });
  for await (const event of events(reply)) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices?.[0];
    const gained = (chat.mode === "text" ? choice?.text : choice?.delta?.content) ?? "";
    const pieces = choice?.delta?.tool_calls ?? [];
    if ((gained || pieces.length) && turn.first === null) turn.first = performance.now() - began;
    turn.content += gained;
    for (const piece of pieces) addCall((turn.tool_calls ??= []), piece);
    if (choice?.finish_reason) turn.finish = choice.finish_reason;
    if (event.usage) turn.tokens = event.usage.completion_tokens;
    turn.took = performance.now() - began;
    changed();
  }
}

// Asks models for the next turn of a chat, after `said`: turns of the user or of tools. Errors are kept with the answers.
export async function ask(id, said, models) {
  const chat = chatOf(id);
  const abort = new AbortController();
  running.set(id, abort);
  Object.assign(chat, { changed_ms: Date.now() });
  chats = [chat, ...chats.filter((one) => one !== chat)];
  await Promise.all(models.map(async (model) => {
    const turns = (chat.turns[model] ??= []);
    turns.push(...said.map((one) => ({ ...one })));
    const turn = { role: "assistant", content: "", first: null, took: 0, tokens: null, finish: "", error: null };
    try {
      const body = bodyOf(chat, model, turns);
      turns.push(turn);
      changed();
      await answer(chat, model, turn, body, abort.signal);
      turn.finish ||= "stop";
    } catch (error) {
      if (!turns.includes(turn)) turns.push(turn);
      if (error.name === "AbortError") turn.finish = "stopped";
      else Object.assign(turn, { finish: "error", error: { message: error.message, code: error.code } });
    }
  }));
  running.delete(id);
  changed();
}

// Asks again what failed or was stopped at the end of a chat with a model.
export function retry(id, model) {
  const turns = chatOf(id).turns[model];
  const last = turns.findLastIndex((turn, place) => turn.role === "assistant" && place < turns.length - 1);
  const said = turns.slice(last + 1, -1);
  turns.splice(last + 1);
  return ask(id, said, [model]);
}
