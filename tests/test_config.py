"""Configuration: every layer is checked, later layers win, and nothing unknown passes."""

from pathlib import Path

import pytest

from nbdvde import config
from nbdvde.config import load, parse_compression, parse_disk_size, parse_extent_size, parse_size
from nbdvde.errors import ExitCode, UsageError

FULL = """
[server]
key_file = "/k"
listen = ["unix:/run/a", "[::1]:10809"]
export = "disk"
read_only = true
control = "none"
pid_file = "/run/pid"
print_uri = true
log_format = "json"
[limits]
connections = 7
handshake_s = 2
requests_in_flight = 9
bytes_in_flight = "8M"
server_bytes_in_flight = 4096
stop_s = 0.5
[engine]
cache_size = "128M"
write_buffer_size = "1G"
"""


def written(directory: Path, text: str) -> Path:
    path = directory / "server.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1", 1),
        ("512", 512),
        ("4K", 4096),
        ("10G", 10 << 30),
        ("3M", 3 << 20),
        ("2T", 2 << 40),
        ("1P", 1 << 50),
        ("1g", 1 << 30),
        ("1GiB", 1 << 30),
        ("1.5G", 3 << 29),
        ("1.3M", 1363148 - 1363148 % 512),
        ("0.5k", 512),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "K", "-1", "1.", ".5G", "1.5.1G", "1iB", "10 G", "10GB", "0x10", "1E", "٣", "1\n", "9" * 20]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert caught.value.exit_code == ExitCode.USAGE


def test_disk_sizes() -> None:
    assert parse_disk_size("512") == 512
    assert parse_disk_size(str((1 << 63) - 512)) == (1 << 63) - 512
    for absurd in ("0", "1", "511", "513", "8192P", str((1 << 63) - 511), str(1 << 63)):
        with pytest.raises(UsageError):
            parse_disk_size(absurd)


def test_extent_sizes() -> None:
    assert [parse_extent_size(text) for text in ("4K", "64K", "1M")] == [4096, 65536, 1 << 20]
    for wrong in ("0", "2K", "6K", "2M", "65537"):
        with pytest.raises(UsageError):
            parse_extent_size(wrong)


def test_compression() -> None:
    assert [parse_compression(text) for text in ("fastest", "none", "1", "22")] == ["fastest", "none", 1, 22]
    for wrong in ("", "0", "23", "best", "-1", "²"):
        with pytest.raises(UsageError):
            parse_compression(wrong)


def test_every_key_of_a_file(tmp_path: Path) -> None:
    options = load({}, written(tmp_path, FULL), {})
    assert options.server == config.ServerOptions(
        key_file="/k", listen=("unix:/run/a", "[::1]:10809"), export="disk", read_only=True, control="none",
        pid_file="/run/pid", print_uri=True, log_format="json",
    )  # fmt: skip
    assert options.limits == config.LimitOptions(
        connections=7, handshake_s=2.0, requests_in_flight=9, bytes_in_flight=config.Size(8 << 20),
        server_bytes_in_flight=config.Size(4096), stop_s=0.5,
    )  # fmt: skip
    assert options.engine == config.EngineOptions(
        cache_size=config.Size(128 << 20), write_buffer_size=config.Size(1 << 30)
    )


def test_defaults() -> None:
    assert load({"read_only": None}, None, {"PATH": "/bin"}) == config.Options()


def test_command_line_over_environment_over_file(tmp_path: Path) -> None:
    file = written(tmp_path, '[server]\nexport = "file"\npid_file = "file"\ncontrol = "file"\n')
    environment = {"NBDVDE_SERVER_EXPORT": "environment", "NBDVDE_SERVER_PID_FILE": "environment"}
    server = load({"export": "command"}, file, environment).server
    assert (server.export, server.pid_file, server.control) == ("command", "environment", "file")


