"""The manifests: every overlay and combination renders, is valid, and names only what the product really has."""

import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from imagemesh_cli.parser import build_parser
from imagemesh_cli.rooms import GATEWAY, SERVICES
from imagemesh_runtime.config import load
from imagemesh_runtime.http import admin_routes
from imagemesh_runtime.server import LIVENESS, READINESS
from tests.support.manifests import COMBINATIONS, K8S, check, containers, environment, find, render, templates

ROOMS = {"gateway": GATEWAY, **SERVICES}
# What a process has for itself, whatever it serves.
PROCESS = {"IMAGEMESH_LOG_FORMAT", "IMAGEMESH_TRACES", "OTEL_EXPORTER_OTLP_ENDPOINT"}
DEVICES = {"nvidia.com/gpu", "amd.com/gpu", "gpu.intel.com/xe"}
combinations = pytest.mark.parametrize("folder", COMBINATIONS, ids=lambda path: path.name)


def ours(folder: Path) -> list[tuple[str, Any]]:
    return [(name, one) for name, one in containers(render(folder)) if name in ROOMS]


def config(name: str, container: Any) -> Any:
    return load(ROOMS[name].config(), env=environment(container))


def port(address: str) -> int:
    return int(address.rpartition(":")[2])


def test_the_overlays_and_components_are_those_of_the_page() -> None:
    assert {path.name for path in K8S.glob("overlays/*")} == {"local-cpu", "nvidia", "amd", "intel", "mixed", "prod"}
    used = {
        name
        for path in COMBINATIONS
        for name in re.findall("components/(.+)", (path / "kustomization.yaml").read_text())
    }
    assert used == {path.name for path in K8S.glob("components/*")}, "a component that no combination builds"


@combinations
def test_every_object_is_valid(folder: Path) -> None:
    for one in render(folder):
        check(one)


@pytest.mark.parametrize("kind", ["Deployment", "ScaledObject"])
def test_a_field_that_does_not_exist_would_be_found(kind: str) -> None:
    one = next(find(render(K8S / "overlays" / "prod"), kind))
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check({**one, "spec": {**one["spec"], "replicaz": 2}})


