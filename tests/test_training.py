import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import trees

import net
from proxy_anchor import checkpoint, exported, loss_registry, training
from proxy_anchor.embedding import Embedder
from proxy_anchor.spec import NetworkSpec

CPU = torch.device("cpu")


def setup(bn_freeze=True, optimizer="adamw", loss="Proxy_Anchor", lr=1e-3):
    network = net.create("tiny", 8, bn_freeze=bn_freeze)
    criterion = loss_registry.create(loss, 4, 8)
    return network, criterion, training.create_optimizer(optimizer, network, criterion, lr, 1e-4)


def batches(steps=2, size=4):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(size, 3, 64, 64, generator=generator), torch.arange(size) % 4) for _ in range(steps)]


def one_epoch(network, criterion, data, optimizer, epoch=0, embed=None, clip_proxies=True, clipped=True, **more):
    """train_one_epoch on images that are normalized already; embed: the network, or an Embedder around it."""
    embed = embed or network
    scaler = embed.scaler if isinstance(embed, Embedder) else torch.amp.GradScaler("cpu", enabled=False)
    clipped = [network, criterion][: 1 + clip_proxies] if clipped else []
    return training.train_one_epoch(
        network, lambda x, y: criterion(embed(x), y), data, optimizer, scaler, epoch, clipped, **more
    )


def train(network, criterion, optimizer, epoch, warm, data=None):
    training.set_trainable(network, epoch, warm)
    return one_epoch(network, criterion, data or batches(), optimizer, epoch)


def changed_by_training(network, criterion, optimizer, *settings):
    """Names of the tensors that change during an epoch of training, buffers included."""
    before = {k: v.clone() for k, v in (network.state_dict() | criterion.state_dict()).items()}
    train(network, criterion, optimizer, *settings)
    return {k for k, v in (network.state_dict() | criterion.state_dict()).items() if not torch.equal(v, before[k])}


def kinds(network):
    norms = {
        f"{name}.{part}"
        for name, m in network.named_modules()
        if isinstance(m, torch.nn.BatchNorm2d)
        for part in ("weight", "bias")
    }
    head = {"model.embedding.weight", "model.embedding.bias"}
    unused = {"model.fc.weight", "model.fc.bias"}
    convolutions = {k for k, _ in network.named_parameters()} - norms - head - unused
    statistics = {k for k, _ in network.named_buffers() if k in network.state_dict()}
    return norms, head, convolutions, statistics


@pytest.mark.parametrize("bn_freeze", [True, False])
@pytest.mark.parametrize("warm", [0, 1, 2])
def test_what_trains_in_which_epoch(bn_freeze, warm):
    """The published warm-up and BN-freeze, its end included, which makes frozen BatchNorm parameters trainable."""
    network, criterion, optimizer = setup(bn_freeze)
    norms, head, convolutions, statistics = kinds(network)
    for epoch in range(3):
        expected = head | {"proxies"}
        if not bn_freeze:
            expected |= statistics
        if epoch >= warm:
            expected |= convolutions
            if warm > 0 or not bn_freeze:
                expected |= norms
        assert changed_by_training(network, criterion, optimizer, epoch, warm) == expected


def test_parameter_groups():
    network, criterion, optimizer = setup(lr=1e-4)
    backbone, embedding, proxies = optimizer.param_groups
    assert [g["lr"] for g in optimizer.param_groups] == [1e-4, 1e-4, 1e-2]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [1e-4] * 3
    assert proxies["params"][0] is criterion.proxies
    assert embedding["params"][0] is network.model.embedding.weight
    assert len(backbone["params"]) + 2 == len(list(network.parameters()))


def test_loss_without_parameters_has_no_group():
    assert len(setup(loss="Contrastive")[2].param_groups) == 2


@pytest.mark.parametrize("name", training.OPTIMIZERS)
def test_optimizers(name):
    network, criterion, optimizer = setup(optimizer=name)
    settings = {"sgd": {"momentum": 0.9, "nesterov": True}, "rmsprop": {"alpha": 0.9, "momentum": 0.9}}.get(
        name, {"betas": (0.9, 0.999)}
    )
    assert settings.items() <= optimizer.param_groups[0].items()
    assert math.isfinite(train(network, criterion, optimizer, 0, 0))


@pytest.mark.parametrize("clip_proxies", [True, False])
def test_gradients_are_clipped_by_value(clip_proxies):
    network, criterion, optimizer = setup(optimizer="sgd", lr=0.0)
    big = torch.nn.Module()
    big.proxies = criterion.proxies
    big.forward = lambda x, y: 1e6 * criterion(x, y)
    one_epoch(network, big, batches(1), optimizer, clip_proxies=clip_proxies)
    assert max(p.grad.abs().max() for p in network.parameters() if p.grad is not None) == 10
    assert (criterion.proxies.grad.abs().max() == 10) == clip_proxies


