"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const FIRST_CURVES = 6; // curves that are drawn before any is chosen
  const MOST_CELLS = 60; // runs in a matrix: more could not be told apart
  const COLOURS = 8;
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const DASH_ARRAYS = ["", "5 3", "1.5 2.5", "6 2.5 1.5 2.5"];
  const plots = []; // {element, draw}; drawn again for another theme or width

  // Elements: text only ever gets in as text.
  const SVG = "http://www.w3.org/2000/svg";
  function make(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value === true) element.setAttribute(name, "");
      else if (value !== false && value !== null) element.setAttribute(name, value);
    }
    element.append(...children.flat().filter((child) => child !== null));
    return element;
  }
  const h = (tag, attributes, ...children) => make(document.createElement(tag), attributes, children);
  const s = (tag, attributes, ...children) => make(document.createElementNS(SVG, tag), attributes, children);

  // Numbers.
  const count = (value) => value.toLocaleString("en-US");
  const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
  const fixed = (value, digits = 4) => value.toFixed(digits);
  const signed = (value, digits = 4) => (value < 0 ? "\u2212" : "+") + Math.abs(value).toFixed(digits);
  const within = (low, high, show = fixed) => `95% ${show(low)} to ${show(high)}`;
  const percent = (share) => `${(100 * share).toFixed(1)}%`;
  const p_of = (p) => (p < 0.001 ? "p < 0.001" : `p = ${p.toFixed(p < 0.1 ? 3 : 2)}`);
  const verdict = (p, word) => `${p < data.alpha ? word : "not told apart"} (${p_of(p)})`;
  function duration(seconds) {
    const minutes = Math.round(seconds / 60);
    if (minutes < 1) return `${Math.round(seconds)} s`;
    return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  }
  function size(parameters) {
    if (parameters < 1e4) return count(parameters);
    return parameters < 1e6 ? `${(parameters / 1e3).toFixed(0)} k` : `${(parameters / 1e6).toFixed(2)} M`;
  }
  // A long name breaks where its words end.
  const breakable = (text) =>
    text.split(/(?<=[_.\-/])(?=\p{L})/u).flatMap((word, index) => (index ? [h("wbr"), word] : [word]));
  // Beginnings and ends tell names apart.
  function short(name, most) {
    const letters = Array.from(name);
    if (letters.length <= most) return name;
    const tail = Math.floor((most - 1) / 2);
    return `${letters.slice(0, most - 1 - tail).join("")}\u2026${tail ? letters.slice(-tail).join("") : ""}`;
  }
  // Plotly reads a little HTML in its texts.
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const tally = (names) => {
    const votes = new Map();
    for (const name of names) votes.set(name, (votes.get(name) || 0) + 1);
    if (votes.size === 1) return `${names[0]} by all`;
    return [...votes]
      .sort((a, b) => b[1] - a[1])
      .map(([name, n]) => `${name} by ${n}`)
      .join(", ");
  };

  // Tables whose headers sort.
  function sorter(table, columns) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, index) => {
      head.firstChild.addEventListener("click", () => {
        const first = columns[index].down ? "descending" : "ascending";
        const other = first === "ascending" ? "descending" : "ascending";
        const order = head.getAttribute("aria-sort") === first ? other : first;
        heads.forEach((each) => each.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", order);
        const sign = order === "ascending" ? 1 : -1;
        const rows = [...table.tBodies[0].rows];
        const value = (row) => row.cells[index].dataset.value;
        rows.sort((a, b) => {
          const [left, right] = [value(a), value(b)];
          if (left === "" || right === "") return (left === "") - (right === ""); // what is not known comes last
          if (columns[index].number) return sign * (Number(left) - Number(right));
          return sign * left.localeCompare(right, "en", { numeric: true });
        });
        table.tBodies[0].append(...rows);
      });
    });
  }
  function table(columns, items, { sortable = false, caption = "", sorted = null } = {}) {
    const heads = columns.map((column, index) =>
      h(
        "th",
        {
          scope: "col",
          class: `${column.number && !column.wide ? "n" : ""} ${column.sticky ? "sticky" : ""}`,
          "aria-sort": sorted === index ? (column.down ? "descending" : "ascending") : null,
          title: column.about || null,
        },
        sortable ? h("button", { type: "button" }, column.title) : breakable(column.title),
      ),
    );
    const rows = items.map((item, place) =>
      h(
        "tr",
        null,
        columns.map((column) => {
          const value = column.value ? column.value(item, place) : null;
          const shown = column.show ? column.show(item, place) : value === null ? "\u2013" : breakable(String(value));
          const attributes = { "data-value": value === null ? "" : String(value) };
          if (column.head) {
            return h("th", { scope: "row", class: column.sticky ? "sticky" : "", ...attributes }, shown);
          }
          return h("td", { class: column.number && !column.wide ? "n" : column.style || "", ...attributes }, shown);
        }),
      ),
    );
    const made = h(
      "table",
      { "aria-label": caption || null },
      h("thead", null, h("tr", null, heads)),
      h("tbody", null, rows),
    );
    const heads_of_rows = columns
      .filter((column) => column.head)
      .flatMap((column) => items.map((item) => column.value(item)));
    made.style.setProperty("--letters", Math.max(0, ...heads_of_rows.map((name) => Array.from(name).length)) + 2);
    if (sortable) sorter(made, columns);
    return made;
  }
  const boxed = (made, label, tall = false) =>
    h("div", { class: tall ? "scroll tall" : "scroll", tabindex: "0", role: "region", "aria-label": label }, made);

  function interval(run, low, high) {
    const x = (value) => 5 + (110 * (value - low)) / (high - low || 1);
    const ends = [run.score - 1.96 * run.standard_error, run.score + 1.96 * run.standard_error];
    return s(
      "svg",
      { width: 120, height: 16, viewBox: "0 0 120 16", "aria-hidden": "true" },
      s("line", { class: "axis", x1: 0, x2: 120, y1: 8, y2: 8 }),
      s("line", { x1: x(ends[0]), x2: x(ends[1]), y1: 8, y2: 8 }),
      s("circle", { cx: x(run.score), cy: 8, r: 3.5 }),
    );
  }

  // Sections of a group.
  function runs_card(group, id) {
    const low = Math.min(...group.runs.map((run) => run.score - 1.96 * run.standard_error));
    const high = Math.max(...group.runs.map((run) => run.score + 1.96 * run.standard_error));
    const columns = [
      { title: "#", number: true, value: (_, place) => place + 1, about: "Rank by the score" },
      { title: "Run", head: true, sticky: true, value: (run) => run.name },
      {
        title: group.metric_title,
        number: true,
        wide: true,
        down: group.greater_is_better,
        value: (run) => run.score,
        show: (run) =>
          h(
            "div",
            { class: "score" },
            `${fixed(run.score)} \u00b1 ${fixed(run.standard_error)}`,
            interval(run, low, high),
          ),
        about: "With its standard error; the line is the 95% interval",
      },
      {
        title: "Against the best",
        number: true,
        wide: true,
        style: "tight",
        down: true,
        value: (run) => run.told_from_best,
        show: (run) => (run.told_from_best === null ? "\u2013" : verdict(run.told_from_best, "worse")),
        about: "Holm-corrected over all runs of the table",
      },
      { title: "Marks", value: (run) => run.marks.join(" ") || null, show: (run) => tags(run.marks) },
      { title: "Data", style: "tight", value: (run) => run.track },
      { title: "Folds", number: true, value: (run) => run.folds },
      {
        title: "Seeds",
        number: true,
        value: (run) => run.seeds,
        show: (run) => (run.seed_std === null ? `${run.seeds}` : `${run.seeds} (sd ${fixed(run.seed_std)})`),
        about: "With the standard deviation of the score over seeds",
      },
      {
        title: "TTA gain",
        number: true,
        down: true,
        value: (run) => run.tta_gain,
        show: (run) =>
          run.tta_gain === null
            ? "\u2013"
            : signed(run.tta_gain) + (run.tta_error === null ? "" : ` \u00b1 ${fixed(run.tta_error)}`),
        about: "Score with less score without test-time augmentation, with its paired standard error where it is kept",
      },
      {
        title: "Parameters",
        number: true,
        down: true,
        value: (run) => run.parameters,
        show: (run) => (run.parameters === null ? "\u2013" : size(run.parameters)),
      },
      { title: "Wall time", number: true, value: (run) => run.wall_s, show: (run) => duration(run.wall_s) },
      { title: "Device", style: "tight", value: (run) => run.device || null },
    ];
    const made = table(columns, group.runs, { sortable: true, caption: `Runs of ${group.title}`, sorted: 0 });
    const status = h("span", { class: "soft", role: "status" });
    const filter = h("input", {
      type: "search",
      "aria-label": "Show the runs that hold this text",
      placeholder: "Filter",
      oninput: () => {
        const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
        let shown = 0;
        for (const row of made.tBodies[0].rows) {
          const text = row.textContent.toLowerCase();
          row.hidden = !words.every((word) => text.includes(word));
          shown += row.hidden ? 0 : 1;
        }
        status.textContent = words.length ? `${shown} of ${plural(group.runs.length, "run")}` : "";
      },
    });
    return card(
      `${id}-runs`,
      "Runs",
      group.best ? h("p", null, best_line(group)) : null,
      group.runs.length > 5 ? h("div", { class: "controls" }, filter, status) : null,
      boxed(made, "Table of runs"),
    );
  }
  const tags = (marks) =>
    marks.length
      ? h(
          "span",
          null,
          marks.map((mark) => h("span", { class: "tag" }, mark)),
        )
      : "\u2013";
  function best_line(group) {
    const { best } = group;
    const corrected = `${fixed(best.score)} \u00b1 ${fixed(best.standard_error)} (${within(best.low, best.high)})`;
    return (
      `The best of ${count(best.chosen_among)} is partly the luckiest: ${fixed(best.naive)} on the images that chose it, ` +
      `${corrected} without that luck.`
    );
  }

  function neighbours_card(group, id) {
    const columns = [
      {
        title: "Run, and the next",
        head: true,
        value: (pair) => pair.better,
        show: (pair) => [...breakable(pair.better), h("div", { class: "next" }, "over ", breakable(pair.worse))],
      },
      { title: "Is it real?", style: "tight", value: (pair) => verdict(pair.p_corrected, "better") },
      {
        title: "Difference",
        number: true,
        value: (pair) => `${signed(pair.gain)} \u00b1 ${fixed(pair.standard_error)}`,
      },
      { title: "95% interval", number: true, value: (pair) => `${signed(pair.low)} to ${signed(pair.high)}` },
      { title: "p alone", number: true, value: (pair) => p_of(pair.p).replace("p = ", "").replace("p ", "") },
    ];
    return card(
      `${id}-real`,
      "Is the difference real?",
      h(
        "p",
        { class: "soft" },
        "Each run and the next one of the table, on the same images. \u201cNot told apart\u201d does not mean equal: the " +
          "images are too few to tell. The p in words is corrected for all the pairs of this table (Holm), the last column is not.",
      ),
      boxed(
        table(columns, group.neighbours, { caption: "Neighbours" }),
        "Table of neighbours",
        group.neighbours.length > 10,
      ),
    );
  }

  function curves_card(group, id) {
    const with_curves = group.runs.map((run, index) => ({ run, index })).filter(({ run }) => run.curves !== null);
    const chosen = new Set(with_curves.slice(0, FIRST_CURVES).map(({ index }) => index));
    const boxes = with_curves.map(({ run, index }) => {
      const box = h("input", {
        type: "checkbox",
        onchange: () => {
          if (box.checked) chosen.add(index);
          else chosen.delete(index);
          draw();
        },
      });
      box.checked = chosen.has(index);
      const line = s("line", { x1: 0, x2: 22, y1: 5, y2: 5, "stroke-width": 2.5 });
      line.style.stroke = `var(--c${index % COLOURS})`;
      line.style.strokeDasharray = DASH_ARRAYS[Math.floor(index / COLOURS) % DASHES.length];
      const swatch = s("svg", { width: 22, height: 10, "aria-hidden": "true" }, line);
      return { index, box, label: h("label", null, box, swatch, run.name) };
    });
    const panels = group.panels.map((panel) => {
      const element = h("div", { class: "plot", role: "img", "aria-label": `${panel.title} by epoch` });
      plots.push({ element, draw: () => draw_curves(element, group, panel, chosen) });
      return { panel, element, node: h("div", null, h("h4", null, panel.title), element) };
    });
    function draw() {
      for (const { panel, element } of panels) draw_curves(element, group, panel, chosen);
    }
    function choose(wanted) {
      chosen.clear();
      for (const { index, box } of boxes) {
        box.checked = wanted(index);
        if (box.checked) chosen.add(index);
      }
      draw();
    }
    const first = new Set(with_curves.slice(0, FIRST_CURVES).map(({ index }) => index));
    const buttons = [
      h("button", { type: "button", onclick: () => choose(() => true) }, "All"),
      h("button", { type: "button", onclick: () => choose(() => false) }, "None"),
    ];
    if (with_curves.length > FIRST_CURVES) {
      buttons.push(
        h("button", { type: "button", onclick: () => choose((index) => first.has(index)) }, `Best ${FIRST_CURVES}`),
      );
    }
    const missing = group.runs.filter((run) => run.curves === null).map((run) => run.name);
    return card(
      `${id}-curves`,
      "Learning curves",
      h(
        "p",
        { class: "soft" },
        "On what each fold holds out, mean over folds and seeds; the band is one standard deviation over them to either " +
          "side. A curve ends where its shortest fold ends.",
        h("span", { class: "hint" }, " Drag to zoom, double-click to go back."),
      ),
      missing.length ? h("p", null, `Without a history that can be read: ${missing.join(", ")}.`) : null,
      with_curves.length > 1 ? h("div", { class: "controls" }, buttons) : null,
      h(
        "fieldset",
        { class: "chips", "aria-label": "Runs whose curves are drawn" },
        boxes.map(({ label }) => label),
      ),
      h(
        "div",
        { class: panels.length > 1 ? "two" : "" },
        panels.map(({ node }) => node),
      ),
    );
  }

  function matrices_card(group, id) {
    const shown = Math.min(group.runs.length, MOST_CELLS);
    const names = group.runs.slice(0, shown).map((run) => run.name);
    const part = (matrix) => matrix.slice(0, shown).map((row) => row.slice(0, shown));
    const cells = (text) => names.map((_, i) => names.map((__, j) => (i === j ? "" : text(i, j))));
    const pair = (i, j) => `${plain(names[i])}<br>with ${plain(names[j])}<br>`;
    const disagreement = h("div", { class: "plot", role: "img", "aria-label": "How often two runs disagree" });
    const gain = h("div", { class: "plot", role: "img", "aria-label": "What blending two runs would gain" });
    const [d, g, e] = [group.disagreement, group.pair_gain, group.pair_gain_error];
    const half = (i, j) => (group.disagreement_high[i][j] - group.disagreement_low[i][j]) / 2;
    plots.push({
      element: disagreement,
      draw: () =>
        draw_heat(disagreement, {
          rows: ranked(names),
          columns: names.map((_, index) => `${index + 1}`),
          z: part(d),
          scale: "sequential",
          inside: cells((i, j) => `${percent(d[i][j])}<br>\u00b1${percent(half(i, j) / 1.96)}`),
          hover: cells(
            (i, j) =>
              `${pair(i, j)}differ on ${percent(d[i][j])}<br>` +
              within(group.disagreement_low[i][j], group.disagreement_high[i][j], percent),
          ),
        }),
    });
    plots.push({
      element: gain,
      draw: () =>
        draw_heat(gain, {
          rows: ranked(names),
          columns: names.map((_, index) => `${index + 1}`),
          z: part(g),
          scale: "diverging",
          inside: cells((i, j) => `${signed(g[i][j])}<br>\u00b1${fixed(e[i][j])}`),
          hover: cells((i, j) => `${pair(i, j)}${signed(g[i][j])} \u00b1 ${fixed(e[i][j])}<br>over the better one`),
        }),
    });
    const cut = group.runs.length > shown ? ` The best ${shown} of ${group.runs.length} runs are drawn.` : "";
    return card(
      `${id}-pairs`,
      "Pairs of runs",
      h(
        "p",
        { class: "soft" },
        `Numbers are the ranks of the table; \u00b1 is one standard error. Point at a cell, or tap it, for its figures.${cut}`,
      ),
      h(
        "div",
        { class: shown <= 16 ? "two" : "" },
        h("div", null, h("h4", null, "How often two runs disagree: share of images"), disagreement),
        h("div", null, h("h4", null, `What the mean of two would gain over the better: ${group.metric_title}`), gain),
      ),
    );
  }
  const ranked = (names) => names.map((name, index) => ({ lead: `${index + 1} `, name }));

  function recall_card(group, id) {
    const element = h("div", { class: "plot", role: "img", "aria-label": "Recall of each class by run" });
    const names = group.runs.map((run) => run.name);
    const known = (run, c) => run.recall[c] !== null;
    plots.push({
      element,
      draw: () =>
        draw_heat(element, {
          rows: ranked(names),
          columns: group.classes,
          z: group.runs.map((run) => run.recall),
          scale: "sequential",
          top: 1,
          spread: true,
          inside: group.runs.map((run) =>
            group.classes.map((_, c) =>
              known(run, c)
                ? `${fixed(run.recall[c], 2)}<br>${fixed(run.recall_low[c], 2)}\u2013${fixed(run.recall_high[c], 2)}`
                : "",
            ),
          ),
          hover: group.runs.map((run) =>
            group.classes.map((name, c) =>
              known(run, c)
                ? `${plain(run.name)}<br>${plain(name)}: ${fixed(run.recall[c], 3)}<br>` +
                  `${within(run.recall_low[c], run.recall_high[c], (v) => fixed(v, 3))}<br>of ${plural(group.support[c], "image")}`
                : "",
            ),
          ),
        }),
    });
    const absent = group.classes.filter((_, c) => !group.support[c]);
    return card(
      `${id}-recall`,
      "Recall of each class",
      h(
        "p",
        { class: "soft" },
        "Share of the images of a class that a run gets right, with 95% Wilson intervals, images taken as independent. " +
          "Point at a cell, or tap it, for its figures." +
          (absent.length ? ` No image is of: ${absent.join(", ")}.` : ""),
      ),
      element,
    );
  }

  function two_card(group, id) {
    const pick = (label, index) => {
      const select = h(
        "select",
        { onchange: () => show() },
        group.runs.map((run, i) => h("option", { value: i }, `${i + 1} ${run.name}`)),
      );
      select.value = index;
      return { select, node: h("label", null, label, select) };
    };
    const [left, right] = [pick("First", 0), pick("Second", 1)];
    const out = h("div", { "aria-live": "polite" });
    function show() {
      const [i, j] = [Number(left.select.value), Number(right.select.value)];
      out.replaceChildren(...(i === j ? [h("p", null, "Pick two different runs.")] : two(group, i, j)));
    }
    show();
    return card(`${id}-two`, "Two runs", h("div", { class: "controls" }, left.node, right.node), out);
  }
  function two(group, i, j) {
    const [a, b] = [group.runs[i], group.runs[j]];
    const d = group.differences;
    const [gain, error, p] = [d.gain[i][j], d.standard_error[i][j], d.p[i][j]];
    const score = (run) => `${fixed(run.score)} \u00b1 ${fixed(run.standard_error)}`;
    const change = `${fixed(Math.abs(gain))} \u00b1 ${fixed(error)} ${gain < 0 ? "worse" : "better"}`;
    const low = group.disagreement_low[i][j];
    const high = group.disagreement_high[i][j];
    const keys = [...new Set([...Object.keys(a.spec), ...Object.keys(b.spec)])].filter(
      (key) => a.spec[key] !== b.spec[key],
    );
    const spec = [
      { title: "Key", head: true, value: (key) => key },
      { title: a.name, style: "text", value: (key) => a.spec[key] ?? null },
      { title: b.name, style: "text", value: (key) => b.spec[key] ?? null },
    ];
    const classes = group.classes.map((name, c) => ({ name, c })).filter(({ c }) => group.support[c]);
    const recall = [
      { title: "Class", head: true, value: ({ name }) => name },
      { title: "Images", number: true, value: ({ c }) => count(group.support[c]) },
      { title: a.name, number: true, value: ({ c }) => shown_recall(a, c) },
      { title: b.name, number: true, value: ({ c }) => shown_recall(b, c) },
      {
        title: "First less second",
        number: true,
        value: ({ c }) => {
          const errors = group.recall_difference_error;
          const error = errors === null ? null : errors[c][i][j];
          return `${signed(a.recall[c] - b.recall[c], 3)}${error === null ? ", error not known" : ` \u00b1 ${fixed(error, 3)}`}`;
        },
      },
    ];
    return [
      h(
        "p",
        null,
        h("b", null, a.name),
        ` scores ${score(a)}, `,
        h("b", null, b.name),
        ` ${score(b)}. The first is ${change} (difference ${within(d.low[i][j], d.high[i][j], signed)}): `,
        h("b", null, verdict(p, gain < 0 ? "worse" : "better")),
        ", for this pair alone: the more pairs are looked at, the less a small p means.",
      ),
      h(
        "p",
        null,
        `They predict different classes for ${percent(group.disagreement[i][j])} of the images (${within(low, high, percent)}); ` +
          `the mean of both is ${signed(group.pair_gain[i][j])} \u00b1 ${fixed(group.pair_gain_error[i][j])} against the better one.`,
      ),
      h("h4", null, `What differs in their specs: ${plural(keys.length, "key")}`),
      keys.length
        ? boxed(table(spec, keys, { caption: "Differences of the specs" }), "Differences of the specs")
        : h("p", null, "Nothing but the name."),
      h("h4", null, "Recall of each class"),
      boxed(table(recall, classes, { caption: "Differences in recall" }), "Differences in recall"),
    ];
  }
  const shown_recall = (run, c) =>
    `${fixed(run.recall[c], 3)} [${fixed(run.recall_low[c], 3)}, ${fixed(run.recall_high[c], 3)}]`;

  function missed_card(group, id) {
    const { missed } = group;
    const [share, low, high] = group.missed_share;
    const told =
      `${plural(missed.length, "image")} of ${count(group.n_scored)}: ${percent(share)} (${within(low, high, percent)}). ` +
      "Those on which the runs agree most come first: there a label may be wrong.";
    const pictured = missed.filter((image) => image.picture !== null);
    const drawn = pictured.length && pictured.length < missed.length ? ` The first ${pictured.length} are drawn.` : "";
    const figures = pictured.map((image) =>
      h(
        "figure",
        null,
        h("img", { src: image.picture, alt: `Image ${image.id}` }),
        h(
          "figcaption",
          null,
          h("b", null, image.id),
          h("br"),
          `labelled ${image.label}`,
          h("br"),
          h("span", { class: "soft" }, `seen as ${tally(image.predicted)}`),
        ),
      ),
    );
    const columns = [
      { title: "Id", head: true, value: (image) => image.id },
      { title: "Label", value: (image) => image.label },
      { title: "Seen as", value: (image) => tally(image.predicted) },
    ];
    const all = h("details", null, h("summary", null, "All of them as a table"));
    all.addEventListener("toggle", () => {
      if (all.children.length === 1)
        all.append(
          boxed(
            table(columns, missed, { sortable: true, caption: "Images that every run gets wrong" }),
            "Images that every run gets wrong",
            true,
          ),
        );
    });
    if (!pictured.length) all.open = true;
    return card(
      `${id}-missed`,
      "Images that every run gets wrong",
      h("p", { class: "soft" }, missed.length ? told + drawn : "There is none."),
      missed.length && data.pictures_note ? h("p", null, data.pictures_note) : null,
      figures.length ? h("div", { class: "gallery" }, figures) : null,
      missed.length ? all : null,
    );
  }

  const card = (id, title, ...children) =>
    h(
      "section",
      { class: "card", id, "aria-labelledby": `${id}-title` },
      h("h3", { id: `${id}-title` }, title),
      children,
    );

  // Plots.
  const probe = h("span", { hidden: true });
  function colour(name) {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  }
  const faint = (rgb, alpha) => rgb.replace("rgb(", "rgba(").replace(")", `, ${alpha})`);
  let print_width = 0;
  const width_of = (element) => print_width || Math.max(240, Math.floor(element.clientWidth));
  const CONFIG = { displayModeBar: false, responsive: false, doubleClick: "reset", showTips: false };
  const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif';
  function base(width, height, margin) {
    return {
      width,
      height,
      margin,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: FONT, size: 12, color: colour("ink") },
      hoverlabel: {
        bgcolor: colour("card"),
        bordercolor: colour("soft"),
        font: { color: colour("ink"), size: 13 },
        align: "left",
      },
      showlegend: false,
    };
  }

  function draw_curves(element, group, panel, chosen) {
    const bands = [];
    const lines = [];
    let found = false;
    group.runs.forEach((run, index) => {
      const curve = run.curves && run.curves[panel.key];
      if (!curve) return;
      found = true;
      if (!chosen.has(index)) return;
      const paint = colour(`c${index % COLOURS}`);
      const points = curve.epoch.map((epoch, at) => ({
        epoch,
        mean: curve.mean[at],
        sd: curve.sd === null ? null : curve.sd[at],
      }));
      const known = points.filter((point) => point.mean !== null && point.sd !== null);
      bands.push({
        type: "scatter",
        x: [...known, ...[...known].reverse()].map((point) => point.epoch),
        y: [...known.map((point) => point.mean + point.sd), ...known.reverse().map((point) => point.mean - point.sd)],
        fill: "toself",
        fillcolor: faint(paint, 0.13),
        line: { width: 0 },
        mode: "lines",
        hoverinfo: "skip",
      });
      lines.push({
        type: "scatter",
        x: points.map((point) => point.epoch),
        y: points.map((point) => point.mean),
        mode: points.length > 1 ? "lines" : "markers",
        line: { color: paint, width: 2, dash: DASHES[Math.floor(index / COLOURS) % DASHES.length] },
        marker: { color: paint, size: 8 },
        hoverinfo: "text",
        text: points.map((point) => {
          if (point.mean === null) return "";
          const spread =
            point.sd === null ? "one unit: no spread is known" : `sd ${fixed(point.sd)} over ${curve.units} units`;
          return `${plain(run.name)}<br>epoch ${point.epoch}: ${fixed(point.mean)}<br>${spread}`;
        }),
      });
    });
    const width = width_of(element);
    const touch = !window.matchMedia("(pointer: fine)").matches;
    const axis = { gridcolor: colour("line"), linecolor: colour("line"), zeroline: false, fixedrange: touch };
    const note = found ? (lines.length ? "" : "no run is chosen") : "no run kept it";
    const layout = {
      ...base(width, Math.round(Math.min(380, Math.max(260, width * 0.62))), { l: 48, r: 10, t: 8, b: 42 }),
      xaxis: { ...axis, title: { text: "epoch", standoff: 8 }, rangemode: "tozero", visible: !note },
      yaxis: { ...axis, visible: !note },
      dragmode: touch ? false : "zoom",
      hovermode: "closest",
      annotations: note ? [{ text: note, showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 }] : [],
    };
    return Plotly.react(element, [...bands, ...lines], layout, CONFIG);
  }

  function draw_heat(element, { rows, columns, z, scale, inside, hover, top = null, spread = false }) {
    const width = width_of(element);
    const longest = Math.max(...rows.map(({ lead, name }) => lead.length + Array.from(name).length));
    const letters = Math.min(longest, width < 500 ? 15 : 30);
    const left = 12 + 6.9 * letters;
    const tall = rows.length <= 16 ? 44 : rows.length <= 40 ? 24 : 16;
    // Where the cells tell their figures, nobody needs a colour bar.
    const readable = (width - left - 10) / columns.length >= 50 && tall >= 40;
    const right = readable ? 10 : 58;
    const cell_width = Math.min((width - left - right) / columns.length, spread ? Infinity : 96);
    const widest = Math.min(20, Math.max(...columns.map((name) => Array.from(name).length)));
    const tilted = widest > 3 && widest * 7 > cell_width;
    const margin = {
      l: left,
      r: width - left - cell_width * columns.length,
      t: tilted ? 14 + 6.2 * widest : 26,
      b: 10,
    };
    const values = z.flat().filter((value) => value !== null);
    const most = Math.max(...values.map(Math.abs), 1e-6);
    const least = Math.max(0, Math.min(...values, most) - 0.1 * most);
    const colours =
      scale === "diverging"
        ? {
            colorscale: [
              [0, colour("less")],
              [0.5, colour("none")],
              [1, colour("much")],
            ],
            zmin: -most,
            zmax: most,
          }
        : {
            colorscale: [
              [0, colour("none")],
              [1, colour("much")],
            ],
            zmin: top === null ? least : 0,
            zmax: top === null ? most : top,
          };
    const every = (length, px) => Math.max(1, Math.ceil(px / length));
    const kept = (items, step) => items.map((_, index) => index).filter((index) => index % step === 0);
    const x = kept(columns, every(cell_width, tilted ? 13 : 7 * widest + 6));
    const y = kept(rows, every(tall, 13));
    const axis = {
      showgrid: false,
      zeroline: false,
      fixedrange: true,
      ticks: "outside",
      ticklen: 5,
      tickcolor: "rgba(0,0,0,0)",
    };
    const trace = {
      type: "heatmap",
      z,
      ...colours,
      xgap: columns.length > 30 ? 0.5 : 2,
      ygap: columns.length > 30 ? 0.5 : 2,
      hoverongaps: false,
      hoverinfo: "text",
      hovertext: hover,
      text: inside,
      texttemplate: readable ? "%{text}" : "",
      textfont: { size: cell_width >= 64 ? 12 : 10.5, color: colour("ink") },
      showscale: !readable,
      colorbar: {
        thickness: 9,
        outlinewidth: 0,
        x: 1,
        xpad: 8,
        tickfont: { size: 11 },
        nticks: 5,
        lenmode: "fraction",
        len: 1,
        ypad: 0,
      },
    };
    const layout = {
      ...base(width, Math.round(margin.t + margin.b + tall * Math.max(rows.length, 2)), margin),
      xaxis: {
        ...axis,
        side: "top",
        tickvals: x,
        ticktext: x.map((index) => plain(short(columns[index], 20))),
        tickangle: tilted ? -60 : 0,
        range: [-0.5, columns.length - 0.5],
      },
      yaxis: {
        ...axis,
        tickvals: y,
        ticktext: y.map((index) =>
          plain(`${rows[index].lead}${short(rows[index].name, letters - rows[index].lead.length)}`),
        ),
        range: [rows.length - 0.5, -0.5],
      },
      dragmode: false,
    };
    return Plotly.react(element, [trace], layout, CONFIG);
  }

  // Theme, width, paper.
  const root = document.documentElement;
  const redraw = () => plots.forEach((plot) => plot.draw());
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const is_dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const theme = h("button", {
    type: "button",
    class: "theme",
    onclick: () => {
      root.dataset.theme = is_dark() ? "light" : "dark";
      themed();
    },
  });
  function themed() {
    theme.textContent = is_dark() ? "Light theme" : "Dark theme";
    redraw();
  }

  function header() {
    const runs = data.groups.reduce((sum, group) => sum + group.runs.length, 0);
    return [
      h("div", { class: "head" }, h("h1", null, `${data.competition}: ${plural(runs, "run")} side by side`), theme),
      h("p", { class: "soft wide" }, `Written ${data.written}. \u00b1 is one standard error; intervals are 95%.`),
      h(
        "p",
        { class: "note" },
        "All of it is conditional on the models as they were trained: other seeds or folds would give other figures. " +
          "Images that are near-duplicates stand or fall together. And the best of many is partly the luckiest: its own score flatters it.",
      ),
      ...data.notes.map((note) => h("p", null, note)),
    ];
  }
  function section(group, index) {
    const id = `g${index}`;
    const several = group.runs.length > 1;
    const cards = [
      runs_card(group, id),
      several ? neighbours_card(group, id) : null,
      curves_card(group, id),
      several ? matrices_card(group, id) : null,
      recall_card(group, id),
      several ? two_card(group, id) : null,
      several && group.missed_share ? missed_card(group, id) : null,
    ].filter((each) => each !== null);
    const links = cards.map((each) => h("a", { href: `#${each.id}` }, each.firstChild.textContent));
    return h(
      "section",
      { id, "aria-labelledby": `${id}-title` },
      h("h2", { id: `${id}-title` }, group.title),
      h(
        "p",
        { class: "soft" },
        `${plural(group.runs.length, "run")} on the same ${plural(group.n_scored, "image")}, by ${group.metric_title}: ${group.greater_is_better ? "higher" : "lower"} is better.`,
      ),
      h("nav", { "aria-label": `Parts of ${group.title}` }, links),
      cards,
    );
  }

  document.body.append(probe);
  document.getElementById("top").append(...header());
  const main = document.getElementById("main");
  if (data.groups.length > 1) {
    main.append(
      h(
        "nav",
        { "aria-label": "Groups of runs" },
        data.groups.map((group, index) => h("a", { href: `#g${index}` }, `${group.title} (${group.runs.length})`)),
      ),
    );
  }
  main.append(...data.groups.map(section));
  if (data.left_out.length) {
    main.append(
      card(
        "left-out",
        "Left out",
        h(
          "ul",
          null,
          data.left_out.map((line) => h("li", null, line)),
        ),
      ),
    );
  }
  themed();
  system.addEventListener("change", themed);
  let width = window.innerWidth;
  let waiting = 0;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return; // a phone's address bar comes and goes
    width = window.innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(redraw, 120);
  });
  let before = null;
  window.addEventListener("beforeprint", () => {
    before = root.dataset.theme ?? null;
    root.dataset.theme = "light";
    print_width = 680;
    redraw();
  });
  window.addEventListener("afterprint", () => {
    if (before === null) delete root.dataset.theme;
    else root.dataset.theme = before;
    print_width = 0;
    redraw();
  });
})();
