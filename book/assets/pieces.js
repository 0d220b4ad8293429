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
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", load);
  else load();
})();
