"use strict";
// Draws the curves and the parallel coordinates, sorts and filters the table. What runs say is text here, never HTML.
(async () => {
  const $ = (id) => document.getElementById(id);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const coarse = matchMedia("(pointer: coarse)");

  async function unpacked(id) {
    const packed = atob($(id).textContent);
    const bytes = Uint8Array.from(packed, (one) => one.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }

  function trouble(text) {
    $("trouble").textContent = text;
    $("trouble").hidden = false;
  }

  let data;
  try {
    const library = document.createElement("script");
    library.nonce = document.currentScript?.nonce || document.querySelector("script[nonce]").nonce;
    const [code, json] = await Promise.all([unpacked("library"), unpacked("data")]);
    library.textContent = code;
    performance.mark("unpacked");
    document.head.append(library);
    data = JSON.parse(json);
    performance.mark("loaded");
  } catch (error) {
    trouble(`This browser cannot unpack what is drawn (${error.message}); the tables below are complete.`);
    return;
  }

  const points = data.points;
  const place = new Map(points.map((point, index) => [point.id, index]));
  const rows = [...document.querySelectorAll("#table tbody tr")];
  const rowOf = new Map(rows.map((row) => [row.dataset.id, row]));
  let shown = new Set(points.map((point) => point.id));
  let kept = null; // ids that the parallel coordinates keep, or all
  let lit = null; // the run under the pointer

  // ---- colours: one each for a few runs, steps from the best to the worst for many
  const FEW = 10;
  const EACH = {
    light: ["#1f5fd0", "#d9480f", "#2b8a3e", "#862e9c", "#0b7285", "#c2255c", "#846200", "#495057", "#5f3dc4", "#66a80f"],
    dark: ["#74a9ff", "#ff9f5a", "#69db7c", "#da9cf0", "#4fd1e0", "#ff8fb6", "#ffd43b", "#ced4da", "#a99bff", "#b8e563"],
  };
  const STEPS = {
    light: ["#2d0a56", "#3b2f80", "#31598c", "#26778e", "#1f938b", "#35b07a", "#74c465", "#b3cf52"],
    dark: ["#fde725", "#c5e021", "#86d549", "#52c569", "#2ab07f", "#25858e", "#33638d", "#46568f"],
  };
  const NONE = { light: "#adb5bd", dark: "#5c6673" };
  const theme = () => (dark.matches ? "dark" : "light");
  const few = points.length <= FEW;
  const step = (point) =>
    point.rank === null ? STEPS.light.length : Math.min(7, Math.floor((8 * point.rank) / Math.max(1, data.scored)));
  const colour = (point) =>
    few ? EACH[theme()][place.get(point.id)] : (STEPS[theme()][step(point)] ?? NONE[theme()]);

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const label = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  function paint() {
    for (const row of rows) row.querySelector(".swatch").style.background = colour(points[place.get(row.dataset.id)]);
    if (!few && data.scored && $("scale")) {
      $("scale").hidden = false;
      $("scale").querySelector("i").style.background = `linear-gradient(90deg, ${STEPS[theme()].join(", ")})`;
    }
  }

  // ---- curves
  const settings = { smoothing: 0, axis: 0, log: false };
  const plots = [0, 1].map((number) => $(`plot-${number}`)).filter(Boolean);
  const OPTIONS = { responsive: true, displaylogo: false, doubleClick: "reset", displayModeBar: coarse.matches ? false : "hover",
    // What sends a chart to Plotly's servers is not for here.
    modeBarButtonsToRemove: ["sendChartToCloud", "downloadJson", "toImage", "select2d", "lasso2d", "autoScale2d"] };

  function smoothed(values, weight) {
    if (!weight) return values;
    let mean = 0, trust = 0;
    return values.map((value) => {
      if (value === null) return null;
      mean = weight * mean + (1 - weight) * value;
      trust = weight * trust + (1 - weight);
      return mean / trust;
    });
  }

  function curve(metric, id, weight) {
    const found = data.curves[metric]?.[place.get(id)];
    if (!found) return null;
    return { x: found[settings.axis], y: smoothed(found[2], weight), dots: found[0].length < 3 };
  }

  function traces(metric) {
    const listed = points.filter((point) => shown.has(point.id));
    const made = [];
    const text = (point) => label(point.name);
    const hover = `%{text}<br>${settings.axis ? "tokens" : "step"} %{x}: %{y:.5g}<extra></extra>`;
    const sparse = metric.startsWith("eval");
    if (few) {
      for (const point of listed) {
        const line = curve(metric, point.id, settings.smoothing);
        if (!line) continue;
        if (settings.smoothing) {
          const raw = curve(metric, point.id, 0);
          made.push({ ...raw, type: "scatter", mode: "lines", hoverinfo: "skip", opacity: 0.25, showlegend: false,
            line: { color: colour(point), width: 1 } });
        }
        made.push({ x: line.x, y: line.y, type: "scatter", mode: sparse || line.dots ? "lines+markers" : "lines",
          name: text(point), text: text(point), hovertemplate: hover,
          line: { color: colour(point), width: 2 }, marker: { size: 6 } });
      }
    } else {
      // Runs of one colour are one trace with gaps: a few of them draw faster than hundreds. The best come last, on top.
      const steps = new Map();
      for (const point of listed) {
        const line = curve(metric, point.id, settings.smoothing);
        if (!line) continue;
        const at = step(point);
        if (!steps.has(at)) steps.set(at, { x: [], y: [], text: [], dots: false, colour: colour(point) });
        const into = steps.get(at), name = text(point);
        for (let i = 0; i < line.x.length; i++) { into.x.push(line.x[i]); into.y.push(line.y[i]); into.text.push(name); }
        into.x.push(null); into.y.push(null); into.text.push("");
        into.dots ||= line.dots;
      }
      const dense = listed.length > 60;
      for (const at of [...steps.keys()].sort((a, b) => b - a)) {
        const { x, y, text, dots, colour } = steps.get(at);
        made.push({ x, y, text, type: "scatter", hovertemplate: hover, showlegend: false, connectgaps: false,
          mode: dots || (sparse && !dense) ? "lines+markers" : "lines",
          opacity: dense ? 0.6 : 0.9, line: { color: colour, width: dense ? 1 : 1.5 }, marker: { size: 4 } });
      }
    }
    const thick = lit && shown.has(lit) ? curve(metric, lit, settings.smoothing) : null;
    made.push({ x: thick?.x ?? [], y: thick?.y ?? [], type: "scatter", mode: "lines", hoverinfo: "skip", showlegend: false,
      line: { color: css("--ink"), width: 4 } });
    return made;
  }

  function layout(metric, plot) {
    const axis = { gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false, automargin: true };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: css("--soft"), size: 12, family: getComputedStyle(document.body).fontFamily },
      margin: { l: 52, r: 12, t: 8, b: 40 },
      hovermode: "closest",
      hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink") }, align: "left" },
      dragmode: coarse.matches ? false : "zoom", // a finger is to scroll the page
      showlegend: few && points.length > 1 && innerWidth > 640,
      legend: { orientation: "h", y: -0.16, yanchor: "top", font: { size: 11 } },
      xaxis: { ...axis, title: { text: settings.axis ? "tokens" : "step", standoff: 6 }, range: plot?.layout?.xaxis.autorange === false ? plot.layout.xaxis.range : undefined },
      yaxis: { ...axis, type: settings.log ? "log" : "linear", exponentformat: "power" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--soft"), activecolor: css("--accent") },
      uirevision: `${metric} ${settings.axis} ${settings.log}`,
    };
  }

  const chosen = (number) => $(`metric-${number}`).value;
  function draw() {
    plots.forEach((plot, number) => {
      const metric = chosen(number);
      Plotly.react(plot, traces(metric), layout(metric, plot), OPTIONS);
    });
  }
  let waiting = 0;
  const drawSoon = () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(draw); };

  function zoom(factor) {
    for (const plot of plots) {
      const [low, high] = plot.layout.xaxis.range, middle = (low + high) / 2, half = ((high - low) / 2) * factor;
      Plotly.relayout(plot, { "xaxis.range": [middle - half, middle + half], "xaxis.autorange": false });
    }
  }

  // Drawn thick: only the last trace changes.
  let lighting = 0;
  function light(id) {
    if (id === lit) return;
    lit = id;
    clearTimeout(lighting);
    lighting = setTimeout(() => plots.forEach((plot, number) => {
      const thick = lit && shown.has(lit) ? curve(chosen(number), lit, settings.smoothing) : null;
      Plotly.restyle(plot, { x: [thick?.x ?? []], y: [thick?.y ?? []] }, [plot.data.length - 1]);
    }), 40);
  }

  // ---- parallel coordinates
  const parallel = $("plot-parallel");
  function webgl() {
    try { return Boolean(document.createElement("canvas").getContext("webgl")); } catch { return false; }
  }
  function drawParallel() {
    const { ids, axes } = data.parallel;
    // A few runs have the colours of their curves, many those of their ranks.
    const steps = few ? ids.map((id) => colour(points[place.get(id)])) : STEPS[theme()], last = Math.max(1, ids.length - 1);
    const before = parallel.data?.[0].dimensions;
    Plotly.react(parallel, [{
      type: "parcoords",
      line: { color: ids.map((_, rank) => rank / last), cmin: 0, cmax: 1, colorscale: steps.map((one, i) => [i / (steps.length - 1), one]) },
      dimensions: axes.map((axis, index) => {
        const low = Math.min(...axis.values), high = Math.max(...axis.values), room = (high - low || 1) * 0.04;
        return { label: label(axis.label), values: axis.values, tickvals: axis.ticks, ticktext: axis.names.map(label),
          range: [low - room, high + room], constraintrange: before?.[index].constraintrange };
      }),
      unselected: { line: { color: css("--line"), opacity: 0.4 } },
      labelfont: { size: 13, color: css("--ink") }, tickfont: { size: 11, color: css("--ink") }, rangefont: { size: 1, color: "rgba(0,0,0,0)" },
    }], {
      paper_bgcolor: "rgba(0,0,0,0)", margin: { l: 70, r: 70, t: 48, b: 24 },
      font: { family: getComputedStyle(document.body).fontFamily, color: css("--soft") },
    }, { responsive: true, displayModeBar: false });
  }
  function brushed() {
    const { ids } = data.parallel;
    const dimensions = parallel.data[0].dimensions.filter((one) => one.constraintrange);
    kept = dimensions.length ? new Set(ids.filter((_, index) => dimensions.every((one) => {
      const ranges = Array.isArray(one.constraintrange[0]) ? one.constraintrange : [one.constraintrange];
      return ranges.some(([low, high]) => one.values[index] >= low && one.values[index] <= high);
    }))) : null;
    filter();
  }

  // ---- the table
  const headers = [...document.querySelectorAll("#table thead th")];
  const columns = headers.map((header) => header.dataset.key.toLowerCase());
  const worth = (row, column) => row.cells[column].dataset.sort;

  function sort(column) {
    const header = headers[column];
    const down = header.getAttribute("aria-sort") === "ascending";
    headers.forEach((one) => one.setAttribute("aria-sort", one === header ? (down ? "descending" : "ascending") : "none"));
    const collator = new Intl.Collator(undefined, { numeric: true });
    const numbers = rows.every((row) => worth(row, column) === "" || Number.isFinite(Number(worth(row, column))));
    const order = (a, b) => {
      const x = worth(a, column), y = worth(b, column);
      if (x === "" || y === "") return (x === "") - (y === ""); // what has no value stays last
      const found = numbers ? Number(x) - Number(y) : collator.compare(x, y);
      return down ? -found : found;
    };
    $("table").tBodies[0].append(...rows.sort(order));
  }

  const COMPARE = { "=": (a, b) => a === b, "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b };
  function test(word) {
    const [, key, sign, wanted] = word.match(/^([^<>=]+)(<=|>=|<|>|=)(.+)$/) ?? [];
    // `r=8` stands for lora.r=8 where one column ends so.
    const named = key === undefined ? [] : columns.flatMap((name, index) => (name === key || name.endsWith(`.${key}`) ? [index] : []));
    if (!named.length) return (row) => row.textContent.toLowerCase().includes(word);
    return (row) => named.some((column) => {
      const cell = row.cells[column], value = cell.dataset.sort;
      if (value === "") return false;
      if (Number.isFinite(Number(wanted)) && Number.isFinite(Number(value))) return COMPARE[sign](Number(value), Number(wanted));
      return COMPARE[sign](value.toLowerCase(), wanted);
    });
  }

  function filter() {
    const tests = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean).map(test);
    const state = $("state").value;
    const before = shown;
    shown = new Set();
    for (const row of rows) {
      const stays = (!state || row.dataset.state === state) && (!kept || kept.has(row.dataset.id)) && tests.every((one) => one(row));
      row.hidden = !stays;
      if (stays) shown.add(row.dataset.id);
    }
    $("count").textContent = `${shown.size} of ${points.length} points`;
    for (const section of document.querySelectorAll("details.run[data-id]")) section.hidden = !shown.has(section.dataset.id);
    if (shown.size !== before.size || [...shown].some((id) => !before.has(id))) drawSoon();
  }

  headers.forEach((header, column) => header.querySelector("button").addEventListener("click", () => sort(column)));
  let typing = 0;
  $("filter").addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(filter, 80); });
  $("state").addEventListener("change", filter);
  $("clear").addEventListener("click", () => {
    $("filter").value = $("state").value = "";
    if (kept) Plotly.restyle(parallel, Object.fromEntries(data.parallel.axes.map((_, i) => [`dimensions[${i}].constraintrange`, [null]])));
    kept = null;
    filter();
  });
  const body = $("table").tBodies[0];
  const under = (event) => event.target.closest("tr")?.dataset.id ?? null;
  body.addEventListener("pointerover", (event) => light(under(event)));
  body.addEventListener("pointerleave", () => light(null));
  body.addEventListener("focusin", (event) => light(under(event)));
  body.addEventListener("focusout", () => light(null));

  // ---- a run's own section opens when something leads to it
  function open() {
    const section = location.hash.startsWith("#run-") && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!section) return;
    section.hidden = false;
    section.open = true;
    section.scrollIntoView({ block: "start" });
    section.querySelector("summary").focus({ preventScroll: true });
  }
  addEventListener("hashchange", open);
  document.addEventListener("click", (event) => {
    if (event.target.closest("a[href^='#run-']")) setTimeout(open);
    const button = event.target.closest(".copy");
    if (!button) return;
    const code = button.parentElement.querySelector("code");
    const told = (text) => { button.textContent = text; setTimeout(() => (button.textContent = "copy"), 1500); };
    const select = () => { getSelection().selectAllChildren(code); told("selected"); };
    navigator.clipboard ? navigator.clipboard.writeText(code.textContent).then(() => told("copied"), select) : select();
  });

  // ---- begin
  paint();
  if (plots.length) {
    draw();
    plots.forEach((plot, number) => {
      $(`metric-${number}`).addEventListener("change", () => {
        plot.setAttribute("aria-label", plot.getAttribute("aria-label").replace(/^[^:]*/, chosen(number)));
        draw();
      });
      plot.on("plotly_hover", (event) => {
        plot.dataset.hovered = event.points[0].text ?? "";
      });
    });
    $("smoothing").addEventListener("input", (event) => {
      settings.smoothing = Number(event.target.value);
      $("smoothing-told").textContent = settings.smoothing.toFixed(2);
      drawSoon();
    });
    $("axis").addEventListener("change", (event) => { settings.axis = Number(event.target.value); draw(); });
    $("log").addEventListener("change", (event) => { settings.log = event.target.checked; draw(); });
    $("closer").addEventListener("click", () => zoom(0.5));
    $("farther").addEventListener("click", () => zoom(2));
    $("whole").addEventListener("click", () =>
      plots.forEach((plot) => Plotly.relayout(plot, { "xaxis.autorange": true, "yaxis.autorange": true })));
  }
  if (parallel) {
    // Its shaders take longer than all the rest, and it lies below: it is drawn when it comes near.
    if (webgl()) {
      new IntersectionObserver((seen, observer) => {
        if (!seen.some((one) => one.isIntersecting)) return;
        observer.disconnect();
        drawParallel();
        parallel.on("plotly_restyle", brushed);
      }, { rootMargin: "300px" }).observe(parallel);
    } else {
      parallel.parentElement.replaceChildren(Object.assign(document.createElement("p"), { className: "note",
        textContent: "This browser has no WebGL, which the parallel coordinates are drawn with; the table has the same numbers." }));
    }
  }
  dark.addEventListener("change", () => { paint(); draw(); if (parallel?.data) drawParallel(); });
  open();
  document.documentElement.dataset.ready = Math.round(performance.now());
})();
