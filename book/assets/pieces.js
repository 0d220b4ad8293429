// A page says <div data-piece="one-number">, and one_number.js, which lies beside this file, is loaded; a page without such a
// place loads nothing.
(() => {
  const folder = new URL(".", document.currentScript.src).href;
  const load = () => {
    for (const name of new Set([...document.querySelectorAll("[data-piece]")].map((place) => place.dataset.piece))) {
      const script = document.createElement("script");
      script.src = `${folder}${name.replaceAll("-", "_")}.js`;
      document.head.append(script);
    }
  };
  // What is wider than its box scrolls inside it, and a keyboard must come there, too.
  const boxes = ".bd-article :is(div.math, pre, table, section, div.cell_output, .output, .pst-scrollable-table-container)";
  const reach = () => {
    for (const box of document.querySelectorAll(boxes)) {
      const wide = box.scrollWidth > box.clientWidth + 1 && getComputedStyle(box).overflowX !== "visible";
      if (wide) box.tabIndex = 0; // the theme may have said -1
      else if (!wide && box.tabIndex === 0) box.removeAttribute("tabindex");
    }
  };
  addEventListener("load", () => new ResizeObserver(reach).observe(document.body));
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", load);
  else load();
})();
