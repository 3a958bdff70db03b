"""A panel learns the theme and the width of its page: a tiny widget without a picture."""

from __future__ import annotations

import anywidget
import traitlets


class Follow(anywidget.AnyWidget):
    """`theme` follows JupyterLab's (`data-jp-theme-light` of the body), elsewhere the browser's preference.

    It is empty until a browser has answered, so that a kernel without a page keeps the theme it was given. A plotly
    FigureWidget is drawn before it is in the page and later asks for its width on resizes of the window only; so a
    change of the panel's width is passed on to it as such an event.
    """

    _esm = """
    function initialize({ model }) {
      const media = window.matchMedia("(prefers-color-scheme: dark)");
      const read = () => {
        const lab = document.body.dataset.jpThemeLight;
        const dark = lab !== undefined ? lab === "false" : media.matches;
        const theme = dark ? "dark" : "light";
        if (model.get("theme") !== theme) { model.set("theme", theme); model.save_changes(); }
      };
      const observer = new MutationObserver(read);
      observer.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light"] });
      media.addEventListener("change", read);
      read();
      return () => { observer.disconnect(); media.removeEventListener("change", read); };
    }
    function render({ el }) {
      let last = 0, waiting = 0;
      const observer = new ResizeObserver(([entry]) => {
        const width = Math.round(entry.contentRect.width);
        if (width === 0 || width === last) return;
        last = width;
        clearTimeout(waiting);
        waiting = setTimeout(() => window.dispatchEvent(new Event("resize")), 50);
      });
      el.style.width = "100%";
      observer.observe(el);
      return () => { clearTimeout(waiting); observer.disconnect(); };
    }
    export default { initialize, render };
    """

    theme = traitlets.Unicode("").tag(sync=True)
