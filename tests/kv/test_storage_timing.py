"""The timing model against sums that can be done by hand."""

from __future__ import annotations

import dataclasses

import pytest

from memwall.kv import storage_timing as timing
from memwall.kv.storage_timing import DENSE, DriveModel, Flash, GpuModel, Job, Reading

DRIVE, GPU, JOB = DriveModel(), GpuModel(), Job()


def test_one_page_takes_a_read_a_transfer_and_the_filter() -> None:
    drive = dataclasses.replace(DRIVE, planes=1)
    expected = drive.read_seconds + 4096 / drive.bus_bytes_per_s + 4096 / drive.filter_bytes_per_s
    assert Flash(drive).read(1, 0.0) == pytest.approx(expected)
    assert Flash(drive).read(1, 1.0) == pytest.approx(1 + expected)


def test_two_reads_of_one_die_follow_each_other() -> None:
    drive = dataclasses.replace(DRIVE, channels=1, dies=1, planes=1)
    step = 4096 / drive.bus_bytes_per_s
    assert Flash(drive).read(2, 0.0) == pytest.approx(2 * (drive.read_seconds + step) + 4096 / drive.filter_bytes_per_s)


def test_many_dies_fill_the_bus_and_few_do_not() -> None:
    pages = 20_000
    for dies, planes, limit in ((16, 4, DRIVE.flash_bytes_per_s), (1, 1, 8 * 4096 / (50e-6 + 4096 / 1.4e9))):
        drive = dataclasses.replace(DRIVE, dies=dies, planes=planes)
        rate = pages * 4096 / Flash(drive).read(pages, 0.0)
        assert rate == pytest.approx(limit, rel=0.02)


def test_dense_attention_runs_at_the_flash_rate_unless_the_engine_is_slower() -> None:
    task_bytes = 2 * 1536 * 128 * 2
    rate = task_bytes / timing.task_seconds(DRIVE, JOB, DENSE, 1536)
    assert rate == pytest.approx(DRIVE.flash_bytes_per_s, rel=0.02)
    slow = dataclasses.replace(DRIVE, engine_flop_per_s=2e9)
    # half an operation for each byte: the other half is the first engine's
    assert task_bytes / timing.task_seconds(slow, JOB, DENSE, 1536) == pytest.approx(4e9, rel=0.05)


def test_reading_less_takes_less_down_to_the_other_stages() -> None:
    shares = [Reading(token_share=t, channel_share=c) for t, c in ((0.8, 0.4), (0.4, 0.2), (0.2, 0.1))]
    seconds = [timing.task_seconds(DRIVE, JOB, reading, 2048) for reading in shares]
    assert seconds[0] > seconds[1] > seconds[2]
    assert Reading(token_share=0.4, channel_share=0.2).share == pytest.approx(0.5)


def test_steps_add_up() -> None:
    step = timing.in_storage_step(DRIVE, GPU, JOB)
    # q, k, v down and the output up, 16-bit
    assert step.link_seconds == pytest.approx(40 * 64 * 4 * 5120 * 2 / 7e9)
    assert step.gpu_seconds == pytest.approx(26e9 / 768e9 / 0.5)
    fetched = timing.fetching_step(7e9, GPU, JOB)
    assert fetched.link_seconds == pytest.approx(40 * 64 * 1536 * 2 * 5120 * 2 / 7e9)
    assert fetched.seconds == max(fetched.gpu_seconds, fetched.link_seconds)


def test_drives_share_the_gpus_link() -> None:
    many = timing.in_storage_step(DRIVE, GPU, JOB, drives=20)
    assert many.link_seconds == pytest.approx(40 * 64 * 4 * 5120 * 2 / 32e9)


def test_shipping_is_hidden_up_to_the_last_layer() -> None:
    quick_link = dataclasses.replace(DRIVE, link_bytes_per_s=7e12, program_seconds=0.0)
    fast = dataclasses.replace(GPU, link_bytes_per_s=1e15)
    alone = timing.prefill_seconds(quick_link, fast, JOB, overlap=False)
    assert timing.prefill_seconds(quick_link, fast, JOB) == pytest.approx(alone, rel=0.01)
    assert timing.prefill_seconds(DRIVE, GPU, JOB) < timing.prefill_seconds(DRIVE, GPU, JOB, overlap=False)


def test_wear_counts_keys_twice() -> None:
    job = Job(layers=1, heads=1, batch=1, input_tokens=1000, output_tokens=48)
    worn = timing.wear(DRIVE, job, 10**12, group=16, span=512, block_bytes=1 << 20)
    assert worn.written_bytes == 256 * (2 * 1040 + 1024)
    assert worn.erased_blocks == 1
