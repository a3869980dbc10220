"""The real loop in this process, on tiny networks and datasets."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from adaconv import checkpoint
from adaconv.config.train import TrainConfig
from adaconv.tracking.tracker import RecordingTracker
from adaconv.training.loop import train


def config_of(content, style, **changes) -> TrainConfig:
    values = {
        "content": content.root,
        "style": style.root,
        "output": "unused",
        "encoder": {"weights": "seeded:0", "widths": [4, 8, 8, 16]},
        "model": {"descriptor_channels": 8, "groups": [16, 4, 2, 1]},
        "loss": {"identity_weight": 10.0, "tv_weight": 0.1},
        "data": {"resize": 40, "crop": 32, "loader_workers": 0},
        "train": {"steps": 4, "global_batch_size": 4, "learning_rate": 1e-3, "log_every_steps": 1},
        "checkpoint": {"every_steps": 2, "keep_last": 2},
        "tracking": {"samples_every_steps": 2, "sample_contents": 2, "sample_styles": 2},
    }
    for path, value in changes.items():
        section, _, name = path.partition("__")
        values[section] = {**values[section], name: value} if name else value
    return TrainConfig.model_validate(values)


def run(content, style, folder, *, control=None, tracker=None, start_from=None, **changes):
    return train(
        config_of(content, style, **changes),
        content=content,
        style=style,
        checkpoints=str(folder),
        device=torch.device("cpu"),
        tracker=tracker or RecordingTracker(),
        control=control,
        start_from=start_from,
    )


def weights(folder, step):
    return load_file(Path(folder) / checkpoint.name_of(step) / "model.safetensors")


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
