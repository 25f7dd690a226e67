"""The training loop, one for every stage and for one process or many.

What can go wrong in a month is watched by the guards (guards.py); here is what they ask for: steps that are
skipped, checkpoints, the way back from a spike, and an orderly end.
"""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model import Transformer
from stage import UserError, remove, swap
from training import checkpoint, guards
from training.config import TrainConfig
from training.estimate import announce
from training.guards import Figures, LateFigures, SkippedSteps, SpikeWatch, StopSignal, Watchdog
from training.loader import Batches, MicroBatch, ReadAhead
from training.log import Log
from training.lora import describe
from training.optimizer import factor, make_optimizer, set_learning_rate
from training.plot import draw_run
from training.runtime import Runtime, clip_gradients, no_sync, whole
from training.state import piece_of
from training.step_folder import step_of


def train(
    cfg: TrainConfig,
    runtime: Runtime,
    model: Transformer,
    vocabulary: dict[str, bytes],
    batches: Batches,
    evaluate: Callable[[Transformer], dict[str, float]],
    sample: Callable[[Transformer], list[str]] | None = None,
) -> None:
    """Train until the last step, saving on the way; SIGTERM or Ctrl-C saves and ends early.

    cfg: settled (recipes.py). vocabulary: the tokenizer's files by name, kept with every checkpoint.
    evaluate: figures of the stage's validation.
    sample: lines to read at intervals, such as continuations of a few prompts.
    """
    flops = announce(cfg, runtime, model.args, batches)
    if cfg.estimate:
        return
    with (
        guards.sole_run(cfg.out, runtime),
        guards.explain_memory(cfg, model.args),
        guards.quiet_garbage() as collect_garbage,
        Watchdog(cfg.hang_timeout, runtime.rank) as watchdog,
    ):
        runtime.place(model, cfg.shard)
        run = Run(cfg, runtime, model, vocabulary, batches)
        run.begin(flops)
        while run.step < run.total and not run.stopping:
            run.train_step()
            saving, evaluating = run.is_due(cfg.save_every) or run.owes_save, run.is_due(cfg.eval_every)
            if run.review(everything=saving or evaluating):
                with run.log.pause():
                    if saving or run.stopping:
                        run.save()  # before the evaluation, which may fail too
                    if evaluating and not run.stopping:
                        run.log.evaluation(run.step, run.tokens, run.without_gradients(evaluate))
                    if sample and cfg.sample_every and run.is_due(cfg.sample_every):
                        run.log.samples(run.step, run.tokens, run.without_gradients(sample))
            collect_garbage()
            watchdog.beat()
        run.end()


