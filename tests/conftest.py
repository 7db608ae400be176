from pathlib import Path

import pytest

LAUNCHERS = Path(__file__).parent / "launchers"


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups here
def pytest_collection_modifyitems(items):
    """Keep tests together that pytest-xdist's processes must not run beside each other.

    Those of the launchers start Ray, which takes the whole machine. The others share fixtures with
    the tests of their file.
    """
    for item in items:
        alone = item.path.is_relative_to(LAUNCHERS)
        item.add_marker(pytest.mark.xdist_group("launchers" if alone else str(item.path)))


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
