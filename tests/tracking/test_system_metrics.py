"""What is told of a machine, with and without a GPU."""

import logging
import queue

import pytest
import torch

from adaconv.tracking.system_metrics import SystemMetrics


@pytest.fixture
def told(caplog):
    """Two rounds of values, and what was logged meanwhile."""
    rounds = queue.Queue()
    system = SystemMetrics(rounds.put, interval_seconds=0.05)
    values = [rounds.get(timeout=20) for _ in range(2)]
    system.stop()
    warnings = [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING and record.threadName == "system-metrics"
    ]
    return values, warnings


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_machine_without_a_gpu_is_told_as_ever_and_quietly(told):
    values, warnings = told
    for found in values:
        assert {"system/cpu_utilization_percentage", "system/disk_usage_percentage"} <= found.keys()
        assert not [name for name in found if "gpu" in name]
    assert not warnings


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_told_of(told):
    values, warnings = told
    assert {"system/gpu_0_utilization_percentage", "system/gpu_0_memory_usage_megabytes"} <= values[0].keys()
    assert not warnings


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without NVIDIA's driver")
def test_a_gpu_without_metrics_is_told_once(monkeypatch, request):
    """As in a container that was given the GPU but not the driver's library for looking at it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    values, warnings = request.getfixturevalue("told")
    assert "system/cpu_utilization_percentage" in values[1]
    (warning,) = warnings
    assert warning.startswith("tracking: there is a GPU, but no metrics of it: Failed to initialize NVML")
