"use strict";

const $ = selector => document.querySelector(selector);
const log = $("#log"), form = $("#form"), input = $("#question");
const session = `web-${crypto.randomUUID()}`;
const POLL_MS = 2000;
const GONE = "画面のサーバーにつながりません。端末で python -m chapter8_samples serve が動いているか確かめてください。";

function post(path, body = {}) {
  return fetch(path, {method: "POST", headers: {"content-type": "application/json"}, body: JSON.stringify(body)});
}

/* チャット ---------------------------------------------------------------- */

function scrollDown() {
  log.scrollTop = log.scrollHeight;
}

function sayMine(text) {
  const message = document.createElement("article");
  message.className = "message me";
  message.textContent = text;
  log.append(message);
}

function newAnswer() {
  const answer = $("#answer").content.cloneNode(true).firstElementChild;
  log.append(answer);
  scrollDown();
  return answer;
}

async function* jsonLines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

function fail(answer, reason) {
  answer.classList.add("failed");
  const text = document.createElement("p");
  text.className = "failure";
  text.textContent = reason;
  answer.querySelector(".text").after(text);
}

function show(answer, event) {
  if (event.text) answer.querySelector(".text").textContent += event.text;
  if (event.failure) fail(answer, event.failure);
  if (event.trace_id) openTools(answer, event.trace_id, event.trace_url);
}

async function ask(question) {
  sayMine(question);
  const answer = newAnswer();
  const follow = () => log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  try {
    const response = await post("/ask", {question, session_id: session});
    if (!response.ok) throw new Error(`HTTP ${response.status}`);
    for await (const event of jsonLines(response.body)) {
      const atEnd = follow();
      show(answer, event);
      if (atEnd) scrollDown();
    }
  } catch {
    fail(answer, GONE);
    scrollDown();
  } finally {
    answer.setAttribute("aria-busy", "false");
  }
}

async function send(question) {
  const buttons = document.querySelectorAll("#form button, [data-example]");
  if (!question || buttons[0].disabled) return;
  for (const button of buttons) button.disabled = true;
  await ask(question);
  for (const button of buttons) button.disabled = false;
}

form.onsubmit = event => {
  event.preventDefault();
  const question = input.value.trim();
  if (form.querySelector("button").disabled) return;
  input.value = "";
  send(question);
};

for (const button of document.querySelectorAll("[data-example]")) button.onclick = () => send(button.textContent);

/* 評価 -------------------------------------------------------------------- */

function openTools(answer, traceId, traceUrl) {
  const tools = answer.querySelector(".tools"), link = tools.querySelector("a");
  tools.classList.add("vote");
  tools.dataset.trace = traceId;
  link.hidden = !traceUrl;
  link.href = traceUrl;
  for (const button of tools.querySelectorAll("[data-vote]")) button.onclick = () => vote(tools, button);
}

async function record(tools, positive) {
  const note = tools.querySelector("span");
  note.textContent = "送っています";
  const body = {trace_id: tools.dataset.trace, is_positive: positive, feedback_id: crypto.randomUUID()};
  try {
    const response = await post("/feedback", body);
    note.textContent = response.ok ? "記録しました" : "記録できませんでした。もう一度押してください";
    return response.ok;
  } catch {
    note.textContent = GONE;
    return false;
  }
}

async function vote(tools, button) {
  const stored = await record(tools, button.dataset.vote === "true");
  if (!stored) return;
  for (const other of tools.querySelectorAll("[data-vote]")) other.setAttribute("aria-pressed", String(other === button));
}

/* 監視 -------------------------------------------------------------------- */

const percent = value => `${(100 * value).toFixed(0)}%`;
const UNITS = {
  requests: value => `${value} 件`,
  error_rate: percent,
  latency_p50_ms: value => value.toFixed(0),
  latency_p95_ms: value => value.toFixed(0),
  cost_usd: value => `$${value.toFixed(6)}`,
  cost_usd_per_request: value => `$${value.toFixed(6)}`,
  grounded_rate: percent,
  thumbs_up_rate: percent,
};

function put(selector, text) {
  const element = $(selector);
  if (element.textContent !== text) element.textContent = text;
  return element;
}

function showFigures(figures) {
  for (const [name, {value, n}] of Object.entries(figures)) {
    const element = put(`[data-figure=${name}]`, value === null ? "-" : UNITS[name](value));
    element.dataset.value = value ?? "";
    if ($(`[data-count=${name}]`)) put(`[data-count=${name}]`, n ? `${n} 件中` : "\u00a0");
  }
}

function showAlert(state, title, detail) {
  $("#alert").dataset.state = state;
  document.body.classList.toggle("firing", state === "firing");
  put("#alert-title", title);
  put("#alert-detail", detail);
}

function showWatch({alert, problem}) {
  if (alert.firing) showAlert("firing", `アラート: ${alert.summary}`, alert.detail);
  else showAlert(problem ? "lost" : "calm", problem || "アラートなし", alert.detail);
}

