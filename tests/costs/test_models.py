"""Models by name: the table, folders, the hub's cache; and what their files say about weights."""

from __future__ import annotations

import contextlib
import json
from importlib import resources

import pytest

from thermocline.costs.geometry import Attention, geometry_of
from thermocline.costs.memory import sequence_bytes, state_bytes, token_bytes, weights_bytes
from thermocline.costs.models import find, table
from thermocline.errors import ModelError

CONFIG = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MIXED = CONFIG | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
COMPRESSED = {name for name, row in table().items() if row["kind"] == "compressed"}


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch, tmp_path):
    for name in ("HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def folder(path, config=CONFIG, **files):
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def tensors(path, **shapes):
    """A safetensors file of bf16 tensors, as its format says: length, header, bytes."""
    told, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * shape[1]
        told[name.replace("__", ".")] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps({"__metadata__": {"format": "pt"}, **told}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(end))


# -- the table ---------------------------------------------------------------------------------------------------------


def test_the_table():
    """It has 58 models; two of them have no figure of bytes per token, and are refused by name."""
    assert len(table()) == 58
    assert len(COMPRESSED) == 2
    for name in COMPRESSED:
        with pytest.raises(ModelError, match=name) as refused:
            find(name)
        assert refused.value.hint


@pytest.mark.parametrize("name", sorted(set(table()) - COMPRESSED))
def test_expected_values(name):
    """Every row of the table gives the bytes that are expected of it: per token, of the first token, of its states."""
    row, found = table()[name], find(name)
    assert token_bytes(found, "bf16") == row["expected_kv_bytes_per_token_bf16"]
    state = row.get("expected_state_bytes_per_sequence", 0)
    assert state_bytes(found) == state
    first = row.get("expected_kv_bytes_first_token_bf16")
    assert first is None or sequence_bytes(found, 1, "bf16") == first + state
    far = 1 << 22
    assert sequence_bytes(found, far + 1, "bf16") - sequence_bytes(found, far, "bf16") == token_bytes(found, "bf16")
    assert found.source
    assert found.model_type


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        ("deepseek-ai/DeepSeek-V3", 160),
        ("zai-org/GLM-5", 256),
        ("XiaomiMiMo/MiMo-V2-Flash", 160),
        ("Qwen/Qwen3-8B", 128),
    ],
)
def test_query_heads(name, elements):
    """A query head has the mean of its key and value side, also where K and V are kept as one latent vector."""
    assert find(name).query_head_dim == elements


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "qwen/qwen3-8b", "Qwen3-8B", "qwen3-8b"])
def test_found_by_name(name):
    """A name is found in any case, with and without the owner before it."""
    assert find(name).name == "Qwen/Qwen3-8B"


def test_near_names():
    """An unknown name is refused, with the nearest known ones."""
    with pytest.raises(ModelError, match="instrukt") as refused:
        find("qwen2.5-32b-instrukt")
    assert "Qwen/Qwen2.5-32B-Instruct" in refused.value.hint


@pytest.mark.parametrize("name", ["", "~nobody-is-called-so/m", "m" * 5000, "a/../b", "\0"])
def test_names_of_any_kind(name, tmp_path, monkeypatch):
    """A name that can be no path and no model is refused as any other one."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError):
        find(name)


def test_the_table_is_in_the_package():
    """The table comes with the package, with where each row is from."""
    text = json.loads(resources.files("thermocline.costs").joinpath("data", "models.json").read_text())
    assert all(row["src"] and row["evidence"] in text["evidence"] for row in text["models"].values())


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_folder_or_its_config(tmp_path):
    """A checkpoint is read by its folder or by its config.json, and named after the folder."""
    path = folder(tmp_path / "mine")
    by_folder, by_file = find(str(path)), find(str(path / "config.json"))
    assert by_folder == by_file
    assert (by_folder.name, by_folder.attention) == ("mine", (Attention(2, 4, 16, 16),))
    assert by_folder.source.endswith("config.json")
    assert by_folder.weights_bytes is by_folder.parameters_total is None


def test_the_hubs_cache(tmp_path, monkeypatch):
    """A model in the hub's cache on this machine is read from there, before the table is asked."""
    where = tmp_path / "hub" / "models--Qwen--Qwen3-8B"
    folder(where / "snapshots" / "abc")
    (where / "refs").mkdir()
    (where / "refs" / "main").write_text("abc\n")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    found = find("Qwen/Qwen3-8B")
    assert (found.name, found.hidden_size) == ("Qwen/Qwen3-8B", 64)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert find("Qwen/Qwen3-8B").hidden_size == 4096


