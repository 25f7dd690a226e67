import * as api from "./api.js";
import { copy, render } from "./markdown.js";
import { DEFAULTS, conversation, reload, save, state, title } from "./store.js";

const $ = (id) => document.getElementById(id);
const SETTINGS = Object.keys(DEFAULTS);
let model = null; // {id, max_model_len}
let running = null; // AbortController of the answer that is coming

// ---- what is on the screen

function make(name, className, ...children) {
  const node = document.createElement(name);
  node.className = className;
  node.append(...children);
  return node;
}

function action(label, run) {
  const node = make("button", "action", label);
  node.addEventListener("click", () => run(node));
  return node;
}

function show() {
  const { messages } = conversation();
  $("title").textContent = title(conversation());
  $("messages").replaceChildren(...(messages.length ? messages.map(row) : [welcome()]));
  $("conversations").replaceChildren(...state.conversations.map(entry));
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  scroll(true);
}

function welcome() {
  const examples = ["你好，请介绍一下你自己。", "感冒了应该怎么办？", "中国的首都是哪里？", "写一首关于春天的诗。"];
  const buttons = examples.map((text) => action(text, () => ask(text)));
  return make("div", "welcome", make("h1", "", "有什么想聊的？"), make("div", "examples", ...buttons));
}

function row(message, index) {
  const isUser = message.role === "user";
  const body = make("div", "body");
  fill(body, message);
  const actions = make("div", "actions", action("复制", (button) => copy(message.content, button)));
  if (isUser) actions.append(action("编辑", () => edit(index)));
  else if (index === conversation().messages.length - 1) actions.append(action("重新生成", regenerate));
  if (message.note) actions.append(make("span", "note", message.note));
  return make("article", isUser ? "user" : "assistant", body, actions);
}

function fill(body, message) {
  if (message.role === "user") body.textContent = message.content;
  else body.replaceChildren(render(message.content));
}

function entry(c) {
  const open = make("button", c.id === state.current ? "entry current" : "entry", title(c));
  open.addEventListener("click", () => select(c.id));
  const remove = make("button", "icon", "✕");
  remove.setAttribute("aria-label", "删除这个对话");
  remove.addEventListener("click", () => {
    if (c.id === state.current) stop();
    state.conversations = state.conversations.filter((other) => other !== c);
    save();
    show();
  });
  return make("div", "line", open, remove);
}

function scroll(always) {
  const box = $("messages");
  if (always || box.scrollHeight - box.scrollTop - box.clientHeight < 120) box.scrollTop = box.scrollHeight;
}

function showError(text) {
  $("error").hidden = !text;
  $("error").firstElementChild.textContent = text;
}

// ---- conversations

function select(id) {
  stop();
  state.current = id;
  document.body.classList.remove("menu");
  showError("");
  save();
  show();
}

function ask(text) {
  if (running || !text.trim()) return;
  const { messages } = conversation();
  if (messages.at(-1)?.role === "user") messages.pop(); // what got no answer is asked anew
  messages.push({ role: "user", content: text.trim() });
  generate();
}

function regenerate() {
  if (running) return;
  const { messages } = conversation();
  if (messages.at(-1)?.role === "assistant") messages.pop();
  if (messages.length) generate();
}

/** Put a question back into the box; what followed it goes. */
function edit(index) {
  stop();
  const { messages } = conversation();
  $("input").value = messages[index].content;
  messages.splice(index);
  save();
  show();
  resize();
  $("input").focus();
}

function stop() {
  running?.abort();
}

// ---- answers

function requestBody(messages) {
  const { system, temperature, top_p, repetition_penalty, max_tokens, seed } = state.settings;
  const body = { model: model.id, temperature: +temperature, top_p: +top_p, repetition_penalty: +repetition_penalty };
  if (+max_tokens >= 1) body.max_tokens = Math.floor(+max_tokens);
  if (seed !== "") body.seed = Math.floor(+seed);
  const before = system.trim() ? [{ role: "system", content: system }] : [];
  body.messages = [...before, ...messages.map(({ role, content }) => ({ role, content }))];
  return body;
}

