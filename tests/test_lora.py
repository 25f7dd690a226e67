"""Adapters: they learn, resume, merge and travel; peft itself loads them onto the exported model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import script, torchrun
from hf_folders import LLAMA3, write_llama, write_tokenizer
from safetensors.torch import load_file, save_file

import average
import merge
import pretrain
import sft
from exchange.hf_config import hf_from_args
from exchange.hf_weights import to_hf
from loss import cross_entropy
from model import ModelArgs, Transformer
from sources.sft_csv import write_sft_csv
from stage import StageConfig, UserError, parse
from training import checkpoint
from training.log import read_log
from training.lora import LoraConfig, prepare, targets_of
from training.runtime import Runtime

peft = pytest.importorskip("peft")
ALONE = Runtime(torch.device("cpu"), torch.float32)
FILES = {
    "adapter_model.safetensors", "adapter_config.json", "base.json", "optimizer.safetensors", "config.json",
    "train_config.json", "state.json", "checksums.json",
}  # fmt: skip
LAST = "step_00000008"
ROWS = [
    {"prompt": f"{a}加{b}等于几？", "answer": f"{a}加{b}等于{a + b}。"} for a in range(8) for b in range(8)
]
LORA = ["--lora", "--lora_rank", 4, "--lora_alpha", 8, "--lr", 2e-2]
TOKENS = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "sft.csv"
    write_sft_csv(path, [dict(system="", history=[], **row) for row in ROWS])
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory, vocabulary) -> Path:
    """A checkpoint of our own: tied, grouped queries."""
    out = tmp_path_factory.mktemp("own") / "base"
    torch.manual_seed(0)
    args = ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=2600, max_seq_len=64)
    model = Transformer(args)
    with torch.no_grad():  # of a trained model's size: a head that is frozen must be able to say something
        model.tok_embeddings.weight *= 8
    writer = checkpoint.Writer(out, ALONE, keep_last=1)
    files = {"tokenizer.model": vocabulary.read_bytes()}
    writer.save(0, model, None, StageConfig(), files, {})
    writer.wait()
    return out / "step_00000000"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A Hugging Face folder: untied, grouped queries."""
    folder = tmp_path_factory.mktemp("llama") / "hf"
    tokenizer = write_tokenizer(folder, "llama3")
    write_llama(folder, vocab_size=len(tokenizer), tie_word_embeddings=False, initializer_range=0.05)
    return folder


def tune(rows: Path, base: Path, out: Path, *options: object, steps: int = 8) -> None:
    """Run sft.py on a command line, in this process: starting another takes longer than the training."""
    arguments = [
        "--data", rows, "--init", base, "--out", out, "--batch", 16, "--max_steps", steps, "--warmup", 0,
        "--valid_fraction", 0.1, "--log_every", 1, "--precision", "fp32", "--device", "cpu", *options,
    ]  # fmt: skip
    sft.main(parse(sft.Config, list(map(str, arguments))))


def refused(rows: Path, base: Path, out: Path, *options: object) -> str:
    """What the user is told."""
    with pytest.raises(UserError) as error:
        tune(rows, base, out, *options)
    return str(error.value)


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_log(out / "log.jsonl") if "loss" in row]


def merge_adapters(*arguments: object) -> None:
    """Run merge.py on a command line, in this process."""
    merge.main(parse(merge.Config, list(map(str, arguments))))


def logits(model: torch.nn.Module, vocab: int) -> torch.Tensor:
    with torch.no_grad():
        result = model.eval()(TOKENS % vocab)
    return getattr(result, "logits", result)


def as_hf(folder: Path, to: Path) -> Path:
    """What an export of a checkpoint is: config.json and weights."""
    loaded = checkpoint.load(folder)
    to.mkdir()
    weights = {k: v.contiguous() for k, v in to_hf(loaded.model.state_dict(), loaded.model.args).items()}
    save_file(weights, to / "model.safetensors", {"format": "pt"})
    (to / "config.json").write_text(json.dumps(hf_from_args(loaded.model.args)))
    return to


def in_peft(base: Path, adapter: Path):
    from transformers import LlamaForCausalLM

    return peft.PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter)
    )


