"""Where and how training runs: device, precision, and the processes that share the work.

One process on a laptop, or many under torchrun; the rest of the code does not know the difference.
"""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stage import UserError
from training import hardware


@dataclass
class Runtime:
    """The device and precision of this process, and its place among the others."""

    device: torch.device
    dtype: torch.dtype  # of matrix products; weights are fp32
    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, *message: object) -> None:
        """Print once, not once per process."""
        if self.is_main:
            print(*message, flush=True)

    def autocast(self) -> AbstractContextManager:
        """Run matrix products in `dtype`."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def sum(self, *values: float | Tensor) -> list[float]:
        """Sum numbers over all processes."""
        total = torch.stack([torch.as_tensor(v).detach().cpu().double() for v in values])
        if self.world > 1:
            total = total.cuda() if self.device.type == "cuda" else total
            dist.all_reduce(total)
        return total.tolist()

    def all_sum(self, x: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place and on the device; the host does not wait."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def main_first(self, function: Callable[[], object]) -> None:
        """Run something in the main process while the others wait; its error ends them all."""
        error = None
        if self.is_main:
            try:
                function()
            except (UserError, OSError) as raised:
                error = raised
        failed = self.sum(error is not None)[0]
        if error is not None:
            raise error
        if failed:
            raise SystemExit(1)

    def wrap(self, model: nn.Module, compile_it: bool) -> nn.Module:
        """The model as the loop calls it: on the device, compiled, with gradients averaged over processes."""
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
def start(device: str = "auto", precision: str = "auto", seed: int = 0) -> Iterator[Runtime]:
    """Set up this process (and, under torchrun, the process group) and take it down at the end."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    torch.manual_seed(seed)
    yield Runtime(chosen, choose_dtype(chosen, precision), rank, world)
    if world > 1:  # after an error the others may never come to this call: then the process just ends
        dist.destroy_process_group()


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
    """bf16 on GPUs that have it, fp16 on older ones, fp32 elsewhere (bf16 autocast was slower on CPUs)."""
    if precision == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if precision == "fp16" and device.type != "cuda":
        raise UserError("fp16 只用于显卡；请用 --precision fp32 或 bf16。")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def no_sync(model: nn.Module, last: bool) -> AbstractContextManager:
    """Average gradients over processes only at the last micro-step of a step."""
    return nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()
