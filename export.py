"""Stage 7: a checkpoint for other programs: transformers, vLLM, llama.cpp, ollama, llama2.c, the original project.

python export.py --model out/sft --format hf --check
python export.py --model out/sft --format gguf --dtype q8_0 --out out/export/chat-q8_0.gguf
python export.py --model out/sft --format llama2c
python export.py --model out/sft --format pth

Which program wants which: docs/export.md.
"""

from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from safetensors import SafetensorError
from tyro.conf import arg

from chatglm_tokenizer.chat import CHAT_TEMPLATE
from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer
from exchange import check, llamacpp
from exchange.llama2c import write_llama2c, write_llama2c_tokenizer
from exchange.modelfile import modelfile
from exchange.original import write_pth
from sources.report import table
from stage import DEMO_OUT, ROOT, StageConfig, UserError, atomic_path, need, require, run_stage
from training import checkpoint
from training.checkpoint import Checkpoint

TORCH_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
DTYPES = {"hf": tuple(TORCH_NAMES), "llama2c": ("f32",), "pth": ("f32",)}
SUFFIXES = {"hf": "", "gguf": ".gguf", "llama2c": ".bin", "pth": ".pth"}
# What an earlier export may have left in a folder.
HF_FILES = {"config.json", "generation_config.json", "model*.safetensors*", "token*"}
HF_FILES |= {"chat_template.*", "added_tokens.json", "vocab.json", "merges.txt", "special_tokens_map.json"}

CHECK_HELP = "写完后用别的程序读回来，比较 logits 与 token id，不一致就以 1 退出"


@dataclass
class Config(StageConfig):
    """把检查点导出给其他程序：transformers、vLLM、llama.cpp、ollama、LM Studio、llama2.c、原项目。"""

    model: Path = ROOT / "out" / "sft"  # 检查点文件夹（取其中最新的），或原项目的 .pth
    format: Literal["hf", "gguf", "llama2c", "pth"] = "hf"  # 导出成什么格式
    dtype: Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] = "f32"  # 权重的类型
    out: Path | None = None  # 写到哪里（hf 是文件夹，其他是文件）；默认 out/export/ 下
    # The name `check` is taken by the method.
    verify: Annotated[bool, arg(name="check", help=CHECK_HELP)] = False
    overwrite: bool = False  # 覆盖以前的导出
    name: str = ""  # 写进 GGUF 的模型名；默认用输出的文件名
    shard_gb: float = 5.0  # hf：权重超过多少 GB 就分成几个文件
    tokenizer: Path | None = None  # 词表；默认用检查点里的（.pth 默认用 ChatGLM2 词表）
    n_heads: int | None = None  # 原项目 .pth 的注意力头数；公布过的规模不必填

    DEMO = dict(model=DEMO_OUT / "sft")
    INPUT = "model"

    def check(self) -> None:
        """Raise UserError for settings that cannot work."""
        allowed = DTYPES.get(self.format, (self.dtype,))
        condition = f"对 --format {self.format} 只能是 {'、'.join(allowed)}"
        require(self.dtype in allowed, "dtype", self.dtype, condition)
        require(self.shard_gb > 0, "shard_gb", self.shard_gb, "必须大于 0")
        suffix = SUFFIXES[self.format]
        is_named = self.out is None or not suffix or self.out.suffix == suffix
        require(is_named, "out", self.out, f"对 --format {self.format} 应以 {suffix} 结尾")

    def destination(self) -> Path:
        """Where the export goes."""
        name = "hf" if self.format == "hf" else f"model-{self.dtype}{SUFFIXES[self.format]}"
        return self.out or ROOT / "out" / "export" / name


def main(cfg: Config) -> None:
    if cfg.demo:
        need(cfg.model, "sft.py", cfg)
    out = cfg.destination()
    refuse_to_overwrite(cfg, out)
    loaded = checkpoint.load(cfg.model, tokenizer=cfg.tokenizer, n_heads=cfg.n_heads)
    loaded.model.eval()
    print(f"模型：{loaded.path}（参数 {loaded.model.num_params() / 1e6:.2f}M）", flush=True)
    write = {
        "hf": write_hf_folder,
        "gguf": write_gguf_file,
        "llama2c": write_llama2c_files,
        "pth": write_state,
    }
    try:
        write[cfg.format](cfg, loaded, out)
    except (SafetensorError, RuntimeError) as error:  # what a full disk looks like from below
        raise UserError(f"无法写入 {out}（磁盘已满或不可写？）：{str(error).splitlines()[0]}") from error
    print(f"已写出 {out}（{size_of(out) / 1e6:,.1f} MB）。", flush=True)
    if cfg.verify and not report(findings(cfg, loaded, out)):
        raise UserError(f"{out} 读回来的结果与检查点不一致，见上表；请不要使用它。")


