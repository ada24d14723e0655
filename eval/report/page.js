// Theme, sortable tables and plots.
"use strict";

(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const toggle = document.getElementById("theme");
  const figures = JSON.parse(document.getElementById("figure-data")?.textContent ?? "{}");

  // ---- Theme: the system's, until the reader chooses

  function themed(name) {
    root.dataset.theme = name;
    const other = name === "dark" ? "light" : "dark";
    toggle.textContent = other === "dark" ? "Dark" : "Light";
    toggle.setAttribute("aria-label", `Switch to the ${other} theme`);
    paint();
  }

  function systems() {
    return dark.matches ? "dark" : "light";
  }

  let chosen = null;
  toggle.hidden = false;
  toggle.addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    themed(chosen);
  });
  dark.addEventListener("change", () => chosen ?? themed(systems()));
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach((each) => each.setAttribute("open", ""));
    themed("light");
  });
  addEventListener("afterprint", () => themed(chosen ?? systems()));

  // ---- Plots: drawn once, then only coloured anew

  function colors() {
    const style = getComputedStyle(root);
    const of = (name) => style.getPropertyValue(`--${name}`).trim();
    const axis = { gridcolor: of("line"), zerolinecolor: of("rule"), linecolor: of("rule") };
    return { text: of("text"), soft: of("soft"), page: of("page"), line: of("line"), axis };
  }

  function layoutOf(layout) {
    const { text, page, line, axis } = colors();
    const painted = {
      ...layout,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: text },
      hoverlabel: { bgcolor: page, bordercolor: line, font: { color: text } },
    };
    for (const name of Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key)))
      painted[name] = { ...axis, ...layout[name] };
    painted.shapes = (layout.shapes ?? []).map((shape) => ({
      ...shape,
      line: { ...shape.line, color: axis.zerolinecolor },
    }));
    return painted;
  }

  const plots = [...document.querySelectorAll("[data-figure]")];

  function paint() {
    if (!window.Plotly) return;
    const { text } = colors();
    for (const plot of plots) {
      const { data, layout } = figures[plot.dataset.figure];
      const traces = data.map((each) => ({
        ...each,
        ...(each.error_x && { error_x: { ...each.error_x, color: text } }),
      }));
      Plotly.react(plot, traces, layoutOf(layout), {
        responsive: true,
        displaylogo: false,
        modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
      });
      // A picture to whoever cannot see it: the caption and the table say what it shows.
      plot.querySelectorAll("svg").forEach((svg) => svg.setAttribute("aria-hidden", "true"));
    }
  }

  themed(systems());

  // ---- Tables: a button in every head that says which way it sorts

  for (const table of document.querySelectorAll("table[data-sortable]")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => sort(table, heads, column));
    });
  }

  function sort(table, heads, column) {
    const body = table.tBodies[0];
    const rising = heads[column].getAttribute("aria-sort") !== "ascending";
    const value = (row) => {
      const cell = row.cells[column];
      return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
    };
    const missing = (row) => row.cells[column].dataset.value === "";
    const compare = (a, b) => {
      if (missing(a) || missing(b)) return missing(a) - missing(b); // last, either way
      const [x, y] = [value(a), value(b)];
      const order = typeof x === "number" ? x - y : x.localeCompare(y, undefined, { numeric: true });
      return rising ? order : -order;
    };
    body.append(...[...body.rows].sort(compare));
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", rising ? "ascending" : "descending");
    document.getElementById("said").textContent =
      `Sorted by ${heads[column].textContent.trim()}, ${rising ? "ascending" : "descending"}.`;
  }
})();
