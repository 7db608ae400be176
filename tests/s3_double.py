"""A local S3 server, and what the environment must say so that clients use it."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "test-bucket"


@dataclass(frozen=True)
class S3Double:
    """The address of a bucket, and the variables that lead any client to it."""

    bucket: str
    environment: dict[str, str]

    def client(self):
        """Return boto3's client for it."""
        return boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            region_name=self.environment["AWS_REGION"],
        )


@contextmanager
def s3_server() -> Iterator[S3Double]:
    """Run a server with an empty bucket, in a thread of this process, on the loopback address."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with redirect_stdout(io.StringIO()):
        server.start()
    try:
        host, port = server.get_host_and_port()
        double = S3Double(
            f"s3://{BUCKET}",
            {
                "AWS_ENDPOINT_URL": f"http://{host}:{port}",
                "AWS_ACCESS_KEY_ID": "testing",
                "AWS_SECRET_ACCESS_KEY": "testing",
                "AWS_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
            },
        )
        double.client().create_bucket(Bucket=BUCKET)
        yield double
    finally:
        server.stop()
