"""Errors of an API server, as messages for users.

The server answers with an object `Status` (kubernetes.io/docs/reference/kubernetes-api/common-definitions/status):
`code` and `reason` say what kind of failure it is, `details` names the object and the causes.
"""

import base64
import binascii
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from hasten.cluster.kubernetes.resources import Resource
from hasten.cluster.manifests.config import CRDS
from hasten.core.errors import ClusterError, ConfigError, ExistsError, NotFoundError
from hasten.core.text import from_json

_DENIED = re.compile(r'User "([^"]*)" cannot (\S+) resource "([^"]+)" in API group "([^"]*)"')


class MissingKindError(ClusterError):
    """The cluster does not know this kind of object: its CustomResourceDefinition is not installed."""


class ForbiddenError(ClusterError):
    """The user lacks a right."""


class ExpiredError(ClusterError):
    """A list was to be continued that the server does not remember."""


class ChangedError(ClusterError):
    """An object was changed between its reading and its writing."""


class NotStartedError(ClusterError):
    """A container has no log yet."""


@dataclass(frozen=True)
class Attempt:
    """What the server was asked, for messages."""

    server: str
    method: str
    verb: str
    path: str
    resource: Resource | None = None
    namespace: str | None = None
    name: str | None = None
    subresource: str | None = None

    @property
    def what(self) -> str:
        """The object or objects asked for, such as `PyTorchJob convert-bloom`."""
        kind = self.resource.kind if self.resource else self.path
        return f"{kind} {self.name}" if self.name else kind

    @property
    def where(self) -> str:
        """The namespace, or the whole cluster."""
        return f"namespace {self.namespace}" if self.namespace else "the cluster"


def missing_kind(kind: str, api_version: str, server: str) -> MissingKindError:
    """The error that names what has to be installed."""
    group = api_version.rpartition("/")[0]
    product, how = next((hint for name, hint in CRDS.items() if name.partition(".")[2] == group), ("", ""))
    advice = f"it comes with {product}; to install that: {how}" if product else f"install what defines {api_version}"
    return MissingKindError(f"the cluster at {server} does not know the kind {kind} ({api_version}): {advice}")


def no_namespace(namespace: str, server: str) -> NotFoundError:
    """The error for a namespace that does not exist."""
    return NotFoundError(
        f"there is no namespace {namespace} in the cluster at {server}: name another with -n, or have it created "
        f"(`kubectl create namespace {namespace}`)"
    )


def answered(attempt: Attempt, code: int, body: bytes, token: str | None = None) -> ClusterError:
    """The error for an answer that is not a success."""
    status = _status(body)
    message = str(status.get("message") or body.decode(errors="replace").strip() or f"status {code}")
    details = status.get("details") or {}
    if code == 401:
        return _unauthorized(attempt, token)
    if code == 403:
        return _forbidden(attempt, message)
    if code == 404:
        return _not_found(attempt, details, message, is_status=bool(status))
    if code == 409:
        return _conflict(attempt, status, message)
    if code == 422:
        return ClusterError(f"the cluster refuses {attempt.what}: {_causes(details) or message}")
    if code == 400 and attempt.subresource == "log" and "waiting to start" in message:
        return NotStartedError(message)
    if code == 410:
        return ExpiredError(message)
    return ClusterError(f"the cluster at {attempt.server} failed to {attempt.verb} {attempt.what} ({code}): {message}")


def unreachable(attempt: Attempt, error: Exception, proxy: str | None) -> ClusterError:
    """The error for a request that got no answer."""
    way = f" through the proxy {proxy}" if proxy else ""
    doubt = "" if attempt.method == "GET" else f". Whether it did {attempt.verb} {attempt.what} is not known"
    return ClusterError(
        f"no answer from the cluster at {attempt.server}{way} ({_plainly(error)}): check that it runs, "
        f"that this machine can reach it, and the kubeconfig's address{doubt}"
    )


