"""The terminal chat as a user meets it: lines in, text out, Ctrl-C; and what it forgets when the context is full."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, script
from safetensors.torch import save_file
from test_model import random_model

from chatglm_tokenizer.chat import encode_prompt
from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer
from generation.terminal import left_out


@pytest.fixture(scope="module")
def chatty(vocabulary, tmp_path_factory):
    """A checkpoint of a random model that talks without end."""
    folder = tmp_path_factory.mktemp("chatty")
    model = random_model(vocab_size=2500, max_seq_len=4000)
    save_file(
        {k: v for k, v in model.state_dict().items() if k != "output.weight"}, folder / "model.safetensors"
    )
    fields = {k: v for k, v in vars(model.args).items() if k != "head_dim"}
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(vocabulary.read_bytes())
    return folder


def talk(folder, lines: str, *options: object) -> str:
    return script("eval.py", "--model", folder, "--chat", "--max_new_tokens", 6, *options, input=lines).stdout


def test_commands(chatty) -> None:
    out = talk(
        chatty,
        "/regen\n/system 你是医生\n你好\n/regen\n/stats\n再说\n/clear\n/nonsense\n/help\n问题\n/exit\n不读\n",
    )
    assert out.count("答：") == 4
    for expected in ("还没有问题", "已设定系统提示", "token/s", "历史已清空", "没有命令 /nonsense"):
        assert expected in out
    assert out.count("/system 文字") == 2  # at the start and after /help
    assert talk(chatty, "你好").count("答：") == 1  # the end of the input ends the program


def test_stop_strings_and_threads_from_the_command_line(chatty) -> None:
    out = talk(chatty, "你好\n/exit\n", "--threads", 1, "--stop", "的", "。", "--presence_penalty", 0.5)
    assert "的" not in out.split("答：")[1].split("问：")[0]


def test_a_long_dialogue_forgets_its_oldest_turns_with_a_notice(chatty) -> None:
    lines = "".join(f"第{i}个问题{'很长' * 400}\n" for i in range(6))
    out = talk(
        chatty, "/system 保留\n" + lines + "很长" * 9000 + "\n/system " + "很长" * 9000 + "\n问\n/exit\n"
    )
    assert out.replace("不能回答：", "").count("答：") == 7
    assert "最早的 1 轮不再参与回答" in out and "只用了它的末尾" in out
    assert "不能回答：提示词有" in out  # a system text is never cut


def test_what_is_left_out_is_counted_and_never_the_system_text(vocabulary) -> None:
    tokenizer = ChatGLMTokenizer(vocabulary)
    messages = [{"role": "system", "content": "系统"}]
    for i in range(5):
        messages += [{"role": "user", "content": f"问题{i}"}, {"role": "assistant", "content": f"回答{i}"}]
    messages = messages[:-1]
    whole = encode_prompt(messages, tokenizer, 10**6)
    head = tokenizer.encode("系统")
    for room in (len(whole), len(whole) - 1, len(whole) // 2, len(head) + 2):
        prompt = encode_prompt(messages, tokenizer, room)
        assert prompt[: len(head)] == head
        assert len(prompt) <= room
        notice = left_out(messages, prompt, tokenizer)
        assert (notice == "") == (room == len(whole))
        assert ("问题" in notice) == (room == len(head) + 2)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_stops_the_answer_and_not_the_program(chatty) -> None:
    command = [sys.executable, "-u", str(ROOT / "eval.py"), "--model", str(chatty), "--chat"]
    process = subprocess.Popen(
        [*command, "--max_new_tokens", "3900"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdin.write("你好\n".encode())
    process.stdin.flush()
    seen = b""
    while "答：".encode() not in seen or not seen.split("答：".encode())[1]:
        seen += os.read(process.stdout.fileno(), 1000)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    out, errors = process.communicate(b"/exit\n", timeout=60)
    assert process.returncode == 0, errors.decode()
    assert "已停止" in (seen + out).decode(errors="replace")
