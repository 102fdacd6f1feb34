"""Settings: one declaration, four places to set it, and no value that makes no sense."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from thermocline.errors import SettingsError
from thermocline.settings import DECLARED, Kind, Settings, is_loopback, read_key

# For every setting a value that is not its default, as text.
OTHER = {
    "model": "models/other",
    "host": "127.0.0.2",
    "port": "1234",
    "api_key_file": "key.txt",
    "memory_bytes": "2GiB",
    "disk_path": "cache",
    "disk_bytes": "20GB",
    "redis_url": "redis://127.0.0.1:6380/1",
    "redis_password_file": "secret.txt",
    "redis_ca_file": "ca.pem",
    "node_socket": "node.sock",
    "redis_namespace": "team",
    "redis_bytes": "1GiB",
    "redis_ttl_seconds": "1h",
    "redis_prefix_tokens": "8192",
    "redis_gain_min": "2.5",
    "redis_wait_seconds": "20ms",
    "ttl_seconds": "24h",
    "tokens_per_block": "64",
    "threads": "2",
    "requests_max": "3",
    "prompt_tokens_max": "4096",
    "new_tokens_max": "128",
    "body_bytes_max": "1MiB",
    "lease_seconds": "5s",
    "receipts_kept": "9",
    "receipts_path": "/nowhere/receipts.jsonl",
    "receipts_bytes": "1MiB",
    "costs_path": "/nowhere/costs.json",
    "measured_path": "/nowhere/profile.json",
    "write_queue_bytes": "16MiB",
    "load_seconds_max": "500ms",
    "events_endpoint": "tcp://127.0.0.1:5557",
    "events_replay_endpoint": "tcp://127.0.0.1:5558",
    "events_name": "node-a",
    "route_to": "a=http://127.0.0.1:8001",
    "policy": "least_loaded",
    "tokenizer_path": "/models/m",
    "tenants_path": "/etc/keys.toml",
    "instance_key_file": "/etc/instances.key",
    "admin_socket": "/run/user/1000/gateway.sock",
    "events_listen": "tcp://127.0.0.1:5557",
    "gateway_processes": "4",
    "index_blocks": "1000000",
    "near_host": "127.0.0.2",
    "near_port": "6390",
    "near_unix_socket": "/run/near.sock",
    "near_password_file": "/etc/near.password",
    "near_memory_bytes": "2GiB",
    "near_connections_max": "64",
}


def _toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "thermocline.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", DECLARED)
def test_four_places(name, tmp_path):
    """Every setting can be set in the file, the environment and by a flag, and says which of them it was."""
    setting = DECLARED[name]
    path = _toml(tmp_path, f'{name} = "{OTHER[name]}"')
    loaded = {
        str(path): Settings.load(path, environ={}),
        setting.variable: Settings.load(environ={setting.variable: OTHER[name]}),
        setting.flag: Settings.load(environ={}, flags={name: OTHER[name]}),
    }
    for origin, settings in loaded.items():
        assert getattr(settings, name) == setting.parse(OTHER[name]) != setting.default
        assert settings.where_from(name) == origin
    assert Settings.load(environ={}).where_from(name) == "default"


def test_precedence(tmp_path):
    """A flag wins over the environment, the environment over the file, the file over the default."""
    path = _toml(tmp_path, 'port = 1\nthreads = 1\nmodel = "file"')
    environ = {"THERMOCLINE_PORT": "2", "THERMOCLINE_THREADS": "2", "THERMOCLINE_CONFIG": str(path)}
    settings = Settings.load(environ=environ, flags={"port": "3", "threads": None})
    assert (settings.port, settings.threads, settings.model, settings.receipts_kept) == (3, 2, "file", 1024)


def test_units():
    """Sizes are 1024 based with an i and 1000 based without, durations have the usual letters, case does not matter."""
    size, duration = DECLARED["disk_bytes"], DECLARED["ttl_seconds"]
    sizes = {
        "1GiB": 1 << 30,
        "512mib": 512 << 20,
        "2GB": 2 * 10**9,
        "1.5 GiB": 3 << 29,
        "67108864": 64 << 20,
        "1TB": 10**12,
    }
    assert {text: size.parse(text) for text in sizes} == sizes
    durations = {"24h": 86400.0, "90s": 90.0, "15m": 900.0, "7d": 604800.0, "2.5": 2.5, "1500ms": 1.5}
    assert {text: duration.parse(text) for text in durations} == durations


@pytest.mark.parametrize("name", DECLARED)
def test_defaults_are_valid(name):
    """A default, shown as text, reads back as itself, and has the type of its attribute."""
    setting = DECLARED[name]
    assert setting.parse(setting.show(setting.default)) == setting.default
    annotated = typing.get_type_hints(Settings)[name]
    assert isinstance(setting.default, annotated)
    assert setting.doc.endswith(".")


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("port", "99999", "at most 65535"),
        ("port", "-1", "at least 0"),
        ("port", "http", "whole number"),
        ("port", True, "whole number"),
        ("port", 80.5, "whole number"),
        ("tokens_per_block", "24", "multiple of 16"),
        ("memory_bytes", "1KiB", "at least 1MiB"),
        ("memory_bytes", "1 gigabyte", "a size such as"),
        ("memory_bytes", "-1GiB", "a size such as"),
        ("ttl_seconds", "soon", "a duration such as"),
        ("ttl_seconds", float("nan"), "at least 1s"),
        ("lease_seconds", "none", "a duration such as"),
        ("model", "", "not empty"),
        ("disk_path", 3, "must be a path"),
        ("disk_path", "~nobody-of-that-name/x", "no such user"),
    ],
)
def test_bad_values(name, raw, words):
    """A value of the wrong kind or out of range names the setting, the expectation, and carries a hint."""
    with pytest.raises(SettingsError, match=words) as caught:
        Settings.load(environ={}, flags={name: raw})
    assert caught.value.message.startswith(f"{name} = ")
    assert "Default:" in caught.value.hint


@example(name="redis_gain_min", raw=5.021095424358942e-142)
@example(name="redis_gain_min", raw=0.001953125)  # has more than six digits
@given(
    st.sampled_from(list(DECLARED)), st.text() | st.integers() | st.floats() | st.booleans() | st.none() | st.binary()
)
def test_any_value(name, raw):
    """Whatever is given, a setting is valid or refused with a SettingsError, and shown as text that reads back."""
    setting = DECLARED[name]
    try:
        settings = Settings(**{name: raw, "api_key_file": "key"} if name == "host" else {name: raw})
    except SettingsError:
        return
    value = getattr(settings, name)
    if setting.kind is not Kind.DURATION:  # shown rounded
        assert setting.parse(setting.show(value)) == value


@pytest.mark.parametrize(
    ("given_as", "words"),
    [
        ({"environ": {"THERMOCLINE_PROT": "1"}}, "did you mean THERMOCLINE_PORT"),
        ({"environ": {}, "flags": {"memory": "1GiB"}}, "did you mean memory_bytes"),
        ({"environ": {"THERMOCLINE_XYZZY": "1"}}, "thermocline config"),
    ],
)
def test_unknown_names(given_as, words):
    """An unknown setting is refused, with the nearest known name as the hint."""
    with pytest.raises(SettingsError, match="unknown setting") as caught:
        Settings.load(**given_as)
    assert words in caught.value.hint


@pytest.mark.parametrize(
    ("text", "words"),
    [("prot = 1", "unknown setting prot"), ("port 1", "is not TOML"), ("[server]\nport = 1", "unknown setting server")],
)
def test_broken_file(text, words, tmp_path):
    """A file with a mistake is refused, by name."""
    path = _toml(tmp_path, text)
    with pytest.raises(SettingsError, match=words) as caught:
        Settings.load(path, environ={})
    assert path.name in caught.value.message
    assert caught.value.hint


def test_missing_file(tmp_path):
    """A file that was named but cannot be read is an error, not an empty file."""
    with pytest.raises(SettingsError, match="cannot read"):
        Settings.load(tmp_path / "none.toml", environ={})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org"])  # noqa: S104  # they are refused
def test_open_host_needs_a_key(host):
    """An address that other machines reach is refused unless an API key protects it."""
    with pytest.raises(SettingsError, match="no API key") as caught:
        Settings(host=host)
    assert "api_key_file" in caught.value.hint
    assert Settings(host=host, api_key_file=Path("key")).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback(host):
    """Loopback addresses need no key."""
    assert is_loopback(host)
    assert Settings(host=host).host == host


def test_service_links():
    """Variables that Kubernetes sets for a service of our name are not taken for settings."""
    links = {
        "THERMOCLINE_PORT": "tcp://10.0.0.1:80",
        "THERMOCLINE_PORT_80_TCP": "x",
        "THERMOCLINE_SERVICE_HOST": "10.0.0.1",
    }
    assert Settings.load(environ=links) == Settings()


def test_frozen():
    """Settings do not change after they were checked."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().port = 1


def test_read_key(tmp_path):
    """The API key is the first line of its file; a file without one is refused."""
    path = tmp_path / "key"
    path.write_text("secret\nmore\n")
    assert read_key(path) == "secret"
    for content in (b"", b"\nsecret", "schlüssel".encode()):
        path.write_bytes(content)
        with pytest.raises(SettingsError) as caught:
            read_key(path)
        assert caught.value.hint
