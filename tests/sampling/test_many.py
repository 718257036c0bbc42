"""sample_many: the same samples in any batches and processes, without memory, after kill -9."""

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from k_diffusion.sampling import Cancelled, KSampler
from k_diffusion.sampling import many as many_module
from k_diffusion.utils.images import load_png
from k_diffusion.utils.memory import is_out_of_memory
from k_diffusion.utils.scheduler import KarrasScheduler

SHAPE = (3, 6, 6)
LEVELS = KarrasScheduler(0.05, 5)


def smooth(x, sigma, label=None):
    near = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    if label is not None:
        near = near + 0.2 * label.reshape(-1, 1, 1, 1)
    return torch.tanh(2 * near / (1 + sigma.reshape(-1, 1, 1, 1)))


def sampler_of(model=smooth, solver="euler_ancestral"):
    return KSampler(model, LEVELS, solver)


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory.")


def limited(most, batches, error=NO_MEMORY):
    """A model whose device holds so many samples; it notes the batches that it is asked for."""

    def model(x, sigma, **condition):
        batches.append(len(x))
        if len(x) > most:
            raise error
        return smooth(x, sigma, **condition)

    return model


def one_by_one(n, seed=0, steps=3, **options):
    return torch.cat(
        [
            sampler_of().sample(None, steps, shape=SHAPE, seeds=[seed + i], **options)
            for i in range(n)
        ]
    )


@pytest.mark.parametrize("batch_size", ["auto", 1, 3, 7])
def test_samples_do_not_depend_on_the_batches(batch_size):
    many = sampler_of().sample_many(7, steps=3, shape=SHAPE, seed=20, batch_size=batch_size)
    assert len(many) == 7
    drawn = list(many)
    assert [i for i, _ in drawn] == list(range(7))
    samples = torch.stack([sample for _, sample in drawn])
    assert (samples - one_by_one(7, 20)).abs().max() <= 1e-6
    assert torch.equal(many.collect(), samples)
    given = sampler_of().sample_many(3, steps=3, shape=SHAPE, seed=[22, 20, 26])
    assert (given.collect() - samples[[2, 0, 6]]).abs().max() <= 1e-6


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        MemoryError(),
    ],
)
def test_out_of_memory_loses_no_sample_and_draws_none_twice(error):
    batches = []
    many = sampler_of(limited(3, batches, error)).sample_many(
        11, steps=3, shape=SHAPE, seed=20, batch_size=8
    )
    drawn = list(many)
    assert [i for i, _ in drawn] == list(range(11))
    assert (torch.stack([s for _, s in drawn]) - one_by_one(11, 20)).abs().max() <= 1e-6
    assert many.batch_size == 2
    # Each sample is drawn in one run of three calls; a run that fails does so at its first call.
    assert batches == [8, 4, *[2] * 15, *[1] * 3]


def test_a_last_batch_that_does_not_fit_is_halved_itself():
    """Not the batch size, which it does not fill: half of that may be as many again."""
    batches = []
    many = sampler_of(limited(2, batches)).sample_many(5, steps=1, shape=SHAPE, batch_size=8)
    assert len(many.collect()) == 5
    assert batches == [5, 2, 2, 1]


def test_memory_is_given_back_when_nothing_of_the_failed_run_is_held(monkeypatch):
    held, given_back = [], []

    def model(x, sigma):
        if len(x) > 2:
            own = x.clone()
            held.append(weakref.ref(own))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return smooth(x, sigma)

    def release(device):
        given_back.append((device, [ref() is None for ref in held]))

    monkeypatch.setattr(many_module, "release_memory", release)
    sampler_of(model).sample_many(4, steps=1, shape=SHAPE, batch_size=4).collect()
    assert given_back == [(torch.device("cpu"), [True])]


def test_memory_that_runs_out_in_the_middle_of_a_run():
    calls = []

    def model(x, sigma):
        calls.append(len(x))
        if len(x) == 4 and len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return smooth(x, sigma)

    samples = sampler_of(model).sample_many(4, steps=3, shape=SHAPE, batch_size=4).collect()
    assert (samples - one_by_one(4)).abs().max() <= 1e-6
    assert calls == [4, 4, 4] + [2] * 6


def test_what_does_not_fit_alone_and_other_errors_are_raised():
    many = sampler_of(limited(0, [])).sample_many(3, steps=2, shape=SHAPE)
    with pytest.raises(torch.OutOfMemoryError, match=r"not even one sample of shape \(3, 6, 6\)"):
        list(many)
    many = sampler_of(limited(1, [], RuntimeError("shapes"))).sample_many(3, shape=SHAPE)
    with pytest.raises(RuntimeError, match="shapes"):
        list(many)
    assert not is_out_of_memory(ValueError("out of memory"))


