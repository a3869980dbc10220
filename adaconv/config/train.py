"""Configuration of pipelines/train.py: two dataset versions to checkpoints, as one tracked run."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from adaconv.config.base import Config
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
    loader_workers: int = Field(default=1, ge=0)
    """Decoding processes of each rank; 0 decodes in the training process."""
    prefetch_batches: int = Field(default=4, ge=1)
    """Batches that each loader worker keeps ready."""
    cache_dir: str | None = None
    """Folder for shards fetched from s3://; default: `adaconv-shards` in the system's temporary folder."""

    @model_validator(mode="after")
    def _crop_fits(self) -> "DataConfig":
        if self.crop % 8:
            raise ValueError(f"data.crop ({self.crop}) must be a multiple of 8, the stride of the encoder")
        if self.crop > self.resize:
            raise ValueError(f"data.crop ({self.crop}) must not exceed data.resize ({self.resize})")
        return self


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
    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16` runs convolutions under autocast; weights, statistics and losses stay float32."""
    channels_last: bool = True
    """Keep feature maps in memory with channels innermost."""
    compile: bool = False
    """Compile the network with torch.compile: minutes at the start, with a C++ compiler on CPUs or Triton on GPUs. The
    encoder's pass over contents, which stops at relu4_1, stays as it is."""
    seed: int = Field(default=0, ge=0)
    """Of the weights, the sample order and the crops."""
    log_every_steps: int = Field(default=10, ge=1)
    """Steps between two points of the metrics."""


class ScalingConfig(Config):
    num_workers: Annotated[int, Field(ge=1)] = 1
    """Ray Train workers: one DDP rank each."""
    gpus_per_worker: float = Field(default=0, ge=0)
    """GPUs of each rank; 0 trains on CPUs with gloo."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """CPUs that Ray reserves for each rank."""
    threads_per_worker: int | None = Field(default=None, ge=1)
    """Threads that torch uses in each rank; None divides the machine's cores among the ranks when on CPUs."""
    max_restarts: int = Field(default=3, ge=0)
    """Times that the ranks are started again after one was lost to the infrastructure. Errors in code or data are not
    retried."""


class CheckpointConfig(Config):
    every_steps: int = Field(default=1000, ge=1)
    """Steps between two checkpoints; the last step always has one."""
    keep_last: int = Field(default=3, ge=1)
    """Newest checkpoints that are kept."""


class TrackingConfig(Config):
    uri: str | None = None
    """MLflow tracking server or database; None: the variable MLFLOW_TRACKING_URI, else a SQLite file `mlflow.db` in the
    output folder."""
    experiment: str = "adaconv"
    """MLflow experiment."""
    samples_every_steps: int = Field(default=500, ge=1)
    """Steps between two sample grids."""
    sample_contents: int = Field(default=4, ge=1)
    """Contents of the sample grid, chosen once by key."""
    sample_styles: int = Field(default=4, ge=1)
    """Styles of the sample grid, chosen once by key."""


class TrainConfig(Config):
    content: str
    """Dataset version of contents: ROOT or ROOT@VERSION, a folder or s3://."""
    style: str
    """Dataset version of styles: ROOT or ROOT@VERSION, a folder or s3://."""
    output: str
    """Folder of runs; a run's checkpoints lie in OUTPUT/NAME/checkpoints/step-XXXXXXXX/."""
    name: str | None = None
    """Name of the run; None derives it from what determines its result, so that the same command finds it again."""
    resume: str = "auto"
    """`auto` takes up the run of the same name where it stopped; `none` starts afresh under a new name; or a checkpoint
    folder to start from."""
    encoder: EncoderConfig = EncoderConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    train: OptimConfig = OptimConfig()
    scaling: ScalingConfig = ScalingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _agree(self) -> "TrainConfig":
        batch, ranks = self.train.global_batch_size, self.scaling.num_workers
        if batch < ranks:
            raise ValueError(f"train.global_batch_size ({batch}) must be at least scaling.num_workers ({ranks})")
        if batch % self.data.partitions:
            raise ValueError(f"data.partitions ({self.data.partitions}) must divide train.global_batch_size ({batch})")
        for channels, groups in zip(reversed(self.encoder.widths), self.model.groups, strict=True):
            if self.model.architecture == "adaconv" and channels % groups:
                raise ValueError(f"model.groups ({groups}) must divide the channels of its scale ({channels})")
        return self

    def identity(self) -> dict[str, Any]:
        """What determines the weights at a step, apart from the datasets: the rest may change when a run is resumed."""
        values = self.model_dump(mode="json", include={"encoder", "model", "loss", "data", "train"})
        for name in ("loader_workers", "prefetch_batches", "cache_dir"):
            values["data"].pop(name)
        for name in ("log_every_steps", "micro_batch_size", "channels_last", "compile"):
            values["train"].pop(name)
        if self.train.schedule in ("inverse_time", "constant"):
            values["train"].pop("steps")  # these schedules do not look at the end, so a run may be made longer
        return values
