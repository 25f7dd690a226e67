"""A model made ready to generate: its weights in the precision and layout that decoding reads fastest.

Decoding one token reads every weight once, so it is as fast as memory gives the weights: half the bytes, half the
time. Only the linear layers change; the model's forward pass is the one that it was trained with.
"""

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Transformer
from stage import UserError
from training.runtime import choose_dtype

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Quantise = Literal["int8", "int4"]

GROUP = (
    32  # weights of a row that share an int4 scale; the smallest that the kernels take, and it divides 1376
)
# The kernels read whole blocks, beyond the end of a matrix that is no multiple of them: zeros fill it up.
BLOCK = 64  # outputs; of inputs it is GROUP
FEW = 32  # rows up to which the kernels for quantised weights beat unpacking the weights for a matrix product


class HeadLinear(nn.Module):
    """The output layer in fp32 on a CPU, its matrix transposed: one row of x then takes half the time."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.register_buffer("weight_t", linear.weight.detach().t().contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight_t


class VectorLinear(nn.Module):
    """A layer in bf16 on a CPU: one row of x goes to a kernel for vectors, which is the faster."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == x.shape[-1]:
            return torch.mv(self.weight, x.view(-1)).view(*x.shape[:-1], -1)
        return F.linear(x, self.weight)


