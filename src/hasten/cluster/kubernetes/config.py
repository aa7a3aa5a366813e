"""Address and credentials of a cluster: a kubeconfig, or the service account of the pod that hasten runs in.

The order is kubectl's (kubernetes.io/docs/concepts/configuration/organize-cluster-access-kubeconfig): the file that was
named, the files of KUBECONFIG, `~/.kube/config`, and without any of them the pod's own account.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import urllib3
import yaml
from kubernetes import config
from kubernetes.client import Configuration

from hasten.cluster.kubernetes.errors import bad_config
from hasten.core.errors import ConfigError
from hasten.core.files import expand_home

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_NO_HOST = "no-host.invalid"
"""An empty list would be read as that of the environment."""
_loader: Any = config
"""The client's loader has no types."""
_UNREADABLE = (config.ConfigException, yaml.YAMLError, OSError, ValueError, TypeError, AttributeError, KeyError)


@dataclass(frozen=True)
class Access:
    """How to reach a cluster."""

    configuration: Any
    namespace: str
    """Where the user names none."""
    source: str
    """What it was read from, for messages."""


class NoClusterError(ConfigError):
    """No cluster is configured."""


def find_access(config_file: str | None, context: str | None) -> Access:
    """Read the configuration; NoClusterError where there is none, ConfigError where it cannot be used."""
    if config_file is not None and not _is_file(config_file):
        raise ConfigError(f"there is no kubeconfig {config_file}")
    files = config_file or os.environ.get("KUBECONFIG") or "~/.kube/config"
    if any(_is_file(file) for file in files.split(os.pathsep) if file):
        access = _from_files(files, context)
    elif os.environ.get("KUBERNETES_SERVICE_HOST"):
        access = _from_account(context)
    else:
        raise NoClusterError(
            f"no cluster is configured: {files} does not exist and this is not a pod; "
            "give a kubeconfig with --config or in the variable KUBECONFIG, or use --cluster local"
        )
    return _adjusted(access)


def _is_file(name: str) -> bool:
    return expand_home(Path(name), "give a kubeconfig with --config or in the variable KUBECONFIG").is_file()


def _from_files(files: str, context: str | None) -> Access:
    configuration = Configuration()
    configuration.proxy = None
    try:
        contexts, active = _loader.list_kube_config_contexts(files)
        if context is not None:
            active = next((entry for entry in contexts if entry["name"] == context), None)
            if active is None:
                known = ", ".join(sorted(entry["name"] for entry in contexts))
                raise ConfigError(f"the kubeconfig {files} has no context {context}; it has {known or 'none'}")
        with _credentials_or_error():
            _loader.load_kube_config(files, context=context, client_configuration=configuration, persist_config=False)
        _use_credentials_or_error(configuration)
        namespace = active["context"].get("namespace") or "default"
    except _UNREADABLE as error:
        raise bad_config(error, files) from error
    return Access(configuration, namespace, f"context {active['name']} of {files}")


@contextmanager
def _credentials_or_error() -> Iterator[None]:
    """ConfigException where a credential plugin fails.

    The client logs that and goes on as nobody, whom the cluster then forbids all: the reason would be lost.
    """
    complaints: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            complaints.append(" ".join(record.getMessage().split()))

    root = logging.getLogger()
    handlers, root.handlers = root.handlers, [Listener(logging.ERROR)]
    try:
        yield
    finally:
        root.handlers = handlers
    if complaints:
        raise config.ConfigException(f"its credential plugin failed: {'; '.join(complaints)}")


def _use_credentials_or_error(configuration: Any) -> None:
    """The same where credentials expire later and the plugin is asked again."""
    refresh = configuration.refresh_api_key_hook
    if refresh is None:
        return

    def checked(configuration: Any) -> None:
        with _credentials_or_error():
            refresh(configuration)
        # the client puts its own hook there again
        configuration.refresh_api_key_hook = checked

    configuration.refresh_api_key_hook = checked


def _from_account(context: str | None) -> Access:
    if context is not None:
        raise ConfigError(f"there is no kubeconfig that could have a context {context}: leave it out or give --config")
    configuration = Configuration()
    configuration.proxy = None
    try:
        _loader.load_incluster_config(client_configuration=configuration)
        namespace = (_ACCOUNT / "namespace").read_text(encoding="utf-8").strip()
    except _UNREADABLE as error:
        raise bad_config(error, f"of the pod's service account ({_ACCOUNT})") from error
    return Access(configuration, namespace or "default", "the pod's service account")


def _adjusted(access: Access) -> Access:
    configuration = access.configuration
    # Nothing is repeated behind the user's back: what cannot be reached is reported at once, and a request that was not
    # answered may have been carried out.
    configuration.retries = False
    # as kubectl: the kubeconfig's proxy-url holds for all hosts; a proxy of the environment neither for those of
    # NO_PROXY nor for this machine's own addresses
    if configuration.proxy is not None:
        configuration.no_proxy = _NO_HOST
    elif not _is_loopback(configuration.host):
        proxies = getproxies()
        configuration.proxy = proxies.get(urlsplit(configuration.host).scheme) or proxies.get("all")
    if not configuration.verify_ssl:
        # the kubeconfig says insecure-skip-tls-verify, so the user knows
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    return access


def _is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