@pytest.fixture(scope="module")
def tuned(rows, own, llama, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Runs by name: base and folder."""
    out = tmp_path_factory.mktemp("tuned")
    for name, base in (("own", own), ("llama", llama)):
        tune(rows, base, out / f"{name}-lora", *LORA)
        tune(rows, base, out / f"{name}-full", "--lr", 1e-3)
    embed = [*LORA, "--lora_embed", "--dora", "--rslora", "--neftune", 5]
    tune(rows, own, out / "own-embed", *embed)
    tune(rows, llama, out / "llama-embed", *embed, "--lora_targets", "attention", "up_proj")
    bases = {"own": own, "llama": llama}
    return {f.name: (bases[f.name.split("-")[0]], f) for f in out.iterdir()}


@pytest.mark.parametrize("name", ["own-lora", "own-full", "llama-lora", "llama-full", "own-embed"])
def test_the_loss_falls(tuned, name) -> None:
    found = losses(tuned[name][1])
    assert found[-1] < 0.93 * found[0]


def test_a_step_holds_the_adapters_alone(tuned, own) -> None:
    folder = checkpoint.find(tuned["own-lora"][1])
    assert {f.name for f in folder.iterdir()} == FILES | {"tokenizer.model"}
    sizes = [
        (p / n).stat().st_size for p, n in ((folder, "adapter_model.safetensors"), (own, "model.safetensors"))
    ]
    assert sizes[0] < sizes[1] / 10
    optimizer = load_file(folder / "optimizer.safetensors")
    assert all(".lora_" in name for name in optimizer)


@pytest.mark.parametrize("name", ["own-lora", "llama-lora", "own-embed", "llama-embed"])
def test_peft_loads_the_adapters_onto_the_hugging_face_model(tuned, name, tmp_path) -> None:
    base, out = tuned[name]
    hf = as_hf(base, tmp_path / "hf") if name.startswith("own") else base
    ours = checkpoint.load(out)
    theirs = in_peft(hf, checkpoint.find(out))
    vocab = ours.model.args.vocab_size
    expected = logits(ours.model, vocab)
    assert (expected - logits(theirs, vocab)).abs().max() < 1e-4
    assert (expected - logits(checkpoint.load(base).model, vocab)).abs().max() > 0.01
    assert (expected - logits(theirs.merge_and_unload(), vocab)).abs().max() < 1e-4  # peft's own merging


@pytest.mark.parametrize("name", ["own-lora", "llama-embed", "own-embed"])
def test_merged_is_what_was_trained(tuned, name, tmp_path) -> None:
    base, out = tuned[name]
    folder = checkpoint.find(out)
    saved = json.loads((folder / "train_config.json").read_text())
    known = {k: v for k, v in saved.items() if k in LoraConfig.__dataclass_fields__}
    cfg = LoraConfig(**known)
    cfg.seed, cfg.estimate, cfg.shard, cfg.out = 0, False, False, tmp_path
    cfg.lora_targets = tuple(cfg.lora_targets)
    model = checkpoint.load(base).model
    prepare(model, cfg, ALONE, base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    checkpoint.restore(folder, model, optimizer)
    merge_adapters("--adapters", out, "--out", tmp_path / "merged")
    merged = checkpoint.load(tmp_path / "merged")
    vocab = model.args.vocab_size
    assert (logits(model, vocab) - logits(merged.model, vocab)).abs().max() < 1e-5
    tied = merged.model.args.tie_embeddings
    assert tied == (name != "llama-embed")
    assert (merged.model.output.weight is merged.model.tok_embeddings.weight) == tied
    assert merged.tokenizer.sha256 == checkpoint.load(base).tokenizer.sha256


def resumed_in_the_middle(rows: Path, base: Path, folder: Path, *options: object) -> None:
    """A run of 8 steps, and one that lost what came after the fourth, end with the same bits."""
    options = (*options, "--save_every", 4, "--keep_last", 9)
    tune(rows, base, folder / "one", *options)
    shutil.copytree(folder / "one", folder / "two")
    shutil.rmtree(folder / "two" / LAST)
    tune(rows, base, folder / "two", *options, "--resume")
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        one, two = (load_file(folder / run / LAST / name) for run in ("one", "two"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_resumed_run_has_the_same_bits(rows, own, tmp_path, capsys) -> None:
    resumed_in_the_middle(rows, own, tmp_path, *LORA, "--lora_dropout", 0.1, "--neftune", 5, "--lora_embed")
    assert "从第 4 步开始" in capsys.readouterr().out


def test_a_run_goes_on_with_what_it_began_with(tuned, rows, own, llama, tmp_path) -> None:
    out = tmp_path / "run"
    shutil.copytree(tuned["own-lora"][1], out)
    assert "全部权重" in refused(rows, own, tuned["own-full"][1], *LORA, "--resume")
    assert "--lora" in refused(rows, own, out, "--resume")
    assert "lora_alpha" in refused(rows, own, out, *LORA, "--lora_alpha", 4, "--resume")
    other = tmp_path / "other"
    shutil.copytree(own, other)
    weights = load_file(other / "model.safetensors")
    weights["norm.weight"] += 1
    save_file(weights, other / "model.safetensors")
    (other / "checksums.json").unlink()
    assert "另一个模型" in refused(rows, other, out, *LORA, "--resume")
    assert {f.name for f in out.glob("step_*")} == {"step_00000008"}  # nothing was set aside as damaged


def test_several_adapters_add_up(tuned, tmp_path, capsys) -> None:
    base, out = tuned["own-lora"]
    second = tuned["own-embed"][1]
    before = checkpoint.load(base).model.state_dict()
    one, two = (checkpoint.load(run).model.state_dict() for run in (out, second))
    merge_adapters("--adapters", out, second, "--weights", 0.7, 0.3, "--out", tmp_path / "both")
    both = checkpoint.load(tmp_path / "both").model.state_dict()
    for name, value in both.items():
        expected = before[name] + 0.7 * (one[name] - before[name]) + 0.3 * (two[name] - before[name])
        assert torch.allclose(value, expected, atol=1e-6)
    shorter = shutil.copytree(checkpoint.find(second), tmp_path / "shorter")
    shape = json.loads((shorter / "config.json").read_text())
    (shorter / "config.json").write_text(json.dumps(shape | {"max_seq_len": 32}))
    assert "提示" not in capsys.readouterr().out
    merge_adapters("--adapters", out, shorter, "--out", tmp_path / "mixed")
    assert "max_seq_len=32 下训练的" in capsys.readouterr().out
    with pytest.raises(UserError, match="是适配器"):
        average.main(parse(average.Config, ["--models", str(out), str(second)]))
    with pytest.raises(UserError, match="一一对应"):
        merge_adapters("--adapters", out, "--weights", 1, 2)
    with pytest.raises(UserError, match="没有适配器"):
        merge_adapters("--adapters", base, "--out", tmp_path / "n")


def test_adapters_of_others_merge_and_a_tied_matrix_is_not_torn(own, tmp_path) -> None:
    from transformers import LlamaForCausalLM

    hf = as_hf(own, tmp_path / "hf")

    def foreign(folder: Path, targets: list[str], **options) -> Path:
        torch.manual_seed(3)
        config = peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=targets, **{"init_lora_weights": False, **options}
        )
        model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(hf), config)
        model.save_pretrained(folder)
        return folder

    # Ranks and alphas of single modules, as peft allows.
    plain = foreign(
        tmp_path / "a",
        ["q_proj", "k_proj", "down_proj"],
        rank_pattern={"q_proj": 2},
        alpha_pattern={"q_proj": 9},
    )
    merge_adapters("--adapters", plain, "--base", own, "--out", tmp_path / "merged")
    merged = checkpoint.load(tmp_path / "merged").model
    assert (logits(merged, 2600) - logits(in_peft(hf, plain), 2600)).abs().max() < 1e-4

    torn = foreign(tmp_path / "b", ["q_proj", "embed_tokens", "lm_head"])
    with pytest.raises(UserError, match="--untie"):
        merge_adapters("--adapters", torn, "--base", own, "--out", tmp_path / "x")
    merge_adapters("--adapters", torn, "--base", own, "--untie", "--out", tmp_path / "untied")
    untied = checkpoint.load(tmp_path / "untied").model
    assert not untied.args.tie_embeddings
    assert (logits(untied, 2600) - logits(in_peft(hf, torn), 2600)).abs().max() < 1e-4
    # peft has saved the tables themselves too; they must be the base's.
    saved = load_file(torn / "adapter_model.safetensors")
    table = "base_model.model.lm_head.base_layer.weight"
    saved[table] = saved[table] + 1
    save_file(saved, torn / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lm_head 训练时的原矩阵"):
        merge_adapters("--adapters", torn, "--base", own, "--untie", "--out", tmp_path / "y")

    other = foreign(tmp_path / "c", ["q_proj"], use_qalora=True, qalora_group_size=4)
    with pytest.raises(UserError, match="use_qalora"):  # not W + B A
        merge_adapters("--adapters", other, "--base", own, "--out", tmp_path / "z")

    for begin in ("pissa", "olora"):
        changed = foreign(tmp_path / begin, ["q_proj"], init_lora_weights=begin)
        with pytest.raises(UserError, match=begin):
            merge_adapters("--adapters", changed, "--base", own, "--out", tmp_path / "z")


def test_adapters_of_others_bring_their_vocabulary(llama, tmp_path) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(llama)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "a")
    options = ["--adapters", tmp_path / "a", "--base", llama, "--out"]
    merge_adapters(*options, tmp_path / "plain")
    assert checkpoint.load(tmp_path / "plain").tokenizer.chat_template == LLAMA3
    write_tokenizer(tmp_path / "a", "llama3")
    (tmp_path / "a" / "chat_template.jinja").write_text(LLAMA3 + "!")
    merge_adapters(*options, tmp_path / "theirs")
    assert checkpoint.load(tmp_path / "theirs").tokenizer.chat_template == LLAMA3 + "!"
    merge_adapters(*options, tmp_path / "chosen", "--tokenizer", llama)
    assert checkpoint.load(tmp_path / "chosen").tokenizer.chat_template == LLAMA3


def test_answers_come_from_the_adapters(tuned) -> None:
    out = tuned["own-lora"][1]
    answered = script("eval.py", "--model", out, "--questions", "1加1等于几？", "--max_new_tokens", 4).stdout
    assert str(checkpoint.find(out)) in answered and "1加1等于几？" in answered


def test_a_base_that_moved_or_changed_is_noticed(tuned, own, tmp_path) -> None:
    moved = tmp_path / "adapter"
    shutil.copytree(checkpoint.find(tuned["own-lora"][1]), moved)
    where = json.loads((moved / "base.json").read_text())
    assert Path(where["path"]) == own
    (moved / "base.json").write_text(json.dumps(where | {"path": "/gone", "relative": "gone"}))
    with pytest.raises(UserError, match="--base"):
        checkpoint.load(moved)
    shutil.copytree(own, tmp_path / "base")
    (moved / "base.json").write_text(json.dumps(where | {"path": "/gone", "relative": "../base"}))
    assert checkpoint.load(moved).model.args.tie_embeddings
    (moved / "base.json").write_text(json.dumps(where | {"checksum": "0"}))
    with pytest.raises(UserError, match="另一个模型"):
        checkpoint.load(moved)
    content = bytearray((moved / "adapter_model.safetensors").read_bytes())
    content[-1] ^= 1
    (moved / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="校验和"):
        checkpoint.load(moved)


def test_settings_that_cannot_work() -> None:
    with pytest.raises(UserError, match="--lora_embed"):
        targets_of(("wq", "lm_head"))
    with pytest.raises(UserError, match="q_proj"):
        targets_of(("query",))
    with pytest.raises(UserError, match="--lora_rank 是适配器的设置"):  # all weights would be trained instead
        parse(sft.Config, ["--lora_rank", "8"])
    assert targets_of(("attention", "q_proj", "gate_proj")) == ["wq", "wk", "wv", "wo", "w1"]
    with pytest.raises(UserError, match="--shard"):
        cfg = LoraConfig(qlora=True)
        cfg.shard = True
        cfg.check()
    with pytest.raises(UserError, match="--init"):
        parse(pretrain.Config, ["--lora", "--data", __file__])


def test_the_last_layers_alone(rows, own, tmp_path) -> None:
    tune(rows, own, tmp_path / "run", "--train_layers", 1, "--lr", 1e-3, steps=3)
    before, after = (checkpoint.load(f).model.state_dict() for f in (own, tmp_path / "run"))
    changed = {
        name.split(".")[0] + name.split(".")[1]
        for name in after
        if not torch.equal(before[name], after[name])
    }
    assert changed == {"layers1", "normweight"}


def test_noise_is_of_the_paper_s_size_and_in_training_alone(own, tmp_path) -> None:
    model = checkpoint.load(own).model
    clean = model.tok_embeddings(TOKENS)
    cfg = LoraConfig(neftune=5)
    prepare(model, cfg, ALONE, own)
    assert torch.equal(model.eval().tok_embeddings(TOKENS), clean)
    noise = (model.train().tok_embeddings(TOKENS) - clean).abs()
    bound = 5 / (40 * 64) ** 0.5
    assert 0.9 * bound < noise.max() <= bound * 1.0001


@pytest.mark.parametrize("options", [[], ["--shard"]])
def test_two_processes_train_the_same_adapters(tuned, rows, own, tmp_path, options) -> None:
    torchrun(
        2, "sft.py", "--data", rows, "--init", own, "--out", tmp_path, "--batch", 16, "--max_steps", 8,
        "--warmup", 0, "--valid_fraction", 0.1, "--sample_every", 0, "--precision", "fp32", "--device", "cpu",
        *LORA, *options,
    )  # fmt: skip
    one, two = (
        load_file(checkpoint.find(out) / "adapter_model.safetensors")
        for out in (tuned["own-lora"][1], tmp_path)
    )
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=2e-3), name  # AdamW magnifies rounding
    assert checkpoint.load(tmp_path).model.num_params() > 0


def test_continued_pretraining_with_adapters(own, tokens, tmp_path, capsys) -> None:
    arguments = [
        "--init", own, "--data", tokens, "--valid", tokens.parent / "valid.bin", "--out", tmp_path,
        "--lora", "--lora_embed", "--max_steps", 8, "--batch_tokens", 1024, "--micro_batch", 16, "--eval_tokens", 2000,
        "--precision", "fp32", "--lr", 3e-3, "--warmup", 0, "--log_every", 1, "--sample_every", 0,
    ]  # fmt: skip
    pretrain.main(parse(pretrain.Config, list(map(str, arguments))))
    said = capsys.readouterr().out
    assert "训练其中" in said and f"{own}；续训那个模型时 --keep_last 会删掉它" in said
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.3
    merged = checkpoint.load(tmp_path).model
    assert merged.output.weight is merged.tok_embeddings.weight


def test_four_bit_weights_train(tuned, rows, llama, tmp_path, capsys) -> None:
    pytest.importorskip("bitsandbytes")
    resumed_in_the_middle(rows, llama, tmp_path, "--qlora", *LORA[1:])
    q, plain = losses(tmp_path / "one"), losses(tuned["llama-lora"][1])
    assert q[-1] < 0.93 * q[0]
    assert 0 < abs(q[0] - plain[0]) < 0.1  # rounded to four bits, and hardly worse for it
    printed = capsys.readouterr().out
    assert "训练其中" in printed
    assert checkpoint.load(tmp_path / "one").model.num_params() == checkpoint.load(llama).model.num_params()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_head_gets_no_gradient_and_passes_on_the_same(dtype) -> None:
    torch.manual_seed(0)
    weight, targets = torch.randn(1500, 16), torch.randint(1500, (700,))
    found = []
    for is_trained in (True, False):
        x = torch.randn(700, 16, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_(True)
        head = weight.to(dtype, copy=True).requires_grad_(is_trained)
        cross_entropy(x, head, targets).backward()
        assert (head.grad is not None) == is_trained
        found.append(x.grad)
    assert torch.equal(*found)
