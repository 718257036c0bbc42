"""Tracing, liveness and engine against plain arithmetic, on solvers that nobody would write."""

import random

import pytest
import torch

from k_diffusion.sampling import Level, Levels, Run, Solver, make_plan
from k_diffusion.sampling.plan_file import plan_from_dict, plan_to_dict


def random_solver(seed, queries, outputs):
    """A generator of random sums, differences, scalings, noise and states kept for later.

    Its choices come from the seed, so that it does the same on symbols and on tensors.
    """

    def generator(x, levels, noise):
        r = random.Random(seed)
        pool, held, drawn = [x], x, 0
        asked = [s for s, _ in levels.pairs()]
        for q in range(queries):
            for _ in range(r.randrange(5)):
                a, b = r.choice(pool), r.choice(pool)
                kind = r.randrange(8)
                if kind == 0:
                    value = a + b
                elif kind == 1:
                    value = a - b
                elif kind == 2:
                    value = a * r.choice([0.5, -1.0, 1.0, 0.0, 2.0, r.uniform(-1, 1)])
                elif kind == 3:
                    value = -a
                elif kind == 4:
                    value = a / r.choice([2.0, 3.0, -1.5])
                elif kind == 5:
                    drawn += 1  # the level names the draw, for `numbered` below
                    value = a + r.uniform(0.1, 1) * noise(
                        Level(1.0, 1000.0 + drawn), Level(1.0, 1.0), fresh=True
                    )
                elif kind == 6:
                    value = (a - b) * 0.5 + b * 0.5 - a * 0.5 + b * 0.0 + b * 0.5  # cancels
                else:
                    value = sum(r.uniform(-1, 1) * p for p in r.sample(pool, min(len(pool), 3)))
                pool.append(value)
            if len(pool) > 5:
                pool = r.sample(pool, r.randrange(1, 6))
            state = held if r.random() < 0.2 else r.choice(pool)
            held = state
            answer = yield state, asked[q]
            pool.extend([answer] if outputs == 1 else answer)
        if r.random() < 0.7:
            return sum(r.uniform(-1, 1) * p for p in pool)
        return r.choice(pool)

    return generator


def numbered(number, like):
    generator = torch.Generator().manual_seed(round(number))
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)


class Numbered:
    """Noise that is a function of the level it was asked from."""

    def __init__(self, like):
        self.like = like

    def draw(self, interval):
        return numbered(interval.start.sigma, self.like)


def denoise(x, sigma, outputs):
    return (torch.tanh(x) + 0.1 * sigma, torch.sin(x))[:outputs]


def run_plainly(generator, levels, x, outputs):
    """All queried states and the result, by the generator itself on tensors."""
    states, answer = [], None
    steps = generator(x, levels, lambda a, b, fresh=False: numbered(a.sigma, x))
    while True:
        try:
            state, level = steps.send(answer)
        except StopIteration as stop:
            return [*states, stop.value]
        states.append(state)
        answers = denoise(state, level.sigma, outputs)
        answer = answers[0] if outputs == 1 else answers


def traced(solver, levels, intervals):
    try:
        return make_plan(solver, levels, intervals=intervals)
    except ValueError as error:
        if "all terms cancel" not in str(error):
            raise
        return None


@pytest.mark.parametrize("block", range(8))
@pytest.mark.parametrize("intervals", [False, True])
def test_engine_is_plain_arithmetic(block, intervals):
    refused = 0
    for seed in range(50 * block, 50 * block + 50):
        r = random.Random(7 * seed + 1)
        queries, outputs = r.randrange(1, 9), r.choice([1, 1, 2])
        levels = Levels.from_sigmas([*(10.0 - i for i in range(queries)), 0.5])
        generator = random_solver(seed, queries, outputs)
        x = numbered(seed, torch.empty(2, 3, dtype=torch.float64))
        states = run_plainly(generator, levels, x, outputs)
        solver = Solver(f"random {seed}", generator, 1, "", outputs=outputs)
        plan = traced(solver, levels, intervals)
        if plan is None:  # refused: all terms of a state cancel, which rounding may hide
            refused += 1
            assert min(state.abs().max() for state in states) <= 1e-12
            continue
        plan = plan_from_dict(plan_to_dict(plan))
        run, found = Run(plan, x, Numbered(x)), []
        while not run.done:
            found.append(run.x)
            assert len(run._values) <= plan.live
            run.advance(*denoise(run.x, run.sigma[0], outputs))
        found.append(run.result)
        used = {step.state for step in plan.steps}
        used |= {name for op in plan.operations for name, _ in getattr(op, "terms", ())}
        assert set(run._values) - ({"x0"} - used) == {plan.result}  # all else has been dropped
        for mine, right in zip(found, states, strict=True):
            assert (mine - right).abs().max() <= 1e-12 * max(1, right.abs().max())
    assert refused < 25  # most are run
