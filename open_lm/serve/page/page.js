"use strict";
// The page: chat and plain completion with one model or two side by side. It talks to OpenAI's routes of this server.

const $ = (id) => document.getElementById(id);
const state = { mode: "chat", models: [], columns: [], running: null };

// ---- elements -------------------------------------------------------------------------------------------------------

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function drawColumns() {
  const names = [$("model-a").value, $("model-b").value].filter(Boolean);
  state.columns = names.map((name) => {
    const body = element("section", "column");
    body.append(element("h2", "", name));
    const hint = state.mode === "chat" ? "Say something to begin." : "Give the beginning of a text; it is continued.";
    body.append(element("p", "empty turn", hint));
    return { name, body, messages: [] };
  });
  $("columns").replaceChildren(...state.columns.map((column) => column.body));
}

function addTurn(column, kind, text) {
  column.body.querySelector(".empty")?.remove();
  const turn = element("div", `turn ${kind}`, text);
  column.body.append(turn);
  turn.scrollIntoView({ block: "end" });
  return turn;
}

function setMode(mode) {
  state.mode = mode;
  document.body.classList.toggle("complete", mode === "complete");
  $("mode-chat").setAttribute("aria-pressed", String(mode === "chat"));
  $("mode-complete").setAttribute("aria-pressed", String(mode === "complete"));
  $("prompt").placeholder = mode === "chat" ? "Write a message…" : "The beginning of a text…";
  $("prompt").setAttribute("aria-label", mode === "chat" ? "Message" : "Beginning of a text");
  $("send").textContent = mode === "chat" ? "Send" : "Continue";
  drawColumns();
}

// ---- requests -------------------------------------------------------------------------------------------------------

function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function number(id) {
  const value = $(id).valueAsNumber;
  return Number.isNaN(value) ? undefined : value;
}

function settings() {
  const stop = $("stop").value.replaceAll("\\n", "\n");
  return {
    temperature: number("temperature"), top_p: number("top_p"), min_p: number("min_p"),
    max_tokens: number("max_tokens"), seed: number("seed"), stop: stop || undefined,
    stream: true, stream_options: { include_usage: true },
  };
}

async function* events(path, body, signal) {
  const answer = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// Pieces of a text with the tokens they consist of, whichever route they come from.
function pieceOf(choice) {
  if (choice.delta) {
    const tokens = (choice.logprobs?.content ?? []).map((entry) => ({
      token: entry.token, logprob: entry.logprob, top: entry.top_logprobs.map((one) => [one.token, one.logprob]),
    }));
    return { text: choice.delta.content ?? "", tokens, finish: choice.finish_reason };
  }
  const scores = choice.logprobs;
  const tokens = (scores?.tokens ?? []).map((token, i) => ({
    token, logprob: scores.token_logprobs[i], top: Object.entries(scores.top_logprobs[i]),
  }));
  return { text: choice.text, tokens, finish: choice.finish_reason };
}

async function write(column, path, body, turn, signal) {
  const begun = performance.now();
  let text = "", held = [], finish = null, usage = null, failed = false;
  turn.classList.add("writing");
  try {
    for await (const event of events(path, body, signal)) {
      usage = event.usage ?? usage;
      for (const choice of event.choices) {
        const piece = pieceOf(choice);
        held.push(...piece.tokens);
        finish = piece.finish ?? finish;
        if (!piece.text) continue;
        text += piece.text;
        turn.append(tokenSpan(piece.text, held));
        held = [];
        const near = column.body.scrollHeight - column.body.scrollTop - column.body.clientHeight < 120;
        if (near) column.body.scrollTop = column.body.scrollHeight;
      }
    }
    turn.append(element("span", "foot", summary(usage, finish, body.max_tokens, performance.now() - begun)));
  } catch (error) {
    if (error.name === "AbortError") turn.append(element("span", "foot", "Stopped."));
    else { failed = true; turn.classList.add("error"); turn.append(element("span", "foot", error.message)); }
  } finally {
    turn.classList.remove("writing");
    column.body.scrollTop = column.body.scrollHeight;
  }
  return { text, failed };
}

function summary(usage, finish, asked, milliseconds) {
  const n = usage?.completion_tokens;
  const cut = n < asked ? "cut where the model's context ends" : "cut at max tokens";
  const ended = finish === "length" ? cut : "ended by itself";
  if (!usage) return ended;
  return `${n} token${n === 1 ? "" : "s"}, ${(1000 * n / milliseconds).toFixed(1)} a second, ${ended}`;
}

async function submit() {
  const asked = $("prompt").value;
  if (state.running || (state.mode === "chat" && !asked.trim())) return;
  const abort = new AbortController();
  setRunning(abort);
  try {
    await Promise.all(state.columns.map((column) => (state.mode === "chat" ? chat : complete)(column, asked, abort.signal)));
  } finally {
    setRunning(null);
  }
}

async function chat(column, asked, signal) {
  addTurn(column, "user", asked);
  column.messages.push({ role: "user", content: asked });
  $("prompt").value = "";
  const system = $("system").value ? [{ role: "system", content: $("system").value }] : [];
  const body = { model: column.name, messages: [...system, ...column.messages], logprobs: true, top_logprobs: 5, ...settings() };
  const { text, failed } = await write(column, "v1/chat/completions", body, addTurn(column, "assistant"), signal);
  if (failed) { // the conversation goes on without it
    column.messages.pop();
    $("prompt").value ||= asked;
  } else column.messages.push({ role: "assistant", content: text });
}

async function complete(column, asked, signal) {
  const turn = addTurn(column, "completion");
  turn.append(element("span", "prompt-part", asked));
  await write(column, "v1/completions", { model: column.name, prompt: asked, logprobs: 5, ...settings() }, turn, signal);
}

function setRunning(abort) {
  state.running = abort;
  $("send").hidden = Boolean(abort);
  $("stop-writing").hidden = !abort;
  for (const id of ["mode-chat", "mode-complete", "model-a", "model-b", "clear"]) $(id).disabled = Boolean(abort);
}

// ---- probabilities of tokens ----------------------------------------------------------------------------------------

function tokenSpan(text, tokens) {
  const span = element("span", "token", text);
  span.tokens = tokens;
  span.tabIndex = tokens.length ? -1 : undefined;
  const least = Math.min(...tokens.map((one) => Math.exp(one.logprob)), 1);
  span.style.setProperty("--doubt", `${Math.round(60 * (1 - least))}%`);
  return span;
}

function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  return share >= 0.1 ? `${share.toFixed(1)} %` : "< 0.1 %";
}

