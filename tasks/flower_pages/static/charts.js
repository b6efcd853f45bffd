// Curves: one uPlot for each quantity, with a common axis of steps or times, smoothing and zoom.
(function () {
  "use strict";

  var t = window.torchord, el = t.el;
  var HEIGHT = 220;
  var COLORS = {
    light: ["#2563eb", "#c2410c", "#15803d", "#7c3aed", "#be185d", "#0e7490", "#a16207", "#4b5563"],
    dark: ["#60a5fa", "#fb923c", "#4ade80", "#a78bfa", "#f472b6", "#22d3ee", "#facc15", "#9ca3af"]
  };

  function dark() { return document.documentElement.getAttribute("data-bs-theme") === "dark"; }

  function color(number) {
    var found = COLORS[dark() ? "dark" : "light"];
    return found[number % found.length];
  }

  function style(name) { return getComputedStyle(document.body).getPropertyValue(name).trim(); }

  // An exponential mean that begins at the first value, not at nothing; a gap stays one.
  function smoothed(values, weight) {
    if (!weight) { return values; }
    var sum = 0, total = 0;
    return values.map(function (value) {
      if (!t.known(value)) { return null; }
      sum = weight * sum + (1 - weight) * value;
      total = weight * total + (1 - weight);
      return sum / total;
    });
  }

  function positive(values) {
    return values.map(function (value) { return t.known(value) && value > 0 ? value : null; });
  }

  // curve: {step, time, value}; start: Unix time (s) that "since" counts from.
  function along(curve, axis, start) {
    var xs = axis === "step" ? curve.step : curve.time;
    var x = [], y = [];
    xs.forEach(function (value, place) {
      if (!t.known(value)) { return; }
      x.push(axis === "since" ? (value - start) / 60 : value);
      y.push(curve.value[place]);
    });
    return [x, y];
  }

  var AXES = { step: "step", time: "time", since: "minutes since the run's first step" };

  // One chart: `show(lines, view)` draws lines [{label, curve, start, points}] as
  // view {axis, log, smooth} says; `zoomed(from, to)` is called with what was chosen, nulls for all.
  function chart(box, title, format, zoomed) {
    var holder = el("div", { "class": "chart-plot" });
    var empty = el("p", { "class": "runs-note chart-empty", text: "Nothing to show yet." });
    box.appendChild(el("section", { "class": "run-card chart", "aria-label": title }, [
      el("h2", { text: title }), holder, empty
    ]));
    var plot = null, kind = "", last = null;

    function options(lines, view, log) {
      var text = style("--flower-text-muted"), grid = style("--bs-border-color");
      var series = [{ label: AXES[view.axis], value: view.axis === "time" ? function (u, value) {
        return t.moment(value);
      } : function (u, value) { return t.known(value) ? t.figure(value, 6) : "—"; } }];
      lines.forEach(function (line, number) {
        var one = { label: line.label, value: function (u, value) { return format(value); }, spanGaps: lines.length > 1,
          stroke: color(t.known(line.color) ? line.color : number), width: 1.5,
          points: line.points ? {} : { show: false } };  // {}: as long as there is place for them
        if (view.smooth && !line.points) {
          series.push(Object.assign({}, one, { label: line.label + " (each)", width: 1, alpha: 0.3 }));
        }
        series.push(one);
      });
      return {
        width: Math.max(200, holder.clientWidth), height: HEIGHT,
        cursor: { sync: { key: "torchord" }, drag: { x: true, y: false, setScale: false } },
        legend: { live: true },
        scales: { x: { time: view.axis === "time" }, y: log ? { distr: 3, log: 10 } : {} },
        axes: [
          { stroke: text, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 } },
          { stroke: text, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 }, size: 64,
            values: function (u, values) {
              return values.map(function (value) { return t.known(value) ? format(value, 3) : ""; });
            } }
        ],
        series: series,
        hooks: { setSelect: [function (u) {
          if (u.select.width < 4) { return; }
          var from = u.posToVal(u.select.left, "x"), to = u.posToVal(u.select.left + u.select.width, "x");
          u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
          zoomed(from, to);
        }] }
      };
    }

    function show(lines, view) {
      last = [lines, view];
      var log = view.log && lines.some(function (line) {
        return line.curve.value.some(function (value) { return t.known(value) && value > 0; });
      });
      var tables = [];
      lines.forEach(function (line) {
        var found = along(line.curve, view.axis, line.start), y = log ? positive(found[1]) : found[1];
        if (view.smooth && !line.points) { tables.push([found[0], y]); }
        tables.push([found[0], line.points ? y : smoothed(y, view.smooth)]);
      });
      var any = tables.some(function (table) { return table[0].length; });
      empty.hidden = any;
      holder.hidden = !any;
      if (!any) { return; }
      var data = tables.length === 1 ? tables[0] : window.uPlot.join(tables);
      var now = [view.axis, log, Boolean(view.smooth), dark(), lines.map(function (line) {
        return line.label;
      }).join("\n")].join("|");
      if (plot && kind === now) { plot.setData(data); return; }
      if (plot) { plot.destroy(); }
      kind = now;
      plot = new window.uPlot(options(lines, view, log), data, holder);
      plot.over.addEventListener("dblclick", function () { zoomed(null, null); });
    }

    new ResizeObserver(function () {
      requestAnimationFrame(function () {
        if (plot && holder.clientWidth) { plot.setSize({ width: Math.max(200, holder.clientWidth), height: HEIGHT }); }
      });
    }).observe(holder);
    new MutationObserver(function () { if (last) { show(last[0], last[1]); } })
      .observe(document.documentElement, { attributes: true, attributeFilter: ["data-bs-theme"] });
    return { show: show };
  }

  // The controls above the charts; `changed(view)` is called with {axis, log, smooth}.
  function controls(box, axes, changed) {
    var view = { axis: "step", log: false, smooth: 0 };
    var axis = el("select", { "class": "form-select form-select-sm", "aria-label": "Horizontal axis" },
      axes.map(function (name) { return el("option", { value: name, text: "By " + AXES[name] }); }));
    var log = el("input", { type: "checkbox", "class": "form-check-input", id: "chart-log" });
    var smooth = el("input", { type: "range", min: 0, max: 99, value: 0, "class": "form-range", id: "chart-smooth" });
    var all = el("button", { type: "button", "class": "btn btn-sm btn-outline-secondary", hidden: true,
      text: "Show all steps" });
    axis.addEventListener("change", function () { view.axis = axis.value; changed(view); });
    log.addEventListener("change", function () { view.log = log.checked; changed(view); });
    smooth.addEventListener("input", function () { view.smooth = smooth.value / 100; changed(view); });
    box.appendChild(axis);
    box.appendChild(el("span", { "class": "form-check chart-check" }, [log,
      el("label", { "class": "form-check-label", "for": "chart-log", text: "Logarithmic" })]));
    box.appendChild(el("span", { "class": "chart-smooth" }, [
      el("label", { "for": "chart-smooth", text: "Smoothing" }), smooth]));
    box.appendChild(all);
    box.appendChild(el("span", { "class": "runs-note chart-hint", text: "Drag across a curve to see a part of it." }));
    return { view: view, all: all };
  }

  // The step of the first point of a curve at or after a place on an axis.
  function stepAt(curve, axis, place, start) {
    if (axis === "step") { return Math.round(place); }
    for (var number = 0; number < curve.step.length; number += 1) {
      var at = axis === "since" ? (curve.time[number] - start) / 60 : curve.time[number];
      if (at >= place) { return curve.step[number]; }
    }
    return curve.step[curve.step.length - 1];
  }

  var QUANTITIES = [
    ["loss", "Loss", t.figure], ["grad_norm", "Gradient norm", t.figure], ["lr", "Learning rate", t.figure],
    ["rate", "Examples a second", t.figure], ["nbytes", "Gradient bytes a step", t.bytes]
  ];

  window.torchord.charts = {
    chart: chart, controls: controls, color: color, stepAt: stepAt, QUANTITIES: QUANTITIES
  };
}());
