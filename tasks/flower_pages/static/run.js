// One run's page: what it says in words and tables.
(function () {
  "use strict";

  var t = window.torchord, el = t.el;
  var page = document.getElementById("run-page");

  function by(id) { return document.getElementById(id); }

  function card(label, value, note, kind) {
    return el("article", { "class": "metric-card" + (kind ? " metric-card-" + kind : "") }, [
      el("p", { "class": "metric-label", text: label }),
      el("p", { "class": "metric-value", text: value }),
      el("p", { "class": "runs-note run-figure-note", text: note || " " })
    ]);
  }

  function table(titles, rows, empty) {
    if (!rows.length) { return el("p", { "class": "runs-note", text: empty }); }
    return el("table", { "class": "table table-sm mb-0 run-table" }, [
      el("thead", {}, [el("tr", {}, titles.map(function (title) { return el("th", { scope: "col", text: title }); }))]),
      el("tbody", {}, rows.map(function (row) {
        return el("tr", {}, row.map(function (cell) {
          return el("td", {}, [cell && cell.nodeType ? cell : String(cell)]);
        }));
      }))
    ]);
  }

  function replaced(id, node) {
    var place = by(id), top = place.scrollTop;
    t.clear(place).appendChild(node);
    place.scrollTop = top;
  }

  function metrics(found) {
    return Object.keys(found).sort().map(function (name) { return name + " " + t.figure(found[name]); }).join(", ");
  }

  function words(value) {
    if (value === null) { return "none"; }
    if (typeof value === "number") { return Number.isInteger(value) ? String(value) : t.figure(value, 6); }
    if (typeof value !== "object") { return String(value); }
    if (Array.isArray(value)) { return value.map(words).join(", "); }
    return Object.keys(value).map(function (name) { return name + " " + words(value[name]); }).join(", ");
  }

  function figures(run) {
    var box = t.clear(by("run-figures"));
    var notes = run.reason ? [run.reason] : [t.known(run.total) ? "of " + t.whole(run.total) : "", t.known(run.left_seconds) ?
      t.duration(run.left_seconds) + " left" : "", t.known(run.committed_at) ?
      "last " + t.duration(run.now - run.committed_at) + " ago" : ""];
    var names = Object.keys(run.metrics).sort();
    var first = names.filter(function (name) { return name !== "loss"; })[0] || names[0];
    box.appendChild(card("Steps", t.whole(run.version), notes.filter(Boolean).join(" · "), "active"));
    box.appendChild(card("Loss", t.figure(run.loss), metrics(run.measured) || "of the last step"));
    box.appendChild(card(first || "Metric", first ? t.figure(run.metrics[first]) : "—",
      first ? "evaluated at version " + t.whole(run.evaluated) : "no evaluation yet", "success"));
    box.appendChild(card("Examples a second", t.whole(run.rate), t.known(run.workers) ?
      (run.workers === 1 ? "1 worker" : run.workers + " workers") : ""));
  }

  function waits(run) {
    var box = t.clear(by("run-waits"));
    box.hidden = !run.waits.length;
    if (!run.waits.length) { return; }
    box.appendChild(el("h2", { text: "Waits for" }));
    box.appendChild(el("ul", {}, run.waits.map(function (wait) {
      return el("li", {}, [
        wait.what + " ",
        el("span", { "class": "runs-note", text: "for " + t.duration(run.now - wait.since) + " · " + wait.ends })
      ]);
    })));
  }

  function untold(run) {
    var box = t.clear(by("run-untold"));
    box.hidden = !run.untold.length;
    if (!run.untold.length) { return; }
    box.appendChild(el("h2", { text: "Not told" }));
    box.appendChild(el("ul", {}, run.untold.map(function (said) { return el("li", { text: said }); })));
  }

  function failure(run) {
    by("run-failure").hidden = !run.failure.message;
    by("run-failure-message").textContent = run.failure.message;
    by("run-failure-traceback").textContent = run.failure.traceback;
    by("run-failure-traceback").hidden = !run.failure.traceback;
    by("run-failure-log").hidden = !run.failure.log.length;
    by("run-failure-lines").textContent = run.failure.log.join("\n");
    by("run-problem").textContent = run.problem;
    by("run-problem").hidden = !run.problem;
  }

  function lists(run) {
    replaced("run-crew", table(["Worker", "Shards", "Seconds each", "Again", ""], run.crew.map(function (one) {
      return [one.worker, t.whole(one.shards), t.figure(one.seconds / one.shards, 3), t.whole(one.again),
        one.alive ? "alive" : "gone, last at version " + one.last];
    }), "No shard is computed yet."));
    replaced("run-evaluations", table(["Version", "Metrics"], run.evaluations.slice().reverse().map(function (one) {
      return [t.whole(one[0]), metrics(one[1])];
    }), "No evaluation yet."));
    replaced("run-checkpoints", el("p", { "class": "runs-note", text: run.checkpoints.length ?
      "Versions " + run.checkpoints.join(", ") + " in " + run.checkpoint_dir :
      "None that this Flower can see in " + run.checkpoint_dir }));
    replaced("run-events", table(["When", "What", ""], run.events.slice().reverse().map(function (event) {
      return [t.moment(event.at), event.type, words(event.data)];
    }), "No events: Redis keeps the last 5,000, steps among them."));
    var counted = Object.keys(run.counted).filter(function (name) { return run.counted[name]; });
    var facts = [["submitted", t.moment(run.submitted_at)], ["training server", run.server || "none"],
      ["computed with", run.environment || "—"]].concat(counted.map(function (name) {
        return [name, t.whole(run.counted[name])];
      }));
    replaced("run-spec", el("div", {}, [
      table(["", ""], facts.concat(Object.keys(run.recipe).map(function (name) {
        return [name, el("code", { text: JSON.stringify(run.recipe[name]) })];
      })).concat(Object.keys(run.config).map(function (name) {
        return [name, el("code", { text: JSON.stringify(run.config[name]) })];
      })).concat(Object.keys(run.switches).map(function (step) {
        return ["from step " + step, el("code", { text: JSON.stringify(run.switches[step]) })];
      })), "")
    ]));
  }

  // --- curves and timeline ---

  var charts = {}, curves = null, range = null, asking = false;
  var panel = t.charts.controls(by("chart-tools"), ["step", "time"], drawCurves);
  panel.all.addEventListener("click", function () { zoomed(null, null); });

  function zoomed(from, to) {
    if (!curves || (range && range.from === from && range.to === to)) { return; }  // each chart says it
    if (from === null) {
      range = null;
    } else {
      var axis = panel.view.axis, known = curves.series.loss;
      var first = t.charts.stepAt(known, axis, from), last = t.charts.stepAt(known, axis, to);
      range = { from: from, to: to, first: Math.max(0, first), last: Math.max(first + 1, last) };
    }
    panel.all.hidden = !range;
    askCurves();
  }

  function chartOf(name, title, format) {
    if (!charts[name]) { charts[name] = t.charts.chart(by("charts"), title, format, zoomed); }
    return charts[name];
  }

  function drawCurves() {
    if (!curves) { return; }
    t.charts.QUANTITIES.forEach(function (quantity) {
      var name = quantity[0], lines = [{ label: name === "loss" ? "training" : quantity[1].toLowerCase(),
        curve: curves.series[name] }];
      if (name === "loss" && curves.metrics.loss) {
        lines.push({ label: "evaluation", curve: curves.metrics.loss, points: true });
      }
      chartOf(name, quantity[1], quantity[2]).show(lines, panel.view);
    });
    Object.keys(Object.assign({}, curves.measured, curves.metrics)).sort().forEach(function (name) {
      var lines = [];
      if (curves.measured[name]) { lines.push({ label: "training", curve: curves.measured[name] }); }
      if (curves.metrics[name] && name !== "loss") {
        lines.push({ label: "evaluation", curve: curves.metrics[name], points: true });
      }
      if (lines.length) { chartOf("metric " + name, name, t.figure).show(lines, panel.view); }
    });
  }

  function askCurves() {
    if (asking) { return; }
    asking = true;
    var wanted = range, more = wanted ? "&first=" + wanted.first + "&last=" + wanted.last : "";
    var have = curves && curves.range === wanted ? "&have=" + encodeURIComponent(curves.mark) : "";
    t.ask(page.dataset.run + "/curves?points=800" + more + have).then(function (found) {
      if (wanted !== range) { return; }
      if (found.series) { curves = found; curves.range = wanted; drawCurves(); }
    }).catch(function () {}).then(function () {  // the light says why
      asking = false;
      if (wanted !== range) { askCurves(); }
    });
  }

  var lookAtTimeline = t.timeline(by("timeline"), page.dataset.run + "/timeline");

  by("run-audit").addEventListener("click", function () {
    var button = by("run-audit"), said = t.clear(by("run-audit-said"));
    button.disabled = true;
    said.textContent = "Reading the ledger…";
    t.ask(page.dataset.run + "/audit").then(function (found) {
      said.textContent = "";
      said.appendChild(el("p", { "class": found.ok ? "runs-good" : "runs-error", text: found.said }));
      said.appendChild(el("ul", {}, found.problems.map(function (problem) { return el("li", { text: problem }); })));
      if (found.left_out) { said.appendChild(el("p", { text: "and " + found.left_out + " more" })); }
    }).catch(function (error) {
      said.textContent = error.message;
    }).then(function () { button.disabled = false; });
  });

  // --- buttons, where Flower was started with any ---

  var possible = {
    pause: ["pending", "running"], resume: ["paused", "failed", "on disk"],
    cancel: ["pending", "running", "paused", "failed"]
  };
  var questions = {
    pause: "Shards at work finish and are kept, and no other begins until the run is resumed.",
    resume: "The run goes on from its last step.",
    cancel: "This ends the run for good. What it computed stays readable for a week."
  };

  function buttons(state) {
    document.querySelectorAll("[data-verb]").forEach(function (button) {
      button.hidden = possible[button.dataset.verb].indexOf(state) < 0;
    });
  }

  function confirmed(verb) {
    var dialog = by("run-dialog"), yes = by("run-dialog-yes");
    by("run-dialog-said").textContent = verb.charAt(0).toUpperCase() + verb.slice(1) + " run " + page.dataset.name +
      "? " + questions[verb];
    by("run-dialog-error").textContent = "";
    yes.textContent = verb.charAt(0).toUpperCase() + verb.slice(1);
    yes.className = "btn " + (verb === "cancel" ? "btn-danger" : "btn-primary");
    yes.disabled = false;
    yes.onclick = function () {
      yes.disabled = true;
      t.ask(page.dataset.run + "/" + verb, {
        method: "POST", headers: { "X-XSRFToken": document.querySelector("#run-verbs [name=_xsrf]").value }
      }).then(function () {
        dialog.close();
        look();
      }).catch(function (error) {
        yes.disabled = false;
        by("run-dialog-error").textContent = error.message;
      });
    };
    dialog.showModal();
  }

  if (by("run-verbs")) {
    by("run-dialog-no").addEventListener("click", function () { by("run-dialog").close(); });
    document.querySelectorAll("[data-verb]").forEach(function (button) {
      button.addEventListener("click", function () { confirmed(button.dataset.verb); });
    });
  }

  var drawnAt = "";
  var light = t.light(by("runs-dot"), by("runs-said"));
  var look = t.follow(page.dataset.run + "/overview", 2, function (run) {
    t.clear(by("run-state")).appendChild(t.badge(run.state));
    var behind = run.loaded < run.version;
    light.live(behind ? "step " + t.whole(run.loaded) + " of " + t.whole(run.version) + " read" : "live");
    buttons(run.state);
    figures(run);
    waits(run);
    failure(run);
    untold(run);
    lists(run);
    askCurves();
    if (!drawnAt || drawnAt !== run.version + run.state) { lookAtTimeline(); }
    drawnAt = run.version + run.state;
  }, light.failed);
}());