def refuse_to_overwrite(cfg: Config, out: Path) -> None:
    """Raise UserError if something stands where the export goes that may not be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if out.resolve() in (cfg.model.resolve(), *cfg.model.resolve().parents):
        raise UserError(f"{out} 是要导出的模型所在的地方，不覆盖；请用 --out 换一个路径。")
    if out.is_dir() != (cfg.format == "hf"):
        raise UserError(f"{out} 是{'文件夹' if out.is_dir() else '文件'}；请用 --out 换一个路径。")
    if not cfg.overwrite:
        raise UserError(f"{out} 已存在；加 --overwrite 覆盖，或用 --out 换一个路径。")
    if out.is_dir():
        foreign = [f.name for f in out.iterdir() if f.is_dir() or not any(f.match(name) for name in HF_FILES)]
        if foreign:
            raise UserError(f"{out} 里还有别的内容（如 {foreign[0]}），不覆盖；请用 --out 换一个路径。")


def write_hf_folder(cfg: Config, loaded: Checkpoint, out: Path) -> None:
    from exchange.hf_folder import write_hf

    with atomic_path(out) as temporary:
        write_hf(
            temporary,
            loaded.model,
            loaded.tokenizer,
            template_of(loaded),
            TORCH_NAMES[cfg.dtype],
            cfg.shard_gb,
        )


def write_gguf_file(cfg: Config, loaded: Checkpoint, out: Path) -> None:
    """The .gguf and, beside it, ollama's Modelfile."""
    if not find_spec("gguf"):
        raise UserError("写 GGUF 需要 gguf：请先 pip install gguf。")
    from exchange.gguf_file import write_gguf

    ollama = out.with_suffix(".Modelfile")
    check_free(cfg, ollama)
    with atomic_path(out) as temporary:
        types = write_gguf(
            temporary, loaded.model, loaded.tokenizer, template_of(loaded), cfg.name or out.stem, cfg.dtype
        )
    show_types(cfg, types)
    ours = template_of(loaded) == CHAT_TEMPLATE
    with atomic_path(ollama) as temporary:
        text = modelfile(out.name, loaded.model.args, ours, loaded.tokenizer.template_names)
        temporary.write_text(text, encoding="utf-8")
    print(f"ollama：ollama create {out.stem} -f {ollama}")


def check_free(cfg: Config, path: Path) -> None:
    """UserError where a second file would take the place of another."""
    if path.exists() and not cfg.overwrite:
        raise UserError(f"{path} 已存在；加 --overwrite 覆盖，或用 --out 换一个文件夹。")


def show_types(cfg: Config, types: Counter) -> None:
    print("张量：" + "，".join(f"{kind} {count} 个" for kind, count in types.items()))
    if types["F16"] and cfg.dtype != "f16":
        print(f"{types['F16']} 个矩阵的行宽不能被 32 整除，{cfg.dtype} 放不下，保留为 f16。")


def write_llama2c_files(cfg: Config, loaded: Checkpoint, out: Path) -> None:
    """The .bin and, beside it, tokenizer.bin."""
    if not isinstance(loaded.tokenizer, ChatGLMTokenizer):
        raise UserError(
            "llama2.c 只认 SentencePiece 词表，这个模型的是 tokenizer.json；请用 --format hf 或 gguf。"
        )
    vocabulary = out.with_name("tokenizer.bin")
    if out == vocabulary:
        raise UserError(f"{out} 是词表的名字；请用 --out 给权重换一个名字。")
    check_free(cfg, vocabulary)
    with atomic_path(out) as weights, atomic_path(vocabulary) as pieces:
        write_llama2c(weights, loaded.model)
        write_llama2c_tokenizer(pieces, loaded.tokenizer, loaded.model.args.vocab_size)
    print(f"运行：./run {out} -z {vocabulary} -t 0 -i 开头")


def write_state(cfg: Config, loaded: Checkpoint, out: Path) -> None:
    with atomic_path(out) as temporary:
        write_pth(temporary, loaded.model)
    a = loaded.model.args
    print(
        f"原项目要用：ModelArgs(dim={a.dim}, n_layers={a.n_layers}, n_heads={a.n_heads}, "
        f"n_kv_heads={a.n_kv_heads}, vocab_size={a.vocab_size}, multiple_of={a.multiple_of}, "
        f"max_seq_len={a.max_seq_len})"
    )


def template_of(loaded: Checkpoint) -> str | None:
    """The chat format: ours, or that of an imported model, which may have none."""
    ours = CHAT_TEMPLATE if isinstance(loaded.tokenizer, ChatGLMTokenizer) else None
    return loaded.tokenizer.chat_template or ours


def findings(cfg: Config, loaded: Checkpoint, out: Path) -> list[check.Finding]:
    """What an independent reader says about the export."""
    model, tokenizer = loaded.model, loaded.tokenizer
    if cfg.format == "hf":
        return check.check_hf(out, model, tokenizer, template_of(loaded), TORCH_NAMES[cfg.dtype])
    if cfg.format == "gguf":
        if llamacpp.find_python() is None:
            print(
                "没有 llama-cpp-python，只用 gguf 包读回权重；要用 llama.cpp 本身检查，请 pip install "
                f"llama-cpp-python，或把装了它的 Python 写进环境变量 {llamacpp.VARIABLE}。"
            )
        return check.check_gguf(out, model, tokenizer, cfg.dtype)
    return check.check_file(out, model)


def report(found: list[check.Finding]) -> bool:
    """Show what was found; returns whether all is well."""
    print(table(["检查", "结果", ""], [[f.what, f.figure, "通过" if f.ok else "不符"] for f in found]))
    return all(f.ok for f in found)


def size_of(path: Path) -> int:
    return sum(f.stat().st_size for f in path.iterdir()) if path.is_dir() else path.stat().st_size


if __name__ == "__main__":
    run_stage(Config, main)
