"""Configurations: the built-in ones, and every way in which a file can be wrong."""

import dataclasses

import pytest

from fastdit.models import VideoVAEConfig
from fastdit.training import config
from fastdit.training.config import Config


def load(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return config.load(path)


@pytest.mark.parametrize("name", config.names())
def test_built_in(name):
    loaded = config.load(name)
    assert loaded != Config() and loaded.vae.model.latent_channels == loaded.dit.model.in_channels
    assert config.build(Config, config.table(loaded)) == loaded


def test_defaults_are_the_articles():
    adamw = Config().dit.optimizer
    assert (adamw.lr, adamw.weight_decay) == (1e-4, 0.0)


def test_a_file_changes_what_it_names(tmp_path):
    lines = (
        "fps = 12",
        "[vae]",
        "crops = [[5, 32, 32]]",
        "[vae.model]",
        "widths = [8, 8]",
        "[dit.loop]",
        "bf16 = true",
    )
    loaded = load(tmp_path, "\n".join(lines))
    changed = dataclasses.replace(
        Config(),
        fps=12.0,
        vae=dataclasses.replace(Config().vae, crops=((5, 32, 32),), model=VideoVAEConfig(widths=(8, 8))),
        dit=dataclasses.replace(Config().dit, loop=dataclasses.replace(Config().dit.loop, bf16=True)),
    )
    assert loaded == changed


@pytest.mark.parametrize(
    "text, message",
    [
        ("[vae.optimizer]\nlearning_rate = 1", "unknown key vae.optimizer.learning_rate; .*expected one of .*lr"),
        ("[gan]\nlr = 1", "unknown key gan; got 'gan', expected one of dit, fps, vae"),
        ("[vae.model]\nwidth = 8", "unknown key vae.model.width; .*widths"),
        ("[vae.loop]\nsteps = 1.5", "wrong value of vae.loop.steps; got 1.5, expected int"),
        ("[vae.loop]\nbf16 = 1", "wrong value of vae.loop.bf16; got 1, expected bool"),
        ("vae = 3", "wrong value of vae; got 3, expected VAETraining"),
        ("[dit]\nsizes = [[5, 32]]", r"wrong value of dit.sizes\[0\]; got \[5, 32\]"),
        ("[dit.optimizer]\nschedule = 'linear'", "dit.optimizer.schedule; got 'linear', expected 'constant', 'cosine'"),
        ("[dit.optimizer]\nbetas = [0.9, 1.5]", r"dit.optimizer.betas is out of range; got 1.5, expected 0 to 1"),
        ("[dit.optimizer]\nlr = 0.0", "dit.optimizer.lr is out of range; got 0.0, expected more than 0"),
        ("[dit.optimizer]\nwarmup = -1", "dit.optimizer.warmup is out of range; got -1, expected 0 or more"),
        ("[dit]\ndrop_text = 2", "dit.drop_text is out of range; got 2.0, expected 0 to 1"),
        ("[dit]\nsizes = [[0, 32, 32]]", "dit.sizes is out of range; got 0, expected more than 0"),
        ("[dit.model]\nnum_heads = 5", r"\[dit.model\]: VideoDiT: heads must have an even width"),
        ("[dit.model]\nlearn_sigma = true", r"\[dit\]: .* disagree; got model.learn_sigma True"),
        ("[vae\nclips = 1", "is not TOML; got .*expected key = value lines"),
    ],
)  # fmt: skip
def test_wrong_files(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, text)


def test_no_such_configuration():
    with pytest.raises(ValueError, match=r"got 'shape', expected one of shapes, smoke or a TOML file"):
        config.load("shape")


def test_changes():
    before, after = config.table(Config()), config.table(dataclasses.replace(Config(), fps=4.0))
    assert config.changes(before, after) == ["fps: 8.0 -> 4.0"] and config.changes(before, before) == []
    assert config.changes({"a": {"b": 1}}, {"a": {"c": 2}}) == ["a.b: 1 -> None", "a.c: None -> 2"]