@pytest.mark.parametrize("bn_freeze", [True, False])
def test_batch_of_one_image(bn_freeze):
    network, criterion, optimizer = setup(bn_freeze)
    assert math.isfinite(train(network, criterion, optimizer, 0, 0, batches(2, size=1)))


def test_loss_that_is_not_finite_stops_the_run():
    network, criterion, optimizer = setup()
    data = batches(6)
    data[2][0][0] = torch.nan
    with pytest.raises(FloatingPointError, match="nan in epoch 7, step 2, at learning rate 0.001"):
        train(network, criterion, optimizer, 7, 0, data)
    network, criterion, optimizer = setup()
    with pytest.raises(FloatingPointError, match="step 2"):  # also when it is the last step
        train(network, criterion, optimizer, 7, 0, data[:3])


def test_mean_loss_and_report():
    network, criterion, optimizer = setup()
    seen = []
    mean = one_epoch(network, criterion, batches(3), optimizer, report=seen.append)
    assert len(seen) == 3 and mean == pytest.approx(sum(seen) / 3)


# Checkpoints


@pytest.fixture
def network():
    return net.create("tiny", 8)


def test_checkpoint_has_the_published_layout(network, tmp_path):
    trees.save_checkpoint(tmp_path / "a.pth", network, {})
    content = torch.load(tmp_path / "a.pth", weights_only=True)  # as the published code reads it, up to weights_only
    assert list(content["model_state_dict"]) == list(network.state_dict())
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("zip_format", [True, False])
def test_checkpoints_of_the_published_code_load(network, tmp_path, prefix, zip_format):
    state = {prefix + key: value for key, value in network.state_dict().items()}
    torch.save({"model_state_dict": state}, tmp_path / "a.pth", _use_new_zipfile_serialization=zip_format)
    other = net.create("tiny", 8)
    assert checkpoint.load(tmp_path / "a.pth", other) == len(state)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), other.state_dict().values()))


def test_checkpoints_of_wrapped_parts_and_of_old_versions_load(network, tmp_path):
    """Prefixes inside the names; BatchNorm's counts, which old files lack; weights in other precisions."""
    state = network.state_dict()
    for change in (
        lambda key, value: {key.replace("model.", "model._orig_mod."): value},
        lambda key, value: {key.replace("model.", "model.module."): value},
        lambda key, value: {} if key.endswith("num_batches_tracked") else {key: value},
        lambda key, value: {key: value.half()},
        lambda key, value: {key: value.bfloat16()},
        lambda key, value: {key: value.double()},
    ):
        changed = {name: part for key, value in state.items() for name, part in change(key, value).items()}
        torch.save({"model_state_dict": changed}, tmp_path / "a.pth")
        other = net.create("tiny", 8)
        assert checkpoint.load(tmp_path / "a.pth", other) == len(changed)
        for key, value in other.state_dict().items():
            torch.testing.assert_close(value, state[key], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_no_real_numbers_are_refused(network, tmp_path, dtype):
    state = {key: value.to(dtype) for key, value in network.state_dict().items()}
    torch.save({"model_state_dict": state}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"a.pth has model.conv1.weight as {str(dtype)[6:]}: expected floating-point"):
        checkpoint.load(tmp_path / "a.pth", network)


@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, lambda value: value.to("meta")])
def test_weights_without_their_numbers_are_refused(network, tmp_path, change):
    state = network.state_dict()
    state["model.conv1.weight"] = change(state["model.conv1.weight"])
    torch.save({"model_state_dict": state}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth is not a checkpoint: expected an entry 'model_state_dict' of dense"):
        checkpoint.load(tmp_path / "a.pth", network)


def test_prefix_that_hides_another_tensor_is_refused(network, tmp_path):
    state = network.state_dict()
    torch.save({"model_state_dict": state | {"module.model.conv1.weight": state["model.conv1.weight"]}}, tmp_path / "a")
    with pytest.raises(ValueError, match="two tensors model.conv1.weight"):
        checkpoint.load(tmp_path / "a", network)


def test_other_network_is_refused_and_nothing_loaded(network, tmp_path):
    trees.save_checkpoint(tmp_path / "a.pth", network, {})
    for other in (net.create("tiny", 16), net.create("resnet34", 8), net.create("googlenet", 8)):
        before = {k: v.clone() for k, v in other.state_dict().items()}
        with pytest.raises(
            ValueError, match=r"another network: .* tensors differ .*expected .*found .*--embedding-size"
        ):
            checkpoint.load(tmp_path / "a.pth", other)
        assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


class RunsCode:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize("zip_format", [True, False])
def test_pickle_that_runs_code_is_refused(network, tmp_path, capsys, zip_format):
    torch.save({"model_state_dict": RunsCode()}, tmp_path / "a.pth", _use_new_zipfile_serialization=zip_format)
    with pytest.raises(ValueError, match="could run code"):
        checkpoint.load(tmp_path / "a.pth", network)
    assert "this must not run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "extra, held",
    [
        ({"best": np.float64(1)}, r"numpy\.\w+\.multiarray\.scalar"),
        ({"path": Path("a")}, r"pathlib\.\w+"),
        (None, "net.embedding_net.EmbeddingNet"),
    ],
    ids=str,
)
@pytest.mark.parametrize("zip_format", [True, False])
def test_refused_file_is_named_with_what_it_holds_and_the_lines_that_save_its_weights(
    network, tmp_path, monkeypatch, extra, held, zip_format
):
    """The two lines are run here: what they save loads."""
    monkeypatch.chdir(tmp_path)
    content = network if extra is None else {"model_state_dict": network.state_dict()} | extra
    torch.save(content, "a.pth", _use_new_zipfile_serialization=zip_format)
    with pytest.raises(ValueError, match=f"a.pth is refused, because it could run code: it holds {held}") as error:
        checkpoint.load("a.pth", network)
    message = str(error.value)
    lines = message[message.index("content = ") : message.index(" (the entry")]
    if extra is None:
        lines = lines.replace("content['model_state_dict']", "content.state_dict()")
    exec(lines, {"torch": torch})
    assert checkpoint.load("weights.pth", net.create("tiny", 8)) == len(network.state_dict())