def test_conditions_images_and_masks_go_with_their_samples():
    labels = torch.tensor([0.0, 3.0, -2.0, 1.0, 2.0])
    init = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(1)).tanh()
    mask = (torch.rand(5, 1, 6, 6, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    options = {"steps": 3, "shape": SHAPE, "seed": 4}
    told = {"condition": {"label": labels}, "init": init, "mask": mask}
    whole = sampler_of().sample(None, 3, {"label": labels}, init=init, mask=mask, seeds=range(4, 9))
    parts = sampler_of().sample_many(5, batch_size=2, **options, **told).collect()
    assert (parts - whole).abs().max() <= 1e-6
    told["condition"] = lambda indices: {"label": labels[indices]}
    called = sampler_of().sample_many(5, batch_size=2, **options, **told).collect()
    assert torch.equal(called, parts)
    one = {"condition": {"label": labels[1:2]}, "init": init[:1], "strength": 0.5}
    same = sampler_of().sample_many(5, batch_size=2, **options, **one).collect()
    each = sampler_of().sample(
        None, 3, {"label": labels[1:2].expand(5)}, init=init[:1], strength=0.5, seeds=range(4, 9)
    )
    assert (same - each).abs().max() <= 1e-6


@pytest.mark.parametrize("world", [2, 3])
def test_the_union_of_several_processes_is_what_one_draws(world, monkeypatch):
    whole = sampler_of().sample_many(7, steps=3, shape=SHAPE, batch_size=3).collect()
    union = {}
    for rank in range(world):
        if rank == 1:  # as torchrun says it
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(world))
            many = sampler_of().sample_many(7, steps=3, shape=SHAPE)
            monkeypatch.delenv("RANK")
            monkeypatch.delenv("WORLD_SIZE")
        else:
            many = sampler_of().sample_many(7, steps=3, shape=SHAPE, rank=rank, world=world)
        drawn = dict(many)
        assert not set(drawn) & set(union)
        union.update(drawn)
    assert sorted(union) == list(range(7))
    for i, sample in union.items():
        assert (sample - whole[i]).abs().max() <= 1e-6


def test_some_of_a_process_s_samples_are_drawn_alone():
    many = sampler_of().sample_many(7, steps=3, shape=SHAPE, rank=1, world=2)
    drawn = dict(many.draw([5, 1]))
    assert list(drawn) == [5, 1]
    whole = one_by_one(7)
    assert all((sample - whole[i]).abs().max() <= 1e-6 for i, sample in drawn.items())
    with pytest.raises(ValueError, match=r"sample 2 is none of process 1's range\(1, 7, 2\)"):
        many.draw([1, 2])


def test_to_disk_as_safetensors_png_or_by_a_function_of_ones_own(tmp_path):
    many = sampler_of().sample_many(3, steps=3, shape=SHAPE, seed=5)
    paths = many.save(tmp_path / "a")
    assert [p.name for p in paths] == [f"00000{i}.safetensors" for i in range(3)]
    assert torch.equal(load_file(paths[1])["sample"], many.collect()[1])
    pictures = sampler_of().sample_many(3, steps=3, shape=SHAPE, seed=5, to="uint8")
    paths = pictures.save(tmp_path / "b")
    image, text = load_png(paths[2])
    assert torch.equal(image, pictures.collect()[2])
    assert (text["seed"], text["index"]) == ("7", "2")
    paths = many.save(tmp_path / "c", write=lambda p, s: torch.save(s, p), suffix=".pt")
    assert torch.equal(torch.load(paths[0]), many.collect()[0])
    with pytest.raises(ValueError, match="give write and suffix together"):
        many.save(tmp_path / "d", suffix=".pt")
    for folder in "abc":
        assert len(list((tmp_path / folder).iterdir())) == 4  # the settings, and nothing half done


def test_a_folder_is_gone_on_with_and_grows_but_not_with_other_settings(tmp_path):
    batches = []
    make = lambda **o: sampler_of(limited(9, batches)).sample_many(  # noqa: E731
        **{"n": 4, "steps": 3, "shape": SHAPE, "seed": 5, **o}
    )
    make().save(tmp_path)
    (tmp_path / "000002.safetensors").unlink()
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    batches.clear()
    paths = make(n=6).save(tmp_path)
    assert batches == [3, 3, 3]  # three that were not there, in three calls
    assert len(paths) == 6
    for name, time in before.items():
        assert (tmp_path / name).stat().st_mtime_ns == time
    whole = make(n=6).collect()
    for path, sample in zip(paths, whole, strict=True):
        assert (load_file(path)["sample"] - sample).abs().max() <= 1e-6
    for other, name in (({"seed": 6}, "seed"), ({"steps": 4}, "steps"),
                        ({"noise": "path"}, "noise"), ({"shape": (3, 8, 8)}, "shape")):  # fmt: skip
        with pytest.raises(ValueError, match=f"holds samples with {name} = .*another folder"):
            make(**other).save(tmp_path)
    with pytest.raises(ValueError, match="holds samples with solver = 'euler_ancestral', and"):
        sampler_of(limited(9, []), "euler").sample_many(4, steps=3, shape=SHAPE, seed=5).save(
            tmp_path
        )
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match="holds 0.* but no settings.json"):
        make().save(tmp_path)


