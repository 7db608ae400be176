"""cluster.yaml and launchers/aws.yaml, deployed to doubles of AWS's services on this machine."""

import ast
import json
import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import cfnlint.decode
import pytest
import yaml
from botocore.exceptions import ClientError
from cfnlint.api import lint
from moto.server import ThreadedMotoServer
from ray.autoscaler._private.aws import utils as cached_clients
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.v2.instance_manager.config import FileConfigReader
from ray.autoscaler.v2.instance_manager.node_provider import NodeProviderAdapter

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster.yaml"
TEMPLATE = ROOT / "launchers" / "aws.yaml"
ADDRESS = "203.0.113.7/32"
REGION = "us-east-1"
NAME = "sbf-dist"
# It is checked without the double.
pytestmark = pytest.mark.filterwarnings("ignore:Tried to parse AWS..S3..BucketPolicy")

# Of the images that AWS publishes names of, the double has the one without a GPU's driver only.
IMAGE = "/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-x86_64"
GPU_IMAGE = (
    "/aws/service/deeplearning/ami/x86_64/"
    "base-oss-nvidia-driver-gpu-amazon-linux-2023/latest/ami-id"
)
# What Ray runs on machines that are not there: what is copied lands in $COPIES by its target.
PROGRAMS = {
    "ssh": 'printf "%s\\n" "${*: -1}" >> "$COPIES/commands"',
    "rsync": """
        target=${*: -1}; target=${target#*:}; source=${*: -2:1}
        mkdir -p "$COPIES/${target%/*}"
        if [ -f "$source" ]; then cp -p "$source" "$COPIES/$target"; fi
    """,
}


class Account:
    """An AWS account that is a server on this machine's loopback address."""

    def __init__(self, home: Path, port: int) -> None:
        self.home = home
        self.copies = home / "copies"
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_CONFIG_FILE": "/nonexistent",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
            "AWS_EC2_METADATA_DISABLED": "true",
            "COPIES": str(self.copies),
            "HOME": str(home),
            "TMPDIR": str(home),  # where Ray keeps what it has looked up
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
        }
        self.copies.mkdir()
        (home / "bin").mkdir()
        for name, program in PROGRAMS.items():
            file = home / "bin" / name
            file.write_text(f"#!/bin/bash\n{program}\n")
            file.chmod(0o755)
        (home / ".ray").mkdir(mode=0o700)
        (home / ".ray" / "auth_token").write_text("0123456789abcdef" * 4)
        (home / ".ray" / "auth_token").chmod(0o600)

    def client(self, service: str) -> Any:
        return boto3.client(service)

    def ray(self, *arguments: str) -> str:
        """Run Ray's command line in the checkout, as the user does, and return what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", *arguments],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def instances(self) -> list[dict[str, Any]]:
        found = self.client("ec2").describe_instances()["Reservations"]
        return [instance for one in found for instance in one["Instances"]]


@pytest.fixture(scope="module")
def account(tmp_path_factory) -> Iterator[Account]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        made = Account(tmp_path_factory.mktemp("account"), server.get_host_and_port()[1])
        for name in os.environ:
            if name.startswith("AWS_"):
                patch.delenv(name)
        for name, value in made.environment.items():
            if name.startswith("AWS_"):
                patch.setenv(name, value)
        _forget_clients()
        yield made
    _forget_clients()
    server.stop()


def _forget_clients() -> None:
    """Clients are kept with the address that they were made for."""
    boto3.DEFAULT_SESSION = None
    cached_clients.resource_cache.cache_clear()
    cached_clients.client_cache.cache_clear()


@pytest.fixture(scope="module")
def stack(account) -> dict[str, str]:
    """The deployed stack's outputs."""
    formation = account.client("cloudformation")
    text = TEMPLATE.read_text()
    assert text.count(GPU_IMAGE) == 1
    formation.create_stack(
        StackName=NAME,
        TemplateBody=text.replace(GPU_IMAGE, IMAGE),
        Capabilities=["CAPABILITY_IAM"],
        Parameters=[{"ParameterKey": "Address", "ParameterValue": ADDRESS}],
    )
    (made,) = formation.describe_stacks(StackName=NAME)["Stacks"]
    assert made["StackStatus"] == "CREATE_COMPLETE"
    return {output["OutputKey"]: output["OutputValue"] for output in made["Outputs"]}


@pytest.fixture(scope="module")
def bootstrapped(account, stack) -> dict[str, Any]:
    """The configuration that `ray up` has brought to the head, once it has started it."""
    account.ray("up", "-y", "cluster.yaml")
    return json.loads((account.copies / "~" / "ray_bootstrap_config.yaml").read_text())


def template() -> dict[str, Any]:
    return cfnlint.decode.decode(str(TEMPLATE))[0]