class Run:
    """The state of a run that changes from step to step, and how it is saved and restored."""

    def __init__(
        self,
        cfg: TrainConfig,
        runtime: Runtime,
        model: Transformer,
        vocabulary: dict[str, bytes],
        batches: Batches,
    ):
        self.cfg, self.runtime, self.model = cfg, runtime, model
        self.vocabulary, self.batches = vocabulary, ReadAhead(batches, runtime.device)
        self.total = cfg.total_steps(batches.steps_per_epoch)
        self.optimizer = make_optimizer(model, cfg, runtime.dtype)
        self.scaler = torch.amp.GradScaler(enabled=runtime.dtype == torch.float16)  # fp16 gradients underflow
        self.writer = checkpoint.Writer(cfg.out, runtime, cfg.keep_last, cfg.keep_every, cfg.async_save)
        self.wrapped: nn.Module = model
        self.step = 0  # steps done; also the position in the data
        self.tokens = 0  # tokens seen, by all processes, without padding
        self.fingerprint = 0  # of all the data seen, in its order
        self.avoided: list[list[int]] = []  # [first, end, checkpoint]: steps that a rollback passes over
        # In fp16 the scaler looks for its scale by overflowing: from 2^16 down to 1 is no sign of trouble.
        self.skipped = SkippedSteps(cfg.max_skipped + 16 * self.scaler.is_enabled())
        self.spikes = SpikeWatch(cfg.spike_window, cfg.spike)
        self.late = LateFigures(lag=1 if runtime.device.type == "cuda" else 0)
        self.stop = StopSignal()
        self.owes_save = False  # a checkpoint was put off because the run was in doubt
        self.stopping = False  # some process has received a signal, and all know

    def begin(self, flops: float) -> None:
        """Restore the newest checkpoint if asked to, and make the model ready for the loop. flops: per token."""
        found = self.runtime.from_main(checkpoint.list_steps(self.cfg.out, also_torn=True))
        if found and not self.cfg.resume:
            raise UserError(
                f"{self.cfg.out} 里已有检查点（{found[-1].name}）：加 --resume 继续训练，或用 --out 换一个文件夹。"
            )
        if self.cfg.resume and not self.restore(found):
            self.runtime.print(f"{self.cfg.out} 里没有可用的检查点，从头开始。")
        self.wrapped = self.runtime.wrap(self.model, self.cfg.compile, self.cfg.recompute)
        self.model.train()
        self.runtime.print(
            f"{self.runtime.describe()}；{describe(self.model)}；共 {self.total} 步，"
            f"每遍数据 {self.batches.steps_per_epoch:.1f} 步；从第 {self.step} 步开始。"
        )
        self.log = Log(self.cfg, self.runtime, self.step, self.tokens, self.total, flops)

    def end(self) -> None:
        """Wait for the last checkpoint, draw the curve, and say how to go on."""
        self.writer.wait()
        if self.runtime.is_main:
            draw_run(self.cfg.out)
        if self.step < self.total:
            self.runtime.print(f"收到停止信号，已保存第 {self.step} 步；用同样的命令加 --resume 继续。")
        else:
            newest, curve = checkpoint.find(self.cfg.out), self.cfg.out / "loss.png"
            self.runtime.print(f"完成。检查点：{newest}；损失曲线：{curve}")

    def is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps happens now; at the last step everything does."""
        return self.step == self.total or (every > 0 and self.step % every == 0)

    # One step.

    def train_step(self) -> None:
        """One optimizer step. Nothing here waits for the device: what came of it is read in `review`."""
        self.step = guards.pass_over(self.step, self.avoided)
        # A seed per step and process makes dropout independent of what ran before: nothing to save.
        torch.manual_seed((self.cfg.seed * 1_000_003 + self.step) * self.runtime.world + self.runtime.rank)
        lr = set_learning_rate(self.optimizer, factor(self.step, self.total, self.cfg))
        micro_batches = self.runtime.even(self.batches.step(self.step))
        asked = torch.tensor([int(self.stop.received)], device=micro_batches[0].tokens.device)
        counts = torch.cat((guards.tally(micro_batches), asked)).to(self.runtime.device, non_blocking=True)
        bearing, *counts = self.runtime.all_sum(counts).unbind()  # bearing: targets, of all processes
        losses = torch.zeros(self.runtime.world, device=self.runtime.device)
        losses[self.runtime.rank] = self.backward(micro_batches, bearing.clamp(min=1))
        self.runtime.all_sum(losses)
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.model, self.cfg.clip or math.inf)
        skip = ~(norm.isfinite() & losses.isfinite().all())
        self.optimizer_step(skip.float())
        self.step += 1
        self.late.put(self.step, lr, torch.stack(counts), losses, norm, skip)

    def backward(self, micro_batches: list[MicroBatch], bearing: Tensor) -> Tensor:
        """Gradients of the mean loss of the step's targets; returns this process's share of it."""
        share = torch.zeros((), device=self.runtime.device)
        for i, mb in enumerate(micro_batches):
            mb = mb.to(self.runtime.device)
            with no_sync(self.wrapped, last=i == len(micro_batches) - 1):
                with self.runtime.autocast():
                    # Every token of the global batch weighs the same, however it is cut up.
                    loss_sum = self.wrapped(
                        mb.tokens, mb.targets, reduction="sum", documents=mb.documents, labelled=mb.labelled
                    )
                    part = loss_sum / bearing
                self.scaler.scale(part * self.runtime.world).backward()  # DDP averages over processes
            share += part.detach()
        return share

    def optimizer_step(self, skip: Tensor) -> None:
        """Update the weights, unless skip is 1: the optimizer itself looks, on the device.

        `found_inf` is how torch's GradScaler tells a fused optimizer
        (https://docs.pytorch.org/docs/stable/notes/amp_examples.html).
        """
        self.optimizer.found_inf = skip
        self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    # What came of it.

    def review(self, everything: bool) -> bool:
        """Look at the figures that have arrived; False if they sent the run back to an older checkpoint.

        everything: also at those of the last step, which is to be saved or evaluated.
        """
        for figures in self.late.take(everything):
            self.tokens += figures.tokens
            self.fingerprint = guards.chained(self.fingerprint, figures.fingerprint)
            self.stopping |= figures.stopping
            self.skipped.see(figures.skipped)
            if figures.skipped:
                self.report_skipped(figures)
                continue
            lasted = self.spikes.see(figures.loss)
            if figures.step % self.cfg.log_every == 0 or figures.step == self.total:
                self.log_step(figures)
            if lasted and self.report_spike(figures, lasted) and self.roll_back(figures.step - lasted):
                return False
        return self.review(everything=True) if self.stopping and self.late.waiting else True

    def log_step(self, figures: Figures) -> None:
        # The same in two runs: they have seen the same data in the same order.
        data = f"{self.fingerprint:016x}"
        self.log.step(figures.step, self.tokens, figures.loss, figures.lr, figures.grad_norm, data=data)

    def report_skipped(self, figures: Figures) -> None:
        """Say which step, process and data gave no finite loss or gradient; end the run if there are too many."""
        ranks = [rank for rank, loss in enumerate(figures.losses) if not math.isfinite(loss)]
        what = f"进程 {ranks} 的损失" if ranks else "梯度"
        self.runtime.print(f"警告：第 {figures.step} 步{what}不是有限数：跳过这一步，权重与优化器不变。")
        if self.runtime.rank in (ranks or range(self.runtime.world)):
            data = self.batches.describe(figures.step - 1)
            print(f"进程 {self.runtime.rank} 这一步的数据：{data}", flush=True)
        self.log.write(step=figures.step, skipped=True, ranks=ranks)
        self.skipped.check(figures.step)

    def report_spike(self, figures: Figures, lasted: int) -> bool:
        """Say that a spike has begun; whether it has lasted long enough to go back."""
        if lasted == 1:
            self.runtime.print(f"警告：第 {figures.step} 步的损失 {figures.loss:.4f} 远高于之前的水平。")
            self.log.write(step=figures.step, spike=figures.loss)
        return self.cfg.on_spike == "rollback" and lasted == guards.SPIKE_STEPS

    def roll_back(self, good: int) -> bool:
        """Go back to before a spike and pass over the batches around it; False if there is no way back.

        good: steps done before the spike began. The remedy is PaLM's (https://arxiv.org/abs/2204.02311, section 5.1):
        a checkpoint from some time before, and other data. All of it is in the counters: a resumed run does the same.
        """
        found = self.runtime.from_main(checkpoint.list_steps(self.cfg.out))
        before = [f for f in found if step_of(f) <= good - guards.AROUND]
        before = before or [f for f in found if step_of(f) <= good]
        if not before:
            self.runtime.print("没有尖峰之前的检查点可以退回，继续训练。")
            return False
        avoided, reached = self.avoided, self.step
        self.restore(before)
        self.late.clear()
        start, end = max(self.step, good - guards.AROUND), min(reached + guards.AROUND, self.total - 1)
        self.avoided = guards.merge(self.avoided, avoided, [[start, end, self.step]])
        if sum(origin == self.step for _, _, origin in self.avoided) > guards.ROLLBACKS:
            raise UserError(f"从第 {self.step} 步的检查点出发，换了几次数据，损失仍有尖峰。{guards.ADVICE}")
        self.save()
        self.writer.wait()
        self.runtime.main_first(lambda: [remove(f) for f in found if step_of(f) > self.step])
        self.log.rewind(self.step, self.tokens)
        self.log.write(step=self.step, rolled_back_from=reached, avoided=[start, end])
        self.runtime.print(
            f"从第 {reached} 步退回第 {self.step} 步；第 {start + 1} 到 {end} 步的数据不再使用。"
        )
        return True

    def without_gradients(self, function: Callable[[Transformer], Any]) -> Any:
        """Run the stage's evaluation or sampling, then go on training."""
        self.model.eval()
        with torch.no_grad(), self.runtime.autocast(), whole(self.model):
            result = function(self.model)
        self.model.train()
        return result

    # Checkpoints.

    def save(self) -> None:
        """Write a checkpoint. If that fails the run goes on and tries again next time; the last one must succeed."""
        is_last = self.step == self.total or self.stopping
        in_spike = self.cfg.on_spike == "rollback" and 0 < self.spikes.lasted < guards.SPIKE_STEPS
        self.owes_save = (self.skipped.in_a_row > 0 or in_spike) and self.step < self.total
        if self.owes_save:
            return  # the weights may be spoilt already; what they would displace is not
        broken = sum(not bool(piece_of(p).rows.isfinite().all()) for p in self.model.parameters())
        if self.runtime.sum(broken)[0]:
            raise UserError(f"第 {self.step} 步的权重不再是有限数，没有保存；{guards.ADVICE}")
        # In the background, the first attempt may only bring the error of an earlier write.
        attempts = 1 + self.writer.in_background
        for attempt in range(1, attempts + 1):
            try:
                self.write_checkpoint(wait=is_last)
                return
            except UserError as error:
                if is_last and attempt == attempts:
                    raise
                self.runtime.print(f"警告：{error}（训练继续，下次保存时再试）")

    def write_checkpoint(self, wait: bool) -> None:
        """Hand everything that a resumed run needs to the writer. wait: until it is on disk."""
        counters = {
            "step": self.step,
            "tokens": self.tokens,
            "fingerprint": self.fingerprint,
            "avoided": self.avoided,
            "skipped": [self.skipped.total, self.skipped.in_a_row],
            "spikes": [list(self.spikes.losses), self.spikes.lasted],
            "signature": self.batches.signature,
            "optimizer": self.cfg.optimizer,
            "scaler": self.scaler.state_dict(),
        }
        self.writer.save(self.step, self.model, self.optimizer, self.cfg, self.vocabulary, counters)
        if wait:
            self.writer.wait()

    def restore(self, found: list[Path]) -> bool:
        """Take up the newest checkpoint that is whole; False if there is none at all.

        Damaged ones are renamed, so that they neither count as the newest nor displace good ones.
        """
        for folder in reversed(found):
            error = self.try_restore(folder)
            if error is None:
                return True
            aside = folder.with_name(f"damaged_{folder.name}")
            self.runtime.print(f"跳过检查点（已改名为 {aside.name}）：{error}")
            self.runtime.main_first(lambda folder=folder, aside=aside: swap(folder, aside))
        if found:
            raise UserError(
                f"{self.cfg.out} 里的检查点都已损坏；请用 --out 换一个文件夹，或移走它们后从头训练。"
            )
        return False

    def try_restore(self, folder: Path) -> UserError | None:
        """Restore a checkpoint, or return what is damaged about it."""
        try:  # damage that one process meets, all of them meet
            checkpoint.verify(folder, "config.json")  # before what it says is taken for another setting
            args = checkpoint.read_args(folder)
            for name, value in asdict(self.model.args).items():
                check_same(folder, f"模型形状 {name}", getattr(args, name), value)
            counters = checkpoint.restore(folder, self.model, self.optimizer)
        except checkpoint.Damaged as damage:
            return damage
        check_same(folder, "optimizer", counters["optimizer"], self.cfg.optimizer)
        for name, value in self.batches.signature.items():
            check_same(folder, name, counters["signature"].get(name), value)
        self.step, self.tokens = counters["step"], counters["tokens"]
        self.fingerprint, self.avoided = counters["fingerprint"], counters["avoided"]
        self.skipped = SkippedSteps(self.skipped.limit, *counters["skipped"])
        self.spikes = SpikeWatch(self.cfg.spike_window, self.cfg.spike, *counters["spikes"])
        self.scaler.load_state_dict(counters["scaler"])
        return None


def check_same(folder: Path, name: str, before: object, now: object) -> None:
    """UserError if a run would go on with something else than it began with."""
    if before != now:
        raise UserError(
            f"{folder} 是用 {name}={before} 训练的，现在是 {now}：续训必须用同样的数据和设置；"
            "要换请用 --out 开始新的训练。"
        )
