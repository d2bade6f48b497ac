// Time series charts. uPlot is a plain script that defines one global name.

import { html, useEffect, useRef } from "./vendor/preact-htm.js";
import { clock, date, hour } from "./parts.js";

const HEIGHT = 180;
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const width = (box) => Math.max(200, box.clientWidth);

const utcDay = (seconds) => new Date(1000 * seconds).toISOString().slice(0, 10);

// 12345 -> 12.3k
export function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  const [number, suffix] = size >= 1e9 ? [value / 1e9, "G"] : size >= 1e6 ? [value / 1e6, "M"] : size >= 1e4 ? [value / 1e3, "k"] : [value, ""];
  return `${Number(number.toFixed(Math.abs(number) < 10 && number % 1 ? 2 : Math.abs(number) < 100 ? 1 : 0))}${suffix}`;
}

const said = (value, unit) => (value === null || value === undefined ? "–" : `${short(value)}${unit ? ` ${unit}` : ""}`);

const newest = (values) => values.findLast((value) => value !== null && value !== undefined);

// Values on top of one another: each line's values with those of all lines before.
function stacked(lines) {
  const sums = (lines[0]?.values ?? []).map(() => 0);
  return lines.map((line) => line.values.map((value, place) => (sums[place] += value ?? 0)));
}

// times: unix seconds; lines: [{ label, values }], null where there is no sample; bars: stacked, one for each day of UTC.
export function Lines({ title, times, lines, unit = "", bars = false }) {
  const ref = useRef(null);
  const plot = useRef(null);
  const shown = lines.some((line) => line.values.some((value) => value !== null && value !== undefined));
  const order = bars ? lines.map((_, place) => lines.length - 1 - place) : lines.map((_, place) => place); // the tallest first
  const heights = bars ? stacked(lines) : lines.map((line) => line.values);
  const data = [times, ...order.map((place) => heights[place])];
  const latest = useRef(null);
  latest.current = { data, lines, order };
  const few = lines.every((line) => line.values.filter((value) => value !== null && value !== undefined).length < 3);
  const labels = lines.map((line) => line.label).join("\n");
  useEffect(() => {
    if (!shown) return undefined;
    const box = ref.current;
    function draw() {
      plot.current?.destroy();
      const { data: now, order: places, lines: drawn } = latest.current;
      const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line") } };
      const span = (ticks) => ticks.at(-1) - ticks[0] > 2 * 86_400;
      plot.current = new uPlot(
        {
          width: width(box), height: HEIGHT, cursor: { y: false }, tzDate: bars ? (s) => uPlot.tzDate(new Date(1000 * s), "Etc/UTC") : undefined,
          series: [
            { label: bars ? "Day" : "Time", value: (_, value) => (value === null || value === undefined ? "latest" : bars ? utcDay(value) : clock(1000 * value)) },
            ...places.map((place) => {
              const ink = colour(`--plot-${(place % 8) + 1}`);
              return {
                label: drawn[place].label, stroke: ink, width: bars ? 0 : 2, fill: bars ? ink : undefined, points: { show: few && !bars },
                paths: bars ? uPlot.paths.bars({ size: [0.7, 60] }) : undefined,
                value: (_, __, ___, at) => said(at === undefined || at === null ? newest(latest.current.lines[place]?.values ?? []) : latest.current.lines[place]?.values[at], unit),
              };
            }),
          ],
          axes: [
            { ...axis, values: (_, ticks) => ticks.map((tick) => (bars ? utcDay(tick).slice(5) : span(ticks) ? date(1000 * tick) : hour(1000 * tick))), incrs: bars ? [86_400, 7 * 86_400] : undefined },
            { ...axis, size: 64, values: (_, ticks) => ticks.map(short) },
          ],
          scales: { y: { range: (_, low, high) => [0, Math.max(unit === "%" ? 100 : 1, high || 0) * (unit === "%" ? 1 : 1.1)] }, x: bars ? { range: (_, low, high) => [low - 43_200, high + 43_200] } : {} },
        },
        now, box,
      );
    }
    draw();
    const watch = new ResizeObserver(() => plot.current.setSize({ width: width(box), height: HEIGHT }));
    watch.observe(box);
    addEventListener("themechange", draw);
    return () => {
      watch.disconnect();
      removeEventListener("themechange", draw);
      plot.current.destroy();
      plot.current = null;
    };
  }, [shown, labels, unit, bars, few]);
  useEffect(() => plot.current?.setData(data));
  const last = lines.map((line) => `${line.label} ${said(newest(line.values), unit)}`);
  return html`<div>
    <h2>${title}${unit ? html` <span class="soft">(${unit})</span>` : ""}</h2>
    ${shown
      ? html`<div ref=${ref} class="plot" role="img" aria-label=${`${title}, latest values: ${last.join(", ")}`}></div>`
      : html`<p class="empty">No data in this range yet.</p>`}
  </div>`;
}
