"""sample_many: what belongs to which sample, and what a folder of samples is held to."""

import collections
import functools
import os

import pytest
import torch
from safetensors.torch import load_file

from k_diffusion.denoiser import FunctionDenoiser
from k_diffusion.guidance import (
    Cached,
    Clamp,
    Composed,
    DynamicThreshold,
    Guided,
    Part,
    SwitchAt,
    apg,
    autoguidance,
    cfg,
    cfg_zero_star,
    posterior_sampling,
    pseudo_inverse,
)
from k_diffusion.sampling import KSampler
from k_diffusion.sampling.settings import described_model, digest
from k_diffusion.utils.scheduler import KarrasScheduler

LEVELS = KarrasScheduler(0.05, 5)


def smooth(x, sigma, label=None):
    near = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    if label is not None:
        near = near + 0.2 * label.reshape(-1, 1, 1, 1)
    return torch.tanh(2 * near / (1 + sigma.reshape(-1, 1, 1, 1)))


def many(n, model=smooth, shape=(3, 6, 6), **options):
    return KSampler(model, LEVELS, "euler").sample_many(n, steps=2, shape=shape, **options)


@pytest.mark.parametrize("batch_size", [1, 4, 8])
@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (1, 1, 8, 1)])
def test_a_mask_for_all_samples_is_one_though_its_height_is_their_number(shape, batch_size):
    mask = torch.zeros(shape)
    mask[..., 4:, :] = 1
    init = torch.full((1, 3, 8, 8), 0.5)
    drawn = many(8, shape=(3, 8, 8), init=init, mask=mask, batch_size=batch_size).collect()
    whole = KSampler(smooth, LEVELS, "euler").sample(
        None, 2, init=init.expand(8, -1, -1, -1), mask=mask, seeds=range(8)
    )
    assert (drawn - whole).abs().max() <= 1e-6


def test_a_condition_whose_rows_are_no_samples_is_refused():
    with pytest.raises(
        ValueError, match=r"condition 'context' has shape \(7, 4\), and there are 5"
    ):
        many(5, condition={"context": torch.zeros(7, 4)})
    with pytest.raises(ValueError, match=r"init has shape \(4, 3, 6, 6\), and there are 5 samples"):
        many(5, init=torch.zeros(4, 3, 6, 6), strength=0.5)


def test_lists_are_one_item_a_sample_and_named_tuples_stay():
    seen = []
    Text = collections.namedtuple("Text", "words mask")

    def model(x, sigma, prompt, text, pair):
        seen.append((prompt, text.words.tolist(), text.mask, [v.tolist() for v in pair]))
        assert isinstance(text, Text)
        return smooth(x, sigma)

    condition = {
        "prompt": list("abcde"),
        "text": Text(torch.arange(5), "one"),
        "pair": [torch.arange(5), torch.tensor([7])],
    }
    KSampler(model, LEVELS, "euler").sample_many(
        5, steps=1, shape=(3, 6, 6), condition=condition, batch_size=3
    ).collect()
    assert seen == [
        (["a", "b", "c"], [0, 1, 2], "one", [[0, 1, 2], [7, 7, 7]]),
        (["d", "e"], [3, 4], "one", [[3, 4], [7, 7]]),
    ]


def test_the_folder_is_listed_a_few_times_whatever_it_holds(tmp_path, monkeypatch):
    """Once for each sample was 50 000 listings of 50 000 names before the first call."""
    many(30).save(tmp_path)
    (tmp_path / ".000003.safetensors.77.tmp").write_text("half")
    (tmp_path / ".000004.safetensors.77.tmp").write_text("another process is at it")
    (tmp_path / ".notes.tmp").write_text("not ours")
    listed, scan = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scan(path))
    many(30, rank=1, world=2).save(tmp_path)
    monkeypatch.undo()
    assert len(listed) <= 3
    left = sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".tmp")
    assert left == [".000004.safetensors.77.tmp", ".notes.tmp"]


def told_by(scale, towards):
    def score(x0, sigma):
        return -scale * (x0 - towards).square().flatten(1).sum(1)

    return score


def distance(x0, sigma, to):
    return -(x0 - to).square().flatten(1).sum(1)


def double(x):
    return 2 * x


