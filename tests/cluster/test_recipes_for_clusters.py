"""Every file in cluster/ and docker/ is what its own tool takes, as far as that can be known without a cluster."""

import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import dist_gsl
from dist_gsl.cli.submit import _checked

ROOT = Path(__file__).parents[2]
CLUSTER, DOCKER = ROOT / "cluster", ROOT / "docker"
BIN = Path(sys.executable).parent
CRDS = ROOT.parent / "shared" / "kuberay"
"""The operator's published definitions, where this checkout has them beside it."""


def documents(file: Path) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all(file.read_text()) if each is not None]


RAYCLUSTER = documents(CLUSTER / "kuberay" / "base" / "raycluster.yaml")[0]


def jobs() -> list[Any]:
    """Each RayJob with the cluster's specification in it, as kustomize puts it there."""
    found = []
    for file in sorted(CLUSTER.glob("kuberay/*/whole/rayjob.yaml")):
        (job,) = documents(file)
        job["spec"]["rayClusterSpec"] = copy.deepcopy(RAYCLUSTER["spec"])
        found.append(pytest.param(job, id=job["metadata"]["name"]))
    return found


# --- KubeRay


def strict(schema: Any) -> Any:
    """The schema with unknown fields refused, as the API server does by pruning them."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {key: strict(value) for key, value in schema.items()}
    is_open = changed.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in changed
    if isinstance(changed.get("properties"), dict) and changed.get("type") == "object" and not is_open:
        changed["additionalProperties"] = False
    if changed.pop("x-kubernetes-int-or-string", False):
        changed.pop("type", None)
        changed.pop("anyOf", None)
        changed["type"] = ["integer", "string"]
    return changed


def crd(kind: str) -> Any:
    file = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not file.is_file():
        pytest.skip(f"the operator's definition of {kind} is not here: it belongs to {CRDS.name}/ beside this checkout")
    (definition,) = documents(file)
    version = next(each for each in definition["spec"]["versions"] if each["name"] == "v1")
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


@pytest.mark.parametrize("manifest", [pytest.param(RAYCLUSTER, id="cluster"), *jobs()])
def test_kuberay_takes_the_manifest(manifest: dict[str, Any]) -> None:
    schema = crd(manifest["kind"])
    jsonschema.validate(manifest, schema)
    wrong = copy.deepcopy(manifest)
    wrong["spec"]["gpusPerWorker"] = 1
    with pytest.raises(jsonschema.ValidationError, match="gpusPerWorker"):
        jsonschema.validate(wrong, schema)


@pytest.mark.parametrize("job", jobs())
def test_a_rayjob_runs_a_command_that_exists_and_can_be_run_again(job: dict[str, Any]) -> None:
    program, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert program == "dist-gsl"
    asked = _checked(arguments)
    assert asked.start_or_resume
    assert asked.name
    assert "--data.dir" in arguments  # ImageNet is nowhere by itself
    assert job["spec"]["backoffLimit"] > 0


def test_what_may_be_started_is_said_in_words_too() -> None:
    """Ray's autoscaler tells nobody; a run is held against DIST_GSL_AUTOSCALES."""

    def words(number: int, resources: dict[str, Any]) -> str:
        return f"{number}xCPU:{resources['CPU']},GPU:{resources['GPU']}"

    (group,) = RAYCLUSTER["spec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    head = RAYCLUSTER["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    said = words(group["maxReplicas"], {"CPU": limits["cpu"], "GPU": limits["nvidia.com/gpu"]})
    assert head["env"][0] == {"name": "DIST_GSL_AUTOSCALES", "value": said}
    for name in ("aws", "gcp"):
        (config,) = documents(CLUSTER / "vm" / f"{name}.yaml")
        kind = config["available_node_types"]["gpu"]
        assert f"--env DIST_GSL_AUTOSCALES={words(kind['max_workers'], kind['resources'])}" in config["docker"]["run_options"]


def test_versions_are_the_constraints() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    assert RAYCLUSTER["spec"]["rayVersion"] == pinned["ray"]
    image = documents(CLUSTER / "kuberay" / "settings" / "kustomization.yaml")[0]["images"][0]
    assert image["newTag"].startswith(dist_gsl.__version__)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is missing, whose kustomize builds the manifests")
@pytest.mark.parametrize("folder", [".", "train", "tune"])
def test_kustomize_sets_image_and_sizes_in_one_place(folder: str) -> None:
    def built(name: str) -> dict[str, Any]:
        text = subprocess.run(
            ["kubectl", "kustomize", str(CLUSTER / "kuberay" / name)], capture_output=True, text=True, check=True
        ).stdout
        return {f"{each['kind']}/{each['metadata']['name']}": each for each in yaml.safe_load_all(text)}

    settings = documents(CLUSTER / "kuberay" / "settings" / "kustomization.yaml")[0]["images"][0]
    found = built(folder)
    text = json.dumps(list(found.values()))
    assert f'"image": "{settings["newName"]}:{settings["newTag"]}"' in text
    assert '"image": "dist-gsl"' not in text
    standing = built(".")["RayCluster/dist-gsl"]["spec"]
    own = [each["spec"]["rayClusterSpec"] for each in found.values() if each["kind"] == "RayJob"]
    assert own == ([] if folder == "." else [standing])
    assert ("RayCluster/dist-gsl" in found) == (folder == ".")


def secrets_of(manifest: Any) -> list[Any]:
    """Every value that is set for a variable with the name of a secret."""
    if isinstance(manifest, list):
        return [found for each in manifest for found in secrets_of(each)]
    if not isinstance(manifest, dict):
        return []
    here = [manifest.get("value")] if re.search("PASSWORD$|TOKEN$|SECRET", str(manifest.get("name", ""))) else []
    return here + [found for each in manifest.values() for found in secrets_of(each)]


def test_no_manifest_holds_a_secret() -> None:
    for file in sorted(CLUSTER.rglob("*.yaml")):
        assert [each for each in secrets_of(documents(file)) if each is not None] == [], file


# --- virtual machines


@pytest.mark.parametrize("file", sorted(CLUSTER.glob("vm/*.yaml")), ids=lambda file: file.stem)
def test_ray_takes_the_cluster_file(file: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    (config,) = documents(file)
    validate_config(prepare_config(copy.deepcopy(config)))
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    with pytest.raises(jsonschema.ValidationError, match="gpus_per_worker"):
        validate_config(prepare_config({**config, "gpus_per_worker": 1}))


# --- scripts and images


@pytest.mark.parametrize(
    "script", [*CLUSTER.rglob("*.sh"), *CLUSTER.rglob("*.sbatch"), *DOCKER.rglob("*.sh")], ids=lambda file: file.name
)
def test_shellcheck_finds_nothing(script: Path) -> None:
    done = subprocess.run([BIN / "shellcheck", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([BIN / "hadolint", DOCKER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_compose_files_are_of_the_specification() -> None:
    files = sorted(DOCKER.glob("compose*.yaml"))
    command = [str(BIN / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    for file in files:
        for name, service in documents(file)[0]["services"].items():
            assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name


def test_the_image_holds_what_is_copied_into_it() -> None:
    """Every COPY of the build's context names something that is there and that .dockerignore lets through."""
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copies = re.findall(r"^COPY (?!--from)(.+)$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    sources = [source for line in copies for source in line.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(source == each or source.startswith(f"{each}/") for each in allowed), source


def test_the_image_has_what_is_compiled_before_it_installs() -> None:
    steps = (DOCKER / "Dockerfile").read_text().partition("pip install")[0]
    modules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    for source in [source for module in modules for source in module["sources"]]:
        assert f"COPY {source} {source}\n" in steps, source
