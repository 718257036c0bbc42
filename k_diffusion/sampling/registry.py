"""The registry of solvers: `@solver` on a generator is all it takes to add a sampling method."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from k_diffusion.sampling.expr import Expr
from k_diffusion.utils import maths
from k_diffusion.utils.levels import Level

Answers = Any  # one Expr, or a tuple of them where a solver declares outputs=2
SolverFunction = Callable[..., Generator[tuple[Expr, Level], Answers, Expr]]
Trace = Generator[tuple[Expr, Level], Answers, Expr]
"""What a solver is once called: it yields (state, level), is sent answers, returns the result."""


@dataclass(frozen=True)
class Solver:
    """A registered sampling method.

    Attributes:
        name: what users call it.
        function: the generator `(x, levels, noise, **options)`.
        order: order of convergence that the formula has on a general problem (weak order for a
            stochastic one) with its default options, measured by the tests.
        source: authors, year, arXiv id, place.
        claimed: the order that its name or its authors give it.
        from_pure_noise: whether it can begin at alpha = 0; the others begin after a step of DDIM.
        orders: for a method with an option `order`: its true order for each value; no others are
            taken, unless
        any_order: it has a formula for any order, of which `orders` tells the first.
        stochastic: whether it draws noise with its default options.
        outputs: answers that it takes from the denoiser for each query.
        predictor: whether a state that it queries may be a mere prediction, corrected later.
    """

    name: str
    function: SolverFunction
    order: int
    source: str
    stochastic: bool = False
    outputs: int = 1
    predictor: bool = False
    options: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)
    claimed: int = 0
    from_pure_noise: bool = False
    orders: Mapping[int, int] = field(default_factory=dict, hash=False, compare=False)
    any_order: bool = False

    @property
    def variants(self) -> tuple[tuple[Mapping[str, Any], int, int], ...]:
        """(options, claimed order, true order): one a value of `order`, where there is such an
        option, or else the method as it is by default."""
        if not self.orders:
            return (({}, self.claimed, self.order),)
        return tuple(({"order": k}, k, true) for k, true in self.orders.items())

    @property
    def summary(self) -> str:
        """First paragraph of the docstring, on one line."""
        return (inspect.getdoc(self.function) or "").split("\n\n")[0].replace("\n", " ")

    def __reduce__(self) -> tuple[Any, ...]:
        """Its name's pickle: functions under a decorator have no other."""
        if SOLVERS.get(self.name) is self:
            return _registered, (self.name,)
        return super().__reduce_ex__(2)  # type: ignore[return-value]

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuses by name an option that the solver does not have, or of another type."""
        for key, value in options.items():
            if key not in self.options:
                raise ValueError(maths.unknown(f"option of {self.name},", key, self.options))
            default = self.options[key]
            kind = float if isinstance(default, float) else type(default)
            good = maths.is_number(value) if kind is float else isinstance(value, kind)
            if not good or isinstance(value, bool) != isinstance(default, bool):
                raise ValueError(f"{self.name}'s {key} must be of type {kind.__name__}: {value!r}")
            kinds = tuple(map(type, default)) if isinstance(default, tuple) else ()
            if kinds and not all(type(item) in kinds for item in value):
                raise ValueError(
                    f"{self.name}'s {key} must hold values of type {kinds[0].__name__}: {value!r}"
                )
            if key == "order" and value < 1:
                raise ValueError(f"{self.name}'s order must be 1 or more, got {value}")
            if key == "order" and self.orders and value not in self.orders and not self.any_order:
                known = ", ".join(map(str, self.orders))
                raise ValueError(f"{self.name}'s order must be one of {known}, got {value}")
            if maths.is_number(value) and not math.isfinite(value):
                raise ValueError(f"{self.name}'s {key} must be finite, got {value!r}")
            if key in ("eta", "s_noise") and value < 0:  # scales of noise, in every solver
                raise ValueError(f"{self.name}'s {key} must be 0 or more, got {value!r}")
            if key in ("eta", "s_noise") and value > MOST_NOISE:
                raise ValueError(f"{self.name}'s {key} must be {MOST_NOISE:g} at most: {value!r}")


SOLVERS: dict[str, Solver] = {}
MOST_NOISE = 1e12
"""The largest eta and s_noise that are taken: beyond it is a mistake, and squares overflow."""


def _registered(name: str) -> Solver:
    return SOLVERS[name]


def solver(
    *,
    order: int | Mapping[int, int],
    source: str,
    claimed: int | None = None,
    stochastic: bool = False,
    outputs: int = 1,
    predictor: bool = False,
    from_pure_noise: bool = False,
    any_order: bool = False,
) -> Callable[[SolverFunction], Solver]:
    """Registers a generator as a solver under its own name; see `Solver` for the arguments.

    Options are the generator's keyword-only parameters, each with a default. For a method with an
    option `order`, give `order` as a mapping from that option's value to the true order.
    """

    def register(function: SolverFunction) -> Solver:
        name = function.__name__
        if name in SOLVERS:
            raise ValueError(f"a solver named {name!r} is registered already")
        parameters = inspect.signature(function).parameters.values()
        options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        for option, default in options.items():
            if default is inspect.Parameter.empty:
                raise TypeError(f"option {option!r} of solver {name!r} needs a default")
        if isinstance(order, Mapping) != ("order" in options):
            raise TypeError(f"solver {name!r}: a mapping of orders goes with an option `order`")
        orders = dict(order) if isinstance(order, Mapping) else {}
        true = orders[options["order"]] if isinstance(order, Mapping) else order
        named = options.get("order", true) if claimed is None else claimed
        SOLVERS[name] = Solver(
            name,
            function,
            true,
            source,
            stochastic=stochastic,
            outputs=outputs,
            predictor=predictor,
            options=options,
            claimed=named,
            from_pure_noise=from_pure_noise,
            orders=orders,
            any_order=any_order,
        )
        return SOLVERS[name]

    return register


def get_solver(name: str | Solver) -> Solver:
    """A registered solver; a Solver passes through.

    Raises:
        ValueError: unknown name (the nearest known one is offered).
    """
    if isinstance(name, Solver):
        return name
    if not isinstance(name, str) or name not in SOLVERS:
        raise ValueError(maths.unknown("sampler", name, SOLVERS))
    return SOLVERS[name]
