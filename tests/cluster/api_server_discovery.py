"""What the test's API server tells of itself.

kubernetes.io/docs/concepts/overview/kubernetes-api (discovery): groups and versions, and the resources of each.
"""

from tests.cluster.api_server_kinds import Kind, Object


def discovered(kinds: list[Kind], parts: list[str]) -> Object | None:
    """/version, /api, /apis, and the resources of a group and version."""
    if parts == ["version"]:
        return {"major": "1", "minor": "37", "gitVersion": "v1.37.0", "platform": "linux/amd64"}
    if parts == ["api"]:
        return {"kind": "APIVersions", "versions": ["v1"]}
    if parts == ["apis"]:
        versions = sorted({kind.api_version for kind in kinds if kind.group})
        groups = [{"name": version.partition("/")[0], "versions": [_version(version)]} for version in versions]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    group_version = "/".join(parts[1:])
    found = [_resource(kind) for kind in kinds if kind.api_version == group_version]
    if not found or parts[0] != ("apis" if "/" in group_version else "api"):
        return None
    return {"kind": "APIResourceList", "groupVersion": group_version, "resources": found}


def _version(group_version: str) -> Object:
    return {"groupVersion": group_version, "version": group_version.partition("/")[2]}


def _resource(kind: Kind) -> Object:
    verbs = ["create", "delete", "get", "list", "patch"]
    return {"name": kind.plural, "namespaced": kind.namespaced, "kind": kind.kind, "verbs": verbs}
