"""Jobs on a Ray cluster: submitted, listed, followed and stopped through its job API."""

import asyncio
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from sbf_dist.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

RUN = "sbf.run"  # the key of a job's metadata that names the run
AT_WORK = ("PENDING", "RUNNING")
TOKEN_HINT = "give the head's token: RAY_AUTH_MODE=token with RAY_AUTH_TOKEN or ~/.ray/auth_token"


@dataclass(frozen=True)
class Job:
    """A job as `sbf jobs` lists it; times are seconds since 1970."""

    id: str
    run: str
    status: str
    begun: float | None
    ended: float | None
    message: str


class Cluster:
    """The job API of the Ray cluster at `address`, an http or https URL.

    UserError: it cannot be reached, or refuses the token.
    """

    def __init__(self, address: str) -> None:
        check_address(address)
        self.address = address.rstrip("/")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        with self._errors():
            from ray.job_submission import JobSubmissionClient

            self._client = JobSubmissionClient(self.address)
        for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.WARNING)  # they report every request

    def submit(
        self, entrypoint: str, *, folder: Path, job_id: str, run: str, env: Mapping[str, str]
    ) -> None:
        """Send `folder` and run the command line `entrypoint` in it, on the head.

        UserError: the run is at work in another job.
        """
        for job in self.jobs():
            if job.run == run and job.status in AT_WORK:
                raise UserError(
                    f"run {run} is at work in job {job.id}: sbf logs {job.id} follows it, "
                    f"sbf stop {job.id} ends it"
                )
        with self._errors():
            self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=job_id,
                metadata={RUN: run},
                runtime_env={"working_dir": str(folder), "env_vars": dict(env)},
            )

    def jobs(self) -> list[Job]:
        """Return the jobs that were submitted, the newest first."""
        with self._errors():
            found = [_job(one) for one in self._client.list_jobs() if one.submission_id]
        return sorted(found, key=lambda job: -(job.begun or 0))

    def job(self, job_id: str) -> Job:
        """Return one job. UserError: there is none of this id."""
        jobs = self.jobs()
        found = next((job for job in jobs if job.id == job_id), None)
        if found is None:
            known = ", ".join(job.id for job in jobs[:8]) or "none"
            raise UserError(f"job {job_id}: does not exist at {self.address}; there are: {known}")
        return found

    def logs(self, job_id: str) -> str:
        """Return what a job has printed so far."""
        self.job(job_id)
        with self._errors():
            return self._client.get_job_logs(job_id)

    def follow(self, job_id: str) -> Iterator[str]:
        """Give what a job prints, as it comes, until it ends."""
        self.job(job_id)
        with self._errors():
            lines = self._client.tail_job_logs(job_id)
            with asyncio.Runner() as runner:
                while True:
                    try:
                        yield runner.run(_next(lines))
                    except StopAsyncIteration:
                        return

    def stop(self, job_id: str) -> bool:
        """Ask a job to end; False if it has ended already."""
        if self.job(job_id).status not in AT_WORK:
            return False
        with self._errors():
            return bool(self._client.stop_job(job_id))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what goes wrong on the way to the cluster into the user's error."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise UserError(
                f"cluster {self.address}: refuses the token, or wants one; {TOKEN_HINT}"
            ) from error
        except (ConnectionError, requests.exceptions.RequestException) as error:
            raise UserError(
                f"cluster {self.address}: cannot be reached ({_reason(error)}); on the head the "
                "dashboard listens at 127.0.0.1:8265: forward it (ray dashboard cluster.yaml), or "
                "give --cluster FILE"
            ) from error
        except RuntimeError as error:
            raise UserError(f"cluster {self.address}: {_reason(error)}") from error


def check_address(address: str) -> None:
    """UserError unless `address` is an http or https URL of a host."""
    try:
        parts = urlsplit(address)
        complete = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port
    except ValueError:
        complete = False
    if not complete:
        raise UserError(
            f"address {address!r}: must be the URL of a dashboard, e.g. http://127.0.0.1:8265"
        )


async def _next(lines: "object") -> str:
    return await lines.__anext__()  # type: ignore[attr-defined]


def _job(found: "JobDetails") -> Job:
    def seconds(time: int | None) -> float | None:
        return None if time is None else time / 1000

    return Job(
        id=found.submission_id or "",
        run=(found.metadata or {}).get(RUN, ""),
        status=str(getattr(found.status, "value", found.status)),
        begun=seconds(found.start_time),
        ended=seconds(found.end_time),
        message=found.message or "",
    )


def _reason(error: Exception) -> str:
    """Return the first line of an error, without the parts that a user cannot read."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
