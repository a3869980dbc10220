"""Configuration of pipelines/train.py: two dataset versions to checkpoints, as one tracked run."""

import re
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, field_validator, model_validator

from adaconv.config.base import Config, FolderName, LocalFolder, Location, Name, PathOrWord, TrackingUri
from adaconv.config.model import EncoderConfig, LossConfig, ModelConfig


class DataConfig(Config):
    resize: int = Field(default=512, ge=16)
    """Shorter side, in pixels, that an image is scaled to before the crop (aspect kept)."""
    crop: int = Field(default=256, ge=16)
    """Side, in pixels, of the random square crop that the network sees; a multiple of 8."""
    flip: bool = True
    """Mirror each image left to right with probability 0.5."""
    rotate_style: bool = False
    """Turn each style by a random multiple of 90 degrees."""
    partitions: int = Field(default=1, ge=1)
    """Canonical partitions of the sample order; ranks whose count divides it read disjoint shards within an epoch."""
    block_shards: int = Field(default=8, ge=1)
    """Shards whose samples are shuffled together."""
    skip_batches: tuple[str, ...] = ()
    """Ranges FIRST:END of the order's batches that are not used, END excluded, such as 41200:41500 for data that made
    the loss jump; steps go on with those that follow. Start from a checkpoint before them (`resume`)."""
    loader_workers: int = Field(default=1, ge=0)
    """Decoding processes of each rank; 0 decodes in the training process."""
    prefetch_batches: int = Field(default=4, ge=1)
    """Batches that each loader worker keeps ready."""
    prefetch_shards: int = Field(default=32, ge=0)
    """Shards of s3:// that each rank fetches before they are read: the blocks that both streams are at, and the next
    ones."""
    cache_dir: LocalFolder | None = None
    """Folder for shards fetched from s3://, shared by the ranks of a node; default: `adaconv-shards-UID` in the
    system's temporary folder."""
    cache_gb: float = Field(default=100, gt=0)
    """Bytes, in 10^9, that fetched shards may take there; the least recently read ones make room. A shard is compared
    with its sha256 when it is fetched."""
    verify_samples: bool = False
    """Compare the bytes of every sample with its checksum when it is read: finds damage on a local disk, for a few
    percent of the decoding time."""
    timeout_seconds: float = Field(default=300, ge=0)
    """A loader worker that gives no batch for so long ends the rank, which is started again; a line names the sample
    and shard that it was at, and where in the code. 0 waits for ever."""

    @model_validator(mode="after")
    def _crop_fits(self) -> "DataConfig":
        if self.crop % 8:
            raise ValueError(f"data.crop ({self.crop}) must be a multiple of 8, the stride of the encoder")
        if self.crop > self.resize:
            raise ValueError(f"data.crop ({self.crop}) must not exceed data.resize ({self.resize})")
        return self

    @model_validator(mode="after")
    def _skips_are_ranges(self) -> "DataConfig":
        for text in self.skip_batches:
            numbers = re.fullmatch("([0-9]+):([0-9]+)", text)
            if not numbers or int(numbers[1]) >= int(numbers[2]):
                raise ValueError(f"data.skip_batches ({text}): expected FIRST:END with END above FIRST, as 41200:41500")
        for (_, end), (first, _) in pairwise(self.skipped):
            if first < end:
                raise ValueError(f"data.skip_batches: two ranges hold batch {first}")
        return self

    @property
    def skipped(self) -> list[tuple[int, int]]:
        """First batch, and the one after the last, of each range."""
        ranges = [text.partition(":") for text in self.skip_batches]
        return sorted((int(first), int(end)) for first, _, end in ranges)


class OptimConfig(Config):
    steps: int = Field(default=160_000, ge=1)
    """Optimizer updates of the whole run."""
    global_batch_size: int = Field(default=8, ge=1)
    """Content-style pairs of one update, over all ranks; the result does not depend on how many ranks share them."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Pairs that a rank takes through the network at once; gradients of the rest of its share are accumulated.
    None: its whole share."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate of Adam."""
    style_encoder_rate: float = Field(default=1.0, gt=0)
    """Learning rate of the style encoder, as a factor of the others'. Its linear layer sums thousands of positive
    features, so a step of Adam moves all descriptors alike; where styles stop to matter, lower it."""
    schedule: Literal["inverse_time", "cosine", "one_cycle", "constant"] = "inverse_time"
    """How the learning rate changes: `inverse_time` divides by 1 + decay * step, as AdaIN does."""
    decay: float = Field(default=5e-5, ge=0)
    """Decay per step of `inverse_time`."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    clip_norm: float | None = Field(default=10.0, gt=0)
    """Largest norm of the gradient; None does not clip."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Keep an exponential moving average of the weights with this decay per step, such as 0.999; it is what sample
    grids show and checkpoints give to stylize. None: the weights themselves."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16` runs convolutions under autocast; weights, statistics and losses stay float32."""
    channels_last: bool = True
    """Keep feature maps in memory with channels innermost."""
    compile: bool = False
    """Compile the network with torch.compile: minutes at the start, with a C++ compiler on CPUs or Triton on GPUs. The
    encoder's pass over contents, which stops at relu4_1, stays as it is on CPUs. A GPU is faster without: its kernels
    between convolutions are not used in compiled code."""
    cuda_graph: bool = True
    """On GPUs, record forward and backward as a CUDA graph and start it as a whole: a small batch is done sooner than
    its kernels could be started one by one. Several ranks then exchange gradients after the backward pass rather than
    beside it, which over a slow network takes longer: `false` is the other way. Nothing else changes."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the weights, the sample order and the crops."""
    log_every_steps: int = Field(default=10, ge=1)
    """Steps between two points of the metrics."""
    ledger: LocalFolder | None = None
    """Folder on a disk where each rank notes the keys of every step, to prove the order; None: no notes."""


