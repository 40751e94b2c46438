"""What both ranks run: training with the attached optimizer beside the same training by hand.

A case takes the rank and options and gives plain values; what differs between the trainings is listed, not asserted.
"""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_gsl import ProximalSGD, SparseGroupLasso, compact, find_neurons, hook
from dist_gsl.neurons import Neurons
from dist_gsl.training.shrinking import agree
from dist_gsl.training.state import build
from tests.networks import IMAGE, batches, chain
from tests.training.trainings import NETWORK, PENALTY, TRAIN, Course

BETA = {True: 0.05, False: 0.02}  # with BatchNorm and without: kills some within 15 steps, and not all


class Spare(nn.Module):
    """A network with a layer that only some steps use."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.spare, self.use_spare = body, nn.Linear(3, 3), True

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return x + self.spare(x) if self.use_spare else x


class Shared(nn.Module):
    """A network whose last layer runs twice."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.twice = body, nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(self.twice(self.body(x)).tanh())


@dataclass
class Training:
    model: nn.Module
    ddp: DistributedDataParallel
    neurons: Neurons
    optimizer: ProximalSGD
    scheduler: torch.optim.lr_scheduler.LRScheduler

    def state(self) -> dict[str, Tensor]:
        momentum = {
            f"momentum of {name}": self.optimizer.state[p]["momentum_buffer"]
            for name, p in self.model.named_parameters()
            if "momentum_buffer" in self.optimizer.state[p]
        }
        masks = {f"mask of {layer.name}": layer.mask for layer in self.neurons}
        return {name: t.clone() for name, t in {**self.model.state_dict(), **momentum, **masks}.items()}


def training(
    *, batch_norm: bool = True, channels_last: bool = False, dtype: torch.dtype = torch.float32, network: str = "chain",
    beta: float | None = None, alpha: float = 0.0, every: str | int = "step", nesterov: bool = False,
    momentum: float = 0.9, lr: float = 0.05, revive: bool = False, **ddp_options: Any,
) -> Training:  # fmt: skip
    model: nn.Module = chain(batch_norm=batch_norm, dtype=dtype)
    model = {"chain": lambda: model, "spare": lambda: Spare(model), "shared": lambda: Shared(model)}[network]()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    neurons = find_neurons(model, torch.randn(2, *IMAGE, dtype=dtype))
    penalty = SparseGroupLasso(beta=BETA[batch_norm] if beta is None else beta, alpha=alpha)
    optimizer = ProximalSGD(
        model.parameters(), neurons, penalty, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=1e-4,
        every=every, revive=revive,
    )  # fmt: skip
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 8, 0.8)
    return Training(model, DistributedDataParallel(model, **ddp_options), neurons, optimizer, scheduler)