@combinations
def test_pods_are_restricted(folder: Path) -> None:
    for _, template in templates(render(folder)):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] >= 10000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        for volume in pod["volumes"]:
            assert set(volume) - {"name"} <= {"emptyDir", "persistentVolumeClaim", "configMap", "secret"}
    for _, one in containers(render(folder)):
        assert one["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        assert one["resources"]["requests"]["memory"] == one["resources"]["limits"]["memory"]
        assert not one["image"].endswith(":latest")
        assert ":" in one["image"]


@combinations
def test_every_variable_is_a_setting_of_that_service_and_its_value_is_taken(folder: Path) -> None:
    for name, one in ours(folder):
        known = set(ROOMS[name].config().__dataclass_fields__)
        scope = f"IMAGEMESH_{name.replace('-', '_').upper()}_"
        for variable in environment(one).keys() - PROCESS:
            assert variable.removeprefix(scope).removeprefix("IMAGEMESH_").lower() in known, variable
        config(name, one)


def probe_of(probe: Any) -> Any:
    return probe.get("grpc") or probe["httpGet"]


@combinations
def test_ports_probes_and_hooks_are_where_the_service_listens(folder: Path) -> None:
    for name, one in ours(folder):
        settings, ports = config(name, one), {each["name"]: each["containerPort"] for each in one["ports"]}
        listens = {port(settings.listen), port(settings.metrics_listen), port(settings.admin_listen)}
        listens |= {port(settings.http_listen)} if name == "gateway" else set()
        assert set(ports.values()) == listens
        probes = {when: probe_of(one[f"{when}Probe"]) for when in ("startup", "readiness", "liveness")}
        by_grpc = {
            "startup": {"port": port(settings.listen), "service": READINESS},
            "readiness": {"port": port(settings.listen), "service": READINESS},
            "liveness": {"port": port(settings.listen), "service": LIVENESS},
        }
        by_metrics = {  # gRPC probes know no TLS
            "startup": {"path": "/readyz", "port": "metrics"}, "readiness": {"path": "/readyz", "port": "metrics"},
            "liveness": {"path": "/healthz", "port": "metrics"},
        }  # fmt: skip
        expected: dict[str, Any] = by_metrics if settings.tls_certificate else by_grpc
        if name == "gateway":  # whose HTTP port asks the services besides
            scheme = {"scheme": "HTTPS"} if settings.tls_certificate else {}
            expected["readiness"] = {"path": "/readyz", "port": "http", **scheme}
            expected["liveness"] = {"path": "/healthz", "port": "http", **scheme}
            assert one["readinessProbe"]["timeoutSeconds"] >= 2
            assert ports["http"] == port(settings.http_listen)
        assert probes == expected
        hook = one["lifecycle"]["preStop"]["httpGet"]
        assert ("GET", hook["path"]) in admin_routes(lambda: None)
        assert ports[hook["port"]] == port(settings.admin_listen)
        # The kubelet asks at the pod's address.
        assert {
            address.partition(":")[0] for address in (settings.listen, settings.metrics_listen, settings.admin_listen)
        } == {"0.0.0.0"}


@combinations
def test_calls_under_way_have_their_time_and_the_gateway_outlives_the_services(folder: Path) -> None:
    graces = {}
    for _, template in templates(render(folder)):
        for one in template["spec"]["containers"]:
            if (name := one["name"]) in ROOMS:
                graces[name] = template["spec"]["terminationGracePeriodSeconds"]
                settings = config(name, one)
                assert settings.drain_settle_seconds >= 3, "SIGTERM would come before the endpoints have changed"
                assert graces[name] >= settings.drain_grace_seconds + settings.drain_settle_seconds + 10
    assert graces["gateway"] >= max(graces.values())


@combinations
def test_the_gateway_has_memory_for_the_bodies_that_it_takes(folder: Path) -> None:
    units = {"Mi": 1 << 20, "Gi": 1 << 30}
    for name, one in ours(folder):
        if name == "gateway":
            settings, limit = config(name, one), one["resources"]["limits"]["memory"]
            assert settings.max_http_held_bytes >= 4 * settings.max_http_body_bytes
            held = int(limit[:-2]) * units[limit[-2:]] - (1 << 29)  # half a GiB: libraries, pictures on their way
            assert 4 * settings.max_http_held_bytes <= held


@combinations
def test_no_two_containers_of_a_pod_want_the_same_port(folder: Path) -> None:
    for _, template in templates(render(folder)):
        ports = [each["containerPort"] for one in template["spec"]["containers"] for each in one.get("ports", [])]
        assert len(ports) == len(set(ports))


def reachable(folder: Path) -> set[str]:
    """``name:port`` of every Service that selects a pod with such a port."""
    pods = [template for _, template in templates(render(folder))]
    found = set()
    for service in find(render(folder), "Service"):
        selected = [pod for pod in pods if service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()]
        for each in service["spec"]["ports"]:
            for pod in selected:
                named = {
                    one["name"]: one["containerPort"]
                    for box in pod["spec"]["containers"]
                    for one in box.get("ports", [])
                }
                if named.get(each["targetPort"]) == each["port"]:
                    found.add(f"{service['metadata']['name']}:{each['port']}")
    return found


@combinations
def test_every_address_leads_to_a_service_with_pods(folder: Path) -> None:
    there = reachable(folder)
    settings = {name: config(name, one) for name, one in ours(folder)}
    gateway = settings["gateway"]
    for address in (gateway.text_encoder, gateway.diffusion, gateway.vae, gateway.controlnet, gateway.vit):
        assert address.removeprefix("dns:///") in there
        assert address.startswith("dns:///"), "of one address there is one channel, and so one replica"
    together = any(len(template["spec"]["containers"]) > 1 for _, template in templates(render(folder)))
    assert settings["diffusion"].controlnet == "127.0.0.1:50054" if together else "dns:///controlnet-replicas:50054"


@combinations
def test_whatever_selects_pods_selects_some_and_each_service_may_be_disrupted_one_by_one(folder: Path) -> None:
    pods = [template["metadata"]["labels"] for _, template in templates(render(folder))]
    budgets = list(find(render(folder), "PodDisruptionBudget"))
    for one in budgets:
        assert one["spec"]["maxUnavailable"] == 1
        assert any(one["spec"]["selector"]["matchLabels"].items() <= labels.items() for labels in pods)
    makers = [one for one in find(render(folder), "Deployment", "StatefulSet") if one["metadata"]["name"] in ROOMS]
    assert len(budgets) == len(makers)


@combinations
def test_what_is_scaled_is_there_and_has_no_number_of_its_own(folder: Path) -> None:
    there = {(one["kind"], one["metadata"]["name"]): one for one in find(render(folder), "Deployment", "StatefulSet")}
    for one in find(render(folder), "ScaledObject", "HorizontalPodAutoscaler"):
        target = one["spec"]["scaleTargetRef"]
        assert "replicas" not in there[target["kind"], target["name"]]["spec"]


def devices(folder: Path) -> dict[str, set[str]]:
    found = {name: DEVICES & set(one["resources"]["limits"]) for name, one in ours(folder)}
    return {name: wanted for name, wanted in found.items() if wanted}


@pytest.mark.parametrize(
    ("overlay", "resource"),
    [("nvidia", "nvidia.com/gpu"), ("amd", "amd.com/gpu"), ("intel", "gpu.intel.com/xe"), ("prod", "nvidia.com/gpu")],
)
def test_an_accelerators_overlay_wants_it_and_no_other_vendors(overlay: str, resource: str) -> None:
    assert devices(K8S / "overlays" / overlay) == {name: {resource} for name in ("diffusion", "controlnet", "vae")}


def test_the_mixed_overlay_gives_each_its_own_and_the_cpus_none() -> None:
    assert devices(K8S / "overlays" / "mixed") == {
        "diffusion": {"nvidia.com/gpu"}, "vae": {"amd.com/gpu"}, "controlnet": {"gpu.intel.com/xe"},
    }  # fmt: skip
    assert devices(K8S / "overlays" / "local-cpu") == {}


@combinations
def test_who_has_a_device_has_the_image_for_it(folder: Path) -> None:
    tags = {"nvidia.com/gpu": "-cuda", "amd.com/gpu": "-rocm", "gpu.intel.com/xe": "-xpu"}
    for name, one in ours(folder):
        wanted = {tags[device] for device in DEVICES & set(one["resources"]["limits"])}
        if one["resources"].get("claims"):
            wanted = {"-cuda"}
        assert one["image"].endswith(wanted.pop() if wanted else "dev" if name == "gateway" else "-cpu"), name


def test_controlnets_beside_the_sampler_share_the_folder_of_its_sockets_and_its_user() -> None:
    (pod,) = [
        template["spec"] for name, template in templates(render(K8S / "overlays" / "local-cpu")) if name == "diffusion"
    ]
    mounts = [{each["mountPath"]: each["name"] for each in one["volumeMounts"]} for one in pod["containers"]]
    assert [each["/tmp"] for each in mounts] == ["tmp", "tmp"]
    assert len({each["/var/lib/imagemesh"] for each in mounts}) == 2
    assert next(one for one in pod["volumes"] if one["name"] == "tmp")["emptyDir"]["medium"] == "Memory"


def test_the_finetuning_job_gives_the_command_what_it_takes_and_writes_where_models_are_read(tmp_path: Path) -> None:
    objects = render(K8S / "tests" / "finetune")
    (job,) = (one for name, one in containers(objects) if name == "finetune")
    places = {each["mountPath"]: each["name"] for each in job["volumeMounts"]}
    here = {place: str(tmp_path / name) for place, name in places.items()}
    for place in here.values():
        Path(place).mkdir()
    arguments = [re.sub("=(/[a-z]+)", lambda found: f"={here[found[1]]}", one) for one in job["args"]]
    asked = build_parser().parse_args([*job["command"][1:], *arguments])
    assert job["command"][0] == "imagemesh"
    assert asked.output.parent == asked.state.parent == Path(here["/models"])
    assert asked.state.name.startswith("."), "the service would take the run for a model"
    (vit,) = (one for name, one in containers(objects) if name == "vit")
    assert environment(vit)["IMAGEMESH_MODELS"] == environment(job)["IMAGEMESH_MODELS"] == "/models"
    claims = {each["name"]: each["persistentVolumeClaim"]["claimName"] for _, template in templates(objects)
              if template["spec"]["containers"][0]["name"] == "finetune"
              for each in template["spec"]["volumes"] if "persistentVolumeClaim" in each}  # fmt: skip
    assert claims == {"models": "models", "data": "finetune-data"}
    assert set(claims.values()) <= {one["metadata"]["name"] for one in find(objects, "PersistentVolumeClaim")}


def test_each_service_shows_a_certificate_for_the_name_that_it_is_called_by_and_wants_to_see_the_callers() -> None:
    objects = render(K8S / "tests" / "mtls")
    certificates = {one["spec"]["secretName"]: one["spec"] for one in find(objects, "Certificate")}
    issuers = {one["metadata"]["name"] for one in find(objects, "Issuer")}
    assert all(one["issuerRef"]["name"] in issuers for one in certificates.values())
    calls = {
        address.removeprefix("dns:///").partition(":")[0]
        for name, one in ours(K8S / "tests" / "mtls")
        for field in ("text_encoder", "diffusion", "vae", "controlnet", "vit")
        if (address := getattr(config(name, one), field, ""))
    }
    named = {name for one in certificates.values() for name in one.get("dnsNames", ())}
    assert calls == {f"{name}-replicas" for name in ROOMS if name != "gateway"} <= named
    for name, template in templates(objects):
        (one,) = template["spec"]["containers"]
        secret = next(volume["secret"] for volume in template["spec"]["volumes"] if volume["name"] == "tls")
        assert certificates[secret["secretName"]]["dnsNames"] == [name, f"{name}-replicas"]
        assert certificates[secret["secretName"]]["usages"] == ["server auth", "client auth"]
        settings = config(name, one)
        at = next(mount["mountPath"] for mount in one["volumeMounts"] if mount["name"] == "tls")
        assert (settings.tls_certificate, settings.tls_key) == (f"{at}/tls.crt", f"{at}/tls.key")
        assert settings.tls_authority == f"{at}/ca.crt"
        assert settings.tls_client_authority == ("" if name == "gateway" else f"{at}/ca.crt")


def test_routes_of_the_gateway_api_lead_to_the_gateways_ports() -> None:
    objects = render(K8S / "tests" / "gateway-api")
    there = reachable(K8S / "tests" / "gateway-api")
    (gateway,) = find(objects, "Gateway")
    listeners = {one["name"]: one["hostname"] for one in gateway["spec"]["listeners"]}
    routes = list(find(objects, "HTTPRoute", "GRPCRoute"))
    assert len(routes) == len(listeners) == 2
    for route in routes:
        (parent,), (rule,) = route["spec"]["parentRefs"], route["spec"]["rules"]
        assert parent["name"] == gateway["metadata"]["name"]
        assert route["spec"]["hostnames"] == [listeners[parent["sectionName"]]]
        (backend,) = rule["backendRefs"]
        assert f"{backend['name']}:{backend['port']}" in there
