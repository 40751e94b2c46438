"""A test double of S3, as none can be had here: moto's server, a process of its own on the loopback."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@contextlib.contextmanager
def s3(bucket: str = "bucket") -> Iterator[str]:
    """An address of a new bucket, of the kind s3://BUCKET?...; KEYS must be in the environment."""
    import boto3
    from botocore.exceptions import EndpointConnectionError

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **KEYS})
    try:
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
        for attempt in range(60):
            try:
                client.create_bucket(Bucket=bucket)
                break
            except EndpointConnectionError:
                assert attempt < 59, "moto's server does not answer"
                time.sleep(0.5)
        yield f"s3://{bucket}?endpoint_override=127.0.0.1:{port}&scheme=http"
    finally:
        process.terminate()
        process.wait(timeout=30)
