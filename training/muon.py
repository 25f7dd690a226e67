"""Muon for the matrices inside the network, AdamW for everything else, as one optimizer.

Muon replaces the momentum of a matrix, U S V^T, by (nearly) U V^T: every direction moves by the same amount
(https://kellerjordan.github.io/posts/muon/; weight decay: https://arxiv.org/abs/2502.16982).
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Keller Jordan's quintic: steep at 0, so that few steps do
EPS = 1e-7


def orthogonalise(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bring the singular values of matrices (S, m, n) near 1 (0.7 to 1.2) by Newton-Schulz iterations.

    dtype: of the matrix products and of the result.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.to(dtype)
    x = x.mT if tall else x  # the products below are of the shorter side
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)  # the iteration needs singular values up to 1
    for _ in range(steps):
        gram = x @ x.mT  # (S, m, m)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Groups with `muon=True` hold matrices for Muon; the others go to torch's fused AdamW.

    A matrix (m, n) moves by lr * sqrt(max(1, m / n)), so that the best lr does not change with the width
    (https://arxiv.org/abs/2310.17813; torch.optim.Muon's "original" rule). Parameters may be DTensors sharded on
    dimension 0 (FSDP2) or whole copies (DDP): the processes share the orthogonalisation either way.

    Under torch.amp.GradScaler's protocol the attribute `found_inf` (1.0: leave weights and state as they are)
    is obeyed on the device, without waiting for it.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        groups: list[dict],
        lr: float = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        steps: int = 5,
        dtype: torch.dtype = torch.float32,
    ):
        """steps, dtype: of the Newton-Schulz iterations."""
        muon = [group for group in groups if group["muon"]]
        others = [group for group in groups if not group["muon"]]
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        super().__init__(muon + others, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, muon=True))
        self.steps, self.dtype = steps, dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        # Loading a state dict replaces the groups and the state, so that AdamW is given its part every time.
        self.adamw.state = self.state
        self.adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self.adamw.found_inf, self.adamw.grad_scale = found_inf, scale
        self.adamw.step()
        skip = None if found_inf is None else found_inf.bool()
        for group in self.param_groups:
            if group["muon"]:
                for params in same_shapes([p for p in group["params"] if p.grad is not None]):
                    self.update(params, group, skip, scale)

    def update(self, params: list[Tensor], group: dict, skip: Tensor | None, scale: Tensor | None) -> None:
        """One step of matrices (m, n) of one shape. skip: whether to leave everything as it is."""
        m, n = params[0].shape
        rate, keep = group["lr"] * math.sqrt(max(1, m / n)), 1 - group["lr"] * group["weight_decay"]
        weights = [local(p) for p in params]
        grads = [local(p.grad) if scale is None else local(p.grad) / scale for p in params]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momenta = [local(self.state[p]["momentum_buffer"]) for p in params]
        follow: float | Tensor = 1 - group["momentum"]
        if skip is not None:  # then nothing moves: finite gradients, and steps of length 0
            grads = [grad.masked_fill(skip, 0) for grad in grads]
            follow, rate, keep = (
                torch.where(skip, still, value) for still, value in ((0.0, follow), (0.0, rate), (1.0, keep))
            )
        follow = torch.as_tensor(follow, dtype=grads[0].dtype, device=grads[0].device)
        ahead = []  # Nesterov's momentum
        for momentum, grad in zip(momenta, grads, strict=True):
            momentum.lerp_(grad, follow)
            ahead.append(grad.lerp(momentum, group["momentum"]).to(self.dtype))
        updates = self.orthogonalise(torch.stack(ahead), params[0])  # (S, rows here, n)
        for weight, update in zip(weights, updates, strict=True):
            weight.mul_(keep).sub_(update.to(weight.dtype).mul_(rate))

    def orthogonalise(self, momenta: Tensor, like: Tensor) -> Tensor:
        """Orthogonalise matrices of which this process has the rows (S, rows, n) that it has of `like`."""
        if isinstance(like, DTensor):
            return self.orthogonalise_sharded(momenta, like)
        if dist.is_initialized() and dist.get_world_size() > 1 and len(momenta) > 1:
            return self.orthogonalise_shared(momenta)
        return orthogonalise(momenta, self.steps, self.dtype)

    def orthogonalise_shared(self, momenta: Tensor) -> Tensor:
        """The same matrices (S, m, n) are in every process: each does its share and gives it to the others."""
        world, rank, count = dist.get_world_size(), dist.get_rank(), len(momenta)
        share = -(-count // world)
        mine = momenta.new_zeros(share, *momenta.shape[1:])
        part = momenta[rank * share : (rank + 1) * share]
        mine[: len(part)] = part
        done = orthogonalise(mine, self.steps, self.dtype)
        everyone = done.new_empty(world * share, *done.shape[1:])
        dist.all_gather_into_tensor(as_bytes(everyone), as_bytes(done.contiguous()))
        return everyone[:count]

    def orthogonalise_sharded(self, momenta: Tensor, like: DTensor) -> Tensor:
        """Every process has some rows (S, rows, n) of all matrices: collect whole ones, and give back rows."""
        shards = [i for i, p in enumerate(like.placements) if p != Replicate()]
        if len(shards) != 1 or like.placements[shards[0]] != Shard(0):
            raise NotImplementedError(f"Muon needs matrices sharded on rows alone, not {like.placements}")
        group = like.device_mesh.get_group(shards[0])
        world, (count, rows, n), m = dist.get_world_size(group), momenta.shape, like.shape[0]
        share, most_rows = -(-count // world), -(-m // world)  # all shards but the last ones are full
        mine = momenta.new_zeros(world * share, most_rows, n)
        mine[:count, :rows] = momenta
        whole = exchange(mine.to(self.dtype), group).view(world, share, most_rows, n)
        whole = whole.transpose(0, 1).reshape(share, world * most_rows, n)[:, :m]
        done = whole.new_zeros(share, world * most_rows, n)
        done[:, :m] = orthogonalise(whole, self.steps, self.dtype)
        done = done.view(share, world, most_rows, n).transpose(0, 1).reshape(world * share, most_rows, n)
        return exchange(done, group)[:count, :rows]


def same_shapes(params: list[Tensor]) -> list[list[Tensor]]:
    """Parameters by shape, in order: matrices of one shape are orthogonalised together."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for p in params:
        by_shape.setdefault(p.shape, []).append(p)
    return list(by_shape.values())


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process has; it shares the memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor; gloo moves bytes of every type."""
    return tensor.view(torch.uint8)


def exchange(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send the i-th of equal parts (along dimension 0) to process i; returns what the others sent here."""
    received = torch.empty_like(parts)
    dist.all_to_all_single(as_bytes(received), as_bytes(parts.contiguous()), group=group)
    return received
