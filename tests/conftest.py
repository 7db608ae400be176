import os
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadFileScheduling

# How long an example takes says nothing: machines are busy.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

ROOT = Path(__file__).parents[1]
LAUNCHERS = "tests/launchers/"
CLUSTER = "tests/launchers/test_cluster_onprem.py"  # on hosts of its own, and mostly waits


@cache
def _starts_ray(file: str) -> bool:
    """Whether a file has tests of the launchers that start the whole system, by their mark."""
    return file.startswith(LAUNCHERS) and "mark.slow" in (ROOT / file).read_text()


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def pytest_collection_modifyitems(items):
    """Begin with what takes longest."""
    items.sort(key=lambda item: not _starts_ray(_file(item.nodeid)))


@cache
def _give_way() -> None:
    """Let processes that start Ray go before this one, whose tests wait for nothing."""
    os.nice(10)


def pytest_runtest_setup(item):
    """Begin to give way with the first test that does not start Ray."""
    if not _starts_ray(_file(item.nodeid)):
        _give_way()


class _Apart(LoadFileScheduling):
    """The files that start Ray one after another, as it takes the whole machine.

    Beside them the others and the cluster's, file by file, by whichever process is free.
    """

    def _split_scope(self, nodeid):
        file = _file(nodeid)
        return LAUNCHERS if _starts_ray(file) and file != CLUSTER else file


def pytest_xdist_make_scheduler(config, log):
    """Share the tests out to the processes of pytest-xdist, in the order of their collection."""
    config.option.loadscopereorder = False
    return _Apart(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skip a test that times layers where the planner finds the machine too busy for it."""
    from sbf_dist.compression.planning.latency import MachineBusyError

    try:
        return (yield)
    except MachineBusyError as busy:
        pytest.skip(str(busy))


@pytest.fixture(scope="session")
def s3_of_all_tests():
    from s3_double import s3_server

    with s3_server() as double:
        yield double


@pytest.fixture
def s3(s3_of_all_tests, monkeypatch):
    """A bucket of a local S3 server, empty, and the environment of this process led to it."""
    from s3_double import BUCKET

    client = s3_of_all_tests.client()
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        for item in page.get("Contents", ()):
            client.delete_object(Bucket=BUCKET, Key=item["Key"])
    for name, value in s3_of_all_tests.environment.items():
        monkeypatch.setenv(name, value)
    return s3_of_all_tests


@pytest.fixture
def faulty_s3(s3, monkeypatch):
    """As s3, by a server that refuses and drops requests on demand; gives its faults."""
    from faulty_store import faulty_server

    with faulty_server() as (address, faults):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        yield faults
