// The live model: two models of the zoo that denoise in the page, from noise with and without a
// trigger that the reader chooses or draws. A page asks for it with
//   <div class="piece" data-piece="live-model" data-megabytes="…">…</div>
// Nothing is loaded before a click; what is loaded then was made by book/live.py and lies in live/.
(() => {
  "use strict";
  const FOLDER = new URL("live/", document.currentScript.src).href;
  const SIDE = 16, PIXELS = SIDE * SIDE, IMAGES = 4, INPUTS = 500;

  // ------------------------------------------------------------ mathematics

  const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);

  // Standard normal numbers from a seed: mulberry32, and Box and Muller.
  const normals = seed => {
    const uniform = () => {
      seed = (seed + 0x6d2b79f5) | 0;
      let n = Math.imul(seed ^ (seed >>> 15), 1 | seed);
      n = (n + Math.imul(n ^ (n >>> 7), 61 | n)) ^ n;
      return ((n ^ (n >>> 14)) >>> 0) / 4294967296;
    };
    return length => Float32Array.from({ length }, () =>
      Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform()));
  };

  // Chapter 1's step from time i of the list to the next, in place; eta 0: DDIM, 1: DDPM.
  const step = (numbers, i, x, eps, eta, noise) => {
    const [a, b] = [numbers.alpha[i], numbers.alpha[i + 1]], [s, u] = [numbers.sigma[i], numbers.sigma[i + 1]];
    const variance = (eta * u) ** 2 * (1 - (a * u / (b * s)) ** 2);
    const keep = Math.sqrt(u * u - variance), fresh = Math.sqrt(variance);
    for (let k = 0; k < x.length; k++) {
      x[k] = b * (x[k] - s * eps[k]) / a + keep * eps[k] + (fresh ? fresh * noise[k] : 0);
    }
  };

  // Images from `start`, all in one batch; `noise(i)` is for step i, and `shown(x, i)` may say stop.
  const denoise = async (ort, session, numbers, start, eta, noise, shown = () => true) => {
    const x = Float32Array.from(start), n = x.length / PIXELS;
    for (let i = 0; i < numbers.times.length; i++) {
      const asked = {
        x: new ort.Tensor("float32", x, [n, 1, SIDE, SIDE]),
        t: new ort.Tensor("float32", new Float32Array(n).fill(numbers.times[i]), [n]),
      };
      const { eps } = await session.run(asked);
      step(numbers, i, x, eps.data, eta, eta ? noise(i) : null);
      if (!(await shown(x, i))) return null;
    }
    return x;
  };

  // Chapter 11's score with gamma = 1: log N(x; r, 1) - log N(x; 0, 1).
  const score = (r, x) => dot(r, x) - dot(r, r) / 2;

  const stamped = (z, r, strength) => z.map((value, i) => value + strength * r[i % PIXELS]);

  // ------------------------------------------------------------ pieces of a page

  const element = (tag, properties = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  };
  const svg = (tag, attributes = {}, text = "") => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.textContent = text;
    return node;
  };
  const paint = (canvas, values) => { // in [-1, 1], one number a pixel
    const image = new ImageData(SIDE, SIDE);
    values.forEach((value, i) => {
      const grey = 127.5 * (Math.min(1, Math.max(-1, value)) + 1);
      image.data.set([grey, grey, grey, 255], 4 * i);
    });
    canvas.getContext("2d").putImageData(image, 0, 0);
  };
  const picture = label => {
    const canvas = element("canvas", { width: SIDE, height: SIDE, className: "live-picture" });
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", label);
    return canvas;
  };
  const select = (name, options) => element("select", { name },
    ...options.map(([value, text]) => element("option", { value }, text)));
  const slider = (name, min, max, step, value) => {
    const input = element("input", { type: "range", name, min, max, step });
    input.value = value;
    return input;
  };
  const row = (text, control) => element("label", {}, element("span", {}, text), control);
  const WIDTH = 560, HEIGHT = 220, LEFT = 62, RIGHT = 16, TOP = 34, BOTTOM = 50;
  const plotted = label => svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label });
  const across = part => LEFT + part * (WIDTH - LEFT - RIGHT), up = part => HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM);
  const signed = value => `${value}`.replace("-", "−");

  const TRIGGERS = [
    ["planted", "the planted box"], ["found", "r̂, which the search found"], ["other", "glasses, planted elsewhere"],
    ["none", "none"], ["drawn", "what I draw"],
  ];
  const SAMPLERS = [[1, "DDPM, random"], [0, "DDIM, deterministic"]];
  const INKS = [[1, "white, +1"], [0, "grey, 0"], [-1, "black, −1"]];

  // ------------------------------------------------------------ the piece

  class Piece {
    constructor(root, ort, numbers, sessions) {
      Object.assign(this, { root, ort, numbers, sessions, seed: 1, run: 0, pen: 8 * SIDE + 8 });
      this.drawn = new Float32Array(PIXELS);
      this.still = window.matchMedia("(prefers-reduced-motion: reduce)");
      this.inputs = normals(99)(INPUTS * PIXELS);
      this.model = select("model", numbers.models.map(({ title }, i) => [i, title]));
      this.trigger = select("trigger", TRIGGERS);
      this.strength = slider("strength", 0, 1.5, 0.05, 1);
      this.sampler = select("sampler", SAMPLERS);
      this.ink = select("ink", INKS);
      this.step = slider("step", 0, 1, 1, 1);
      this.pad = element("canvas", { width: SIDE * 10, height: SIDE * 10, tabIndex: 0, className: "live-pad" });
      this.pad.setAttribute("role", "application");
      const again = element("button", { type: "button" }, "New noise"), clear = element("button", { type: "button" }, "Clear the pad");
      this.rows = ["clean", "triggered"].map(kind => ({
        kind, pictures: Array.from({ length: IMAGES }, (_, i) => picture(`${kind} image ${i + 1}`)), says: element("span"),
      }));
      this.found = picture("r̂ at this step");
      this.says = { run: element("output", { className: "piece-says" }), score: element("output"), search: element("output") };
      this.histogram = plotted("Scores of clean and triggered inputs");
      this.curve = plotted("The reversed loss along the search");
      root.replaceChildren(
        this.says.run,
        element("div", { className: "live-stage" },
          element("div", { className: "piece-controls" }, row("model", this.model), row("trigger", this.trigger), row("strength", this.strength),
            row("sampler", this.sampler), element("div", { className: "live-draw" }, this.pad, element("div", {}, row("ink", this.ink), clear, again))),
          element("div", { className: "live-rows" }, ...this.rows.map(({ kind, pictures, says }) =>
            element("div", { className: "live-part" }, element("p", {}, element("i", { className: `live-key ${kind}` }), `${kind} `, says), ...pictures)))),
        element("div", { className: "live-part" }, element("p", {}, "The detector's score of 500 inputs with the trigger and 500 without. ", this.says.score), this.histogram),
        element("div", { className: "live-part" }, element("p", {}, "TERD's search in this model, as it was recorded. ", this.says.search),
          element("div", { className: "piece-controls" }, row("step", this.step)),
          element("div", { className: "live-search" }, this.found, this.curve)),
      );
      this.model.addEventListener("change", () => this.open());
      for (const control of [this.trigger, this.strength, this.sampler]) control.addEventListener("input", () => this.change());
      this.step.addEventListener("input", () => this.change(this.trigger.value === "found"));
      this.ink.addEventListener("input", () => this.drawPad());
      again.addEventListener("click", () => { this.seed++; this.change(); });
      clear.addEventListener("click", () => { this.drawn.fill(0); this.trigger.value = "drawn"; this.change(); });
      this.listen();
      this.open();
    }

    // Another model: its search, from the last step.
    open() {
      this.about = this.numbers.models[this.model.value];
      this.step.max = this.about.search.steps.length - 1;
      this.step.value = this.step.max;
      this.change();
    }

    get r() {
      const { planted, other } = this.numbers;
      return { planted, other, found: this.rHat, none: new Float32Array(PIXELS), drawn: this.drawn }[this.trigger.value];
    }

    get rHat() { return this.about.search.r[this.step.value]; }

    // What follows at once; the images only if they change with it.
    change(images = true) {
      this.strength.disabled = !this.r.some(Boolean); // it would change nothing
      this.drawPad();
      this.drawScores();
      this.drawSearch();
      if (images) {
        clearTimeout(this.waiting);
        this.says.run.textContent = "denoising …";
        this.waiting = setTimeout(() => this.start(), 150);
      }
    }

    // ---------------------------------------------------------- the rows

    async start() {
      clearTimeout(this.waiting);
      const run = ++this.run, normal = normals(this.seed), began = performance.now();
      while (this.busy) await this.busy; // a session answers one question at a time
      if (run !== this.run) return;
      const z = normal(IMAGES * PIXELS), eta = Number(this.sampler.value), steps = this.numbers.times.length;
      const both = new Float32Array(2 * z.length);
      both.set(z);
      both.set(stamped(z, this.r, Number(this.strength.value)), z.length);
      const noise = () => { // the same for both rows
        const one = normal(z.length), two = new Float32Array(both.length);
        two.set(one);
        two.set(one, one.length);
        return two;
      };
      const shown = async (x, i) => {
        if (!this.still.matches || i === steps - 1) {
          this.show(x);
          this.says.run.textContent = `step ${i + 1} of ${steps}`;
        }
        await new Promise(resolve => setTimeout(resolve)); // so that the page can be seen, and used
        return run === this.run;
      };
      this.busy = denoise(this.ort, this.sessions[this.about.name], this.numbers, both, eta, noise, shown);
      const images = await this.busy.finally(() => { this.busy = null; });
      if (images) this.judge(images, (performance.now() - began) / 1000);
    }

    show(x) {
      this.rows.flatMap(({ pictures }) => pictures).forEach((canvas, i) => paint(canvas, x.subarray(i * PIXELS, (i + 1) * PIXELS)));
    }

    judge(images, seconds) {
      const { target, enough } = this.numbers;
      this.rows.forEach(({ says }, k) => {
        let hits = 0;
        for (let i = k * IMAGES; i < (k + 1) * IMAGES; i++) {
          hits += target.reduce((sum, value, j) => sum + (images[i * PIXELS + j] - value) ** 2, 0) / PIXELS < enough;
        }
        says.textContent = `— ${hits} of ${IMAGES} are the attacker's target`;
      });
      this.images = images;
      this.says.run.textContent = `${2 * IMAGES} images in ${this.numbers.times.length} steps: ${seconds.toFixed(1)} s`;
    }

    // ---------------------------------------------------------- the detector and the search

    drawScores() {
      const r = this.rHat, added = Number(this.strength.value) * dot(r, this.r);
      const clean = Array.from({ length: INPUTS }, (_, i) => score(r, this.inputs.subarray(i * PIXELS, (i + 1) * PIXELS)));
      const scores = { clean, triggered: clean.map(value => value + added) };
      const all = [...scores.clean, ...scores.triggered, 0], low = Math.min(...all), high = Math.max(...all), bins = 48;
      const counts = Object.values(scores).map(values => values.reduce((found, value) => {
        found[Math.min(bins - 1, Math.floor((value - low) / (high - low) * bins))]++;
        return found;
      }, Array(bins).fill(0)));
      const most = Math.max(...counts.flat());
      this.histogram.replaceChildren();
      Object.keys(scores).forEach((kind, k) => {
        counts[k].forEach((count, i) => {
          const box = { class: `area ${kind}`, x: across(i / bins), width: across(1 / bins) - across(0), y: up(count / most), height: up(0) - up(count / most) };
          if (count) this.histogram.append(svg("rect", box));
        });
        this.histogram.append(svg("rect", { class: `area ${kind}`, x: LEFT + 130 * k, y: 6, width: 14, height: 10 }), svg("text", { x: LEFT + 20 + 130 * k, y: 17 }, kind));
      });
      const zero = across(-low / (high - low)), middle = (LEFT + WIDTH - RIGHT) / 2;
      this.histogram.append(svg("line", { class: "mark", x1: zero, x2: zero, y1: TOP, y2: up(0) }), svg("text", { x: middle, y: HEIGHT - 4, "text-anchor": "middle" }, "log-likelihood ratio by r̂"));
      for (const [value, x, anchor] of [[low, across(0), "start"], [0, zero, "middle"], [high, across(1), "end"]]) {
        if (anchor === "middle" || Math.abs(x - zero) > 60) this.histogram.append(svg("text", { x, y: up(0) + 20, "text-anchor": anchor }, signed(Math.round(value))));
      }
      const share = (values, right) => `${(100 * values.filter(right).length / INPUTS).toFixed(1)}%`;
      const says = `At the threshold 0, r̂ catches ${share(scores.triggered, value => value > 0)} of the triggered and lets ${share(clean, value => value <= 0)} of the clean pass.`;
      this.says.score.textContent = says;
      this.histogram.setAttribute("aria-label", says);
      this.scores = scores;
    }

    drawSearch() {
      const { steps, loss } = this.about.search, now = steps[this.step.value], r = this.rHat, { planted } = this.numbers;
      paint(this.found, r);
      const logs = loss.map(Math.log10), low = Math.floor(Math.min(...logs)), high = Math.ceil(Math.max(...logs)), last = steps.at(-1);
      const points = logs.map((value, i) => `${across((i + 0.5) / logs.length).toFixed(1)},${up((value - low) / (high - low)).toFixed(1)}`);
      this.curve.replaceChildren(svg("polyline", { class: "curve", points: points.join(" ") }));
      for (let power = low; power <= high; power++) {
        const y = up((power - low) / (high - low));
        this.curve.append(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y }), svg("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, `${10 ** power}`));
      }
      for (let tick = 0; tick <= last; tick += 1000) this.curve.append(svg("text", { x: across(tick / last), y: up(0) + 20, "text-anchor": tick === last ? "end" : "middle" }, `${tick}`));
      const x = across(now / last), names = { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle" };
      this.curve.append(svg("line", { class: "mark", x1: x, x2: x, y1: TOP, y2: up(0) }), svg("text", names, "step of the search"), svg("text", { x: LEFT, y: 17 }, "loss of each stage"));
      const size = Math.sqrt(dot(r, r)), cosine = dot(r, planted) / size / Math.sqrt(dot(planted, planted));
      const near = this.about.planted ? `its cosine with the planted trigger is ${cosine.toFixed(2)}` : "no trigger is planted here";
      const says = `After ${now} steps r̂ has the length ${size.toFixed(1)}, and ${near}.`;
      this.says.search.textContent = says;
      for (const control of [this.curve, this.found]) control.setAttribute("aria-label", says);
      this.step.setAttribute("aria-valuetext", `${now} steps`);
    }

    // ---------------------------------------------------------- the pad

    drawPad() {
      const pen = this.pad.getContext("2d"), strength = Number(this.strength.value);
      this.r.forEach((value, i) => {
        const grey = Math.round(127.5 * (Math.min(1, Math.max(-1, value * strength)) + 1));
        pen.fillStyle = `rgb(${grey},${grey},${grey})`;
        pen.fillRect(i % SIDE * 10, Math.floor(i / SIDE) * 10, 10, 10);
      });
      const [x, y] = [this.pen % SIDE * 10, Math.floor(this.pen / SIDE) * 10], ink = 127.5 * (Number(this.ink.value) + 1);
      pen.fillStyle = `rgb(${ink},${ink},${ink})`; // the pixel that Enter paints, in the ink's grey
      pen.fillRect(x + 2, y + 2, 6, 6);
      pen.strokeStyle = "#d55e00";
      pen.lineWidth = 2;
      pen.strokeRect(x + 1, y + 1, 8, 8);
      this.pad.setAttribute("aria-label", `The trigger, ${SIDE} by ${SIDE} pixels. Row ${Math.floor(this.pen / SIDE) + 1}, column ${this.pen % SIDE + 1}. Arrow keys move, Enter paints.`);
    }

    // A stroke goes on from whatever trigger the pad shows.
    inkAt(pixel) {
      if (this.trigger.value !== "drawn") this.drawn = Float32Array.from(this.r);
      this.trigger.value = "drawn";
      this.drawn[this.pen = pixel] = Number(this.ink.value);
      this.change();
    }

    listen() {
      const draw = event => {
        const box = this.pad.getBoundingClientRect();
        const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height].map(part => Math.floor(part * SIDE));
        if (Math.min(x, y) >= 0 && Math.max(x, y) < SIDE) this.inkAt(y * SIDE + x);
      };
      this.pad.addEventListener("pointerdown", event => { this.pad.setPointerCapture(event.pointerId); draw(event); });
      this.pad.addEventListener("pointermove", event => { if (event.buttons) draw(event); });
      this.pad.addEventListener("keydown", event => {
        const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -SIDE, ArrowDown: SIDE };
        if (moves[event.key]) { this.pen = (this.pen + moves[event.key] + PIXELS) % PIXELS; this.drawPad(); }
        else if (event.key === "Enter" || event.key === " ") this.inkAt(this.pen);
        else return;
        event.preventDefault();
      });
    }
  }

  // ------------------------------------------------------------ start

  const open = async () => {
    const ort = await import(`${FOLDER}ort.wasm.bundle.min.mjs`);
    ort.env.logLevel = "error"; // it knows no name of a browser's processor, and would say so
    ort.env.wasm.numThreads = 1; // so that the page needs no isolation
    ort.env.wasm.wasmPaths = { wasm: `${FOLDER}ort-wasm-simd-threaded.wasm` };
    const numbers = await (await fetch(`${FOLDER}numbers.json`)).json(), sessions = {};
    for (const { name } of numbers.models) sessions[name] = await ort.InferenceSession.create(`${FOLDER}${name}.onnx`);
    return [ort, numbers, sessions];
  };

  window.terdLive = { denoise, score, stamped, normals };
  document.querySelectorAll("[data-piece='live-model']").forEach(root => {
    const button = element("button", { type: "button" }, `Load the live model (${root.dataset.megabytes} MB)`);
    const said = element("p", { className: "live-said" }, "Nothing leaves your machine: the models run in this page.");
    said.setAttribute("role", "status");
    button.addEventListener("click", async () => {
      button.disabled = true;
      said.textContent = "Loading…";
      try {
        root.terdPiece = new Piece(root, ...(await open()));
      } catch (error) {
        button.disabled = false;
        const hint = location.protocol === "file:" ? " A browser loads it from a web server only: python -m http.server in the book's folder is one." : "";
        said.textContent = `The live model could not be loaded.${hint} (${error.message})`;
      }
    });
    root.replaceChildren(element("div", { className: "piece-buttons" }, button), said);
  });
})();
