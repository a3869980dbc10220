"""The plan of a run: terms that move as they must, and what is refused."""

import dataclasses
import re

import psutil
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


def step(config, ranks, *, tflops=300.0, image_bytes=1e5, dataset_gb=50.0, cores=8.0, **how):
    return plan_step(config, ranks, tflops=tflops, image_bytes=image_bytes, dataset_gb=dataset_gb, cores=cores, **how)


def on_h200s(config, ranks):
    rates = {"tflops": plan._H200_TFLOPS[config.train.precision], "fixed_seconds": plan._H200_FIXED_SECONDS}
    return step(config, ranks, **rates, cores=16)


GPUS = {"gpus_per_worker": 1}


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"encoder": {"widths": [4, 8, 8, 16]}, "model": {"descriptor_channels": 8, "groups": [16, 4, 2, 1]}},
        {"model": {"kernel_size": 5, "descriptor_size": 5, "decoder_convs": [2, 3, 2, 1]}},
        {"model": {"descriptor_size": 5, "predictor_padding": "valid"}},
        {"model": {"descriptor_size": 4, "predictor_padding": "valid"}},
        {"model": {"architecture": "adain", "decoder_convs": [1, 1, 1, 1]}},
    ],
    ids=["paper", "tiny", "larger kernels", "valid", "fig. 3", "adain"],
)
def test_the_counts_are_the_network_s(sections):
    config = config_of(**sections)
    network = build_network(encoder=VGGEncoder(widths=tuple(config.encoder.widths)), **config.model.model_dump())
    trained = sum(p.numel() for p in network.transfer.parameters())
    biases = sum(p.numel() for name, p in network.transfer.named_parameters() if name.endswith("bias"))
    base = sum(p.numel() for name, p in network.transfer.named_parameters() if "base_" in name)
    assert work.trained_weights(size_of(config)) == trained - biases - base
    frozen = sum(p.numel() for p in network.encoder.parameters())
    assert work.encoder_weights(size_of(config)) == pytest.approx(frozen, rel=0.05)


@pytest.mark.parametrize(
    ("batch", "ranks", "gbit", "computing", "launching", "exchanging", "seconds"),
    [
        (8, 1, 25, 8.7, 0, 0, 8.7),
        (8, 2, 25, 6.0, 0, 0.8, 6.8),
        (8, 3, 25, 5.3, 0, 1.1, 6.4),  # one of three has three pairs; not in the note
        (8, 8, 25, 4.0, 0, 1.4, 5.4),
        (64, 1, 25, 46.7, 0, 0, 46.7),
        (64, 8, 25, 8.7, 0, 1.4, 10.1),
        (256, 1, 25, 177, 0, 0, 177),
        (256, 8, 25, 25.0, 0, 1.4, 26.4),
        (256, 16, 25, 14.2, 0, 142, 156),
        (512, 8, 25, 46.7, 0, 1.4, 48.1),
        (512, 64, 25, 8.7, 0, 149, 158),
        (512, 64, 100, 8.7, 0, 37.4, 46.1),
        (512, 64, 400, 8.7, 0, 9.3, 18.1),
    ],
)
def test_the_tables_of_the_note_are_what_it_reckons(batch, ranks, gbit, computing, launching, exchanging, seconds):
    """docs/design/scaling.md; in milliseconds, to the digits that it has."""
    config = config_of(
        train={"global_batch_size": batch, "precision": "bfloat16"}, hardware={"network_gbit": gbit}, scaling=GPUS
    )
    found = on_h200s(config, ranks)
    terms = (found.computing, found.launching, found.exchanging, found.seconds)
    for term, wanted in zip(terms, (computing, launching, exchanging, seconds), strict=True):
        assert term * 1e3 == pytest.approx(wanted, abs=0.06, rel=0.005)


@pytest.mark.parametrize(
    ("pairs", "precision", "seconds"), [(8, "bfloat16", 8.7), (32, "bfloat16", 25.0), (32, "float32", 72.5)]
)
def test_one_gpu_takes_what_was_measured(pairs, precision, seconds):
    """docs/design/0007-network.md."""
    config = config_of(train={"global_batch_size": pairs, "precision": precision}, scaling=GPUS)
    assert on_h200s(config, 1).seconds * 1e3 == pytest.approx(seconds, rel=0.005)


