"""The core: it trains on its own data, then learns from one edge after the other."""

from functools import partial

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from flwr_cloned_kd import VARIANTS, ClonedKD
from flwr_cloned_kd.apps import Report, Settings, build, check_watch, run_baseline, watchers

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run cloned KD, and the strategies to compare it with, from the same first core."""
    settings = Settings.read(context.run_config)
    check_watch(settings)
    core = build.build_core(settings)
    params = core.pretrain()  # Phase 0
    report = Report(settings, core, core.held_out_accuracy(params))
    variant = VARIANTS[settings.variant]
    for name in settings.strategies:
        if name != "cloned-kd":
            run_baseline(name, settings, core, params, grid, report)
            continue
        strategy = ClonedKD(
            core,
            num_clones=build.num_clones(settings),
            max_in_flight=settings.max_in_flight,
            max_together=settings.max_together,
            max_staleness=build.max_staleness(settings),
            staleness_weight=build.staleness_weight(settings),
            revisit=settings.num_rounds > settings.num_edges,
            checkpoint=settings.checkpoint or None,
            keep_rounds=settings.keep_rounds,
            quarantine=settings.quarantined,
            send=variant.init(core),
            wire_dtype=settings.wire_dtype,
            on_round=partial(report.add, name),
            callbacks=watchers(settings, report.folder, name),
        )
        num_rounds = settings.num_rounds or settings.num_edges
        strategy.start(grid, ArrayRecord(params), num_rounds=num_rounds, timeout=settings.timeout)
        report.keep(name, strategy)
    report.finish()
