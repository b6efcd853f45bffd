// What the pages about runs share: elements, figures in words, and asking again and again.
// Names, worker ids, events and messages are strangers' text: they become text nodes, never markup.
(function () {
  "use strict";

  var SVG = "http://www.w3.org/2000/svg";

  function filled(node, attributes, children) {
    Object.keys(attributes || {}).forEach(function (name) {
      var value = attributes[name];
      if (value === null || value === undefined || value === false) { return; }
      if (name === "text") { node.textContent = value; return; }
      if (name.slice(0, 2) === "on") { node.addEventListener(name.slice(2), value); return; }
      node.setAttribute(name, value === true ? "" : String(value));
    });
    (children || []).forEach(function (child) {
      if (child === null || child === undefined) { return; }
      node.appendChild(typeof child === "string" ? document.createTextNode(child) : child);
    });
    return node;
  }

  function el(name, attributes, children) {
    return filled(document.createElement(name), attributes, children);
  }

  function svg(name, attributes, children) {
    return filled(document.createElementNS(SVG, name), attributes, children);
  }

  function clear(node) {
    while (node.firstChild) { node.removeChild(node.firstChild); }
    return node;
  }

  function known(value) {
    return value !== null && value !== undefined;
  }

  function figure(value, digits) {
    if (!known(value)) { return "—"; }
    var size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e7)) { return value.toExponential(Math.max(0, (digits || 4) - 1)); }
    if (size >= 1000) { return Math.round(value).toLocaleString("en"); }
    return String(Number(value.toPrecision(digits || 4)));
  }

  function whole(value) {
    return known(value) ? Math.round(value).toLocaleString("en") : "—";
  }

  function bytes(value) {
    if (!known(value)) { return "—"; }
    var units = ["B", "kB", "MB", "GB", "TB"];
    var place = 0;
    while (value >= 1000 && place < units.length - 1) { value /= 1000; place += 1; }
    return Number(value.toPrecision(3)) + " " + units[place];
  }

  function duration(seconds) {
    if (!known(seconds)) { return "—"; }
    seconds = Math.max(0, seconds);
    if (seconds < 1) { return Math.round(seconds * 1000) + " ms"; }
    if (seconds < 10) { return seconds.toFixed(1) + " s"; }
    if (seconds < 60) { return Math.round(seconds) + " s"; }
    var minutes = Math.floor(seconds / 60);
    if (minutes < 60) { return minutes + " min"; }
    var hours = Math.floor(minutes / 60);
    if (hours < 48) { return hours + " h " + (minutes % 60) + " min"; }
    return Math.floor(hours / 24) + " days";
  }

  function moment(seconds) {
    return known(seconds) ? new Date(seconds * 1000).toLocaleString() : "—";
  }

  function badge(state) {
    var kinds = { running: "active", done: "good", failed: "bad", unreadable: "bad", paused: "warn", pending: "warn" };
    return el("span", { "class": "runs-badge runs-badge-" + (kinds[state] || "rest"), text: state });
  }

  function ask(address, options) {
    return fetch(address, Object.assign({ credentials: "same-origin", cache: "no-store" }, options || {}))
      .catch(function () { throw new Error("Flower does not answer"); })
      .then(function (reply) {
        var kind = reply.headers.get("Content-Type") || "";
        if (kind.indexOf("application/json") !== 0) {
          throw new Error(reply.ok || reply.status === 401 ? "log in again: reload the page" :
            "Flower answered " + reply.status);
        }
        return reply.json().then(function (found) {
          if (!reply.ok) { throw new Error(found.error || "Flower answered " + reply.status); }
          return found;
        });
      });
  }

  // Asks an address now and every so many seconds, more seldom while it fails or nobody looks.
  function follow(address, seconds, show, failed) {
    var failures = 0, timer = null, busy = false;
    function again() {
      clearTimeout(timer);
      timer = setTimeout(look, 1000 * Math.min(30, seconds * Math.pow(2, Math.min(failures, 4))));
    }
    function look() {
      if (busy) { return; }
      if (document.hidden) { again(); return; }
      busy = true;
      ask(typeof address === "function" ? address() : address).then(function (found) {
        failures = 0;
        show(found);
      }).catch(function (error) {
        failures += 1;
        failed(error.message);
      }).then(function () { busy = false; again(); });
    }
    document.addEventListener("visibilitychange", function () { if (!document.hidden) { look(); } });
    look();
    return look;
  }

  // The small sign at the top that says whether what is shown is of now.
  function light(dot, said) {
    return {
      live: function (text) {
        dot.className = "status-dot status-dot-live";
        said.textContent = text;
      },
      failed: function (text) {
        dot.className = "status-dot status-dot-error";
        said.textContent = text;
      }
    };
  }

  window.torchord = {
    el: el, svg: svg, clear: clear, known: known, figure: figure, whole: whole, bytes: bytes, duration: duration,
    moment: moment, badge: badge, ask: ask, follow: follow, light: light
  };
}());