ONE, TWO = torch.zeros(1, 3, 6, 6), torch.ones(1, 3, 6, 6)
LABEL = {"label": torch.tensor([1.0])}
OTHERS = {  # pairs of guidance that draw other samples
    "scale": (lambda m: cfg(m, 4.0), lambda m: cfg(m, 9.0)),
    "scale a sample": (
        lambda m: cfg(m, torch.tensor([4.0])),
        lambda m: cfg(m, torch.tensor([9.0])),
    ),
    "interval": (lambda m: cfg(m, 4.0), lambda m: cfg(m, 4.0, interval=(0.1, 5))),
    "null": (lambda m: cfg(m, 4.0), lambda m: cfg(m, 4.0, null=LABEL)),
    "rescale": (lambda m: cfg(m, 4.0, rescale=0.5), lambda m: cfg(m, 4.0, rescale=0.7)),
    "kind": (lambda m: cfg(m, 4.0), lambda m: apg(m, 4.0)),
    "momentum": (lambda m: apg(m, 4.0), lambda m: apg(m, 4.0, momentum=-0.7)),
    "still": (lambda m: cfg_zero_star(m, 4.0, still=0), lambda m: cfg_zero_star(m, 4.0, still=2)),
    "inside": (lambda m: Clamp(cfg(m, 4.0)), lambda m: Clamp(cfg(m, 9.0))),
    "weaker": (lambda m: autoguidance(m, Clamp(m), 4.0), lambda m: autoguidance(m, m, 4.0)),
    "low": (lambda m: Clamp(m), lambda m: Clamp(m, -2.0)),
    "quantile": (lambda m: DynamicThreshold(m), lambda m: DynamicThreshold(m, 0.9)),
    "weight": (lambda m: Composed(m, [Part(LABEL)]), lambda m: Composed(m, [Part(LABEL, 3.0)])),
    "part": (
        lambda m: Composed(m, [Part({"label": ONE})]),
        lambda m: Composed(m, [Part({"label": TWO})]),
    ),
    "mask": (
        lambda m: Composed(m, [Part(LABEL, mask=ONE)]),
        lambda m: Composed(m, [Part(LABEL, mask=TWO)]),
    ),
    "a score's number": (
        lambda m: Guided(m, told_by(1, ONE)),
        lambda m: Guided(m, told_by(2, ONE)),
    ),
    "a score's image": (lambda m: Guided(m, told_by(1, ONE)), lambda m: Guided(m, told_by(1, TWO))),
    "a partial score": (
        lambda m: Guided(m, functools.partial(distance, to=ONE)),
        lambda m: Guided(m, functools.partial(distance, to=TWO)),
    ),
    "largest": (
        lambda m: Guided(m, told_by(1, ONE)),
        lambda m: Guided(m, told_by(1, ONE), largest=0.1),
    ),
    "operator": (
        lambda m: posterior_sampling(m, double, ONE),
        lambda m: posterior_sampling(m, torch.abs, ONE),
    ),
    "measured": (
        lambda m: posterior_sampling(m, double, ONE),
        lambda m: posterior_sampling(m, double, TWO),
    ),
    "noise": (
        lambda m: pseudo_inverse(m, double, ONE),
        lambda m: pseudo_inverse(m, double, ONE, noise=0.1),
    ),
    "threshold": (lambda m: Cached(m, 0.02), lambda m: Cached(m, 0.05)),
    "ratio": (lambda m: SwitchAt(m, m, 1.0), lambda m: SwitchAt(m, m, 2.0)),
    "refiner": (lambda m: SwitchAt(m, m, 1.0), lambda m: SwitchAt(m, Clamp(m), 1.0)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_guidance_is_another_set(name):
    model = FunctionDenoiser(smooth)
    one, other = OTHERS[name]
    assert described_model(one(model)) != described_model(other(model))
    for make in (one, other):
        text = described_model(make(model))
        assert text == described_model(make(FunctionDenoiser(smooth)))
        assert " at 0x" not in text
        assert "FunctionDenoiser" in text


def test_a_folder_is_not_gone_on_with_by_other_guidance(tmp_path):
    guided = Cached(cfg(smooth, 4.0), 0.02)
    options = {"condition": {"label": torch.tensor([1.0])}}
    many(2, guided, **options).save(tmp_path)
    many(3, guided, **options).save(tmp_path)  # what it has counted by now is no setting
    with pytest.raises(ValueError, match=r"holds samples with model = '.*scale=4.0.*scale=9.0"):
        many(2, Cached(cfg(smooth, 9.0), 0.02), **options).save(tmp_path)


def test_a_folder_is_held_to_its_conditions_and_images_sample_by_sample(tmp_path):
    labels = torch.arange(6.0)
    init, mask = torch.zeros(6, 3, 6, 6), torch.ones(6, 6)
    mask[:3] = 0

    def save(n, labels=labels, init=init, mask=mask, text="abcdef"):
        images = {"init": init[:n], "mask": mask} if init is not None else {}
        text = text and {"label": labels[:n]}
        many(n, condition=text, **images).save(tmp_path)

    save(3)
    save(5)  # a set may grow
    save(2)
    for changed, number in (
        ({"labels": labels + (labels == 4)}, 4),
        ({"init": init + (torch.arange(6) == 1).reshape(-1, 1, 1, 1)}, 1),
        ({"mask": mask.T.contiguous()}, 0),
    ):
        with pytest.raises(ValueError, match=f"holds sample {number} with another condition"):
            save(5, **changed)
    save(5)
    with pytest.raises(ValueError, match="with a condition or image, and this run has none"):
        save(5, init=None, text=None)
    other = tmp_path / "other"
    many(2).save(other)
    with pytest.raises(ValueError, match="with no condition or image, and this run has one"):
        many(2, condition={"label": torch.tensor([1.0])}).save(other)
    many(2, condition=lambda i: {"label": torch.tensor(i)}).save(tmp_path / "called")
    with pytest.raises(ValueError, match="condition = .*lambda"):
        many(2).save(tmp_path / "called")


@pytest.mark.parametrize("called", [False, True])
def test_a_set_whose_guidance_holds_one_value_a_sample_may_grow(tmp_path, called):
    """What each sample is told is compared sample by sample, be it bound to the guidance."""
    scales, masks = torch.arange(1.0, 7.0), torch.ones(6, 1, 6, 6)

    def model_of(n, scales=scales, masks=masks, low=-1.0):
        guided = cfg(smooth, scales[:n], null={"label": -scales[:n]})
        return Clamp(Composed(guided, [Part({"label": ONE[:, 0, 0, 0]}, 2.0, masks[:n])]), low)

    def one(rows):
        return {"label": torch.ones(len(rows))}

    def all_of(n, **changed):
        condition = one if called else one([0])
        return many(n, model_of(n, **changed), batch_size=4, condition=condition)

    def save(n, **changed):
        return [load_file(path)["sample"] for path in all_of(n, **changed).save(tmp_path)]

    few, more = save(3), save(6)
    assert all(torch.equal(a, b) for a, b in zip(few, more, strict=False))
    assert (torch.stack(more) - all_of(6).collect()).abs().max() <= 1e-6
    save(2)
    others = {"scales": scales + (torch.arange(6) == 4),
              "masks": masks * (torch.arange(6) != 4).reshape(-1, 1, 1, 1)}  # fmt: skip
    for name, value in others.items():
        with pytest.raises(ValueError, match="holds sample 4 with another condition, image or gui"):
            save(5, **{name: value})
    save(4, **others)
    with pytest.raises(ValueError, match="holds samples with model = "):
        save(6, low=-2.0)


def test_digests_are_of_the_values_however_they_lie():
    wide = torch.arange(12.0).reshape(3, 4)
    for view, same in (
        (wide[1:2, 2], torch.tensor([6.0])),  # of one value, with a stride
        (wide[:, 1], torch.tensor([1.0, 5.0, 9.0])),
        (wide.T, wide.T.contiguous()),
        (wide[0, 0], torch.tensor(0.0)),
        (wide[:0], torch.zeros(0, 4)),
    ):
        assert digest(view) == digest(same)
    assert digest(wide) != digest(wide.reshape(4, 3)) != digest(wide.double().reshape(4, 3))
    assert digest(wide.bfloat16()) == digest(wide.bfloat16().clone())