class ScalingConfig(Config):
    num_workers: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = 1
    """Ray Train workers, one DDP rank each; two numbers let their count follow the cluster's resources between them.
    The global batch stays as it is. Each change starts the ranks again from the newest checkpoint."""
    gpus_per_worker: float = Field(default=0, ge=0)
    """GPUs of each rank; 0 trains on CPUs with gloo."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """CPUs that Ray reserves for each rank."""
    threads_per_worker: int | None = Field(default=None, ge=1)
    """Threads that torch uses in each rank; None divides the machine's cores among the ranks when on CPUs."""
    gradient_compression: Literal["none", "bfloat16"] = "none"
    """`bfloat16` halves the bytes that GPUs exchange each step; sums of gradients are rounded. Ranks on CPUs have no
    such exchange."""
    max_restarts: int = Field(default=3, ge=0)
    """Times in a row that the ranks are started again after one was lost to the infrastructure and no new checkpoint
    came of it. Errors in code or data are not retried; a start with more ranks than before does not count."""

    @field_validator("num_workers", mode="wrap")
    @classmethod
    def _one_or_two(cls, value: Any, read: ValidatorFunctionWrapHandler) -> Any:
        try:
            return read(value)
        except ValidationError as error:  # which would tell of each of the two kinds
            if any(one["type"] == "value_error" for one in error.errors()):
                raise
            raise ValueError(f"expected one number, or the fewest and the most, from 1 on; found {value!r}") from None

    @model_validator(mode="after")
    def _ordered(self) -> "ScalingConfig":
        if self.least_workers > self.most_workers:
            raise ValueError(f"scaling.num_workers ({self.num_workers}): the first number must not exceed the second")
        if self.gradient_compression != "none" and not self.gpus_per_worker:
            raise ValueError(
                f"scaling.gradient_compression ({self.gradient_compression}) needs scaling.gpus_per_worker above 0: "
                "torch has it for NCCL alone"
            )
        return self

    @property
    def least_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class CheckpointConfig(Config):
    every_steps: int = Field(default=1000, ge=1)
    """Steps between two checkpoints; the last step always has one."""
    keep_last: int = Field(default=3, ge=1)
    """Newest checkpoints that are kept."""
    keep_best: int = Field(default=1, ge=0)
    """Checkpoints of the lowest `probe/loss` that are kept besides."""


class HardwareConfig(Config):
    """What the plan of `--dry-run` reckons with, and what a start is refused by that cannot fit; no result changes."""

    tflops: float | None = Field(default=None, gt=0)
    """10^12 operations a second that a rank attains in training; None: where ranks have GPUs, what an H200 was measured
    to (352 in bfloat16, 110 in float32, and 3.3 ms a step), else what this machine's matrix products give, which the
    ranks of a node share."""
    launch_ms: float = Field(default=25, ge=0)
    """Milliseconds that Python needs to start a step's kernels one by one, on GPUs whose step is not recorded as a CUDA
    graph (25: measured beside an H200, docs/design/0007-network.md)."""
    decode_per_core: float = Field(default=350, gt=0)
    """Images a second that one core decodes and crops (`python bench/run.py load`: 350 of 682x512 px)."""
    cores_per_rank: float | None = Field(default=None, gt=0)
    """Cores that a rank's loader workers have; None: data.loader_workers."""
    network_gbit: float = Field(default=25, gt=0)
    """Gigabits a second between two nodes, and between ranks on CPUs."""
    nvlink_gbyte: float = Field(default=300, gt=0)
    """Gigabytes a second between two GPUs of a node."""
    ranks_per_node: int = Field(default=8, ge=1)
    """Ranks that share a node, its network and its cache."""
    storage_mbyte: float = Field(default=500, gt=0)
    """Megabytes a second that a node fetches from the object store."""
    disk_gb: float | None = Field(default=None, gt=0)
    """Free bytes of a node's cache folder, in 10^9; None: this machine's."""
    memory_gb: float | None = Field(default=None, gt=0)
    """Memory of a rank, in 2^30 bytes (of its GPU where it has one); None: 80 with a GPU, else this machine's divided
    among the ranks of a node."""


