"""Small cores and their first states."""

from flwr_cloned_kd import Core, CoreState, Distillation
from tests.helpers.reference import mlp, snapshot


def make_core(dataset, recipe, model=None, *, distillation=None, **options):
    """Make a core whose Phases 0 and 2 have one recipe, unless `distillation` has another."""
    return Core(
        model=mlp() if model is None else model,
        dataset=dataset,
        recipe=recipe,
        distillation=Distillation(**{"recipe": recipe} | (distillation or {})),
        **options,
    )


def start_of(core):
    """Return the state of a core whose model is not trained yet."""
    return CoreState(snapshot(core.model.state_dict()))
