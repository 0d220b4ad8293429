// Read between require.js and embed-amd.js, on pages with widgets.

// The theme turns icons into pictures. It must leave the widgets' own alone: the Play control changes its icons later.
window.FontAwesomeConfig = { observeMutations: false };

// embed-amd.js looks for its icon fonts beside its modules. All of them lie in the folder of this script.
(() => {
  const folder = new URL(".", document.currentScript.src).href;
  const modules = ["base", "controls", "base7", "controls7", "html-manager", "html-manager/dist/libembed-amd"];
  const paths = modules.map((name) => [`@jupyter-widgets/${name}`, folder + name.replaceAll("/", "-")]);
  window.requirejs.config({ paths: Object.fromEntries(paths) });
})();

// Widgets ask for mathematics in their labels in the manner of MathJax 2; the book has MathJax 3.
document.addEventListener("DOMContentLoaded", () => {
  if (window.MathJax) {
    window.MathJax.Hub = {
      Queue: ([, , element]) => window.MathJax.startup.promise.then(() => window.MathJax.typesetPromise([element])),
    };
  }
});
