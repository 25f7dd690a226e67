"""Writing checkpoints (their files: training/checkpoint.py) while training goes on, and deleting old ones."""

import os
import shutil
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor

from model import Transformer
from sources.report import settings as as_json
from sources.report import write_json
from stage import UserError, atomic_path, sync_tree
from training import adapter_files, state, tensor_files
from training.runtime import Runtime
from training.state import Piece
from training.step_folder import CHECKSUMS, checksum, list_steps, step_of, sync_folder


class Writer:
    """Writes the checkpoints of a run and deletes the old ones. Every process calls every method.

    In the background the state is first copied to host memory (12 bytes a parameter with AdamW, in buffers that are
    kept and, for a GPU, pinned), and a thread writes the copy while training goes on. Otherwise nothing is copied:
    on a CPU the state is in host memory already, and the disk takes less time than a step.
    """

    def __init__(
        self,
        out: Path,
        runtime: Runtime,
        keep_last: int,
        keep_every: int = 0,
        in_background: bool | None = None,
    ):
        """keep_last: how many of the newest to keep. keep_every: keep for good those whose step it divides.

        in_background: None is yes on GPUs, no on CPUs.
        """
        self.out, self.runtime = out, runtime
        self.keep_last, self.keep_every = keep_last, keep_every
        self.in_background = runtime.device.type != "cpu" if in_background is None else in_background
        # The thread talks to those of the other processes apart from what the loop has to say.
        self.group = dist.new_group(backend="gloo") if runtime.sharded else None
        self.buffers: dict[str, Tensor] = {}
        self.thread: Thread | None = None
        self.error: UserError | None = None

    def save(
        self,
        step: int,
        model: Transformer,
        optimizer: torch.optim.Optimizer | None,
        settings: Any,
        vocabulary: dict[str, bytes],
        counters: dict,
    ) -> None:
        """Begin to write a checkpoint; the state may change once this returns.

        vocabulary: its files by name. counters: what JSON can hold; `restore` returns it.
        UserError of this write or, in the background, of the
        one before, which is waited for.
        """
        self.wait()
        self.runtime.main_first(lambda: self.out.mkdir(parents=True, exist_ok=True))
        if not (self.runtime.is_main or self.runtime.sharded):  # all hold the same
            return None if self.in_background else self.wait()
        texts = {"config.json": asdict(model.args), "train_config.json": as_json(settings)}
        tensors, numbers = state.optimizer_state_of(model, optimizer) if optimizer else ({}, {})
        texts["state.json"] = {"counters": counters, "optimizer": numbers}
        weights, kind = state.weights_of(model), "model"
        if adapters := state.adapters_of(model):
            weights, kind = adapter_files.to_file(weights, model.args), adapter_files.KIND
            texts |= {adapter_files.CONFIG: adapters.config, adapter_files.BASE: adapters.base}
        groups = {kind: weights, "optimizer": tensors}
        pieces = {kind: self.pieces_of(kind, group) for kind, group in groups.items()}
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize()  # the copies are done
        # Not a daemon: a process that ends, for whatever reason, ends after the write.
        self.thread = Thread(target=self.run, args=(step, pieces, texts, vocabulary), name="checkpoint")
        self.thread.start()
        return None if self.in_background else self.wait()

    def wait(self) -> None:
        """Return when the last checkpoint is on disk; UserError if it could not be written."""
        if self.thread is not None:
            self.thread.join()
        error, self.thread, self.error = self.error, None, None
        self.runtime.raise_together(error)

    def pieces_of(self, kind: str, tensors: dict[str, Tensor]) -> dict[str, Piece]:
        """What this process has to write of these tensors: its rows, and of what all hold the first process all."""
        pieces = {}
        for name, tensor in tensors.items():
            piece = state.piece_of(tensor)
            if (isinstance(tensor, DTensor) and piece.rows.numel()) or self.runtime.is_main:
                if self.in_background or piece.rows.device.type != "cpu":
                    piece.rows = self.copied(f"{kind}.{name}", piece.rows)
                pieces[name] = piece
        return pieces

    def copied(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of the tensor in the buffer of this name; on its way when this returns, if from a GPU."""
        buffer = self.buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            pinned = tensor.device.type == "cuda"
            buffer = self.buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        return buffer.copy_(tensor, non_blocking=True)

    def run(
        self, step: int, pieces: dict[str, dict[str, Piece]], texts: dict, vocabulary: dict[str, bytes]
    ) -> None:
        """The thread: write, keep the error for whoever waits."""
        final = self.out / f"step_{step:08d}"
        try:
            self.write(final, pieces, texts, vocabulary)
        except UserError as error:
            self.error = error
        except Exception as error:  # what a full disk looks like from below, or a process that has gone
            self.error = cannot_write(final, error)

    def write(
        self, final: Path, pieces: dict[str, dict[str, Piece]], texts: dict, vocabulary: dict[str, bytes]
    ) -> None:
        """Write the folder, each process its own files, and delete what is no longer to be kept."""
        is_main = self.runtime.is_main
        # Of a run that was killed while saving.
        for leftover in self.out.glob(".step_*.tmp-*") if is_main else ():
            shutil.rmtree(leftover, ignore_errors=True)
        with atomic_path(final) if is_main else nullcontext() as temporary:
            (folder, *_) = self.exchange(temporary)
            try:
                outcome = self.write_tensors(folder, pieces)
            except (RuntimeError, SafetensorError, OSError) as error:
                outcome = cannot_write(final, error)
            outcomes = self.exchange(outcome)
            if error := next((o for o in outcomes if isinstance(o, UserError)), None):
                raise error
            if not is_main:
                return
            checksums = {name: value for outcome in outcomes for name, value in outcome.items()}
            if lost := [name for name in checksums if not (folder / name).is_file()]:
                raise UserError(
                    f"第一个进程看不到 {lost[0]}：--out {self.out} 要放在所有机器共享的文件系统上。"
                )
            for name, content in texts.items():
                write_json(folder / name, content)
            for name, content in vocabulary.items():
                (folder / name).write_bytes(content)
            checksums |= {name: checksum(folder / name) for name in (*texts, *vocabulary)}
            write_json(folder / CHECKSUMS, checksums)
        sync_folder(self.out)
        self.delete_old()

    def write_tensors(self, folder: Path, pieces: dict[str, dict[str, Piece]]) -> dict[str, str]:
        """Write this process's files and flush them; returns their checksums."""
        folder.mkdir(exist_ok=True)
        checksums = {}
        for kind, group in pieces.items():
            is_whole = not self.runtime.sharded or kind == adapter_files.KIND  # in the first process
            if is_whole and not self.runtime.is_main:
                continue
            count = 1 if is_whole else self.runtime.world
            path = folder / tensor_files.file_name(kind, self.runtime.rank, count)
            tensor_files.write(path, group)
            sync_tree(path)
            checksums[path.name] = checksum(path)
        return checksums

    def exchange(self, value: Any) -> list[Any]:
        """The value of every process, in order of their ranks."""
        if self.group is None:
            return [value]
        values = [None] * self.runtime.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def delete_old(self) -> None:
        for old in list_steps(self.out)[: -self.keep_last]:
            if not self.keep_every or step_of(old) % self.keep_every:
                # Half of it must not pass for a checkpoint: under this name it is a leftover of a killed run.
                doomed = old.with_name(f".{old.name}.tmp-{os.getpid()}")
                os.replace(old, doomed)
                shutil.rmtree(doomed)


def cannot_write(final: Path, error: Exception) -> UserError:
    """What to tell the user about a checkpoint that could not be written."""
    reason = (str(error).splitlines() or [repr(error)])[0]
    return UserError(f"无法写入检查点 {final}（磁盘已满或不可写？旧检查点未被改动）：{reason}")