def test_settings_are_the_same_in_every_process(tmp_path):
    """Nothing in them is an address."""
    sampler_of().sample_many(
        1, steps=2, shape=SHAPE, normalise=lambda x: x, callback=lambda *a: None,
        cancel=threading.Event(),
    ).save(tmp_path)  # fmt: skip
    text = (tmp_path / "settings.json").read_text()
    assert " at 0x" not in text
    assert not {"callback", "cancel"} & set(json.loads(text))


SLOW = """
import sys, time
from pathlib import Path
import torch
from k_diffusion.sampling import KSampler
from k_diffusion.utils.scheduler import KarrasScheduler

def smooth(x, sigma):
    near = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    return torch.tanh(2 * near / (1 + sigma.reshape(-1, 1, 1, 1)))

def write(path, sample):
    path.write_bytes(b"half")  # what a killed process would leave
    if len(sys.argv) > 2 and len(list(Path(sys.argv[1]).glob("0*.pt"))) == 4:
        print("writing", flush=True)
        time.sleep(60)
    torch.save(sample, path)

many = KSampler(smooth, KarrasScheduler(0.05, 5), "euler_ancestral").sample_many(
    10, steps=3, shape=(3, 6, 6), seed=20, batch_size=3
)
many.save(sys.argv[1], write=write, suffix=".pt")
"""


def test_killed_while_it_writes_two_processes_complete_the_same_set(tmp_path):
    folder = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", SLOW, str(folder)]
    with subprocess.Popen(
        [*command, "slowly"], stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stdout.readline() == "writing\n"
        os.kill(process.pid, signal.SIGKILL)
    names = sorted(p.name for p in folder.iterdir())
    assert [n for n in names if n.startswith("0")] == [f"00000{i}.pt" for i in range(4)]
    assert len([n for n in names if n.endswith(".tmp")]) == 1
    processes = [  # and now two share what is left, as torchrun would start them
        subprocess.Popen(command, env={**environment, "RANK": str(rank), "WORLD_SIZE": "2"})
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    names = sorted(p.name for p in folder.iterdir())
    assert names == [*(f"00000{i}.pt" for i in range(10)), "settings.json"]
    for i, sample in enumerate(one_by_one(10, 20)):
        assert (torch.load(folder / f"00000{i}.pt") - sample).abs().max() <= 1e-6


def test_progress_shows_the_samples_drawn(capsys, tmp_path):
    many = sampler_of().sample_many(4, steps=2, shape=SHAPE, batch_size=2, progress=True)
    many.save(tmp_path)
    shown = capsys.readouterr().err
    assert "4/4" in shown
    assert "<00:00" in shown  # time left
    (tmp_path / "000003.safetensors").unlink()
    many.save(tmp_path)
    assert "3/4" in capsys.readouterr().err.split("\r")[1]  # it begins with what is there


def test_cancelling_ends_it_with_what_is_whole(tmp_path):
    cancel = threading.Event()

    def model(x, sigma):
        if len(list(tmp_path.glob("0*"))) == 2:
            cancel.set()
        return smooth(x, sigma)

    many = sampler_of(model).sample_many(6, steps=2, shape=SHAPE, batch_size=2, cancel=cancel)
    with pytest.raises(Cancelled):
        many.save(tmp_path)
    assert len(list(tmp_path.glob("0*"))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be a whole number of at least 1, got 0"),
        ({"n": 2.5}, "n must be a whole number of at least 1, got 2.5"),
        ({"batch_size": "all"}, "batch_size must be .* at least 1 or \"auto\", got 'all'"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"shape": None}, "needs the shape of a sample"),
        ({"seed": [1, 2]}, "3 samples need as many seeds, got 2"),
        ({"seed": 1.5}, "seed must be a whole number or one per sample, got 1.5"),
        ({"rank": 1}, "give rank and world together, got rank 1 of world None"),
        ({"rank": 2, "world": 2}, r"rank must lie in \[0, world\), got rank 2 of world 2"),
        ({"trajectory": True}, "sample_many takes no 'trajectory'"),
        ({"x": torch.zeros(1)}, "sample_many takes no 'x'"),
        ({"strenght": 0.5}, "sample_many takes no 'strenght'"),
    ],
)
def test_what_cannot_be_is_named(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        sampler_of().sample_many(**{"n": 3, "shape": SHAPE, **options})
    with pytest.raises(ValueError, match="process 3 of 5 has none of 2 samples"):
        sampler_of().sample_many(2, shape=SHAPE, rank=3, world=5).collect()
