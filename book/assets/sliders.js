// The controls of chapters 1, 4, 6 and 11, in closed form. A page asks for one with
//   <div class="piece" data-piece="sliders" data-figure="alpha">…</div>
// right below the still figure, whose place it takes. The same figure moves in Jupyter with Python.
(() => {
  "use strict";

  // ------------------------------------------------------------ mathematics

  // Phi, by the series of erf, whose terms are all positive; beyond 8 it is 0 or 1 to 1e-15.
  const cdf = x => {
    if (Math.abs(x) > 8) return x > 0 ? 1 : 0;
    let term = x, sum = x;
    for (let n = 1; Math.abs(term) > 1e-17 * Math.abs(sum) && n < 400; n++) sum += term *= x * x / (2 * n + 1);
    return 0.5 + sum * Math.exp(-x * x / 2) / Math.sqrt(2 * Math.PI);
  };
  const pdf = (x, mean, sd) => Math.exp(-(((x - mean) / sd) ** 2) / 2) / (sd * Math.sqrt(2 * Math.PI));
  const range = (low, high, n) => Array.from({ length: n }, (_, i) => low + (high - low) * i / (n - 1));
  const percent = value => `${(100 * value).toFixed(1)}%`;

  // Chapter 1: alpha of the linear schedule whose last beta is given.
  const alpha = ({ beta_end }) => {
    let product = 1;
    const curve = range(1e-4, beta_end, 1000).map(beta => Math.sqrt(product *= 1 - beta));
    return { curve, half: curve.filter(a => a > 0.5).length, end: curve[999] };
  };

  // Chapter 4: the length of a part of the box, 7 of 16 pixels at 0 on a ground of -1.
  const strength = ({ strength }) => ({ length: strength * Math.sqrt(16 ** 2 - 7 ** 2) });

  // Chapter 6: two normal scores of means -s and s and variance 2s, and a threshold.
  const rates = ({ length, threshold }) => {
    const s = length ** 2 / 2;
    return { s, tpr: cdf((s - threshold) / length), tnr: cdf((threshold + s) / length) };
  };

  // Chapter 11: the detector of r + e, with e across r, on noises with and without r.
  const detector = ({ error }) => {
    const square = 16 ** 2 - 7 ** 2;
    const sd = Math.sqrt(square * (1 + error ** 2));
    const clean = -(sd ** 2) / 2, triggered = square * (1 - error ** 2) / 2;
    return { sd, clean, triggered, tpr: cdf(triggered / sd), tnr: cdf(-clean / sd) };
  };

  // ------------------------------------------------------------ the figures

  const WIDTH = 560, HEIGHT = 258, LEFT = 44, RIGHT = 24, TOP = 30, BOTTOM = 40;

  const bells = (plot, low, high, sd, means) => {
    const x = range(low, high, 300);
    const top = Math.max(...Object.values(means).map(mean => pdf(mean, mean, sd)));
    Object.entries(means).forEach(([name, mean]) =>
      plot.area(x, x.map(v => pdf(v, mean, sd) / top), name));
  };

  const figures = {
    alpha: {
      x: [0, 1000], y: [0, 1], label: "time t", ylabel: "α", values: alpha,
      controls: { beta_end: { label: "last β", min: 0.005, max: 0.05, step: 0.005, value: 0.02, digits: 3 } },
      draw(plot, { curve, half, end }) {
        plot.line(range(0, 999, 1000), curve);
        plot.mark(half);
        return `α falls below ½ at t = ${half} and ends at ${end.toExponential(1)}`;
      },
    },
    strength: {
      x: [-4, 19], y: [0, 1.08], label: "projection on r", values: strength,
      controls: { strength: { label: "strength", min: 0, max: 1, step: 0.05, value: 0.3, digits: 2 } },
      draw(plot, { length }) {
        bells(plot, -4, 19, 1, { plain: 0, triggered: length });
        return `length of the trigger ${length.toFixed(1)}`;
      },
    },
    rates: {
      x: [-30, 30], y: [0, 1.08], label: "score", values: rates,
      controls: {
        length: { label: "length of the trigger", min: 0.5, max: 6, step: 0.1, value: 3, digits: 1 },
        threshold: { label: "threshold", min: -10, max: 10, step: 0.1, value: 0, digits: 1 },
      },
      draw(plot, { s, tpr, tnr }, { length, threshold }) {
        bells(plot, -30, 30, length, { clean: -s, triggered: s });
        plot.mark(threshold);
        return `TPR ${percent(tpr)}, TNR ${percent(tnr)}`;
      },
    },
    detector: {
      x: [-400, 200], y: [0, 1.08], label: "score", values: detector,
      controls: { error: { label: "error, in lengths of the trigger", min: 0, max: 1.5, step: 0.1, value: 0.8, digits: 1 } },
      draw(plot, { sd, clean, triggered, tpr, tnr }) {
        bells(plot, -400, 200, sd, { clean, triggered });
        plot.mark(0);
        return `TPR ${percent(tpr)}, TNR ${percent(tnr)}`;
      },
    },
  };

  // ------------------------------------------------------------ drawing

  const svg = (tag, attributes = {}, text = "") => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.textContent = text;
    return node;
  };
  const element = (tag, properties = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  };

  class Plot {
    constructor(root, figure) {
      Object.assign(this, { root, figure, names: 0 });
      root.replaceChildren();
      for (const tick of this.ticks(figure.x)) {
        root.append(svg("line", { class: "grid", x1: this.x(tick), x2: this.x(tick), y1: TOP, y2: HEIGHT - BOTTOM }));
        root.append(svg("text", { x: this.x(tick), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, `${tick}`.replace("-", "−")));
      }
      if (figure.ylabel) for (const tick of [0, 0.5, 1]) {
        root.append(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: this.y(tick), y2: this.y(tick) }));
        root.append(svg("text", { x: LEFT - 6, y: this.y(tick) + 4, "text-anchor": "end" }, `${tick}`));
      }
      const middle = (LEFT + WIDTH - RIGHT) / 2;
      root.append(svg("text", { x: middle, y: HEIGHT - 6, "text-anchor": "middle" }, figure.label));
      if (figure.ylabel) root.append(svg("text", { x: 6, y: TOP + 4 }, figure.ylabel));
    }

    ticks([low, high]) {
      const rough = (high - low) / 6, unit = 10 ** Math.floor(Math.log10(rough));
      const step = unit * [1, 2, 5, 10].find(factor => factor * unit >= rough);
      const first = Math.ceil(low / step);
      return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, i) => (first + i) * step);
    }

    x(value) { const [low, high] = this.figure.x; return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / (high - low); }

    y(value) { const [low, high] = this.figure.y; return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low); }

    points(xs, ys) { return xs.map((x, i) => `${this.x(x).toFixed(2)},${this.y(ys[i]).toFixed(2)}`).join(" "); }

    line(xs, ys) { this.root.append(svg("polyline", { class: "curve", points: this.points(xs, ys) })); }

    area(xs, ys, name) {
      const kind = name === "triggered" ? "triggered" : "clean";
      const ends = [`${this.x(xs[0])},${this.y(0)}`, `${this.x(xs.at(-1))},${this.y(0)}`];
      this.root.append(svg("polygon", { class: `area ${kind}`, points: [ends[0], this.points(xs, ys), ends[1]].join(" ") }));
      const x = LEFT + 8 + 110 * this.names++, y = 6;   // above the bells, wherever they go
      this.root.append(svg("rect", { class: `area ${kind}`, x, y, width: 14, height: 10 }));
      this.root.append(svg("text", { x: x + 20, y: y + 10 }, name));
    }

    mark(x) { this.root.append(svg("line", { class: "mark", x1: this.x(x), x2: this.x(x), y1: TOP, y2: HEIGHT - BOTTOM })); }
  }

  const build = piece => {
    const figure = figures[piece.dataset.figure];
    if (!figure || piece.querySelector("svg")) return;
    const root = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
    const said = element("output", { className: "piece-says" });
    const inputs = {}, rows = [];
    for (const [name, { label, digits, value, ...limits }] of Object.entries(figure.controls)) {
      const input = element("input", { type: "range", name, ...limits });
      input.value = value;
      const shown = element("span", { className: "piece-value" });
      inputs[name] = { input, show: () => (shown.textContent = Number(input.value).toFixed(digits)) };
      rows.push(element("label", {}, element("span", {}, label), input, shown));
      input.addEventListener("input", () => redraw());
    }
    const redraw = () => {
      const settings = {};
      for (const [name, { input, show }] of Object.entries(inputs)) {
        settings[name] = Number(input.value);
        show();
      }
      const text = figure.draw(new Plot(root, figure), figure.values(settings), settings);
      said.textContent = text;
      root.setAttribute("aria-label", `${figure.label}: ${text}`);
    };
    redraw();
    piece.replaceChildren(said, root, element("div", { className: "piece-controls" }, ...rows));
    const still = piece.previousElementSibling?.querySelector(".cell_output");
    if (still) still.hidden = true;
  };

  window.terdSliders = Object.fromEntries(Object.entries(figures).map(([name, { values }]) => [name, values]));
  const start = () => document.querySelectorAll("[data-piece='sliders']").forEach(build);
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
