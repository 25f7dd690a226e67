"""The training loop, one for every stage and for one process or many."""

import math
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from model import IGNORE, Transformer
from stage import UserError, swap
from training import checkpoint
from training.config import TrainConfig
from training.log import Log, draw
from training.optimizer import factor, make_optimizer, set_learning_rate
from training.recipes import settle
from training.runtime import Runtime, no_sync

DIVERGED = "请减小 --lr 或加长 --warmup，再用 --resume 从之前的检查点继续。"


class Batches(Protocol):
    """The data of a run: a pure function of the step, so that a resumed run sees what it would have seen."""

    steps_per_epoch: float
    signature: dict  # what the order of the data depends on; must not change at a resume

    def step(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """This process's micro-batches of a step: tokens and targets, (b, T) int64 each; at least one."""


def train(
    cfg: TrainConfig,
    runtime: Runtime,
    model: Transformer,
    vocabulary: bytes,
    batches: Batches,
    evaluate: Callable[[Transformer], dict[str, float]],
) -> None:
    """Train until the last step, saving on the way; SIGTERM or Ctrl-C saves and ends early.

    vocabulary: the tokenizer's file, kept with every checkpoint. evaluate: figures of the stage's validation.
    """
    total = cfg.max_steps or math.ceil(cfg.epochs * batches.steps_per_epoch)
    cfg = settle(cfg, total, batches.signature.get("batch_tokens"))
    model.to(runtime.device)
    run = Run(cfg, runtime, model, vocabulary, batches, total)
    run.begin()
    runtime.print(
        f"{runtime.describe()}；参数 {model.num_params() / 1e6:.2f}M；共 {total} 步，"
        f"每遍数据 {batches.steps_per_epoch:.1f} 步；从第 {run.step} 步开始。"
    )
    log = Log(cfg.out, runtime, run.step, run.tokens, total, model.flops_per_token())
    stop = StopSignal()
    while run.step < total and not stop.agreed:
        loss, grad_norm, lr = run.train_step(stop)
        if run.step % cfg.log_every == 0 or run.step == total:
            loss = runtime.sum(loss)[0]
            log.step(run.step, run.tokens, loss, lr, float(grad_norm))
            if not math.isfinite(loss):
                raise UserError(f"第 {run.step} 步的损失不再是有限数；{DIVERGED}")
        with log.pause():
            if run.step % cfg.save_every == 0 or run.step == total or stop.agreed:
                run.save()
            if run.step == total or (cfg.eval_every and run.step % cfg.eval_every == 0):
                log.evaluation(run.step, run.tokens, validate(model, runtime, evaluate))
    if runtime.is_main:
        draw(cfg.out)
    if stop.agreed and run.step < total:
        runtime.print(f"收到停止信号，已保存第 {run.step} 步；用同样的命令加 --resume 继续。")
    else:
        runtime.print(f"完成。检查点：{checkpoint.find(cfg.out)}；损失曲线：{cfg.out / 'loss.png'}")


class Run:
    """The state of a run that changes from step to step, and how it is saved and restored."""

    def __init__(
        self,
        cfg: TrainConfig,
        runtime: Runtime,
        model: Transformer,
        vocabulary: bytes,
        batches: Batches,
        total: int,
    ):
        self.cfg, self.runtime, self.model = cfg, runtime, model
        self.vocabulary, self.batches, self.total = vocabulary, batches, total
        self.optimizer = make_optimizer(model, cfg, runtime.dtype)
        self.scaler = torch.amp.GradScaler(enabled=runtime.dtype == torch.float16)  # fp16 gradients underflow
        self.step = 0  # steps done
        self.tokens = 0  # tokens seen, by all processes, without padding
        self.wrapped: nn.Module = model

    def begin(self) -> None:
        """Restore the newest checkpoint if asked to, and make the model ready for the loop."""
        found = checkpoint.list_steps(self.cfg.out)
        if found and not self.cfg.resume:
            raise UserError(
                f"{self.cfg.out} 里已有检查点（{found[-1].name}）：加 --resume 继续训练，或用 --out 换一个文件夹。"
            )
        if self.cfg.resume and not self.restore(found):
            self.runtime.print(f"{self.cfg.out} 里没有可用的检查点，从头开始。")
        self.wrapped = self.runtime.wrap(self.model, self.cfg.compile)
        self.model.train()

    def restore(self, found: list[Path]) -> bool:
        """Take up the newest checkpoint that is whole; False if there is none at all.

        Damaged ones are renamed, so that they neither count as the newest nor displace good ones.
        """
        for folder in reversed(found):
            try:
                state, weights = checkpoint.read_state(folder), checkpoint.read_weights(folder)
                args = checkpoint.read_args(folder)
            except UserError as error:
                aside = folder.with_name(f"damaged_{folder.name}")
                self.runtime.print(f"跳过检查点（已改名为 {aside.name}）：{error}")
                self.runtime.main_first(lambda folder=folder, aside=aside: swap(folder, aside))
                continue
            self.check_same(folder, "模型形状", asdict(args), asdict(self.model.args))
            for name, value in self.batches.signature.items():
                self.check_same(folder, name, state["signature"].get(name), value)
            self.model.load_state_dict(checkpoint.with_tied(weights, args))
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.step, self.tokens = state["step"], state["tokens"]
            return True
        if found:
            raise UserError(
                f"{self.cfg.out} 里的检查点都已损坏；请用 --out 换一个文件夹，或移走它们后从头训练。"
            )
        return False

    @staticmethod
    def check_same(folder: Path, name: str, before: object, now: object) -> None:
        if before != now:
            raise UserError(
                f"{folder} 是用 {name}={before} 训练的，现在是 {now}：续训必须用同样的数据和设置；"
                "要换请用 --out 开始新的训练。"
            )

    def train_step(self, stop: "StopSignal") -> tuple[Tensor, Tensor, float]:
        """One optimizer step; returns this process's share of the loss, the gradient norm, and the rate."""
        # A seed per step and process makes dropout independent of what ran before: nothing to save.
        torch.manual_seed((self.cfg.seed * 1_000_003 + self.step) * self.runtime.world + self.runtime.rank)
        lr = set_learning_rate(self.optimizer, factor(self.step, self.total, self.cfg))
        micro_batches = self.batches.step(self.step)
        bearing, seen, stopping = self.runtime.sum(
            sum(int((y != IGNORE).sum()) for _, y in micro_batches),
            sum(int((x != 0).sum()) for x, _ in micro_batches),
            stop.received,
        )
        loss = torch.zeros((), device=self.runtime.device)
        for i, (x, y) in enumerate(micro_batches):
            x, y = x.to(self.runtime.device), y.to(self.runtime.device)
            with no_sync(self.wrapped, last=i == len(micro_batches) - 1):
                with self.runtime.autocast():
                    # Every token of the global batch weighs the same, however it is cut up.
                    part = self.wrapped(x, y, reduction="sum") / max(1, bearing)
                self.scaler.scale(part * self.runtime.world).backward()  # DDP averages over processes
            loss += part.detach()
        self.scaler.unscale_(self.optimizer)
        limit = self.cfg.clip or math.inf
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += int(seen)
        stop.agreed = stopping > 0
        return loss, grad_norm, lr

    def save(self) -> None:
        """Write a checkpoint; the other processes wait for the main one."""
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise UserError(f"第 {self.step} 步的权重不再是有限数，没有保存；{DIVERGED}")
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "signature": self.batches.signature,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        cfg, step = self.cfg, self.step
        self.runtime.main_first(
            lambda: checkpoint.save(cfg.out, step, self.model, cfg, self.vocabulary, state, cfg.keep_last)
        )


def validate(
    model: Transformer, runtime: Runtime, evaluate: Callable[[Transformer], dict[str, float]]
) -> dict[str, float]:
    """Run the stage's evaluation without gradients, then go on training."""
    model.eval()
    with torch.inference_mode(), runtime.autocast():
        metrics = evaluate(model)
    model.train()
    return metrics


class StopSignal:
    """Notices SIGTERM and Ctrl-C; the loop then saves and ends at the next step. A second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.received = False
        self.agreed = False  # some process has received it, and all know
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number: int, frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