def test_python_launches_what_is_not_recorded():
    """As training/step.py has it: micro-batches, compiled code, and who forbids it; never on CPUs."""

    def launching(ranks, *, scaling=GPUS, launch_ms=10, **optim):
        return step(config_of(train=optim, scaling=scaling, hardware={"launch_ms": launch_ms}), ranks).launching

    assert launching(1) == launching(1, micro_batch_size=8) == launching(8) == launching(8, scaling={}) == 0
    assert launching(8, compile=True) == launching(1, compile=True) == launching(1, cuda_graph=False) == 0.01
    assert launching(1, micro_batch_size=3) == pytest.approx(0.03)  # 3, 3 and 2 pairs
    assert launching(4, micro_batch_size=1) == pytest.approx(0.02)


def test_decoding_and_fetching_are_shared_by_cores_and_nodes():
    config = config_of(train={"global_batch_size": 64}, data={"cache_gb": 10}, hardware={"decode_per_core": 500})
    assert step(config, 8, cores=16).decoding == pytest.approx(2e-3)
    assert step(config, 8, cores=0).decoding == step(config, 8, cores=1).decoding  # the training process decodes
    fetching = [step(config, n, image_bytes=150e3, dataset_gb=30).fetching for n in (1, 8, 9, 16)]
    assert fetching == pytest.approx([38.4e-3, 38.4e-3, 19.2e-3, 19.2e-3])
    assert step(config, 1, dataset_gb=10).fetching == 0
    for limited in (step(config, 1, cores=1), step(config, 1, image_bytes=1e8)):
        assert limited.seconds == max(limited.decoding, limited.fetching) > limited.computing + limited.exchanging


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
    assert step(config, 1, tflops=1.0).limit == (
        "computing: train.precision bfloat16, train.compile, ranks on more machines"
    )
    on_gpus = config_of(train={"global_batch_size": 8}, scaling=GPUS)
    assert step(on_gpus, 1, tflops=1.0).limit == "computing: train.precision bfloat16, more ranks"
    launched = config_of(train={"global_batch_size": 8, "cuda_graph": False}, scaling=GPUS)
    assert step(launched, 8).limit.startswith("launching kernels: train.cuda_graph")
    slow = config_of(train={"global_batch_size": 64}, hardware={"network_gbit": 1})
    assert step(slow, 64, cores=64).limit.startswith("exchanging gradients")
    assert step(config_of(hardware={"storage_mbyte": 1}, data={"cache_gb": 1}), 1).limit.startswith("fetching")
    assert step(config_of(hardware={"storage_mbyte": 1}, data={"cache_gb": 100}), 1).fetching == 0


def test_micro_batches_need_less_memory():
    whole, single = config_of(), config_of(train={"micro_batch_size": 1})
    assert memory_gib(single, 1) < memory_gib(whole, 1) - 2
    assert memory_gib(whole, 8) == pytest.approx(memory_gib(single, 1))
    assert memory_gib(config_of(train={"micro_batch_size": 4}), 8) == memory_gib(whole, 8)
    assert memory_gib(whole, 3) - memory_gib(whole, 4) == pytest.approx(0.36)  # three pairs rather than two


def test_memory_is_what_the_note_counts():
    """16 bytes a trained weight, 4 a frozen one, 4 more for an average; activations by pixels and precision."""
    half, trained, frozen = 0.5, 59.3e6 / 2**30, 3.5e6 / 2**30
    assert memory_gib(config_of(), 8) == pytest.approx(half + 16 * trained + 4 * frozen + 0.36, rel=2e-3)
    averaged = memory_gib(config_of(train={"ema_decay": 0.999}), 8) - memory_gib(config_of(), 8)
    assert averaged == pytest.approx(4 * trained, rel=0.01)
    coarse = memory_gib(config_of(), 8) - memory_gib(config_of(train={"precision": "bfloat16"}), 8)
    assert coarse == pytest.approx(0.06)
    small = config_of(data={"crop": 128}), config_of(data={"crop": 128}, train={"micro_batch_size": 4})
    assert memory_gib(small[0], 1) - memory_gib(small[1], 1) == pytest.approx(0.36, rel=0.1)  # four quarters


def remote(version, count=3, size=10**8):
    shards = tuple(Shard(f"{n}.tar", 100, size, "0" * 64) for n in range(count))
    return dataclasses.replace(version, root="s3://bucket/data", shards=shards)


