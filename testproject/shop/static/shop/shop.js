"use strict";

// Asks for the figures once a second and draws what they were over two minutes.
(() => {
  const room = document.querySelector("[data-figures]");
  const chart = room.querySelector("[data-chart]");
  const history = [];
  const SECONDS = 120;

  const hue = (pid) => (Number(pid) * 47) % 360;
  const count = (number) => number.toLocaleString("en");
  const bytes = (number) => `${(number / 2 ** 20).toFixed(1)} MiB`;
  const seconds = (number) => (number < 60 ? `${number.toFixed(0)} s` : `${(number / 60).toFixed(1)} min`);

  const colour = (chip, pid) => {
    chip.style.setProperty("--hue", hue(pid));
    chip.textContent = pid;
  };

  const show = (figures) => {
    const text = {
      requests: count(figures.requests),
      updates: count(figures.updates),
      statements: count(figures.statements),
      dirty: count(figures.dirty),
      sessions: count(figures.sessions),
      oldest: figures.dirty && figures.oldest ? seconds(figures.oldest) : "none",
      flush: figures.flush ? `${seconds(figures.flush.age)} ago, ${count(figures.flush.rows)} rows` : "not yet",
      used: bytes(figures.used),
      size: bytes(figures.size),
    };
    for (const [name, value] of Object.entries(text)) {
      room.querySelector(`[data-figure="${name}"]`).textContent = value;
    }
    colour(room.querySelector('[data-figure="worker"]'), figures.worker);
    const oldest = room.querySelector('[data-meter="oldest"]');
    oldest.max = figures.interval * 1.5;
    oldest.high = figures.interval * 1.25;
    oldest.value = figures.oldest;
    room.querySelector('[data-meter="used"]').value = figures.used / figures.size;
  };

  const draw = () => {
    const rates = (name) => history.slice(1).map((now, i) => Math.max(0, now[name] - history[i][name]) / Math.max(0.5, now.at - history[i].at));
    const series = { updates: rates("updates"), statements: rates("statements") };
    const top = Math.max(5, ...series.updates, ...series.statements) * 1.1;
    const x = (i, length) => 600 - (length - 1 - i) * (600 / SECONDS);
    const y = (value) => 118 - (value / top) * 114;
    const points = (values) => values.map((value, i) => `${x(i, values.length).toFixed(1)},${y(value).toFixed(1)}`);
    const line = (name) => `<polyline class="line-${name}" points="${points(series[name]).join(" ")}"/>`;
    const outline = points(series.updates);
    const area = outline.length > 1
      ? `<polygon class="area-updates" points="${outline[0].split(",")[0]},118 ${outline.join(" ")} 600,118"/>`
      : "";
    chart.innerHTML = `<line class="grid" x1="0" y1="118" x2="600" y2="118"/><line class="grid" x1="0" y1="61" x2="600" y2="61"/>${area}${line("updates")}${line("statements")}`;
  };

  const look = async () => {
    try {
      const answer = await fetch(room.dataset.figures, { cache: "no-store" });
      const figures = await answer.json();
      history.push({ at: performance.now() / 1000, updates: figures.updates, statements: figures.statements });
      if (history.length > SECONDS + 1) history.shift();
      show(figures);
      draw();
      room.classList.remove("stale");
    } catch {
      room.classList.add("stale");
    }
  };

  const page = document.querySelector("[data-worker]");
  colour(page, page.dataset.worker);
  look();
  setInterval(() => { if (!document.hidden) look(); }, 1000);
})();
