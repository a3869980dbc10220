"""infra/kuberay built with kustomize, and every object against the schema that its API server would hold it to."""

import copy
import json
import os
import shutil
import subprocess
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml

KUBERAY = Path(__file__).parents[2] / "infra" / "kuberay"
OVERLAYS = ("cpu", "gpu-spot")
KUBERNETES = "1.34"
BUILD = ["kustomize", "build"] if shutil.which("kustomize") else ["kubectl", "kustomize"]
SCHEMAS = {
    kind: json.loads((Path(__file__).parent / "schemas" / f"kuberay-v1.7.0-{kind.lower()}-v1.schema.json").read_text())
    for kind in ("RayCluster", "RayJob")
}

pytestmark = pytest.mark.skipif(
    not shutil.which(BUILD[0]) and not os.environ.get("CI"), reason="needs kustomize, or kubectl, which brings it"
)


@pytest.fixture(scope="module", params=OVERLAYS)
def objects(request):
    built = subprocess.run(
        [*BUILD, str(KUBERAY / "overlays" / request.param)], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    return list(yaml.safe_load_all(built.stdout))


def of_kind(objects, *kinds):
    return {found["metadata"]["name"]: found for found in objects if found["kind"] in kinds}


def validate(found):
    """Raises where an API server would refuse it, or drop a field without a word."""
    if found["kind"] in SCHEMAS:
        jsonschema.Draft202012Validator(SCHEMAS[found["kind"]]).validate(found)
    else:
        kubernetes_validate.validate(found, KUBERNETES, strict=True)


def test_every_object_is_valid(objects):
    assert {found["kind"] for found in objects} >= {
        "RayCluster",
        "RayJob",
        "StatefulSet",
        "Deployment",
        "NetworkPolicy",
    }
    for found in objects:
        validate(found)


def fields(value, path=()):
    if isinstance(value, dict):
        for name, inner in value.items():
            yield (*path, name)
            yield from fields(inner, (*path, name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from fields(inner, (*path, index))


# Below these, names are the user's own; metadata of custom resources is no part of their schema.
FREE = {
    "labels",
    "annotations",
    "matchLabels",
    "data",
    "nodeSelector",
    "rayStartParams",
    "requests",
    "limits",
    "selector",
}


def test_a_misspelt_field_fails_wherever_it_is(objects):
    """Fields of every object in turn, each with its last letter doubled."""
    accepted, tried = [], 0
    for found in objects:
        paths = [path for path in fields(found) if not FREE & set(path[:-1]) and isinstance(path[-1], str)]
        for path in paths[:: 1 + len(paths) // 9]:
            if path[0] in ("apiVersion", "kind") or (found["kind"] in SCHEMAS and path[0] == "metadata"):
                continue
            wrong = copy.deepcopy(found)
            place = wrong
            for name in path[:-1]:
                place = place[name]
            place[path[-1] + path[-1][-1]] = place.pop(path[-1])
            tried += 1
            try:
                validate(wrong)
                accepted.append((found["kind"], *path))
            except (jsonschema.ValidationError, kubernetes_validate.ValidationError):
                continue
    assert tried > 60
    assert not accepted


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("RayJob", ("spec", "backoffLimit"), "three"),
        ("RayJob", ("spec", "rayClusterSpec", "authOptions", "mode"), "tokens"),
        ("RayCluster", ("spec", "autoscalerOptions", "version"), "v3"),
        ("RayCluster", ("spec", "workerGroupSpecs", 0, "maxReplicas"), "many"),
        ("NetworkPolicy", ("spec", "policyTypes"), "Ingress"),
        ("Deployment", ("spec", "replicas"), "one"),
    ],
)
def test_a_wrong_value_fails(objects, kind, path, value):
    wrong = copy.deepcopy(next(found for found in objects if found["kind"] == kind))
    place = wrong
    for name in path[:-1]:
        place = place[name]
    assert path[-1] in place
    place[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(wrong)


def clusters(objects):
    found = {name: cluster["spec"] for name, cluster in of_kind(objects, "RayCluster").items()}
    return found | {name: job["spec"]["rayClusterSpec"] for name, job in of_kind(objects, "RayJob").items()}


def groups(objects):
    for spec in clusters(objects).values():
        yield "head", spec["headGroupSpec"]
        for group in spec["workerGroupSpecs"]:
            yield group["groupName"], group


def test_the_operators_own_rules_hold(objects):
    """What KubeRay refuses beyond its schema."""
    for name, spec in clusters(objects).items():
        assert len(name) <= 47
        assert spec["rayVersion"] == ray.__version__
        assert spec["autoscalerOptions"]["version"] == "v2"
        assert spec["autoscalerOptions"]["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        for group in spec["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["maxReplicas"]
    for name, group in groups(objects):
        assert group["template"]["spec"]["restartPolicy"] == "Never", f"{name}: autoscaler v2 wants it"
        assert not {"labels", "resources"} & set(group["rayStartParams"])
    for job in of_kind(objects, "RayJob").values():
        assert job["spec"]["submissionMode"] == "SidecarMode"
        assert "submitterPodTemplate" not in job["spec"]
        assert "clusterSelector" not in job["spec"]
        assert job["spec"]["shutdownAfterJobFinishes"] is True
        assert job["spec"]["backoffLimit"] >= 3


def test_an_upgrade_can_be_applied(objects):
    """A Job's template cannot change, so a finished one goes; the operator refuses an upgrade strategy in a RayJob."""
    for job in of_kind(objects, "Job").values():
        assert job["spec"]["ttlSecondsAfterFinished"] <= 3600
    assert not [name for name, spec in clusters(objects).items() if "upgradeStrategy" in spec]


def test_clusters_ask_for_a_token(objects):
    for name, spec in clusters(objects).items():
        assert spec["authOptions"] == {"mode": "token", "secretName": "adaconv-ray-token"}, name


def test_pods_have_no_rights(objects):
    templates = [group["template"] for _, group in groups(objects)]
    templates += [found["spec"]["template"] for found in of_kind(objects, "Deployment", "StatefulSet", "Job").values()]
    for template in templates:
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            assert ":" in container["image"]
            assert not container["image"].endswith(":latest")


def test_secrets_are_referred_to_and_never_there(objects):
    assert not of_kind(objects, "Secret")
    for found in objects:
        for path in fields(found):
            if path[-1] == "name" and path[-3:-2] == ("env",):
                entry = found
                for name in path[:-1]:
                    entry = entry[name]
                if any(word in entry["name"] for word in ("PASSWORD", "SECRET", "TOKEN", "ACCESS_KEY")):
                    assert set(entry) == {"name", "valueFrom"}, entry


def test_everything_is_closed_but_what_is_opened(objects):
    policies = of_kind(objects, "NetworkPolicy")
    assert policies["deny"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    (rule,) = policies["postgres"]["spec"]["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "mlflow"}}}]
    (_, _, operator) = policies["ray"]["spec"]["ingress"]
    # Of KubeRay 1.7: its chart calls the pods kuberay-operator by name, its kustomization kuberay; both by this.
    labels = {"matchLabels": {"app.kubernetes.io/component": "kuberay-operator"}}
    assert operator["from"] == [{"namespaceSelector": {}, "podSelector": labels}]
    outside, inside = policies["ray"]["spec"]["egress"]
    assert outside == {"to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.169.254/32"]}}]}
    assert inside == {"to": [{"namespaceSelector": {}}]}
    pods = of_kind(objects, "Deployment", "StatefulSet", "Job").values()
    labels = [pod["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/name"] for pod in pods]
    assert sorted(labels) == ["mlflow", "mlflow-user", "postgres"]


def test_jobs_run_pipelines_that_take_their_flags(objects):
    """The command lines are those of this version: unknown flags and files that are not there are refused."""
    import shlex

    from adaconv.config.load import load_config
    from adaconv.config.shard import ShardConfig
    from adaconv.config.stylize import StylizeConfig
    from adaconv.config.train import TrainConfig

    models = {"shard": ShardConfig, "train": TrainConfig, "stylize": StylizeConfig}
    for name, job in of_kind(objects, "RayJob").items():
        words = shlex.split(job["spec"]["entrypoint"].replace("/opt/adaconv", str(KUBERAY.parents[1])))
        assert words[:2] == ["python", str(KUBERAY.parents[1] / "pipelines" / f"{name}.py")]
        config = load_config(models[name], words[2:], prog=words[1], description="").config
        # A broken picture is not mended by another try.
        assert name == "train" or config.budget.share > 0
        groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        limits = [group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in groups]
        told = config.scaling.model_dump()
        cpus, gpus = (sum(told[key] for key in told if key.startswith(f"{kind}s_per")) for kind in ("cpu", "gpu"))
        # A job that asks for a GPU where no group has one, or for more CPUs with it, is refused, try by try.
        limits = [(float(one["cpu"]), float(one.get("nvidia.com/gpu", 0))) for one in limits]
        assert any(cpus <= node_cpus and gpus <= node_gpus for node_cpus, node_gpus in limits)
        if name == "stylize" and gpus:  # outputs are encoded by as many threads as actors have CPUs
            assert any(0.75 <= (node_gpus / gpus) * cpus / node_cpus <= 1 for node_cpus, node_gpus in limits)


def test_a_worker_drains_for_nearly_as_long_as_its_pod_has(objects):
    """Ray's own 30 seconds would give away the rest, and more than the pod has is cut off in the middle."""
    for name, group in groups(objects):
        spec = group["template"]["spec"]
        environment = {entry["name"]: entry.get("value") for entry in spec["containers"][0]["env"]}
        seconds = environment.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")
        if name == "head":  # has no ranks, and its jobs keep it from ever being idle
            assert seconds is None
        else:
            assert 10 <= spec["terminationGracePeriodSeconds"] - int(seconds) <= 30


def test_gpu_groups_prefer_spot(objects, request):
    cluster = clusters(objects)["train"]
    gpus = {
        group["groupName"]: group
        for group in cluster["workerGroupSpecs"]
        if "nvidia.com/gpu" in group["template"]["spec"]["containers"][0]["resources"]["limits"]
    }
    if not gpus:
        assert request.node.callspec.params["objects"] == "cpu"
        return
    assert gpus["gpu-spot"]["priority"] > gpus["gpu-ondemand"]["priority"]
    spec = {name: group["template"]["spec"] for name, group in gpus.items()}
    assert spec["gpu-spot"]["nodeSelector"] == {"karpenter.sh/capacity-type": "spot"}
    assert spec["gpu-ondemand"]["nodeSelector"] == {"karpenter.sh/capacity-type": "on-demand"}
    assert all(group["terminationGracePeriodSeconds"] >= 120 for group in spec.values())
