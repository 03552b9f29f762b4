"""Nodes without machines: registers nodes and tells of their pods what a kubelet would tell.

usage: nodes.py DIRECTORY PORT NODE,NODE,...

DIRECTORY holds ca.crt, admin.crt and admin.key. Nothing runs: a pod is what the tag of its container's
image says, after the last `-` or as the whole tag:

    missing     the image cannot be pulled: ErrImagePull, then ImagePullBackOff
    crash       it ends as soon as it has started: CrashLoopBackOff
    unready     it runs and never becomes ready
    slow        it becomes ready after two seconds
    late        it becomes ready, and ends in failure three seconds later
    done, fail  it ends well, or with exit code 3, after half a second: for Jobs
    else        it runs and is ready at once

A container that ends well has an effect, if its variables ask for one: ADDS=x adds the line x to what the
ConfigMap `effects` of its namespace has as `lines`, REMOVES=x takes all such lines away.

A Node that somebody else makes with the label `told` is told of as well, as soon as it is seen. Its
annotation `told/version` is its kubelet's version, `told/ready: "False"` means that it is not ready; both
show at once.

Standard library only.
"""

import datetime
import http.client
import json
import ssl
import sys
import time

directory, port, nodes = sys.argv[1], int(sys.argv[2]), sys.argv[3].split(",")
tls = ssl.create_default_context(cafile=f"{directory}/ca.crt")
tls.load_cert_chain(f"{directory}/admin.crt", f"{directory}/admin.key")
MERGE = "application/strategic-merge-patch+json"
connection = None


def request(method, path, body=None, kind="application/json"):
    """Answers with the status and what was answered; 0 where the server is not there."""
    global connection
    for last in (False, True):
        try:
            if connection is None:
                connection = http.client.HTTPSConnection("127.0.0.1", port, context=tls, timeout=20)
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {"Content-Type": kind, "Accept": "application/json"})
            answer = connection.getresponse()
            read = answer.read()
            return answer.status, (json.loads(read) if read else {})
        except (OSError, http.client.HTTPException, ValueError):
            connection = None
            if last:
                return 0, {}
            time.sleep(0.2)


def now(form="%Y-%m-%dT%H:%M:%SZ"):
    return datetime.datetime.utcnow().strftime(form)


# The nodes that others made: what was last told of each.
others = {}


def adopt():
    """Tells of nodes that others made, and of what has changed in their annotations."""
    status, answer = request("GET", "/api/v1/nodes?labelSelector=told&resourceVersion=0")
    if status != 200:
        return
    for node in answer.get("items", []):
        name, annotations = node["metadata"]["name"], node["metadata"].get("annotations", {})
        wanted = (node["metadata"]["uid"], annotations.get("told/version", "v1.20.2"), annotations.get("told/ready", "True"))
        if others.get(name) != wanted:
            others[name] = wanted
            heartbeat([name])
    there = {node["metadata"]["name"] for node in answer.get("items", [])}
    for name in set(others) - there:
        del others[name]


def heartbeat(which):
    for name in which:
        node, number = name, nodes.index(name) if name in nodes else 100
        _, version, is_ready = others.get(node, ("", "v1.20.2", "True"))
        status, _ = request("GET", f"/api/v1/nodes/{node}")
        if status == 404 and node in others:
            continue
        if status == 404:
            labels = {"kubernetes.io/hostname": node, "kubernetes.io/os": "linux"}
            request("POST", "/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": node, "labels": labels}})
        room = {"cpu": "32", "memory": "256Gi", "pods": "500", "ephemeral-storage": "1Ti"}
        info = {key: "" for key in ("kernelVersion", "osImage", "machineID", "systemUUID", "bootID", "kubeProxyVersion")}
        info.update(architecture="amd64", operatingSystem="linux", kubeletVersion=version, containerRuntimeVersion="none://0")
        told = [("Ready", is_ready), ("MemoryPressure", "False"), ("DiskPressure", "False"), ("PIDPressure", "False")]
        conditions = [
            {"type": kind, "status": value, "reason": "Told", "message": "told", "lastHeartbeatTime": now(), "lastTransitionTime": now()}
            for kind, value in told
        ]
        address = [{"type": "InternalIP", "address": f"10.0.0.{number + 1}"}]
        request(
            "PATCH",
            f"/api/v1/nodes/{node}/status",
            {"status": {"capacity": room, "allocatable": room, "nodeInfo": info, "addresses": address, "conditions": conditions}},
            MERGE,
        )
        lease = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
        spec = {"holderIdentity": node, "leaseDurationSeconds": 40, "renewTime": now("%Y-%m-%dT%H:%M:%S.%fZ")}
        if request("PATCH", f"{lease}/{node}", {"spec": spec}, "application/merge-patch+json")[0] == 404:
            metadata = {"name": node, "namespace": "kube-node-lease"}
            request("POST", lease, {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec})


def role(image):
    """What the tag of an image makes of a pod."""
    tag = image.rsplit("/", 1)[-1].partition(":")[2]
    return tag.rsplit("-", 1)[-1]


