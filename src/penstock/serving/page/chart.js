// Lines over time, and bars of phases, in SVG.

const SVG = "http://www.w3.org/2000/svg";
const [HEIGHT, LEFT, BOTTOM] = [120, 48, 18];

export const shape = (tag, attributes, text) => {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
};

// The least of 1, 2, 5, 10, 20, ... that is no less.
const round = (value) => {
  const unit = 10 ** Math.floor(Math.log10(Math.max(value, 1)));
  return [1, 2, 5, 10].find((step) => step * unit >= value) * unit;
};

// series: lists of {at, value}, times in seconds; those of the last `span` seconds are drawn, and gaps stay open.
export function lines(svg, series, now, span, top) {
  const width = svg.clientWidth || 900;
  const most = top ?? round(Math.max(1, ...series.flat().map((point) => point.value)));
  const x = (at) => LEFT + ((at - now + span) / span) * (width - LEFT - 8);
  const y = (value) => HEIGHT - BOTTOM - (value / most) * (HEIGHT - BOTTOM - 10);
  const drawn = [];
  for (const share of [0, 0.5, 1]) {
    const height = y(most * share);
    drawn.push(shape("line", { class: "grid", x1: LEFT, x2: width - 8, y1: height, y2: height }));
    drawn.push(shape("text", { x: LEFT - 6, y: height + 4, "text-anchor": "end" }, `${most * share}`));
  }
  for (let back = 0; back <= span; back += 60) {
    const text = back ? `-${back / 60} min` : "now";
    drawn.push(shape("text", { x: x(now - back), y: HEIGHT - 3, "text-anchor": back ? "middle" : "end" }, text));
  }
  series.forEach((points, index) => {
    const path = points
      .filter((point) => point.at > now - span)
      .map((point, i, all) => `${i && point.at - all[i - 1].at < 5 ? "L" : "M"}${x(point.at).toFixed(1)} ${y(point.value).toFixed(1)}`);
    drawn.push(shape("path", { class: `line k${index}`, d: path.join("") || "M0 0" }));
  });
  svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  svg.replaceChildren(...drawn);
}

// What each step was made of, the latest at the right; the last `most` of them fill the width.
export function stacks(svg, steps, most, chosen) {
  const width = svg.clientWidth || 900;
  const kinds = ["prompt", "decode", "again"];
  const top = round(Math.max(1, ...steps.map((step) => step.prompt + step.decode + step.again)));
  const one = (width - LEFT - 8) / most;
  const high = (value) => (value / top) * (HEIGHT - BOTTOM - 10);
  const drawn = [];
  for (const share of [0, 0.5, 1]) {
    const y = HEIGHT - BOTTOM - high(top * share);
    drawn.push(shape("line", { class: "grid", x1: LEFT, x2: width - 8, y1: y, y2: y }));
    drawn.push(shape("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, `${top * share}`));
  }
  steps.forEach((step, i) => {
    const x = width - 8 - (steps.length - i) * one;
    let y = HEIGHT - BOTTOM;
    const bar = shape("g", { "data-step": step.number });
    bar.append(shape("rect", { class: step.number === chosen ? "chosen" : "hit", x, y: 10, width: one, height: y - 10 }));
    for (const kind of kinds) {
      const height = high(step[kind]);
      y -= height;
      if (height) bar.append(shape("rect", { class: kind, x, y, width: Math.max(1, one - 1), height }));
    }
    drawn.push(bar);
  });
  if (steps.length) drawn.push(shape("text", { x: width - 8, y: HEIGHT - 3, "text-anchor": "end" }, `step ${steps.at(-1).number}`));
  svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  svg.replaceChildren(...drawn);
}

// phases: seconds by name, in order.
export function bar(phases) {
  const total = Object.values(phases).reduce((sum, seconds) => sum + seconds, 0) || 1;
  const told = Object.entries(phases).map(([name, seconds]) => `${name} ${seconds.toFixed(3)} s`).join(", ");
  const svg = shape("svg", { viewBox: "0 0 1000 26", preserveAspectRatio: "none", role: "img", "aria-label": told });
  let from = 0;
  for (const [name, seconds] of Object.entries(phases)) {
    const width = (1000 * seconds) / total;
    svg.append(shape("rect", { class: name, x: from, y: 0, width, height: 26 }));
    from += width;
  }
  return svg;
}

export function swatch(name) {
  const svg = shape("svg", { class: "swatch", viewBox: "0 0 10 10", "aria-hidden": "true" });
  svg.append(shape("rect", { class: name, width: 10, height: 10 }));
  return svg;
}
