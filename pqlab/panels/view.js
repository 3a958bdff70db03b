// Shows one plotly figure, follows the theme and the width of its page, applies patches from the kernel.
// plotly.js comes from the kernel, once per page, after the widget is up: anywidget gives up on a widget whose own
// module takes longer than two seconds to start, and plotly.js can, on a busy machine. The kernel sends it with its
// first figure; a page that was opened later asks for it, which a busy kernel answers late.

const LOADED = (globalThis.__pqlab_plotly ??= {}); // version -> {promise, resolve, done, asked}
const ASK_AFTER = 3_000; // ms
const ASK_AGAIN = 120_000;

function entryOf(model) {
  return (LOADED[model.get("_version")] ??= (() => {
    let resolve;
    const promise = new Promise((done) => { resolve = done; });
    return { promise, resolve, done: false, asked: performance.now() + ASK_AFTER - ASK_AGAIN };
  })());
}

async function take(model, code) {
  const entry = entryOf(model);
  if (entry.done) return;
  entry.done = true;
  const parts = ["const module = {exports: {}};\n", code, "\nexport default module.exports;"];
  const url = URL.createObjectURL(new Blob(parts, { type: "text/javascript" }));
  entry.resolve((await import(url)).default);
  URL.revokeObjectURL(url);
}

function plotly(model) {
  const entry = entryOf(model);
  const timer = setInterval(() => {
    if (entry.done) return clearInterval(timer);
    if (performance.now() - entry.asked < ASK_AGAIN) return;
    entry.asked = performance.now();
    model.send({ kind: "plotly.js" });
  }, 500);
  return { ready: entry.promise, stop: () => clearInterval(timer) };
}

function merge(object, changes) {
  for (const [key, value] of Object.entries(changes)) {
    if (value === null) delete object[key];
    else object[key] = value;
  }
}

function initialize({ model }) {
  model.on("msg:custom", (message, buffers) => {
    if (message.kind === "plotly.js") take(model, buffers[0]);
    if (message.kind !== "patch") return;
    const figure = model.get("_figure");
    for (const [index, changes] of Object.entries(message.traces)) merge(figure.data[index], changes);
    merge(figure.layout, message.layout);
  });
}

function render({ model, el }) {
  const media = window.matchMedia("(prefers-color-scheme: dark)");
  const plot = document.createElement("div");
  plot.style.width = "100%";
  plot.style.minWidth = `${model.get("_figure").layout.meta?.min_width ?? 0}px`;
  plot.style.minHeight = `${model.get("_figure").layout.height ?? 450}px`;
  plot.textContent = "loading plotly.js …";
  el.appendChild(plot);

  let Plotly = null, waiting = false, missed = false, gone = false, drawn = Promise.resolve();
  const theme = () => {
    const wanted = model.get("theme");
    if (wanted !== "auto") return wanted;
    const lab = document.body.dataset.jpThemeLight;
    return (lab !== undefined ? lab === "false" : media.matches) ? "dark" : "light";
  };
  const draw = () => {
    if (!Plotly || waiting || gone) return;
    waiting = true; // the newest figure wins: what comes before the next frame is drawn once
    requestAnimationFrame(() => {
      waiting = false;
      missed = !el.clientWidth; // in a hidden tab: drawn when it is shown
      if (missed) return;
      drawn = drawn.then(async () => {
        if (gone) return;
        const { data, layout } = model.get("_figure");
        plot.style.minWidth = `${layout.meta?.min_width ?? 0}px`;
        const themed = { uirevision: "kept", ...structuredClone(layout), template: model.get("_templates")[theme()] };
        const config = { displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] };
        await Plotly.react(plot, data.map((trace) => ({ ...trace })), themed, config);
        plot.dataset.theme = theme();
        plot.dataset.draws = Number(plot.dataset.draws ?? 0) + 1;
        settle();
      }).catch((error) => console.error("[pqlab] plotly could not draw:", error));
    });
  };
  let settling = 0;
  const settle = () => { // a change of width while plotly draws is lost to it: look again when all is quiet
    clearTimeout(settling);
    settling = setTimeout(() => {
      const drawing = plot.querySelector(".main-svg");
      if (gone || !drawing || !plot.clientWidth) return;
      if (Math.abs(drawing.clientWidth - plot.clientWidth) > 1) resize();
    }, 300);
  };
  const source = plotly(model);
  source.ready.then((loaded) => {
    Plotly = loaded;
    plot.textContent = "";
    draw();
  });

  let width = 0;
  const resize = () => Plotly.Plots.resize(plot).catch(() => {}); // its promise may never settle: not awaited
  const sizes = new ResizeObserver(() => {
    if (missed) draw();
    if (!el.clientWidth || el.clientWidth === width) return;
    width = el.clientWidth;
    if (plot.dataset.draws) resize();
    settle();
  });
  sizes.observe(el);
  const themes = new MutationObserver(draw);
  themes.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light"] });
  media.addEventListener("change", draw);
  model.on("change:_figure", draw);
  model.on("change:theme", draw);
  model.on("msg:custom", draw);
  let listening = false;
  const listen = setInterval(() => {
    if (listening || !plot.on) return;
    listening = true;
    clearInterval(listen);
    plot.on("plotly_click", ({ points: [point] }) => {
      const { curveNumber: trace, x, y, z = null, customdata = null } = point;
      model.send({ kind: "click", point: { trace, x, y, z, customdata: customdata && Array.from(customdata) } });
    });
  }, 200);

  return () => {
    gone = true;
    source.stop();
    clearTimeout(settling);
    clearInterval(listen);
    sizes.disconnect();
    themes.disconnect();
    media.removeEventListener("change", draw);
    if (Plotly) Plotly.purge(plot);
  };
}

export default { initialize, render };
