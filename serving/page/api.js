// The server: which model it has, and answers as they come.

function headers(key) {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function failure(response) {
  const reasons = {
    401: "需要 API 密钥，或密钥不对：请在设置里填写。",
    429: "现在排队的人太多，请稍后重试。",
    503: "模型正在载入或服务正在关闭，请稍后重试。",
  };
  const body = await response.json().catch(() => null);
  return new Error(reasons[response.status] ?? body?.error?.message ?? `服务器答复 ${response.status}`);
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("连不上服务器：它可能已经关闭，或网络中断。");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

/** The model that the server has: {id, max_model_len}. */
export async function model(key) {
  return (await (await request("v1/models", { headers: headers(key) })).json()).data[0];
}

/** Ask for an answer; yields {text} as it comes and at the end {reason, usage}. */
export async function* answer(body, key, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: headers(key),
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let rest = "", isDone = false;
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const part = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Error("连接中断，回答不完整。");
    });
    if (part.done) break;
    const events = (rest + part.value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      if (event === "data: [DONE]") isDone = true;
      else yield* parts(JSON.parse(event.slice(6)));
    }
  }
  if (!isDone) throw new Error("连接中断，回答不完整。");
}

function* parts(chunk) {
  if (chunk.error) throw new Error(chunk.error.message);
  if (chunk.usage) yield { usage: chunk.usage };
  for (const choice of chunk.choices) {
    if (choice.delta.content) yield { text: choice.delta.content };
    if (choice.finish_reason) yield { reason: choice.finish_reason };
  }
}