def refusals(content, style, **sections):
    """Which of the plan's problems a run has, each by the words that begin it."""
    hardware = {"tflops": 1, "memory_gb": 80, "disk_gb": 1000} | sections.pop("hardware", {})
    try:
        describe(config_of(hardware=hardware, **sections), content, style, ranks=())
    except UsageError as error:
        kinds = ("the content dataset has", "the style dataset has", "the shards that are read", "the cache of shards")
        return [kind for kind in (*kinds, "a rank needs") if kind in str(error)]
    return []


def test_what_just_fits_is_not_refused(content_version, style_version):
    near = dataclasses.replace(content_version, shards=content_version.shards[:3])
    far = remote(content_version), remote(style_version, count=4)
    alone = {"ranks_per_node": 1}
    assert refusals(*far, scaling={"num_workers": 3}, hardware=alone) == []
    assert refusals(*far, scaling={"num_workers": [2, 4]}, hardware=alone) == ["the content dataset has"]
    assert refusals(*far, scaling={"num_workers": [2, 4]}) == []  # of one node, where one fetches for all
    assert refusals(near, style_version, scaling={"num_workers": 4}) == []  # a disk is read by whoever wants
    assert refusals(near, far[1], scaling={"num_workers": 4}) == []
    shards = ["the shards that are read"]  # three of content and four of style, or fewer where blocks are
    for one, other in (far, far[::-1]):
        assert refusals(one, other, data={"cache_gb": 0.71}) == []
        assert refusals(one, other, data={"cache_gb": 0.69}) == shards
        assert refusals(one, other, data={"cache_gb": 0.41, "block_shards": 1, "partitions": 2}) == []
        assert refusals(one, other, data={"cache_gb": 0.39, "block_shards": 1, "partitions": 2}) == shards
    assert refusals(near, far[1], data={"cache_gb": 0.41}) == []
    large = remote(style_version, size=3 * 10**8)
    assert refusals(far[0], large, data={"cache_gb": 1.81}) == []
    assert refusals(far[0], large, data={"cache_gb": 1.7}) == refusals(large, far[0], data={"cache_gb": 1.7}) == shards
    assert refusals(*far, hardware={"disk_gb": 0.71}) == []
    assert refusals(*far, hardware={"disk_gb": 0.69}) == ["the cache of shards"]
    assert refusals(*far, data={"cache_gb": 0.8}, hardware={"disk_gb": 0.75}) == []
    assert refusals(*far, data={"cache_gb": 0.5, "block_shards": 1}, hardware={"disk_gb": 0.5}) == []
    assert refusals(near, far[1], hardware={"disk_gb": 0.41}) == []
    many = {"train": {"global_batch_size": 400}, "scaling": {"gpus_per_worker": 1, "num_workers": 2}}
    assert refusals(near, style_version, **many, hardware={"memory_gb": None}) == []  # 73.4 GiB of 80
    many["train"]["global_batch_size"] = 450
    assert refusals(near, style_version, **many, hardware={"memory_gb": None}) == ["a rank needs"]


def test_this_machine_is_asked_where_nothing_is_given(tmp_path):
    assert plan._free_gb(str(tmp_path / "not" / "yet")) == pytest.approx(
        psutil.disk_usage(tmp_path).free / 1e9, rel=0.1
    )
    assert plan._memory_gib() == pytest.approx(psutil.virtual_memory().total / 2**30, rel=0.01)
    assert 1e-3 < plan.measured_tflops() < 10


def test_the_impossible_is_refused_all_at_once(content_version, style_version):
    config = config_of(
        scaling={"num_workers": 4},
        data={"cache_gb": 0.5},
        hardware={"memory_gb": 1, "disk_gb": 0.1, "tflops": 1, "ranks_per_node": 1},
    )
    with pytest.raises(UsageError) as refused:
        describe(config, remote(content_version), remote(style_version), ranks=())
    message = str(refused.value)
    assert "the content dataset has 3 shards, fewer than the 4 nodes of 4 ranks, 1 a node" in message
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