def effect(namespace, container):
    """Does what the variables of a container ask for."""
    variables = {each["name"]: each.get("value", "") for each in container.get("env", [])}
    if not {"ADDS", "REMOVES"} & set(variables):
        return
    path = f"/api/v1/namespaces/{namespace}/configmaps"
    status, found = request("GET", f"{path}/effects")
    lines = found.get("data", {}).get("lines", "").splitlines() if status == 200 else []
    lines = [line for line in lines if line != variables.get("REMOVES")]
    lines += [variables["ADDS"]] if "ADDS" in variables else []
    data = {"lines": "".join(line + "\n" for line in lines)}
    if status == 200:
        request("PATCH", f"{path}/effects", {"data": data}, "application/merge-patch+json")
    else:
        request("POST", path, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "effects"}, "data": data})


addresses = 0
# When each pod was first seen: the API's times are whole seconds.
seen = {}
# Pods whose effect there has been.
acted = set()


def told(pod):
    """The status that comes next, or none while nothing changes."""
    global addresses
    uid, status, containers = pod["metadata"]["uid"], pod.get("status", {}), pod["spec"]["containers"]
    phase = status.get("phase", "Pending")
    if phase in ("Succeeded", "Failed"):
        return None
    age = time.monotonic() - seen.setdefault(uid, time.monotonic())
    began = status.get("startTime") or now()
    roles = [role(container["image"]) for container in containers]
    before = {each["name"]: each for each in status.get("containerStatuses", [])}

    def one(container, what):
        was = before.get(container["name"], {})
        count = was.get("restartCount", 0)
        common = {"name": container["name"], "image": container["image"], "imageID": "", "ready": False, "started": False, "restartCount": count}
        running = {"running": {"startedAt": (was.get("state", {}).get("running") or {}).get("startedAt") or now()}}
        ended = lambda code: {"exitCode": code, "reason": "Error" if code else "Completed", "startedAt": began, "finishedAt": now()}
        common["imageID"] = "none://" + container["image"]
        common["containerID"] = f"none://{uid}"
        if what == "missing":
            reason = "ErrImagePull" if age < 1 else "ImagePullBackOff"
            message = f"rpc error: code = NotFound desc = {container['image']}: not found" if age < 1 else f"Back-off pulling image \"{container['image']}\""
            return common | {"imageID": "", "containerID": "", "state": {"waiting": {"reason": reason, "message": message}}}
        if what == "crash" or (what == "late" and age > 3):
            message = f"back-off 10s restarting failed container={container['name']}"
            return common | {
                "restartCount": max(1, count),
                "state": {"waiting": {"reason": "CrashLoopBackOff", "message": message}},
                "lastState": {"terminated": ended(1)},
            }
        if what in ("done", "fail") and age > 0.5:
            if what == "done" and uid not in acted:
                acted.add(uid)
                effect(pod["metadata"]["namespace"], container)
            return common | {"state": {"terminated": was.get("state", {}).get("terminated") or ended(3 if what == "fail" else 0)}}
        ready = what != "unready" and (what != "slow" or age > 2) and what not in ("done", "fail")
        return common | {"ready": ready, "started": True, "state": running}

    each = [one(container, what) for container, what in zip(containers, roles)]
    if status.get("containerStatuses") and [(c["ready"], c["state"].keys(), reason(c)) for c in each] == [
        (c["ready"], c["state"].keys(), reason(c)) for c in status["containerStatuses"]
    ]:
        return None
    ready = "True" if all(c["ready"] for c in each) else "False"
    old = {c["type"]: c for c in status.get("conditions", [])}

    def condition(kind, value):
        was = old.get(kind, {})
        return {"type": kind, "status": value, "lastTransitionTime": was.get("lastTransitionTime", now()) if was.get("status") == value else now()}

    conditions = [condition("Initialized", "True"), condition("Ready", ready), condition("ContainersReady", ready), condition("PodScheduled", "True")]
    ended = [c["state"]["terminated"] for c in each if "terminated" in c["state"]]
    if len(ended) == len(each):
        phase = "Failed" if any(e["exitCode"] for e in ended) else "Succeeded"
    else:
        phase = "Pending" if any(what == "missing" for what in roles) else "Running"
    address = status.get("podIP")
    if not address:
        addresses += 1
        address = f"10.244.{addresses // 250 % 250}.{addresses % 250 + 1}"
    return {
        "phase": phase, "startTime": began, "hostIP": "10.0.0.1", "podIP": address, "podIPs": [{"ip": address}],
        "conditions": conditions, "containerStatuses": each,
    }


def reason(container):
    return (container["state"].get("waiting") or {}).get("reason")


beat = 0
while True:
    if time.monotonic() - beat > 10 or beat == 0:
        heartbeat(nodes + list(others))
        beat = time.monotonic()
    adopt()
    status, answer = request("GET", "/api/v1/pods?resourceVersion=0")
    there = answer.get("items", []) if status == 200 else []
    for pod in there:
        if pod["spec"].get("nodeName") not in nodes and pod["spec"].get("nodeName") not in others:
            continue
        metadata = pod["metadata"]
        path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}"
        if metadata.get("deletionTimestamp"):
            options = {"kind": "DeleteOptions", "apiVersion": "v1", "gracePeriodSeconds": 0, "preconditions": {"uid": metadata["uid"]}}
            request("DELETE", path, options)
            continue
        body = told(pod)
        if body:
            request("PATCH", path + "/status", {"metadata": {"uid": metadata["uid"]}, "status": body}, MERGE)
    if status == 200:
        alive = {pod["metadata"]["uid"] for pod in there}
        seen = {uid: at for uid, at in seen.items() if uid in alive}
        acted &= alive
    time.sleep(0.1)
