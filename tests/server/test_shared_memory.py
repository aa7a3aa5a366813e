import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from tests.server.transport_fixtures import Transports
from tritonclient.utils import InferenceServerException
from tritonclient.utils import shared_memory as shm

from hasten.server.by_size import SMALL
from hasten.server.inflight import InflightBytes
from hasten.server.protocol.shared_memory import FOLDER, MAX_REGIONS, SharedMemory
from hasten.server.types import ErrorKind, Parameter, ServiceError

NAME = f"hasten_test_{os.getpid()}"


@pytest.fixture
def path() -> Iterator[Path]:
    path = FOLDER / NAME
    path.write_bytes(bytes(range(64)))
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def memory(path: Path) -> SharedMemory:
    return SharedMemory(allowed=True)


def descriptors_of(path: Path) -> int:
    """Open in this process; what else it has open may close at any time."""
    links = (link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
    return sum(target == path for target in links)


def refused(memory: SharedMemory, name: str, key: str, offset: int, size: int) -> ServiceError:
    with pytest.raises(ServiceError) as error:
        memory.register(name, key, offset, size)
    assert memory.status() == []
    return error.value


def test_a_slice_is_what_the_client_wrote_and_reads_what_the_server_writes(memory: SharedMemory, path: Path) -> None:
    memory.register("r", f"/{NAME}", 16, 32)
    part = memory.slice("r", 4, 8)
    assert part.read() == bytes(range(24, 28))
    part.write("OUT", b"abcd")
    part.write("OUT", b"xy")
    content = path.read_bytes()
    assert content[24:28] == b"xycd"
    assert len(content) == 64


@pytest.mark.parametrize(
    "key", ["", "/", ".", "/..", "/../etc/passwd", "/a/b", "//etc", "etc/passwd", "/nothing_of_that_name", "/a\0b"]
)
def test_a_key_is_one_name_that_is_there(memory: SharedMemory, key: str) -> None:
    assert f"Unable to open shared memory region: '{key}'" in str(refused(memory, "r", key, 0, 8))


def test_a_link_leads_nowhere(memory: SharedMemory, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"0" * 64)
    link = FOLDER / f"{NAME}_link"
    link.symlink_to(tmp_path / "secret")
    try:
        refused(memory, "r", f"/{link.name}", 0, 8)
    finally:
        link.unlink()


def test_a_pipe_is_no_memory_and_does_not_hold_the_server_up(memory: SharedMemory) -> None:
    pipe = FOLDER / f"{NAME}_pipe"
    os.mkfifo(pipe)
    try:
        assert "no shared memory object" in str(refused(memory, "r", f"/{pipe.name}", 0, 8))
    finally:
        pipe.unlink()


@pytest.mark.parametrize(("offset", "size"), [(0, 65), (60, 5), (64, 1), (2**64 - 8, 16), (0, 0), (-1, 4), (0, -1)])
def test_a_region_lies_inside_its_object(memory: SharedMemory, offset: int, size: int) -> None:
    error = refused(memory, "r", f"/{NAME}", offset, size)
    assert "invalid args: offset" in str(error)
    assert error.kind is ErrorKind.INVALID


@pytest.mark.parametrize(
    ("size", "offset", "message"),
    [  # the texts of Triton 2.51.0
        (8, 25, "Invalid offset + byte size for shared memory region: 'r'"),
        (33, 0, "Invalid offset + byte size for shared memory region: 'r'"),
        (-1, 0, "Invalid offset + byte size for shared memory region: 'r'"),
        (8, -8, "Invalid offset for shared memory region: 'r'"),
        (8, 2**40, "Invalid offset for shared memory region: 'r'"),
    ],
)
def test_a_slice_lies_inside_its_region(memory: SharedMemory, size: int, offset: int, message: str) -> None:
    memory.register("r", f"/{NAME}", 16, 32)
    with pytest.raises(ServiceError) as error:
        memory.slice("r", size, offset)
    assert str(error.value) == message


def test_an_object_that_shrinks_is_an_error_and_no_crash(memory: SharedMemory, path: Path) -> None:
    memory.register("r", f"/{NAME}", 0, 64)
    part = memory.slice("r", 64)
    os.truncate(path, 8)
    with pytest.raises(ServiceError, match="Invalid offset"):
        part.read()
    with pytest.raises(ServiceError, match="Invalid offset"):
        part.write("OUT", bytes(64))
    assert path.stat().st_size == 8


def test_a_name_is_registered_once_and_forgotten_when_asked(memory: SharedMemory) -> None:
    memory.register("r", NAME, 0, 64)
    with pytest.raises(ServiceError, match="shared memory region 'r' already in manager") as error:
        memory.register("r", NAME, 0, 64)
    assert error.value.kind is ErrorKind.ALREADY_EXISTS
    assert [region.name for region in memory.status("r")] == ["r"]
    memory.unregister("nothing")
    memory.unregister("r")
    with pytest.raises(ServiceError, match="Unable to find system shared memory region: 'r'"):
        memory.status("r")


def test_a_slice_in_use_outlives_its_region_and_nothing_stays_open(memory: SharedMemory) -> None:
    alone = FOLDER / f"{NAME}_alone"
    alone.write_bytes(bytes(range(64)))
    try:
        memory.register("r", alone.name, 0, 64)
        part = memory.slice("r", 4)
        memory.unregister()
        assert part.read() == bytes(range(4))
        assert descriptors_of(alone) == 1
        del part
        assert descriptors_of(alone) == 0
    finally:
        alone.unlink()


def test_inputs_of_a_request_are_bounded_in_all(memory: SharedMemory, path: Path) -> None:
    memory = SharedMemory(allowed=True, max_request_bytes=32)
    memory.register("r", NAME, 0, 64)
    where: dict[str, Parameter] = {"shared_memory_region": "r", "shared_memory_byte_size": 16}
    read = memory.reader(InflightBytes().claim())
    assert read("a", {}) is None
    assert [read(name, where) for name in "ab"] == 2 * [bytes(range(16))]
    with pytest.raises(ServiceError, match="the inputs in shared memory have more than 32 bytes"):
        read("c", where)


def test_inputs_count_among_the_bytes_of_all_requests(memory: SharedMemory, path: Path) -> None:
    memory.register("r", NAME, 0, 64)
    inflight = InflightBytes(15)
    with inflight.claim() as claim:
        claim.grow(SMALL)
        with pytest.raises(ServiceError, match="requests of 0 bytes are in flight, and the limit is 15"):
            memory.reader(claim)("a", {"shared_memory_region": "r", "shared_memory_byte_size": 16})


def test_regions_are_bounded_in_number_and_name(memory: SharedMemory) -> None:
    for number in range(MAX_REGIONS):
        memory.register(f"r{number}", NAME, 0, 64)
    with pytest.raises(ServiceError, match="512 shared memory regions are registered, which is the limit"):
        memory.register("another", NAME, 0, 64)
    memory.unregister("r0")
    with pytest.raises(ServiceError, match="at most 256 characters, got 257"):
        memory.register("n" * 257, NAME, 0, 64)
    memory.register("n" * 256, NAME, 0, 64)


def test_it_is_off_unless_it_is_allowed(path: Path) -> None:
    with pytest.raises(ServiceError, match="--allow-client-shm") as error:
        SharedMemory().register("r", NAME, 0, 64)
    assert error.value.kind is ErrorKind.UNSUPPORTED


@pytest.mark.parametrize(
    ("parameters", "message"),
    [  # the texts of Triton 2.51.0
        ({"shared_memory_region": 5, "shared_memory_byte_size": 8}, "invalid value type for 'shared_memory_region'"),
        ({"shared_memory_byte_size": 8}, "'shared_memory_byte_size' can not be specified without"),
        (
            {"shared_memory_region": "r"},
            "'shared_memory_byte_size' must be specified along with 'shared_memory_region'",
        ),
        ({"shared_memory_region": "z", "shared_memory_byte_size": 8}, "Unable to find shared memory region: 'z'"),
    ],
)
def test_wrong_parameters_are_refused(memory: SharedMemory, parameters: dict[str, int | str], message: str) -> None:
    with pytest.raises(ServiceError, match=message):
        memory.slice_of("x", parameters)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_tritons_client_passes_tensors_in_shared_memory(transports: Transports, protocol: str) -> None:
    import tritonclient.http as httpclient

    kit = grpcclient if protocol == "grpc" else httpclient
    first, other = np.array([[1, 2.5]], np.float32), np.array([[10, 0.5]], np.float32)
    handle = shm.create_shared_memory_region("data", f"/{NAME}_client", 64)
    client = kit.InferenceServerClient(getattr(transports, protocol))
    try:
        shm.set_shared_memory_region(handle, [first, other])
        client.register_system_shared_memory("data", f"/{NAME}_client", 64)
        inputs = [kit.InferInput(name, [1, 2], "FP32") for name in ("INPUT0", "INPUT1")]
        for at, tensor in enumerate(inputs):
            tensor.set_shared_memory("data", 8, 8 * at)
        outputs = [kit.InferRequestedOutput(name) for name in ("OUTPUT0", "OUTPUT1")]
        outputs[0].set_shared_memory("data", 8, 32)
        result = client.infer("add", inputs, outputs=outputs)
        assert result.as_numpy("OUTPUT1").tolist() == (first - other).tolist()
        assert shm.get_contents_as_numpy(handle, np.float32, [1, 2], 32).tolist() == (first + other).tolist()
        outputs[0].set_shared_memory("data", 4, 32)
        # the text of Triton 2.51.0
        small = r"shared memory size specified with the request for output 'OUTPUT0' \(4 bytes\) should be at least 8"
        with pytest.raises(InferenceServerException, match=small):
            client.infer("add", inputs, outputs=outputs)
        client.unregister_system_shared_memory("data")
        with pytest.raises(InferenceServerException, match="Unable to find shared memory region: 'data'"):
            client.infer("add", inputs)
    finally:
        client.close()
        transports.memory.unregister()
        shm.destroy_shared_memory_region(handle)
