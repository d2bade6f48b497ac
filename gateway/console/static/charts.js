// Time series charts. uPlot is a plain script that defines one global name.

import { html, useEffect, useRef } from "./vendor/preact-htm.js";

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// times: unix seconds; lines: [{ label, values }], null where there is no sample.
export function Lines({ title, times, lines, unit }) {
  const ref = useRef(null);
  const plot = useRef(null);
  const data = [times, ...lines.map((line) => line.values)];
  useEffect(() => {
    const box = ref.current;
    const dark = matchMedia("(prefers-color-scheme: dark)");
    function draw() {
      plot.current?.destroy();
      const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line") } };
      plot.current = new uPlot(
        {
          width: Math.max(200, box.clientWidth), height: 170, cursor: { y: false },
          series: [{}, ...lines.map((line, place) => ({
            label: line.label, stroke: colour(`--plot-${place + 1}`), width: 2, points: { show: false }, spanGaps: true,
            value: (_, value) => (value === null || value === undefined ? "–" : `${value.toFixed(1)} ${unit}`),
          }))],
          axes: [axis, { ...axis, size: 60 }],
          scales: { y: { range: (_, low, high) => [0, Math.max(1, high || 0) * 1.1] } },
        },
        plot.current?.data ?? data, box,
      );
    }
    draw();
    const watch = new ResizeObserver(() => plot.current.setSize({ width: Math.max(200, box.clientWidth), height: 170 }));
    watch.observe(box);
    dark.addEventListener("change", draw);
    return () => {
      watch.disconnect();
      dark.removeEventListener("change", draw);
      plot.current.destroy();
    };
  }, []);
  useEffect(() => plot.current?.setData(data));
  const last = lines.map((line) => `${line.label} ${line.values.at(-1) === null || line.values.length === 0 ? "no data" : `${line.values.at(-1).toFixed(1)} ${unit}`}`);
  return html`<div>
    <h2>${title}</h2>
    <div ref=${ref} class="plot" role="img" aria-label=${`${title}: ${last.join(", ")} now`}></div>
  </div>`;
}
