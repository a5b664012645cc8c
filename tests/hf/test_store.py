"""HiddenStore: what is written is read, whole, or computed again."""

import hf_models
import pytest
import torch
from cases import asked_for
from hf_models import one_thread  # noqa: F401
from tolerances import HF_HIDDEN_ERROR, HF_STATISTIC_ERROR

from dlogp_kernels import hf


@pytest.fixture
def head():
    return hf.LmHead(torch.randn(7, 4), torch.randn(7), 3.0, 0.5)


@pytest.fixture
def store(tmp_path, head):
    return hf.HiddenStore.create(tmp_path / "hidden", head)


def samples(count: int = 4) -> list[tuple[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (f"set/{i}", torch.randint(3, hf_models.VOCABULARY - 2, (5 + i,), generator=generator).tolist())
        for i in range(count)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hidden_states_come_back_bit_for_bit_in_their_dtype(store, dtype):
    hidden = torch.randn(5, 6, 4).to(dtype)[:, 2]  # not contiguous
    store.write("a/b ü", hidden)
    assert store.has("a/b ü") and not store.has("a/b")
    assert store.keys() == ["a/b ü"]
    read = store.read("a/b ü")
    assert read.dtype == dtype and torch.equal(read, hidden)


@pytest.mark.parametrize("bias", [None, torch.randn(7)])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_the_last_layer_comes_back(tmp_path, bias, softcap):
    head = hf.LmHead(torch.randn(7, 4).bfloat16(), bias, softcap, 1 / 3)
    hf.HiddenStore.create(tmp_path, head)
    read = hf.HiddenStore.open(tmp_path).head()
    assert torch.equal(read.weight, head.weight) and read.weight.dtype == torch.bfloat16
    assert (read.bias is None) == (bias is None) and (bias is None or torch.equal(read.bias, bias))
    assert read.softcap == softcap and read.logit_scale == 1 / 3


def test_a_store_belongs_to_one_model(store, head):
    hf.HiddenStore.create(store.directory, head)
    for other in (head._replace(weight=head.weight + 1e-6), head._replace(softcap=None), head._replace(bias=None)):
        with pytest.raises(ValueError, match="another last layer"):
            hf.HiddenStore.create(store.directory, other)


def test_opening_something_else_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a directory that HiddenStore\.create made"):
        hf.HiddenStore.open(tmp_path)


def test_tokens_are_checked(store):
    store.write("a", torch.randn(3, 4), input_ids=[1, 2, 3])
    assert store.read("a", input_ids=torch.tensor([1, 2, 3])).shape == (3, 4)
    with pytest.raises(ValueError, match="other tokens"):
        store.read("a", input_ids=[1, 2, 4])
    with pytest.raises(ValueError, match="input_ids has 2 tokens, expected 3"):
        store.write("a", torch.randn(3, 4), input_ids=[1, 2])
    with pytest.raises(KeyError, match="no sample 'b'"):
        store.read("b")


@pytest.mark.parametrize("key", ["", ".hidden", "x" * 300, "ü" * 40])
def test_keys_without_a_file_name_are_an_error(store, key):
    with pytest.raises(ValueError, match="key is"):
        store.write(key, torch.randn(3, 4))


@pytest.mark.parametrize("key", ["../outside", "a/../../b", "/etc/x"])
def test_keys_stay_within_the_store(store, key):
    if key.startswith("."):
        with pytest.raises(ValueError, match="key is"):
            store.write(key, torch.randn(3, 4))
    else:
        store.write(key, torch.randn(3, 4))
        assert store.keys() == [key]
        assert [
            path.parent for path in store.directory.rglob("*.safetensors") if path.name != "lm_head.safetensors"
        ] == [store.directory / "samples"]


@pytest.mark.parametrize("left", [0, 5, 60, -1])
def test_a_truncated_file_is_named_and_computed_again(tmp_path, left):
    model = hf_models.tiny_model("qwen3")
    store = hf.store_base_hidden(model, samples(), tmp_path)
    expected = store.read("set/2").clone()
    (path,) = tmp_path.rglob("set%2F2.safetensors")
    path.write_bytes(path.read_bytes()[:left])
    assert not store.has("set/2") and store.has("set/1")
    with pytest.raises(ValueError, match=r"set%2F2\.safetensors: is truncated"):
        store.read("set/2")
    hf.store_base_hidden(model, samples(), tmp_path)
    assert torch.equal(store.read("set/2"), expected)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    model = hf_models.tiny_model("qwen3")
    runs: list[int] = []
    model.model.register_forward_hook(lambda *_: runs.append(1))

    def stop_at_the_third(key: str) -> None:
        if key == "set/2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf.store_base_hidden(model, samples(), tmp_path, progress=stop_at_the_third)
    runs.clear()
    done: list[str] = []
    store = hf.store_base_hidden(model, samples(), tmp_path, progress=done.append)
    assert len(runs) == 1
    assert done == store.keys() == [key for key, _ in samples()]
    # Another data set under the same keys is not taken for this one.
    runs.clear()
    changed = [(key, [*input_ids[:-1], 4]) for key, input_ids in samples()]
    hf.store_base_hidden(model, changed, tmp_path)
    assert len(runs) == 4
    with pytest.raises(ValueError, match="another last layer"):
        hf.store_base_hidden(hf_models.tiny_model("qwen3", seed=1), samples(), tmp_path)


def test_no_file_is_left_by_a_failed_write(store, monkeypatch):
    def fail(*_) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space left"):
        store.write("a", torch.randn(3, 4))
    assert not store.has("a") and store.keys() == [] and list((store.directory / "samples").iterdir()) == []


@pytest.mark.parametrize("prefill_chunk", [None, 3])
def test_metrics_from_a_store_are_those_of_the_two_models(tmp_path, prefill_chunk):
    model, base_model = hf_models.tiny_model("qwen3"), hf_models.tiny_model("gemma2", seed=1)
    hf.store_base_hidden(base_model, samples(), tmp_path, prefill_chunk=prefill_chunk)
    store = hf.HiddenStore.open(tmp_path)
    with torch.no_grad():
        for key, ids in samples():
            input_ids = torch.tensor([ids])
            hidden = store.read(key, input_ids=ids)[None]
            actual = hf.token_metrics(model, store.head(), input_ids, base_hidden=hidden)
            expected = hf.token_metrics(model, base_model, input_ids)
            for value, truth in zip(asked_for(actual), asked_for(expected), strict=True):
                assert (value - truth).abs().max() < (HF_STATISTIC_ERROR if prefill_chunk is None else HF_HIDDEN_ERROR)