def test_quantisation_beside(tmp_path):
    """ModelOpt writes what it did into a file of its own, which counts as if it stood in the config.json."""
    path = folder(
        tmp_path / "m", hf_quant_config={"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}
    )
    assert (find(str(path)).kv_dtype, find(str(path)).weights_dtype) == ("fp8", "fp4")
    assert find(str(folder(tmp_path / "n", hf_quant_config=[]))).weights_dtype == "bf16"


def test_weights_from_headers(tmp_path):
    """Bytes and parameters are summed from the headers of the safetensors files."""
    path = folder(tmp_path / "m")
    tensors(path / "model.safetensors", embed=(100, 64), head=(64, 10))
    found = find(str(path))
    assert (found.parameters_total, found.parameters_active, found.weights_bytes) == (7040, 7040, 14_080)
    assert weights_bytes(found) == 14_080
    assert weights_bytes(found, "fp8") == 7040


def test_active_parameters(tmp_path):
    """Of routed experts, only those that a token chooses are active."""
    path = folder(tmp_path / "m", MIXED, **{"model.safetensors.index": {"weight_map": {"a": "one", "b": "two"}}})
    tensors(path / "one", a=(100, 64))
    tensors(path / "two", layer__experts__0__w=(8, 80), layer__shared_experts__w=(1, 60))
    found = find(str(path))
    assert (found.parameters_total, found.parameters_active) == (7100, 6460 + 640 // 4)


def test_the_index_alone(tmp_path):
    """Where only the index of a checkpoint is here, its bytes are known and its parameters are not."""
    index = {"metadata": {"total_size": 16_060_522_496}, "weight_map": {"a": "model-00001-of-00004.safetensors"}}
    found = find(str(folder(tmp_path / "m", **{"model.safetensors.index": index})))
    assert (found.weights_bytes, found.parameters_total) == (16_060_522_496, None)
    with pytest.raises(ModelError, match="how many parameters"):
        weights_bytes(found, "fp8")


def headed(header):
    """A safetensors file with this header and nothing else."""
    return len(header).to_bytes(8, "little") + header


BACKWARDS = b'{"a": {"dtype": "BF16", "shape": [1], "data_offsets": [9, 1]}}'


@pytest.mark.parametrize(
    "damage",
    [b"", b"\xff" * 8, (1 << 40).to_bytes(8, "little"), headed(b"[]"), headed(b"[" * 100_000), headed(BACKWARDS)]
    + [headed(BACKWARDS.replace(b"[9, 1]", each)) for each in (b'["a", 1]', b"[1]", b"[0, 1e99]")]
    + [headed(BACKWARDS.replace(b'"BF16"', b"[]")), headed(BACKWARDS.replace(b"[1]", b'["x"]'))],
)
def test_damaged_weights(tmp_path, damage):
    """A file that is no safetensors file says nothing: sizes are unknown, and nothing large is read."""
    path = folder(tmp_path / "m")
    (path / "model.safetensors").write_bytes(damage)
    assert find(str(path)).weights_bytes is None


@pytest.mark.parametrize(
    "index", [[], {"weight_map": {"a": 5}}, {"weight_map": {"a": "x"}, "metadata": {"total_size": "many"}}]
)
def test_damaged_index(tmp_path, index):
    """An index of weights that is none says nothing."""
    assert find(str(folder(tmp_path / "m", **{"model.safetensors.index": index}))).weights_bytes is None


def test_damaged_names(tmp_path):
    """Names of weights that can be no file are passed over; nothing is read that is not in the folder."""
    path = folder(tmp_path / "m", **{"model.safetensors.index": {"weight_map": {"a": "x\0", "b": ".."}}})
    assert find(str(path)).weights_bytes is None


@pytest.mark.parametrize("experts", ["many", [8], {}])
def test_damaged_experts(tmp_path, experts):
    """A number of experts that is none is refused with the path, or there are none."""
    with contextlib.suppress(ModelError):
        assert find(str(folder(tmp_path / "m", MIXED | {"num_experts": experts}))).parameters_total is None


@pytest.mark.parametrize("text", ["", "[]", "{", "[1, 2]", '{"a":' * 9000])
def test_damaged_config(tmp_path, text):
    """A config.json that is none is refused with its path."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json") as refused:
        find(str(tmp_path))
    assert refused.value.hint


def test_no_path_leaves_the_folder(tmp_path):
    """An index that names files elsewhere is not followed there."""
    tensors(tmp_path / "secret", a=(1, 1))
    path = folder(tmp_path / "m", **{"model.safetensors.index": {"weight_map": {"a": "../secret"}}})
    assert find(str(path)).weights_bytes is None


def test_as_the_table():
    """A published configuration reads as the table has it."""
    config = CONFIG | {"hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 64, "head_dim": 128}
    found = geometry_of(config | {"model_type": "qwen3", "num_key_value_heads": 8}, "x")
    assert found.attention == find("Qwen/Qwen3-32B").attention
