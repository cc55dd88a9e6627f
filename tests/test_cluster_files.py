"""The files that start a cluster, held against what reads them, as far as that goes without it.

`aws.yaml` goes through Ray's own validator. The KubeRay manifests are held against a schema of the
fields that they use, written by the types of its ray.io/v1 (1.6) and of Kubernetes' pods; a field
that is not in it is taken for a slip. The compose file is held against a schema of that kind, too.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from gbp_ray.config.job import load_job

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "cluster"
MANIFESTS = [CLUSTER / "kuberay-job.yaml", CLUSTER / "kuberay-cluster.yaml"]
RAY, TORCH, VISION = "2.60.0", "2.13.0", "0.28.0"


def read_all(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def only(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def listing(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
FLAG: dict[str, Any] = {"type": "boolean"}
LABELS: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "string"}}


@pytest.mark.parametrize("name", ["llm_gradients.toml", "llm_weights.toml"])
def test_jobs_of_language_models_are_for_eight_gpus_in_shards(name: str) -> None:
    job = load_job(CLUSTER / name)
    cluster = job.cluster
    assert (cluster.num_workers, cluster.strategy, cluster.use_gpu) == (8, "fsdp", True)


def test_every_file_says_what_it_costs_and_how_to_start_follow_and_end_it() -> None:
    files = [path for path in CLUSTER.iterdir() if path.suffix == ".yaml" or path.suffix == ""]
    assert {path.name for path in files} == {
        "Dockerfile",
        "aws.yaml",
        "compose.yaml",
        "kuberay-cluster.yaml",
        "kuberay-job.yaml",
    }
    for path in files:
        text = path.read_text()
        assert text.startswith("# "), path.name
        opening = text[: re.search(r"^[^#\n]", text, re.MULTILINE).start()]  # type: ignore[union-attr]
        for heading in ("Costs", "Start", "Follow", "End"):
            assert re.search(rf"^# {heading}: ", opening, re.MULTILINE), f"{path.name}: {heading}"
        assert path.name in (CLUSTER / "README.md").read_text()


def test_what_they_pin_is_what_the_package_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed = " ".join(project["dependencies"])
    assert "ray[default,train,tune]>=2.60,<2.61" in allowed
    assert f"torch>=2.9,<={TORCH}" in allowed
    assert f"torchvision>=0.24,<={VISION}" in allowed
    image = (CLUSTER / "Dockerfile").read_text()
    aws = (CLUSTER / "aws.yaml").read_text()
    assert f'"ray[default,train,tune]=={RAY}"' in image
    for text in (image, aws):
        assert f"torch=={TORCH} torchvision=={VISION}" in text
    assert set(re.findall(r"rayproject/ray:([\d.]+)-py311", aws)) == {RAY}
    for path in MANIFESTS:
        assert f'rayVersion: "{RAY}"' in path.read_text()


# -- AWS -------------------------------------------------------------------------------------------


def test_ray_takes_the_cluster_on_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    util = pytest.importorskip("ray.autoscaler._private.util")
    # The folder and the token that it copies are looked for from here.
    monkeypatch.chdir(ROOT)
    config = util.prepare_config(yaml.safe_load((CLUSTER / "aws.yaml").read_text()))
    util.validate_config(config)
    with pytest.raises(jsonschema.ValidationError):
        util.validate_config({**config, "max_worker": 8})


def test_the_cluster_on_aws_is_spot_with_profiles_and_a_token() -> None:
    config = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    head, worker = (config["available_node_types"][name] for name in ("head", "gpu_spot"))
    assert config["head_node_type"] == "head"
    assert head["resources"]["CPU"] == 0
    assert "GPU" not in head["resources"]
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert worker["max_workers"] <= config["max_workers"]
    profiles = [kind["node_config"]["IamInstanceProfile"]["Name"] for kind in (head, worker)]
    assert profiles == ["gbp-ray-head", "gbp-ray-worker"]
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "RAY_AUTH_MODE=token" in config[commands][-1]
        assert "ray start" in config[commands][-1]
    assert not re.search(r"AWS_(SECRET_)?ACCESS_KEY", (CLUSTER / "aws.yaml").read_text())


# -- Kubernetes ------------------------------------------------------------------------------------

SECRET_KEY = only(
    {"secretKeyRef": only({"name": TEXT, "key": TEXT}, "name", "key")}, "secretKeyRef"
)
AMOUNTS = only({"cpu": TEXT, "memory": TEXT, "nvidia.com/gpu": TEXT}, "cpu", "memory")
CONTAINER = only(
    {
        "name": TEXT,
        "image": TEXT,
        "command": listing(TEXT),
        "env": listing(only({"name": TEXT, "value": TEXT, "valueFrom": SECRET_KEY}, "name")),
        "ports": listing(only({"containerPort": COUNT, "name": TEXT}, "containerPort")),
        "resources": only({"requests": AMOUNTS, "limits": AMOUNTS}, "requests", "limits"),
        "volumeMounts": listing(
            only({"name": TEXT, "mountPath": TEXT, "readOnly": FLAG}, "name", "mountPath")
        ),
    },
    "name",
    "image",
    "resources",
)
TOLERATION = only(
    {
        "key": TEXT,
        "operator": {"enum": ["Exists", "Equal"]},
        "value": TEXT,
        "effect": {"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
    }
)
POD = only(
    {
        "metadata": only({"labels": LABELS}),
        "spec": only(
            {
                "serviceAccountName": TEXT,
                "securityContext": only({"runAsNonRoot": FLAG, "runAsUser": COUNT}),
                "nodeSelector": LABELS,
                "tolerations": listing(TOLERATION),
                "terminationGracePeriodSeconds": COUNT,
                "containers": listing(CONTAINER),
                "volumes": listing(only({"name": TEXT, "configMap": only({"name": TEXT})}, "name")),
            },
            "containers",
        ),
    },
    "spec",
)
RAY_CLUSTER = only(
    {
        "rayVersion": TEXT,
        "authOptions": only({"mode": {"enum": ["token", "disabled"]}, "secretName": TEXT}),
        "gcsFaultToleranceOptions": only(
            {
                "redisAddress": TEXT,
                "redisPassword": only({"value": TEXT, "valueFrom": SECRET_KEY}),
                "externalStorageNamespace": TEXT,
            },
            "redisAddress",
        ),
        "enableInTreeAutoscaling": FLAG,
        "autoscalerOptions": only(
            {
                "idleTimeoutSeconds": COUNT,
                "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
            }
        ),
        "headGroupSpec": only({"rayStartParams": LABELS, "template": POD}, "template"),
        "workerGroupSpecs": listing(
            only(
                {
                    "groupName": TEXT,
                    "replicas": COUNT,
                    "minReplicas": COUNT,
                    "maxReplicas": COUNT,
                    "rayStartParams": LABELS,
                    "template": POD,
                },
                "groupName",
                "template",
            )
        ),
    },
    "headGroupSpec",
)
RAY_JOB = only(
    {
        "entrypoint": TEXT,
        "backoffLimit": COUNT,
        "activeDeadlineSeconds": {"type": "integer", "minimum": 1},
        "shutdownAfterJobFinishes": FLAG,
        "ttlSecondsAfterFinished": COUNT,
        "rayClusterSpec": RAY_CLUSTER,
    },
    "entrypoint",
    "rayClusterSpec",
)


def of_kind(version: str, kind: str, **parts: dict[str, Any]) -> dict[str, Any]:
    metadata = only({"name": TEXT, "annotations": LABELS}, "name")
    known = {"apiVersion": {"const": version}, "kind": {"const": kind}, "metadata": metadata}
    return only({**known, **parts}, *known, *parts)


SCHEMAS = {
    "RayJob": of_kind("ray.io/v1", "RayJob", spec=RAY_JOB),
    "RayCluster": of_kind("ray.io/v1", "RayCluster", spec=RAY_CLUSTER),
    "ServiceAccount": of_kind("v1", "ServiceAccount"),
    "Service": of_kind(
        "v1", "Service", spec=only({"selector": LABELS, "ports": listing(only({"port": COUNT}))})
    ),
    "Deployment": of_kind(
        "apps/v1",
        "Deployment",
        spec=only({"replicas": COUNT, "selector": only({"matchLabels": LABELS}), "template": POD}),
    ),
}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_the_manifests_hold_to_the_schema(path: Path) -> None:
    for document in read_all(path):
        jsonschema.validate(document, SCHEMAS[document["kind"]])


def ray_cluster(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Finds the Ray object of a manifest, and the cluster in it."""
    (document,) = [d for d in read_all(path) if d["apiVersion"] == "ray.io/v1"]
    spec = document["spec"]
    return spec, spec.get("rayClusterSpec", spec)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_the_schema_finds_slips(path: Path) -> None:
    (document,) = [d for d in read_all(path) if d["apiVersion"] == "ray.io/v1"]
    _, cluster = ray_cluster(path)
    document["spec"] = {**document["spec"], "shutdownAfterJobFinish": True}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, SCHEMAS[document["kind"]])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**cluster, "authOptions": {"mode": "Token"}}, RAY_CLUSTER)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_the_manifests_agree_with_themselves(path: Path) -> None:
    documents = read_all(path)
    names = {(document["kind"], document["metadata"]["name"]) for document in documents}
    _, cluster = ray_cluster(path)
    assert cluster["authOptions"] == {"mode": "token", "secretName": "gbp-ray"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {pod["template"]["spec"]["containers"][0]["image"] for pod in pods}
    assert len(images) == 1
    for pod in pods:
        spec = pod["template"]["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert ("ServiceAccount", spec["serviceAccountName"]) in names
        volumes = {volume["name"] for volume in spec.get("volumes", ())}
        (container,) = spec["containers"]
        assert {mount["name"] for mount in container.get("volumeMounts", ())} <= volumes
        # Ray takes its CPUs and GPUs from the limits.
        assert container["resources"]["requests"] == container["resources"]["limits"]
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    # What a comment makes of it: every secret that is read is made there.
    keys = set(re.findall(r"key: (\w+)}", path.read_text())) | {"auth_token"}
    made = set(re.findall(r"--from-literal=(\w+)=", path.read_text()))
    assert keys == made


def test_a_job_takes_its_cluster_away_and_one_that_stays_outlives_its_head() -> None:
    job, cluster = ray_cluster(CLUSTER / "kuberay-job.yaml")
    assert job["shutdownAfterJobFinishes"] is True
    assert job["backoffLimit"] > 0
    assert job["activeDeadlineSeconds"] <= 86400
    words = job["entrypoint"].split()
    assert words[:2] == ["gbp-ray", "sweep"]
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert words[2].startswith(head["volumeMounts"][0]["mountPath"])
    stays, _ = ray_cluster(CLUSTER / "kuberay-cluster.yaml")
    services = {d["metadata"]["name"] for d in read_all(MANIFESTS[1]) if d["kind"] == "Service"}
    address = stays["gcsFaultToleranceOptions"]["redisAddress"]
    assert address in {f"redis://{name}:6379" for name in services}


# -- Docker ----------------------------------------------------------------------------------------


def test_the_image_file_passes_its_linter() -> None:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if linter is None:
        pytest.skip("hadolint is not installed; it comes with the dev extra")
    done = subprocess.run(
        [linter, "--failure-threshold", "style", str(CLUSTER / "Dockerfile")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_the_image_copies_what_is_there_and_runs_as_a_user() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    sources = [
        word for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for word in line.split()
    ]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
    (user,) = re.findall(r"^USER (\d+)$", text, re.MULTILINE)
    assert int(user) > 0
    assert text.index("USER") > text.rindex("RUN")


SERVICE = only(
    {
        "image": TEXT,
        "build": only(
            {"context": TEXT, "dockerfile": TEXT, "args": LABELS}, "context", "dockerfile"
        ),
        "command": {"oneOf": [TEXT, listing(TEXT)]},
        "environment": LABELS,
        "secrets": listing(TEXT),
        "shm_size": TEXT,
        "restart": {"enum": ["no", "always", "on-failure", "unless-stopped"]},
        "ports": listing({"type": "string", "pattern": r"^127\.0\.0\.1:\d+:\d+$"}),
        "healthcheck": only(
            {"test": listing(TEXT), "interval": TEXT, "timeout": TEXT, "retries": COUNT}, "test"
        ),
        "deploy": only({"replicas": COUNT}),
        "depends_on": {
            "type": "object",
            "additionalProperties": only(
                {
                    "condition": {
                        "enum": [
                            "service_started",
                            "service_healthy",
                            "service_completed_successfully",
                        ]
                    }
                },
                "condition",
            ),
        },
    },
    "image",
)


def test_the_compose_file_holds_together() -> None:
    compose = yaml.safe_load((CLUSTER / "compose.yaml").read_text())
    services = compose["services"]
    for service in services.values():
        jsonschema.validate(service, SERVICE)
        assert set(service.get("depends_on", ())) <= set(services)
        assert set(service.get("secrets", ())) <= set(compose["secrets"])
        for name, need in service.get("depends_on", {}).items():
            if need["condition"] == "service_healthy":
                assert "healthcheck" in services[name]
    assert set(services) == {"head", "worker", "s3", "bucket"}
    assert services["worker"]["deploy"]["replicas"] == 2
    for name in ("head", "worker"):
        secret = services[name]["environment"]["RAY_AUTH_TOKEN_PATH"]
        assert secret == f"/run/secrets/{services[name]['secrets'][0]}"
        assert services[name]["environment"]["RAY_AUTH_MODE"] == "token"
    token = f"cluster/{compose['secrets']['ray_token']['file']}"
    # Nobody commits it by mistake.
    assert token in (ROOT / ".gitignore").read_text().split()
    assert (ROOT / "cluster" / services["head"]["build"]["context"]).resolve() == ROOT
    host = services["head"]["environment"]["AWS_ENDPOINT_URL"]
    assert host.startswith("http://s3:")
    assert any(port.endswith(host.rpartition(":")[2]) for port in services["s3"]["ports"])