function visible(text) {
  return text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "·") || "∅";
}

function showTip(span) {
  document.querySelector(".token.shown")?.classList.remove("shown");
  if (!span?.tokens?.length) { $("tip").hidden = true; return; }
  span.classList.add("shown");
  const table = element("table");
  for (const one of span.tokens) {
    const rows = one.top.some(([token]) => token === one.token) ? one.top : [...one.top, [one.token, one.logprob]];
    for (const [token, logprob] of rows.sort((a, b) => b[1] - a[1])) {
      const row = element("tr", token === one.token ? "chosen" : "");
      row.append(element("td", "", visible(token)), element("td", "", percent(logprob)));
      table.append(row);
    }
  }
  $("tip").replaceChildren(table);
  $("tip").hidden = false;
  const box = span.getBoundingClientRect(), tip = $("tip").getBoundingClientRect();
  const below = box.bottom + 6 + tip.height < innerHeight;
  $("tip").style.left = `${Math.max(6, Math.min(box.left, innerWidth - tip.width - 6))}px`;
  $("tip").style.top = `${below ? box.bottom + 6 : Math.max(6, box.top - tip.height - 6)}px`;
}

// ---- beginning ------------------------------------------------------------------------------------------------------

async function loadModels() {
  const answer = await fetch("v1/models", { headers: headers() });
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  state.models = (await answer.json()).data.map((model) => model.id);
  $("model-a").replaceChildren(...state.models.map((name) => new Option(name)));
  $("model-b").replaceChildren(new Option("nothing", ""), ...state.models.map((name) => new Option(name)));
  $("model-b").parentElement.hidden = state.models.length < 2;
}

async function begin() {
  try {
    await loadModels();
    drawColumns();
  } catch (error) {
    $("settings").open = true;
    $("columns").replaceChildren(element("section", "column"));
    $("columns").firstChild.append(element("p", "turn error", error.message));
  }
}

$("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && state.mode === "chat") {
    event.preventDefault();
    submit();
  }
});
$("stop-writing").addEventListener("click", () => state.running?.abort());
$("clear").addEventListener("click", drawColumns);
$("mode-chat").addEventListener("click", () => setMode("chat"));
$("mode-complete").addEventListener("click", () => setMode("complete"));
for (const id of ["model-a", "model-b"]) $(id).addEventListener("change", drawColumns);
$("key").addEventListener("change", begin);
$("colours").addEventListener("change", () => document.body.classList.toggle("coloured", $("colours").checked));
$("columns").addEventListener("mouseover", (event) => showTip(event.target.closest(".token")));
$("columns").addEventListener("mouseleave", () => showTip(null));
$("columns").addEventListener("click", (event) => showTip(event.target.closest(".token")));
addEventListener("scroll", () => showTip(null), true);
begin();
