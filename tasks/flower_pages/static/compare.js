// Several runs: their curves over one another, and in what they differ.
(function () {
  "use strict";

  var t = window.torchord, el = t.el;
  var page = document.getElementById("compare-page");
  var names = Array.from(document.querySelectorAll("#compare-names li")).map(function (item) {
    return item.textContent;
  });
  var found = {}, charts = {}, asking = {}, range = null, drawnAs = "", told = null;

  function by(id) { return document.getElementById(id); }

  function addressOf(name) { return page.dataset.run.replace("NAME", encodeURIComponent(name)); }

  function colored(name) {
    return el("span", {}, [key(name), el("a", { href: addressOf(name), text: name })]);
  }

  function key(name) {
    var sign = el("span", { "class": "compare-key", "aria-hidden": "true" });
    sign.style.background = t.charts.color(names.indexOf(name));
    return sign;
  }

  function table(titles, rows, kind) {
    return el("table", { "class": "table table-sm mb-0 run-table " + (kind || "") }, [
      el("thead", {}, [el("tr", {}, titles.map(function (title) {
        return el("th", { scope: "col" }, [title && title.nodeType ? title : String(title)]);
      }))]),
      el("tbody", {}, rows.map(function (row) {
        return el("tr", {}, row.map(function (cell) {
          return el("td", {}, [cell && cell.nodeType ? cell : String(cell)]);
        }));
      }))
    ]);
  }

  function lines(answer) {
    t.clear(by("compare-lines")).appendChild(table(["Run", "State", "Steps", "Loss", "Metrics"],
      answer.runs.map(function (run) {
        var metrics = Object.keys(run.metrics).sort().map(function (name) {
          return name + " " + t.figure(run.metrics[name]);
        }).join(", ");
        return [colored(run.name), t.badge(run.state), t.whole(run.version) + (t.known(run.total) ? " of " +
          t.whole(run.total) : ""), t.figure(run.loss), metrics || "—"];
      })));
    t.clear(by("compare-differs")).appendChild(answer.differences.length ? table(
      ["Entry"].concat(names.map(colored)),
      answer.differences.map(function (one) { return [one.name].concat(one.values); }), "compare-differs"
    ) : el("p", { "class": "runs-note", text: "Recipe and config are the same." }));
  }

  function started(curves) {
    var first = curves.series.loss.time.filter(t.known)[0];
    return t.known(first) ? first : 0;
  }

  function shown(part, name, points) {
    return names.filter(function (run) { return found[run] && found[run][part][name]; }).map(function (run) {
      return { label: run, curve: found[run][part][name], start: found[run].start, points: points,
        color: names.indexOf(run) };
    });
  }

  function chartOf(name, title, format) {
    if (!charts[name]) { charts[name] = t.charts.chart(by("charts"), title, format, zoomed); }
    return charts[name];
  }

  function draw() {
    t.charts.QUANTITIES.forEach(function (quantity) {
      chartOf(quantity[0], quantity[1], quantity[2]).show(shown("series", quantity[0], false), panel.view);
    });
    drawNamed("measured", " (training)", false);
    drawNamed("metrics", " (evaluation)", true);
  }

  function drawNamed(part, kind, points) {
    var named = {};
    names.forEach(function (run) { Object.assign(named, found[run] && found[run][part]); });
    Object.keys(named).sort().forEach(function (name) {
      chartOf(part + " " + name, name + kind, t.figure).show(shown(part, name, points), panel.view);
    });
  }

  var panel = t.charts.controls(by("chart-tools"), ["step", "since", "time"], draw);
  panel.all.addEventListener("click", function () { zoomed(null, null); });

  function zoomed(from, to) {
    if (range && range[1] === from && range[2] === to) { return; }  // each chart says it
    range = from === null ? null : [panel.view.axis, from, to];
    panel.all.hidden = !range;
    names.forEach(function (name) { askCurves(name, true); });
  }

  function askCurves(name, anew) {
    if (asking[name] && !anew) { return; }
    var mine = asking[name] = {}, before = found[name], more = "";
    if (range && before) {
      var whole = before.whole || before;
      var first = t.charts.stepAt(whole.series.loss, range[0], range[1], before.start);
      var last = t.charts.stepAt(whole.series.loss, range[0], range[2], before.start);
      more = "&first=" + Math.max(0, first) + "&last=" + Math.max(first + 1, last);
    }
    if (before && before.asked === more) { more += "&have=" + encodeURIComponent(before.mark); }
    t.ask(addressOf(name) + "/curves?points=600" + more).then(function (answer) {
      if (asking[name] !== mine || !answer.series) { return; }
      answer.asked = more.split("&have=")[0];
      answer.start = before && range ? before.start : started(answer);
      if (range) { answer.whole = (before && before.whole) || before; }
      found[name] = answer;
      draw();
    }).catch(function () {}).then(function () { if (asking[name] === mine) { asking[name] = null; } });
  }

  new MutationObserver(function () { if (told) { lines(told); } })
    .observe(document.documentElement, { attributes: true, attributeFilter: ["data-bs-theme"] });

  var light = t.light(by("runs-dot"), by("runs-said"));
  if (!names.length) {
    by("compare-lines").textContent = "Choose runs in the list of runs.";
    light.live("no runs");
    return;
  }
  t.follow(page.dataset.lines + "?" + names.map(function (name) {
    return "run=" + encodeURIComponent(name);
  }).join("&"), 3, function (answer) {
    light.live(names.length === 1 ? "1 run" : names.length + " runs");
    var now = JSON.stringify([answer.runs, answer.differences]);
    told = answer;
    if (now !== drawnAs) { lines(answer); }
    drawnAs = now;
    names.forEach(function (name) { askCurves(name, false); });
  }, function (message) {
    light.failed(message);
    if (!drawnAs) { by("compare-lines").textContent = message; }
  });
}());
