// Who computed which shard when: a lane for each worker, and marks for what happened.
(function () {
  "use strict";

  var t = window.torchord, el = t.el, svg = t.svg;
  var LANE = 22, TOP = 30, RIGHT = 8;

  function lane(found, place, x, left) {
    var y = TOP + place * LANE;
    var nodes = [svg("text", { x: left - 8, y: y + 15, "text-anchor": "end", "class": "lane-name" }, [
      short(found.worker), svg("title", { text: found.worker + (found.alive ? "" : ": gone") })
    ])];
    found.bars.forEach(function (bar) {
      var many = bar[3] > 1;
      nodes.push(svg("rect", {
        x: x(bar[0]), y: y + 3, width: Math.max(1, x(bar[1]) - x(bar[0]) - 0.5), height: LANE - 6,
        "class": bar[4] > 1 ? "lane-bar lane-again" : "lane-bar", "fill-opacity": Math.max(0.15, bar[2])
      }, [svg("title", { text: (many ? bar[3] + " shards of versions " + Math.round(bar[0] + 1) + " to " +
        Math.round(bar[1]) : "a shard of version " + Math.ceil(bar[1] - 1e-9)) + ": " + t.duration(bar[5]) +
        (bar[4] > 1 ? ", try " + bar[4] + ": one before was lost, late or handed back" : "") +
        (many ? ", " + Math.round(100 * bar[2]) + " % of the time" : "") })]));
    });
    return nodes;
  }

  function short(worker) {
    return worker.length > 24 ? worker.slice(0, 11) + "…" + worker.slice(-12) : worker;
  }

  function gone(found, place, x, last) {
    var end = found.bars.length ? Math.max.apply(null, found.bars.map(function (bar) { return bar[1]; })) : 0;
    if (found.alive || end >= last) { return null; }
    return svg("text", { x: x(end) + 4, y: TOP + place * LANE + 16, "class": "lane-gone", text: "✕" }, [
      svg("title", { text: "gone: no heartbeat, and no shard after version " + Math.ceil(end) })
    ]);
  }

  var COLORS = { server: "active", failed: "bad", rollback: "bad", "evaluation lost": "bad", refused: "warn",
    paused: "warn", discarded: "warn", skipped: "warn", evaluation: "good", done: "good", resumed: "good", restored: "warn" };

  function mark(found, x, bottom) {
    return svg("g", { "class": "lane-mark lane-mark-" + (COLORS[found.kind] || "rest") }, [
      svg("line", { x1: x(found.step), x2: x(found.step), y1: 16, y2: bottom }),
      svg("circle", { cx: x(found.step), cy: 14, r: 4 }),
      svg("title", { text: "version " + found.step + ", " + t.moment(found.at) + "\n" + found.text })
    ]);
  }

  function drawn(found, width) {
    var left = width < 520 ? 96 : 190;
    var bottom = TOP + found.lanes.length * LANE + 4;
    function x(step) {
      return left + (width - left - RIGHT) * (step - found.first + 1) / Math.max(1, found.last - found.first + 1);
    }
    var picture = svg("svg", { viewBox: "0 0 " + width + " " + (bottom + 18), width: width, height: bottom + 18,
      role: "img", "aria-label": "Shards by worker, versions " + found.first + " to " + found.last });
    found.lanes.forEach(function (one, place) {
      if (place % 2 === 0) {
        picture.appendChild(svg("rect", { x: left, y: TOP + place * LANE, width: Math.max(0, width - left - RIGHT),
          height: LANE, "class": "lane-ground" }));
      }
    });
    found.lanes.forEach(function (one, place) {
      lane(one, place, x, left).forEach(function (node) { picture.appendChild(node); });
      var sign = found.moving ? gone(one, place, x, found.last) : null;
      if (sign) { picture.appendChild(sign); }
    });
    found.marks.forEach(function (one) { picture.appendChild(mark(one, x, bottom)); });
    [[found.first, "start", left], [found.last, "end", width - RIGHT]].forEach(function (end) {
      picture.appendChild(svg("text", { x: end[2], y: bottom + 13, "text-anchor": end[1], "class": "lane-step",
        text: "version " + t.whole(end[0]) }));
    });
    return picture;
  }

  // box: where it goes; address: what to ask. Returns what asks anew.
  function timeline(box, address) {
    var range = null, found = null, busy = false, width = 0;
    var place = el("div", { "class": "lane-box" }), said = el("p", { "class": "runs-note lane-said" });
    var names = [["Earlier", -1], ["Later", 1], ["Wider", "wide"], ["Closer", "near"], ["All", "all"], ["Newest", "new"]];
    box.appendChild(el("div", { "class": "lane-tools" }, names.map(function (name) {
      return el("button", { type: "button", "class": "btn btn-sm btn-outline-secondary", text: name[0],
        onclick: function () { moved(name[1]); } });
    })));
    box.appendChild(place);
    box.appendChild(said);

    function moved(way) {
      if (!found) { return; }
      var count = found.last - found.first + 1, first = found.first, last = found.last;
      if (way === "all") { first = 1; last = found.newest; }
      else if (way === "new") { range = null; look(); return; }
      else if (way === "wide") { first -= Math.ceil(count / 2); last += Math.ceil(count / 2); }
      else if (way === "near") { first += Math.floor(count / 4); last -= Math.floor(count / 4); }
      else { first += way * count; last += way * count; }
      if (first < 1) { last = Math.min(found.newest, last + 1 - first); first = 1; }
      if (last > found.newest) { first = Math.max(1, first - (last - found.newest)); last = found.newest; }
      range = [first, Math.max(first, last)];
      look();
    }

    function show() {
      if (!found.lanes.length) {
        t.clear(place).appendChild(el("p", { "class": "runs-note", text: "No shard is computed yet." }));
        said.textContent = "";
        return;
      }
      width = Math.max(280, place.clientWidth);
      t.clear(place).appendChild(drawn(found, width));
      said.textContent = t.moment(found.from) + " to " + t.moment(found.to) + ". " + (found.group > 1 ?
        found.group + " steps a bar; the darker, the more of the time was computing. " : "") + (found.every > 1 ?
        "Every " + found.every + "th step was looked at. " : "") + (found.left_out ?
        found.left_out + " more workers have no lane. " : "") + "Orange: a second try. Rest on a bar or mark to read it.";
    }

    function look() {
      if (busy) { return; }
      busy = true;
      t.ask(address + (range ? "?first=" + range[0] + "&last=" + range[1] : "")).then(function (answer) {
        found = answer;
        show();
      }).catch(function (error) {
        if (!found) { t.clear(place).appendChild(el("p", { "class": "runs-error", text: error.message })); }
      }).then(function () { busy = false; });
    }

    new ResizeObserver(function () {
      requestAnimationFrame(function () {
        if (found && Math.abs(place.clientWidth - width) > 2) { show(); }
      });
    }).observe(place);
    return look;
  }

  window.torchord.timeline = timeline;
}());
