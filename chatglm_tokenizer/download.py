"""Download the ChatGLM2 vocabulary and check it: `python chatglm_tokenizer/download.py`."""

import hashlib
import http.client
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from any folder

from chatglm_tokenizer.tokenization_chatglm import CHATGLM2, CHATGLM2_SHA256
from stage import StageConfig, UserError, atomic_path, run_stage

# Tried in this order; the hub first, then its mirrors in China.
SOURCES = (
    "https://huggingface.co/THUDM/chatglm2-6b/resolve/main/tokenizer.model",
    "https://hf-mirror.com/THUDM/chatglm2-6b/resolve/main/tokenizer.model",
    "https://modelscope.cn/models/ZhipuAI/chatglm2-6b/resolve/master/tokenizer.model",
)


@dataclass
class Config(StageConfig):
    """下载 ChatGLM2 词表（约 1 MB）并核对 sha256。"""

    out: Path = CHATGLM2  # 保存到哪里
    timeout: float = 20.0  # 每个下载源等待的秒数


def main(cfg: Config) -> None:
    if cfg.out.is_file() and sha256(cfg.out.read_bytes()) == CHATGLM2_SHA256:
        print(f"{cfg.out} 已存在且校验正确。")
        return
    for url in SOURCES:
        try:
            with urllib.request.urlopen(url, timeout=cfg.timeout) as response:
                content = response.read()
        except (OSError, http.client.HTTPException) as error:  # refused, or cut off half-way
            print(f"{url}：下载失败（{error}）")
            continue
        if sha256(content) != CHATGLM2_SHA256:
            print(f"{url}：内容的 sha256 不符，已丢弃")
            continue
        with atomic_path(cfg.out) as temporary:
            temporary.write_bytes(content)
        print(f"已保存 {cfg.out}（sha256 校验正确）。")
        return
    raise UserError(
        "无法下载。请在能上网的机器上从下列任一地址下载 tokenizer.model，\n  "
        + "\n  ".join(SOURCES)
        + f"\n放到 {cfg.out} 后重跑本命令核对（sha256 {CHATGLM2_SHA256}）。"
    )


def sha256(content: bytes) -> str:
    """Hexadecimal SHA-256 of bytes."""
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    run_stage(Config, main)
