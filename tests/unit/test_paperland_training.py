"""Training of the demo model: a run that was stopped goes on as if it had not been, and the heads stay behind."""

import os
import signal
from pathlib import Path

import pytest
import torch
from semantic_style.paperland import model as paperland
from semantic_style.paperland import train
from semantic_style.paperland.unet import UNetConfig

SMALL = UNetConfig(channels=32, multipliers=(1, 1, 2), context_channels=16, head_channels=16)
muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch before 2.9 has no Muon")


@pytest.fixture
def start(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    paperland.save(paperland.Paperland(SMALL), tmp_path / "start.safetensors", {})
    return tmp_path / "start.safetensors"


def settings(out: Path, start: Path, **changes) -> train.TrainingSettings:
    given = {"optimizer": "adamw", "steps": 4, "batch": 2, "lr": 1e-3, "warmup": 1, "cooldown": 1, "weight_sigma": 0.4}
    given |= {"object_weight": 2.0, "label_weight": 0.05, "ema": 0.9, "seed": 1, "device": "cpu"}
    return train.TrainingSettings(out, start, **given | {"save_every": 100, "sheet_every": 100} | changes)


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=muon)])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path, start, optimizer, monkeypatch):
    monkeypatch.setattr(train, "validate", lambda *_: {})
    monkeypatch.setattr(train, "write_sheet", lambda *_: None)
    before = signal.getsignal(signal.SIGTERM)
    train.train(settings(tmp_path / "whole", start, optimizer=optimizer))
    asked = train.losses_of

    def losses_of(model, heads, step, given):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return asked(model, heads, step, given)

    monkeypatch.setattr(train, "losses_of", losses_of)
    train.train(settings(tmp_path / "parts", start, optimizer=optimizer))
    assert torch.load(tmp_path / "parts" / "state.pt", weights_only=True)["step"] == 2
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.setattr(train, "losses_of", asked)
    train.train(settings(tmp_path / "parts", start, optimizer=optimizer))
    whole, parts = (paperland.load(tmp_path / p / "paperland.safetensors").state_dict() for p in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


@muon
def test_muon_changes_convolutions_and_matrices_in_place(start):
    """An orthogonal gradient is its own update, up to the size: Adam's, 0.2 for a root mean square."""
    from semantic_style.paperland.muon import Muon

    model = paperland.load(start).requires_grad_(True)
    inner = [p for p in model.unet.middle_block.parameters() if p.ndim > 1]
    assert {p.ndim for p in inner} == {2, 4}
    optimizer = Muon(inner)
    optimizer.param_groups[0]["lr"] = 0.1
    torch.manual_seed(0)
    for p in inner:
        p.grad = torch.nn.init.orthogonal_(torch.empty_like(p), gain=3.0)
    gradients = [p.grad for p in inner]
    before = [p.detach().clone() for p in inner]
    optimizer.step()
    for p, old, gradient in zip(inner, before, gradients, strict=True):
        update = (old * (1 - 0.1 * 0.01) - p.detach()) / 0.1
        assert torch.cosine_similarity(update.flatten(), gradient.flatten(), dim=0) > 0.999
        assert 0.1 < update.square().mean().sqrt() < 0.25
    optimizer.zero_grad()
    assert all(p.grad is None for p in inner)


def test_every_weight_has_one_optimizer(start):
    model = paperland.load(start).requires_grad_(True)
    heads = train.LabelHeads(model)
    for name in ["adamw"] + ["muon"] * hasattr(torch.optim, "Muon"):
        optimizers = train.optimizers_of(model, heads, name)
        places = [p.data_ptr() for o in optimizers for group in o.param_groups for p in group["params"]]
        wanted = [p.data_ptr() for p in (*model.parameters(), *heads.parameters())]
        assert sorted(places) == sorted(wanted)


def test_label_heads_teach_the_features_and_are_not_shipped(tmp_path, start):
    model = paperland.load(start).requires_grad_(True)
    heads = train.LabelHeads(model)
    for weight, taught in ((0.0, False), (0.05, True)):
        _, read = train.losses_of(model, heads, 0, settings(tmp_path, start, label_weight=weight))
        assert (read > 0) == taught
    read.backward()
    decoder = model.unet.output_blocks[0][0].out_layers[-1].weight
    assert decoder.grad is not None
    assert decoder.grad.abs().max() > 0
    assert not [k for k in model.state_dict() if "head" in k]


def test_objects_weigh_more_where_they_can_be_seen(tmp_path, start):
    """The weight changes the loss of the predicted v, and none of 0 is the plain one."""
    model = paperland.load(start)
    heads = train.LabelHeads(model)
    plain, heavy = (
        train.losses_of(model, heads, 0, settings(tmp_path, start, object_weight=w, label_weight=0.0))[0]
        for w in (0.0, 2.0)
    )
    batch = train.batch_of(0, settings(tmp_path, start))
    sigma = model.sigmas[batch.timesteps].view(-1, 1, 1, 1)
    a, s = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
    with torch.autocast("cpu", torch.bfloat16):
        v = model.unet(a * batch.clean + s * batch.noise, batch.timesteps.float(), model.text(batch.captions))
    error = (v.float() - (a * batch.noise - s * batch.clean)).square().mean(dim=(1, 2, 3))
    weight = (sigma**2 / (sigma**2 + 0.4**2)).flatten()
    assert plain == pytest.approx((weight * error).mean().item(), rel=1e-3)
    assert heavy != pytest.approx(plain.item(), rel=1e-4)
