"""Where a server is: the parts of its URL."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from hasten.core.errors import ConfigError

_PORTS = {"http": 80, "https": 443, "grpc": 8001, "grpcs": 443}


@dataclass(frozen=True)
class Address:
    """A server's address."""

    scheme: str
    host: str
    port: int
    path: str = ""
    """Without a slash at its end."""

    @property
    def tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self.scheme in ("https", "grpcs")

    @property
    def authority(self) -> str:
        """HOST:PORT, with brackets around an address of IPv6."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.path}"

    @classmethod
    def parse(cls, url: str, schemes: tuple[str, ...]) -> "Address":
        """From a URL of one of the schemes, the first of which may be left out; ConfigError says what is wrong."""
        try:
            parts = urlsplit(url if "://" in url else f"{schemes[0]}://{url}")
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"the URL {url!r} cannot be read: {error}") from None
        if parts.scheme not in schemes:
            raise ConfigError(f"the URL {url!r} does not begin with {' or '.join(f'{name}://' for name in schemes)}")
        if not parts.hostname:
            raise ConfigError(f"the URL {url!r} has no host, such as {schemes[0]}://localhost:8000")
        if parts.username is not None or parts.query or parts.fragment:
            raise ConfigError(f"the URL {url!r} has a user, a query or a fragment: give scheme, host, port and path")
        return cls(parts.scheme, parts.hostname, port or _PORTS[parts.scheme], parts.path.rstrip("/"))
