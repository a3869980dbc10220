"""The plan of a run: terms that move as they must, and what is refused."""

import dataclasses
import re

import pytest

from adaconv.config.train import TrainConfig
from adaconv.data.manifest import Shard
from adaconv.errors import UsageError
from adaconv.model import work
from adaconv.model.encoder import VGGEncoder
from adaconv.model.network import build_network
from adaconv.training import plan
from adaconv.training.plan import describe, memory_gib, plan_step, size_of


def config_of(**sections):
    values = {"content": "c", "style": "s", "output": "o", **sections}
    return TrainConfig.model_validate(values)


def step(config, ranks, *, tflops=300.0, image_bytes=1e5, dataset_gb=50.0, cores=8.0):
    return plan_step(config, ranks, tflops=tflops, image_bytes=image_bytes, dataset_gb=dataset_gb, cores=cores)


@pytest.mark.parametrize(
    "sections",
    [{}, {"encoder": {"widths": [4, 8, 8, 16]}, "model": {"descriptor_channels": 8, "groups": [16, 4, 2, 1]}}],
    ids=["paper", "tiny"],
)
def test_the_counts_are_the_network_s(sections):
    config = config_of(**sections)
    network = build_network(encoder=VGGEncoder(widths=tuple(config.encoder.widths)), **config.model.model_dump())
    trained = sum(p.numel() for p in network.transfer.parameters())
    assert work.trained_weights(size_of(config)) == pytest.approx(trained, rel=0.05)  # without biases
    frozen = sum(p.numel() for p in network.encoder.parameters())
    assert work.encoder_weights(size_of(config)) == pytest.approx(frozen, rel=0.05)


def test_more_ranks_compute_less_each_and_exchange_more():
    config = config_of(train={"global_batch_size": 64})
    plans = [step(config, ranks) for ranks in (1, 2, 8, 16, 64)]
    assert [p.computing for p in plans] == sorted((p.computing for p in plans), reverse=True)
    assert plans[0].exchanging == 0
    assert plans[0].computing == pytest.approx(64 * plans[-1].computing)
    assert plans[-1].exchanging > plans[2].exchanging  # over the network rather than inside a node
    halved = step(
        config_of(train={"global_batch_size": 64}, scaling={"gradient_compression": "bfloat16", "gpus_per_worker": 1}),
        64,
    )
    assert halved.exchanging < 0.6 * plans[-1].exchanging


def test_what_saturates_first_is_named_with_its_setting():
    config = config_of(train={"global_batch_size": 8})
    assert step(config, 1, cores=1).limit.startswith("decoding: data.loader_workers")
    assert step(config, 1, tflops=1.0).limit.startswith("computing")
    slow = config_of(train={"global_batch_size": 64}, hardware={"network_gbit": 1})
    assert step(slow, 64, cores=64).limit.startswith("exchanging gradients")
    assert step(config_of(hardware={"storage_mbyte": 1}, data={"cache_gb": 1}), 1).limit.startswith("fetching")
    assert step(config_of(hardware={"storage_mbyte": 1}, data={"cache_gb": 100}), 1).fetching == 0


def test_micro_batches_need_less_memory():
    whole, single = config_of(), config_of(train={"micro_batch_size": 1})
    assert memory_gib(single, 1) < memory_gib(whole, 1) - 2
    assert memory_gib(whole, 8) == pytest.approx(memory_gib(single, 1))


def remote(version, count=3, size=10**8):
    shards = tuple(Shard(f"{n}.tar", 100, size, "0" * 64) for n in range(count))
    return dataclasses.replace(version, root="s3://bucket/data", shards=shards)


def test_the_impossible_is_refused_all_at_once(content_version, style_version):
    config = config_of(
        scaling={"num_workers": 4},
        data={"cache_gb": 0.5},
        hardware={"memory_gb": 1, "disk_gb": 0.1, "tflops": 1},
    )
    with pytest.raises(UsageError) as refused:
        describe(config, remote(content_version), remote(style_version), ranks=())
    message = str(refused.value)
    assert "the content dataset has 3 shards, fewer than scaling.num_workers (4)" in message
    assert "the style dataset has 3 shards" in message
    assert "take 0.6 GB, data.cache_gb is 0.5" in message
    assert "0.1 GB are free" in message
    assert "a rank needs about" in message


def test_few_and_many_ranks_are_each_judged_by_what_they_have(content_version, style_version, monkeypatch):
    """A rank of one needs 4.3 GiB, one of eight 1.8; the machine's memory is shared by those of a node."""

    def refused(machine_gib, workers, **hardware):
        monkeypatch.setattr(plan, "_memory_gib", lambda: machine_gib)
        config = config_of(scaling={"num_workers": workers}, hardware={"tflops": 1, **hardware})
        try:
            describe(config, content_version, style_version, ranks=())
        except UsageError as error:
            return re.findall(r"scaling\.num_workers (\d): a rank needs about ([\d.]+) GiB", str(error))
        return []

    assert refused(23, [1, 8]) == refused(23, 1) == refused(23, 8) == []
    assert refused(10, [1, 8]) == refused(10, 8) == [("8", "1.8")]
    assert refused(10, [1, 8], ranks_per_node=4) == []
    assert refused(23, [1, 8], memory_gb=2) == [("1", "4.3")]


def test_partitions_that_the_shards_do_not_admit_are_refused(content_version, style_version):
    config = config_of(data={"partitions": 8}, hardware={"tflops": 1, "memory_gb": 80})
    few = dataclasses.replace(style_version, shards=style_version.shards[:2])
    with pytest.raises(UsageError, match=r"data\.partitions \(8\) exceeds the 2 shards of the style dataset"):
        describe(config, content_version, few, ranks=())


def test_a_plan_has_a_row_for_each_number_of_ranks(content_version, style_version):
    config = config_of(scaling={"num_workers": 2}, hardware={"tflops": 1, "memory_gb": 80})
    lines = describe(config, content_version, style_version, ranks=(1, 2, 4, 8, 16)).splitlines()
    assert [int(line.split()[0]) for line in lines[3:]] == [2, 1, 4, 8]  # 16 ranks would share 8 pairs


def test_gradients_are_compressed_between_gpus_alone():
    with pytest.raises(ValueError, match=r"gradient_compression \(bfloat16\) needs scaling\.gpus_per_worker above 0"):
        config_of(scaling={"gradient_compression": "bfloat16"})
