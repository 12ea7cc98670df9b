"use strict";
(() => {
  const $ = (id) => document.getElementById(id);

  // Elements: text only ever gets in as text, and no style is an attribute.
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
  // A long name breaks where its words end.
  const breakable = (text) =>
    text.split(/(?<=[_.\-:/])(?=[\p{L}\d])/u).flatMap((word, index) => (index ? [h("wbr"), word] : [word]));
  const percent = (share) => `${Math.round(100 * share)}%`;
  const text_of = (element, text) => {
    if (element.textContent !== text) element.textContent = text;
  };

  // Emojis are drawn here, 64 x 64: fonts differ, and some computers have none for them.
  const EYES =
    "M18.5 27a3.5 4.5 0 1 0 7 0a3.5 4.5 0 1 0-7 0zM38.5 27a3.5 4.5 0 1 0 7 0a3.5 4.5 0 1 0-7 0z";
  const FACES = {
    angry: { skin: "#f0836a", solid: EYES, ink: "M14 16l12 6M50 16l-12 6M21 47q11-9 22 0" },
    disgust: { skin: "#b5c764", solid: "", ink: "M14 20q6-3 12 1M50 16q-7-1-12 5M17 28h9M38 28h9M19 46q6-8 12-4t14-5" },
    fear: {
      skin: "#b9b4ee",
      solid: "M17 28a5 6 0 1 0 10 0a5 6 0 1 0-10 0zM37 28a5 6 0 1 0 10 0a5 6 0 1 0-10 0z",
      ink: "M14 18q4-5 10-6M50 18q-4-5-10-6M20 46q4-6 8 0t8 0t8 0",
    },
    happy: { skin: "#ffcb45", solid: "M16 36h32a16 16 0 0 1-32 0z", ink: "M16 28q5.5-8 11 0M37 28q5.5-8 11 0" },
    neutral: { skin: "#e6d5a4", solid: EYES, ink: "M21 43h22" },
    sad: { skin: "#8dbcec", solid: EYES, ink: "M14 21q7 0 11-6M50 21q-7 0-11-6M21 48q11-11 22 0" },
    surprise: { skin: "#ffdc73", solid: `${EYES}M25 45a7 8 0 1 0 14 0a7 8 0 1 0-14 0z`, ink: "M15 17q5-7 11-4M49 17q-5-7-11-4" },
  };
  const ALSO = {
    anger: "angry", disgusted: "disgust", fearful: "fear", happiness: "happy", joy: "happy", sadness: "sad",
    surprised: "surprise",
  };
  const PLAIN = "#d5dbe3";
  const known = (label) => FACES[ALSO[label.toLowerCase()] || label.toLowerCase()] || null;
  const initial = (label) => (Array.from(label)[0] || "?").toUpperCase();
  function emoji(label) {
    if (label === null) return s("svg", { viewBox: "0 0 64 64", class: "emoji none" }, s("circle", { class: "skin", cx: 32, cy: 32, r: 30 }));
    const face = known(label);
    return s(
      "svg",
      { viewBox: "0 0 64 64", class: "emoji", role: "img", "aria-label": label },
      s("circle", { class: "skin", cx: 32, cy: 32, r: 30, fill: face ? face.skin : PLAIN }),
      face ? s("path", { class: "solid", d: face.solid }) : s("text", { x: 32, y: 42.5 }, initial(label)),
      face ? s("path", { class: "ink", d: face.ink }) : null,
    );
  }
  function draw_emoji(context, label, x, y, side) {
    const face = known(label);
    context.save();
    context.translate(x, y);
    context.scale(side / 64, side / 64);
    context.beginPath();
    context.arc(32, 32, 30, 0, 2 * Math.PI);
    context.fillStyle = face ? face.skin : PLAIN;
    context.fill();
    context.fillStyle = context.strokeStyle = "#33261a";
    if (face) {
      context.fill(new Path2D(face.solid));
      context.lineWidth = 3.2;
      context.lineCap = context.lineJoin = "round";
      context.stroke(new Path2D(face.ink));
    } else {
      context.font = "600 30px system-ui, sans-serif";
      context.textAlign = "center";
      context.fillText(initial(label), 32, 42.5);
    }
    context.restore();
  }

  // What went wrong is said where it can be read, and gone once something works again.
  function trouble(text) {
    text_of($("trouble"), text);
    $("trouble").hidden = text === "";
  }
  async function asked(path, options) {
    let response;
    try {
      response = await fetch(path, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The server does not answer. Is it still running?");
    }
    if (response.ok) return response;
    let told = null;
    try {
      told = await response.json();
    } catch {
      // no reason given: the status must do
    }
    const wait = response.headers.get("Retry-After");
    const reason = (told && (told.reason || told.error)) || `the server answered ${response.status}`;
    throw new Error(wait ? `${reason} (again in ${wait} s)` : reason);
  }

  // An answer: emoji, name and bars, laid out before there is one.
  class Answer {
    constructor(place, waiting) {
      this.waiting = waiting;
      this.classes = [];
      this.emoji = h("div", null, emoji(null));
      this.label = h("div", { class: "label" }, waiting);
      this.below = h("div", { class: "soft" }, "\u00a0");
      this.bars = h("dl", { class: "bars" });
      this.rows = new Map();
      this.shown = null;
      place.append(h("div", { class: "told" }, this.emoji, h("div", null, this.label, this.below)), this.bars);
    }
    lay(classes) {
      if (classes.join("\n") === this.classes.join("\n")) return;
      this.classes = [...classes];
      this.rows = new Map(
        classes.map((name) => {
          const fill = h("div", { class: "fill" });
          const share = h("dd", { class: "share" }, "\u00a0");
          const head = h("dt", { title: name }, name);
          return [name, { head, share, fill, track: h("dd", null, h("div", { class: "track", "aria-hidden": "true" }, fill)) }];
        }),
      );
      this.bars.replaceChildren(...[...this.rows.values()].flatMap((row) => [row.head, row.track, row.share]));
    }
    show(label, probabilities, below) {
      this.lay(Object.keys(probabilities));
      if (label !== this.shown) this.emoji.replaceChildren(emoji(label));
      this.shown = label;
      text_of(this.label, label);
      text_of(this.below, below);
      for (const [name, row] of this.rows) {
        row.fill.style.transform = `scaleX(${probabilities[name]})`;
        text_of(row.share, percent(probabilities[name]));
        for (const each of [row.head, row.track, row.share]) each.classList.toggle("first", name === label);
      }
    }
    clear(text = this.waiting, below = "\u00a0") {
      if (this.shown !== null) this.emoji.replaceChildren(emoji(null));
      this.shown = null;
      text_of(this.label, text);
      text_of(this.below, below);
      for (const row of this.rows.values()) {
        row.fill.style.transform = "scaleX(0)";
        text_of(row.share, "\u00a0");
        for (const each of [row.head, row.track, row.share]) each.classList.remove("first");
      }
    }
  }

  // Theme and tabs.
  const dark = () => {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const name_theme = () => text_of($("theme"), dark() ? "Light theme" : "Dark theme");
  $("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    name_theme();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name_theme);
  name_theme();

  const tabs = ["picture", "mirror", "runs"];
  function open_tab(name, focus = false) {
    for (const each of tabs) {
      const tab = $(`tab-${each}`);
      tab.setAttribute("aria-selected", String(each === name));
      tab.tabIndex = each === name ? 0 : -1;
      $(`panel-${each}`).hidden = each !== name;
      if (focus && each === name) tab.focus();
    }
    if (name !== "mirror") mirror.stop();
    history.replaceState(null, "", `#${name}`);
  }
  for (const [index, name] of tabs.entries()) {
    $(`tab-${name}`).addEventListener("click", () => open_tab(name));
    $(`tab-${name}`).addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const to = { Home: 0, End: tabs.length - 1 }[event.key] ?? (step && (index + step + tabs.length) % tabs.length);
      if (to === undefined) return;
      event.preventDefault();
      open_tab(tabs[to], true);
    });
  }

  // The models that can be asked.
  let runs = [];
  const model = () => $("model").value;
  // Before the models are known, and where none is picked, the server answers with its default.
  const asks = (path, more = {}) => `${path}?${new URLSearchParams({ ...(model() ? { model: model() } : {}), ...more })}`;
  const score_of = (run) =>
    run.score === null || run.score === undefined
      ? ""
      : `${run.score.toFixed(4)}${run.standard_error === null || run.standard_error === undefined ? "" : ` \u00b1 ${run.standard_error.toFixed(4)}`}`;
  function ends(run) {
    if (score_of(run) === "") return null;
    const reach = 1.96 * (run.standard_error || 0);
    return [run.score - reach, run.score + reach];
  }
  function interval(run, low, high) {
    const x = (value) => 6 + (168 * (value - low)) / (high - low || 1);
    const reach = ends(run);
    return s(
      "svg",
      { width: 180, height: 16, viewBox: "0 0 180 16", "aria-hidden": "true" },
      s("line", { class: "axis", x1: 0, x2: 180, y1: 8, y2: 8 }),
      s("line", { x1: x(reach[0]), x2: x(reach[1]), y1: 8, y2: 8 }),
      s("circle", { cx: x(run.score), cy: 8, r: 3.5 }),
    );
  }
  // Scores of two competitions, or by two metrics, are no matter of one scale.
  function draw_runs() {
    const groups = new Map();
    for (const run of runs) {
      const key = JSON.stringify([run.competition, run.metric]);
      groups.set(key, [...(groups.get(key) || []), run]);
    }
    const tables = [...groups.values()].map((group) => draw_group(group, groups.size > 1));
    $("runs-tables").replaceChildren(...tables);
  }
  function draw_group(group, titled) {
    const reaches = group.map(ends).filter((reach) => reach !== null);
    const low = Math.min(...reaches.map((reach) => reach[0]));
    const high = Math.max(...reaches.map((reach) => reach[1]));
    const scale = reaches.length ? h("div", { class: "next" }, `lines from ${low.toFixed(2)} to ${high.toFixed(2)}`) : null;
    const heads = [h("th", { scope: "col" }, "Run"), h("th", { scope: "col" }, `Out-of-fold ${group[0].metric}`, scale)];
    heads.push(h("th", { scope: "col", class: "track" }, "Track"), h("th", { scope: "col" }, "Here"));
    const tags = (run) => [...(run.aliases || []).map((alias) => `newest ${alias.replace(/^blend:/u, "")}`), ...(run.marks || [])];
    const rows = group.map((run) => {
      const here = run.name === model();
      const use = { type: "button", "aria-pressed": String(here), "aria-label": `use ${run.name}`, onclick: () => pick(run.name) };
      return h(
        "tr",
        { class: here ? "here" : null },
        h("th", { scope: "row" }, breakable(run.name), h("div", { class: "next" }, tags(run).map((tag) => h("span", { class: "tag" }, tag)))),
        h("td", null, ends(run) ? h("div", { class: "score" }, interval(run, low, high), h("span", null, score_of(run))) : "\u2013"),
        h("td", { class: "track" }, run.track || "\u2013"),
        run.weights
          ? h("td", null, h("button", use, here ? "in use" : "use"))
          : h("td", { class: "soft", title: run.reason }, "not here"),
      );
    });
    const table = h("table", { class: "runs" }, h("thead", null, h("tr", null, heads)), h("tbody", null, rows));
    const named = `Runs and blends of ${group[0].competition} by score`;
    return h(
      "div",
      { class: "runs-of" },
      titled ? h("h3", null, group[0].competition) : null,
      h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": named }, table),
    );
  }
  function pick(name) {
    $("model").value = name;
    chosen();
  }
  function chosen() {
    draw_runs();
    const run = runs.find((each) => each.name === model());
    if (run && run.classes) {
      picture.answer.lay(run.classes);
      mirror.answer.lay(run.classes);
    }
    if (picture.blob) ask();
    mirror.reconnect();
  }
  $("model").addEventListener("change", chosen);
  async function load_runs() {
    try {
      const told = await (await asked("runs")).json();
      runs = told.runs;
      text_of($("competition"), told.title || told.competition || "\u00a0");
      text_of($("runs-note"), "Scores are out of fold, with their standard error; lines are 95% intervals. Two runs whose intervals overlap widely cannot be told apart.");
      $("card-link").hidden = !told.card;
      const options = runs.map((run) =>
        h("option", { value: run.name, disabled: !run.weights }, score_of(run) ? `${run.name} (${score_of(run)})` : run.name),
      );
      $("model").replaceChildren(...options);
      const first = runs.find((run) => run.name === told.default && run.weights) || runs.find((run) => run.weights);
      if (!first) {
        trouble("No run can be tried here: none has its weights on this machine.");
        draw_runs();
        return;
      }
      pick(first.name);
    } catch (error) {
      trouble(error.message);
    }
  }

  // A picture.
  const picture = { blob: null, url: null, width: 1, height: 1, faces: [], at: 0, answer: new Answer($("picture-answer"), "No picture yet"), going: null };
  const looked = { image: h("img", { alt: "", hidden: true }), text: h("p", { class: "soft small" }), url: null, going: null };
  const looked_at = h("div", { class: "looked", hidden: true }, h("div", { class: "frame" }, looked.image), looked.text);
  const foot = h("p", { class: "soft small foot" }, "\u00a0");
  $("picture-answer").append(looked_at, foot);

  async function take(blob) {
    const url = URL.createObjectURL(blob);
    const image = new Image();
    image.src = url;
    try {
      await image.decode();
    } catch {
      URL.revokeObjectURL(url);
      trouble(`${blob.name || "What was given"} is no picture that can be shown. JPEG, PNG, WebP and BMP can.`);
      return;
    }
    if (picture.url) URL.revokeObjectURL(picture.url);
    Object.assign(picture, { blob, url, faces: [], width: image.naturalWidth, height: image.naturalHeight });
    $("shown").src = url;
    $("shown").alt = "The picture that is asked about";
    $("shown").classList.toggle("tiny", Math.max(picture.width, picture.height) <= 96);
    $("fit").style.setProperty("--ratio", picture.width / picture.height);
    $("fit").hidden = false;
    $("drop-empty").hidden = true;
    $("another").classList.remove("unseen");
    $("boxes").replaceChildren();
    open_tab("picture");
    await ask();
  }
  async function ask() {
    if (picture.going) picture.going.abort();
    if (looked.going) looked.going.abort();
    looked_at.hidden = true;
    const going = (picture.going = new AbortController());
    const form = new FormData();
    form.append("files", picture.blob, picture.blob.name || "picture");
    text_of($("picture-note"), "asking \u2026");
    try {
      const path = asks("predict", { faces: String($("find").checked) });
      const told = await (await asked(path, { method: "POST", body: form, signal: going.signal })).json();
      trouble("");
      picture.faces = told.files[0].faces;
      text_of(foot, `${told.model}, version ${told.version}, answered in ${Math.round(told.time_ms)} ms`);
      draw_boxes();
      look(0);
    } catch (error) {
      if (error.name === "AbortError") return;
      picture.faces = [];
      $("boxes").replaceChildren();
      picture.answer.clear("No answer");
      text_of($("picture-note"), "");
      trouble(error.message);
    }
  }
  function draw_boxes() {
    const found = picture.faces.filter((face) => face.box);
    text_of(
      $("picture-note"),
      found.length === 0
        ? $("find").checked
          ? "No face was found: the answer is for the whole picture."
          : "The answer is for the whole picture."
        : found.length === 1
          ? "One face was found."
          : `${found.length} faces were found; pick one.`,
    );
    $("boxes").replaceChildren(
      ...found.map((face, index) => {
        const [left, top, width, height] = face.box;
        const button = h(
          "button",
          {
            type: "button",
            class: `box ${top < 0.12 * picture.height ? "high" : ""} ${left > 0.7 * picture.width ? "right" : ""}`,
            "aria-label": `Face ${index + 1} of ${found.length}: ${face.label}, ${percent(face.confidence)}`,
            onclick: () => look(index),
          },
          h("span", null, face.label),
        );
        Object.assign(button.style, {
          left: `${(100 * left) / picture.width}%`,
          top: `${(100 * top) / picture.height}%`,
          width: `${(100 * width) / picture.width}%`,
          height: `${(100 * height) / picture.height}%`,
        });
        return button;
      }),
    );
  }
  function look(index) {
    const face = picture.faces[index];
    picture.at = index;
    [...$("boxes").children].forEach((box, place) => box.setAttribute("aria-pressed", String(place === index)));
    const whose = face.box && picture.faces.length > 1 ? `face ${index + 1} of ${picture.faces.length}, ` : "";
    picture.answer.show(face.label, face.probabilities, `${whose}${percent(face.confidence)} sure by its own count`);
    text_of($("heard"), `${face.label}, ${percent(face.confidence)}`);
    explain();
  }
  async function explain() {
    looked_at.hidden = !$("explain").checked;
    if (looked.going) looked.going.abort();
    if (looked_at.hidden || !picture.faces.length) return;
    const going = (looked.going = new AbortController());
    const form = new FormData();
    form.append("files", picture.blob, picture.blob.name || "picture");
    const face = picture.faces[picture.at];
    try {
      const path = asks("explain", face.box ? { box: face.box.join(",") } : {});
      const response = await asked(path, { method: "POST", body: form, signal: going.signal });
      const url = URL.createObjectURL(await response.blob());
      if (looked.url) URL.revokeObjectURL(looked.url);
      looked.url = looked.image.src = url;
      looked.image.alt = "Heat map over the face";
      looked.image.hidden = false;
      const [label, network] = ["x-label", "x-model"].map((name) => decodeURIComponent(response.headers.get(name)));
      text_of(looked.text, `Bright: what speaks for \u201c${label}\u201d to ${network}, one of the networks that answered. A hint, no proof.`);
    } catch (error) {
      if (error.name === "AbortError") return;
      looked.image.hidden = true;
      text_of(looked.text, error.message);
    }
  }
  for (const id of ["choose", "another"]) $(id).addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => {
    if ($("file").files.length) take($("file").files[0]);
    $("file").value = "";
  });
  $("find").addEventListener("change", () => picture.blob && ask());
  $("explain").addEventListener("change", explain);
  const carries = (event) => event.dataTransfer && [...event.dataTransfer.types].includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!carries(event)) return;
    event.preventDefault();
    $("drop").classList.add("over");
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget === null && $("drop").classList.remove("over"));
  document.addEventListener("drop", (event) => {
    $("drop").classList.remove("over");
    if (!carries(event)) return;
    event.preventDefault();
    if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => {
    const file = [...(event.clipboardData ? event.clipboardData.files : [])].find((each) => each.type.startsWith("image/"));
    if (file) take(file);
  });

  // The mirror: one frame is on its way at a time, so a slow computer gets fewer frames and never a queue of them.
  const WIDTH = 320; // px of the frames that are sent
  const MOST = 20; // frames a second
  const QUALITY = 0.75;
  const SOON = 90; // ms a box takes to most of its new place
  const RETRIES = 5;
  const small = document.createElement("canvas");
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  const mirror = {
    answer: new Answer($("mirror-answer"), "The mirror is off"),
    stream: null,
    socket: null,
    faces: new Map(), // by number: what the server said, and the box as drawn
    chosen: null,
    sent: 0,
    timer: null,
    failures: 0,
    waiting: false, // what is noted goes with the next answer
    drawn: 0,
    heard: 0,

    async start() {
      if (!navigator.mediaDevices || !navigator.mediaDevices.getUserMedia) {
        this.note("This browser gives a camera only to pages of this computer (localhost) or over HTTPS.");
        return;
      }
      $("start").disabled = true;
      this.note("asking for the camera \u2026");
      try {
        const video = { facingMode: "user", width: { ideal: 640 }, height: { ideal: 480 } };
        this.stream = await navigator.mediaDevices.getUserMedia({ video, audio: false });
        $("video").srcObject = this.stream;
        await $("video").play();
      } catch (error) {
        const why = {
          NotAllowedError: "The camera was not allowed. Allow it for this page in the browser's settings, then start again.",
          NotFoundError: "No camera was found.",
          NotReadableError: "The camera is in use by another program.",
        };
        this.stop();
        this.note(why[error.name] || `The camera does not start: ${error.message}`);
        return;
      } finally {
        $("start").disabled = false;
      }
      if ($("panel-mirror").hidden) return this.stop(); // another tab was opened meanwhile
      $("glass-fit").hidden = false;
      $("glass-empty").hidden = true;
      $("glass-fit").style.setProperty("--ratio", $("video").videoWidth / $("video").videoHeight);
      text_of($("start"), "Stop the mirror");
      $("snapshot").disabled = false;
      this.failures = 0;
      this.connect();
      requestAnimationFrame((now) => this.draw(now));
    },
    stop() {
      clearTimeout(this.timer);
      if (this.stream) for (const track of this.stream.getTracks()) track.stop();
      this.stream = null;
      $("video").srcObject = null;
      this.disconnect();
      this.note("");
      this.forget();
      $("glass-fit").hidden = true;
      $("glass-empty").hidden = false;
      text_of($("start"), "Start the mirror");
      text_of($("rate"), "");
      $("snapshot").disabled = true;
      this.answer.clear();
    },
    note(text) {
      text_of($("mirror-note"), text);
    },
    forget() {
      this.faces.clear();
      this.chosen = null;
      this.chips();
    },
    connect() {
      const url = new URL(asks("mirror"), location.href);
      url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
      const socket = (this.socket = new WebSocket(url));
      this.note("loading the model \u2026");
      this.waiting = true;
      this.answer.clear("Looking \u2026");
      socket.addEventListener("open", () => this.send(socket));
      socket.addEventListener("message", (event) => {
        if (socket !== this.socket) return;
        const told = JSON.parse(event.data);
        if (told.error) {
          this.note(told.reason || told.error);
          this.waiting = true;
        } else {
          if (this.waiting) this.note("");
          this.failures = 0;
          this.waiting = false;
          this.take(told);
        }
        const wait = Math.max(0, this.sent + 1000 / MOST - performance.now(), told.error ? 1000 * (told.retry_after || 0.5) : 0);
        this.timer = setTimeout(() => this.send(socket), wait);
      });
      socket.addEventListener("close", (event) => {
        if (socket !== this.socket) return;
        this.socket = null;
        this.forget();
        this.answer.clear("No answer");
        text_of($("rate"), "");
        this.failures += 1;
        const why = event.reason || "The server ended the mirror, or does not answer.";
        const refused = event.code === 1008; // there is no such model: it would be refused again
        if (refused || this.failures > RETRIES) {
          this.stop();
          this.note(refused ? why : `${why} The mirror stopped.`);
          return;
        }
        this.note(`${why} Trying again \u2026`);
        this.timer = setTimeout(() => this.connect(), 500 * 2 ** this.failures);
      });
    },
    disconnect() {
      clearTimeout(this.timer);
      const socket = this.socket;
      this.socket = null;
      if (socket) socket.close();
    },
    reconnect() {
      if (!this.stream) return;
      this.disconnect();
      this.forget();
      this.connect();
    },
    send(socket) {
      if (socket !== this.socket || socket.readyState !== WebSocket.OPEN) return;
      const video = $("video");
      if (document.hidden || !video.videoWidth) {
        this.timer = setTimeout(() => this.send(socket), 200);
        return;
      }
      small.width = Math.min(WIDTH, video.videoWidth);
      small.height = Math.round((small.width * video.videoHeight) / video.videoWidth);
      small.getContext("2d", { alpha: false }).drawImage(video, 0, 0, small.width, small.height);
      this.sent = performance.now();
      small.toBlob((blob) => blob && socket === this.socket && socket.readyState === WebSocket.OPEN && socket.send(blob), "image/jpeg", QUALITY);
    },
    take(told) {
      const before = this.faces;
      this.faces = new Map(
        told.faces.map((face) => {
          const [left, top, width, height] = face.box;
          const to = [1 - (left + width) / told.width, top / told.height, width / told.width, height / told.height];
          const was = before.get(face.id);
          return [face.id, { ...face, to, at: was && !still.matches ? was.at : to }];
        }),
      );
      if (!this.faces.has(this.chosen)) {
        const sizes = [...this.faces.values()].sort((a, b) => b.to[3] - a.to[3]);
        this.chosen = sizes.length ? sizes[0].id : null;
      }
      this.chips();
      const turns = told.in_turns ? `, one of ${told.in_turns} folds each` : "";
      const rate = told.fps === 0 ? "" : `${told.fps.toFixed(told.fps < 3 ? 1 : 0)} frames a second, `;
      text_of($("rate"), `${rate}${Math.round(told.time_ms)} ms each${turns}`);
      const face = this.faces.get(this.chosen);
      if (!face) {
        this.answer.clear("No face in sight");
        return;
      }
      const news = this.answer.shown !== face.label;
      this.answer.show(face.label, face.probabilities, `${percent(face.confidence)} sure by its own count`);
      const now = performance.now();
      if (news && now - this.heard > 2000) {
        this.heard = now;
        text_of($("heard"), face.label);
      }
    },
    chips() {
      const ids = this.faces.size > 1 ? [...this.faces.keys()] : [];
      const now = [...chips.children];
      const same = now.length === ids.length && now.every((chip, place) => chip.dataset.id === String(ids[place]));
      if (!same) {
        chips.replaceChildren(
          ...ids.map((id) => h("button", { type: "button", "data-id": id, onclick: () => { this.chosen = id; } }, `face ${id}`)),
        );
      }
      for (const chip of chips.children) chip.setAttribute("aria-pressed", String(chip.dataset.id === String(this.chosen)));
    },
    draw(now) {
      if (!this.stream) return;
      const canvas = $("overlay");
      const scale = devicePixelRatio || 1;
      const [width, height] = [Math.round(canvas.clientWidth * scale), Math.round(canvas.clientHeight * scale)];
      if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
      const context = canvas.getContext("2d");
      const near = 1 - Math.exp(-(now - this.drawn) / SOON);
      this.drawn = now;
      for (const face of this.faces.values()) face.at = face.at.map((value, k) => value + near * (face.to[k] - value));
      context.clearRect(0, 0, width, height);
      this.paint(context, width, height);
      requestAnimationFrame((next) => this.draw(next));
    },
    paint(context, width, height) {
      for (const face of this.faces.values()) {
        const [x, y, w, t] = [face.at[0] * width, face.at[1] * height, face.at[2] * width, face.at[3] * height];
        const line = Math.max(2, height / 180);
        context.globalAlpha = face.seen ? 1 : 0.55;
        if ($("cover").checked) {
          const side = 1.25 * Math.max(w, t);
          draw_emoji(context, face.label, x + (w - side) / 2, y + (t - side) / 2, side);
        } else {
          context.beginPath();
          context.roundRect(x, y, w, t, 0.1 * w);
          context.lineWidth = 2 * line;
          context.strokeStyle = "rgb(0 0 0 / 45%)";
          context.stroke();
          context.lineWidth = line;
          context.strokeStyle = "#fff";
          context.stroke();
          const side = Math.max(0.5 * w, height / 9);
          draw_emoji(context, face.label, x + (w - side) / 2, Math.max(0, y - 0.72 * side), side);
        }
        const size = Math.max(12, height / 24);
        context.font = `600 ${size}px system-ui, sans-serif`;
        const told = `${face.label} ${percent(face.confidence)}`;
        const wide = context.measureText(told).width + size;
        const left = Math.min(Math.max(0, x + (w - wide) / 2), width - wide);
        const top = Math.min(y + t + 0.3 * size, height - 1.5 * size);
        context.beginPath();
        context.roundRect(left, top, wide, 1.5 * size, 0.4 * size);
        context.fillStyle = "rgb(0 0 0 / 65%)";
        context.fill();
        context.fillStyle = "#fff";
        context.fillText(told, left + size / 2, top + 1.08 * size);
        context.globalAlpha = 1;
      }
    },
    snapshot() {
      const video = $("video");
      const whole = Object.assign(document.createElement("canvas"), { width: video.videoWidth, height: video.videoHeight });
      const context = whole.getContext("2d");
      context.save();
      context.scale(-1, 1);
      context.drawImage(video, -whole.width, 0);
      context.restore();
      this.paint(context, whole.width, whole.height);
      whole.toBlob((blob) => {
        const url = URL.createObjectURL(blob);
        h("a", { href: url, download: `mirror-${new Date().toISOString().slice(0, 19).replace(/[T:]/g, "-")}.png` }).click();
        setTimeout(() => URL.revokeObjectURL(url), 10_000);
        this.note("The snapshot is in your downloads, and nowhere else.");
      }, "image/png");
    },
  };
  const chips = h("div", { class: "faces", role: "group", "aria-label": "Whose bars are shown" });
  $("mirror-answer").append(chips);
  $("glass-emoji").append(emoji("happy"));
  $("start").addEventListener("click", () => (mirror.stream ? mirror.stop() : mirror.start()));
  $("snapshot").addEventListener("click", () => mirror.snapshot());

  const wanted = location.hash.slice(1);
  open_tab(tabs.includes(wanted) ? wanted : "picture");
  load_runs();
})();