def test_a_row_reckons_with_what_is_given(content_version, style_version):
    """Images of 1 MB, 16 a step, fetched at 500 MB/s; on a disk computing and exchanging remain."""
    versions = remote(content_version, size=5 * 10**7), remote(style_version, size=15 * 10**7)
    config = config_of(
        hardware={"tflops": 1000, "memory_gb": 80, "disk_gb": 1, "cores_per_rank": 16, "network_gbit": 2400},
        data={"cache_gb": 0.4, "block_shards": 1, "loader_workers": 2},
        scaling={"num_workers": [1, 2]},
    )
    first, second, _, row = describe(config, *versions, ranks=()).splitlines()
    assert "1e+03 TFLOP/s a rank (given), 350 images/s a core x 16, 8 ranks a node" in first
    assert "1910 GFLOP, 237 MB of gradients; a rank needs about 4.3 GiB" in second
    assert row.split(maxsplit=6)[:5] == ["2", "32.0", "ms", "250.0", "85.3"]
    assert "fetching" in row
    on_disk = [dataclasses.replace(version, root="/data") for version in versions]
    assert describe(config, *on_disk, ranks=()).splitlines()[3].split()[:4] == ["2", "1.5", "ms", "5481.9"]
    for given, source in (GPUS, "110 TFLOP/s a rank (an H200's, and 3.3 ms a step)"), ({}, "(measured here)"):
        lines = describe(config_of(scaling=given, hardware={"memory_gb": 80}), *on_disk, ranks=())
        assert source in lines
        assert "images/s a core x 1," in lines
        assert ("25 ms to launch a step that is not recorded" in lines) == (given == GPUS)


def test_ranks_on_one_machine_share_what_it_computes(content_version, style_version, monkeypatch):
    monkeypatch.setattr(plan, "measured_tflops", lambda: 0.25)
    config = config_of(scaling={"num_workers": 3}, hardware={"memory_gb": 80, "ranks_per_node": 4, "network_gbit": 1e6})
    first, *_, three, one, two, four, eight, last = describe(
        config, content_version, style_version, ranks=(1, 2, 4, 8)
    ).splitlines()
    assert "0.25 TFLOP/s a node (measured here)" in first
    assert three.split()[1] == "8596.1"  # three of eight pairs at a third of the rate
    assert one.split()[1] == two.split()[1] == four.split()[1] == "7640.9"
    assert eight.split()[1] == "3820.5"  # on two machines
    assert last.startswith("3 ranks would take longer than one, 8596.1 ms a step against 7640.9, because of computing")


def test_the_identity_loss_is_reckoned_with():
    for architecture, flops, gib in (("adaconv", 1.47, 0.19), ("adain", 1.42, 0.12)):
        without, with_it = (
            config_of(loss={"identity_weight": weight}, model={"architecture": architecture}) for weight in (0, 1)
        )
        assert step(with_it, 1).computing / step(without, 1).computing == pytest.approx(flops, abs=0.01)
        assert memory_gib(with_it, 8) - memory_gib(without, 8) == pytest.approx(gib, abs=0.01)


def test_it_is_said_plainly_where_one_rank_is_faster(content_version, style_version):
    def said(workers, batch, **hardware):
        config = config_of(
            train={"global_batch_size": batch, "precision": "bfloat16"},
            scaling={"num_workers": workers, **GPUS},
            hardware={"cores_per_rank": 32, **hardware},
        )
        lines = describe(config, content_version, style_version, ranks=()).splitlines()
        return lines[-1] if len(lines) > 4 else None

    assert said(1, 8) is said(8, 8) is said(8, 64) is None
    assert said(16, 64) == (
        "16 ranks would take longer than one, 148.4 ms a step against 46.7, because of exchanging gradients: take a "
        "larger global batch or one GPU"
    )


@pytest.mark.parametrize("found", [0, [0, 2], [1, 2, 3], "many"])
def test_what_is_no_number_of_ranks_is_told_in_one_line(found):
    with pytest.raises(ValueError, match=r"expected one number, or the fewest and the most, from 1 on; found") as told:
        config_of(scaling={"num_workers": found})
    assert "1 validation error" in str(told.value)


def test_yes_for_a_number_of_ranks_is_told_as_everywhere():
    with pytest.raises(ValueError, match="YAML reads yes, no, on and off as such"):
        config_of(scaling={"num_workers": True})


def test_losses_of_which_none_counts_are_refused():
    with pytest.raises(ValueError, match="loss: expected one weight above 0, found all of them 0"):
        config_of(loss={"content_weight": 0, "style_weight": 0})


def test_gradients_are_compressed_between_gpus_alone():
    with pytest.raises(ValueError, match=r"gradient_compression \(bfloat16\) needs scaling\.gpus_per_worker above 0"):
        config_of(scaling={"gradient_compression": "bfloat16"})
