import pytest

from hasten.server.security import Hosts

LOCAL, ANYWHERE = Hosts("127.0.0.1"), Hosts("0.0.0.0")


@pytest.mark.parametrize(
    ("host", "taken"),
    [
        ("localhost", True),
        ("LOCALHOST:8000", True),
        ("localhost.:8000", True),
        ("app.localhost:1", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("10.1.2.3:8000", True),
        ("", True),
        ("evil.example", False),
        ("evil.example:8000", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("notlocalhost", False),
        ("[", False),
        ("a b", False),
    ],
)
def test_a_port_of_this_machine_alone_knows_its_names(host: str, taken: bool) -> None:
    for hosts in (LOCAL, Hosts("localhost"), Hosts("::1"), Hosts("127.5.0.1")):
        for method in ("GET", "POST"):
            refusal = hosts.refusal(method, host, None)
            assert (refusal is None) is taken
            assert refusal is None or "--allowed-host" in refusal
    assert ANYWHERE.refusal("POST", host, None) is None


def test_names_may_be_allowed() -> None:
    named = Hosts("0.0.0.0", ["Model.Example", "b"])
    assert named.refusal("POST", "model.example:8000", None) is None
    assert named.refusal("POST", "10.0.0.1", None) is None
    assert named.refusal("POST", "localhost", None) is None
    assert named.refusal("GET", "evil.example", None) is not None
    assert Hosts("127.0.0.1", ["*"]).refusal("POST", "evil.example", "https://other.example") is None


@pytest.mark.parametrize(
    ("origin", "host", "taken"),
    [
        ("http://localhost:8000", "localhost:8000", True),
        ("http://127.0.0.1:8000", "127.0.0.1:8000", True),
        ("http://[::1]:8000", "[::1]:8000", True),
        ("https://localhost", "localhost", True),
        ("https://localhost", "localhost:443", True),
        ("http://localhost:3000", "localhost:8000", False),
        ("http://localhost", "localhost:8000", False),
        ("https://evil.example", "localhost:8000", False),
        ("http://localhost:8000.evil.example", "localhost:8000", False),
        ("null", "localhost:8000", False),
        ("", "localhost:8000", False),
        ("http://[", "localhost:8000", False),
        ("http://localhost:99999", "localhost:8000", False),
        ("https://evil.example", "", False),
    ],
)
def test_a_page_of_another_site_changes_nothing(origin: str, host: str, taken: bool) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        refusal = LOCAL.refusal(method, host, origin)
        assert (refusal is None) is taken
        assert refusal is None or "--allowed-host" in refusal
    for method in ("GET", "HEAD", "OPTIONS"):
        assert LOCAL.refusal(method, host, origin) is None


def test_a_page_behind_a_proxy_is_taken_once_its_name_is_allowed() -> None:
    assert ANYWHERE.refusal("POST", "internal:8000", "https://model.example") is not None
    allowing = Hosts("0.0.0.0", ["model.example", "internal"])
    assert allowing.refusal("POST", "internal:8000", "https://model.example") is None
