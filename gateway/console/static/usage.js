// Usage per day, by tenant, model or adapter: a chart, a table and a file for spreadsheets.

import { html } from "./vendor/preact-htm.js";
import { download, get, query } from "./api.js";
import { Lines } from "./charts.js";
import { Act, Cut, Stale, Table, count, usePoll } from "./parts.js";
import { href, replace } from "./route.js";

const DAYS = [1, 7, 31];
const GROUPS = [["project_id", "Tenant"], ["model", "Model"], ["adapter", "Adapter (digest)"]];
const METRICS = [["num_model_requests", "Requests"], ["input_tokens", "Input tokens"], ["output_tokens", "Output tokens"]];
const SHOWN = 7; // groups with a colour of their own

const DAY_S = 86_400;
const dayOf = (seconds) => new Date(1000 * seconds).toISOString().slice(0, 10);
const chosen = (value, options, otherwise) => (options.some(([name]) => name === value) ? value : otherwise);

// Lines of a chart: the busiest groups, and the sum of all others.
export function series(buckets, by, metric) {
  const totals = new Map();
  for (const bucket of buckets) for (const one of bucket.results) totals.set(one[by] ?? "", (totals.get(one[by] ?? "") ?? 0) + one[metric]);
  const names = [...totals.keys()].filter((name) => totals.get(name)).sort((a, b) => totals.get(b) - totals.get(a));
  const shown = names.slice(0, SHOWN);
  const sum = (bucket, takes) => bucket.results.filter((one) => takes(one[by] ?? "")).reduce((all, one) => all + one[metric], 0);
  const lines = shown.map((name) => ({ name, values: buckets.map((bucket) => sum(bucket, (one) => one === name)) }));
  if (names.length > SHOWN) lines.push({ name: "others", values: buckets.map((bucket) => sum(bucket, (one) => !shown.includes(one))) });
  return lines;
}

export function Usage({ route }) {
  const by = chosen(route.params.by, GROUPS, "project_id");
  const metric = chosen(route.params.metric, METRICS, "output_tokens");
  const days = DAYS.includes(Number(route.params.days)) ? Number(route.params.days) : 7;
  const asked = () => ({ start_time: Math.floor(Date.now() / 1000) - (days - 1) * DAY_S, limit: 31, group_by: by });
  const poll = usePoll((signal) => get(`v1/usage${query(asked())}`, signal), 30_000, [by, days]);
  const { value } = poll;
  const set = (more) => replace(href("usage", "", { by, metric, days, ...more }));
  const labelOf = (name) => (name ? (by === "adapter" ? name.slice(0, 12) : name) : by === "adapter" ? "base model" : "–");
  const buckets = value?.data ?? [];
  const rows = buckets.flatMap((bucket) => bucket.results.map((one) => ({ ...one, day: dayOf(bucket.start_time) }))).reverse();
  const unit = METRICS.find(([name]) => name === metric)[1];
  const choice = (name, words, now, options) => html`<label><span>${words}</span><select value=${now} onChange=${(event) => set({ [name]: event.target.value })}>${options.map(([one, text]) => html`<option value=${one}>${text}</option>`)}</select></label>`;
  const columns = [
    { title: "Day (UTC)", of: (one) => one.day },
    { title: GROUPS.find(([name]) => name === by)[1], of: (one) => html`<${Cut} text=${by === "adapter" ? one[by] || "base model" : one[by] || "–"} />` },
    { title: "Requests", kind: "num", of: (one) => count(one.num_model_requests) },
    { title: "Input tokens", kind: "num", of: (one) => count(one.input_tokens) },
    { title: "Cached input tokens", kind: "num", of: (one) => count(one.input_cached_tokens) },
    { title: "Output tokens", kind: "num", of: (one) => count(one.output_tokens) },
    ...(by === "adapter" ? [{ title: "Pool residency (s)", kind: "num", of: (one) => (one.adapter_seconds === null ? "–" : count(Math.round(one.adapter_seconds))) }] : []),
  ];
  return html`<section class="panel">
    <div class="row filters">
      ${choice("by", "Group by", by, GROUPS)}${choice("metric", "Metric", metric, METRICS)}${choice("days", "Days", days, DAYS.map((num) => [num, num]))}
      <span class="grow"></span>
      <${Act} does=${() => download(`v1/usage${query({ ...asked(), format: "csv" })}`, `usage-by-${by.replace("_id", "")}.csv`)} done="The CSV file was downloaded.">Export CSV<//>
    </div>
    <${Stale} poll=${poll} />
    ${value ? html`
      <${Lines} title=${`${unit} per day (UTC)`} bars=${true} times=${buckets.map((bucket) => bucket.start_time)} lines=${series(buckets, by, metric).map((line) => ({ label: line.name === "others" ? "others" : labelOf(line.name), values: line.values }))} />
      <${Table} name="Usage" columns=${columns} rows=${rows} id=${(one) => `${one.day} ${one[by]}`} empty="No usage in this period." />` : html`<p>Loading…</p>`}
  </section>`;
}