def head_policy(account: Account) -> list[dict[str, Any]]:
    """What the head's role allows beside the bucket."""
    iam = account.client("iam")
    head = next(one for one in iam.list_roles()["Roles"] if "HeadRole" in one["RoleName"])
    policy = iam.get_role_policy(RoleName=head["RoleName"], PolicyName="autoscaler")
    # The double keeps it as Python writes it.
    return ast.literal_eval(policy["PolicyDocument"])["Statement"]


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def tags(instance: dict[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in instance["Tags"]}


def test_without_the_stack_ray_starts_nothing_and_opens_nothing(account):
    config = prepare_config(yaml.safe_load(CLUSTER.read_text()))
    with pytest.raises(ClientError, match="template name sbf-dist-worker, does not exist"):
        bootstrap_aws(config)
    assert account.instances() == []
    groups = account.client("ec2").describe_security_groups()["SecurityGroups"]
    assert [group["GroupName"] for group in groups] == ["default"]
    assert account.client("iam").list_roles()["Roles"] == []


def test_the_template_satisfies_cloudformations_rules():
    assert lint(TEMPLATE.read_text()) == []
    assert lint(TEMPLATE.read_text().replace("CidrIp:", "Cidr:")) != []


@pytest.mark.parametrize(
    ("address", "taken"),
    [
        (ADDRESS, True),
        ("203.0.0.0/16", True),
        ("0.0.0.0/0", False),
        ("203.0.0.0/8", False),
        ("203.0.113.7", False),
    ],
)
def test_ssh_cannot_be_opened_to_the_world(address, taken):
    rule = template()["Parameters"]["Address"]
    assert bool(re.fullmatch(rule["AllowedPattern"], address)) is taken


def test_the_group_admits_ssh_from_one_address_and_its_own_members(account, bootstrapped, stack):
    groups = account.client("ec2").describe_security_groups()["SecurityGroups"]
    by_id = {group["GroupId"]: group for group in groups}
    assert {group["GroupName"] for group in groups} - {"default"} == {
        by_id[stack["Group"]]["GroupName"]  # Ray has made none of its own
    }
    among, ssh = sorted(by_id[stack["Group"]]["IpPermissions"], key=lambda rule: rule["IpProtocol"])
    assert (ssh["IpProtocol"], ssh["FromPort"], ssh["ToPort"]) == ("tcp", 22, 22)
    assert [one["CidrIp"] for one in ssh["IpRanges"]] == [ADDRESS]
    assert ssh["Ipv6Ranges"] == ssh["UserIdGroupPairs"] == ssh["PrefixListIds"] == []
    assert among["IpProtocol"] == "-1"
    assert [one["GroupId"] for one in among["UserIdGroupPairs"]] == [stack["Group"]]
    assert among["IpRanges"] == among["Ipv6Ranges"] == among["PrefixListIds"] == []


def test_the_bucket_is_private_encrypted_and_read_by_tls_alone(account, stack):
    assert stack["Bucket"] == f"{NAME}-123456789012-{REGION}"
    encryption = account.client("s3").get_bucket_encryption(Bucket=stack["Bucket"])
    (rule,) = encryption["ServerSideEncryptionConfiguration"]["Rules"]
    assert rule["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "AES256"
    # The double keeps neither of these; cfn-lint knows their names and values.
    resources = template()["Resources"]
    assert resources["Bucket"]["Properties"]["PublicAccessBlockConfiguration"] == dict.fromkeys(
        ("BlockPublicAcls", "BlockPublicPolicy", "IgnorePublicAcls", "RestrictPublicBuckets"), True
    )
    (deny,) = resources["BucketPolicy"]["Properties"]["PolicyDocument"]["Statement"]
    assert (deny["Effect"], deny["Principal"], deny["Action"]) == ("Deny", "*", "s3:*")
    assert deny["Resource"] == [
        {"Fn::GetAtt": ["Bucket", "Arn"]},
        {"Fn::Sub": "${Bucket.Arn}/*"},
    ]
    assert deny["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}


def test_the_roles_reach_one_bucket_and_only_the_head_starts_machines(account, bootstrapped, stack):
    iam = account.client("iam")
    roles = {role["RoleName"]: role for role in iam.list_roles()["Roles"]}
    head = next(name for name in roles if "HeadRole" in name)
    worker = next(name for name in roles if "WorkerRole" in name)
    assert set(roles) == {head, worker}  # Ray has made none of its own
    bucket = f"arn:aws:s3:::{stack['Bucket']}"
    for role in (head, worker):
        (attached,) = iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"]
        arn = attached["PolicyArn"]
        version = iam.get_policy(PolicyArn=arn)["Policy"]["DefaultVersionId"]
        policy = iam.get_policy_version(PolicyArn=arn, VersionId=version)["PolicyVersion"]
        for statement in policy["Document"]["Statement"]:
            assert statement["Resource"] in (bucket, f"{bucket}/*")
            assert all(re.fullmatch(r"s3:[A-Za-z]+", action) for action in statement["Action"])
    assert iam.list_role_policies(RoleName=worker)["PolicyNames"] == []
    for statement in head_policy(account):
        actions = listed(statement["Action"])
        assert not any("*" in action for action in actions)
        if statement["Resource"] == "*":
            assert actions == ["ec2:DescribeInstances"]
        if statement["Sid"] == "GiveWorkersTheirRole":
            assert statement["Resource"] == roles[worker]["Arn"]


def test_the_head_is_as_it_must_be(account, bootstrapped, stack):
    (head,) = (one for one in account.instances() if tags(one)["ray-node-type"] == "head")
    assert head["InstanceType"] == "m7i.2xlarge"
    assert tags(head)["ray-cluster-name"] == NAME
    assert "HeadProfile" in head["IamInstanceProfile"]["Arn"]
    _check_node(account, head, stack)


def test_ray_up_brings_the_sources_and_the_token_and_binds_everything_to_loopback(
    account, bootstrapped
):
    token = account.copies / "~" / ".ray" / "auth_token"
    assert token.read_text() == (account.home / ".ray" / "auth_token").read_text()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    for name in ("csrc", "sbf_dist", "setup.py", "Makefile", "requirements.lock"):
        assert (account.copies / "~" / "sbf-dist" / name).exists()
    run = (account.copies / "commands").read_text()
    order = ["setup.sh", "mlflow_server.sh", "ray stop", "ray start --head"]
    positions = [run.index(part) for part in order]
    assert positions == sorted(positions)
    assert "--dashboard-host=127.0.0.1" in run
    assert "0.0.0.0" not in run
    # The key that the head reaches workers with is one that Ray has made for this cluster alone.
    (pair,) = account.client("ec2").describe_key_pairs()["KeyPairs"]
    assert pair["KeyName"] == NAME
    key = account.home / ".ssh" / f"{NAME}.pem"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_the_autoscaler_starts_spot_workers_and_ray_down_terminates_all(
    account, bootstrapped, stack, monkeypatch, tmp_path
):
    monkeypatch.setenv("HOME", str(account.copies / "~"))  # that of the head
    file = tmp_path / "ray_bootstrap_config.yaml"  # as the head's autoscaler reads it
    file.write_text(json.dumps(bootstrapped))
    ec2 = _get_node_provider(bootstrapped["provider"], NAME)
    called = set()
    for client in (ec2.ec2.meta.client, ec2.ec2_fail_fast.meta.client):
        client.meta.events.register("before-call", lambda model, **_: called.add(model.name))
    provider = NodeProviderAdapter(ec2, FileConfigReader(str(file)))
    provider.launch({"g6": 1, "p5": 1}, request_id="1")
    _wait_for(account, provider, "pending running", 3)  # and the head
    workers = [one for one in account.instances() if tags(one)["ray-node-type"] == "worker"]
    assert sorted(one["InstanceType"] for one in workers) == ["g6.12xlarge", "p5.48xlarge"]
    for worker in workers:
        assert worker["InstanceLifecycle"] == "spot"
        assert tags(worker)["ray-cluster-name"] == NAME
        assert "WorkerProfile" in worker["IamInstanceProfile"]["Arn"]
        _check_node(account, worker, stack)
    assert len(provider.get_non_terminated()) == 3
    # As the head does while it sets a worker up, and when it is idle.
    ec2.set_node_tags(workers[0]["InstanceId"], {"ray-node-status": "up-to-date"})
    provider.terminate([workers[0]["InstanceId"]], request_id="2")
    _wait_for(account, provider, "terminated", 1)
    # Its role allows what it has called, and nothing that it has not.
    allowed = {action for one in head_policy(account) for action in listed(one["Action"])}
    assert {f"ec2:{name}" for name in called} == {
        action for action in allowed if action.startswith("ec2:")
    }
    account.ray("down", "-y", "cluster.yaml")
    assert {one["State"]["Name"] for one in account.instances()} == {"terminated"}


def _wait_for(account: Account, provider: NodeProviderAdapter, states: str, count: int) -> None:
    deadline = time.monotonic() + 240
    while sum(one["State"]["Name"] in states for one in account.instances()) != count:
        errors = [error.__cause__ for error in provider.poll_errors()]
        assert not errors
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_workers_cost_nothing_until_a_run_asks_for_them(bootstrapped):
    types = bootstrapped["available_node_types"]
    assert all(one["min_workers"] == 0 for one in types.values())
    assert [name for name, one in types.items() if one["max_workers"]] == ["g6"]
    assert bootstrapped["provider"]["cache_stopped_nodes"] is False
    # Ray has asked AWS what the machines have: the file must not say anything else.
    assert (
        types["g6"]["resources"].items() >= {"CPU": 48, "GPU": 4, "accelerator_type:L4": 1}.items()
    )
    assert types["p5"]["resources"].items() >= {"CPU": 192, "GPU": 8}.items()


def _check_node(account: Account, instance: dict[str, Any], stack: dict[str, str]) -> None:
    assert [group["GroupId"] for group in instance["SecurityGroups"]] == [stack["Group"]]
    assert instance["KeyName"] == NAME
    assert instance["MetadataOptions"]["HttpTokens"] == "required"
    assert instance["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
    (disk,) = instance["BlockDeviceMappings"]
    assert disk["DeviceName"] == "/dev/xvda"
    assert disk["Ebs"]["DeleteOnTermination"]
    (volume,) = account.client("ec2").describe_volumes(VolumeIds=[disk["Ebs"]["VolumeId"]])[
        "Volumes"
    ]
    assert volume["Encrypted"]
    assert volume["VolumeType"] == "gp3"
