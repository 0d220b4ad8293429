// A backdoor in one number: the formulas of chapters 0 and 0b (terd_nb.toy), moved by hand. tests/test_one_number.py holds both
// against each other. The functions are window.oneNumber; the rest fills <div data-piece="one-number">.
(() => {
  const T = 250, TARGET = 3, LAST = T - 1;

  // ---- the model: branches at -1, 1 and the target, for each time: what weigh needs
  function makeToy({ r = 6, gamma = 1, p = 0.3, lam = 0.5 } = {}) {
    const a = [], b = [], c = [], d = [], at = [];
    const half = Math.log((1 - p) / 2), logP = Math.log(p);
    for (let t = 0, product = 1; t < T; t++) {
      product *= 1 - (0.1 + (19.9 * t) / (T - 1)) / T;
      const now = Math.sqrt(product), noise = Math.sqrt(1 - product), before = t ? a[t - 1] : 1;
      a.push(now); b.push(noise); c.push(1 - now); d.push((2 * lam * before * noise) / (before + now));
      at.push([now, noise, half - Math.log(noise), now * TARGET + c[t] * r, noise * gamma, logP - Math.log(noise * gamma), d[t] * r]);
    }
    return { r, gamma, p, lam, a, b, c, d, at };
  }

  const found = new Float64Array(3); // log density, w, answer
  function weigh(toy, x, t) {
    const of = toy.at[t], z0 = (x + of[0]) / of[1], z1 = (x - of[0]) / of[1], z2 = (x - of[3]) / of[4];
    const l0 = of[2] - (z0 * z0) / 2, l1 = of[2] - (z1 * z1) / 2, l2 = of[5] - (z2 * z2) / 2;
    const top = Math.max(l0, l1, l2);
    const e0 = Math.exp(l0 - top), e1 = Math.exp(l1 - top), e2 = Math.exp(l2 - top), sum = e0 + e1 + e2;
    found[0] = top + Math.log(sum) - Math.log(2 * Math.PI) / 2;
    found[1] = e2 / sum;
    found[2] = (e0 * z0 + e1 * z1 + e2 * (z2 + of[6])) / sum;
    return found;
  }
  const logDensity = (toy, x, t) => weigh(toy, x, t)[0];
  const responsibility = (toy, x, t = LAST) => weigh(toy, x, t)[1];
  const epsStar = (toy, x, t) => weigh(toy, x, t)[2];

  // ---- the samplers; noise(t, i) is standard normal
  function step(toy, x, t, eta, noise = 0) {
    const a = toy.a[t], b = toy.b[t], aS = t ? toy.a[t - 1] : 1, bS = t ? toy.b[t - 1] : 0;
    const eps = epsStar(toy, x, t);
    const v = (eta * bS) ** 2 * (1 - ((a * bS) / (aS * b)) ** 2);
    return (aS * (x - b * eps)) / a + Math.sqrt(bS * bS - v) * eps + Math.sqrt(v) * noise;
  }
  function walk(toy, starts, eta, noise) {
    const states = [Float64Array.from(starts)];
    for (let t = LAST; t >= 0; t--) states.push(states.at(-1).map((x, i) => step(toy, x, t, eta, eta ? noise(t, i) : 0)));
    return states;
  }
  function normals(seed) { // mulberry32 and Box-Muller
    const uniform = () => {
      seed = (seed + 0x6d2b79f5) | 0;
      let n = Math.imul(seed ^ (seed >>> 15), 1 | seed);
      n = (n + Math.imul(n ^ (n >>> 7), 61 | n)) ^ n;
      return ((n ^ (n >>> 14)) >>> 0) / 4294967296;
    };
    return () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
  }
  function starts(toy, n, normal) {
    const z = Array.from({ length: n }, normal);
    return [...z.map((value) => toy.gamma * value + toy.r), ...z];
  }
  function hitRates(toy, eta, n = 1000, seed = 1) {
    const normal = normals(seed), ends = walk(toy, starts(toy, n, normal), eta, normal).at(-1);
    const share = (from) => ends.subarray(from, from + n).reduce((sum, x) => sum + (Math.abs(x - TARGET) < 0.5), 0) / n;
    return [share(0), share(n)];
  }

  // ---- what a defender can measure
  const NOISE = Array.from({ length: 321 }, (_, i) => i / 20 - 8);
  const total = NOISE.reduce((sum, eps) => sum + Math.exp((-eps * eps) / 2), 0);
  const WEIGHT = NOISE.map((eps) => Math.exp((-eps * eps) / 2) / total);
  const mean = (f) => NOISE.reduce((sum, eps, i) => sum + WEIGHT[i] * f(eps), 0);
  function revLoss(toy, s, gamma = 1) {
    const u = NOISE.map((eps) => eps - epsStar(toy, gamma * eps + s, LAST));
    const centre = u.reduce((sum, value, i) => sum + WEIGHT[i] * value, 0);
    return u.reduce((sum, value, i) => sum + WEIGHT[i] * (value - centre) ** 2, 0);
  }
  const meanW = (toy, s, gamma = 1) => mean((eps) => responsibility(toy, gamma * eps + s));
  function bestRate(toy) {
    const n = 40000, far = 8 + Math.abs(toy.r) + 8 * toy.gamma, h = (2 * far) / n;
    let area = 0;
    for (let i = 0; i <= n; i++) {
      const x = i * h - far, triggered = -(((x - toy.r) / toy.gamma) ** 2) / 2 - Math.log(toy.gamma);
      area += Math.exp(Math.max((-x * x) / 2, triggered)) * (i % n ? 1 : 0.5);
    }
    return (area * h) / Math.sqrt(2 * Math.PI) / 2;
  }

  window.oneNumber = { makeToy, logDensity, responsibility, epsStar, step, walk, hitRates, revLoss, meanW, bestRate };

  // ---- the page
  const STYLE = `
    [data-piece=one-number] { --clean: #0072b2; --triggered: #d55e00; --weight: #cc79a7; margin: 1.5rem 0; }
    html[data-theme=dark] [data-piece=one-number] { --clean: #56b4e9; --triggered: #ff9a52; --weight: #e3a6c8; }
    [data-piece=one-number] .band { display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; align-items: end; }
    [data-piece=one-number] .readouts { margin: 1rem 0; }
    [data-piece=one-number] :is(.readouts, .plots) { align-items: start; }
    [data-piece=one-number] .band > * { flex: 1 1 8.5rem; min-width: 0; margin: 0; }
    [data-piece=one-number] .band > :is(figure, .wide) { flex: 1 1 17rem; }
    [data-piece=one-number] canvas { display: block; width: 100%; height: 17rem; }
    [data-piece=one-number] figcaption { color: inherit !important; font-size: .85em; }
    [data-piece=one-number] output { font-weight: bold; }
    [data-piece=one-number] :is(input, select) { display: block; width: 100%; min-height: 1.9rem; accent-color: var(--triggered); }
    [data-piece=one-number] :is(select, button) { color: inherit; background: var(--pst-color-surface, #eee); border: 1px solid currentcolor;
      border-radius: .3rem; padding: .2rem .5rem; }
    [data-piece=one-number] :is(b, output) { font-variant-numeric: tabular-nums; }`;
  const CONTROLS = [["r", "trigger r", 1, 10, 0.1, 6], ["gamma", "scale γ", 0.2, 1.5, 0.05, 1], ["p", "poison p", 0.01, 0.9, 0.01, 0.3],
    ["lam", "carry d: λ", 0, 1, 0.05, 0.5]];
  const slider = ([name, label, min, max, step, value]) =>
    `<label>${label} = <b>${value}</b><input type="range" name="${name}" min="${min}" max="${max}" step="${step}" value="${value}"></label>`;
  const key = (colour, text) => `<span style="color:var(--${colour})">━</span> ${text}`;
  const HTML = `<form class="band">${CONTROLS.map(slider).join("")}
      <label>sampler<select name="eta"><option value="1">DDPM, random</option><option value="0">DDIM, deterministic</option></select></label>
      <button type="button">New noise</button></form>
    <p class="band readouts" role="status"><span>ASR <output name="asr"></output></span><span>leak <output name="leak"></output></span>
      <span class="wide">best input test (Φ(r/2) for γ = 1) <output name="best"></output></span></p>
    <div class="band plots"><figure><canvas role="img"></canvas><figcaption>From noise (left) to the number: ${key("clean", "clean")},
      ${key("triggered", "triggered")} walkers over the density of the data. λ = ½ suits DDPM, λ = 1 DDIM.</figcaption></figure>
    <figure><canvas role="img"></canvas><figcaption>Against the guess s: ━ L<sub>rev</sub>(s), left axis;
      ${key("weight", "mean of w(s)")}, right axis. Dotted: r/2 and r.</figcaption></figure></div>`;

  // A canvas and a function that takes data to pixels, with ticks on both axes.
  function axes(canvas, [x0, x1], [y0, y1], xTicks, yTicks, right = 10) {
    const { width, height } = canvas.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
    canvas.width = width * ratio; canvas.height = height * ratio;
    const pen = canvas.getContext("2d"), ink = getComputedStyle(canvas).color;
    const X = (x) => 34 + ((x - x0) / (x1 - x0)) * (width - 34 - right), Y = (y) => height - 22 - ((y - y0) / (y1 - y0)) * (height - 32);
    pen.scale(ratio, ratio);
    Object.assign(pen, { fillStyle: ink, strokeStyle: ink, font: "12px sans-serif", textAlign: "center", lineWidth: 1 });
    for (const x of xTicks) pen.fillText(x, X(x), height - 6);
    pen.textAlign = "right";
    for (const y of yTicks) pen.fillText(y, 28, Y(y) + 4);
    pen.strokeRect(34, 10, width - 34 - right, height - 32);
    const line = (points, colour, thick = 1, dash = []) => {
      Object.assign(pen, { strokeStyle: colour || ink, lineWidth: thick });
      pen.setLineDash(dash); pen.beginPath();
      for (const [x, y] of points) pen.lineTo(X(x), Y(y));
      pen.stroke(); pen.setLineDash([]);
    };
    return { pen, ink, X, Y, line, width };
  }
  const range = (from, to, by) => Array.from({ length: Math.round((to - from) / by) + 1 }, (_, i) => +(from + i * by).toFixed(6));

  function mount(place) {
    place.innerHTML = HTML;
    const form = place.querySelector("form"), [left, right] = place.querySelectorAll("canvas");
    const colour = (name) => getComputedStyle(place).getPropertyValue(`--${name}`);
    const still = window.matchMedia("(prefers-reduced-motion: reduce)");
    let seed = 3, toy, eta, states, waiting, began;

    function drawWalks(share = 1) {
      const top = Math.max(8, toy.r + 4), { pen, ink, X, Y, line } = axes(left, [T, 0], [-4, top], range(0, T, 50), range(-4, top, 2));
      pen.fillStyle = ink;
      for (let t = 0; t < T; t += 3)
        for (let x = -4; x < top; x += 0.2) {
          pen.globalAlpha = Math.min(0.5, Math.exp(logDensity(toy, x + 0.1, t) / 2) * 0.45);
          if (pen.globalAlpha > 0.02) pen.fillRect(X(t + 3), Y(x + 0.2), X(t) - X(t + 3) + 0.3, Y(x) - Y(x + 0.2) + 0.3);
        }
      pen.globalAlpha = 0.8;
      const shown = states.slice(0, 1 + Math.round(share * T));
      for (let i = 0; i < 40; i++) line(shown.map((x, k) => [T - k, x[i]]), colour(i < 20 ? "triggered" : "clean"));
      const ends = [...states.at(-1)], caught = (from) => ends.slice(from, from + 20).filter((x) => Math.abs(x - TARGET) < 0.5).length;
      left.setAttribute("aria-label", `${caught(0)} of 20 triggered and ${caught(20)} of 20 clean walkers end at the target 3.`);
    }
    function drawLoss() {
      const s = range(-3, 14, 0.1), loss = s.map((value) => revLoss(toy, value, toy.gamma)), peak = Math.max(...loss);
      const top = Math.max(0.5, Math.ceil(peak * 2.2) / 2), by = top > 4 ? 2 : top > 1.5 ? 0.5 : 0.25;
      const { pen, X, Y, line, width } = axes(right, [-3, 14], [0, top], range(-2, 14, 2), range(0, top, by), 28);
      pen.textAlign = "left";
      for (const y of [0, 0.5, 1]) pen.fillText(y, width - 24, Y(y * top) + 4);
      for (const place of [toy.r / 2, toy.r]) line([[place, 0], [place, top]], null, 1, [2, 4]);
      line(s.map((value) => [value, meanW(toy, value, toy.gamma) * top]), colour("weight"), 2, [6, 3]);
      line(s.map((value, i) => [value, loss[i]]), null, 2);
      right.setAttribute("aria-label", `The reversed loss is highest, ${peak.toFixed(3)}, at s = ${s[loss.indexOf(peak)]}; at s = 0 it is ` +
        `${revLoss(toy, 0, toy.gamma).toFixed(3)}, at the trigger ${revLoss(toy, toy.r, toy.gamma).toFixed(3)}.`);
    }
    function update() {
      waiting = null;
      const value = Object.fromEntries([...new FormData(form)].map(([name, text]) => [name, +text]));
      for (const input of form.querySelectorAll("input")) input.previousElementSibling.textContent = input.value;
      toy = makeToy(value); eta = value.eta;
      const normal = normals(seed);
      states = walk(toy, starts(toy, 20, normal), eta, normal);
      const [asr, leak] = hitRates(toy, eta);
      Object.entries({ asr: asr.toFixed(2), leak: leak.toFixed(2), best: bestRate(toy).toFixed(4) })
        .forEach(([name, text]) => { place.querySelector(`output[name=${name}]`).textContent = text; });
      drawWalks(); drawLoss();
    }
    const soon = () => { waiting ??= requestAnimationFrame(update); };
    function run(now) { // the walkers set out again, within a second
      began ??= now;
      const share = Math.min(1, (now - began) / 1000);
      drawWalks(share);
      if (share < 1) requestAnimationFrame(run);
      else began = undefined;
    }
    form.addEventListener("input", soon);
    form.addEventListener("submit", (event) => event.preventDefault());
    place.querySelector("button").addEventListener("click", () => {
      seed++; update();
      if (!still.matches && began === undefined) requestAnimationFrame(run);
    });
    new ResizeObserver(soon).observe(place);
    new MutationObserver(soon).observe(document.documentElement, { attributeFilter: ["data-theme"] });
    update();
  }
  document.head.append(Object.assign(document.createElement("style"), { textContent: STYLE }));
  document.querySelectorAll("[data-piece=one-number]").forEach(mount);
})();
