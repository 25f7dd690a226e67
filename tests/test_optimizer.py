"""Muon against torch's own and a singular value decomposition, skipped steps, processes, and recipes."""

import copy
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this file is also what the processes run

from conftest import script, torchrun

from model import ModelArgs, Transformer
from stage import UserError
from training import checkpoint
from training.config import TrainConfig
from training.log import read_log
from training.muon import Muon, orthogonalise
from training.optimizer import factor, make_optimizer, set_learning_rate
from training.recipes import RECIPES, choose_batch, settle


def small_model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelArgs(dim=36, n_layers=3, n_heads=2, hidden_dim=50, vocab_size=64, max_seq_len=16))


def settled(**settings: object) -> TrainConfig:
    return settle(TrainConfig(**settings), total=100, batch_tokens=None)


def set_gradients(model: nn.Module, seed: int) -> None:
    """Gradients that depend on the seed and the parameter alone, however many processes there are."""
    rng = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=rng)


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        set_gradients(model, seed)
        optimizer.step()


def tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The whole state, in the order of the parameters."""
    states = optimizer.state_dict()["state"]
    return [value.clone() for _, state in sorted(states.items()) for _, value in sorted(state.items())]


@pytest.mark.parametrize("shape", [(40, 40), (90, 40), (40, 90)])
def test_orthogonalise_keeps_the_directions_and_evens_out_the_lengths(shape) -> None:
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    matrices = u * torch.logspace(-2, 0, 40) @ vt * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]
    for given, got in zip(matrices, orthogonalise(matrices, steps=5), strict=True):
        u, _, vt = torch.linalg.svd(given.double(), full_matrices=False)
        inside = u.T @ got.double() @ vt.T  # in the basis of the singular vectors
        lengths = inside.diagonal()
        assert 0.6 < lengths.min() < lengths.max() < 1.3
        assert (inside - lengths.diag()).abs().max() < 1e-3
    assert torch.equal(orthogonalise(torch.zeros(1, *shape)), torch.zeros(1, *shape))


def test_muon_is_torchs_muon_for_hidden_matrices_and_torchs_adamw_for_the_rest() -> None:
    ours, theirs = small_model(), small_model()
    cfg = settled(lr=0.05, table_lr=0.01, weight_decay=0.2)
    optimizer = make_optimizer(ours, cfg, torch.bfloat16)
    hidden = [p for n, p in theirs.named_parameters() if n.startswith("layers.") and p.dim() == 2]
    vectors = [p for p in theirs.parameters() if p.dim() == 1]
    references = [
        torch.optim.Muon(hidden, lr=0.05, weight_decay=0.2, momentum=0.95, ns_steps=cfg.muon_steps),
        torch.optim.AdamW(
            [
                # A step forgets the same part of every matrix: 0.05 * 0.2 = 0.01 * 1.0.
                {"params": [theirs.tok_embeddings.weight], "weight_decay": 1.0},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=0.01,
            betas=(cfg.beta1, cfg.beta2),
        ),
    ]
    for seed in range(4):
        set_gradients(ours, seed)
        set_gradients(theirs, seed)
        optimizer.step()
        for reference in references:
            reference.step()
    start = small_model()
    for (name, a), b, c in zip(ours.named_parameters(), theirs.parameters(), start.parameters(), strict=True):
        assert (a - b).norm() < 0.01 * (b - c).norm(), name  # products in bf16 round differently in batches


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_step_with_found_inf_leaves_no_trace(kind) -> None:
    ours, unharmed = small_model(), small_model()
    optimizers = [make_optimizer(m, settled(optimizer=kind)) for m in (ours, unharmed)]
    take_steps(ours, optimizers[0], range(2))
    take_steps(unharmed, optimizers[1], range(2))
    before = [p.clone() for p in ours.parameters()] + tensors(optimizers[0])
    set_gradients(ours, 9)
    for value, p in zip((math.nan, math.inf), ours.layers[0].attention.parameters(), strict=False):
        p.grad[1, 2] = value
    optimizers[0].found_inf = torch.ones(())
    optimizers[0].step()
    after = [*ours.parameters(), *tensors(optimizers[0])]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    optimizers[0].found_inf = torch.zeros(())  # and the next good step is taken
    take_steps(ours, optimizers[0], range(2, 4))
    take_steps(unharmed, optimizers[1], range(2, 4))
    pairs = zip(ours.parameters(), unharmed.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_skipped_first_step_is_like_none() -> None:
    ours, unharmed = small_model(), small_model()
    optimizers = [make_optimizer(m, settled()) for m in (ours, unharmed)]
    optimizers[0].found_inf = torch.ones(())
    take_steps(ours, optimizers[0], range(7, 8))
    del optimizers[0].found_inf
    take_steps(ours, optimizers[0], range(2))
    take_steps(unharmed, optimizers[1], range(2))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), unharmed.parameters(), strict=True))


def test_torchs_grad_scaler_scales_and_skips() -> None:
    ours, plain = small_model(), small_model()
    optimizers = [make_optimizer(m, settled()) for m in (ours, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))  # makes the scale
    for seed in range(3):
        set_gradients(ours, seed)
        set_gradients(plain, seed)
        for p in ours.parameters():
            p.grad *= 1024
        if seed == 1:
            ours.layers[0].attention.wq.weight.grad[0, 0] = math.inf
        else:
            optimizers[1].step()
        scaler.step(optimizers[0])
        scaler.update(1024.0)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_state_survives_its_dict_and_torchs_distributed_form() -> None:
    model = small_model()
    optimizer = make_optimizer(model, settled())
    take_steps(model, optimizer, range(3))
    plain, portable = copy.deepcopy(model), copy.deepcopy(model)
    loaded = make_optimizer(plain, settled())
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it takes the tensors themselves
    named = make_optimizer(portable, settled())
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    assert "layers.0.attention.wq.weight" in state["state"]
    set_optimizer_state_dict(portable, named, state)
    for m, o in ((model, optimizer), (plain, loaded), (portable, named)):
        take_steps(m, o, range(3, 5))
    for other in (plain, portable):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_loaded_state_brings_no_old_rates(kind) -> None:
    before = make_optimizer(small_model(), settled(optimizer=kind, lr=0.05, weight_decay=0.5))
    now = make_optimizer(small_model(), settled(optimizer=kind, lr=0.01, weight_decay=0.1))
    now.load_state_dict(copy.deepcopy(before.state_dict()))
    assert [now.param_groups[0][key] for key in ("lr", "initial_lr", "weight_decay")] == [0.01, 0.01, 0.1]


def shard(model: Transformer) -> None:
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value.detach()


def worker(out: Path) -> None:
    """In each of several processes: the steps of `take_steps` on whole and on sharded parameters."""
    dist.init_process_group("gloo")
    results = {}
    for kind in ("whole", "sharded"):
        model, gradients = small_model(), small_model()
        if kind == "sharded":
            shard(model)
        optimizer = make_optimizer(model, settled())
        for seed in range(3):
            set_gradients(gradients, seed)
            for p, like in zip(model.parameters(), gradients.parameters(), strict=True):
                p.grad = like.grad.clone()
                if kind == "sharded":
                    p.grad = torch.distributed.tensor.distribute_tensor(p.grad, p.device_mesh, p.placements)
            optimizer.found_inf = torch.tensor(float(seed == 1))
            optimizer.step()
        named = get_optimizer_state_dict(model, optimizer)["state"]
        for name, p in model.named_parameters():
            results[f"{kind}.{name}"] = whole(p).contiguous()
            for key, value in named[name].items():
                results[f"{kind}.{name}.{key}"] = whole(value).contiguous()
    if dist.get_rank() == 0:
        save_file(results, out)
    dist.destroy_process_group()


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_that_hold_copies_or_shards_do_what_one_does(processes, tmp_path) -> None:
    model = small_model()
    optimizer = make_optimizer(model, settled())
    take_steps(model, optimizer, range(0, 3, 2))  # the middle one is skipped
    torchrun(processes, "tests/test_optimizer.py", tmp_path / "results.safetensors")
    results = load_file(tmp_path / "results.safetensors")
    state = get_optimizer_state_dict(model, optimizer)["state"]
    for kind in ("whole", "sharded"):
        for name, p in model.named_parameters():
            torch.testing.assert_close(results[f"{kind}.{name}"], p.detach(), rtol=0, atol=2e-6)
            for key, value in state[name].items():
                torch.testing.assert_close(results[f"{kind}.{name}.{key}"], value, rtol=0, atol=1e-6)


def test_schedules() -> None:
    cosine = settled(recipe="original", lr=1.0, min_lr=0.1, warmup=10)
    rates = [factor(step, 1000, cosine) for step in range(1000)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == 1.0
    assert rates[505] == pytest.approx(0.55, abs=0.01)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    wsd = settled(lr=1.0, min_lr=0.0, warmup=0, schedule="wsd", decay_fraction=0.2)
    rates = [factor(step, 100, wsd) for step in range(100)]
    assert rates[:80] == [1.0] * 80
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)


def test_rates_of_all_groups_follow_the_schedule() -> None:
    optimizer = make_optimizer(small_model(), settled(lr=0.02, table_lr=0.006))
    assert [g["initial_lr"] for g in optimizer.param_groups] == [0.02, 0.006, 0.006]
    assert set_learning_rate(optimizer, 0.5) == 0.01
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.003, 0.003]
    assert isinstance(optimizer, Muon)
    assert isinstance(make_optimizer(small_model(), settled(optimizer="adamw")), torch.optim.AdamW)


def test_a_recipe_fills_in_what_is_left_open_and_no_more() -> None:
    original = settle(TrainConfig(recipe="original"), total=50_000, batch_tokens=32_768)
    assert (original.optimizer, original.lr, original.min_lr) == ("adamw", 3e-4, 1e-5)
    assert (original.table_lr, original.weight_decay, original.warmup) == (3e-4, 0.1, 1000)
    assert settle(TrainConfig(recipe="original"), 500, None).warmup == 50  # never more than a tenth …
    assert settle(TrainConfig(warmup=400), 500, None).warmup == 400  # … unless it was asked for
    ours = settle(TrainConfig(), total=1000, batch_tokens=1000)
    larger = settle(TrainConfig(), total=1000, batch_tokens=2000)
    far_larger = settle(TrainConfig(), total=7, batch_tokens=16_000)
    longer = settle(TrainConfig(), total=16_000, batch_tokens=1000)
    assert ours.lr == RECIPES["muon"]["lr"]  # 1000 is the square root of 1000 * 1000
    assert larger.lr == pytest.approx(2**0.25 * ours.lr)
    assert far_larger.lr == pytest.approx(2**0.5 * ours.lr)  # no further
    assert (longer.lr, longer.table_lr) == pytest.approx((ours.lr / 2, ours.table_lr / 2))
    for cfg, total in ((larger, 1000), (longer, 16_000)):  # weights remember the same part of a run
        assert cfg.lr * cfg.weight_decay * total == pytest.approx(ours.lr * ours.weight_decay * 1000)
    chosen = settle(TrainConfig(lr=0.01, weight_decay=0.0), total=1000, batch_tokens=2000)
    assert (chosen.lr, chosen.weight_decay, chosen.table_lr) == (0.01, 0.0, larger.table_lr)
    with pytest.raises(UserError, match="min_lr"):
        settle(TrainConfig(min_lr=1.0), total=1000, batch_tokens=1000)


def test_a_good_batch_grows_with_the_data() -> None:
    assert choose_batch("original", 1e6, 512) == 32
    assert choose_batch("muon", 1e6, 256) == 4
    assert choose_batch("muon", 1e10, 512) == 256
    assert choose_batch("muon", 1e3, 256) == 1


TINY = [
    "--dim", 32, "--n_layers", 2, "--n_heads", 2, "--max_seq_len", 64, "--batch_tokens", 512, "--log_every", 1,
    "--device", "cpu", "--precision", "fp32", "--max_steps", 60,
]  # fmt: skip


def test_the_default_recipe_learns_faster_and_both_are_recorded(tokens, tmp_path) -> None:
    last = {}
    for recipe, more in (("muon", []), ("original", []), ("original", ["--lr", 3e-3])):
        out = tmp_path / f"{recipe}{len(more)}"
        files = ["--data", tokens, "--valid", tokens.parent / "valid.bin", "--out", out]
        script("pretrain.py", *files, *TINY, *(["--recipe", recipe] if recipe != "muon" else []), *more)
        last[out.name] = [r for r in read_log(out / "log.jsonl") if "val_bpb" in r][-1]["val_bpb"]
        recorded = json.loads((checkpoint.find(out) / "train_config.json").read_text(encoding="utf-8"))
        assert recorded["recipe"] == recipe
        assert recorded["optimizer"] == RECIPES[recipe]["optimizer"]
        if recipe == "original":
            assert recorded["lr"] == (3e-3 if more else 3e-4)
            assert recorded["beta2"] == 0.95
    assert last["muon0"] < last["original2"] - 0.1 < last["original0"] - 0.2


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
