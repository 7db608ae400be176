"use strict";
(() => {
  const content = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const coarse = matchMedia("(pointer: coarse)");
  const config = { displayModeBar: false, responsive: true };

  // The figures have the colours of a light page.
  const recoloured = (value, colours) => {
    if (typeof value === "string") return colours[value] ?? value;
    if (Array.isArray(value)) return value.map((entry) => recoloured(entry, colours));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(
      Object.entries(value).map(([key, entry]) => [key, recoloured(entry, colours)]),
    );
  };

  const draw = () =>
    Promise.all(
      [...document.querySelectorAll("[data-chart]")].map((node) => {
        const figure = recoloured(content.figures[node.dataset.chart], dark.matches ? content.dark : {});
        // A finger on a chart scrolls the page.
        figure.layout.dragmode = coarse.matches ? false : "zoom";
        return Plotly.react(node, figure.data, figure.layout, config);
      }),
    );
  draw().then(() => { document.documentElement.dataset.drawn = "yes"; });
  dark.addEventListener("change", draw);
})();