def different(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    odd = sorted(set(a) ^ set(b))
    return odd + [name for name in a if name in b and not torch.equal(a[name], b[name])]


@contextlib.contextmanager
def counted_all_reduces() -> Iterator[mock.Mock]:
    with mock.patch.object(hook, "all_reduce", wraps=hook.all_reduce) as counter:
        yield counter


def attached_equals_by_hand(
    rank: int, *, at_once: bool = False, accumulate: int = 1, num_steps: int = 15, epoch: int = 0, max_grad_norm: float | None = None,
    scaler: bool = False, overflow_at: int = -1, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Trains twice; the same options go to both. By hand is DDP's own average, then step(). at_once: buckets are stepped as on a GPU."""
    ours, theirs = training(**options), training(**options)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=7) if scaler else None for _ in range(2)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours.optimizer.attach(ours.ddp, max_grad_norm=max_grad_norm, scaler=scalers[0])
    lines = [str(warning.message) for warning in caught]
    odd: set[str] = set()
    num_reduces = 0
    data = list(batches(num_steps * accumulate, seed=10 + rank))
    for step in range(num_steps):
        parts = data[step * accumulate : (step + 1) * accumulate]
        if step == 0 and options.get("static_graph"):
            parts = parts[:1]  # DDP learns the graph in the first backward and cannot be in no_sync() then
        for run, scale in zip((ours, theirs), scalers, strict=True):
            if isinstance(run.model, Spare):
                run.model.use_spare = step % 3 != 1
            run.ddp.zero_grad()
            way = mock.patch.object(hook, "is_one_by_one", return_value=not at_once)
            with counted_all_reduces() as reduces, way:
                for number, (x, y) in enumerate(parts):
                    with run.ddp.no_sync() if number < len(parts) - 1 else contextlib.nullcontext():
                        loss = F.cross_entropy(run.ddp(x), y) / accumulate
                        if step == overflow_at:
                            loss = loss * float("inf")
                        (loss if scale is None else scale.scale(loss)).backward()
            if run is ours:
                num_reduces = max(num_reduces, reduces.call_count)
            else:
                if scale is not None:
                    scale.unscale_(run.optimizer)
                if max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(run.model.parameters(), max_grad_norm)
                if scale is not None:
                    scale.step(run.optimizer)
                    scale.update()
                else:
                    run.optimizer.step()
            if epoch and step % epoch == epoch - 1:
                run.optimizer.end_epoch()
            with warnings.catch_warnings(action="error"):
                if step != overflow_at:
                    run.scheduler.step()
        odd |= set(different(ours.state(), theirs.state()))
    moved = different(ours.state(), training(**options).state())
    return {
        "different": sorted(odd),
        "scales": [None if s is None else s.get_scale() for s in scalers],
        "num_steps": ours.optimizer.num_steps,
        "num_dead": [layer.num_dead for layer in ours.neurons],
        "masks": {layer.name: layer.mask.tolist() for layer in ours.neurons},
        "num_moved": len(moved),
        "num_reduces": num_reduces,
        "lines": lines,
    }


def uneven_equals_joined(
    rank: int, *, sizes: list[tuple[int, ...]], num_steps: int, dtype: str, **options: Any
) -> dict[str, Any]:
    """Two workers with sizes[rank] samples, in as many accumulated parts, against one worker on all of them."""
    precision = getattr(torch, dtype)
    ours = training(batch_norm=False, dtype=precision, **options)
    joined = training(batch_norm=False, dtype=precision, **options)
    ours.optimizer.attach(ours.ddp)
    total = sum(sum(parts) for parts in sizes)
    largest = 0.0
    for x, y in batches(num_steps, size=total, dtype=precision):
        start = 0 if rank == 0 else sum(sizes[0])
        mine = list(zip(x[start : start + sum(sizes[rank])].split(sizes[rank]),
                        y[start : start + sum(sizes[rank])].split(sizes[rank]), strict=True))  # fmt: skip
        ours.ddp.zero_grad()
        ours.optimizer.set_num_samples(len(x[start : start + sum(sizes[rank])]))
        for number, (part, labels) in enumerate(mine):
            with ours.ddp.no_sync() if number < len(mine) - 1 else contextlib.nullcontext():
                F.cross_entropy(ours.ddp(part), labels, reduction="sum").backward()
        joined.model.zero_grad()
        F.cross_entropy(joined.model(x), y).backward()
        joined.optimizer.step()
        for p, q in zip(ours.model.parameters(), joined.model.parameters(), strict=True):
            largest = max(largest, float((p - q).detach().abs().max()))
    return {
        "largest_difference": largest,
        "num_dead": [layer.num_dead for layer in ours.neurons],
        "same_masks": all(torch.equal(a.mask, b.mask) for a, b in zip(ours.neurons, joined.neurons, strict=True)),
    }


def counted_and_plain_steps_alternate(rank: int) -> list[str]:
    """set_num_samples holds for one backward; of equal batches the sum over samples is the mean of the means."""
    ours, theirs = training(momentum=0.0), training(momentum=0.0)
    for run in (ours, theirs):
        run.optimizer.attach(run.ddp)
    odd: list[str] = []
    for step, (x, y) in enumerate(batches(6, size=8, seed=rank)):
        for run in (ours, theirs):
            run.ddp.zero_grad()
            counts = run is ours and step % 2 == 0
            if counts:
                run.optimizer.set_num_samples(8)
            F.cross_entropy(run.ddp(x), y, reduction="sum" if counts else "mean").backward()
        for (name, p), q in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
            if not torch.allclose(p, q, rtol=1e-4, atol=1e-6):
                odd.append(f"{name} in step {step}")
    return odd


def step_after_attach(rank: int) -> str:
    run = training()
    run.optimizer.attach(run.ddp)
    [(x, y)] = batches(1, seed=rank)
    F.cross_entropy(run.ddp(x), y).backward()
    before = run.state()
    try:
        run.optimizer.step()
    except RuntimeError as error:
        return "changed" if different(before, run.state()) else str(error)
    return "no error"


def two_rates_in_one_neuron(rank: int) -> str:
    model = chain()
    neurons = find_neurons(model, torch.randn(2, *IMAGE))
    bias = [model.get_parameter("conv2.bias")]
    rest = [p for p in model.parameters() if p is not bias[0]]
    groups = [{"params": rest}, {"params": bias, "lr": 0.01}]
    optimizer = ProximalSGD(groups, neurons, SparseGroupLasso(beta=0.01), lr=0.1)
    ddp = DistributedDataParallel(model)
    optimizer.attach(ddp)
    [(x, y)] = batches(1, seed=rank)
    try:
        F.cross_entropy(ddp(x), y).backward()
    except ValueError as error:
        return str(error)
    return "no error"


def somebody_elses_loop(rank: int) -> dict[str, Any]:
    """Three lines in a loop that knows nothing of neurons: find, make, attach. Then removal on every rank."""
    torch.manual_seed(rank)  # DDP gives rank 0's parameters to all
    model = nn.Sequential(nn.Conv2d(2, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 36, 3))
    data = list(batches(30, size=16, seed=20 + rank))
    neurons = find_neurons(model, data[0][0])
    optimizer = ProximalSGD(model.parameters(), neurons, SparseGroupLasso(beta=0.3), lr=0.02, momentum=0.9)
    ddp = DistributedDataParallel(model)
    optimizer.attach(ddp)
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = F.cross_entropy(ddp(x), y)
        loss.backward()
        losses.append(float(loss.detach()))
    result = compact(model, neurons, optimizer)
    return {
        "losses": losses,
        "alive": neurons["0"].alive().tolist(),
        "widths": result.widths,
        "weights": [p.detach().flatten().tolist() for p in result.model.parameters()],
    }


def state_goes_on(rank: int) -> list[str]:
    """Training interrupted and resumed, both attached, equals training in one go."""
    whole = training()
    whole.optimizer.attach(whole.ddp)
    data = list(batches(40, seed=rank))

    def run(this: Training, some: list[tuple[Tensor, Tensor]]) -> None:
        for x, y in some:
            this.ddp.zero_grad()
            F.cross_entropy(this.ddp(x), y).backward()

    run(whole, data[:25])
    assert sum(layer.num_dead for layer in whole.neurons) > 0
    model_state, optimizer_state = whole.state(), whole.optimizer.state_dict()
    resumed = training()
    resumed.model.load_state_dict({n: t for n, t in model_state.items() if n in resumed.model.state_dict()})
    resumed.optimizer.load_state_dict(torch.utils._pytree.tree_map(lambda v: v, optimizer_state))
    for p in resumed.model.parameters():  # torch's load_state_dict does not copy
        state = resumed.optimizer.state[p]
        state["momentum_buffer"] = state["momentum_buffer"].clone()
    resumed.optimizer.attach(resumed.ddp)
    run(whole, data[25:])
    run(resumed, data[25:])
    return different(whole.state(), resumed.state())


def with_removal_and_without(rank: int, *, shrink: str, optimizer: str = "sgd") -> dict[str, Any]:
    """The same training twice in float64, each process on data of its own."""
    torch.set_default_dtype(torch.float64)
    adamw: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 0.002, "epochs": 0.06, "unit": "absolute"}
    options = {"epochs": 2.0} if optimizer == "sgd" else adamw
    try:
        whole, small = (Course(rule, network=NETWORK, num_steps=8, seed=rank, **options) for rule in ("never", shrink))
    finally:
        torch.set_default_dtype(torch.float32)
    return {
        "difference": max(abs(a - b) for a, b in zip(whole.losses, small.losses, strict=True)), "num_steps": len(small.losses),
        "num_removals": small.num_removals, "sizes": small.sizes, "alive": small.records[-1]["alive"],
    }  # fmt: skip