def test_environment_has_types() -> None:
    options = load(
        {},
        None,
        {
            "NBDVDE_SERVER_LISTEN": "unix:/a,localhost:1",
            "NBDVDE_SERVER_READ_ONLY": "true",
            "NBDVDE_LIMITS_CONNECTIONS": "5",
            "NBDVDE_ENGINE_CACHE_SIZE": "1M",
        },
    )
    assert options.server.listen == ("unix:/a", "localhost:1")
    assert options.server.read_only is True
    assert options.limits.connections == 5
    assert options.engine.cache_size == 1 << 20


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[server]\nlisten_on = 1", "unknown key server.listen_on"),
        ("[sever]", "unknown table [sever]"),
        ("export = 'x'", "unknown table [export]"),
        ("[server]\nread_only = 'true'", "server.read_only: expected bool, got str"),
        ("[server]\nlisten = 'unix:/x'", "server.listen: expected array"),
        ("[server]\nlisten = [1]", "server.listen[0]: expected str"),
        ("[server]\nlog_format = 'xml'", "server.log_format: invalid enum value 'xml', expected text or json"),
        ("[server]\nmetrics_interval = 1e-9", "metrics_interval 1e-09 is neither 0 nor at least 0.1"),
        ("[server]\nmetrics_interval = nan", "metrics_interval nan"),
        ("server = 1", "server: expected a table"),
        ("[tls]\ncert = ''", "tls.cert: expected str of length >= 1"),
        ('[[disk]]\nname = "x"\nimage = "a\\u0000b"', "disk[0].image: expected str without zero bytes"),
        ("[limits]\nconnections = 0", "limits.connections: expected int >= 1"),
        ("[limits]\nstop_s = 0", "limits.stop_s: expected float > 0"),
        ("[engine]\ncache_size = '12X'", "engine.cache_size: size '12X'"),
        ("[engine]\ncache_size = true", "engine.cache_size: expected a size"),
        ("[engine]\ncache_size = 0", "engine.cache_size: expected a size above 0"),
        ("[cluster]\ncatch_up_rate = '1K'", "rate 1024: is less than 64K a second"),
        ("[server", "is not TOML"),
        ("x = " + "[" * 5000, "is not TOML: maximum recursion depth"),
        ("x = " + "9" * 5000, "is not TOML: Exceeds the limit"),
        ("x = '\udcff'", "is not TOML"),
    ],
)
def test_bad_file_is_named_with_its_key(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "server.toml"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError) as caught:
        load({}, file, {})
    line = str(caught.value)
    assert named in line
    assert str(file) in line
    assert "\n" not in line


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load({}, tmp_path / "none.toml", {})


@pytest.mark.parametrize(
    ("variable", "text", "named"),
    [
        ("NBDVDE_SERVER_FOO", "1", "unknown key server.foo"),
        ("NBDVDE_KEY", "hunter2", "unknown table [key]"),
        ("NBDVDE_", "1", "unknown table []"),
        ("NBDVDE_SERVER_READ_ONLY", "perhaps", "server.read_only: expected bool"),
        ("NBDVDE_LIMITS_CONNECTIONS", "many", "limits.connections: expected int"),
    ],
)
def test_bad_environment_is_named(variable: str, text: str, named: str) -> None:
    with pytest.raises(UsageError) as caught:
        load({}, None, {variable: text})
    assert named in str(caught.value)
    assert variable in str(caught.value)
    assert "hunter2" not in str(caught.value)


DISKS = """
[[disk]]
name = "a"
image = "/srv/a.vde"
key_file = "/k"
addresses = ["10.0.0.0/8", "unix"]
certificates = ["host"]
connections = 3
[[disk]]
name = "b"
memory = "1M"
description = "scratch"
read_only = true
"""


def test_disks(tmp_path: Path) -> None:
    first, second = load({}, written(tmp_path, DISKS), {}).disk
    assert (first.name, first.image, first.addresses, first.connections) == (
        "a",
        "/srv/a.vde",
        ("10.0.0.0/8", "unix"),
        3,
    )
    assert (second.memory, second.description, second.read_only) == (1 << 20, "scratch", True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[disk]]\nimage = 'x'", "missing required field `name`"),
        ("[[disk]]\nname = 'x'\nsize = 1", "size"),
        ("[disk]\nname = 'x'", "disk"),
        ("[[disk]]\nname = 'x'\naddresses = 'unix'", "addresses"),
        ("[[disk]]\nname = 'x'\nconnections = 0", "connections"),
    ],
)
def test_disks_that_cannot_be(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load({}, written(tmp_path, text), {})
    assert words.replace("`", "") in caught.value.message


def test_disks_are_in_the_file_only() -> None:
    with pytest.raises(UsageError, match="NBDVDE_DISK_NAME"):
        load({}, None, {"NBDVDE_DISK_NAME": "x"})