def untrusted(attempt: Attempt, reason: str) -> ClusterError:
    """The error for a failed TLS handshake."""
    return ClusterError(
        f"no safe connection to the cluster at {attempt.server} ({' '.join(reason.split())}): check "
        "certificate-authority and tls-server-name in the kubeconfig"
    )


def bad_config(error: Exception, source: str) -> ConfigError:
    """The error for a kubeconfig that cannot be used."""
    return ConfigError(f"cannot use the kubeconfig {source}: {error}")


def _status(body: bytes) -> dict[str, Any]:
    try:
        read = from_json(body)
    except ValueError:
        return {}
    return read if isinstance(read, dict) and read.get("kind") == "Status" else {}


def _causes(details: dict[str, Any]) -> str:
    causes = details.get("causes") or []
    return "; ".join(": ".join(part for part in (cause.get("field"), cause.get("message")) if part) for cause in causes)


def _plainly(error: Exception) -> str:
    """The innermost reason, without the names of Python objects that urllib3 puts before it."""
    inner = error
    while isinstance(getattr(inner, "reason", None), Exception):
        inner = inner.reason  # type: ignore[attr-defined]
    return re.sub(r"^[\w.]*\(host=.*?\): |^<[^>]*>: ", "", str(inner)) or type(inner).__name__


def _unauthorized(attempt: Attempt, token: str | None) -> ClusterError:
    ended = _expiry(token)
    why = f"its token expired at {ended:%Y-%m-%d %H:%M:%S} UTC" if ended and ended < datetime.now(UTC) else None
    return ClusterError(
        f"the cluster at {attempt.server} does not know who asks (401): "
        f"{why or 'the token or certificate is missing, wrong or expired'}; log in again or renew the kubeconfig"
    )


def _expiry(token: str | None) -> datetime | None:
    """When a JSON web token expires; None for other tokens. Its signature is the server's business."""
    parts = (token or "").split(".")
    if len(parts) != 3:
        return None
    try:
        claims = from_json(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
        return datetime.fromtimestamp(claims["exp"], UTC)
    except (binascii.Error, ValueError, KeyError, TypeError, OverflowError):
        return None


def _forbidden(attempt: Attempt, message: str) -> ClusterError:
    denied = _DENIED.search(message)
    if denied:
        user, verb, plural, group = denied.groups()
        return ForbiddenError(
            f"{user} may not {verb} {plural}{'.' + group if group else ''} in {attempt.where}: have a role bound to it "
            f'with apiGroups ["{group}"], resources ["{plural}"], verbs ["{verb}"]'
        )
    if "exceeded quota" in message:
        return ClusterError(f"the quota of {attempt.where} does not allow {attempt.what}: {message}")
    return ForbiddenError(f"the cluster does not allow to {attempt.verb} {attempt.what} in {attempt.where}: {message}")


def _not_found(attempt: Attempt, details: dict[str, Any], message: str, *, is_status: bool) -> ClusterError:
    if is_status and details.get("kind") == "namespaces" and attempt.namespace:
        return no_namespace(attempt.namespace, attempt.server)
    if is_status and details.get("name"):
        return NotFoundError(f"there is no {attempt.what} in {attempt.where}")
    if attempt.resource:
        return missing_kind(attempt.resource.kind, attempt.resource.api_version, attempt.server)
    return NotFoundError(f"the cluster at {attempt.server} has no {attempt.path}: {message}")


def _conflict(attempt: Attempt, status: dict[str, Any], message: str) -> ClusterError:
    if status.get("reason") == "AlreadyExists":
        return ExistsError(f"there is a {attempt.what} in {attempt.where} already: take another name, or delete it")
    causes = (status.get("details") or {}).get("causes") or []
    fields = [
        f"{cause.get('field', '').lstrip('.')} ({cause.get('message')})"
        for cause in causes
        if cause.get("reason") == "FieldManagerConflict"
    ]
    if fields:
        return ClusterError(
            f"{attempt.what} is not changed, because others manage what was to change: {', '.join(fields)}. "
            "Change it through them, or have them give it up"
        )
    return ChangedError(f"{attempt.what} was changed by somebody else at the same time: {message}. Try again")