async function generate() {
  const { messages } = conversation();
  const message = { role: "assistant", content: "", note: "" };
  const mine = (running = new AbortController());
  const asked = messages.filter((m) => m.content);
  messages.push(message);
  showError("");
  save();
  show();
  const article = $("messages").lastElementChild;
  article.classList.add("running");
  const draw = drawer(article, message);
  try {
    model ??= await connect();
    let first = 0, usage = null, reason = "";
    for await (const part of api.answer(requestBody(asked), state.settings.key, mine.signal)) {
      first ||= performance.now();
      message.content += part.text ?? "";
      usage = part.usage ?? usage;
      reason = part.reason ?? reason;
      draw();
    }
    message.note = summary(usage, reason, (performance.now() - first) / 1000);
  } catch (error) {
    if (mine.signal.aborted) message.note = "已停止";
    else fail(error);
    const place = messages.indexOf(message); // it may be gone: its question was taken back
    if (!message.content && place >= 0) messages.splice(place, 1);
    else if (!mine.signal.aborted) message.note = "不完整";
  }
  running = null;
  save();
  show();
}

/** Draws a growing answer, at most once a frame. */
function drawer(article, message) {
  let isDue = false;
  return () => {
    if (isDue) return;
    isDue = true;
    requestAnimationFrame(() => {
      isDue = false;
      fill(article.firstElementChild, message);
      scroll(false);
    });
  };
}

function summary(usage, reason, seconds) {
  const tokens = usage?.completion_tokens ?? 0;
  const speed = tokens > 1 && seconds > 0 ? ` · ${((tokens - 1) / seconds).toFixed(1)} token/秒` : "";
  const count = tokens ? `${tokens} token` : "";
  return `${count}${speed}${reason === "length" ? " · 已到长度上限" : ""}`;
}

function fail(error) {
  showError(error.message);
  model = null; // ask again what there is: the server may have been restarted with another
}

async function connect() {
  $("model").textContent = "正在连接…";
  try {
    model = await api.model(state.settings.key);
    $("model").textContent = `${model.id} · 上下文 ${model.max_model_len} token`;
    return model;
  } catch (error) {
    $("model").textContent = "未连接";
    throw error;
  }
}

// ---- controls

function resize() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight, 200)}px`;
}

function showSettings() {
  for (const name of SETTINGS) {
    $(name).value = state.settings[name];
    const output = $(name).parentElement.querySelector("output");
    if (output) output.textContent = state.settings[name];
  }
}

function toggleSettings() {
  $("settings").hidden = !$("settings").hidden;
  $("open-settings").setAttribute("aria-expanded", String(!$("settings").hidden));
}

for (const name of SETTINGS) {
  $(name).addEventListener("input", () => {
    state.settings[name] = $(name).value;
    save();
    showSettings();
  });
}
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("input").value;
  if (running || !text.trim()) return;
  $("input").value = "";
  resize();
  ask(text);
});
$("input").addEventListener("keydown", (event) => {
  // An Enter of an input method is not yet a line. Safari ends the composition before it tells of that Enter: 229.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  $("form").requestSubmit();
});
$("input").addEventListener("input", resize);
$("stop").addEventListener("click", stop);
$("retry").addEventListener("click", () => {
  if (conversation().messages.at(-1)?.role === "user") regenerate();
  else connect().then(() => showError(""), fail);
});
window.addEventListener("pagehide", save); // what has come of an answer stays
// Another tab of the page has changed something; while an answer comes, this one has the last word.
window.addEventListener("storage", () => {
  if (running) return;
  reload();
  show();
});
$("new").addEventListener("click", () => select(conversation().messages.length ? null : state.current));
$("menu").addEventListener("click", () => document.body.classList.toggle("menu"));
$("shade").addEventListener("click", () => document.body.classList.remove("menu"));
$("open-settings").addEventListener("click", toggleSettings);
$("close-settings").addEventListener("click", toggleSettings);
$("key").addEventListener("change", () => connect().then(() => showError(""), fail));
$("defaults").addEventListener("click", () => {
  state.settings = { ...DEFAULTS, key: state.settings.key };
  save();
  showSettings();
});
$("clear").addEventListener("click", () => {
  if (!confirm("删除全部对话？")) return;
  state.conversations = [];
  select(null);
});

showSettings();
show();
connect().catch(fail);
