// Conversations and settings, kept in this browser.

const KEY = "baby-llama";
export const DEFAULTS = {
  system: "", temperature: 0.7, top_p: 0.9, repetition_penalty: 1.1, max_tokens: 512, seed: "", key: "",
};

function load() {
  try {
    const { conversations, current, settings } = JSON.parse(localStorage.getItem(KEY));
    // An answer of which nothing had come when the page was closed is none.
    for (const c of conversations ?? []) if (c.messages.at(-1)?.content === "") c.messages.pop();
    if (Array.isArray(conversations)) return { conversations, current, settings: { ...DEFAULTS, ...settings } };
  } catch {
    // nothing there yet, or not ours
  }
  return { conversations: [], current: null, settings: { ...DEFAULTS } };
}

export const state = load();

/** Take up what another tab has written; what this one shows stays on the screen. */
export function reload() {
  Object.assign(state, load(), { current: state.current });
}

/** Write everything; when there is no more room, without the oldest conversations. */
export function save() {
  for (;;) {
    try {
      return localStorage.setItem(KEY, JSON.stringify(state));
    } catch {
      const oldest = state.conversations.findLastIndex((c) => c.id !== state.current);
      if (oldest < 0) return;
      state.conversations.splice(oldest, 1);
    }
  }
}

/** The conversation on the screen; there is always one. */
export function conversation() {
  let found = state.conversations.find((c) => c.id === state.current);
  if (!found) {
    found = { id: `${Date.now()}-${Math.random()}`, messages: [] };
    state.conversations.unshift(found);
    state.current = found.id;
  }
  return found;
}

export function title(c) {
  const first = c.messages.find((m) => m.role === "user");
  return first ? first.content.slice(0, 40) : "新对话";
}
