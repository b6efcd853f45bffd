// The list of runs.
(function () {
  "use strict";

  var t = window.torchord, el = t.el;
  var page = document.getElementById("runs-page");
  var lines = [], chosen = [], asked = 0, order = { column: "age", down: false };

  function metric(run) {
    var names = Object.keys(run.metrics || {}).filter(function (name) { return name !== "loss"; }).sort();
    return names.length ? run.metrics[names[0]] : (run.metrics || {}).loss;
  }

  function metricCell(run) {
    var names = Object.keys(run.metrics || {}).sort(function (one, other) {
      return (one === "loss") - (other === "loss") || (one < other ? -1 : 1);
    });
    if (!names.length) { return ["—"]; }
    return [
      t.figure(run.metrics[names[0]]),
      el("small", { "class": "runs-note", text: names[0] + " of version " + run.evaluated })
    ];
  }

  function progress(run) {
    if (!t.known(run.version)) { return ["—"]; }
    var said = t.whole(run.version) + (t.known(run.total) ? " of " + t.whole(run.total) : " steps");
    var left = t.known(run.left_seconds) ? t.duration(run.left_seconds) + " left" : "";
    return [
      t.known(run.total) ? el("progress", {
        max: run.total, value: run.version, "aria-label": "steps of " + run.name
      }) : null,
      el("span", { "class": "runs-steps", text: said }),
      left ? el("small", { "class": "runs-note", text: left }) : null
    ];
  }

  // What it waits for, unless that is what every running run waits for at any moment.
  function waiting(run) {
    return run.waits.filter(function (wait) {
      return run.state !== "running" || asked - wait.since > 5;
    });
  }

  function waits(run) {
    if (run.error) { return [el("span", { "class": "runs-error", title: run.error, text: run.error })]; }
    var found = waiting(run);
    if (!found.length) { return [el("span", { "class": "runs-note runs-nothing", text: "—" })]; }
    var more = found.length > 1 ? " (and " + (found.length - 1) + " more)" : "";
    return [
      el("span", { "class": "runs-wait", text: found[0].what + more }),
      el("small", {
        "class": "runs-note", text: "for " + t.duration(asked - found[0].since) + " · " + found[0].ends
      })
    ];
  }

  var columns = [
    { key: "chosen", title: "Compare", plain: true },
    { key: "name", title: "Run", value: function (run) { return run.name; } },
    { key: "progress", title: "Steps", wide: true, value: function (run) {
      return t.known(run.total) && run.total ? run.version / run.total : -1;
    }, down: true },
    { key: "loss", title: "Loss", number: true, value: function (run) { return run.loss; } },
    { key: "metric", title: "Metric", number: true, value: metric, down: true },
    { key: "rate", title: "Examples/s", number: true, value: function (run) { return run.rate; }, down: true },
    { key: "workers", title: "Workers", number: true, value: function (run) { return run.workers; }, down: true },
    { key: "age", title: "Age", number: true, value: function (run) {
      return t.known(run.submitted_at) ? -run.submitted_at : null;
    } },
    { key: "waits", title: "Waits for", wide: true, value: function (run) {
      return run.error || (waiting(run)[0] || {}).what || null;
    } }
  ];

  function choice(run) {
    var box = el("input", { type: "checkbox", "class": "form-check-input", "aria-label": "compare " + run.name });
    box.checked = chosen.indexOf(run.name) >= 0;
    box.addEventListener("change", function () {
      chosen = chosen.filter(function (name) { return name !== run.name; });
      if (box.checked) { chosen.push(run.name); }
      compare();
    });
    return box;
  }

  function compare() {
    var link = document.getElementById("runs-compare");
    link.hidden = !chosen.length;
    link.textContent = chosen.length < 2 ? "Compare: choose another" : "Compare " + chosen.length;
    link.classList.toggle("disabled", chosen.length < 2 || chosen.length > 8);
    if (chosen.length > 8) { link.textContent = "Compare: at most 8"; }
    link.href = page.dataset.compare + "?" + chosen.map(function (name) {
      return "run=" + encodeURIComponent(name);
    }).join("&");
  }

  function cells(run) {
    var address = page.dataset.run.replace("NAME", encodeURIComponent(run.name));
    return [
      [choice(run)],
      [el("a", { href: address, "class": "runs-link", text: run.name }), t.badge(run.state)],
      progress(run),
      [t.figure(run.loss)],
      metricCell(run),
      [t.whole(run.rate)],
      [t.whole(run.workers)],
      [el("span", {
        title: t.moment(run.submitted_at),
        text: t.known(run.submitted_at) ? t.duration(asked - run.submitted_at) : "—"
      })],
      waits(run)
    ];
  }

  function matches(run) {
    var words = document.getElementById("runs-search").value.toLowerCase().split(/\s+/);
    var state = document.getElementById("runs-state").value;
    var text = [run.name, run.state, run.error].concat(run.waits.map(function (wait) {
      return wait.what;
    })).join(" ").toLowerCase();
    return (!state || run.state === state) && words.every(function (word) { return text.indexOf(word) >= 0; });
  }

  function compared(one, other) {
    var column = columns.filter(function (each) { return each.key === order.column; })[0];
    var a = column.value(one), b = column.value(other);
    if (!t.known(a) || !t.known(b)) { return t.known(b) - t.known(a); }  // what is not known comes last
    var found = typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
    return (order.down ? -found : found) || one.name.localeCompare(other.name, "en", { numeric: true });
  }

  function draw() {
    var body = t.clear(document.querySelector("#runs-table tbody"));
    var shown = lines.filter(matches).sort(compared);
    shown.forEach(function (run) {
      body.appendChild(el("tr", { "data-run": run.name }, cells(run).map(function (content, place) {
        var column = columns[place];
        return el("td", {
          "class": "runs-" + column.key + (column.number ? " runs-number" : ""), "data-title": column.title
        }, content);
      })));
    });
    document.querySelectorAll("#runs-table th[data-column]").forEach(function (head) {
      var own = head.dataset.column === order.column;
      head.setAttribute("aria-sort", own ? (order.down ? "descending" : "ascending") : "none");
    });
    document.getElementById("runs-order").value = order.column + (order.down ? " down" : "");
    var empty = document.getElementById("runs-empty");
    empty.hidden = shown.length > 0;
    empty.textContent = lines.length ? "No run matches." :
      "No runs yet: master.submit(recipe, config, name=…) makes one.";
  }

  function states() {
    var select = document.getElementById("runs-state"), chosen = select.value;
    var found = Array.from(new Set(lines.map(function (run) { return run.state; }))).sort();
    t.clear(select).appendChild(el("option", { value: "", text: "All states" }));
    found.forEach(function (state) { select.appendChild(el("option", { value: state, text: state })); });
    if (chosen && found.indexOf(chosen) < 0) { select.appendChild(el("option", { value: chosen, text: chosen })); }
    select.value = chosen;
  }

  function count(wanted) {
    return t.whole(lines.filter(wanted).length);
  }

  function sortBy(key) {
    var column = columns.filter(function (each) { return each.key === key; })[0];
    order = { column: key, down: order.column === key ? !order.down : Boolean(column.down) };
    draw();
  }

  var head = document.querySelector("#runs-table thead tr");
  columns.forEach(function (column) {
    if (column.plain) {
      head.appendChild(el("th", { scope: "col" }, [el("span", { "class": "visually-hidden", text: column.title })]));
      return;
    }
    head.appendChild(el("th", {
      scope: "col", "data-column": column.key, "class": column.number ? "runs-number" : ""
    }, [el("button", { type: "button", text: column.title, onclick: function () { sortBy(column.key); } })]));
    [Boolean(column.down), !column.down].forEach(function (down) {
      document.getElementById("runs-order").appendChild(el("option", {
        value: column.key + (down ? " down" : ""), text: "By " + column.title.toLowerCase() + (down ? " ↓" : " ↑")
      }));
    });
  });
  document.getElementById("runs-order").addEventListener("change", function (event) {
    var words = event.target.value.split(" ");
    order = { column: words[0], down: words[1] === "down" };
    draw();
  });
  document.getElementById("runs-tools").addEventListener("submit", function (event) { event.preventDefault(); });
  document.getElementById("runs-search").addEventListener("input", draw);
  document.getElementById("runs-state").addEventListener("change", draw);

  var light = t.light(document.getElementById("runs-dot"), document.getElementById("runs-said"));
  t.follow(page.dataset.lines, 2, function (found) {
    lines = found.runs;
    asked = found.now;
    light.live(found.workers === 1 ? "1 worker lives" : found.workers + " workers live");
    document.getElementById("runs-running").textContent = count(function (run) { return run.state === "running"; });
    document.getElementById("runs-waiting").textContent = count(function (run) {
      return run.state === "pending" || run.state === "paused";
    });
    document.getElementById("runs-done").textContent = count(function (run) { return run.state === "done"; });
    document.getElementById("runs-failed").textContent = count(function (run) {
      return run.state === "failed" || run.state === "unreadable";
    });
    states();
    draw();
  }, function (message) {
    light.failed(message);
    if (!lines.length) { document.getElementById("runs-empty").textContent = message; }
  });
}());
