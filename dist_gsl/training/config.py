"""The part of a run's config that says how the network is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dist_gsl.training.budget import Target
from dist_gsl.training.shrinking import Rule

LOSSES = ("cross-entropy", "square")
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("step", "cosine", "constant")
ON_DIVERGENCE = ("stop", "back")


@dataclass
class TrainConfig:
    """A proximal optimizer over epochs of mini-batches."""

    epochs: int = 12
    """Passes over the training data."""
    batch_size: int = 128
    """Samples of one step over all workers together; the result does not depend on the number of workers."""
    learning_rate: float = 0.05
    """Step size at its height, for the mean loss of a step."""
    schedule: str = "cosine"
    """"step": times drop_factor at each of drop_epochs; "cosine": down to 0 over the epochs; "constant"."""
    warmup_epochs: float = 0.0
    """Epochs over which the learning rate rises linearly from 0."""
    drop_epochs: tuple[float, ...] = ()
    """Epochs at which the step schedule drops."""
    drop_factor: float = 0.1
    """Factor of each drop."""
    optimizer: str = "sgd"
    """"sgd", or "adamw", whose proximal step is taken in Adam's own metric: for transformers, which SGD trains badly."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Nesterov's form of it."""
    weight_decay: float = 0.0
    """Of SGD: factor of the squared norm's gradient that is added to every gradient. Of AdamW: decoupled from it, times the learning rate."""
    adam_betas: tuple[float, ...] = (0.9, 0.999)
    """AdamW's decay of its first and of its second moment."""
    adam_eps: float = 1e-8
    """Added to the root of AdamW's second moment."""
    loss: str = "cross-entropy"
    """"cross-entropy" for classes, "square" for regression."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes."""
    accumulate: int = 1
    """Parts into which a worker's share of a step is split, to fit memory."""
    max_grad_norm: float | None = None
    """Clips the norm of the whole gradient; the step is then taken after backward instead of overlapping with it."""
    autocast: bool = False
    """bfloat16 arithmetic where it is safe; parameters stay float32. For devices that have it: a processor without it takes up to ten times as long."""
    channels_last: bool = True
    """Memory layout of images and filters; faster on most hardware, about 1.6 times on a CPU for Dec3."""
    ema: float | None = None
    """Decay a step of a moving average of the parameters, which is then what is evaluated and kept, with BatchNorm's statistics of its own, estimated at
    the end of each epoch from the last 16 steps' data; None: off."""
    target: str | None = None
    """What may be left: neurons=50%, params=100000, macs=30% or latency_ms=2.5 (an image alone, on a worker). The penalty is steered so that the
    training meets it by penalty.beta_schedule.end, or by its own end where that is None; then the penalty ends, and not before. The betas say how
    strong layers are beside each other, and where it starts from. Below half of the neurons or a quarter of the params the operator runs at the
    ends of epochs, and wherever much is to go; else in every step. None: the betas are what they are."""
    shrink: str = "epoch"
    """When dead neurons leave the training itself, which goes on with the smaller network as it would have gone on with them: "epoch": at
    the end of each; a number N: every N steps; "P%": as soon as P % of the parameters died; "never". With penalty.revive never."""
    shrink_multiple_of: int | None = None
    """Widths stay multiples of it: so many dead neurons stay in training, masked. None: 32 on a GPU, which is slower at odd widths than at
    the full ones; 1 on a CPU, which is not."""
    checkpoint_steps: int | None = None
    """Steps between two checkpoints, besides the one at the end of each epoch; None: by time alone."""
    checkpoint_minutes: float | None = 10.0
    """Minutes after which a checkpoint is due within an epoch; None: none by time."""
    on_divergence: str = "stop"
    """What follows a loss that is not finite, or stays above ten times that of a network that has learned nothing. "stop": the run ends.
    "back": it goes on from the last checkpoint with half the learning rate, five times at most; from the one before where it came to nothing
    from the last already."""
    init: str | None = None
    """Where the weights come from at the start, instead of from chance: a run's folder (its last checkpoint), a checkpoint, or a state_dict in a file
    (.pt, .pth, .safetensors). All but the last layer's, if that has another number of outputs. A lower learning rate than from chance keeps what
    they know."""
    seed: int = 0
    """Seed of initialisation, order, augmentation and dropout."""

    def __post_init__(self) -> None:
        self.drop_epochs, self.adam_betas = tuple(self.drop_epochs), tuple(self.adam_betas)
        checks = [
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("learning_rate", self.learning_rate > 0, "above 0"),
            ("optimizer", self.optimizer in OPTIMIZERS, "one of " + ", ".join(OPTIMIZERS)),
            ("adam_betas", len(self.adam_betas) == 2 and all(0 <= beta < 1 for beta in self.adam_betas), "two numbers in [0, 1)"),
            ("adam_eps", self.adam_eps > 0, "above 0"),
            ("schedule", self.schedule in SCHEDULES, "one of " + ", ".join(SCHEDULES)),
            ("warmup_epochs", 0 <= self.warmup_epochs < self.epochs, "at least 0 and below train.epochs"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("loss", self.loss in LOSSES, "one of " + ", ".join(LOSSES)),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
            ("accumulate", self.accumulate >= 1, "at least 1"),
            ("max_grad_norm", self.max_grad_norm is None or self.max_grad_norm > 0, "above 0, or left out"),
            ("shrink_multiple_of", self.shrink_multiple_of is None or self.shrink_multiple_of >= 1, "at least 1, or left out"),
            ("seed", 0 <= self.seed < 2**63, "at least 0 and below 2**63"),
            ("checkpoint_steps", self.checkpoint_steps is None or self.checkpoint_steps >= 1, "at least 1, or left out"),
            ("checkpoint_minutes", self.checkpoint_minutes is None or self.checkpoint_minutes > 0, "above 0, or None"),
            ("on_divergence", self.on_divergence in ON_DIVERGENCE, "one of " + ", ".join(ON_DIVERGENCE)),
            ("ema", self.ema is None or 0 < self.ema < 1, "in (0, 1), or left out"),
        ]
        for field, is_right, need in checks:
            if not is_right:
                raise ValueError(f"train.{field} is {getattr(self, field)!r}, must be {need}")
        Rule.parse(self.shrink)
        if self.target is not None:
            Target.parse(self.target)
        if self.nesterov and self.optimizer != "sgd":
            raise ValueError(f"train.nesterov is a form of SGD's momentum, train.optimizer is {self.optimizer}; leave it out")
        if self.nesterov and self.momentum == 0:
            raise ValueError("train.nesterov needs train.momentum above 0")

    def learning_rate_at(self, step: int, *, steps_per_epoch: int) -> float:
        """The learning rate of a step, counted from 0 over the whole run."""
        epoch = step / steps_per_epoch
        if epoch < self.warmup_epochs:
            return self.learning_rate * (step + 1) / (self.warmup_epochs * steps_per_epoch)
        if self.schedule == "cosine":
            done = min(1.0, (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs))
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        drops = sum(epoch >= e for e in self.drop_epochs) if self.schedule == "step" else 0
        return self.learning_rate * self.drop_factor**drops


@dataclass
class WorkersConfig:
    """Where the training runs."""

    num: int = 2
    """Processes that train together; each takes its share of every step's samples."""
    min: int | None = None
    """Fewest processes to train with: the run uses what is there, from so many up to `num`, and goes on when machines come and go, with the
    same batches, micro-batches and learning rate. `--workers 2:8` sets both. None: always `num`."""
    resize_interval: float = 60.0
    """Seconds between two looks at whether there is room for more processes, where `min` is set."""
    cpus: float = 1
    """CPUs of each worker, one of which is a thread of its own for computing."""
    gpu: bool | None = None
    """One GPU for each worker; None: if the cluster has that many."""
    address: str | None = None
    """A Ray cluster: "auto" for the one this machine belongs to. None: RAY_ADDRESS, or else a Ray of our own on this machine."""
    max_failures: int = 3
    """Times a lost worker is replaced, each time going on from the last checkpoint."""
    start_timeout: float = 1800.0
    """Seconds to wait for the workers' places: until the autoscaler has started machines, or a lost one has come back."""

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ValueError(f"workers.num is {self.num}, must be at least 1")
        if self.min is not None and not 1 <= self.min <= self.num:
            raise ValueError(f"workers.min is {self.min}, must be from 1 to workers.num {self.num}")
        if self.resize_interval <= 0:
            raise ValueError(f"workers.resize_interval is {self.resize_interval}, must be above 0")
        if self.cpus <= 0:
            raise ValueError(f"workers.cpus is {self.cpus}, must be above 0")
        if self.start_timeout <= 0:
            raise ValueError(f"workers.start_timeout is {self.start_timeout}, must be above 0")

    @property
    def fewest(self) -> int:
        """Processes without which there is no training."""
        return self.num if self.min is None else self.min
