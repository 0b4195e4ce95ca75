// The page of `llmtrain report --html`: draws what is embedded in #data, and loads nothing.
// Texts of the run (names, samples, config) only ever go into textContent.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const COLOURS = 8;
  const MARGIN = { left: 58, right: 12, top: 10, bottom: 26 };
  const AXES = { step: "step", tokens: "tokens", hours: "hours of running" };
  const UNITS = { step: "step", tokens: "tokens", hours: "hours" };
  const state = { axis: "step", smooth: 0, logX: false, logY: false, range: null, hidden: new Set(), cursor: null };
  const byId = (id) => document.getElementById(id);

  function make(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in element) element[name] = value;
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  function draw(tag, attributes = {}, text = null) {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== null) element.textContent = text;
    return element;
  }

  // Numbers ---------------------------------------------------------------------------------------------------------

  function number(value) {
    const size = Math.abs(value);
    if (value === 0) return "0";
    if (size >= 1e9) return `${+(value / 1e9).toPrecision(4)}G`;
    if (size >= 1e6) return `${+(value / 1e6).toPrecision(4)}M`;
    if (size >= 1e4) return Math.round(value).toLocaleString("en");
    if (size < 1e-3) return value.toExponential(2).replace("e-", "e−");
    return String(+value.toPrecision(4)).replace("-", "−");
  }

  const position = (value, name) => (name === "hours" ? number(value) : Math.round(value).toLocaleString("en"));

  // The index of the last entry of a rising array that is not above x; -1 where all are.
  function indexOf(array, x) {
    let low = 0, high = array.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (array[middle] <= x) low = middle + 1; else high = middle;
    }
    return low - 1;
  }

  function nearest(array, x) {
    const at = indexOf(array, x);
    if (at < 0) return 0;
    return at + 1 < array.length && array[at + 1] - x < x - array[at] ? at + 1 : at;
  }

  // From steps to the x axis that is chosen; between two records in a straight line.
  function convert(run, step) {
    const from = run.axes.step, to = run.axes[state.axis];
    const at = Math.min(Math.max(indexOf(from, step), 0), from.length - 2);
    if (from.length < 2) return to[0];
    return to[at] + ((to[at + 1] - to[at]) * (step - from[at])) / (from[at + 1] - from[at]);
  }

  // An exponential mean, corrected for its beginning, as in Adam.
  function smoothed(values, weight) {
    let sum = 0, left = 1;
    return values.map((value) => {
      sum = weight * sum + (1 - weight) * value;
      left *= weight;
      return sum / (1 - left);
    });
  }

  function ticks(low, high, count, log) {
    const found = [];
    if (log) {
      const decades = Math.log10(high / low);
      const parts = decades > 4 ? [1] : decades > 1.2 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9];
      for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
        for (const part of parts) {
          const value = part * 10 ** power;
          if (value >= low && value <= high) found.push(value);
        }
      if (found.length > 1) return found;
    }
    const rough = (high - low) / count, size = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((part) => part * size).find((part) => part >= rough) || size;
    for (let at = Math.ceil(low / step); at * step <= high * (1 + 1e-12); at++) found.push(at * step);
    return found;
  }

  // Charts ----------------------------------------------------------------------------------------------------------

  class Chart {
    constructor(spec) {
      this.spec = spec;
      this.series = data.runs.flatMap((run, index) =>
        spec.columns.filter((column) => run.series[column]).map((column, order) => ({
          run, index, column, order, ...run.series[column], cache: new Map(),
          colour: (data.runs.length === 1 ? order : index) % COLOURS,
        })));
      this.plot = make("div", { className: "plot", tabIndex: 0, role: "group",
        ariaLabel: `${spec.title}; arrow keys move the cursor, plus and minus zoom, 0 shows all` });
      this.plot.style.height = spec.wide ? "330px" : "210px";
      this.legend = make("div", { className: "legend" });
      this.element = make("section", { className: spec.wide ? "chart wide" : "chart", id: `chart-${spec.columns[0]}` },
        make("header", {}, make("h3", { textContent: spec.title }), this.legend), this.plot);
      this.listen();
    }

    visible() { return this.series.filter((one) => !state.hidden.has(one.index)); }

    xs(one) {
      if (!one.cache.has(state.axis)) one.cache.set(state.axis, one.steps.map((step) => convert(one.run, step)));
      return one.cache.get(state.axis);
    }

    ys(one) {
      if (!state.smooth || one.steps.length < 3) return one.values;
      const key = `smooth ${state.smooth}`;
      if (!one.cache.has(key)) one.cache.set(key, smoothed(one.values, state.smooth));
      return one.cache.get(key);
    }

    // What the axes span: x as it is zoomed, y what lies in there.
    measure() {
      const shown = this.visible().filter((one) => one.steps.length);
      const all = shown.map((one) => this.xs(one));
      const positive = (x) => !state.logX || x > 0;
      let low = Infinity, high = -Infinity;
      for (const xs of all) {
        const first = xs.find(positive);
        if (first !== undefined) { low = Math.min(low, first); high = Math.max(high, xs[xs.length - 1]); }
      }
      if (state.range) [low, high] = state.range;
      if (!(high > low)) high = low + 1;
      let bottom = Infinity, top = -Infinity;
      shown.forEach((one, at) => {
        const ys = this.ys(one);
        all[at].forEach((x, i) => {
          if (x < low || x > high || (this.logY() && !(ys[i] > 0))) return;
          bottom = Math.min(bottom, ys[i]); top = Math.max(top, ys[i]);
        });
      });
      if (!Number.isFinite(bottom)) [bottom, top] = [0, 1];
      if (this.logY()) { const rim = (top / bottom) ** 0.04 || 1.1; bottom /= rim; top *= rim; }
      const rim = this.logY() ? 0 : (top - bottom) * 0.05 || Math.abs(top) * 0.1 || 1;
      return { low, high, bottom: bottom - rim, top: top + rim };
    }

    logY() { return state.logY && this.spec.log !== false; }

    redraw() {
      const width = this.plot.clientWidth || 600, height = this.plot.clientHeight || 210;
      const box = { ...this.measure(), width, height };
      this.box = box;
      const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
      if (!this.visible().some((one) => one.steps.length)) {
        svg.append(draw("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "no run is shown"));
        this.plot.replaceChildren(svg);
        this.legend.replaceChildren();
        return;
      }
      this.drawAxes(svg, box);
      const clip = draw("clipPath", { id: `clip-${this.spec.columns[0]}` });
      clip.append(draw("rect", { x: MARGIN.left, y: 0, width: Math.max(0, width - MARGIN.left - MARGIN.right), height: height - MARGIN.bottom + 3 }));
      this.curves = draw("g", { "clip-path": `url(#clip-${this.spec.columns[0]})` });
      for (const one of this.visible()) this.drawSeries(one);
      this.over = draw("g");
      svg.append(clip, this.curves, this.over);
      this.tip = make("div", { className: "tip", hidden: true, ariaLive: "polite" });
      this.plot.replaceChildren(svg, this.tip);
      this.drawLegend();
      this.drawCursor(false);
    }

    place(x) {
      const { low, high, width } = this.box, span = width - MARGIN.left - MARGIN.right;
      const share = state.logX ? Math.log(x / low) / Math.log(high / low) : (x - low) / (high - low);
      return MARGIN.left + share * span;
    }

    level(y) {
      const { bottom, top, height } = this.box, span = height - MARGIN.top - MARGIN.bottom;
      const share = this.logY() ? Math.log(y / bottom) / Math.log(top / bottom) : (y - bottom) / (top - bottom);
      return MARGIN.top + (1 - share) * span;
    }

    valueAt(pixels) {
      const { low, high, width } = this.box;
      const share = Math.min(1, Math.max(0, (pixels - MARGIN.left) / (width - MARGIN.left - MARGIN.right)));
      return state.logX ? low * (high / low) ** share : low + share * (high - low);
    }

    drawAxes(svg, box) {
      const right = box.width - MARGIN.right, floor = box.height - MARGIN.bottom;
      for (const value of ticks(box.bottom, box.top, box.height / 45, this.logY())) {
        const y = this.level(value);
        if (y < MARGIN.top - 1 || y > floor + 1) continue;
        svg.append(draw("line", { class: "grid", x1: MARGIN.left, x2: right, y1: y, y2: y }),
          draw("text", { x: MARGIN.left - 7, y: y + 4, "text-anchor": "end" }, number(value)));
      }
      let taken = -Infinity;
      for (const value of ticks(box.low, box.high, box.width / 110, state.logX)) {
        const x = this.place(value), text = number(value);
        svg.append(draw("line", { class: "grid", x1: x, x2: x, y1: MARGIN.top, y2: floor }));
        if (x - taken < 12 + 6 * text.length) continue;
        taken = x;
        svg.append(draw("text", { x: Math.min(x, right - 3 * text.length), y: floor + 17, "text-anchor": "middle" }, text));
      }
      svg.append(draw("text", { x: 4, y: floor + 17 }, UNITS[state.axis]));
      svg.append(draw("line", { class: "axis", x1: MARGIN.left, x2: right, y1: floor, y2: floor }));
      if (data.runs.length === 1)
        for (const step of data.runs[0].launches.slice(1)) {
          const x = this.place(convert(data.runs[0], step));
          if (x >= MARGIN.left && x <= right) {
            const line = draw("line", { class: "launch", x1: x, x2: x, y1: MARGIN.top, y2: floor });
            line.append(draw("title", {}, `a launch went on after step ${step}`));
            svg.append(line);
          }
        }
    }

    path(xs, ys) {
      let text = "", pen = "M";
      for (let i = 0; i < xs.length; i++) {
        if ((this.logY() && !(ys[i] > 0)) || (state.logX && !(xs[i] > 0))) { pen = "M"; continue; }
        text += `${pen}${this.place(xs[i]).toFixed(1)} ${this.level(ys[i]).toFixed(1)}`;
        pen = "L";
      }
      return text;
    }

    drawSeries(one) {
      const xs = this.xs(one), ys = this.ys(one), style = this.isDashed(one) ? " dashed" : "";
      const common = { "data-run": one.index, "data-column": one.column };
      if (ys !== one.values) this.curves.append(draw("path", { class: `curve faint k${one.colour}`, d: this.path(xs, one.values) }));
      this.curves.append(draw("path", { class: `curve k${one.colour}${style}`, d: this.path(xs, ys), ...common }));
      if (xs.length > 60) return;
      xs.forEach((x, i) => {
        if ((this.logY() && !(ys[i] > 0)) || (state.logX && !(x > 0))) return;
        this.curves.append(draw("circle", { class: `mark k${one.colour}`, cx: this.place(x), cy: this.level(ys[i]), r: 2.6 }));
      });
    }

    isDashed(one) { return data.runs.length > 1 && one.order > 0; }

    drawLegend() {
      if (this.spec.columns.length < 2 || this.series.every((one) => one.order === 0)) return;
      const kinds = new Map(this.series.map((one) => [one.column, one]));
      this.legend.replaceChildren(...[...kinds.values()].map((one) => {
        const sample = draw("svg", { viewBox: "0 0 22 8", "aria-hidden": "true" });
        sample.append(draw("path", { d: "M0 4L22 4", class: `curve ${data.runs.length > 1 ? "ink" : `k${one.colour}`}${this.isDashed(one) ? " dashed" : ""}` }));
        return make("span", {}, sample, data.columns[one.column]);
      }));
    }

    // A line at the cursor in every chart, and its values in the one that is pointed at.
    drawCursor(withValues) {
      if (!this.over) return;
      this.over.replaceChildren();
      this.tip.hidden = true;
      if (state.cursor === null || !this.box) return;
      const x = this.place(state.cursor), floor = this.box.height - MARGIN.bottom;
      if (!(x >= MARGIN.left - 1 && x <= this.box.width - MARGIN.right + 1)) return;
      this.over.append(draw("line", { class: "cursor", x1: x, x2: x, y1: MARGIN.top, y2: floor }));
      const lines = [make("div", { textContent: `${AXES[state.axis]} ${position(state.cursor, state.axis)}` })];
      for (const one of this.visible()) {
        if (!one.steps.length) continue;
        const xs = this.xs(one), ys = this.ys(one), at = nearest(xs, state.cursor);
        if (state.cursor < xs[0] - (xs[1] - xs[0] || 0) || state.cursor > xs[xs.length - 1] * 1.02) continue;
        if (xs[at] >= this.box.low && xs[at] <= this.box.high && (!this.logY() || ys[at] > 0))
          this.over.append(draw("circle", { class: `mark k${one.colour}`, cx: this.place(xs[at]), cy: this.level(ys[at]), r: 4 }));
        const name = data.runs.length > 1 ? `${one.run.name}${one.order ? `, ${data.columns[one.column]}` : ""}` : data.columns[one.column];
        lines.push(make("div", {}, make("span", { className: `swatch k${one.colour}` }),
          make("span", { className: "what", textContent: name }), make("span", { className: "value", textContent: number(ys[at]) })));
      }
      if (!withValues) return;
      this.tip.replaceChildren(...lines);
      this.tip.hidden = false;
      const room = this.box.width - this.tip.offsetWidth - 8;
      this.tip.style.left = `${x + 14 > room ? Math.max(4, x - this.tip.offsetWidth - 14) : x + 14}px`;
    }

    listen() {
      let from = null;
      const at = (event) => event.clientX - this.plot.getBoundingClientRect().left;
      this.plot.addEventListener("pointerdown", (event) => { if (event.button === 0) { from = at(event); this.plot.setPointerCapture(event.pointerId); } });
      this.plot.addEventListener("pointermove", (event) => {
        if (!this.box) return;
        point(this.valueAt(at(event)), this);
        if (from !== null && Math.abs(at(event) - from) > 4)
          this.over.append(draw("rect", { class: "picked", x: Math.min(from, at(event)), width: Math.abs(at(event) - from),
            y: MARGIN.top, height: this.box.height - MARGIN.top - MARGIN.bottom }));
      });
      this.plot.addEventListener("pointerup", (event) => {
        const to = at(event), begin = from;
        from = null;
        if (begin !== null && Math.abs(to - begin) > 6) zoom(this.valueAt(Math.min(begin, to)), this.valueAt(Math.max(begin, to)));
      });
      this.plot.addEventListener("pointercancel", () => { from = null; });
      this.plot.addEventListener("pointerleave", () => { if (from === null) point(null, this); });
      this.plot.addEventListener("dblclick", () => zoom(null));
      this.plot.addEventListener("keydown", (event) => this.key(event));
      this.plot.addEventListener("blur", () => point(null, this));
    }

    key(event) {
      const first = this.visible().find((one) => one.steps.length);
      if (!first || event.ctrlKey || event.metaKey || event.altKey) return;
      const xs = this.xs(first), { low, high } = this.box;
      const here = state.cursor === null ? high : state.cursor;
      const by = (event.shiftKey ? 10 : 1) * (event.key === "ArrowLeft" ? -1 : 1);
      const half = (high - low) / (event.key === "-" ? 1 : 4);
      if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
        const next = xs[Math.min(xs.length - 1, Math.max(0, nearest(xs, here) + by))];
        point(Math.min(high, Math.max(low, next)), this);
      } else if (event.key === "Home" || event.key === "End") point(event.key === "Home" ? low : high, this);
      else if (event.key === "+" || event.key === "=" || event.key === "-") {
        zoom(Math.max(here - half, xs[0]), Math.min(here + half, xs[xs.length - 1]));
        point(here, this);
      } else if (event.key === "0" || event.key === "Escape") { zoom(null); point(here, this); } else return;
      event.preventDefault();
    }
  }

  const charts = data.charts.map((spec) => new Chart(spec)).filter((chart) => chart.series.some((one) => one.steps.length));

  function redraw() { for (const chart of charts) chart.redraw(); }

  function point(x, chart) {
    state.cursor = x;
    for (const other of charts) other.drawCursor(other === chart);
  }

  function zoom(low, high) {
    state.range = low === null || !(high > low) ? null : [low, high];
    redraw();
  }

  // The rest of the page --------------------------------------------------------------------------------------------

  function fillRuns() {
    byId("runs").append(...data.runs.map((run, index) => {
      const box = make("input", { type: "checkbox", checked: true, ariaLabel: `show ${run.name}` });
      const colour = data.runs.length > 1 ? [make("span", { className: `swatch k${index % COLOURS}` })] : [];
      const label = make("label", { className: "run" }, ...(data.runs.length > 1 ? [box] : []), ...colour,
        make("span", { className: "name", textContent: run.name }),
        make("span", { className: `state ${run.state === "?" ? "open" : run.state}`, textContent: run.said }),
        make("span", { className: "numbers", textContent: run.headline }));
      box.addEventListener("change", () => {
        if (box.checked) state.hidden.delete(index); else state.hidden.add(index);
        label.classList.toggle("off", !box.checked);
        redraw();
        showSamples();
      });
      return label;
    }));
  }

  function fillControls() {
    const drawn = data.runs.filter((run) => run.axes.step.length);
    for (const [name, words] of Object.entries(AXES))
      if (drawn.every((run) => run.axes[name].length)) byId("x-axis").append(make("option", { value: name, textContent: words }));
    const set = (id, event, change) => byId(id).addEventListener(event, () => { change(byId(id)); redraw(); });
    set("smooth", "input", (slider) => {
      state.smooth = Number(slider.value);
      byId("smooth-value").textContent = slider.value;
    });
    set("x-axis", "change", (choice) => { state.axis = choice.value; state.range = null; state.cursor = null; });
    set("log-x", "change", (box) => { state.logX = box.checked; state.range = null; });
    set("log-y", "change", (box) => { state.logY = box.checked; });
    set("reset", "click", () => { state.range = null; });
    byId("controls").addEventListener("submit", (event) => event.preventDefault());
  }

  function table(headings, rows) {
    const head = make("tr", {}, make("th", { scope: "col" }), ...headings.map((text) => make("th", { scope: "col", textContent: text })));
    const lines = rows.map(([name, values]) => make("tr", {}, make("th", { scope: "row", textContent: name }),
      ...values.map((text) => make("td", { textContent: text === null ? "–" : String(text) }))));
    return make("table", {}, ...(headings.length > 1 ? [make("thead", {}, head)] : []), make("tbody", {}, ...lines));
  }

  function fillDiagnosis() {
    for (const run of data.runs) {
      if (data.runs.length > 1) byId("diagnosis").append(make("h3", { textContent: run.name }));
      for (const remark of run.diagnosis)
        byId("diagnosis").append(make("div", { className: `remark ${remark.level}` },
          make("p", {}, make("b", { textContent: remark.name }), `: ${remark.detail}`), ...(remark.advice ? [make("p", { textContent: remark.advice })] : [])));
    }
  }

  function fillConfig() {
    const names = data.runs.map((run) => run.name), config = byId("config");
    if (data.runs.length > 1) {
      const rows = Object.entries(data.differences);
      config.append(make("h3", { textContent: rows.length ? "Where the runs differ" : "The runs have the same config" }));
      if (rows.length) config.append(make("div", { className: "scroll", tabIndex: 0, id: "differences" }, table(names, rows)));
    }
    for (const run of data.runs) {
      const rows = Object.entries(run.config).map(([key, value]) => [key, [value]]);
      if (!rows.length) continue;
      config.append(make("details", {}, make("summary", { textContent: `Every key of ${run.name}` }),
        make("div", { className: "scroll" }, table([run.name], rows))));
    }
  }

  const sampleSteps = [...new Set(data.runs.flatMap((run) => run.samples.map((one) => one.step)))].sort((a, b) => a - b);

  function fillSamples() {
    if (!sampleSteps.length) return;
    byId("samples").hidden = false;
    const prompts = [...new Set(data.runs.flatMap((run) => run.samples.map((one) => one.prompt)))];
    byId("sample-prompt").append(...prompts.map((text) => make("option", { value: text, textContent: JSON.stringify(text) })));
    byId("sample-step").max = sampleSteps.length - 1;
    byId("sample-step").value = sampleSteps.length - 1;
    byId("sample-step").addEventListener("input", showSamples);
    byId("sample-prompt").addEventListener("change", showSamples);
    showSamples();
  }

  function showSamples() {
    if (!sampleSteps.length) return;
    const step = sampleSteps[Number(byId("sample-step").value)], prompt = byId("sample-prompt").value;
    byId("sample-step-value").textContent = step.toLocaleString("en");
    byId("sample-texts").replaceChildren(...data.runs.flatMap((run, index) => {
      const until = run.samples.filter((one) => one.prompt === prompt && one.step <= step);
      if (!until.length || state.hidden.has(index)) return [];
      const last = until[until.length - 1];
      return [make("h3", { textContent: data.runs.length > 1 ? `${run.name}, step ${last.step}` : `step ${last.step}` }),
        make("pre", { tabIndex: 0 }, make("span", { className: "prompt", textContent: last.prompt }), last.text)];
    }));
  }

  byId("written").textContent = data.written;
  byId("charts").append(...charts.map((chart) => chart.element));
  if (!charts.length) byId("charts").append(make("p", { className: "empty", textContent: "There are no records yet." }));
  fillRuns();
  fillControls();
  fillDiagnosis();
  byId("summary").append(table(data.runs.map((run) => run.name), data.summary));
  fillSamples();
  fillConfig();
  redraw();
  new ResizeObserver(redraw).observe(byId("charts"));
})();