class Int8Linear(nn.Module):
    """Weights of eight bits with one scale a row: w = q * scale, q in -127..127. Activations stay bf16."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()  # (out, in)
        self.out, self.missing = weight.shape[0], -weight.shape[1] % GROUP
        weight = F.pad(weight, (0, self.missing, 0, -self.out % BLOCK))
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
        self.register_buffer("q", (weight / scale).round().to(torch.int8), persistent=False)
        self.register_buffer("scale", scale[:, 0].to(linear.weight.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = F.pad(x.flatten(0, -2), (0, self.missing))  # (N, in)
        if len(rows) <= FEW and x.device.type == "cpu":
            y = torch._weight_int8pack_mm(rows, self.q, self.scale)
        else:
            y = F.linear(rows, self.q.to(x.dtype)) * self.scale
        return y[:, : self.out].reshape(*x.shape[:-1], -1)


class DynamicInt8Linear(nn.Module):
    """Int8Linear for x86 CPUs, whose instructions multiply bytes: each row of x is rounded to eight bits, too.

    Less than half the time of unpacking weights to bf16 (docs/LOG.md). x and y are fp32.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = F.pad(linear.weight.detach().float(), (0, 2))  # (out, in + 2)
        self.register_buffer("ends", torch.tensor([-1.0, 1.0]), persistent=False)
        scale = weight.abs().amax(1).clamp(min=1e-8) / 127  # (out,)
        zero = torch.zeros(len(weight), dtype=torch.long)
        with warnings.catch_warnings():  # of the type's name, which has another successor in every release
            warnings.simplefilter("ignore")
            q = torch.quantize_per_channel(weight, scale.double(), zero, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(q, None)
        self.reduce_range = not torch.cpu._is_vnni_supported()  # older instructions would overflow

    @staticmethod
    def works(device: torch.device) -> bool:
        """Whether this machine has the kernels."""
        return device.type == "cpu" and torch.backends.quantized.engine in ("x86", "fbgemm", "onednn")

    def forward(self, x: Tensor) -> Tensor:
        # The kernel has one scale for all rows, from the least number to the greatest. In the two columns added for
        # it these are -1 and 1, and each row is brought to that size: no row depends on its neighbours.
        size = x.abs().amax(-1, keepdim=True).clamp(min=1e-8)  # (..., 1)
        x = torch.cat((x / size, self.ends.expand(*x.shape[:-1], 2)), dim=-1)
        return torch.ops.quantized.linear_dynamic(x, self.packed, self.reduce_range) * size


class Int4Linear(nn.Module):
    """Weights of four bits, GROUP to a scale and a zero point: w = (q - 8) * scale + zero, q in 0..15."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()  # (out, in)
        self.out, self.missing = weight.shape[0], -weight.shape[1] % GROUP
        weight = F.pad(weight, (0, self.missing, 0, -self.out % BLOCK)).unflatten(
            1, (-1, GROUP)
        )  # (out, groups, G)
        low, high = weight.aminmax(dim=2, keepdim=True)
        scale = ((high - low) / 15).clamp(min=1e-8)
        q = ((weight - low) / scale).round().clamp(0, 15).flatten(1).to(torch.int32)
        zero = low + 8 * scale
        self.register_buffer("packed", pack_int4(q), persistent=False)
        pairs = torch.cat((scale, zero), dim=2).transpose(0, 1).contiguous()  # (groups, out, 2)
        self.register_buffer("pairs", pairs.to(linear.weight.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = F.pad(x.flatten(0, -2), (0, self.missing))
        product = torch._weight_int4pack_mm_for_cpu if x.device.type == "cpu" else torch._weight_int4pack_mm
        return product(rows.contiguous(), self.packed, GROUP, self.pairs)[:, : self.out].view(
            *x.shape[:-1], -1
        )


class Joined(nn.Module):
    """Layers with one input as one: for a few tokens, a call costs as much as the product that it makes."""

    def __init__(self, linears: Sequence[nn.Linear], quantise: Quantise | None):
        super().__init__()
        self.sizes = [linear.out_features for linear in linears]
        whole = nn.Linear(linears[0].in_features, sum(self.sizes), bias=False, device="meta")
        whole.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
        self.layer = converted(whole, quantise)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.layer(x).split(self.sizes, dim=-1)


def pack_int4(q: Tensor) -> Tensor:
    """Numbers 0..15, (out, in) int32, in the layout of the device's kernel."""
    if q.device.type == "cpu":
        return torch._convert_weight_to_int4pack_for_cpu(q, 1)
    # GPUs want two numbers in a byte, the first in the upper half.
    return torch._convert_weight_to_int4pack((q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8), 2)


def prepare(
    model: Transformer, precision: Precision = "auto", quantise: Quantise | None = None
) -> Transformer:
    """Change a model, in place, for generating: it can no longer be trained or saved.

    precision "auto": bf16 where the device is fast in it, else fp32. Quantised weights have a type of their own.
    UserError for what the device cannot do.
    """
    device = model.rope.device
    if quantise and device.type not in ("cpu", "cuda"):
        raise UserError(f"--quantise 不支持 {device.type}；请去掉它，或用 --device cpu。")
    dtype = torch.bfloat16 if quantise else choose_dtype(device, precision)
    if quantise == "int8" and DynamicInt8Linear.works(device):
        dtype = torch.float32
    model.eval().requires_grad_(False)
    rope = model.rope
    model.to(dtype)
    model.rope = rope  # angles in bf16 would not tell positions apart
    for block in model.layers:
        join(block.attention, ("wq", "wk", "wv"), quantise)
        block.attention.wo = converted(block.attention.wo, quantise)
        join(block.feed_forward, ("w1", "w3"), quantise)
        block.feed_forward.w2 = converted(block.feed_forward.w2, quantise)
    # The head decides between tokens that are often close, so it keeps eight bits, as llama.cpp's keeps at least six.
    model.output = converted(model.output, quantise and "int8", is_head=True)
    return model


def join(part: nn.Module, names: Sequence[str], quantise: Quantise | None) -> None:
    """Put one layer in the place of several that have the same input."""
    part.joined = Joined([getattr(part, name) for name in names], quantise)
    for name in names:
        delattr(part, name)


def converted(linear: nn.Linear, quantise: Quantise | None, is_head: bool = False) -> nn.Module:
    """The layer in the form that its device reads fastest."""
    if quantise == "int4":
        return Int4Linear(linear)
    if quantise == "int8":
        is_dynamic = DynamicInt8Linear.works(linear.weight.device) and linear.weight.dtype == torch.float32
        return (DynamicInt8Linear if is_dynamic else Int8Linear)(linear)
    if linear.weight.device.type != "cpu":
        return linear
    if linear.weight.dtype == torch.bfloat16:
        return VectorLinear(linear)
    return HeadLinear(linear) if is_head else linear
