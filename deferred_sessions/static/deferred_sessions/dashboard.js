"use strict";

// The dashboard of the admin: asks for the figures every few seconds, and draws them with uPlot.
// Works under `script-src 'self'; style-src 'self'`.
(() => {
  const board = document.querySelector("[data-figures]");
  if (!board) return;
  const REFRESH = Number(board.dataset.refresh) * 1000;
  const SECONDS = { "15m": 900, "1h": 3600, "24h": 86400 };
  const HEIGHT = 190;
  const language = document.documentElement.lang || undefined;
  const find = (selector) => board.querySelector(selector);
  const all = (selector) => [...board.querySelectorAll(selector)];

  // What figures look like.

  const whole = new Intl.NumberFormat(language, { maximumFractionDigits: 0 });
  const fine = new Intl.NumberFormat(language, { maximumFractionDigits: 1 });
  const count = (n) => (n == null ? "-" : Math.abs(n) < 10 ? fine.format(n) : whole.format(n));
  const share = (n) => (n == null ? "-" : `${fine.format(100 * n)} %`);
  const bytes = (n) => {
    if (n == null) return "-";
    const units = ["B", "KiB", "MiB", "GiB"];
    let unit = 0;
    for (; n >= 1024 && unit < 3; unit++) n /= 1024;
    return `${fine.format(n)} ${units[unit]}`;
  };
  const seconds = (n) => {
    if (n == null) return "-";
    if (n && n < 1) return `${count(n * 1000)} ms`;
    if (n < 120) return `${count(n)} s`;
    return n < 7200 ? `${count(n / 60)} min` : `${count(n / 3600)} h`;
  };
  const clock = new Intl.DateTimeFormat(language, { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
  const exact = new Intl.DateTimeFormat(language, { timeStyle: "medium", hourCycle: "h23" });

  // Charts.

  const CHARTS = {
    traffic: [
      { name: "requests", label: "requests", colour: "--ds-c3" },
      { name: "updates", label: "updates", colour: "--ds-c1", fill: true },
      { name: "writes", label: "writes", colour: "--ds-c2" },
    ],
    dirty: [{ name: "dirty", label: "dirty", colour: "--ds-c1", fill: true }],
    oldest: [{ name: "oldest", label: "age", colour: "--ds-c1", fill: true, text: seconds }],
    flush: [{ name: "flush_seconds", label: "duration", colour: "--ds-c1", fill: true, text: seconds }],
    batch: [{ name: "batch", label: "rows", colour: "--ds-c2", fill: true, sparse: true }],
    overlap: [
      { name: "merges", label: "merges", colour: "--ds-c1" },
      { name: "conflicts", label: "conflicts", colour: "--ds-c2" },
      { name: "lock_waits", label: "lock waits", colour: "--ds-c3" },
    ],
  };
  const drawn = new Map();
  let columns = { at: [] };
  let span = find("[data-span][aria-pressed=true]").dataset.span;
  let latest = Date.now() / 1000;

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // The value under the cursor, or else the latest there is.
  const shown = (plot, value, series, place) =>
    place == null ? plot.data[series].findLast((each) => each != null) : value;

  const chart = (room, lines) => {
    const quiet = colour("--body-quiet-color");
    const hairline = colour("--hairline-color");
    const font = `11px ${getComputedStyle(board).fontFamily}`;
    const text = lines[0].text || count;
    const axis = { stroke: quiet, font, ticks: { show: false }, grid: { stroke: hairline, width: 1 } };
    return new uPlot(
      {
        width: Math.max(200, room.clientWidth),
        height: HEIGHT,
        padding: [8, 8, 0, 0],
        cursor: { points: { size: 7 }, drag: { x: false, y: false }, y: false },
        legend: { live: true },
        scales: {
          x: { time: true, range: () => [latest - SECONDS[span], latest] },
          y: { range: (_, low, high) => [0, high > 0 ? high * 1.12 : text === count ? 4 : 1] },
        },
        series: [
          { label: "at", value: (...of) => { const at = shown(...of); return at == null ? "-" : exact.format(at * 1000); } },
          ...lines.map((line) => ({
            label: line.label,
            stroke: colour(line.colour),
            fill: line.fill ? colour(line.colour) + "26" : undefined,
            width: 2,
            spanGaps: Boolean(line.sparse),
            points: { show: Boolean(line.sparse), size: 5, fill: colour(line.colour) },
            value: (...of) => text(shown(...of)),
          })),
        ],
        axes: [
          { ...axis, grid: { show: false }, size: 26, space: 60, values: (_, times) => times.map((at) => clock.format(at * 1000)) },
          { ...axis, size: 52, space: 34, values: (_, values) => values.map(text) },
        ],
      },
      [columns.at, ...lines.map((line) => columns[line.name] || [])],
      room,
    );
  };

  const draw = () => {
    for (const [name, lines] of Object.entries(CHARTS)) {
      const room = find(`[data-chart="${name}"] > div`);
      const known = drawn.get(name);
      if (known) known.setData([columns.at, ...lines.map((line) => columns[line.name] || columns.at.map(() => null))]);
      else drawn.set(name, chart(room, lines));
    }
  };

  const redraw = () => {
    for (const known of drawn.values()) known.destroy();
    drawn.clear();
    draw();
  };

  // Figures.

  const set = (name, text) => all(`[data-text="${name}"]`).forEach((place) => { place.textContent = text; });
  const alarm = (name, is) => find(`[data-card="${name}"]`).classList.toggle("ds-alarm", Boolean(is));
  const meter = (name, value) => { find(`[data-meter="${name}"]`).value = value; };

  const notice = (level, title, text) => {
    const box = document.createElement("p");
    box.className = `ds-notice ds-${level}`;
    const head = document.createElement("strong");
    head.textContent = title;
    const rest = document.createElement("span");
    rest.textContent = text;
    box.append(head, rest);
    return box;
  };

  const tell = (...boxes) => {
    const room = find("[data-notices]");
    const said = boxes.map((box) => box.outerHTML).join("");
    if (room.dataset.said !== said) { // else a screen reader would say it again each time
      room.dataset.said = said;
      room.replaceChildren(...boxes);
    }
  };

  const showRates = () => {
    const last = columns.at.length - 1;
    all("[data-value]").forEach((place) => {
      place.textContent = last < 0 ? "-" : count(columns[place.dataset.value][last]);
    });
  };

  const showState = (figures) => {
    const { now, counters, interval } = figures;
    const saved = now.writes_avoided + counters.STATEMENTS;
    set("avoided", whole.format(now.writes_avoided));
    set("avoided_share", saved ? share(now.writes_avoided / saved) : "-");
    set("dirty", whole.format(now.dirty));
    set("sessions", whole.format(now.sessions));
    set("oldest", now.oldest ? seconds(now.oldest) : board.dataset.none);
    set("interval", seconds(interval));
    set("hit_rate", share(now.hit_rate));
    set("used", bytes(now.used));
    set("size", bytes(now.size));
    set("lock_mean", seconds(counters.LOCK_WAITS ? counters.LOCK_WAIT_MILLISECONDS / counters.LOCK_WAITS / 1000 : 0));
    set("refused", figures.refused == null ? board.dataset.none : whole.format(figures.refused));
    meter("dirty", now.sessions ? now.dirty / now.sessions : 0);
    meter("oldest", now.oldest / interval);
    meter("store", now.used / now.size);
    alarm("oldest", now.oldest > 2 * interval);
    alarm("store", now.used > 0.92 * now.size);
    alarm("refused", figures.refused);
  };

  const showFlush = ({ now }) => {
    const flush = now.flush;
    set("poller", now.poller_age == null ? board.dataset.none : `${seconds(Math.round(now.poller_age))} ago`);
    set("poller_note", flush && flush.by !== "poller" ? `last flush by: ${flush.by}` : "");
    set("flush_rows", flush ? whole.format(flush.rows) : "-");
    set("flush_note", flush ? `in ${seconds(flush.seconds)}, ${seconds(Math.round(flush.age))} ago, ${count(flush.remaining)} left` : "-");
    set("journal", now.journal ? bytes(now.journal.active) : board.dataset.none);
    set("journal_note", now.journal ? `${bytes(now.journal.unsynced)} not synced, ${bytes(now.journal.retired)} retired` : "");
    alarm("poller", now.is_poller_dead);
  };

  const showNodes = (nodes) => {
    const room = find("[data-nodes]");
    room.replaceChildren(...nodes.map((node) => {
      const row = document.createElement("tr");
      const dot = document.createElement("i");
      dot.className = node.is_alive ? "ds-dot" : "ds-dot ds-off";
      const name = node.is_here ? `${node.name} (${room.dataset.here})` : node.name;
      const state = node.is_alive ? room.dataset.alive : `${room.dataset.dead}: ${seconds(node.seen)}`;
      for (const text of [name, state, count(node.sessions), count(node.dirty)]) {
        row.insertCell().textContent = text;
      }
      row.cells[1].prepend(dot);
      return row;
    }));
  };

  const show = (figures) => {
    columns = figures.series;
    latest = figures.at;
    board.classList.remove("ds-stale");
    tell(...figures.notices.map(({ level, title, text }) => notice(level, title, text)));
    all("[data-total]").forEach((place) => { place.textContent = whole.format(figures.counters[place.dataset.total]); });
    set("node", figures.nodes[0].name);
    set("at", exact.format(figures.at * 1000));
    showRates();
    showState(figures);
    showFlush(figures);
    showNodes(figures.nodes);
    draw();
  };

  let answered = new Date();
  const look = async () => {
    try {
      const answer = await fetch(`${board.dataset.figures}?span=${span}`, { cache: "no-store", redirect: "error" });
      const figures = await answer.json();
      if (figures.error) throw new Error(figures.error);
      answered = new Date();
      show(figures);
    } catch (error) {
      board.classList.add("ds-stale");
      tell(notice("error", `${board.dataset.lost} ${exact.format(answered)}`, error instanceof TypeError ? "" : error.message));
    }
  };

  all("[data-span]").forEach((button) => button.addEventListener("click", () => {
    span = button.dataset.span;
    all("[data-span]").forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
    look();
  }));
  new MutationObserver(redraw).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  new ResizeObserver(() => {
    for (const [name, known] of drawn) {
      const width = find(`[data-chart="${name}"] > div`).clientWidth;
      if (width && width !== known.width) known.setSize({ width, height: HEIGHT });
    }
  }).observe(board);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
  setInterval(() => { if (!document.hidden) look(); }, REFRESH);
  look();
})();