def steered(rank: int, *, target: str) -> dict[str, Any]:
    """A training with a target, each process on data of its own."""
    course = Course("7", network=NETWORK, epochs=20.0, num_steps=8, seed=rank, target=target)
    steering = course.state.steering
    assert steering is not None
    return {
        "met": steering.is_met, "factor": steering.factor, "budget": steering.budget, "alive": course.records[-1]["alive"],
        "factors": [record["beta_factor"] for record in course.records], "masks": {layer.name: layer.mask.tolist() for layer in course.state.neurons},
    }  # fmt: skip


def with_buffers_of_the_first(rank: int, *, ema: float | None) -> dict[str, Any]:
    """The same training twice, each process on data of its own: DDP hands out the first one's buffers before each forward, or does not."""
    courses = []
    for always in (False, True):
        with mock.patch("dist_gsl.training.state.buffers_matter", return_value=True) if always else contextlib.nullcontext():
            courses.append(Course("7", network={**NETWORK, "batch_norm": True}, epochs=2.0, num_steps=8, seed=rank, ema=ema))
    handed, own = (dict(each.state.evaluated.state_dict()) for each in courses)
    return {
        "does": [each.state.ddp.broadcast_buffers for each in courses], "different": different(handed, own),
        "losses": [each.losses for each in courses], "num_removals": courses[0].num_removals,
        "val": [[record["val_loss"] for record in each.records] for each in courses], "state": {n: t.tolist() for n, t in own.items() if "running" in n},
    }  # fmt: skip


def death_in_one_process(rank: int, *, norm: float) -> dict[str, Any]:
    """The second process loses a neuron that has `norm` times the norm of its layer's largest in the first."""
    state = build(NETWORK, image_shape=(1, 32, 32), train=TRAIN, penalty=PENALTY, steps_per_epoch=6, device=torch.device("cpu"))
    layer = state.neurons["features.conv2v"]
    with torch.no_grad():
        for rows in state.neurons.parts(layer):
            rows[3] *= norm
    if rank == 1:
        state.neurons.zero_({layer.name: [3]})
    try:
        agree(state)
    except RuntimeError as error:
        return {"error": str(error)}
    return {"alive": layer.mask.tolist(), "sum": [float(p.detach().double().sum()) for p in state.model.parameters()]}