/* 推移: 値のない区間で線を切り、左端を 0、右端を 100 とする ------------------------ */

function draw(svg, name, attributes) {
  const element = document.createElementNS(svg.namespaceURI, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  svg.append(element);
}

function unbroken(values) {
  const runs = [[]];
  values.forEach((value, index) => value === null ? runs.push([]) : runs.at(-1).push([index, value]));
  return runs.filter(run => run.length);
}

function drawEvents(svg, x, {trend, events}) {
  for (const {kind, at} of events) {
    const where = x((Date.parse(at) / 1000 - trend.start) / trend.bin_seconds - .5);
    if (where >= 0) draw(svg, "line", {class: "event", "data-mark": kind, x1: Math.min(where, 100), x2: Math.min(where, 100), y1: 0, y2: 100});
  }
}

function drawTrend(tile, status) {
  const name = tile.dataset.trend, values = status.trend[name], svg = tile.querySelector("svg");
  const known = values.filter(value => value !== null);
  const top = name === "grounded_rate" ? 1 : Math.max(...known, 0);
  const x = index => 100 * (index + .5) / values.length, y = value => 100 - 100 * value / (top || 1);
  const limit = y(status.alert.threshold);
  svg.replaceChildren();
  draw(svg, "line", {class: "axis", x1: 0, x2: 100, y1: 100, y2: 100});
  if (name === "grounded_rate") draw(svg, "line", {class: "limit", x1: 0, x2: 100, y1: limit, y2: limit});
  drawEvents(svg, x, status);
  for (const run of unbroken(values)) {
    const points = run.map(([index, value]) => `${x(index)},${y(value)}`);
    draw(svg, "polyline", {points: [points[0], ...points].join(" ")});  // 1 点だけでも見えるように
  }
  const [peak, now] = known.length ? [UNITS[name](top), UNITS[name](known.at(-1))] : ["", "記録なし"];
  tile.querySelector(".trend span").textContent = peak;
  svg.setAttribute("aria-label", `${tile.querySelector("dt").textContent} の推移: 最大 ${peak}、最新 ${now}`);
}

function showRelease(status) {
  put("#version", `v${status.version}(${status.healthy_version ? "資料だけで短く答える" : "詳しく答える"})`);
  put("#next-step", status.next_step);
  $("[data-action=release]").disabled = !status.healthy_version;
  const burst = $("[data-action=burst]");
  burst.disabled = status.sending;
  put("[data-action=burst]", status.recovering ? "回復を確かめています" : status.sending ? "質問を送っています" : "質問を 30 件送る");
}

function addEvent({kind, text, at, url}) {
  const item = document.createElement("li"), time = document.createElement("time");
  item.dataset.kind = kind;
  time.dateTime = at;
  time.textContent = new Date(at).toLocaleTimeString("ja-JP", {hour12: false});
  item.append(time, text);
  if (url) {
    const link = document.createElement("a");
    Object.assign(link, {href: url, target: "_blank", rel: "noopener", textContent: "例のトレース"});
    item.append(" ", link);
  }
  const timeline = $("#timeline");
  timeline.append(item);
  timeline.scrollTop = timeline.scrollHeight;
}

let latest = "";

function showEvents(events) {
  for (const event of events.filter(event => event.at > latest)) {
    addEvent(event);
    latest = event.at;
  }
}

function refuse(text) {
  addEvent({kind: "refused", text, at: new Date().toISOString()});
}

let watched = false;

async function refresh() {
  try {
    const response = await fetch("/status");
    if (response.status === 404 && !watched) return false;  // この画面には監視がない
    const status = await response.json();
    if (!response.ok) throw new Error(status.detail);
    watched = true;
    put("#minutes", String(status.window_minutes));
    showFigures(status.figures);
    showWatch(status);
    for (const tile of document.querySelectorAll("[data-trend]")) drawTrend(tile, status);
    showRelease(status);
    showEvents(status.events);
  } catch (error) {
    showAlert("lost", "監視が止まっています", error instanceof TypeError ? GONE : error.message);
  }
  return true;
}

async function poll() {
  if (!document.hidden && !(await refresh())) {
    document.body.classList.add("no-panel");
    return;
  }
  setTimeout(poll, POLL_MS);
}

async function act(path) {
  try {
    const response = await post(`/operations/${path}`);
    if (!response.ok) refuse((await response.json()).detail);
  } catch {
    refuse(GONE);
  }
  await refresh();
}

for (const button of document.querySelectorAll("[data-action]")) {
  button.onclick = () => {
    button.disabled = true;
    act(button.dataset.action);
  };
}

for (const tab of document.querySelectorAll("[data-show]")) {
  tab.onclick = () => {
    document.body.dataset.view = tab.dataset.show;
    for (const other of document.querySelectorAll("[data-show]")) other.setAttribute("aria-pressed", String(other === tab));
  };
}

poll();
