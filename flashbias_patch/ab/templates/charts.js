(function () {
  "use strict";
  var SVG = "http://www.w3.org/2000/svg";
  var charts = JSON.parse(document.getElementById("charts").textContent);
  var DASHES = ["", "7 4", "2 3", "9 3 2 3"];

  function el(name, attributes, parent, text) {
    var node = document.createElementNS(SVG, name);
    for (var key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    if (parent) parent.appendChild(node);
    return node;
  }
  function number(v) {
    if (v === null || v === undefined) return "\u2013";
    var size = Math.abs(v);
    if (size && (size < 1e-3 || size >= 1e6)) return v.toExponential(2);
    return String(+v.toPrecision(size >= 1000 ? 5 : 4));
  }
  function onAxis(v, step) {  // with the decimals that tell it from its neighbours
    var decimals = Math.max(0, 1 - Math.floor(Math.log10(step || 1)));
    return decimals > 5 || Math.abs(v) >= 1e6 ? number(v) : String(+v.toFixed(decimals));
  }
  function power(v) { return "1e" + Math.round(Math.log10(v)); }
  function ticks(low, high, count) {
    var raw = (high - low) / Math.max(1, count), unit = Math.pow(10, Math.floor(Math.log10(raw)));
    var step = [1, 2, 2.5, 5, 10].map(function (m) { return m * unit; }).find(function (s) { return s >= raw * 0.999; });
    var found = [];
    for (var v = Math.ceil(low / step) * step; v <= high + step * 1e-6; v += step) found.push(Math.abs(v) < step * 1e-9 ? 0 : v);
    return found;
  }
  function powers(low, high) {
    var first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9), found = [];
    var each = Math.max(1, Math.ceil((last - first + 1) / 6));
    for (var p = first; p <= last; p += each) found.push(Math.pow(10, p));
    return found;
  }
  function finite(list) { return list.filter(function (v) { return v !== null && v !== undefined; }); }

  function Chart(figure, chart) {
    var plot = figure.querySelector(".plot"), legend = figure.querySelector(".legend");
    var hidden = {}, bars = chart.kind === "bars", stride = chart.stride || 1, counts = {};
    chart.series.forEach(function (series) {
      var made = counts[series.side] || 0;
      series.dash = DASHES[made % DASHES.length];
      counts[series.side] = made + 1;
    });

    function entry(name, draw) {
      var button = document.createElement("button");
      button.type = "button";
      button.setAttribute("aria-pressed", "true");
      button.appendChild(draw());
      button.appendChild(document.createTextNode(name));
      button.onclick = function () {
        hidden[name] = !hidden[name];
        button.setAttribute("aria-pressed", String(!hidden[name]));
        render();
      };
      legend.appendChild(button);
    }
    chart.series.forEach(function (series) {
      entry(series.name, function () {
        var icon = el("svg", { width: 20, height: 10 }), color = "var(--" + series.side.toLowerCase() + ")";
        if (bars) el("rect", { width: 12, height: 10, x: 4, rx: 2, fill: color, opacity: 0.7 }, icon);
        else el("line", { x1: 0, x2: 20, y1: 5, y2: 5, stroke: color, "stroke-width": 2.5, "stroke-dasharray": series.dash }, icon);
        return icon;
      });
    });
    if (chart.band) entry(chart.band.name, function () {
      var icon = el("svg", { width: 20, height: 10 });
      el("rect", { width: 20, height: 10, rx: 2, fill: "var(--a)", opacity: 0.25 }, icon);
      return icon;
    });

    function shown() { return chart.series.filter(function (s) { return !hidden[s.name]; }); }

    function range() {
      var values = [];
      shown().forEach(function (s) { values = values.concat(finite(s.values)); });
      if (bars) return [0, Math.max.apply(null, values.concat([0.01])) * 1.08];
      if (chart.log) {
        if (chart.band && !hidden[chart.band.name]) values = values.concat(finite(chart.band.high));
        values = values.filter(function (v) { return v > 0; });
        if (!values.length) return [1e-8, 1];
        return [Math.pow(10, Math.floor(Math.log10(Math.min.apply(null, values)))), Math.pow(10, Math.ceil(Math.log10(Math.max.apply(null, values)) + 1e-9))];
      }
      if (!values.length) return [0, 1];
      var low = Math.min.apply(null, values), high = Math.max.apply(null, values);
      if (chart.band && !hidden[chart.band.name]) {
        // The band may widen the picture, not flatten the curves in it.
        var most = (high - low || Math.abs(high) * 0.02) * 0.6;
        low = Math.max(low - most, Math.min.apply(null, finite(chart.band.low).concat([low])));
        high = Math.min(high + most, Math.max.apply(null, finite(chart.band.high).concat([high])));
      }
      if (chart.top) { high = Math.min(high, chart.top); low = Math.min(low, 0); }
      if (chart.unit === "MiB") low = 0;
      var least = Math.abs(high) * 0.004 || 1e-9;
      if (high - low < least) { low -= least / 2; high += least / 2; }
      var margin = (high - low) * 0.06;
      return [low === 0 ? 0 : low - margin, high + margin];
    }

    function render() {
      plot.textContent = "";
      var width = plot.clientWidth, height = width < 420 ? 220 : 250;
      if (!width) return;
      var yr = range(), ylabels = chart.log ? powers(yr[0], yr[1]) : ticks(yr[0], yr[1], 5);
      var words = ylabels.map(function (v) {
        return chart.log ? power(v) : bars ? Math.round(v * 100) + "%" : onAxis(v, ylabels[1] - ylabels[0]);
      });
      var left = 16 + 7 * Math.max.apply(null, words.map(function (w) { return w.length; })), right = width - 10, top = 22, bottom = height - 38;
      var count = bars ? 0 : Math.max.apply(null, chart.series.map(function (s) { return s.values.length; }));
      var xr = bars ? [chart.edges[0], chart.edges[chart.edges.length - 1]] : [0, Math.max(1, (count - 1) * stride)];
      var x = function (v) { return left + (v - xr[0]) / (xr[1] - xr[0]) * (right - left); };
      var y = function (v) {
        var share = chart.log ? Math.log10(Math.max(v, yr[0]) / yr[0]) / Math.log10(yr[1] / yr[0]) : (v - yr[0]) / (yr[1] - yr[0]);
        return bottom - share * (bottom - top);
      };
      var svg = el("svg", { viewBox: "0 0 " + width + " " + height, height: height, role: "img", "aria-label": chart.title + ": " + chart.y + " by " + chart.x }, plot);
      var clip = "clip" + Math.random().toString(36).slice(2);
      el("rect", { x: left, y: top - 4, width: right - left, height: bottom - top + 4 }, el("clipPath", { id: clip }, el("defs", {}, svg)));
      ylabels.forEach(function (v, i) {
        el("line", { x1: left, x2: right, y1: y(v), y2: y(v), "class": "grid" }, svg);
        el("text", { x: left - 8, y: y(v) + 4, "text-anchor": "end" }, svg, words[i]);
      });
      var longest = Math.max.apply(null, (chart.ticks || [""]).map(function (t) { return t.length; }));
      var room = Math.max(80, 13 * longest);  // an end's label is beside its place, not over it
      ticks(xr[0], xr[1], Math.max(1, Math.floor((right - left) / room))).forEach(function (v) {
        if (!bars && v % 1) return;
        el("text", { x: x(v), y: bottom + 17, "text-anchor": x(v) > right - 12 ? "end" : chart.ticks && v === 0 ? "start" : "middle" }, svg, chart.ticks ? chart.ticks[v] || "" : number(v));
      });
      el("line", { x1: left, x2: right, y1: bottom, y2: bottom, "class": "axis" }, svg);
      el("text", { x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, svg, chart.x);
      el("text", { x: 2, y: 11 }, svg, chart.y);
      var inside = el("g", { "clip-path": "url(#" + clip + ")" }, svg);
      if (chart.warmup) {
        el("rect", { x: left, y: top, width: Math.max(0, x(Math.min(chart.warmup, xr[1])) - left), height: bottom - top, "class": "warm" }, inside);
        if (x(chart.warmup) - left > 56) el("text", { x: left + 5, y: top + 12 }, inside, "warm-up");
      }
      if (chart.band && !hidden[chart.band.name]) {
        var upper = [], lower = [];
        chart.band.high.forEach(function (v, i) {
          if (v === null) return;
          var floor = chart.band.low[i] === null ? yr[0] : chart.band.low[i];
          upper.push(x(i * stride) + " " + y(v));
          lower.unshift(x(i * stride) + " " + y(floor));
        });
        if (upper.length) el("path", { d: "M" + upper.concat(lower).join("L") + "Z", "class": "band" }, inside);
      }
      shown().forEach(function (series) {
        var side = series.side.toLowerCase();
        if (bars) {
          series.values.forEach(function (v, i) {
            if (v) el("rect", { x: x(chart.edges[i]) + 0.5, width: Math.max(1, x(chart.edges[i + 1]) - x(chart.edges[i]) - 1), y: y(v), height: bottom - y(v), "class": "bar " + side }, inside);
          });
          return;
        }
        var path = "", pen = "M";
        series.values.forEach(function (v, i) {
          if (v === null) { pen = "M"; return; }
          path += pen + x(i * stride).toFixed(1) + " " + y(v).toFixed(1);
          pen = "L";
        });
        el("path", { d: path, "class": side, "stroke-width": 2, "stroke-dasharray": series.dash, "stroke-linejoin": "round" }, inside);
        if (chart.labels) series.values.forEach(function (v, i) {  // one with no neighbour has no line
          if (v !== null) el("circle", { cx: x(i * stride), cy: y(v), r: 3.5, style: "fill:var(--" + side + ")" }, svg);
        });
      });
      if (chart.mark !== null && chart.mark !== undefined) {
        el("line", { x1: x(chart.mark), x2: x(chart.mark), y1: top, y2: bottom, "class": "mark" }, svg);
        var late = x(chart.mark) > (left + right) / 2;
        el("text", { x: x(chart.mark) + (late ? -5 : 5), y: top + 12, "text-anchor": late ? "end" : "start", "class": "marked" }, svg, "diverges at step " + chart.mark);
      }
      hover(svg, { left: left, right: right, top: top, bottom: bottom, x: x, xr: xr });
    }

    function hover(svg, at) {
      var cross = null, tip = null;
      function leave() { if (cross) { cross.remove(); tip.remove(); cross = tip = null; } }
      svg.addEventListener("pointerleave", leave);
      svg.addEventListener("pointermove", function (event) {
        var box = svg.getBoundingClientRect(), px = event.clientX - box.left;
        var share = Math.min(1, Math.max(0, (px - at.left) / (at.right - at.left)));
        var last = (bars ? chart.edges.length - 1 : Math.max.apply(null, chart.series.map(function (s) { return s.values.length; }))) - 1;
        var index = bars ? Math.min(last, Math.floor(share * (last + 1))) : Math.round(share * (at.xr[1] - at.xr[0]) / stride);
        index = Math.max(0, Math.min(last, index));
        var where = at.x(bars ? (chart.edges[index] + chart.edges[index + 1]) / 2 : index * stride);
        if (!cross) {
          cross = el("line", { y1: at.top, y2: at.bottom, "class": "cross" }, svg);
          tip = document.createElement("div");
          tip.className = "tip";
          plot.appendChild(tip);
        }
        cross.setAttribute("x1", where);
        cross.setAttribute("x2", where);
        tip.textContent = "";
        var head = document.createElement("div");
        head.textContent = bars ? number(chart.edges[index]) + " to " + number(chart.edges[index + 1]) + " " + chart.unit : chart.labels ? chart.labels[index] : "step " + index * stride;
        tip.appendChild(head);
        shown().forEach(function (series) {
          var row = document.createElement("div"), dot = document.createElement("i"), v = series.values[index];
          dot.className = "dot " + series.side.toLowerCase();
          row.appendChild(dot);
          row.appendChild(document.createTextNode(series.name + "  " + (bars ? (100 * v).toFixed(1) + "%" : number(v) + (v === null || v === undefined ? "" : " " + (chart.unit || "")))));
          tip.appendChild(row);
        });
        var room = plot.clientWidth - tip.offsetWidth;
        tip.style.left = Math.max(0, Math.min(room, where > plot.clientWidth / 2 ? where - tip.offsetWidth - 12 : where + 12)) + "px";
      });
    }

    var drawn = plot.clientWidth;
    render();
    new ResizeObserver(function () {
      requestAnimationFrame(function () {
        if (plot.clientWidth !== drawn) { drawn = plot.clientWidth; render(); }
      });
    }).observe(plot);
  }

  document.querySelectorAll("[data-chart]").forEach(function (figure) { Chart(figure, charts[+figure.dataset.chart]); });
})();
