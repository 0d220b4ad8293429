// "Drop the ball": the reversed loss on a plane through a trigger, and two balls that roll on it,
// one down the loss (chapter 9), one by the fixed-point step of chapter 14. A page asks for it with
//   <div class="piece" data-piece="drop-the-ball">…</div>
// Its numbers are measured on the models by book/ball.py, and lie in drop_the_ball_data.js.
(() => {
  "use strict";
  const FOLDER = new URL(".", document.currentScript.src).href;

  // ------------------------------------------------------------ on the plane

  const cdf = x => {
    if (Math.abs(x) > 8) return x > 0 ? 1 : 0;
    let term = x, sum = x;
    for (let n = 1; Math.abs(term) > 1e-17 * Math.abs(sum) && n < 400; n++) sum += term *= x * x / (2 * n + 1);
    return 0.5 + sum * Math.exp(-x * x / 2) / Math.sqrt(2 * Math.PI);
  };

  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

  // A measured quantity at (along, across): bilinear between the nodes, whose rows go across.
  const at = (plane, what, [along, across]) => {
    const last = plane.nodes - 1;
    const place = value => clamp((value / plane.half + 1) / 2 * last, 0, last);
    const x = place(along), y = place(across);
    const j = Math.min(Math.floor(x), last - 1), i = Math.min(Math.floor(y), last - 1);
    const value = (row, column) => plane[what][row * plane.nodes + column];
    const lower = value(i, j) + (x - j) * (value(i, j + 1) - value(i, j));
    const upper = value(i + 1, j) + (x - j) * (value(i + 1, j + 1) - value(i + 1, j));
    return lower + (y - i) * (upper - lower);
  };

  const inside = (plane, point) => point.map(value => clamp(value, -plane.half, plane.half));

  // Down the loss in short steps, halved where one would lead up; ends where none leads down.
  const descend = (plane, start) => {
    const path = [start], reach = plane.half / plane.nodes;
    let here = start, step = plane.half / 60;
    while (step > plane.half / 4000 && path.length < 600) {
      const slope = [0, 1].map(axis => {
        const moved = sign => here.map((value, k) => value + (k === axis ? sign * reach : 0));
        return at(plane, "log_loss", moved(1)) - at(plane, "log_loss", moved(-1));
      });
      const size = Math.hypot(...slope);
      if (size === 0) break;
      const next = inside(plane, here.map((value, k) => value - step * slope[k] / size));
      if (at(plane, "log_loss", next) < at(plane, "log_loss", here) - 1e-9) path.push(here = next);
      else step /= 2;
    }
    return path;
  };

  // s <- rho F(s)/|F(s)|, as far as F lies in the plane; rho is the length where the ball was dropped.
  const STEPS = 6;
  const follow = (plane, start) => {
    const rho = Math.min(Math.hypot(...start), plane.half);
    const path = [start];
    for (let i = 0; i < STEPS && rho > 0; i++) {
      const shift = [at(plane, "shift_u", path[i]), at(plane, "shift_v", path[i])];
      const size = Math.hypot(...shift);
      path.push(size > 0 ? shift.map(value => rho * value / size) : path[i]);
    }
    return path;
  };

  // Rates of the detector that takes this point for the trigger, in closed form (chapter 11).
  const rates = (plane, [along, across]) => {
    const size = Math.hypot(along, across);
    if (size === 0) return null;
    return { tpr: plane.planted ? cdf(along * plane.length / size - size / 2) : null, tnr: cdf(size / 2) };
  };

  const inPlane = (plane, point) => {
    const shift = Math.hypot(at(plane, "shift_u", point), at(plane, "shift_v", point));
    return Math.min(1, shift / Math.max(at(plane, "shift", point), 1e-12));
  };

  // ------------------------------------------------------------ drawing

  const SIZE = 440;
  const MAGMA = [[0, 0, 4], [59, 15, 112], [140, 41, 129], [222, 73, 104], [254, 159, 109], [252, 253, 191]];
  const BALLS = { descent: ["down the loss", "#f5f5f5"], field: ["by the field", "#35d0ba"] };

  const colour = part => {
    const x = clamp(part, 0, 0.9999) * (MAGMA.length - 1), k = Math.floor(x);
    return MAGMA[k].map((value, c) => value + (x - k) * (MAGMA[k + 1][c] - value));
  };
  const element = (tag, properties = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  };

  class Piece {
    constructor(root, data) {
      this.planes = data.planes.map(plane => ({ ...plane, nodes: data.nodes }));
      this.map = element("canvas", { width: SIZE, height: SIZE, tabIndex: 0, className: "ball-map" });
      this.map.setAttribute("role", "application");
      this.choice = element("select", {}, ...this.planes.map((plane, i) => element("option", { value: i }, plane.title)));
      const buttons = {
        "Drop here": () => this.drop(),
        "Drop at TERD's start": () => { this.cross = inside(this.plane, this.plane.start); this.drop(); },
        "Show the field": () => { this.arrows = !this.arrows; this.paint(); },
      };
      this.rows = Object.fromEntries(["here", ...Object.keys(BALLS)].map(name => [name, this.row(name)]));
      const loss = element("span", {}, element("i", {}, "L"), element("sub", {}, "rev"));
      const head = ["", "", loss, "off, in |r|", "TPR", "TNR"];
      this.said = element("output", { className: "piece-says" });
      root.replaceChildren(
        element("div", { className: "piece-controls" }, element("label", {}, element("span", {}, "model"), this.choice)),
        element("div", { className: "piece-buttons" }, ...Object.entries(buttons).map(([text, act]) => element("button", { type: "button", onclick: act }, text))),
        element("div", { className: "ball-stage" }, this.map, element("div", { className: "ball-side" },
          element("table", {}, element("thead", {}, element("tr", {}, ...head.map(title => element(title ? "th" : "td", {}, title)))),
            element("tbody", {}, ...Object.values(this.rows).map(row => row.line))),
          this.said)),
      );
      this.choice.addEventListener("change", () => this.open(Number(this.choice.value)));
      this.map.addEventListener("pointerdown", event => {
        const box = this.map.getBoundingClientRect();
        const part = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
        this.cross = [(2 * part[0] - 1) * this.plane.half, (1 - 2 * part[1]) * this.plane.half];
        this.drop();
      });
      this.map.addEventListener("keydown", event => this.key(event));
      this.arrows = true;
      this.open(0);
    }

    row(name) {
      const picture = element("canvas", { width: 16, height: 16, className: "ball-picture" });
      const [text, shade] = BALLS[name] || ["crosshair", ""];
      const cells = Array.from({ length: 4 }, () => element("td", {}, "–"));
      const dot = element("span", { className: shade ? "ball-dot" : "ball-cross" }, shade ? "" : "+");
      dot.style.background = shade;
      return { picture, cells, line: element("tr", {}, element("td", {}, picture), element("th", { scope: "row" }, dot, text), ...cells) };
    }

    open(index) {
      this.plane = this.planes[index];
      this.cross = this.plane.start.map(value => 0.9 * value);
      this.paths = {};
      this.picture = this.ground();
      cancelAnimationFrame(this.frame);
      for (const name of Object.keys(BALLS)) this.clear(this.rows[name]);
      this.paint();
    }

    key(event) {
      const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
      if (moves[event.key]) {
        const step = this.plane.half / (event.shiftKey ? 8 : 32);
        this.cross = inside(this.plane, this.cross.map((value, k) => value + step * moves[event.key][k]));
        this.paint();
      } else if (event.key === "Enter" || event.key === " ") this.drop();
      else return;
      event.preventDefault();
    }

    drop() {
      cancelAnimationFrame(this.frame);
      this.paths = { descent: descend(this.plane, this.cross), field: follow(this.plane, this.cross) };
      const seconds = matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : 1.6;
      const began = performance.now();
      const roll = now => {
        this.done = seconds ? clamp((now - began) / 1000 / seconds, 0, 1) : 1;
        this.paint();
        if (this.done < 1) this.frame = requestAnimationFrame(roll);
      };
      roll(began);
    }

    // ---------------------------------------------------------- one picture

    pixel([along, across]) {
      return [(along / this.plane.half + 1) / 2 * SIZE, (1 - across / this.plane.half) / 2 * SIZE];
    }

    ground() {
      const image = new ImageData(SIZE, SIZE);
      const [low, high] = [Math.min(...this.plane.log_loss), Math.max(...this.plane.log_loss)];
      for (let y = 0; y < SIZE; y++) for (let x = 0; x < SIZE; x++) {
        const point = [(2 * (x + 0.5) / SIZE - 1) * this.plane.half, (1 - 2 * (y + 0.5) / SIZE) * this.plane.half];
        const rgb = colour((at(this.plane, "log_loss", point) - low) / (high - low));
        image.data.set([...rgb, 255], 4 * (y * SIZE + x));
      }
      return image;
    }

    paint() {
      const pen = this.map.getContext("2d");
      pen.putImageData(this.picture, 0, 0);
      if (this.arrows) this.field(pen);
      this.sign(pen, [0, 0], "0");
      if (this.plane.planted) this.sign(pen, [this.plane.length, 0], "r");
      else this.sign(pen, [this.plane.length, 0], "(r)");
      this.sign(pen, this.plane.start, "start");
      for (const [name, path] of Object.entries(this.paths)) {
        const travelled = this.travelled(path, name);
        this.roll(pen, travelled, BALLS[name][1]);
        this.fill(this.rows[name], travelled.at(-1));
      }
      const [x, y] = this.pixel(this.cross);
      pen.strokeStyle = "#fff";
      pen.lineWidth = 1.5;
      pen.beginPath();
      for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) { pen.moveTo(x + 4 * dx, y + 4 * dy); pen.lineTo(x + 12 * dx, y + 12 * dy); }
      pen.stroke();
      this.fill(this.rows.here, this.cross);
      this.report();
    }

    field(pen) {
      pen.strokeStyle = "rgba(255,255,255,.65)";
      pen.lineWidth = 1;
      const n = 14, most = Math.max(...this.plane.shift);
      for (let i = 0; i < n; i++) for (let j = 0; j < n; j++) {
        const point = [j, i].map(k => (2 * (k + 0.5) / n - 1) * this.plane.half);
        const shift = [at(this.plane, "shift_u", point), at(this.plane, "shift_v", point)];
        const [x, y] = this.pixel(point), scale = 30 / most;
        const [dx, dy] = [scale * shift[0], -scale * shift[1]], size = Math.hypot(dx, dy);
        if (size < 1.5) continue;
        pen.beginPath();
        pen.moveTo(x, y);
        pen.lineTo(x + dx, y + dy);
        for (const turn of [2.6, -2.6]) {
          const angle = Math.atan2(dy, dx) + turn, head = Math.min(5, size / 2);
          pen.moveTo(x + dx, y + dy);
          pen.lineTo(x + dx + head * Math.cos(angle), y + dy + head * Math.sin(angle));
        }
        pen.stroke();
      }
    }

    sign(pen, point, text) {
      const [x, y] = this.pixel(point);
      pen.fillStyle = "#fff";
      pen.strokeStyle = "#000";
      pen.lineWidth = 3;
      pen.beginPath();
      pen.arc(x, y, 3.5, 0, 7);
      pen.stroke();
      pen.fill();
      pen.font = "bold 14px sans-serif";
      pen.strokeText(text, x + 7, y - 6);
      pen.fillText(text, x + 7, y - 6);
    }

    // The part of a path that the ball has covered; the field's ball leaps along arcs around 0.
    travelled(path, name) {
      const place = (this.done ?? 1) * (path.length - 1), k = Math.floor(place);
      const points = path.slice(0, k + 1);
      if (k === path.length - 1) return points;
      const part = place - k, [a, b] = [path[k], path[k + 1]];
      if (name === "descent") return [...points, a.map((value, i) => value + part * (b[i] - value))];
      let turn = Math.atan2(b[1], b[0]) - Math.atan2(a[1], a[0]);
      turn -= 2 * Math.PI * Math.round(turn / (2 * Math.PI));
      const angle = Math.atan2(a[1], a[0]) + part * turn;
      const rho = Math.hypot(...a) + part * (Math.hypot(...b) - Math.hypot(...a));
      return [...points, [rho * Math.cos(angle), rho * Math.sin(angle)]];
    }

    roll(pen, points, shade) {
      pen.strokeStyle = shade;
      pen.lineWidth = 2.5;
      pen.beginPath();
      points.forEach((point, i) => pen[i ? "lineTo" : "moveTo"](...this.pixel(point)));
      pen.stroke();
      pen.fillStyle = shade;
      pen.strokeStyle = "#000";
      pen.lineWidth = 1.5;
      pen.beginPath();
      pen.arc(...this.pixel(points.at(-1)), 8, 0, 7);
      pen.fill();
      pen.stroke();
    }

    fill(row, point) {
      const found = rates(this.plane, point);
      const percent = value => (value === null ? "–" : `${(100 * value).toFixed(1)}%`);
      const off = Math.hypot(point[0] - this.plane.length, point[1]);
      const texts = [
        (10 ** at(this.plane, "log_loss", point)).toPrecision(2),
        this.plane.planted ? (off / this.plane.length).toFixed(2) : "–",
        found ? percent(found.tpr) : "–",
        found ? percent(found.tnr) : "–",
      ];
      row.cells.forEach((cell, i) => { cell.textContent = texts[i]; });
      const image = new ImageData(16, 16);
      this.plane.u.forEach((u, i) => {
        const grey = 127.5 * (clamp(point[0] * u + point[1] * this.plane.v[i], -1, 1) + 1);
        image.data.set([grey, grey, grey, 255], 4 * i);
      });
      row.picture.getContext("2d").putImageData(image, 0, 0);
    }

    clear(row) {
      row.cells.forEach(cell => { cell.textContent = "–"; });
      row.picture.getContext("2d").clearRect(0, 0, 16, 16);
    }

    report() {
      const share = Math.round(100 * inPlane(this.plane, this.cross));
      const gain = at(this.plane, "shift", this.cross) / Math.max(Math.hypot(...this.cross), 1e-9);
      const place = this.cross.map(value => value.toFixed(1)).join(", ");
      this.said.textContent = `At (${place}) the field has the gain ${gain.toFixed(2)}; ${share}% of its length lies in this plane.`;
      this.map.setAttribute("aria-label", `${this.plane.title}. ${this.said.textContent} Arrow keys move the crosshair, Enter drops the balls.`);
    }
  }

  // ------------------------------------------------------------ start

  window.terdBall = { at, descend, follow, rates };
  const build = data => document.querySelectorAll("[data-piece='drop-the-ball']").forEach(root => {
    if (root.querySelector("canvas")) return;
    root.terdPiece = new Piece(root, data);
    const still = root.previousElementSibling?.querySelector(".cell_output");
    if (still) still.hidden = true;
  });
  const script = element("script", { src: `${FOLDER}drop_the_ball_data.js`, onload: () => build(window.dropTheBallData) });
  document.head.append(script);
})();
