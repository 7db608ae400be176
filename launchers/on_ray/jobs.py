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
TOKEN_FILE = "~/.ray/auth_token"
TOKEN_HINT = f"give the head's token in RAY_AUTH_TOKEN or {TOKEN_FILE}"
_UNAUTHORIZED = "Authentication required"  # how Ray's message begins where it got no token
_CHATTY = (  # they report every request
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)


@dataclass(frozen=True)
class Job:
    """A job as `sbf jobs` lists it; times are seconds since 1970, `code` is an exit code."""

    id: str
    run: str
    status: str
    begun: float | None
    ended: float | None
    code: int | None


class Cluster:
    """The job API of the Ray cluster at `address`, an http or https URL.

    `file` is the cluster file that the address was found by. UserError: the cluster cannot be
    reached, or refuses the token.
    """

    def __init__(self, address: str, file: Path | None = None) -> None:
        check_address(address)
        self.address = address.rstrip("/")
        self.name = str(file or self.address)  # as the user calls it
        self._hint = (
            "on the head the dashboard listens at 127.0.0.1:8265: forward it (ray dashboard "
            "cluster.yaml), or give --cluster FILE"
            if file is None
            else f"is Ray running on the head? Start it with ray up {file}"
        )
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if _has_token():
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        with self._errors():
            from ray.job_submission import JobSubmissionClient

            self._client = JobSubmissionClient(self.address)
        for logger in _CHATTY:
            logging.getLogger(logger).setLevel(logging.WARNING)

    def submit(
        self, entrypoint: str, *, folder: Path, job_id: str, run: str, env: Mapping[str, str]
    ) -> None:
        """Send `folder` and run the command line `entrypoint` in it, on the head.

        UserError: the run is at work in another job.
        """
        for job in self.jobs():
            if job.run == run and job.status in AT_WORK:
                raise UserError(
                    f"run {run} is running in job {job.id}: sbf logs {job.id} follows it, sbf "
                    f"stop {job.id} stops it"
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
            raise UserError(f"job {job_id}: does not exist at {self.name}; there are: {known}")
        return found

    def logs(self, job_id: str) -> str:
        """Return what a job has printed so far."""
        self.job(job_id)
        with self._errors():
            return self._client.get_job_logs(job_id)

    def follow(self, job_id: str) -> Iterator[str]:
        """Give what a job prints, as it comes, until it ends.

        UserError: the connection is lost, as it is when the head dies.
        """
        import aiohttp

        self.job(job_id)
        try:
            yield from self._followed(job_id)
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            raise UserError(
                f"cluster {self.name}: the connection to job {job_id} is lost "
                f"({_reason(error)}); if the head is up, the job is still running: sbf logs "
                f"{job_id} --follow; otherwise start the head and submit the run again: it "
                "resumes from its last checkpoint"
            ) from error

    def _followed(self, job_id: str) -> Iterator[str]:
        with asyncio.Runner() as runner:
            lines = self._client.tail_job_logs(job_id)
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
            what = "requires a token" if _UNAUTHORIZED in str(error) else "refuses the token"
            raise UserError(f"cluster {self.name}: {what}; {TOKEN_HINT}") from error
        except (ConnectionError, requests.exceptions.RequestException) as error:
            raise UserError(
                f"cluster {self.name}: cannot be reached ({_reason(error)}); {self._hint}"
            ) from error
        except RuntimeError as error:
            raise UserError(f"cluster {self.name}: {_reason(error)}") from error


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


def _has_token() -> bool:
    """Whether Ray finds a token here once it looks for one."""
    given = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(given) or Path(TOKEN_FILE).expanduser().is_file()


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
        code=found.driver_exit_code,
    )


def _reason(error: Exception) -> str:
    """Return the first line of an error, without the parts that a user cannot read."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
