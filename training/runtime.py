"""Where and how training runs: device, precision, and the processes that share the work.

One process on a laptop, or many under torchrun; the rest of the code does not know the difference.
"""

import ctypes
import gc
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from model import Transformer
from stage import UserError
from training import hardware
from training.loader import MicroBatch


@dataclass
class Runtime:
    """The device and precision of this process, and its place among the others."""

    device: torch.device
    dtype: torch.dtype  # of matrix products; weights are fp32
    rank: int = 0
    world: int = 1
    sharded: bool = False  # weights, gradients and optimizer state are spread over the processes (FSDP)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, *message: object) -> None:
        """Print once, not once per process. A message for which the disk has no room does not end a run."""
        if self.is_main:
            try:
                print(*message, flush=True)
            except BrokenPipeError:
                raise
            except OSError:  # standard output goes to a file
                pass

    def autocast(self) -> AbstractContextManager:
        """Run matrix products in `dtype`."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def sum(self, *values: float | Tensor) -> list[float]:
        """Sum numbers over all processes, on the host: waits for the device if a value is on it."""
        total = torch.stack([torch.as_tensor(v).detach().cpu().double() for v in values])
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def all_sum(self, x: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place and on the device; the host does not wait."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def even(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """As many micro-batches in every process: FSDP gathers weights in each, so all must take part in all.

        What is added bears no loss. The counts are compared on the host, without waiting for the device.
        """
        if not self.sharded:
            return micro_batches
        most = torch.tensor(len(micro_batches))
        dist.all_reduce(most, dist.ReduceOp.MAX)
        last = micro_batches[-1]
        idle = last.idle()
        return micro_batches + [idle] * (int(most) - len(micro_batches))

    def from_main(self, value: Any) -> Any:
        """The main process's value, in every process."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def main_first(self, function: Callable[[], object]) -> None:
        """Run something in the main process while the others wait; its error ends them all."""
        error = None
        if self.is_main:
            try:
                function()
            except (UserError, OSError) as raised:
                error = raised
        self.raise_together(error)

    def raise_together(self, error: Exception | None) -> None:
        """End every process if any brings an error: its own raises it, the others leave without a word."""
        failed = self.sum(error is not None)[0]
        if error is not None:
            raise error
        if failed:
            raise SystemExit(1)

    def place(self, model: Transformer, shard: bool) -> None:
        """Put the model on the device, or with `shard` this process's rows of it (before the optimizer is made).

        FSDP2 (https://arxiv.org/abs/2304.11277) in groups: each block, and the rest (embedding, norm, head). A tied
        matrix is in that one group under both names, whole while the forward pass runs, so the loss finds it.
        The model comes in host memory and goes to the device a group at a time: never whole on one GPU.
        """
        self.sharded = shard and self.world > 1
        if not self.sharded:
            model.to(self.device)
            return
        # Gradients are summed in fp32. Inputs keep their type: the rotary table would lose positions in bf16.
        dtype = None if self.dtype == torch.float32 else self.dtype
        policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        mesh = init_device_mesh(self.device.type, (self.world,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)

    def wrap(self, model: Transformer, compile_it: bool | None, recompute: bool = False) -> nn.Module:
        """The model as the loop calls it: compiled, with gradients averaged over processes.

        compile_it: None compiles where it pays without a compiler to install, on a GPU.
        """
        model.recompute = recompute
        compile_it = self.device.type == "cuda" if compile_it is None else compile_it
        if self.sharded:
            for layer in model.layers if compile_it else ():  # one at a time: FSDP gathers in between
                layer.forward = torch.compile(layer.forward)
            return model
        wrapped = torch.compile(model) if compile_it else model
        if self.world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            wrapped = DistributedDataParallel(
                wrapped, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        return wrapped

    def peak_flops(self) -> float | None:
        """Peak FLOP/s of this device in the precision in use; None where it is not known."""
        return hardware.device_peak_flops(self.device, self.dtype)

    def describe(self) -> str:
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        else:
            name = f"{platform.machine()}，{torch.get_num_threads()} 线程"
        return f"{self.device.type}（{name}），{str(self.dtype).removeprefix('torch.')}，{self.world} 个进程"


def is_first_process() -> bool:
    """Whether this is the only process or the first of several; known before they have found each other."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def start(
    device: str = "auto",
    precision: str = "auto",
    seed: int = 0,
    timeout: float = 10,
    deterministic: bool = False,
) -> Iterator[Runtime]:
    """Set up this process (and, under torchrun, the process group) and take it down at the end.

    timeout: minutes that a process waits for the others before it gives up. deterministic: the same bits again.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")
    if deterministic:  # https://docs.pytorch.org/docs/stable/notes/randomness.html
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        # Were torchrun killed, this process would train on unseen: let it get a SIGTERM then (prctl(2)).
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if world > 1:
        # gloo as well: counts and errors are agreed on without waiting for the GPU.
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        limit = timedelta(minutes=timeout)
        store = common_store(rank, world, limit)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    torch.manual_seed(seed)
    yield Runtime(chosen, choose_dtype(chosen, precision), rank, world)
    if world > 1:  # after an error the others may never come to this call: then the process just ends
        # DDP, in a cycle, keeps the group. Were it freed last, it would wait, with the GIL, for a thread of gloo's
        # that waits for the GIL.
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


def common_store(rank: int, world: int, timeout: timedelta) -> dist.Store:
    """Where the processes exchange their addresses; nothing in it is from an earlier start of this run.

    torchrun keeps one store over all its restarts, and processes that find the addresses of the last start before
    the new ones wait for each other until the time-out (https://github.com/pytorch/pytorch/issues/135712). Its
    restart count would not do as a prefix: each machine counts for itself.
    """
    try:
        store, *_ = next(dist.rendezvous("env://", rank, world, timeout=timeout))
        store.set_timeout(timeout)
        return dist.PrefixStore(agree_on_name(store, rank, world), store)
    except dist.DistError as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"进程 {rank} 等了 {timeout.total_seconds() / 60:g} 分钟（--timeout），{world} 个进程仍没有到齐：{reason}"
        ) from error


def agree_on_name(store: dist.Store, rank: int, world: int) -> str:
    """A name for this start, the same in all its processes: the first one's, who answers each that asks.

    A question that was left by an earlier start gets an answer too, which nobody confirms; then it is replaced.
    """
    mine = uuid4().hex
    if rank:
        store.set(f"question/{rank}", mine)
        name = store.get(f"answer/{mine}").decode()  # waits for it
        store.set(f"confirmed/{name}/{rank}", "")
        return name
    deadline = time.monotonic() + store.timeout.total_seconds()
    for other in range(1, world):
        while not store.check([f"confirmed/{mine}/{other}"]):
            if time.monotonic() > deadline:
                raise dist.DistStoreError(f"rank {other} is missing")
            if store.check([f"question/{other}"]):
                store.set(f"answer/{store.get(f'question/{other}').decode()}", mine)
            time.sleep(0.005)
    return mine


def choose_device(name: str) -> torch.device:
    """The device of this process; under torchrun each process takes its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not available[name]:
        raise UserError(f"这台机器上没有可用的 {name}；请去掉 --device 或用 --device cpu。")
    if name != "cuda":
        return torch.device(name)
    index = int(os.environ.get("LOCAL_RANK", 0))
    if index >= torch.cuda.device_count():
        raise UserError(f"这台机器只有 {torch.cuda.device_count()} 块显卡；请减小 --nproc_per_node。")
    return torch.device("cuda", index)


def choose_dtype(device: torch.device, precision: str) -> torch.dtype:
    """The type of matrix products: bf16 where the hardware multiplies in it, fp16 on older GPUs, fp32 elsewhere.

    CPUs count if they have AMX: products in bf16 are ten times as fast there (docs/LOG.md).
    """
    if precision == "auto":
        if device.type == "cpu":
            return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if precision == "fp16" and device.type != "cuda":
        raise UserError("fp16 只用于显卡；请用 --precision fp32 或 bf16。")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def no_sync(model: nn.Module, last: bool) -> AbstractContextManager:
    """Average gradients over processes only at the last micro-step of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    return nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Scale the gradients so that their norm over all processes is at most `limit`; returns the norm before, ()."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # of shards: summed over the processes
    nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Let every process hold all weights (in the compute type) while it evaluates or samples at its own pace.

    Under FSDP a forward pass is otherwise a collective, and processes with unequal work would wait for ever.
    """
    parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()