@pytest.mark.parametrize(
    "record",
    [
        {"crop": math.nan},
        {"crop": 0.0},
        {"crop": math.inf},
        {"crop": 1e-9},
        {"crop": 5.0},
        {"crop": -0.5},
        {"l2_norm": -1},
        {"l2_norm": 2},
        {"image_size": 0},
        {"image_size": 10**6},
        {"embedding_size": 3_000_000},
        {"embedding_size": 2**31 - 1},
        {"embedding_size": -8},
        {"embedding_size": True},
        {"mean": [0.5, 0.5, math.nan]},
        {"std": [0.5, 0.0, 0.5]},
        {"std": [0.5, -0.5, 0.5]},
        {"std": [math.inf] * 3},
        {"model": "a\nTraceback: b"},
        {"model": "a" * 10**7},
        {"model": ""},
    ],
    ids=lambda record: str(record)[:40],
)
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_values_of_a_record_that_are_out_of_range_are_named(network, tmp_path, record, ending):
    whole = {"model": "tiny", "embedding_size": 8, "image_size": 32, "l2_norm": 1}
    path = tmp_path / f"a{ending}"
    if ending == ".pth":
        trees.save_checkpoint(path, network, whole | record)
    else:
        pytest.importorskip("safetensors")
        exported.save(path, ending, exported.InferenceNet(network, "cosine"), 32, {"network": whole | record})
    ((name, _),) = record.items()
    with pytest.raises(ValueError, match=f"a{ending} is damaged: its record of the network has {name} ") as error:
        checkpoint.Checkpoint(path)
    assert len(str(error.value)) < 300 + len(str(path)) and str(error.value).isprintable()
    NetworkSpec.from_record(whole)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 neither"])
def test_not_a_checkpoint(network, tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ValueError, match="a.pth is"):
        checkpoint.load(tmp_path / "a.pth", network)


