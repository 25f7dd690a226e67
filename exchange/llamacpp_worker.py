"""What llama.cpp makes of a GGUF file: `python llamacpp_worker.py MODEL.gguf REQUEST.json ANSWER.npz`.

A script of its own, because llama-cpp-python is usually built into an environment of its own; it needs nothing else.
The request: {"texts": [...], "special": bool, "prompts": [[id, ...], ...], "new": n, "stop": [id, ...], "length": the
context, "threads": n}. The answer: ids_N of each text, logits_N (T, V) and greedy_N of each prompt, and the template.

Keys and values in fp32 and no flash attention: as model.py computes; llama.cpp's defaults round them to f16.
"""

import json
import sys

import llama_cpp
import numpy as np

F32 = 0  # GGML_TYPE_F32


def plain_model_params() -> llama_cpp.llama_model_params:
    """llama.cpp's defaults, with the weights kept in the order of the file.

    The order that processors with AMX would get crashes (https://github.com/ggml-org/llama.cpp/issues/20824).
    """
    params = default_model_params()
    params.use_extra_bufts = False
    return params


default_model_params = llama_cpp.llama_cpp.llama_model_default_params
llama_cpp.llama_cpp.llama_model_default_params = plain_model_params  # Llama has no option for it


def main(model: str, request_path: str, answer_path: str) -> None:
    with open(request_path, encoding="utf-8") as file:
        request = json.load(file)
    length = request["length"]
    llama = llama_cpp.Llama(
        model, n_ctx=length, n_batch=length, n_ubatch=length, n_threads=request["threads"], logits_all=True,
        type_k=F32, type_v=F32, flash_attn=False, verbose=False,
    )  # fmt: skip
    answer = {"template": np.array(llama.metadata.get("tokenizer.chat_template", ""))}
    for number, text in enumerate(request["texts"]):
        ids = llama.tokenize(text.encode(), add_bos=True, special=request["special"])
        answer[f"ids_{number}"] = np.array(ids, dtype=np.int64)
    for number, prompt in enumerate(request["prompts"]):
        llama.reset()
        llama.eval(prompt)
        answer[f"logits_{number}"] = np.array(llama.scores[: len(prompt)], dtype=np.float32)
        answer[f"greedy_{number}"] = np.array(greedy(llama, request), dtype=np.int64)
    np.savez(answer_path, **answer)


def greedy(llama: llama_cpp.Llama, request: dict) -> list[int]:
    """The likeliest next ids, until a stop id."""
    new = []
    for _ in range(request["new"]):
        best = int(np.argmax(llama.scores[llama.n_tokens - 1]))
        if best in request["stop"]:
            break
        new.append(best)
        if len(new) < request["new"]:
            llama.eval([best])
    return new


if __name__ == "__main__":
    main(*sys.argv[1:])
