"""launchers/kuberay-rayjob.yaml against KubeRay's schema, and the image that it names."""

import copy
import gzip
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from openapi_schema_validator import OAS30Validator

ROOT = Path(__file__).parents[2]
SCHEMA = Path(__file__).with_name("data") / "kuberay-rayjob-v1.7.0.json.gz"
DOCKERFILE = ROOT / "launchers" / "Dockerfile"


@pytest.fixture(scope="module")
def documents() -> dict[str, Any]:
    found = yaml.safe_load_all((ROOT / "launchers" / "kuberay-rayjob.yaml").read_text())
    return {document["kind"]: document for document in found}


@pytest.fixture(scope="module")
def spec(documents) -> dict[str, Any]:
    return documents["RayJob"]["spec"]


def pods(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The specifications of all pods of a job, by what they are for."""
    cluster = spec["rayClusterSpec"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {
        "submitter": spec["submitterPodTemplate"]["spec"],
        "head": cluster["headGroupSpec"]["template"]["spec"],
        **{name: group["template"]["spec"] for name, group in groups.items()},
    }


def schema() -> dict[str, Any]:
    """KubeRay's schema, in which what it does not know is an error, as for `kubectl apply`."""
    whole = json.loads(gzip.decompress(SCHEMA.read_bytes()))
    _refuse_unknown(whole)
    return whole


def _refuse_unknown(node: Any) -> None:
    if isinstance(node, dict):
        if "properties" in node and not node.get("x-kubernetes-preserve-unknown-fields"):
            node.setdefault("additionalProperties", False)
        for value in node.values():
            _refuse_unknown(value)
    elif isinstance(node, list):
        for value in node:
            _refuse_unknown(value)


def errors(job: dict[str, Any]) -> list[str]:
    found = OAS30Validator(schema()).iter_errors(job)
    return [f"{error.json_path}: {error.message}" for error in found]


def test_the_job_satisfies_kuberays_schema(documents):
    assert errors(documents["RayJob"]) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "backoffLimits"), 3),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "tokens"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "replicas"), "two"),
    ],
)
def test_the_schema_refuses_what_is_written_wrong(documents, path, value):
    wrong = copy.deepcopy(documents["RayJob"])
    place = wrong
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (found,) = errors(wrong)
    assert str(path[-1]) in found or str(value) in found


def test_kuberay_makes_a_token_and_the_manifest_holds_no_secret(documents, spec):
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    # Below 2.52 KubeRay would refuse it; it must be the version in the image.
    assert cluster["rayVersion"] == version("ray")
    text = yaml.safe_dump_all(documents.values())
    assert not re.search(r"AWS_|SECRET|PASSWORD|auth_token", text)


def test_all_pods_satisfy_the_restricted_pod_security_that_the_namespace_asks_for(documents, spec):
    labels = documents["Namespace"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for name, pod in pods(spec).items():
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod), name
        assert all(set(volume) <= {"name", "emptyDir"} for volume in pod.get("volumes", []))
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    account = documents["ServiceAccount"]
    assert account["automountServiceAccountToken"] is False
    assert {pod["serviceAccountName"] for pod in pods(spec).values()} == {
        account["metadata"]["name"]
    }


def test_rays_ports_are_open_to_the_namespace_and_to_kuberay_only(documents):
    policy = documents["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    assert policy["podSelector"]["matchLabels"] == {"ray.io/is-ray-node": "yes"}
    own, operator = policy["ingress"]
    assert own == {"from": [{"podSelector": {}}]}
    ((sender,), ports) = operator["from"], operator["ports"]
    assert sender["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "kuberay-operator"}
    assert ports == [{"port": 8265}]
    namespaces = {document["metadata"].get("namespace") for document in documents.values()}
    assert namespaces == {None, documents["Namespace"]["metadata"]["name"]}


def test_the_workers_have_the_gpus_and_cpus_that_the_run_asks_for(spec):
    command = spec["entrypoint"].split()
    recipe = yaml.safe_load((ROOT / command[2].removeprefix("/opt/sbf-dist/")).read_text())
    given = dict(word.split("=", 1) for word in command if "=" in word)
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert group["minReplicas"] == group["maxReplicas"] == group["replicas"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus = int(limits["nvidia.com/gpu"])
    assert int(given["workers.count"]) == gpus * group["replicas"]
    assert recipe["workers"]["cpus"] * gpus <= int(limits["cpu"])
    (cache,) = group["template"]["spec"]["volumes"]
    assert float(given["data.cache_gb"]) < int(cache["emptyDir"]["sizeLimit"].removesuffix("Gi"))
    assert given["data.cache_dir"] == "/cache"


def test_the_image_is_built_from_what_is_there_and_runs_as_nobodys_root(spec):
    lines = DOCKERFILE.read_text().splitlines()
    base = next(line.split()[1] for line in lines if line.startswith("FROM "))
    cuda = version("cuda-toolkit").partition(".")[0]  # that of the locked PyTorch
    assert re.fullmatch(rf"nvidia/cuda:{cuda}\.\d+\.\d+-devel-[a-z0-9]+", base)
    sent = set(DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines())
    for line in lines:
        if line.startswith("COPY "):
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), line
                assert f"!{source.partition('/')[0]}" in sent, line
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    images = {container["image"] for pod in pods(spec).values() for container in pod["containers"]}
    assert len(images) == 1
    assert users == [str(pods(spec)["head"]["securityContext"]["runAsUser"])]