class TrackingConfig(Config):
    uri: TrackingUri = None
    """MLflow tracking server or database; None: the variable MLFLOW_TRACKING_URI, else a SQLite file `mlflow.db` in the
    output folder; for one on s3://, in `adaconv-runs-UID` of the system's temporary folder. Ranks on several machines
    reach a SQLite file only in a folder that they share."""
    experiment: Name = "adaconv"
    """MLflow experiment."""
    samples_every_steps: int = Field(default=500, ge=1)
    """Steps between two sample grids."""
    sample_contents: int = Field(default=4, ge=1)
    """Contents of the sample grid."""
    sample_styles: int = Field(default=4, ge=1)
    """Styles of the sample grid."""
    contents_from: Location | None = None
    """Folder of images, local or s3://, whose first by path are the grid's contents, cut to squares of their middle.
    None: images of the dataset, chosen once by key. `probe/loss`, and so the best checkpoint, is of these pictures:
    those that no training saw tell more."""
    styles_from: Location | None = None
    """Folder of images for the grid's styles, likewise."""


class TrainConfig(Config):
    content: Location
    """Dataset version of contents: ROOT or ROOT@VERSION, a folder or s3://."""
    style: Location
    """Dataset version of styles: ROOT or ROOT@VERSION, a folder or s3://."""
    output: Location
    """Folder of runs; a run's checkpoints lie in OUTPUT/NAME/checkpoints/step-XXXXXXXX/."""
    name: FolderName = None
    """Name of the run; None derives it from what determines its result, so that the same command finds it again."""
    resume: PathOrWord = "auto"
    """`auto` takes up the run of the same name where it stopped; `none` starts afresh under a new name; or a checkpoint
    folder that another run, of a name of its own, starts from."""
    init_from: Location | None = None
    """Model whose weights a new run begins with, at step 0 and with a fresh optimizer: a checkpoint folder (local or
    s3://); a folder of runs or of one run, whose newest checkpoint is taken; models:/NAME@ALIAS, models:/NAME/VERSION
    or runs:/ID/NAME. It is looked up once, when the run begins; later starts go on from the run's own checkpoints. Its
    network must be the configured one, and its encoder comes along."""
    encoder: EncoderConfig = EncoderConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    train: OptimConfig = OptimConfig()
    scaling: ScalingConfig = ScalingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    hardware: HardwareConfig = HardwareConfig()

    @model_validator(mode="after")
    def _agree(self) -> "TrainConfig":
        batch, ranks = self.train.global_batch_size, self.scaling.most_workers
        if batch < ranks:
            raise ValueError(f"train.global_batch_size ({batch}) must be at least scaling.num_workers ({ranks})")
        if batch % self.data.partitions:
            raise ValueError(f"data.partitions ({self.data.partitions}) must divide train.global_batch_size ({batch})")
        for channels, groups in zip(reversed(self.encoder.widths), self.model.groups, strict=True):
            if self.model.architecture == "adaconv" and channels % groups:
                raise ValueError(f"model.groups ({groups}) must divide the channels of its scale ({channels})")
        least = 8 * (self.model.kernel_size // 2 + 1)
        if self.model.architecture == "adaconv" and self.data.crop < least:
            raise ValueError(
                f"data.crop ({self.data.crop}) must be at least {least} with model.kernel_size "
                f"{self.model.kernel_size}: its eighth is the smallest map, whose edges kernels mirror"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """What determines the weights at a step, apart from the datasets: the rest may change when a run is resumed."""
        values = self.model_dump(mode="json", include={"encoder", "model", "loss", "data", "train"})
        for name in ("loader_workers", "prefetch_batches", "prefetch_shards", "verify_samples", "timeout_seconds"):
            values["data"].pop(name)
        for name in ("cache_dir", "cache_gb", "skip_batches"):  # skipped by a run that goes on
            values["data"].pop(name)
        for name in ("log_every_steps", "micro_batch_size", "channels_last", "compile", "cuda_graph", "ledger"):
            values["train"].pop(name)
        if self.train.schedule in ("inverse_time", "constant"):
            values["train"].pop("steps")  # these schedules do not look at the end, so a run may be made longer
        if self.init_from is not None:  # runs without it keep the names that they had before there was such a thing
            values["init_from"] = self.init_from
        return values
