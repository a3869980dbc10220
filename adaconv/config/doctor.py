"""Configuration of pipelines/doctor.py: what to look at."""

from adaconv.config.base import Config, Location, TrackingUri, Weights


class DoctorConfig(Config):
    output: Location = "."
    """Folder (local or s3://) that jobs are to write to."""
    tracking_uri: TrackingUri = None
    """MLflow tracking server or database; None: MLFLOW_TRACKING_URI, else the SQLite file of trainings with
    this output."""
    encoder_weights: Weights = "imagenet"
    """VGG-19 weights that a training is to use; see `encoder.weights` of pipelines/train.py."""
    working_dir: Location = "."
    """Folder that `ray job submit --working-dir` is to send."""
    cluster: bool = False
    """Ask every node of the cluster too: software, disk, GPUs, clock, and whether it reaches output and tracking."""