def test_truncated_missing_or_other_content(network, tmp_path):
    trees.save_checkpoint(tmp_path / "a.pth", network, {})
    (tmp_path / "a.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:-1000])
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load(tmp_path / "a.pth", network)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoint.load(tmp_path / "b.pth", network)
    torch.save(network.state_dict(), tmp_path / "c.pth")
    with pytest.raises(ValueError, match="model_state_dict"):
        checkpoint.load(tmp_path / "c.pth", network)


def embedder(network, amp="none", scale=None, compiled=False):
    """An Embedder of images that are normalized already."""
    network.normalize = torch.nn.Identity()
    embed = Embedder(network, CPU, amp, compiled)
    if scale is not None:
        embed.scaler.scale(torch.zeros(()))  # makes its state
        embed.scaler.update(scale)
    return embed


def one_step(amp="none", scale=None, compiled=False, fused=None, memory_format=torch.contiguous_format):
    """Loss and gradients of one step of training."""
    torch.manual_seed(0)
    network, criterion, optimizer = setup(optimizer="sgd")
    if fused is not None:
        optimizer.param_groups[:] = [group | {"fused": fused, "foreach": False} for group in optimizer.param_groups]
    embed = embedder(network, amp, scale, compiled)
    network.to(memory_format=memory_format)
    data = [(images.contiguous(memory_format=memory_format), labels) for images, labels in batches(1)]
    loss = one_epoch(network, criterion, data, optimizer, embed=embed)
    parameters = [*network.parameters(), *criterion.parameters()]
    gradients = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    return loss, gradients, torch.cat([p.detach().flatten() for p in parameters])


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"compiled": True}, marks=pytest.mark.slow),
        {"memory_format": torch.channels_last},
        {"fused": False},
    ],
)
def test_what_makes_it_faster_changes_nothing(change):
    """One step's loss and gradients with and without torch.compile, channels_last and fused optimizers."""
    for ours, expected in zip(map(torch.as_tensor, one_step(**change)), map(torch.as_tensor, one_step())):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_fused_adamw_is_adamw():
    torch.manual_seed(0)
    start, gradient = torch.randn(50), torch.randn(3, 50)
    ends = []
    _, settings = training.OPTIMIZERS["adamw"]
    for make in [partial(torch.optim.AdamW, **choice) for choice in (settings, {"fused": False, "foreach": False})]:
        parameter = torch.nn.Parameter(start.clone())
        optimizer = make([parameter], lr=1e-2, weight_decay=1e-2)
        for step in gradient:
            parameter.grad = step.clone()
            optimizer.step()
        ends.append(parameter.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("amp, tolerance", [("bf16", 0.1), ("fp16", 0.03)])
def test_mixed_precision_steps_along_the_same_gradient(amp, tolerance):
    """The loss stays float32's but for the embeddings' rounding; fp16 gradients are unscaled before clipping."""
    # 65,536, the scale that is tried first, overflows here, and the step would be skipped.
    ours, expected = one_step(amp, 256.0), one_step()
    assert ours[0] == pytest.approx(expected[0], rel=tolerance)
    assert torch.nn.functional.cosine_similarity(ours[1], expected[1], dim=0) > 1 - tolerance
    assert float(ours[1].norm()) == pytest.approx(float(expected[1].norm()), rel=tolerance)
    assert ours[1].dtype == torch.float32


def test_scaler_skips_a_step_whose_gradients_overflow():
    network, criterion, optimizer = setup()
    before = criterion.proxies.detach().clone()
    embed = embedder(network, "fp16", 1e38)
    one_epoch(network, criterion, batches(1), optimizer, embed=embed)
    assert torch.equal(criterion.proxies, before) and embed.scaler.get_scale() < 1e38
    assert embed.scaler.remark() == "fp16: 1 steps skipped, as their gradients overflowed; the scale is 5e+37\n"
    assert embed.scaler.remark() == "" == embedder(network).scaler.remark()


def test_gradients_that_are_not_finite_are_named():
    """Proxy-NCA in two dimensions: the library's gradient is NaN, its loss is not."""
    network = net.create("tiny", 2)
    criterion = loss_registry.create("Proxy_NCA", 10, 2)
    optimizer = training.create_optimizer("adamw", network, criterion, 1e-3, 1e-4)
    data = [(torch.randn(20, 3, 32, 32), torch.arange(20) % 10) for _ in range(8)]
    words = (
        r"^The gradients of (\d+) of \1 parameters are not finite, or too large to square, in epoch 3, step \d, those "
        r"of the loss's own parameters first; the loss is \d"
    )
    with pytest.raises(FloatingPointError, match=words):
        one_epoch(network, criterion, data, optimizer, epoch=3, clip_proxies=False)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradients_of_the_network_that_are_not_finite(last, value):
    """In the last step of an epoch too. Infinite ones are clipped, as published, where gradients are clipped."""
    for clip in (True, False):
        network, criterion, optimizer = setup()
        network.model.conv1.weight.register_hook(lambda gradient: gradient.fill_(value))
        arguments = network, criterion, batches(1 if last else 3), optimizer
        if clip and value == math.inf:
            assert math.isfinite(one_epoch(*arguments))
        else:
            with pytest.raises(FloatingPointError, match=r"step 0, those of model\.conv1\.weight first"):
                one_epoch(*arguments, clipped=clip)


def test_an_enabled_scaler_skips_steps_instead():
    network, criterion, optimizer = setup()
    network.model.conv1.weight.register_hook(lambda gradient: gradient.fill_(math.inf))
    before = network.model.conv1.weight.clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    training.train_one_epoch(network, lambda x, y: criterion(network(x), y), batches(2), optimizer, scaler, 0)
    assert torch.equal(network.model.conv1.weight, before) and scaler.get_scale() == 4


def test_loss_without_attributes_learns_as_fast_as_the_network():
    network, criterion = net.create("tiny", 8), torch.nn.Linear(8, 4)
    groups = training.create_optimizer("adamw", network, criterion, 1e-3, 0).param_groups
    assert [group["lr"] for group in groups] == [1e-3] * 3
